"""Benchmarks: whole published networks, and the deformable operator against the plain one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from weft.arch.config import EngineConfig
from weft.arch.device import Device
from weft.arch.isa import Sampling, Unit
from weft.arch.program import Program
from weft.arch.trace import Trace
from weft.compiler.graph import (
    Conv,
    Deformable,
    DeformConv,
    DeformDepthwise,
    Depthwise,
    Graph,
    Requantize,
    Tensor,
    Window,
)
from weft.compiler.pipeline import compile_graph
from weft.reports.schema import Result
from weft.sim.functional import FunctionalDevice
from weft.sw.compile import compile_file
from weft.sw.devices import make_device
from weft.sw.images import load_images, to_codes
from weft.sw.reference import evaluate
from weft.sw.simulate import Checked, expected_cycles, run_checked, to_result
from weft.sw.terminal import Terminal


def bench_codenet(terminal: Terminal, member: str, config: EngineConfig, device: str, memory: str, folder: Path,
                  seed: int = 0) -> Result:
    """One image through a published network with random weights, every layer compared."""
    from weft.models import zoo
    from weft.models.export import export_qonnx

    name = f"codenet-{member.removeprefix('codenet-')}"
    terminal.say(f"export    {name}")
    zoo.entry(name)
    path = folder / f"{name}.onnx"
    export_qonnx(zoo.build(name, seed), path)
    graph, program = compile_file(path, config)
    tensor = program.inputs[0]
    pixels = load_images("digits", 1, (tensor.height, tensor.width))[0][1]
    engine = make_device(device, config, memory)
    checked = _run(terminal, graph, program, {tensor.name: to_codes(pixels, tensor)}, engine)
    return replace(to_result(f"CoDeNet {member}", program, device, memory, [checked]), model=name)


def _run(terminal: Terminal, graph: Graph, program: Program, inputs: dict[str, np.ndarray], engine: Device) -> Checked:
    terminal.say(f"run       {program.model}: {len(program.instructions)} instructions")
    functional = engine if isinstance(engine, FunctionalDevice) else FunctionalDevice(program.config, trace=True)
    functional.load(program)
    golden = evaluate(graph, inputs)
    with terminal.progress(program.model, expected_cycles(program), "cycles") as done:
        if engine is not functional:
            engine.load(program)
            engine.progress = done  # of an RtlDevice
        return run_checked(engine, functional, inputs, golden)


# --- the deformable operator ---------------------------------------------------------------------------------------

SIDE, CHANNELS = 64, 256
PAD = Window((3, 3), padding=(1, 1, 1, 1))
TAPS = 9
VARIANTS = {  # sampling, codes per pixel, fraction bits, reach in pixels, requantize shift that spreads the offsets
    "plain": (Sampling.GRID, 0, 0, 0, 0),
    "square": (Sampling.SQUARE, 1, 0, 8, 23),
    "bounded": (Sampling.OFFSETS, 2 * TAPS, 4, 8, 23),
    "unrestricted": (Sampling.OFFSETS, 2 * TAPS, 1, 64, 22),
}


def deformable_graph(variant: str, depthwise: bool = True, side: int = SIDE, channels: int = CHANNELS,
                     seed: int = 0) -> Graph:
    """image -> 3x3 stem -> features; features -> 1x1 -> offsets; (features, offsets) -> the operator `y`."""
    sampling, codes, fraction, reach, shift = VARIANTS[variant]
    rng = np.random.default_rng(seed)
    graph = Graph(f"deformable-{variant}" if depthwise else f"full-{variant}", inputs=["image"], outputs=["y"])

    def tensor(name: str, count: int, scale: float = 1.0, unsigned: bool = False) -> None:
        graph.tensors[name] = Tensor(name, side, side, count, scale, unsigned)

    def scaled(count: int, mult: int, shift: int, low: int, high: int) -> Requantize:
        return Requantize(rng.integers(-99, 100, count).astype(np.int32), np.full(count, mult, np.uint16),
                          np.full(count, shift, np.uint8), low, high)

    def weights(*shape: int) -> np.ndarray:
        return rng.integers(-7, 8, shape).astype(np.int8)

    tensor("image", 3)
    tensor("x", channels, unsigned=True)
    graph.ops.append(Conv("stem", ("image",), "x", PAD, weights(channels, 3, 3, 3), 8,
                          scaled(channels, 1 << 15, 18, 0, 255)))
    inputs: tuple[str, ...] = ("x",)
    if codes:
        low, high = (-7, 8) if sampling is Sampling.SQUARE else (-128, 127)
        tensor("offsets", codes, 2.0**-fraction)
        graph.ops.append(Conv("offset", ("x",), "offsets", Window((1, 1)), weights(codes, 1, 1, channels), 4,
                              scaled(codes, 1 << 15, shift, low, high)))
        inputs = ("x", "offsets")
    tensor("y", channels)
    shape = (channels, 3, 3) if depthwise else (channels, 3, 3, channels)
    fields = {"name": "operator", "inputs": inputs, "output": "y", "window": PAD, "weight": weights(*shape), "bits": 4,
              "requantize": scaled(channels, 1 << 15, 19 if depthwise else 22, -128, 127)}
    kind = {(True, False): Depthwise, (False, False): Conv, (True, True): DeformDepthwise, (False, True): DeformConv}
    operator = kind[depthwise, bool(codes)]
    if codes:
        fields["deformable"] = Deformable(sampling, fraction, reach)
    graph.ops.append(operator(**fields))
    return graph


def unit_cycles(program: Program, trace: Trace, name: str) -> int:
    """Cycles in which the matrix or the vector unit has an instruction of the layer `name` under way."""
    tags = [tag for tag, layer in enumerate(program.layers) if layer.name == name]
    instructions = list(program.decoded())
    end = max((int(times.max()) for times in trace.retire.values() if len(times)), default=0)
    active = np.zeros(end + 1, bool)
    for unit in (Unit.MATRIX, Unit.VECTOR):
        mine = [item for item in instructions if item.unit is unit]
        for item, start, stop in zip(mine, trace.start[unit], trace.retire[unit], strict=True):
            if item.tag in tags:
                active[int(start) : int(stop)] = True
    return int(active.sum())


def bench_deformable(terminal: Terminal, config: EngineConfig, device: str, memory: str,
                     seed: int = 0) -> dict[str, Any]:
    """Each variant of the depthwise operator, and the full one, on the same feature map.

    `cycles` are those of the operator's units, `run_cycles` those of the whole graph with stem and offsets.
    """
    rows: dict[str, dict[str, Any]] = {}
    cases = {variant: partial(deformable_graph, variant) for variant in VARIANTS}
    cases["full_plain"] = partial(deformable_graph, "plain", depthwise=False)
    cases["full_square"] = partial(deformable_graph, "square", depthwise=False)
    engine = make_device(device, config, memory)
    for name, make in cases.items():
        graph = make(seed=seed)
        program = compile_graph(graph, config)
        image = np.random.default_rng(seed).integers(-128, 128, (SIDE, SIDE, 3))
        checked = _run(terminal, graph, program, {"image": image}, engine)
        trace = checked.run.trace
        timed = checked.run.cycles and trace is not None
        rows[name] = {
            "cycles": unit_cycles(program, trace, "operator") if timed else 0, "run_cycles": checked.run.cycles,
            "macs": graph.macs(graph.ops[-1]), "mismatches": checked.mismatches, "first_difference": checked.first,
            "wall_s": round(checked.wall_s, 2),
        }
    for row in rows.values():
        row["ratio_to_plain"] = round(row["cycles"] / rows["plain"]["cycles"], 3) if rows["plain"]["cycles"] else 0.0
    return {"side": SIDE, "channels": CHANNELS, "engine": config.name, "device": device, "memory": memory,
            "mismatches": sum(row["mismatches"] for row in rows.values()), "variants": rows}
