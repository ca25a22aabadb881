"""Emission: strips become instructions, ordered between the units by tokens.

Every instruction's footprint is compared with who touched the same words last; where another unit did, the
instruction waits for a token that the other one gives. A wait is left out when an earlier one implies it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from weft.arch.config import EngineConfig
from weft.arch.isa import End, Instruction, Load, Matrix, Sampling, Store, Unit, Vector, VectorOp
from weft.arch.program import Segment as MemorySegment
from weft.compiler.constants import block_words, pack_constants, words_per_tile
from weft.compiler.footprint import Footprint, footprint
from weft.compiler.lower import Buffer, Lowered, MatrixTask, Task, VectorTask
from weft.compiler.memory_plan import LoadTask, MemoryPlan, Segment, Storage, StoreTask, WeightStorage
from weft.compiler.placement import Write
from weft.compiler.schedule import strips

PARTS = 4  # cuts of a layer too small to be cut into rows, so that the units still overlap


class Hazards:
    """Who last touched each scratchpad or memory word, and what each unit already knows to be finished."""

    def __init__(self, config: EngineConfig, memory_words: dict[int, int]) -> None:
        spaces = {-1: config.pool_words, **memory_words}
        self.writer_unit = {s: np.full(n, -1, np.int8) for s, n in spaces.items()}
        self.writer = {s: np.full(n, -1, np.int32) for s, n in spaces.items()}
        self.reader = {s: np.full((len(Unit), n), -1, np.int32) for s, n in spaces.items()}
        self.issued = [0] * len(Unit)
        self.known: list[list[int]] = [[-1] * len(Unit) for _ in Unit]  # known[u][v]: last finished of v, as u knows
        self.at_start: list[list[list[int]]] = [[] for _ in Unit]

    def order(self, unit: Unit, touched: Footprint) -> dict[Unit, int]:
        """Registers the next instruction of `unit`; the instructions of other units it must wait for, by index."""
        index = self.issued[unit]
        self.issued[unit] += 1
        reads, writes = [(-1, touched.reads)], [(-1, touched.writes)]
        reads += [touched.memory_reads] if touched.memory_reads else []
        writes += [touched.memory_writes] if touched.memory_writes else []
        needed = [-1] * len(Unit)
        for space, words in reads:
            if space in self.writer:
                self._after_writers(space, words, needed)
        for space, words in writes:
            if space in self.writer and len(words):
                self._after_writers(space, words, needed, but=unit)
                for other in Unit:
                    if other != unit:  # a unit reads before it writes what comes later
                        needed[other] = max(needed[other], int(self.reader[space][other, words].max()))
        waits = {}
        known = self.known[unit]
        for other in sorted(Unit, key=lambda u: -needed[u]):
            if needed[other] > known[other]:
                waits[other] = needed[other]
                known[other] = needed[other]
                for third, finished in enumerate(self.at_start[other][needed[other]]):
                    if third != unit:
                        known[third] = max(known[third], finished)
        self.at_start[unit].append(list(known))
        for space, words in reads:
            if space in self.writer:
                self.reader[space][unit, words] = index
        for space, words in writes:
            if space in self.writer:
                self.writer[space][words], self.writer_unit[space][words] = index, unit
        return waits

    def _after_writers(self, space: int, words: np.ndarray, needed: list[int], but: Unit | None = None) -> None:
        owners, indices = self.writer_unit[space][words], self.writer[space][words]
        for other in Unit:
            if other != but and (mine := indices[owners == other]).size:
                needed[other] = max(needed[other], int(mine.max()))


class Emitter:
    """Collects the instructions, constants and tables of one Program."""

    def __init__(self, lowered: Lowered, plan: MemoryPlan, config: EngineConfig) -> None:
        self.plan, self.config = plan, config
        memory = {
            int(MemorySegment.ARENA): plan.arena_bytes // config.lanes,
            int(MemorySegment.OUTPUT): plan.output_bytes // config.lanes,
        }
        self.hazards = Hazards(config, memory)
        self.instructions: list[Instruction] = []
        self.rows: list[int] = []
        self.parts: list[int] = []
        self.positions: list[list[int]] = [[] for _ in Unit]  # unit -> index in program of its i-th instruction
        self.constants = bytearray()
        self.loaded: dict[Task, WeightStorage] = {}

    def run(self) -> None:
        for index, segment in enumerate(self.plan.segments):
            self._load_weights(segment)
            following = self.plan.segments[index + 1] if index + 1 < len(self.plan.segments) else None
            for task, first, last in strips(segment):
                self._strip(segment, task, first, last)
                if following and following.prefetch:
                    self._load_weights(following)
        self._append(End())

    def _append(self, instruction: Instruction, row: int = 0, part: int = 0, offsets: tuple[int, ...] = ()) -> None:
        unit = instruction.unit
        if unit is not None:
            waits = self.hazards.order(unit, footprint(instruction, self.config, offsets))
            instruction = replace(instruction, wait=sum(1 << other for other in waits))
            for other, index in waits.items():
                at = self.positions[other][index]
                giver = self.instructions[at]
                self.instructions[at] = replace(giver, signal=giver.signal | 1 << unit)
            self.positions[unit].append(len(self.instructions))
        self.instructions.append(instruction)
        self.rows.append(row)
        self.parts.append(part)

    # -- constants

    def _load_weights(self, segment: Segment) -> None:
        for weights in segment.weights:
            if weights.task in self.loaded:
                continue
            self.loaded[weights.task] = weights
            home = self.plan.segments[[weights in s.weights for s in self.plan.segments].index(True)]
            raw = pack_constants(weights.task, self.config, partial(self._locate, home, weights.task))
            assert len(raw) == weights.words * self.config.lanes
            self._append(
                Load(
                    tag=weights.task.tag,
                    base=int(MemorySegment.CONSTANTS),
                    address=weights.base,
                    offset=len(self.constants),
                    run=weights.words,
                    rows=1,
                    planes=1,
                )
            )
            self.constants += raw

    def _locate(self, segment: Segment, task: Task, write: Write) -> list[tuple[int, int]]:
        """Word offset and lane group of each copy that a Write makes."""
        assert isinstance(task, MatrixTask)
        storage = segment.storage[task.regions[write.region]]
        per_word = self.config.lanes // self.config.columns
        base = storage.block_base(write.slot // per_word)
        copies = [y * storage.pitch + x for y in range(task.upsample) for x in range(task.upsample)]
        return [(base + copy, write.slot % per_word) for copy in copies]

    # -- strips

    def _strip(self, segment: Segment, task: Task, first: int, last: int) -> None:
        if isinstance(task, LoadTask):
            target = task.targets[0]
            self._transfer(segment, task, target.buffer, target.blocks, first, last)
        elif isinstance(task, StoreTask):
            blocks = task.sources[0].blocks
            for start, stop, mask in _equal_runs(task.masks):
                if mask:
                    self._transfer(segment, task, task.sources[0].buffer, blocks[start:stop], first, last, mask)
        elif isinstance(task, MatrixTask):
            for start, stop in self._cuts(segment, task, self.config.lanes // self.config.columns):
                self._matrix(segment, task, first, last, start, stop)
        elif isinstance(task, VectorTask):
            for start, stop in self._cuts(segment, task, 1):
                self._vector(segment, task, first, last, start, stop)

    def _cuts(self, segment: Segment, task: Task, grain: int) -> list[tuple[int, int]]:
        """Ranges of parts; one range unless the task has too few strips for the units to overlap."""
        count = 1
        if -(-task.rows // segment.strip[task]) < PARTS:
            count = min(PARTS, -(-task.parts // grain))
        size = -(-task.parts // count // grain) * grain if count > 1 else task.parts
        size = max(size, grain if count > 1 else 1)
        return [(start, min(start + size, task.parts)) for start in range(0, task.parts, size)]

    def _transfer(
        self,
        segment: Segment,
        task: Task,
        buffer: Buffer,
        blocks: range,
        first: int,
        last: int,
        mask: int | None = None,
    ) -> None:
        storage, (base, offset) = segment.storage[buffer], self.plan.memory[buffer]
        for a, b in _without_wrap(storage, first, last):
            row_bytes = buffer.row_words * self.config.lanes
            fields = {
                "tag": task.tag,
                "base": int(base),
                "address": storage.block_base(blocks.start) + storage.anchor(a) * storage.pitch,
                "offset": offset + (blocks.start * buffer.height + a) * row_bytes,
                "planes": len(blocks),
                "plane_words": storage.plane,
                "plane_bytes": buffer.height * row_bytes,
            }
            if storage.pitch == buffer.row_words:
                fields |= {"run": (b - a) * buffer.row_words, "rows": 1}
            else:
                fields |= {"run": buffer.row_words, "rows": b - a, "row_words": storage.pitch, "row_bytes": row_bytes}
            self._append(Load(**fields) if mask is None else Store(**fields, mask=mask), a)

    def _window_fields(self, segment: Segment, task: MatrixTask | VectorTask, first: int, last: int) -> dict[str, int]:
        source, window, target = task.sources[0], task.window, task.targets[0]
        storage, into = segment.storage[source.buffer], segment.storage[target.buffer]
        window_y = first * window.stride[0] - window.padding[0]
        low, high = (task.requantize.low, task.requantize.high) if task.requantize else (0, 0)
        return {
            "tag": task.tag,
            "source": storage.block_base(source.blocks.start),
            "plane": storage.plane,
            "pitch": storage.pitch,
            "ring": storage.ring,
            "anchor": storage.anchor(window_y),
            "window_y": window_y,
            "height": source.buffer.height,
            "width": source.buffer.width,
            "kernel_y": window.kernel[0],
            "kernel_x": window.kernel[1],
            "stride_y": window.stride[0],
            "stride_x": window.stride[1],
            "dilation_y": window.dilation[0],
            "dilation_x": window.dilation[1],
            "pad_x": window.padding[1],
            "rows": last - first,
            "columns": task.columns,
            "blocks": len(source.blocks),
            "unsigned": int(source.buffer.unsigned),
            "low": low,
            "high": high,
            "target_pitch": into.pitch,
            "target_ring": into.ring,
            "target_anchor": into.anchor(first * target.factor),
            "target_step_y": target.factor,
            "target_step_x": target.factor,
        }

    def _matrix(self, segment: Segment, task: MatrixTask, first: int, last: int, start: int, stop: int) -> None:
        weights, parameter_words = self.loaded[task], self.config.tile_parameter_words
        tile_words = words_per_tile(task, self.config) - parameter_words
        instruction = Matrix(
            **self._window_fields(segment, task, first, last),
            target=0,
            parameters=weights.base + start * parameter_words,
            weights=weights.base + task.parts * parameter_words + start * tile_words,
            tiles=stop - start,
            wide=int(task.wide),
        )
        offsets = tuple(
            offset
            for tile in task.tiles[start:stop]
            for write in tile.writes
            for offset, _ in self._locate(segment, task, write)
        )
        self._append(instruction, first, task.first_tile + start, offsets)

    def _vector(self, segment: Segment, task: VectorTask, first: int, last: int, start: int, stop: int) -> None:
        fields = self._window_fields(segment, task, first, last)
        source, target = task.sources[0], task.targets[0]
        storage, into = segment.storage[source.buffer], segment.storage[target.buffer]
        per_block = len(target.blocks) // len(source.blocks)
        fields |= {
            "operation": int(task.operation),
            "sampling": int(task.sampling),
            "blocks": stop - start,
            "source": storage.block_base(source.blocks.start + start),
            "target": into.block_base(target.blocks.start + start * per_block)
            + task.phase[0] * into.pitch
            + task.phase[1],
            "target_plane": into.plane * per_block,
            "target_tap": into.plane if per_block > 1 else 0,
        }
        if task.operation == VectorOp.MULTIPLY:
            fields["parameters"] = self.loaded[task].base + start * block_words(task, self.config)
        if task.operation == VectorOp.PACK:
            image = source.buffer.image
            assert image is not None
            fields |= {
                "kernel_x": 1,
                "stride_x": 1,
                "dilation_x": 1,
                "pad_x": 0,
                "pack_bytes": task.window.kernel[1] * image.channels,
                "pack_stride": task.window.stride[1] * image.channels,
            }
        if task.step_to is not None:
            fields["tap_step"] = (segment.storage[task.step_to].base - storage.base) % (1 << 16)
            fields["dilation_x"] = 0
        if task.sampling != Sampling.GRID:
            window_y = 0 if storage.whole else first + source.first
            offsets = segment.storage[task.sources[1].buffer]
            fields |= {
                "grid_y": fields["window_y"],
                "window_y": window_y,
                "anchor": storage.anchor(window_y),
                "fraction": task.fraction,
                "offsets": offsets.base,
                "offset_pitch": offsets.pitch,
                "offset_ring": offsets.ring,
                "offset_anchor": offsets.anchor(first),
            }
        self._append(Vector(**fields), first, task.first_block + start)


def _equal_runs(masks: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(start, stop, mask) of consecutive equal masks."""
    runs: list[tuple[int, int, int]] = []
    for index, mask in enumerate(masks):
        if runs and runs[-1][2] == mask:
            runs[-1] = (runs[-1][0], index + 1, mask)
        else:
            runs.append((index, index + 1, mask))
    return runs


def _without_wrap(storage: Storage, first: int, last: int) -> list[tuple[int, int]]:
    """Row ranges that do not cross the end of the ring."""
    ranges, row = [], first
    while row < last:
        stop = last if storage.whole else min(last, (row // storage.rows + 1) * storage.rows)
        ranges.append((row, stop))
        row = stop
    return ranges
