"""The multiply-accumulate array: R input channels x C output channels x P pixels per cycle."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from weft.arch.config import EngineConfig
from weft.arch.numerics import ACC_BITS, MAX_COMBINED_SHIFT, MULT_BITS, SHIFT_BITS
from weft.hw.matrix_layouts import CODE_BITS, SLOTS, bounds_layout, result_layout, scale_layout, word_layout
from weft.hw.requantize import Requantizer
from weft.hw.stream import delay_line

LANE_BITS = 13  # one of two products in a multiplier: 9-bit times 5-bit signed
GROUP_SCALE_BITS = 8
NEUTRAL = Const({"mult": 1 << MULT_BITS - 1, "shift": MULT_BITS - 1}, scale_layout())  # combine_scales changes nothing


def result_room(config: EngineConfig) -> int:
    """Results to keep room for: those of a pass on top of those on their way from the last step to their place."""
    return 16 * -(-(2 * config.pixels + 16) // 16)


def partial_bits(config: EngineConfig) -> int:
    """Width of a sum over a word: `lanes` products of 9 and 8 bits, the first of them unsigned if it has 9."""
    return 16 + exact_log2(config.lanes)


class MatrixArray(wiring.Component):
    """P dot-product units of R x C, one cycle behind each other, and the path behind them that they share.

    The head issues a step per cycle: the R*C weights and a beat that says what to do with them. Both pass from
    pixel to pixel, one per cycle, so pixel p works p cycles behind pixel 0: the P words of a step's source
    words are needed one per cycle, and the P results of a pass leave one per cycle. Nothing behind the head
    ever stalls; the head issues no step before its words are there and no last step before there is room for
    the results. A cycle without a step costs that cycle only.

    A dot-product unit sums over one word. Pixel by pixel, these sums are multiplied by the group scales of the word
    (1 without), added to those of the words before, which a memory of P entries holds, and after the last word
    requantized by the scale of the tile, combined with that of the pixel if there is one.

    Driven by: `words`, an item once the P source words of a step are on `sources` or will be in time: pixel 0
    takes its own 1 cycle after the first step of the word, pixel p p cycles later, without looking at `valid`.
    `weights`, words of weight steps. `groups`, words of group scales, and `scales`, those of pixels, which are
    taken without looking at `valid`, because they come before the weights that they belong to. `bias`, for slot
    `bias_slot`, `scale` for `scale_slot` and `bounds` for `bounds_slot`, of the same cycle; slots are used in turn.
    Results come on `result` with `result_valid` and must be taken; `release` gives back the room of one. A pass that
    holds its sums has one result, without meaning, to mark its end.

    `issued`: a step went off. `full`: a step waited only for room. `working`: steps are in the pipeline.

    Throughput: one step per cycle. Latency: from the last step of a pass to the result of pixel p
    9 + p + Requantizer.LATENCY cycles.

    Each multiplier makes two products: a * (w1 * 2**13 + w0) holds a*w0 in its low 13 bits, exactly, for any
    9-bit a and two lanes in -8..15. A wide weight is a high nibble (odd slots, signed) and a low one (even
    slots, unsigned).
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        super().__init__({
            "words": In(stream.Signature(word_layout(config))),
            "sources": In(stream.Signature(8 * config.lanes)),
            "weights": In(stream.Signature(8 * config.lanes)),
            "groups": In(stream.Signature(8 * config.lanes)),
            "scales": In(stream.Signature(scale_layout())),
            "bias_slot": Out(range(SLOTS)),
            "bias": In(data.ArrayLayout(signed(ACC_BITS), config.columns)),
            "scale_slot": Out(range(SLOTS)),
            "scale": In(data.ArrayLayout(scale_layout(), config.columns)),
            "bounds_slot": Out(range(SLOTS)),
            "bounds": In(bounds_layout()),
            "result": Out(result_layout(config)),
            "result_valid": Out(1),
            "release": In(1),
            "issued": Out(1),
            "full": Out(1),
            "working": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        first, raw = self._head(m)
        beats = delay_line(m, first, config.pixels + 4)  # pixel p loads its source at beats[p], and so on below
        packed = self._packed(m, delay_line(m, raw, 1, reset_less=True)[-1], beats[1].wide)
        # Pixel p multiplies at beats[p + 2].
        weights = [delay_line(m, weight, config.pixels - 1, reset_less=True) for weight in packed]
        m.d.comb += [
            self.working.eq(Cat(beat.valid for beat in beats).any()),
            self.sources.ready.eq(Cat(beat.load for beat in beats[:config.pixels]).any()),
        ]
        sums = [self._pixel(m, p, beats[p:p + 5], [line[p] for line in weights]) for p in range(config.pixels)]
        self._drain(m, beats[4], sums)
        return m

    def _head(self, m: Module):
        """Issues steps. Returns the registers of the newest beat and of its weights."""
        config = self.config
        steps, per_word = config.steps_per_word, config.lanes // config.weight_step_bytes
        beat = Signal(data.StructLayout({
            "valid": 1,
            "load": 1,  # first step of a word
            "word_last": 1,
            "first": 1,  # word of the pass
            "last": 1,
            "chunk": range(steps),  # R lanes of the word
            "half": 1,  # and, if wide, which half of them
            "wide": 1,
            "unsigned": 1,
            "slot": range(SLOTS),
            "plain": 1,
            "grouped": 1,
            "scaled": 1,
            "hold": 1,
            "live": range(config.pixels + 1),
            "tile_last": 1,
            "instruction_last": 1,
        }))
        raw = Signal(8 * config.weight_step_bytes, reset_less=True)
        word, room = self.words.payload, result_room(config)
        step, slot = Signal(range(2 * steps)), Signal(range(SLOTS))
        free = Signal(range(room + 1), init=room)
        ready, word_last, pass_last, enough = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            word_last.eq(step == Mux(word.wide, 2 * steps - 1, steps - 1)),
            pass_last.eq(word_last & word.last),
            enough.eq(free >= config.pixels),
            ready.eq(self.words.valid & self.weights.valid),
            self.issued.eq(ready & (enough | ~pass_last)),
            self.full.eq(ready & ~self.issued),
            self.words.ready.eq(self.issued & word_last),
            self.weights.ready.eq(self.issued & (step[:exact_log2(per_word)] == per_word - 1)),
        ]
        m.d.sync += [
            free.eq(free + self.release - Mux(self.issued & pass_last, Mux(word.hold, 1, word.live), 0)),
            raw.eq(self.weights.payload.word_select(step[:exact_log2(per_word)], len(raw))),
            beat.valid.eq(self.issued),
            beat.load.eq(self.issued & (step == 0)),
            beat.word_last.eq(self.issued & word_last),
            beat.chunk.eq(Mux(word.wide, step >> 1, step)),
            beat.half.eq(step),
            beat.slot.eq(slot),
        ]
        passed = ("first", "last", "wide", "unsigned", "plain", "grouped", "scaled", "hold", "live", "tile_last",
                  "instruction_last")
        m.d.sync += [beat[name].eq(word[name]) for name in passed]
        with m.If(self.issued):
            m.d.sync += step.eq(Mux(word_last, 0, step + 1))
            m.d.sync += slot.eq(slot + (pass_last & word.tile_last))
        return beat, raw

    def _packed(self, m: Module, raw, wide) -> list[Signal]:
        """Multiplier operands of a step: for each slot r and pair of columns, both weights in one number."""
        def weight(row: int, column: int):
            nibble = raw.word_select((row // 2 * self.config.columns + column) * 2 + row % 2, 4)
            sign = nibble[3] if row % 2 else nibble[3] & ~wide
            return Cat(nibble, sign).as_signed()

        packed = []
        for row in range(self.config.rows):
            for pair in range(self.config.columns // 2):
                operand = Signal(signed(LANE_BITS + 5), name=f"weight_{row}_{pair}", reset_less=True)
                m.d.sync += operand.eq((weight(row, 2 * pair + 1) << LANE_BITS) + weight(row, 2 * pair))
                packed.append(operand)
        return packed

    def _pixel(self, m: Module, p: int, beats: list, weights: list) -> list[Signal]:
        """The dot products of pixel `p` over a word, C of them. `beats` are those it meets, stage by stage."""
        config = self.config
        pairs = config.columns // 2
        source = Signal(8 * config.lanes, name=f"source_{p}", reset_less=True)
        with m.If(beats[0].load):
            m.d.sync += source.eq(self.sources.payload)

        # Two slots share a lane if wide, so slots r and r+1 then take the lane that slot r//2 of the half has.
        chunk = source.word_select(beats[1].chunk, 8 * config.rows)
        half = chunk.word_select(beats[1].half, 4 * config.rows)
        operands = [Signal(signed(9), name=f"operand_{p}_{row}", reset_less=True) for row in range(config.rows)]
        for row, operand in enumerate(operands):
            lane = Mux(beats[1].wide, half.word_select(row // 2, 8), chunk.word_select(row, 8))
            m.d.sync += operand.eq(Cat(lane, lane[-1] & ~beats[1].unsigned).as_signed())

        columns = [[] for _ in range(config.columns)]  # products of each, slot by slot
        for row, operand in enumerate(operands):
            for pair in range(pairs):
                product = Signal(signed(9 + LANE_BITS + 5), name=f"product_{p}_{row}_{pair}", reset_less=True)
                m.d.sync += product.eq(operand * weights[row * pairs + pair])
                columns[2 * pair].append(product[:LANE_BITS].as_signed())
                columns[2 * pair + 1].append(
                    (product[LANE_BITS:2 * LANE_BITS] + product[LANE_BITS - 1])[:LANE_BITS].as_signed())

        accumulators = []
        for column, products in enumerate(columns):
            low, high = sum(products[::2]), sum(products[1::2])
            total = Signal((low + (high << 4)).shape(), name=f"sum_{p}_{column}", reset_less=True)
            accumulator = Signal(signed(partial_bits(config)), name=f"accumulator_{p}_{column}", reset_less=True)
            m.d.sync += total.eq(low + Mux(beats[3].wide, high << 4, high))
            with m.If(beats[4].valid):
                m.d.sync += accumulator.eq(Mux(beats[4].load, 0, accumulator) + total)
            accumulators.append(accumulator)
        return accumulators

    def _drain(self, m: Module, beat, partials: list[list[Signal]]) -> None:
        """What happens to the sums of a word, one pixel per cycle: pixel 0 adds its last step in `beat`.

        Stages: a, the sums of a pixel are chosen; b, multiplied by the group scales; c, added to those of the
        words before; d, after the last word, requantized. Values that all pixels of a word share are loaded with
        pixel 0, one stage ahead of their use.
        """
        config = self.config
        columns = range(config.columns)
        word, pixel, draining = Signal.like(beat), Signal(range(config.pixels)), Signal()
        with m.If(beat.word_last):
            m.d.sync += [word.eq(beat), draining.eq(1), pixel.eq(0)]
        with m.Else():
            m.d.sync += pixel.eq(pixel + 1)
            with m.If(pixel == config.pixels - 1):
                m.d.sync += draining.eq(0)

        item = Signal(data.StructLayout({
            "valid": 1, "pixel": range(config.pixels), "start": 1, "first": 1, "last": 1, "plain": 1, "result": 1,
            "slot": range(SLOTS), "tile_last": 1, "instruction_last": 1,
        }))
        last_pixel = pixel == word.live - 1
        m.d.comb += [item[name].eq(word[name]) for name in ("first", "last", "plain", "slot")]
        m.d.comb += [
            item.valid.eq(draining & (pixel < word.live)),
            item.pixel.eq(pixel),
            item.start.eq(item.valid & (pixel == 0)),
            item.result.eq(item.valid & word.last & (~word.hold | last_pixel)),
            item.tile_last.eq(last_pixel & word.tile_last),
            item.instruction_last.eq(last_pixel & word.instruction_last),
        ]
        a, b, c, d = delay_line(m, item, 3)

        # a
        partial = [Signal.like(value, name=f"partial_{n}", reset_less=True) for n, value in enumerate(partials[0])]
        with m.If(a.valid), m.Switch(pixel):
            for p, values in enumerate(partials):
                with m.Case(p):
                    m.d.sync += [register.eq(value) for register, value in zip(partial, values, strict=True)]
        factor = Signal(data.ArrayLayout(GROUP_SCALE_BITS, config.columns), reset_less=True)
        group, group_last = Signal(range(config.scaled_words)), Signal()  # word among those of a word of scales
        scale, pixel_scale = Signal.like(self.scale, reset_less=True), Signal(scale_layout(), reset_less=True)
        m.d.comb += [
            group_last.eq(word.last | (group == config.scaled_words - 1)),
            self.groups.ready.eq(a.start & word.grouped & group_last),
            self.scales.ready.eq(a.valid & word.last & word.scaled),
            self.scale_slot.eq(a.slot),
        ]
        with m.If(a.start):
            chosen = self.groups.payload.word_select(group, GROUP_SCALE_BITS * config.columns)
            m.d.sync += factor.eq(Mux(word.grouped, chosen, Cat(Const(1, GROUP_SCALE_BITS) for _ in columns)))
            m.d.sync += group.eq(Mux(group_last | ~word.grouped, 0, group + 1))
        with m.If(a.start & word.last):
            m.d.sync += scale.eq(self.scale)
        with m.If(a.valid & word.last):
            m.d.sync += pixel_scale.eq(Mux(word.scaled, self.scales.payload, NEUTRAL))

        # b
        scaled = [Signal(signed(partial_bits(config) + GROUP_SCALE_BITS), name=f"scaled_{n}", reset_less=True)
                  for n in columns]
        with m.If(b.valid):
            m.d.sync += [scaled[n].eq(partial[n] * factor[n]) for n in columns]
        mults = [Signal(2 * MULT_BITS, name=f"mults_{n}", reset_less=True) for n in columns]
        shifts = [Signal(9, name=f"shifts_{n}", reset_less=True) for n in columns]
        with m.If(b.result):
            m.d.sync += [mults[n].eq(pixel_scale.mult * scale[n].mult) for n in columns]
            m.d.sync += [shifts[n].eq(pixel_scale.shift + scale[n].shift) for n in columns]
        bias = Signal.like(self.bias, reset_less=True)
        m.d.comb += self.bias_slot.eq(b.slot)
        with m.If(b.start & b.first):
            m.d.sync += bias.eq(Mux(b.plain, 0, self.bias))

        # c
        m.submodules.sums = sums = Memory(shape=self.bias.shape(), depth=max(2, config.pixels), init=[])
        store, held = sums.write_port(), sums.read_port(domain="comb")
        total = Signal.like(self.bias, reset_less=True)
        m.d.comb += [held.addr.eq(c.pixel), store.addr.eq(c.pixel), store.en.eq(c.valid)]
        m.d.comb += [store.data[n].eq(Mux(c.first, bias[n], held.data[n]) + scaled[n]) for n in columns]
        mult = Signal(data.ArrayLayout(MULT_BITS, config.columns), reset_less=True)
        shift = Signal(data.ArrayLayout(SHIFT_BITS, config.columns), reset_less=True)
        with m.If(c.result):
            m.d.sync += total.eq(store.data)
            for n in columns:
                carry = mults[n][-1]  # numerics.combine_scales
                m.d.sync += mult[n].eq(Mux(carry, mults[n][MULT_BITS:], mults[n][MULT_BITS - 1:]))
                difference = Signal(signed(11), name=f"shift_{n}")
                m.d.comb += difference.eq(shifts[n] - (MULT_BITS - 1) - carry)
                m.d.sync += shift[n].eq(Mux(difference < 0, 0, Mux(difference > MAX_COMBINED_SHIFT,
                                                                   MAX_COMBINED_SHIFT, difference)))
        bounds = Signal.like(self.bounds, reset_less=True)
        m.d.comb += self.bounds_slot.eq(c.slot)
        with m.If(c.start & c.last):
            m.d.sync += bounds.eq(self.bounds)

        # d
        meta_layout = data.StructLayout(
            {name: shape for name, shape in result_layout(config).members.items() if name != "codes"})
        m.submodules.requantizer = requantizer = Requantizer(config.columns, meta_layout, CODE_BITS)
        m.d.comb += [
            requantizer.i_valid.eq(d.result),
            requantizer.i_acc.eq(total),
            requantizer.i_mult.eq(mult),
            requantizer.i_low.eq(bounds.low),
            requantizer.i_high.eq(bounds.high),
            self.result_valid.eq(requantizer.o_valid),
            self.result.codes.eq(requantizer.o_code),
        ]
        m.d.comb += [requantizer.i_shift[n].eq(shift[n]) for n in columns]
        m.d.comb += [requantizer.i_meta[name].eq(d[name]) for name in meta_layout.members]
        m.d.comb += [self.result[name].eq(requantizer.o_meta[name]) for name in meta_layout.members]
