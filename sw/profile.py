"""Where the cycles of a run went: per layer and per unit, from the Trace; bytes from the Program."""

from __future__ import annotations

from collections import Counter

import numpy as np

from weft.arch.device import RunResult
from weft.arch.isa import Instruction, Load, Matrix, Store, Unit
from weft.arch.program import Program
from weft.arch.trace import Trace
from weft.reports.schema import LayerRow, Span

# A cycle belongs to the layer of the busiest unit: the first of these that is working.
PRIORITY = (Unit.MATRIX, Unit.VECTOR, Unit.LOAD, Unit.STORE)
NOBODY = len(Unit)


def _by_unit(program: Program) -> dict[Unit, list[Instruction]]:
    """Instructions of each unit in program order, the order of a Trace."""
    units: dict[Unit, list[Instruction]] = {unit: [] for unit in Unit}
    for instruction in program.decoded():
        if instruction.unit is not None:
            units[instruction.unit].append(instruction)
    return units


def ownership(program: Program, trace: Trace, cycles: int) -> tuple[np.ndarray, np.ndarray]:
    """(layer, unit) that each cycle belongs to; a cycle in which no unit works belongs to the layer that starts next.

    Every cycle has one owner, so the layers' cycles add up to the run's, however much the units overlap.
    """
    layer, worker = np.full(cycles, -1, np.int32), np.full(cycles, NOBODY, np.int8)
    instructions = _by_unit(program)
    for unit in reversed(PRIORITY):
        starts, ends = trace.start.get(unit, ()), trace.retire.get(unit, ())
        # A unit starts its next instruction before the last one's results are out: the later one owns the overlap.
        for instruction, start, end in zip(instructions[unit], starts, ends, strict=False):
            layer[int(start) : int(end)] = instruction.tag
            worker[int(start) : int(end)] = unit
    idle = layer < 0
    following = np.minimum.accumulate(np.where(idle, cycles, np.arange(cycles))[::-1])[::-1]
    last = layer[~idle][-1] if (~idle).any() else 0
    layer[idle] = np.append(layer, last)[following[idle]]
    return layer, worker


def timeline(program: Program, trace: Trace) -> list[Span]:
    """What every unit did when; neighbouring instructions of one layer are one span."""
    spans: list[Span] = []
    for unit, instructions in _by_unit(program).items():
        name = unit.name.lower()
        mine: list[Span] = []
        for item, start, end in zip(instructions, trace.start.get(unit, ()), trace.retire.get(unit, ()), strict=False):
            if mine and mine[-1].layer == item.tag and start <= mine[-1].end + 1:
                mine[-1] = Span(name, item.tag, mine[-1].start, max(mine[-1].end, int(end)))
            else:
                mine.append(Span(name, item.tag, int(start), int(end)))
        spans += mine
    return spans


def layer_rows(program: Program, result: RunResult | None = None) -> list[LayerRow]:
    """One row per layer; cycles and array use only from a Device with time and a trace."""
    word = program.config.word_bytes
    read: Counter[int] = Counter()
    written: Counter[int] = Counter()
    for item in program.decoded():
        if isinstance(item, Store):  # a kind of Load
            written[item.tag] += item.run * item.rows * item.planes * word
        elif isinstance(item, Load):
            read[item.tag] += item.run * item.rows * item.planes * word
    working: dict[int, dict[str, int]] = {}
    if result is not None and result.trace is not None and result.cycles:
        layer, worker = ownership(program, result.trace, result.cycles)
        names = [unit.name.lower() for unit in Unit] + ["nobody"]
        for number in range(len(program.layers)):
            counts = np.bincount(worker[layer == number], minlength=len(names))
            working[number] = {name: int(count) for name, count in zip(names, counts, strict=True) if count}
    wide = {item.tag for item in program.decoded() if isinstance(item, Matrix) and item.wide}
    rows = []
    for number, info in enumerate(program.layers):
        cycles = sum(working.get(number, {}).values())
        slots = 0 if info.unit != "matrix" else info.macs * (2 if number in wide else 1)
        rows.append(LayerRow(
            number, info.name, info.operation, info.unit, info.height, info.width,
            info.channels, info.macs, info.weight_bits, read[number], written[number], cycles,
            slots / (program.config.macs * cycles) if cycles else 0.0, working.get(number, {})))
    return rows

