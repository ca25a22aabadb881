"""A language model as a Program: one program for every number of tokens at every position.

    for each group of tokens:                                       # a loop in hardware
        embedding rows;  for each block: mixer, feed-forward part   # straight-line code, rows bound to a register
            attention: for each few tokens: for each key head: scores, softmax, values
    logits and answer of the last token

Weights stream through a ring of scratchpad words in order of use; tokens between the units, found from what
each instruction touches, let loads run ahead as far as the ring reaches. Loops begin and end with barriers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from weft.arch.config import EngineConfig
from weft.arch.errors import ModelError
from weft.arch.isa import End, Load, Read, Row, RowOp, ScalarOp, Store
from weft.arch.language import Block, Convolution, LanguageModel, rotation_table, row_unit
from weft.arch.program import Argument, Language, Program, Segment
from weft.compiler.language_attention import AttentionEmitter
from weft.compiler.language_pack import pack, padded, two_words
from weft.compiler.language_plan import Region, Rows16, plan_language
from weft.compiler.verify import verify

WORD = 4  # bytes of a token in segment INPUT


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


class _Compiler(AttentionEmitter):
    """The program, top down."""

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
        together, hidden = self.config.scaled_words, padded(self.model.config.feed_forward, self.lanes)
        for chunk, first in enumerate(range(0, self.shape.feed_forward, plan.chunk_blocks)):
            last = min(first + plan.chunk_blocks, self.shape.feed_forward)
            tiles = range(first * together, last * together)
            gates, values = plan.gates[chunk % 2], plan.values[chunk % 2]
            self.linear(f"{name}.gate", gate, gates, tiles)
            self.linear(f"{name}.value", value, values, tiles)
            product = Rows16(plan.product.base + first * plan.product.plane, plan.product.blocks, plan.product.plane)
            self.elementwise(f"{name}.product", RowOp.SWIGLU, gates, values, product, part.product_shift, part.up,
                             blocks=last - first, part=first, channels=hidden)
        self.quantize(f"{name}.row", plan.product, plan.product.base, hidden)
        self.finish(name, part.down, row_unit(part.product_scale), plan.down, block, 1, plan.product)

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
