"""Pieces of a language model's program: one operator each, as instructions with what they touch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from weft.arch.errors import ModelError
from weft.arch.isa import Instruction, Load, Matrix, Row, RowOp
from weft.arch.language import UNIT_SCALE, Block, LanguageModel, Linear, Norm, norm_constant
from weft.arch.program import Layer, Segment
from weft.compiler.assembler import Assembler
from weft.compiler.footprint import Footprint
from weft.compiler.language_pack import Packed, pack, padded
from weft.compiler.language_plan import Plan, Region, Rows16

ALIGNMENT = 4096  # bytes from which on constants start where a burst does
RING_CHUNKS = 3  # chunks of weights that the ring holds


class LanguageEmitter:
    """Emits operators on the rows of a group of tokens, whose number is in register `count`.

    Collects constants and layers beside the instructions. Weights go through the ring, chunk by chunk.
    """

    def __init__(self, model: LanguageModel, plan: Plan, context: int) -> None:
        self.model, self.plan, self.config, self.shape = model, plan, plan.config, plan.shape
        self.context = context
        self.lanes, self.columns = self.config.lanes, self.config.columns
        self.assembler = Assembler(self.config, {int(Segment.CACHE): len(model.blocks), int(Segment.OUTPUT): 2})
        self.constants = bytearray()
        self.layers: list[Layer] = []
        self.tags: dict[str, int] = {}
        self.ring_at = 0
        take = self.assembler.register
        self.count = take()  # tokens of the group
        self.position = take()  # of its first token
        self.done = take()  # tokens of the groups before
        self.temporary = [take() for _ in range(8)]
        self.query_offset = take()

    def finish(self, name: str, linear: Linear, unit: float, result: Rows16, block: Block, half: int,
               source: Rows16 | None = None, groups: Sequence[int] | None = None, step: int = 0) -> None:
        """The last product of a part of a block, and its addition to the residual stream."""
        out = "out_projection" if half == 0 else "down"
        packed = pack(linear, self.config, unit, block.residual[half], groups=groups)
        self.linear(f"{name}.{out}", packed, result, source=source, step=step)
        self.elementwise(f"{name}.residual", RowOp.ADD, self.plan.residual, result, self.plan.residual,
                         up=block.shifts[half])

    def linear(self, name: str, packed: Packed, target: Rows16, tiles: range | None = None,
               source: Rows16 | None = None, step: int = 0, single: bool = False,
               split: tuple[int, int] | None = None) -> None:
        """A matrix product of the group's rows (or of one row, `single`) with some tiles of `packed`, 16 bits out.

        The sources are the codes in `row`, or low words of `source`, token to token `step` words. Constants are
        appended, or, with `split`, where the parameters and the streams of all tiles are already.
        """
        plan = self.plan
        tag = self.layer(name, "matrix", name, packed.channels, "matrix", packed.blocks * self.lanes)
        tiles = range(packed.tiles) if tiles is None else tiles
        parameter_words, stream_words = packed.parameters.shape[1], packed.stream.shape[1]
        base, plane = (plan.row.base, plan.tokens) if source is None else (source.base, source.plane)
        reads = [plan.row_scales, Region(base, packed.blocks * plan.tokens)]
        size = self.chunk(packed.tile_words, len(tiles))
        for first in range(tiles.start, tiles.stop, size):
            last = min(first + size, tiles.stop)
            count = last - first
            ring = self.take_ring(count * packed.tile_words)
            weights = ring.base + count * parameter_words
            if split is None:
                self.load(tag, ring.base, self.constant(packed.chunk(first, last)), ring.words)
            else:
                self.load(tag, ring.base, split[0] + first * parameter_words * self.lanes, count * parameter_words)
                self.load(tag, weights, split[1] + first * stream_words * self.lanes, count * stream_words)
            block, group = divmod(first - tiles.start, self.config.scaled_words)
            instruction = Matrix(
                tag=tag, source=base, plane=plane, pitch=step or 1, blocks=packed.blocks,
                **self.raster(plan.tokens, 1), parameters=ring.base, weights=weights, tiles=count, plain=1, grouped=1,
                scaled=1, double=1, scales=plan.row_scales.base, scales_pitch=1, target_pitch=1, group=group,
                target=target.base + block * target.plane, target_plane=target.plane, target_high=target.high)
            self.emit(replace(instruction, rows=1) if single else instruction.bind(rows=self.count),
                      reads=[*reads, ring], writes=[target.region], part=first)

    def normalize(self, name: str, norm: Norm, scale: float, last: int | None = None) -> None:
        """Codes of the residual rows (or of the one whose number is in register `last`) into `row`."""
        plan, h = self.plan, self.plan.residual
        instruction = self.row(
            name, RowOp.QUANTIZE, h, None, weighted=1, normalize=1, other=plan.norm.base, other_plane=1,
            other_high=self.shape.width, constant=norm_constant(len(norm.codes), self.model.config.epsilon, scale),
            target=plan.row.base, target_plane=plan.tokens, target_row=1, scale=plan.row_scales.base, scale_row=1,
            mult=UNIT_SCALE[0], shift=UNIT_SCALE[1], channels=padded(self.model.config.width, self.lanes),
            single=last is not None)
        if last is not None:
            instruction = instruction.bind(source=last)
        self.emit(instruction, reads=[h.region, plan.norm], writes=[plan.row, plan.row_scales])

    def quantize(self, name: str, source: Rows16, target: int | None = None,
                 channels: Sequence[int] | None = None) -> None:
        """Codes of whole rows into `row`, or over the low words of `source`."""
        plan = self.plan
        into = Region(plan.row.base if target is None else target, source.high)
        self.emit(self.row(name, RowOp.QUANTIZE, source, None, channels, target=into.base, target_plane=source.plane,
                           target_row=1, scale=plan.row_scales.base, scale_row=1, mult=UNIT_SCALE[0],
                           shift=UNIT_SCALE[1]),
                  reads=[source.region], writes=[into, plan.row_scales])

    def elementwise(self, name: str, operation: RowOp, x: Rows16, o: Rows16, target: Rows16, shift: int = 0,
                    up: int = 0, blocks: int | None = None, part: int = 0,
                    channels: Sequence[int] | None = None) -> None:
        blocks = x.blocks if blocks is None else blocks
        regions = [Region(item.base + high, blocks * item.plane) for item in (x, o, target) for high in (0, item.high)]
        instruction = self.row(name, operation, x, target, channels, blocks=blocks, other=o.base, other_plane=o.plane,
                               other_high=o.high, other_row=1, shift=shift, up=up)
        self.emit(instruction, reads=regions[:4], writes=regions[4:], part=part)

    def row(self, name: str, operation: RowOp, operand: Rows16, into: Rows16 | None,
            channels: Sequence[int] | None = None, single: bool = False, **given: int) -> Row:
        """An instruction on the rows of the group's tokens."""
        fields: dict[str, Any] = {
            "operation": operation, "source": operand.base, "source_plane": operand.plane, "source_high": operand.high,
            "source_row": 1, "columns": 1, "blocks": operand.blocks, "rows": int(single),
        }
        if into:
            fields |= {"target": into.base, "target_plane": into.plane, "target_high": into.high, "target_row": 1}
        width = padded(self.model.config.width, self.lanes)
        tag = self.layer(name, operation.name.lower(), name, channels or width, "row")
        instruction = Row(tag=tag, **(fields | given))
        return instruction if single else instruction.bind(rows=self.count)

    def raster(self, rows: int, columns: int) -> dict[str, int]:
        """Fields of a matrix instruction whose pixels are `columns` columns of up to `rows` rows."""
        names = ("kernel_y", "kernel_x", "stride_y", "stride_x", "target_step_y", "target_step_x")
        return dict.fromkeys(names, 1) | dict.fromkeys(("ring", "height", "target_ring"), rows) | dict.fromkeys(
            ("width", "columns"), columns)

    def load_constant(self, name: str, region: Region, words: np.ndarray) -> None:
        assert words.size == region.words * self.lanes
        tag = self.layer(f"{name}.constants", "load", "")
        self.load(tag, region.base, self.constant(words.tobytes()), region.words)

    def load(self, tag: int, address: int, offset: int, words: int) -> None:
        self.emit(Load(tag=tag, base=Segment.CONSTANTS, address=address, offset=offset, run=words, rows=1, planes=1),
                  writes=[Region(address, words)])

    def constant(self, raw: bytes) -> int:
        """Appends constants; their place in the segment."""
        if len(raw) >= ALIGNMENT:
            self.constants += bytes(-len(self.constants) % (self.config.burst_beats * self.config.bus_bytes))
        place = len(self.constants)
        self.constants += raw
        return place

    def chunk(self, words: int, count: int) -> int:
        """How many of `count` pieces of `words` words are loaded together: the ring holds some such chunks."""
        return min(count, max(1, self.plan.ring.words // RING_CHUNKS // words))

    def take_ring(self, words: int) -> Region:
        ring = self.plan.ring
        if words > ring.words:
            raise ModelError(f"language model '{self.model.config.name}' needs {words} scratchpad words at a time for "
                             f"weights, {ring.words} are left on engine '{self.config.name}': choose a smaller context "
                             "or enlarge bank_words")
        if self.ring_at + words > ring.words:
            self.ring_at = 0
        region = Region(ring.base + self.ring_at, words)
        self.ring_at += words
        return region

    def layer(self, name: str, operation: str, output: str, channels: Sequence[int] = (), unit: str = "",
              inputs: int = 0) -> int:
        """The number of a layer, made at its first use. Without `output` it is not compared with anything."""
        if name not in self.tags:
            self.tags[name] = len(self.layers)
            count = max(channels, default=-1) + 1
            self.layers.append(Layer(name, operation, output, unit if output else "", 0, 1, count, tuple(channels),
                                     unsigned=False, macs=count * inputs, weight_bits=4 if inputs else 0))
        return self.tags[name]

    def emit(self, instruction: Instruction, reads: Sequence[Region] = (), writes: Sequence[Region] = (),
             memory_reads: int | None = None, memory_writes: int | tuple[int, int] | None = None,
             part: int = 0) -> None:
        """Appends an instruction for a unit that touches at most these words; memory by block of the model."""
        def words(regions: Sequence[Region]) -> np.ndarray:
            return np.concatenate([np.arange(r.base, r.base + r.words) for r in regions] or [np.zeros(0, np.int64)])

        def memory(place: int | tuple[int, int] | None) -> tuple[int, np.ndarray] | None:
            if place is None:
                return None
            segment, index = place if isinstance(place, tuple) else (int(Segment.CACHE), place)
            return int(segment), np.array([index])

        self.assembler.append(
            instruction, Footprint(words(reads), words(writes), memory(memory_reads), memory(memory_writes)), part=part)
