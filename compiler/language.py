"""A language model as a Program: one program for every number of tokens at every position.

    for each group of tokens:                                       # a loop in hardware
        embedding rows;  for each block: mixer, feed-forward part   # straight-line code, rows bound to a register
            attention: for each few tokens: for each key head: scores, softmax, values
    logits and answer of the last token

Weights stream through a ring of scratchpad words in order of use; tokens between the units, found from what
each instruction touches, let loads run ahead as far as the ring reaches. Loops begin and end with barriers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from weft.arch.config import EngineConfig
from weft.arch.errors import ModelError
from weft.arch.isa import End, Instruction, Load, Matrix, Read, Row, RowLayout, RowOp, ScalarOp, Store
from weft.arch.language import (
    UNIT_SCALE,
    Attention,
    Block,
    Convolution,
    LanguageModel,
    Linear,
    Norm,
    norm_constant,
    rotation_table,
    row_unit,
)
from weft.arch.program import Argument, Language, Layer, Program, Segment
from weft.compiler.assembler import Assembler
from weft.compiler.footprint import Footprint
from weft.compiler.language_pack import NOTHING, Packed, pack, padded, scale_words, two_words
from weft.compiler.language_plan import Plan, Region, Rows16, plan_language
from weft.compiler.verify import verify

WORD = 4  # bytes of a token in segment INPUT
ALIGNMENT = 4096  # bytes from which on constants start where a burst does
RING_CHUNKS = 3  # chunks of weights that the ring holds


def compile_language(model: LanguageModel, config: EngineConfig, context: int | None = None,
                     progress: Callable[[int, int], None] | None = None) -> Program:
    """One Program for one engine, for sequences of up to `context` positions (default: what the model allows, at
    most 2048); the same bytes for the same arguments. `progress(done, all)` is called after each block.

    Raises ModelError when the model does not fit the engine.
    """
    limit = model.config.context
    context = min(limit, 2048) if context is None else context
    if not 1 <= context <= limit:
        raise ModelError(f"language model '{model.config.name}' has 1..{limit} positions, a context of {context} was "
                         "asked for")
    compiler = _Compiler(model, plan_language(model.config, config, context), context)
    compiler.run(progress)
    program = compiler.program()
    verify(program, compiler.samples())
    return program


class _Compiler:
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

    # -- the program, top down

    def run(self, progress: Callable[[int, int], None] | None) -> None:
        a, plan, model = self.assembler, self.plan, self.model
        steps = len(model.blocks) + 2
        report = progress or (lambda done, total: None)
        self.embedding = pack(model.embedding, self.config, model.norm.unit(), model.logit_scale)
        self.embedding_at = self.constant(self.embedding.parameters.tobytes())
        self.embedding_weights = self.constant(self.embedding.stream.tobytes())
        if "attention" in model.config.layers:
            cosine, sine = rotation_table(model.config, np.arange(plan.cache.context))
            words = np.concatenate([two_words(cosine, self.config), two_words(sine, self.config)])
            self.rotation_at = self.constant(words.transpose(1, 2, 0, 3).tobytes())  # [position][block][4 words]
            tiles = plan.value_parameters.words // self.config.plain_parameter_words
            self.value_tiles = tiles
        report(1, steps)

        a.set(self.done, 0)
        start = a.loop()
        a.compute(self.count, Argument.COUNT, ScalarOp.SUBTRACT, self.done)
        a.compute(self.count, self.count, ScalarOp.MINIMUM, value=plan.tokens)
        a.compute(self.position, Argument.POSITION, ScalarOp.ADD, self.done)
        self.embed()
        scale = model.residual
        for index, block in enumerate(model.blocks):
            mixer = self.convolution if isinstance(block.mixer, Convolution) else self.attention
            mixer(index, block, scale)
            self.feed_forward(index, block)
            scale = block.residual[1]
            report(index + 2, steps)
        a.compute(self.done, self.done, ScalarOp.ADD, self.count)
        a.again(start, self.done, Argument.COUNT)
        self.head(scale)
        a.append(End())
        report(steps, steps)

    def embed(self) -> None:
        """Embedding rows, one token after the other: each is a column of a tile of the logits' weights."""
        a, plan, packed, tag = self.assembler, self.plan, self.embedding, self.layer(
            "embedding", "expand", "embedding", padded(self.model.config.width, self.lanes), "row")
        index, token, tile, column, at = self.temporary[:5]
        shift = self.columns.bit_length() - 1
        a.set(index, 0)
        start = a.loop()
        a.compute(at, index, ScalarOp.ADD, self.done)
        a.compute(at, at, ScalarOp.MULTIPLY, value=WORD)
        a.append(Read(target=token, first=at, base=Segment.INPUT))
        a.compute(tile, token, ScalarOp.SHIFT, value=shift)
        a.compute(column, tile, ScalarOp.MULTIPLY, value=self.columns)
        a.compute(column, token, ScalarOp.SUBTRACT, column)
        words = packed.stream.shape[1]
        ring = self.take_ring(words + self.config.plain_parameter_words)
        parameters, stream = ring.base, ring.base + self.config.plain_parameter_words
        for address, offset, run in ((parameters, self.embedding_at, self.config.plain_parameter_words),
                                     (stream, self.embedding_weights, words)):
            a.compute(at, tile, ScalarOp.MULTIPLY, value=run * self.lanes)
            self.emit(Load(tag=tag, base=Segment.CONSTANTS, address=address, offset=offset, run=run, rows=1, planes=1)
                      .bind(offset=at), writes=[Region(address, run)])
        h = plan.residual
        mult, shift = self.model.expand_factor()
        self.emit(Row(tag=tag, operation=RowOp.EXPAND, source=stream, other=parameters, rows=1, columns=1,
                      blocks=packed.blocks, target=h.base, target_plane=h.plane, target_high=h.high, mult=mult,
                      shift=shift).bind(target=index, length=column), reads=[ring], writes=[h.region])
        a.compute(index, index, ScalarOp.ADD, value=1)
        a.again(start, index, self.count)

    def convolution(self, index: int, block: Block, scale: float) -> None:
        plan, mixer, width = self.plan, block.mixer, self.shape.width
        assert isinstance(mixer, Convolution)
        name, history = f"{index}.mixer", self.model.config.kernel - 1
        self.load_constant(name, plan.norm, two_words(mixer.norm.codes, self.config))
        taps = two_words(mixer.kernel.T, self.config)  # [low, high][tap][block]
        self.load_constant(name, plan.kernel, taps)
        gated = plan.gated
        place = plan.cache.start(index)
        run_bytes = history * self.lanes
        state = {"base": Segment.CACHE, "offset": place, "run": history, "rows": width, "row_words": gated.plane,
                 "row_bytes": run_bytes, "planes": 2, "plane_words": gated.high, "plane_bytes": width * run_bytes}
        tag = self.layer(f"{name}.state", "load", "")
        if history:
            self.emit(Load(tag=tag, address=gated.base, **state).bind(offset=Argument.SEQUENCE),
                      writes=[gated.region], memory_reads=index)
        self.normalize(f"{name}.norm", mixer.norm, scale)
        scales = np.repeat([mixer.b_scale, mixer.c_scale, mixer.x_scale], self.model.config.width)
        size = self.model.config.width
        rows = [row for part in range(3) for row in padded(size, self.lanes, part * size)]
        packed = pack(mixer.in_projection, self.config, mixer.norm.unit(), scales, rows)
        third = packed.tiles // 3
        for part, target in enumerate((plan.b, plan.c, plan.x)):
            self.linear(f"{name}.in_projection", packed, target, range(part * third, (part + 1) * third))
        new = Rows16(gated.base + history, gated.blocks, gated.plane)
        self.elementwise(f"{name}.gate", RowOp.MULTIPLY, plan.b, plan.x, new, mixer.gate_shift)
        self.emit(self.row(f"{name}.convolution", RowOp.CONVOLVE, gated, plan.b, other=plan.kernel.base, other_plane=1,
                           other_high=self.model.config.kernel * width, other_column=width, source_column=1,
                           span=self.model.config.kernel, shift=mixer.kernel_shift),
                  reads=[gated.region, plan.kernel], writes=[plan.b.region])
        if history:
            self.emit(Store(tag=tag, address=gated.base, mask=(1 << self.lanes) - 1, **state)
                      .bind(address=self.count, offset=Argument.SEQUENCE), reads=[gated.region], memory_writes=index)
        self.elementwise(f"{name}.product", RowOp.MULTIPLY, plan.c, plan.b, plan.c, mixer.product_shift)
        self.quantize(f"{name}.row", plan.c)
        self.finish(name, mixer.out_projection, row_unit(mixer.product_scale), plan.x, block, 0)

    def feed_forward(self, index: int, block: Block) -> None:
        plan, part, name = self.plan, block.feed_forward, f"{index}.feed_forward"
        self.load_constant(name, plan.norm, two_words(part.norm.codes, self.config))
        self.normalize(f"{name}.norm", part.norm, block.residual[0])
        gate = pack(part.gate, self.config, part.norm.unit(), part.gate_scale)
        value = pack(part.value, self.config, part.norm.unit(), part.value_scale)
        together = self.config.scaled_words
        for chunk, first in enumerate(range(0, self.shape.feed_forward, plan.chunk_blocks)):
            last = min(first + plan.chunk_blocks, self.shape.feed_forward)
            tiles = range(first * together, last * together)
            gates, values = plan.gates[chunk % 2], plan.values[chunk % 2]
            self.linear(f"{name}.gate", gate, gates, tiles)
            self.linear(f"{name}.value", value, values, tiles)
            product = Rows16(plan.product.base + first * plan.product.plane, plan.product.blocks, plan.product.plane)
            self.elementwise(f"{name}.product", RowOp.SWIGLU, gates, values, product, part.product_shift, part.up,
                             blocks=last - first, part=first)
        self.quantize(f"{name}.row", plan.product, plan.product.base)
        self.finish(name, part.down, row_unit(part.product_scale), plan.down, block, 1, plan.product)

    def finish(self, name: str, linear: Linear, unit: float, result: Rows16, block: Block, half: int,
               source: Rows16 | None = None, groups: Sequence[int] | None = None, step: int = 0) -> None:
        """The last product of a part of a block, and its addition to the residual stream."""
        out = "out_projection" if half == 0 else "down"
        packed = pack(linear, self.config, unit, block.residual[half], groups=groups)
        self.linear(f"{name}.{out}", packed, result, source=source, step=step)
        self.elementwise(f"{name}.residual", RowOp.ADD, self.plan.residual, result, self.plan.residual,
                         up=block.shifts[half])

    def head(self, scale: float) -> None:
        """Logits of the last token and their greatest."""
        a, plan, packed = self.assembler, self.plan, self.embedding
        last = self.temporary[0]
        a.compute(last, self.count, ScalarOp.SUBTRACT, value=1)
        self.load_constant("norm", plan.norm, two_words(self.model.norm.codes, self.config))
        self.normalize("norm", self.model.norm, scale, last)
        blocks = packed.tiles // self.config.scaled_words
        high = blocks * self.lanes
        answer = self.layer("answer", "argmax", "")
        tag = self.layer("logits.store", "store", "")
        for chunk, first in enumerate(range(0, blocks, plan.logit_blocks)):
            count = min(plan.logit_blocks, blocks - first)
            logits = plan.logits[chunk % 2]
            tiles = range(first * self.config.scaled_words, (first + count) * self.config.scaled_words)
            self.linear("logits", packed, logits, tiles, single=True, split=(self.embedding_at, self.embedding_weights))
            length = min(self.model.config.vocab - first * self.lanes, count * self.lanes)
            self.emit(Row(tag=answer, operation=RowOp.ARGMAX, source=logits.base, source_plane=1,
                          source_high=logits.high, rows=1, columns=1, blocks=count, length=length,
                          constant=first * self.lanes, first=chunk == 0, other=plan.answer.base,
                          target=plan.answer.base),
                      reads=[logits.region, plan.answer], writes=[plan.answer])
            self.emit(Store(tag=tag, base=Segment.OUTPUT, address=logits.base, offset=first * self.lanes, run=count,
                            rows=2, row_words=logits.high, row_bytes=high, planes=1, mask=(1 << self.lanes) - 1),
                      reads=[logits.region], memory_writes=(Segment.OUTPUT, 0))
        self.emit(Store(tag=tag, base=Segment.OUTPUT, address=plan.answer.base, offset=2 * high, run=1, rows=1,
                        planes=1, mask=(1 << self.lanes) - 1), reads=[plan.answer],
                  memory_writes=(Segment.OUTPUT, 1))

    # -- attention

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
            scale_words(mult, shift, self.value_tiles, self.config), np.uint8))
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
        fields = steps | {
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
                         row_bytes=cache.key_scale_head, planes=1, mask=15)
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
        main_lanes, side_lanes = (1, 4) if keys else (c, 1)
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
            scores, codes = plan.scores[head % 2], plan.probabilities[head % 2]
            scales, magnitudes = plan.probability_scales[head % 2], plan.magnitudes[head % 2]
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

    # -- pieces

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

    def quantize(self, name: str, source: Rows16, target: int | None = None) -> None:
        """Codes of whole rows into `row`, or over the low words of `source`."""
        plan = self.plan
        into = Region(plan.row.base if target is None else target, source.high)
        self.emit(self.row(name, RowOp.QUANTIZE, source, None, target=into.base, target_plane=source.plane,
                           target_row=1, scale=plan.row_scales.base, scale_row=1, mult=UNIT_SCALE[0],
                           shift=UNIT_SCALE[1]),
                  reads=[source.region], writes=[into, plan.row_scales])

    def elementwise(self, name: str, operation: RowOp, x: Rows16, o: Rows16, target: Rows16, shift: int = 0,
                    up: int = 0, blocks: int | None = None, part: int = 0) -> None:
        blocks = x.blocks if blocks is None else blocks
        regions = [Region(item.base + high, blocks * item.plane) for item in (x, o, target) for high in (0, item.high)]
        instruction = self.row(name, operation, x, target, blocks=blocks, other=o.base, other_plane=o.plane,
                               other_high=o.high, other_row=1, shift=shift, up=up)
        self.emit(instruction, reads=regions[:4], writes=regions[4:], part=part)

    def row(self, name: str, operation: RowOp, operand: Rows16, into: Rows16 | None,
            channels: Sequence[int] | None = None, single: bool = False, **given: int) -> Row:
        """An instruction on the rows of the group's tokens."""
        fields = {
            "operation": operation, "source": operand.base, "source_plane": operand.plane, "source_high": operand.high,
            "source_row": 1, "columns": 1, "blocks": operand.blocks, "rows": int(single),
        }
        if into:
            fields |= {"target": into.base, "target_plane": into.plane, "target_high": into.high, "target_row": 1}
        size = self.model.config.feed_forward if ".feed_forward.product" in name or name.endswith("feed_forward.row") \
            else self.model.config.width
        tag = self.layer(name, operation.name.lower(), name, channels or padded(size, self.lanes), "row")
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

    # -- results

    def program(self) -> Program:
        a, config, model = self.assembler, self.config, self.model.config
        high = self.embedding.tiles * self.columns
        word = config.word_bytes
        input_bytes = -(-self.context * WORD // word) * word
        language = Language(
            vocab=model.vocab, context=self.context, sequence_bytes=self.plan.cache.sequence_bytes, logits=0, high=high,
            answer=2 * high, logit_scale=self.model.logit_scale, bos=model.bos, eos=model.eos)
        encoded = b"".join(instruction.encode() for instruction in a.instructions)
        return Program(
            config=config, fingerprint=config.fingerprint, model=model.name,
            instructions=np.frombuffer(encoded, np.uint8).reshape(len(a.instructions), -1),
            constants=np.frombuffer(bytes(self.constants), np.uint8),
            first_row=np.array(a.rows, np.int32), first_part=np.array(a.parts, np.int32),
            segment_bytes=(len(self.constants), 0, input_bytes, 2 * high + word, language.sequence_bytes),
            inputs=(), outputs=(), layers=tuple(self.layers), language=language)

    def samples(self) -> list[tuple[int, int, int]]:
        """Arguments of runs that reach every extreme: first and last position, one token and more than a group."""
        tokens, context = self.plan.tokens, self.context
        most = min(tokens + 1, context)
        return sorted({(0, 1, 0), (0, most, 0), (context - 1, 1, 0), (context - min(tokens, context),
                                                                      min(tokens, context), 0)})
