"""The whole back end: any network, any scratchpad, the same results as the golden operators."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kit.graphs import HALF, SAME, NetworkBuilder, shuffle_network
from weft.arch.config import EngineConfig, load_config
from weft.arch.errors import ModelError
from weft.arch.isa import Sampling
from weft.compiler.graph import Graph, Window
from weft.compiler.pipeline import compile_graph
from weft.sim.compare import compare_layers
from weft.sim.functional import FunctionalDevice
from weft.sw.reference import evaluate

BASE, TEST = load_config("base"), load_config("test")


def assert_exact(graph: Graph, config: EngineConfig, seed: int = 0) -> None:
    """Compiles, runs the functional machine, compares every layer and output with the golden operators."""
    tensor = graph.tensors["image"]
    image = np.random.default_rng(seed).integers(-128, 128, tensor.shape)
    golden = evaluate(graph, {"image": image})
    device = FunctionalDevice(config)
    device.load(compile_graph(graph, config))
    result = device.run({"image": image})
    layers = {name: codes for name, codes in device.layers.items() if name in golden}
    assert len(layers) >= len(graph.outputs)
    difference = compare_layers({name: golden[name] for name in layers}, layers)
    assert difference is None, difference.describe()
    for name in graph.outputs:
        np.testing.assert_array_equal(result.outputs[name], golden[name])


@pytest.mark.parametrize("words", [1024, 256, 160, 128])
@pytest.mark.parametrize("config", [BASE, TEST], ids=lambda config: config.name)
def test_any_scratchpad(config, words):
    """The less fits, the more is streamed by rows and moved to memory; the results stay."""
    assert_exact(shuffle_network(), replace(config, bank_words=words))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1000), half=st.integers(1, 70), blocks=st.integers(1, 4), side=st.sampled_from([4, 6, 16]),
       words=st.sampled_from([200, 1024]))
def test_any_shuffle_network(seed, half, blocks, side, words):
    assert_exact(shuffle_network(seed, side, half, blocks), replace(BASE, bank_words=words), seed)


@pytest.mark.parametrize("sampling", [Sampling.SQUARE, Sampling.OFFSETS])
@pytest.mark.parametrize("channels", [None, 20])
@pytest.mark.parametrize("fraction", [0, 2, 4])
def test_deformable(sampling, channels, fraction):
    b = NetworkBuilder(3, 40, 24)
    x = b.conv("image", 48, SAME, bits=8)
    assert_exact(b.output(b.deform(x, sampling, channels, fraction)), replace(BASE, bank_words=700))


def test_operators_on_their_own():
    """Addition, enlargement of a depthwise result, dilation, unequal padding, a wide and rectangular image."""
    b = NetworkBuilder(5, 12, 50)
    x = b.conv("image", 40, Window((2, 3), stride=(2, 2), padding=(0, 1, 1, 1)), bits=8)
    y = b.depthwise(x, Window((3, 3), dilation=(2, 2), padding=(2, 2, 2, 2)), unsigned=True)
    z = b.add(b.conv(y, 40), b.conv(x, 40))
    big = b.upsample(b.depthwise(z, unsigned=True))
    assert_exact(b.output(b.conv(big, 7, HALF), b.pool(z)), BASE)


def test_add_of_streamed_operands():
    b = NetworkBuilder(6, 64, 32)
    x = b.conv("image", 64, SAME, bits=8)
    assert_exact(b.output(b.add(b.conv(x, 64), b.conv(x, 64))), replace(BASE, bank_words=160))


def test_deterministic(tmp_path):
    for name in ("one", "two"):
        compile_graph(shuffle_network(), BASE).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_too_small_a_scratchpad_is_one_message():
    with pytest.raises(ModelError, match=r"not fit the scratchpad of 64 words of engine 'base'.*larger scratch"):
        compile_graph(shuffle_network(), replace(BASE, bank_words=8))


def test_wide_window_of_the_image():
    b = NetworkBuilder()
    with pytest.raises(ModelError, match=r"a window of the image \(5x5x3\) must fit one word of 32 bytes"):
        compile_graph(b.output(b.conv("image", 8, Window((5, 5), padding=(2, 2, 2, 2)), bits=8)), BASE)


def test_vector_result_read_in_parts():
    b = NetworkBuilder()
    x = b.depthwise(b.conv("image", 8, SAME, bits=8), unsigned=True)
    half = b.select(*((x, c) for c in range(4)))
    with pytest.raises(ModelError, match="insert a 1x1 convolution after it"):
        compile_graph(b.output(b.conv(x, 4), b.conv(half, 4)), BASE)
