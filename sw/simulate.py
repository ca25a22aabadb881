"""Running a Program on a Device and comparing everything it computes: golden = functional = Device."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from weft.arch.config import EngineConfig
from weft.arch.device import Device, RunResult
from weft.arch.program import Program, write_atomically
from weft.arch.trace import WRITERS, Trace
from weft.reports.schema import Result
from weft.sim.compare import compare_layers, first_difference
from weft.sim.functional import FunctionalDevice
from weft.sw.devices import make_device
from weft.sw.images import load_images, to_codes
from weft.sw.profile import layer_rows, timeline
from weft.sw.terminal import Terminal

CLOCK = 250e6  # Hz, of the published table
EXPECTED_USE = 0.6  # of the array, for progress bars


@dataclass
class Checked:
    """One inference and how it compares. `mismatches` counts differing layer outputs; `first` describes the first."""

    run: RunResult
    layers_compared: int
    mismatches: int
    first: str = ""
    wall_s: float = 0.0
    layers: dict[str, np.ndarray] = field(default_factory=dict)


def run_checked(device: Device, functional: FunctionalDevice, inputs: dict[str, np.ndarray],
                golden: Mapping[str, np.ndarray] | None = None) -> Checked:
    """Runs both devices on one input and compares them with each other and with the golden layer outputs.

    The functional machine's layers are compared with `golden`, element by element. Another Device is compared by
    every scratchpad write of every unit, thus layer by layer in what the hardware wrote, and by what it stored.
    """
    program = functional.program
    assert program is not None
    expected = functional.run(inputs)
    began = time.perf_counter()
    run = expected if device is functional else device.run(inputs)
    wall = time.perf_counter() - began
    wrong: dict[str, str] = {}  # layer: first difference
    compared = list(program.layers)
    if golden is not None:
        compared = [layer for layer in program.layers if layer.output in golden]
        for layer in compared:
            name = layer.output
            got = {name: functional.layers[name]} if name in functional.layers else {}
            if difference := compare_layers({name: golden[name]}, got):
                wrong.setdefault(layer.name, f"functional machine, {difference.describe()}")
    if run is not expected:
        assert expected.trace is not None and run.trace is not None
        if difference := first_difference(expected.trace, run.trace, program):
            wrong.setdefault(difference.layer, f"RTL, {difference.describe()}")
            for name in _differing(expected.trace, run.trace, program):
                wrong.setdefault(name, "")
        if difference := compare_layers(expected.outputs, run.outputs):
            wrong.setdefault(difference.layer, f"RTL, {difference.describe()}")
    if golden is not None and (difference := compare_layers({k: golden[k] for k in run.outputs}, run.outputs)):
        wrong.setdefault(difference.layer, f"stored result, {difference.describe()}")
    return Checked(run, len(compared), len(wrong), next(filter(None, wrong.values()), ""), wall, functional.layers)


def _differing(expected: Trace, actual: Trace, program: Program) -> list[str]:
    """Names of the layers whose scratchpad writes differ."""
    names = []
    for tag, layer in enumerate(program.layers):
        for unit in WRITERS:
            want, got = (trace.writes[unit] for trace in (expected, actual))
            a, b = want.tag == tag, got.tag == tag
            if (a.sum() != b.sum() or (want.address[a] != got.address[b]).any() or (want.mask[a] != got.mask[b]).any()
                    or ((want.data[a] != got.data[b]) & want.mask[a]).any()):
                names.append(layer.name)
                break
    return names


def expected_cycles(program: Program) -> float:
    """A rough guess, good enough for a progress bar."""
    return max(1.0, sum(layer.macs for layer in program.layers) / program.config.macs / EXPECTED_USE)


def simulate_file(terminal: Terminal, path: Path, config: EngineConfig | None, device: str, memory: str, images: str,
                  count: int, seed: int, waves: Path | None, out: Path | None) -> Result:
    """Runs a Program file on images. `config`: the engine it must be for. `out`: folder for the outputs, as .npz."""
    program = Program.load(path)
    if config is not None:
        program.require_config(config)
    tensor = program.inputs[0]
    pictures = load_images(images, count, (tensor.height, tensor.width), seed)
    functional = FunctionalDevice(program.config, trace=True)
    functional.load(program)
    runs, before = [], 0.0
    with terminal.progress(f"{program.model} on {device}", expected_cycles(program) * len(pictures), "cycles") as done:
        engine: Device = functional
        if device != "functional":
            engine = make_device(device, program.config, memory, waves=waves,
                                 progress=lambda cycles: done(before + cycles))
            engine.load(program)
        for name, pixels in pictures:
            checked = run_checked(engine, functional, {tensor.name: to_codes(pixels, tensor)})
            runs.append(checked)
            before += checked.run.cycles
            terminal.say(f"{name}: {checked.run.cycles:,} cycles, {checked.mismatches} of {checked.layers_compared} "
                         "layers differ" if device != "functional" else f"{name}: done")
            if out is not None:
                content = io.BytesIO()
                np.savez_compressed(content, **checked.run.outputs)
                write_atomically(out / f"{Path(name).stem.replace(' ', '-')}.npz", content.getvalue())
    return to_result(f"{program.model} on {device}", program, device, memory, runs)


def to_result(title: str, program: Program, device: str, memory: str, runs: list[Checked]) -> Result:
    """The result record of some inferences; cycles, layers and timeline are those of the first."""
    first = runs[0]
    macs, cycles = sum(layer.macs for layer in program.layers), first.run.cycles
    wall = sum(run.wall_s for run in runs)
    total = sum(run.run.cycles for run in runs)
    return Result(
        title=title, model=program.model, engine=asdict(program.config), device=device,
        memory=memory if cycles else "none", images=len(runs),
        layers_compared=sum(run.layers_compared for run in runs), mismatches=sum(run.mismatches for run in runs),
        macs=macs, cycles=cycles, array_macs=program.config.macs,
        efficiency=round(macs / (program.config.macs * cycles), 4) if cycles else 0.0,
        fps_at_250mhz=round(CLOCK / cycles, 2) if cycles else 0.0,
        simulated_cycles_per_s=round(total / wall) if total else 0.0, wall_s=round(wall, 3),
        first_difference=next((run.first for run in runs if run.first), ""),
        counters={name: int(value) for name, value in first.run.counters.items() if name != "simulated_cycles_per_s"},
        layers=layer_rows(program, first.run),
        timeline=timeline(program, first.run.trace) if cycles and first.run.trace else [])
