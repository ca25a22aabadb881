"""Attention in a language model's program: keys and values into the cache, and back as weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from weft.arch.isa import SCALE_FIELDS, Load, Matrix, Row, RowLayout, RowOp, ScalarOp, Store
from weft.arch.language import UNIT_SCALE, Attention, Block, Norm, norm_constant, row_unit
from weft.arch.program import Argument, Segment
from weft.compiler.language_emit import LanguageEmitter
from weft.compiler.language_pack import NOTHING, pack, scale_words, two_words
from weft.compiler.language_plan import Region, Rows16

SCALE_BYTES = np.dtype(SCALE_FIELDS).itemsize


class AttentionEmitter(LanguageEmitter):
    """Emits attention mixers. `rotation_at`: bytes from the start of the constants to the rotation table."""

    rotation_at: int

    def attention(self, index: int, block: Block, scale: float) -> None:
        plan, mixer, model, shape = self.plan, block.mixer, self.model.config, self.shape
        assert isinstance(mixer, Attention)
        name, a = f"{index}.mixer", self.assembler
        self.load_constant(name, plan.norm, two_words(mixer.norm.codes, self.config))
        head = np.array(shape.head)
        codes = [np.where(head == NOTHING, 0, norm.codes[head]) for norm in (mixer.query_norm, mixer.key_norm)]
        self.load_constant(name, plan.head_norms, np.stack([two_words(item, self.config) for item in codes]))
        mult, shift = mixer.value_parameters()
        self.load_constant(name, plan.value_parameters, np.frombuffer(
            scale_words(mult, shift, plan.cache.value_tiles, self.config), np.uint8))
        row = 4 * shape.span
        offset, run = self.temporary[:2]
        a.compute(offset, self.position, ScalarOp.MULTIPLY, value=row * self.lanes)
        a.compute(run, self.count, ScalarOp.MULTIPLY, value=row)
        self.emit(Load(tag=self.layer(f"{name}.rotation", "load", ""), base=Segment.CONSTANTS, address=plan.table.base,
                       offset=self.rotation_at, rows=1, planes=1).bind(offset=offset, run=run), writes=[plan.table])
        self.normalize(f"{name}.norm", mixer.norm, scale)
        unit = mixer.norm.unit()
        for part, linear, target, rows, output in (
            ("query", mixer.query, plan.q, shape.head_rows(model.heads), mixer.query_scale),
            ("key", mixer.key, plan.k, shape.head_rows(model.kv_heads), mixer.key_scale),
            ("value", mixer.value, plan.v, None, mixer.value_scale),
        ):
            self.linear(f"{name}.{part}", pack(linear, self.config, unit, output, rows), target)

        self.heads(f"{name}.query_row", plan.q, model.heads, shape.head_blocks, shape.head_rows(model.heads),
                   RowLayout.PLAIN, plan.codes, plan.code_scales, UNIT_SCALE, 0,
                   (mixer.query_norm, mixer.query_scale),
                   target_row=model.heads * shape.head_blocks, target_column=1, target_plane=model.heads)
        keys = shape.head_blocks * self.columns
        self.heads(f"{name}.key_row", plan.k, model.kv_heads, shape.head_blocks, shape.head_rows(model.kv_heads),
                   RowLayout.KEYS, plan.key_codes, plan.key_scales, mixer.key_factor(), 1,
                   (mixer.key_norm, mixer.key_scale),
                   target_row=model.kv_heads * keys, target_column=keys, target_plane=self.columns)
        self.store_positions(index, name, keys=True)
        tiles = plan.cache.value_tiles
        order = list(range(model.kv_heads * model.head_size))
        self.heads(f"{name}.value_row", plan.v, model.kv_heads, shape.value_blocks, order, RowLayout.VALUES,
                   plan.value_codes, plan.value_magnitudes, UNIT_SCALE, 0, None,
                   target_row=model.kv_heads * tiles, target_column=tiles, target_plane=1)
        self.store_positions(index, name, keys=False)
        self.attend(index, name)

        attended = Rows16(plan.attended.base, plan.attended.words // 2, 1)
        vectors = model.heads * shape.value_blocks
        order = [head * shape.value_blocks + b for b in range(shape.value_blocks) for head in range(model.heads)]
        channels = [group * self.lanes + lane for group in order for lane in range(self.lanes)]
        self.emit(self.row(f"{name}.row", RowOp.QUANTIZE, attended, None, blocks=vectors, channels=channels,
                           source_plane=1, source_row=vectors, target=attended.base, target_plane=1,
                           target_row=vectors, scale=plan.row_scales.base, scale_row=1, mult=UNIT_SCALE[0],
                           shift=UNIT_SCALE[1]),
                  reads=[plan.attended], writes=[plan.attended, plan.row_scales])
        self.finish(name, mixer.out_projection, row_unit(mixer.output_scale), plan.mixed, block, 0, attended, order,
                    vectors)

    def heads(self, name: str, source: Rows16, heads: int, blocks: int, channels: Sequence[int], layout: RowLayout,
              target: Region, scales: Region, factor: tuple[int, int], which: int,
              norm: tuple[Norm, float] | None, **steps: int) -> None:
        """Quantizes every head of every token for itself; with `norm`, normalized and rotated."""
        plan, reads = self.plan, [source.region]
        fields: dict[str, Any] = steps | {
            "layout": layout, "columns": heads, "blocks": blocks, "source_column": blocks * source.plane,
            "target": target.base, "scale": scales.base, "mult": factor[0], "shift": factor[1],
            "scale_column": 2 if layout == RowLayout.VALUES else 1,
            "scale_row": (2 if layout == RowLayout.VALUES else 1) * heads,
        }
        if norm:
            item, scale = norm
            fields |= {
                "weighted": 1, "normalize": 1, "rotate": 1, "span": self.shape.span,
                "other": plan.head_norms.base + which * 2 * blocks, "other_plane": 1, "other_high": blocks,
                "constant": norm_constant(len(item.codes), self.model.config.epsilon, scale),
                "table": plan.table.base,
            }
            reads += [plan.head_norms, plan.table]
        instruction = self.row(name, RowOp.QUANTIZE, source, None, channels=channels, **fields)
        self.emit(instruction, reads=reads, writes=[target, scales])

    def store_positions(self, index: int, name: str, keys: bool) -> None:
        """Writes keys or values of the group's tokens into the cache, position by position."""
        a, plan, model, cache, lanes, c = (self.assembler, self.plan, self.model.config, self.plan.cache, self.lanes,
                                           self.columns)
        token, position, staging, scales, offset, rotate, low = self.temporary[:7]
        key_at, key_scale_at, value_at, magnitude_at = cache.attention(index)
        tag = self.layer(f"{name}.{'key' if keys else 'value'}_store", "store", "")
        together = lanes // c
        heads = model.kv_heads
        store = {"tag": tag, "base": int(Segment.CACHE)}
        if keys:
            codes, magnitudes = plan.key_codes, plan.key_scales
            words = self.shape.head_blocks * c
            main = Store(**store, address=codes.base, offset=key_at, run=words, rows=heads, row_words=words,
                         row_bytes=cache.key_head, planes=1, mask=sum(1 << c * i for i in range(together)))
            side = Store(**store, address=magnitudes.base, offset=key_scale_at, run=1, rows=heads, row_words=1,
                         row_bytes=cache.key_scale_head, planes=1, mask=(1 << SCALE_BYTES) - 1)
            sizes = (heads * words, heads)
        else:
            codes, magnitudes = plan.value_codes, plan.value_magnitudes
            tiles = cache.value_tiles
            main = Store(**store, address=codes.base, offset=value_at, run=1, rows=tiles, row_words=1,
                         row_bytes=cache.value_tile, planes=heads, plane_words=tiles,
                         plane_bytes=tiles * cache.value_tile, mask=(1 << c) - 1)
            side = Store(**store, address=magnitudes.base, offset=magnitude_at, run=2, rows=heads, row_words=2,
                         row_bytes=cache.magnitude_head, planes=1, mask=1)
            sizes = (heads * tiles, 2 * heads)
        # position = tile * positions of a word + place in it, for the main and for the side store
        main_places, side_places = (c, c) if keys else (together, lanes)
        main_bytes, side_bytes = ((cache.key_tile, self.config.plain_parameter_words * lanes) if keys
                                  else (lanes, 2 * lanes))
        main_lanes, side_lanes = (1, SCALE_BYTES) if keys else (c, 1)
        a.set(token, 0)
        start = a.loop()
        a.compute(position, self.position, ScalarOp.ADD, token)
        for instruction, size, places, step, width, into in (
            (main, sizes[0], main_places, main_bytes, main_lanes, staging),
            (side, sizes[1], side_places, side_bytes, side_lanes, scales),
        ):
            a.compute(into, token, ScalarOp.MULTIPLY, value=size)
            a.compute(offset, position, ScalarOp.SHIFT, value=places.bit_length() - 1)
            a.compute(low, offset, ScalarOp.MULTIPLY, value=places)
            a.compute(rotate, position, ScalarOp.SUBTRACT, low)
            a.compute(rotate, rotate, ScalarOp.MULTIPLY, value=width)
            a.compute(offset, offset, ScalarOp.MULTIPLY, value=step)
            a.compute(offset, offset, ScalarOp.ADD, Argument.SEQUENCE)
            self.emit(instruction.bind(address=into, offset=offset, rotate=rotate),
                      reads=[codes if instruction is main else magnitudes], memory_writes=index)
        a.compute(token, token, ScalarOp.ADD, value=1)
        a.again(start, token, self.count, independent=True)

    def attend(self, index: int, name: str) -> None:
        """Scores, softmax and values of a few tokens at a time: their queries are the pixels of matrix instructions."""
        a, plan, model, shape, cache = self.assembler, self.plan, self.model.config, self.shape, self.plan.cache
        c, lanes, queries = self.columns, self.lanes, model.queries
        key_at, key_scale_at, value_at, magnitude_at = cache.attention(index)
        token, rows, keys, key_tiles, blocks, value_words, at, more = self.temporary
        offset = self.query_offset
        tags = {part: self.layer(f"{name}.{part}", operation, "") for part, operation in
                (("key_load", "load"), ("scores", "matrix"), ("probabilities", "row"), ("value_load", "load"))}
        pixels = plan.queries * queries
        key_words = shape.head_blocks * c
        most_tiles = cache.context // c
        key_chunk = self.chunk(key_words + self.config.plain_parameter_words, most_tiles)
        most_blocks = cache.context // lanes
        value_chunk = self.chunk(most_blocks * c, cache.value_tiles)
        tags["output"] = self.layer(f"{name}.output", "matrix", f"{name}.output", [
            (head * queries + query) * model.head_size + tile * c + column
            for head in range(model.kv_heads) for first in range(0, cache.value_tiles, value_chunk)
            for query in range(queries) for tile in range(first, min(first + value_chunk, cache.value_tiles))
            for column in range(c)], "matrix")
        parameter_words = self.config.plain_parameter_words
        a.set(token, 0)
        start = a.loop()
        a.compute(rows, self.count, ScalarOp.SUBTRACT, token)
        a.compute(rows, rows, ScalarOp.MINIMUM, value=plan.queries)
        a.compute(keys, self.position, ScalarOp.ADD, token)  # before the first of these tokens
        a.compute(key_tiles, keys, ScalarOp.ADD, rows)
        a.compute(blocks, key_tiles, ScalarOp.ADD, value=lanes - 1)
        a.compute(blocks, blocks, ScalarOp.SHIFT, value=lanes.bit_length() - 1)
        a.compute(value_words, blocks, ScalarOp.MULTIPLY, value=c)
        a.compute(key_tiles, key_tiles, ScalarOp.ADD, value=c - 1)
        a.compute(key_tiles, key_tiles, ScalarOp.SHIFT, value=c.bit_length() - 1)
        a.compute(keys, keys, ScalarOp.ADD, value=1)
        for head in range(model.kv_heads):
            buffer = head % plan.buffers
            scores, codes = plan.scores[buffer], plan.probabilities[buffer]
            scales, magnitudes = plan.probability_scales[buffer], plan.magnitudes[buffer]
            for first in range(0, most_tiles, key_chunk):
                # Past the last key, a tile is computed that the softmax does not look at.
                a.compute(at, key_tiles, ScalarOp.SUBTRACT, value=first)
                a.compute(at, at, ScalarOp.MAXIMUM, value=1)
                a.compute(at, at, ScalarOp.MINIMUM, value=min(key_chunk, most_tiles - first))
                size = min(key_chunk, most_tiles - first)
                ring = self.take_ring(size * (key_words + parameter_words))
                weights = Region(ring.base + size * parameter_words, size * key_words)
                tile_bytes = parameter_words * lanes
                for address, place, words in (
                    (ring.base, key_scale_at + head * cache.key_scale_head + first * tile_bytes, parameter_words),
                    (weights.base, key_at + head * cache.key_head + first * cache.key_tile, key_words),
                ):
                    a.compute(more, at, ScalarOp.MULTIPLY, value=words)
                    self.emit(Load(tag=tags["key_load"], base=Segment.CACHE, address=address, offset=place, rows=1,
                                   planes=1).bind(offset=Argument.SEQUENCE, run=more),
                              writes=[Region(address, size * words)], memory_reads=index)
                groups = divmod(first, self.config.scaled_words)
                a.compute(more, token, ScalarOp.MULTIPLY, value=model.heads)
                a.compute(offset, more, ScalarOp.MULTIPLY, value=shape.head_blocks)
                self.emit(
                    Matrix(tag=tags["scores"], source=plan.codes.base + head * queries, plane=model.heads,
                           pitch=model.heads * shape.head_blocks, blocks=shape.head_blocks,
                           **self.raster(plan.queries, queries), parameters=ring.base, weights=weights.base, wide=1,
                           plain=1, scaled=1, double=1, scales=plan.code_scales.base + head * queries,
                           scales_pitch=model.heads, target=scores.base + groups[0] * scores.plane,
                           target_plane=scores.plane, target_pitch=queries, target_high=scores.high, group=groups[1])
                    .bind(rows=rows, tiles=at, source=offset, scales=more),
                    reads=[plan.codes, plan.code_scales, ring], writes=[scores.region])
            a.compute(more, blocks, ScalarOp.MULTIPLY, value=2)
            self.emit(Load(tag=tags["value_load"], base=Segment.CACHE, address=magnitudes.base,
                           offset=magnitude_at + head * cache.magnitude_head, rows=1, planes=1)
                      .bind(offset=Argument.SEQUENCE, run=more), writes=[magnitudes], memory_reads=index)
            self.emit(
                Row(tag=tags["probabilities"], operation=RowOp.SOFTMAX, source=scores.base, source_plane=scores.plane,
                    source_high=scores.high, source_row=queries, source_column=1, other=magnitudes.base, other_plane=2,
                    other_high=1, target=codes.base, target_plane=pixels, target_row=queries, target_column=1,
                    scale=scales.base, scale_row=queries, scale_column=1, columns=queries, length_step=1,
                    mult=UNIT_SCALE[0], shift=UNIT_SCALE[1])
                .bind(rows=rows, blocks=blocks, length=keys),
                reads=[scores.region, magnitudes], writes=[codes, scales])
            vectors = model.heads * shape.value_blocks
            high = plan.attended.words // 2
            for first in range(0, cache.value_tiles, value_chunk):
                count = min(value_chunk, cache.value_tiles - first)
                ring = self.take_ring(count * most_blocks * c)
                self.emit(Load(tag=tags["value_load"], base=Segment.CACHE, address=ring.base,
                               offset=value_at + (head * cache.value_tiles + first) * cache.value_tile, rows=count,
                               row_bytes=cache.value_tile, planes=1)
                          .bind(offset=Argument.SEQUENCE, run=value_words, row_words=value_words), writes=[ring],
                          memory_reads=index)
                block, group = divmod(first, self.config.scaled_words)
                a.compute(more, token, ScalarOp.MULTIPLY, value=vectors)
                self.emit(
                    Matrix(tag=tags["output"], source=codes.base, plane=pixels, pitch=queries, unsigned=1,
                           **self.raster(plan.queries, queries), parameters=plan.value_parameters.base,
                           weights=ring.base, wide=1, plain=1, scaled=1, double=1, scales=scales.base,
                           scales_pitch=queries, tiles=count,
                           target=plan.attended.base + head * queries + block * model.heads, target_plane=model.heads,
                           target_pitch=vectors, target_high=high, group=group)
                    .bind(rows=rows, blocks=blocks, target=more),
                    reads=[codes, scales, plan.value_parameters, ring], writes=[plan.attended],
                    part=(head * cache.value_tiles + first) * queries)
        a.compute(token, token, ScalarOp.ADD, rows)
        a.again(start, token, self.count)
