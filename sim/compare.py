"""Where two executions that must be equal first differ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from weft.arch.errors import WeftError
from weft.arch.isa import Load, Matrix, Store, Unit, Vector, VectorOp
from weft.arch.program import Program, Segment
from weft.arch.trace import WRITERS, Trace, WriteLog
from weft.sim.machine import Machine


@dataclass(frozen=True)
class Difference:
    """One difference. `what` is data, address, tag, mask, count (of writes), shape or layer (one is missing).

    `index` is (y, x, channel) in the layer's output where the Program tells it; `write` counts the unit's
    scratchpad writes, `instruction` the Program's instructions. None is what does not apply.
    """

    layer: str
    what: str
    expected: object
    got: object
    unit: Unit | None = None
    write: int | None = None
    instruction: int | None = None
    index: tuple[int, int, int] | None = None
    address: int | None = None
    lane: int | None = None
    cycle: int | None = None

    def describe(self) -> str:
        """One line: layer, place, expected, got, cycle."""
        parts = [f"layer '{self.layer}'"]
        if self.index is not None:
            parts.append("y {} x {} channel {}".format(*self.index))
        if self.unit is not None:
            parts.append(f"{self.unit.name} write {self.write}")
        for name in ("instruction", "address", "lane"):
            if (value := getattr(self, name)) is not None:
                parts.append(f"{name} {value}")
        text = f"{', '.join(parts)}: {self.what} expected {self.expected}, got {self.got}"
        return text if self.cycle is None else f"{text}, at cycle {self.cycle}"


def first_difference(expected: Trace, actual: Trace, program: Program) -> Difference | None:
    """The first scratchpad write of any unit that differs in address, tag, mask, masked data or existence.

    Each unit's writes are compared in order; among the units' first differences the one with the smallest
    cycle of `actual` is returned. `expected` must be the trace of `program`.
    """
    found = [
        difference for unit in WRITERS
        if (difference := _unit_difference(unit, _log(expected, unit, program), _log(actual, unit, program), program))
    ]
    never = np.iinfo(np.int64).max  # a write that is missing shows at the end
    return min(found, key=lambda d: never if d.cycle is None else d.cycle, default=None)


def compare_layers(expected: dict[str, np.ndarray], actual: dict[str, np.ndarray]) -> Difference | None:
    """The first differing element of the first differing layer, in the order of `expected`; arrays [H, W, C]."""
    for layer, want in expected.items():
        if layer not in actual:
            return Difference(layer, "layer", "present", "missing")
        got = actual[layer]
        if want.shape != got.shape:
            return Difference(layer, "shape", want.shape, got.shape)
        different = want != got
        if different.any():
            index = tuple(int(k) for k in np.unravel_index(different.argmax(), want.shape))
            return Difference(layer, "data", int(want[index]), int(got[index]), index=index)
    return None


def _log(trace: Trace, unit: Unit, program: Program) -> WriteLog:
    if unit in trace.writes:
        return trace.writes[unit]
    lanes = program.config.lanes
    none = np.zeros(0, np.int64)
    return WriteLog(none, none, none, np.zeros((0, lanes), np.uint8), np.zeros((0, lanes), bool))


def _unit_difference(unit: Unit, expected: WriteLog, actual: WriteLog, program: Program) -> Difference | None:
    n = min(len(expected), len(actual))
    wrong = {
        "address": expected.address[:n] != actual.address[:n],
        "tag": expected.tag[:n] != actual.tag[:n],
        "mask": (expected.mask[:n] != actual.mask[:n]).any(axis=1),
        "data": ((expected.data[:n] != actual.data[:n]) & expected.mask[:n]).any(axis=1),
    }
    different = np.logical_or.reduce(list(wrong.values()))
    if not different.any():
        if len(expected) == len(actual):
            return None
        longer = expected if len(expected) > n else actual
        where = _place(unit, n, program) if longer is expected else {}
        cycle = None if longer is expected else int(actual.cycle[n])
        return Difference(_layer_name(program, int(longer.tag[n])), "count", len(expected), len(actual), unit, n,
                          address=int(longer.address[n]), cycle=cycle, **where)
    k = int(different.argmax())
    what = next(name for name, flags in wrong.items() if flags[k])
    want, got = getattr(expected, what)[k], getattr(actual, what)[k]
    lane = None
    if what in ("mask", "data"):
        lane = int(((want != got) & (expected.mask[k] | (what == "mask"))).argmax())
        want, got = want[lane], got[lane]
    tag = int(expected.tag[k])
    return Difference(
        _layer_name(program, tag), what, _value(want, what, tag, program), _value(got, what, tag, program), unit, k,
        address=int(expected.address[k]), lane=lane, cycle=int(actual.cycle[k]), **_place(unit, k, program, lane))


def _value(raw: np.generic, what: str, tag: int, program: Program) -> int:
    """A byte as the code it stands for, anything else as it is."""
    signed = what == "data" and tag < len(program.layers) and not program.layers[tag].unsigned
    return int(np.uint8(raw).view(np.int8)) if signed else int(raw)


def _layer_name(program: Program, tag: int) -> str:
    return program.layers[tag].name if tag < len(program.layers) else f"tag {tag}"


def _place(unit: Unit, write: int, program: Program, lane: int | None = None) -> dict[str, object]:
    """Instruction and, with a lane, index in the layer's output of the `write`-th write of a unit.

    Empty when the Program does not tell. How many writes a MATRIX instruction makes is in its parameters, so
    the loads of constants are replayed.
    """
    memory = np.zeros(max(program.segment_bytes[Segment.CONSTANTS], program.constants.size), np.uint8)
    memory[: program.constants.size] = program.constants
    machine = Machine(program.config, memory, (0,))
    before = 0
    try:
        for number, instruction in enumerate(program.decoded()):
            if instruction.unit == Unit.LOAD and instruction.base == Segment.CONSTANTS:
                machine.tokens[:] = 1  # only the effect on the scratchpad is wanted
                machine.step(number, instruction)
            if instruction.unit != unit:
                continue
            counts = _write_counts(machine, instruction)
            if write < before + counts.sum():
                place: dict[str, object] = {"instruction": number}
                if isinstance(instruction, Matrix | Vector) and lane is not None:
                    index = _index(machine, program, number, instruction, counts, write - before, lane)
                    place |= {"index": index} if index else {}
                return place
            before += int(counts.sum())
    except WeftError:
        pass  # a faulty Program; address and lane must do
    return {}


def _write_counts(machine: Machine, i: Load | Matrix | Vector) -> np.ndarray:
    """Scratchpad writes of an instruction by part: tiles of MATRIX, blocks of VECTOR, planes of LOAD."""
    if isinstance(i, Load):
        return np.full(0 if isinstance(i, Store) else i.planes, i.rows * i.run)
    if isinstance(i, Matrix):
        return machine.matrix_descriptors(i)[2].any(axis=2).sum(axis=1) * (i.rows * i.columns)
    return np.full(i.blocks, i.rows * i.columns * _taps_written(i))


def _taps_written(i: Vector) -> int:
    return i.kernel_y * i.kernel_x if i.operation == VectorOp.COLUMNS else 1


def _index(machine: Machine, program: Program, number: int, i: Matrix | Vector, counts: np.ndarray, write: int,
           lane: int) -> tuple[int, int, int] | None:
    """(y, x, channel) of byte `lane` of the `write`-th write of instruction `number`; None for no logical channel."""
    layer, config = program.layers[i.tag], machine.config
    if layer.unit.upper() != i.unit.name:
        return None
    part = int(np.searchsorted(counts.cumsum(), write, side="right"))
    write -= int(counts[:part].sum())
    number_of_part = int(program.first_part[number]) + part
    if isinstance(i, Matrix):
        _, group, mask = machine.matrix_descriptors(i)
        used = np.flatnonzero(mask[part].any(axis=1))
        pixel, which = divmod(write, len(used))
        column = lane - int(group[part, used[which]]) * config.columns
        if not (0 <= column < config.columns and mask[part, used[which], column]):
            return None
        position = number_of_part * config.columns + column
    else:
        taps = _taps_written(i)
        pixel, tap = divmod(write, taps)
        position = (number_of_part * taps + tap) * config.lanes + lane
    channel = layer.channel_of[position] if position < len(layer.channel_of) else -1
    y, x = divmod(pixel, i.columns)
    return (int(program.first_row[number]) + y, x, channel) if channel >= 0 else None
