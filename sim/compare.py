"""Where two executions that must be equal first differ."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import numpy as np

from weft.arch.config import EngineConfig
from weft.arch.errors import WeftError
from weft.arch.isa import Instruction, Load, Matrix, Row, RowLayout, RowOp, Store, Unit, Vector, VectorOp
from weft.arch.program import Program, Segment
from weft.arch.trace import WRITERS, Trace, WriteLog
from weft.sim.machine import Machine


@dataclass(frozen=True)
class Difference:
    """One difference. `what` is data, address, tag, mask, count (of writes), shape or layer (one is missing).

    `index` is (y, x, channel) in the layer's output where the Program tells it, y in a language model counting from
    the instruction's first row; `write` counts the unit's scratchpad writes, `instruction` the Program's
    instructions. None is what does not apply.
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
    return _earliest(
        difference for unit in WRITERS
        if (difference := _unit_difference(unit, _log(expected, unit, program), _log(actual, unit, program), program)))


def compare_layers(expected: dict[str, np.ndarray], actual: dict[str, np.ndarray]) -> Difference | None:
    """The first differing element of the first differing layer, in the order of `expected`.

    Arrays are [H, W, C], or [rows, C] in a language model.
    """
    for layer, want in expected.items():
        if layer not in actual:
            return Difference(layer, "layer", "present", "missing")
        got = actual[layer]
        if want.shape != got.shape:
            return Difference(layer, "shape", want.shape, got.shape)
        different = want != got
        if different.any():
            place = np.unravel_index(different.argmax(), want.shape)
            index = int(place[0]), int(place[1]) if want.ndim == 3 else 0, int(place[-1])
            return Difference(layer, "data", int(want[place]), int(got[place]), index=index)
    return None


class StreamingComparison:
    """Compares a run while it goes on with the functional machine's, which is advanced as far as needed.

    `steps` yields what FunctionalDevice.steps yields. Give `consume` the traces of successive parts of the run, then
    call `finish`. Each unit's writes are compared in order; `difference` is the first one found, in the order of
    cycles within a part; behind it nothing is compared. `compared` counts writes that were equal. What is kept in
    memory are the writes of instructions by which one unit is ahead of another.
    """

    def __init__(self, program: Program, steps: Iterator[tuple[int, Instruction, WriteLog | None]]) -> None:
        self.program = program
        self.difference: Difference | None = None
        self._steps = iter(steps)
        self._waiting: dict[Unit, deque[_Expected]] = {unit: deque() for unit in WRITERS}
        self._done = dict.fromkeys(WRITERS, 0)  # writes of each unit compared

    @property
    def compared(self) -> int:
        return sum(self._done.values())

    def consume(self, trace: Trace) -> None:
        """Compares the next part of the run. `trace` need not hold every unit."""
        if self.difference is not None:
            return
        self._keep(found for unit, log in trace.writes.items() if (found := self._unit(unit, log)))

    def finish(self) -> Difference | None:
        """Ends the comparison: every write must have come. Returns `difference`."""
        if self.difference is None:
            for _ in self._advance():
                pass
            self._keep(self._missing(unit) for unit in WRITERS if self._next(unit))
        return self.difference

    def _keep(self, found: Iterator[Difference]) -> None:
        self.difference = _earliest(found)

    def _unit(self, unit: Unit, log: WriteLog) -> Difference | None:
        at = 0
        while at < len(log):
            expected = self._next(unit)
            if expected is None:
                return Difference(_layer_name(self.program, int(log.tag[at])), "count", self._done[unit],
                                  self._done[unit] + len(log) - at, unit, self._done[unit],
                                  address=int(log.address[at]), cycle=int(log.cycle[at]))
            count = min(len(log) - at, len(expected.log) - expected.compared)
            want, got = _part(expected.log, expected.compared, count), _part(log, at, count)
            if mismatch := _mismatch(want, got):
                return _difference(self.program, unit, self._done[unit], want, got, mismatch, expected.number,
                                   expected.instruction, expected.compared + mismatch[0])
            expected.compared += count
            self._done[unit] += count
            at += count
        return None

    def _next(self, unit: Unit) -> _Expected | None:
        """What `unit` must write next; None if nothing any more."""
        waiting = self._waiting[unit]
        while waiting and waiting[0].compared == len(waiting[0].log):
            waiting.popleft()
        if not waiting:
            next((step for step in self._advance() if step == unit), None)
        return waiting[0] if waiting else None

    def _advance(self) -> Iterator[Unit]:
        """Runs the functional machine, a unit that has something to write for each item."""
        for number, instruction, log in self._steps:
            if log is not None and len(log):
                assert instruction.unit is not None
                self._waiting[instruction.unit].append(_Expected(number, instruction, log))
                yield instruction.unit

    def _missing(self, unit: Unit) -> Difference:
        expected = self._waiting[unit][0]
        done, left = self._done[unit], sum(len(item.log) - item.compared for item in self._waiting[unit])
        return Difference(_layer_name(self.program, expected.instruction.tag), "count", done + left, done, unit, done,
                          expected.number, address=int(expected.log.address[expected.compared]))


@dataclass
class _Expected:
    """The writes of an instruction, of which `compared` were compared."""

    number: int
    instruction: Instruction
    log: WriteLog
    compared: int = 0


def _part(log: WriteLog, first: int, count: int) -> WriteLog:
    own = slice(first, first + count)
    return WriteLog(log.cycle[own], log.address[own], log.tag[own], log.data[own], log.mask[own])


def _earliest(found: Iterator[Difference]) -> Difference | None:
    never = np.iinfo(np.int64).max  # a write that is missing shows at the end
    return min(found, key=lambda d: never if d.cycle is None else d.cycle, default=None)


def _log(trace: Trace, unit: Unit, program: Program) -> WriteLog:
    if unit in trace.writes:
        return trace.writes[unit]
    lanes = program.config.lanes
    none = np.zeros(0, np.int64)
    return WriteLog(none, none, none, np.zeros((0, lanes), np.uint8), np.zeros((0, lanes), bool))


def _unit_difference(unit: Unit, expected: WriteLog, actual: WriteLog, program: Program) -> Difference | None:
    n = min(len(expected), len(actual))
    want, got = _part(expected, 0, n), _part(actual, 0, n)
    if mismatch := _mismatch(want, got):
        return _difference(program, unit, 0, want, got, mismatch, *_origin(unit, mismatch[0], program))
    if len(expected) == len(actual):
        return None
    longer = expected if len(expected) > n else actual
    number = _origin(unit, n, program)[0] if longer is expected else None
    cycle = None if longer is expected else int(actual.cycle[n])
    return Difference(_layer_name(program, int(longer.tag[n])), "count", len(expected), len(actual), unit, n, number,
                      address=int(longer.address[n]), cycle=cycle)


def _mismatch(expected: WriteLog, actual: WriteLog) -> tuple[int, str, int | None] | None:
    """The first write that differs, in what, and in which lane, of logs of equal length."""
    wrong = {
        "address": expected.address != actual.address,
        "tag": expected.tag != actual.tag,
        "mask": (expected.mask != actual.mask).any(axis=1),
        "data": ((expected.data != actual.data) & expected.mask).any(axis=1),
    }
    different = np.logical_or.reduce(list(wrong.values()))
    if not different.any():
        return None
    k = int(different.argmax())
    what = next(name for name, flags in wrong.items() if flags[k])
    if what not in ("mask", "data"):
        return k, what, None
    lanes = getattr(expected, what)[k] != getattr(actual, what)[k]
    return k, what, int((lanes & (expected.mask[k] | (what == "mask"))).argmax())


def _difference(program: Program, unit: Unit, before: int, expected: WriteLog, actual: WriteLog,
                mismatch: tuple[int, str, int | None], number: int | None, instruction: Instruction | None,
                write: int) -> Difference:
    """`before` writes of the unit precede the logs; the one that differs is the `write`-th of its instruction."""
    k, what, lane = mismatch
    place = (k,) if lane is None else (k, lane)
    want, got = getattr(expected, what)[place], getattr(actual, what)[place]
    tag = int(expected.tag[k])
    index = None
    if number is not None and instruction is not None and lane is not None:
        with suppress(WeftError):  # a faulty Program; address and lane must do
            index = _index(program, number, instruction, write, lane)
    return Difference(
        _layer_name(program, tag), what, _value(want, what, tag, program), _value(got, what, tag, program), unit,
        before + k, number, index, int(expected.address[k]), lane, int(actual.cycle[k]))


def _value(raw: np.generic, what: str, tag: int, program: Program) -> int:
    """A byte as the code it stands for, anything else as it is."""
    signed = what == "data" and tag < len(program.layers) and not program.layers[tag].unsigned
    return int(np.uint8(raw).view(np.int8)) if signed else int(raw)


def _layer_name(program: Program, tag: int) -> str:
    return program.layers[tag].name if tag < len(program.layers) else f"tag {tag}"


# Where in the Program a write comes from. How many writes a MATRIX instruction with descriptors makes, and of which
# channels, is in its parameters, so the loads of constants are replayed, in program order.


def _origin(unit: Unit, write: int, program: Program) -> tuple[int | None, Instruction | None, int]:
    """Number and instruction of the `write`-th write of a unit, and which one of the instruction's writes it is.

    Nones when the Program does not tell: it is faulty, or has branches.
    """
    try:
        for number, instruction, machine in _replayed(program):
            if instruction.unit == unit:
                count = int(_write_counts(machine, instruction).sum())
                if write < count:
                    return number, instruction, write
                write -= count
    except WeftError:
        pass
    return None, None, write


def _replayed(program: Program) -> Iterator[tuple[int, Instruction, Machine]]:
    """Every instruction, with a machine that has loaded the constants before it."""
    memory = np.zeros(max(program.segment_bytes[Segment.CONSTANTS], program.constants.size), np.uint8)
    memory[: program.constants.size] = program.constants
    machine = Machine(program.config, memory, (0,))
    for number, instruction in enumerate(program.decoded()):
        if isinstance(instruction, Load) and (instruction.unit, instruction.base) == (Unit.LOAD, Segment.CONSTANTS):
            machine.tokens[:] = 1  # only the effect on the scratchpad is wanted
            machine.step(number, instruction)
        yield number, instruction, machine


def _write_counts(machine: Machine, i: Instruction) -> np.ndarray:
    """Scratchpad writes of an instruction by part: tiles of MATRIX, blocks of VECTOR, planes of LOAD."""
    if isinstance(i, Load):
        return np.full(0 if isinstance(i, Store) else i.planes, i.rows * i.run)
    if isinstance(i, Matrix):
        if i.plain:
            return np.full(0 if i.hold else i.tiles, i.rows * i.columns * (1 + i.double))
        return machine.matrix_descriptors(i)[2].any(axis=2).sum(axis=1) * (i.rows * i.columns)
    assert isinstance(i, Vector)
    return np.full(i.blocks, i.rows * i.columns * _taps_written(i))


def _taps_written(i: Vector) -> int:
    return i.kernel_y * i.kernel_x if i.operation == VectorOp.COLUMNS else 1


def _index(program: Program, number: int, i: Instruction, write: int, lane: int) -> tuple[int, int, int] | None:
    """(y, x, channel) of byte `lane` of the `write`-th write of instruction `number`; None for no logical channel."""
    if i.tag >= len(program.layers) or i.unit is None or program.layers[i.tag].unit.upper() != i.unit.name:
        return None
    config = program.config
    match i:
        case Matrix() if i.plain:
            place = _plain_place(i, write, lane, config)
        case Matrix():
            place = _described_place(program, number, i, write, lane)
        case Vector():
            part, rest = divmod(write, i.rows * i.columns * _taps_written(i))
            pixel, tap = divmod(rest, _taps_written(i))
            place = pixel, (part * _taps_written(i) + tap) * config.lanes + lane
        case Row():
            place = _row_place(i, write, lane, config)
        case _:
            return None
    if place is None:
        return None
    pixel, position = place
    y, x = divmod(pixel, i.columns)
    part = config.columns if isinstance(i, Matrix) else config.lanes
    if isinstance(i, Vector):
        part *= _taps_written(i)
    if program.language is not None:  # columns are further positions
        position += x * part * (i.tiles if isinstance(i, Matrix) else i.blocks)
        x = 0
    position += int(program.first_part[number]) * part
    channel_of = program.layers[i.tag].channel_of
    if position >= len(channel_of) or channel_of[position] < 0:
        return None
    return int(program.first_row[number]) + y, x, channel_of[position]


# Pixel, and position behind the instruction's first part, of a byte.


def _plain_place(i: Matrix, write: int, lane: int, config: EngineConfig) -> tuple[int, int] | None:
    tile, rest = divmod(write, i.rows * i.columns * (1 + i.double))
    group, column = divmod(lane, config.columns)
    if group != (i.group + tile) % (config.lanes // config.columns):
        return None
    return rest // (1 + i.double), tile * config.columns + column


def _described_place(program: Program, number: int, i: Matrix, write: int, lane: int) -> tuple[int, int] | None:
    _, _, machine = next(islice(_replayed(program), number, None))
    counts = _write_counts(machine, i)
    tile = int(np.searchsorted(counts.cumsum(), write, side="right"))
    _, group, mask = machine.matrix_descriptors(i)
    used = np.flatnonzero(mask[tile].any(axis=1))
    pixel, which = divmod(write - int(counts[:tile].sum()), len(used))
    columns = program.config.columns
    column = lane - int(group[tile, used[which]]) * columns
    if not (0 <= column < columns and mask[tile, used[which], column]):
        return None
    return pixel, tile * columns + column


def _row_place(i: Row, write: int, lane: int, config: EngineConfig) -> tuple[int, int] | None:
    """Scales and answers have no place."""
    if i.operation == RowOp.ARGMAX:
        return None
    lanes, tiles = config.lanes, config.lanes // config.columns
    if i.operation not in (RowOp.QUANTIZE, RowOp.SOFTMAX):
        words, scales = 2, 0  # of a block, of a row
    else:
        words = {RowLayout.PLAIN: 1, RowLayout.KEYS: config.columns, RowLayout.VALUES: tiles}[RowLayout(i.layout)]
        scales = 2 if i.layout == RowLayout.VALUES else 1
    pixel, rest = divmod(write, i.blocks * words + scales)
    block, word = divmod(rest, words)
    if block >= i.blocks:
        return None
    if scales and i.layout == RowLayout.KEYS:
        lane = word * tiles + lane // config.columns
    elif scales and i.layout == RowLayout.VALUES:
        lane = word * config.columns + lane % config.columns
    return pixel, block * lanes + lane
