"""Whole networks: golden = functional = RTL, every element of every layer, on one and the same engine."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kit.graphs import SAME, NetworkBuilder, shuffle_network
from weft.arch.config import load_config
from weft.arch.isa import Sampling
from weft.compiler.graph import Graph
from weft.compiler.pipeline import compile_graph
from weft.sim.functional import FunctionalDevice
from weft.sim.memory import parse_memory
from weft.sim.rtl import RtlDevice
from weft.sw.reference import evaluate
from weft.sw.simulate import Checked, run_checked

CONFIG = load_config("test")


def run(graph: Graph, memory: str, images: int = 1) -> list[Checked]:
    """Runs a network on both Devices, which keep their scratchpad from image to image."""
    program = compile_graph(graph, CONFIG)
    engine, functional = RtlDevice(CONFIG, parse_memory(memory), trace=True), FunctionalDevice(CONFIG, trace=True)
    engine.load(program)
    functional.load(program)
    rng, shape = np.random.default_rng(1), graph.tensors["image"].shape
    checked = []
    for _ in range(images):
        inputs = {"image": rng.integers(-128, 128, shape)}
        checked.append(run_checked(engine, functional, inputs, evaluate(graph, inputs)))
    return checked


@pytest.mark.parametrize("memory", ["ideal", "fixed:40:6.5", "gate:10:15:19"])
def test_network_under_every_memory(memory):
    for result in run(shuffle_network(), memory, images=2):
        assert result.mismatches == 0, result.first
        assert result.layers_compared > 20 and result.run.cycles > 0


@pytest.mark.parametrize("sampling", [Sampling.SQUARE, Sampling.OFFSETS])
@pytest.mark.parametrize("channels", [None, 20], ids=["depthwise", "full"])
def test_deformable_variants(sampling, channels):
    b = NetworkBuilder(3, 40, 24)
    x = b.conv("image", 48, SAME, bits=8)
    (result,) = run(b.output(b.deform(x, sampling, channels)), "fixed:40:6.5")
    assert result.mismatches == 0, result.first


def test_a_difference_is_told_with_layer_index_and_cycle():
    """One weight byte changed for one Device: the report names the first layer that suffers."""
    graph = shuffle_network()
    program = compile_graph(graph, CONFIG)
    engine, functional = RtlDevice(CONFIG, trace=True), FunctionalDevice(CONFIG, trace=True)
    engine.load(program)
    functional.load(program)
    damaged = bytearray(program.constants.tobytes())
    stem = next(layer.name for layer in program.layers if layer.unit == "matrix")
    weights = CONFIG.tile_parameter_words * CONFIG.lanes * -(-20 // CONFIG.columns)
    damaged[weights] ^= 0x10
    engine.write_memory(0, bytes(damaged))
    inputs = {"image": np.random.default_rng(1).integers(-128, 128, graph.tensors["image"].shape)}
    result = run_checked(engine, functional, inputs, evaluate(graph, inputs))
    assert result.mismatches > 0
    for word in (stem, "expected", "got", "cycle"):
        assert word in result.first
