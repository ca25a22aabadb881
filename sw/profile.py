"""Where the cycles of a run went: per layer and per unit, from when instructions started and retired; and the bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from weft.arch.config import EngineConfig
from weft.arch.device import RunResult
from weft.arch.isa import Instruction, Load, Matrix, Store, Unit
from weft.arch.program import Program
from weft.arch.trace import Trace
from weft.reports.schema import UNIT_ORDER, LayerRow, Phase, Span
from weft.sim.memory import MemoryModel

# A cycle belongs to the layer of the busiest unit: the first of these that is working.
PRIORITY = tuple(Unit[name.upper()] for name in UNIT_ORDER)
NOBODY = len(Unit)
LAST_TOKEN = "logits"  # output of the only matrix product computed for one token of a run, not for all

Times = Mapping[Unit, np.ndarray]


@dataclass
class Executed:
    """What the units of a run executed: collected from a functional machine's steps and from pieces of a Trace.

    tags: of each unit's instructions, in order of execution. By tag: bytes that LOAD and STORE moved, and the layers
    with 8-bit weights. start, retire: cycles of those instructions; empty from a Device without time.
    """

    config: EngineConfig
    tags: dict[Unit, list[int]] = field(default_factory=lambda: {unit: [] for unit in Unit})
    read: Counter[int] = field(default_factory=Counter)
    written: Counter[int] = field(default_factory=Counter)
    wide: set[int] = field(default_factory=set)
    pieces: list[Trace] = field(default_factory=list)

    @classmethod
    def straight(cls, program: Program, trace: Trace | None = None) -> Executed:
        """A run of a Program without branches, which executes its instructions as they stand."""
        executed = cls(program.config)
        for instruction in program.decoded():
            executed.add(instruction)
        if trace is not None:
            executed.observe(trace)
        return executed

    def add(self, instruction: Instruction) -> None:
        """Takes the next instruction, as its unit gets it."""
        if instruction.unit is None:
            return
        self.tags[instruction.unit].append(instruction.tag)
        if isinstance(instruction, Load):
            moved = instruction.run * instruction.rows * instruction.planes * self.config.word_bytes
            (self.written if isinstance(instruction, Store) else self.read)[instruction.tag] += moved
        elif isinstance(instruction, Matrix) and instruction.wide:
            self.wide.add(instruction.tag)

    def observe(self, trace: Trace) -> None:
        """Takes start and retire cycles: those since the last call."""
        start, retire = ({unit: np.array(times) for unit, times in side.items()}
                         for side in (trace.start, trace.retire))
        self.pieces.append(Trace(start, retire))

    @property
    def start(self) -> dict[Unit, np.ndarray]:
        return _joined([piece.start for piece in self.pieces])

    @property
    def retire(self) -> dict[Unit, np.ndarray]:
        return _joined([piece.retire for piece in self.pieces])

    def units(self) -> dict[int, str]:
        """For every tag the unit that works for it, before those that fetch and store for it."""
        found: dict[int, str] = {}
        for unit in PRIORITY:
            for tag in set(self.tags[unit]):
                found.setdefault(tag, unit.name.lower())
        return found


def _joined(pieces: Sequence[Times]) -> dict[Unit, np.ndarray]:
    return {unit: np.concatenate([piece[unit] for piece in pieces if unit in piece] or [np.zeros(0, np.uint64)])
            for unit in Unit}


def ownership(executed: Executed, cycles: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lengths, layer, unit) of the stretches of a run, in order, in each of which one layer owns every cycle.

    A cycle in which no unit works belongs to the layer that starts next. Every cycle has one owner, so the layers'
    cycles add up to the run's, however much the units overlap.
    """
    start, retire = executed.start, executed.retire
    times: dict[Unit, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for unit in PRIORITY:
        if count := min(len(executed.tags[unit]), len(start[unit]), len(retire[unit])):
            # Units start and retire in order.
            times[unit] = (np.array(executed.tags[unit][:count], np.int64), start[unit][:count].astype(np.int64),
                           np.maximum.accumulate(retire[unit][:count].astype(np.int64)))
    edges = [np.array([0, cycles]), *(part for _, *both in times.values() for part in both)]
    edge = np.unique(np.concatenate(edges).clip(0, cycles))
    begin, lengths = edge[:-1], np.diff(edge)
    layer, worker = np.full(len(begin), -1, np.int64), np.full(len(begin), NOBODY, np.int64)
    for unit in (unit for unit in reversed(PRIORITY) if unit in times):
        tags, first, last = times[unit]
        # A unit starts its next instruction before the last one's results are out: the later one owns the overlap.
        latest = np.searchsorted(first, begin, side="right") - 1
        works = (latest >= 0) & (begin < last[latest])
        layer[works], worker[works] = tags[latest[works]], unit
    idle = layer < 0
    following = np.minimum.accumulate(np.where(idle, len(layer), np.arange(len(layer)))[::-1])[::-1]
    after_all = layer[~idle][-1] if (~idle).any() else 0
    layer[idle] = np.append(layer, after_all)[following[idle]]
    return lengths, layer, worker


def timeline(program: Program, trace: Trace) -> list[Span]:
    """What every unit did when, in a Program without branches; neighbouring instructions of a layer are one span."""
    spans: list[Span] = []
    for unit, tags in Executed.straight(program).tags.items():
        name = unit.name.lower()
        mine: list[Span] = []
        for tag, start, end in zip(tags, trace.start.get(unit, ()), trace.retire.get(unit, ()), strict=False):
            if mine and mine[-1].layer == tag and start <= mine[-1].end + 1:
                mine[-1] = Span(name, tag, mine[-1].start, max(mine[-1].end, int(end)))
            else:
                mine.append(Span(name, tag, int(start), int(end)))
        spans += mine
    return spans


def layer_rows(program: Program, result: RunResult | None = None) -> list[LayerRow]:
    """One row per layer of a Program without branches; cycles and array use only from a Device with time and trace."""
    trace = result.trace if result is not None else None
    cycles = result.cycles if result is not None and trace is not None else 0
    return layer_rows_from(program, Executed.straight(program, trace), cycles)


def layer_rows_from(program: Program, executed: Executed, cycles: int,
                    macs: Sequence[int] | None = None) -> list[LayerRow]:
    """One row per layer of a run of any Program that took `cycles`.

    `macs`: useful multiply-accumulates of each layer in this run; by default those that the Program tells.
    """
    names = [unit.name.lower() for unit in Unit] + ["nobody"]
    counts = np.zeros((len(program.layers), len(names)), np.int64)
    lengths, layer, worker = ownership(executed, cycles)
    np.add.at(counts, (layer, worker), lengths)
    own, rows = executed.units(), []
    for number, info in enumerate(program.layers):
        spent = int(counts[number].sum())
        useful = info.macs if macs is None else macs[number]
        unit = info.unit or own.get(number, "")
        slots = useful * (2 if number in executed.wide else 1) if unit == "matrix" else 0
        rows.append(LayerRow(
            number, info.name, info.operation, unit, info.height, info.width, info.channels, useful, info.weight_bits,
            executed.read[number], executed.written[number], spent,
            slots / (program.config.macs * spent) if spent else 0.0,
            {name: int(count) for name, count in zip(names, counts[number], strict=True) if count}))
    return rows


# --- language models ------------------------------------------------------------------------------------------------


def run_macs(program: Program, executed: Executed, tokens: int, position: int) -> list[int]:
    """Useful multiply-accumulates of each layer of a language model in a run of `tokens` at `position`."""
    attended = tokens * position + tokens * (tokens + 1) // 2  # positions seen, over all tokens
    channels = {layer.name: layer.channels for layer in program.layers}
    macs = []
    for number, layer in enumerate(program.layers):
        if number in executed.wide:  # scores or values: keys and values are 8-bit weights
            macs.append(attended * channels[layer.name.removesuffix(".scores").removesuffix(".output") + ".output"])
        else:
            macs.append(layer.macs * (1 if layer.output == LAST_TOKEN else tokens))
    return macs


def port_bytes_per_cycle(config: EngineConfig, memory: MemoryModel) -> float:
    """Data bytes that the memory port can move in a cycle on average, in one direction."""
    beats = config.bus_bytes * memory.gate_open / memory.gate_period
    return min(memory.bytes_per_cycle or beats, beats)


def phase(program: Program, executed: Executed, result: RunResult, tokens: int, position: int, memory: MemoryModel,
          clock_hz: float) -> Phase:
    """The record of one run of a language model. A Device without time gives no cycles and no rates."""
    cycles, config = result.cycles, program.config
    macs = run_macs(program, executed, tokens, position)
    slots = sum(count * (2 if number in executed.wide else 1) for number, count in enumerate(macs))
    read, written = (int(result.counters[name]) for name in ("bytes_read", "bytes_written"))
    rate = port_bytes_per_cycle(config, memory)
    return Phase(
        tokens=tokens, position=position, cycles=cycles, bytes_read=read, bytes_written=written,
        bytes_per_token=round((read + written) / tokens, 1),
        bandwidth_utilization=round((read + written) / (rate * cycles), 4) if cycles else 0.0,
        port_bytes_per_cycle=round(rate, 3),
        macs=sum(macs), array_efficiency=round(slots / (config.macs * cycles), 4) if cycles else 0.0,
        tokens_per_s=float(f"{tokens * clock_hz / cycles:.4g}") if cycles else 0.0,
        counters={name: int(value) for name, value in result.counters.items() if name != "simulated_cycles_per_s"},
        layers=layer_rows_from(program, executed, cycles, macs))
