"""Emission: strips become instructions, which the assembler orders between the units."""

from __future__ import annotations

from functools import partial

from weft.arch.config import EngineConfig
from weft.arch.isa import End, Instruction, Load, Matrix, Sampling, Store, Vector, VectorOp
from weft.arch.program import Segment as MemorySegment
from weft.compiler.assembler import Assembler
from weft.compiler.constants import block_words, pack_constants, words_per_tile
from weft.compiler.footprint import footprint
from weft.compiler.lower import Buffer, Lowered, MatrixTask, Task, VectorTask
from weft.compiler.memory_plan import LoadTask, MemoryPlan, Segment, Storage, StoreTask, WeightStorage
from weft.compiler.placement import Write
from weft.compiler.schedule import strips

PARTS = 4  # cuts of a layer too small to be cut into rows, so that the units still overlap


class Emitter:
    """Collects the instructions, constants and tables of one Program."""

    def __init__(self, lowered: Lowered, plan: MemoryPlan, config: EngineConfig) -> None:
        self.plan, self.config = plan, config
        memory = {
            int(MemorySegment.ARENA): plan.arena_bytes // config.lanes,
            int(MemorySegment.OUTPUT): plan.output_bytes // config.lanes,
        }
        self.assembler = Assembler(config, memory)
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
        touched = footprint(instruction, self.config, offsets) if instruction.unit is not None else None
        self.assembler.append(instruction, touched, row, part)

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
