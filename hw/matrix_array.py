"""The multiply-accumulate array: R input channels x C output channels x P pixels per cycle."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from weft.arch.config import EngineConfig
from weft.arch.numerics import ACC_BITS
from weft.hw.matrix_layouts import SLOTS, bounds_layout, result_layout, scale_layout, word_layout
from weft.hw.requantize import Requantizer
from weft.hw.stream import delay_line

LANE_BITS = 13  # one of two products in a multiplier: 9-bit times 5-bit signed


def result_room(config: EngineConfig) -> int:
    """Results to keep room for: those of a pass on top of those on their way from the last step to their place."""
    return 16 * -(-(2 * config.pixels + 8) // 16)


class MatrixArray(wiring.Component):
    """P dot-product units of R x C, one cycle behind each other, and the requantizer they share.

    The head issues a step per cycle: the R*C weights and a beat that says what to do with them. Both pass from
    pixel to pixel, one per cycle, so pixel p works p cycles behind pixel 0: the P words of a step's source
    words are needed one per cycle, and the P results of a pass leave one per cycle. Nothing behind the head
    ever stalls; the head issues no step before its words are there and no last step before there is room for
    the results. A cycle without a step costs that cycle only.

    Driven by: `words`, an item once the P source words of a step are on `sources` or will be in time: pixel 0
    takes its own 1 cycle after the first step of the word, pixel p p cycles later, without looking at `valid`.
    `weights`, words of weight steps. `bias`, for slot `bias_slot`, and `scale` and `bounds`, for slot
    `scale_slot`, of the same cycle; slots are used in turn. Results come on `result` with `result_valid` and
    must be taken; `release` gives back the room of one.

    `issued`: a step went off. `full`: a step waited only for room. `working`: steps are in the pipeline.

    Throughput: one step per cycle. Latency: from the last step of a pass to the result of pixel p
    6 + p + Requantizer.LATENCY cycles.

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
            "bias_slot": Out(range(SLOTS)),
            "bias": In(data.ArrayLayout(signed(ACC_BITS), config.columns)),
            "scale_slot": Out(range(SLOTS)),
            "scale": In(data.ArrayLayout(scale_layout(), config.columns)),
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
        bias = Signal.like(self.bias, reset_less=True)
        m.d.comb += [
            self.working.eq(Cat(beat.valid for beat in beats).any()),
            self.sources.ready.eq(Cat(beat.load for beat in beats[:config.pixels]).any()),
            self.bias_slot.eq(beats[3].slot),
        ]
        with m.If(beats[3].first):  # pixels start one by one, and the next pass P cycles later or more
            m.d.sync += bias.eq(self.bias)
        sums = [self._pixel(m, p, beats[p:p + 5], [line[p] for line in weights], bias) for p in range(config.pixels)]
        self._drain(m, beats[4], sums)
        return m

    def _head(self, m: Module):
        """Issues steps. Returns the registers of the newest beat and of its weights."""
        config = self.config
        steps, per_word = config.steps_per_word, config.lanes // config.weight_step_bytes
        beat = Signal(data.StructLayout({
            "valid": 1,
            "load": 1,  # first step of a word
            "first": 1,  # of the pass
            "last": 1,
            "chunk": range(steps),  # R lanes of the word
            "half": 1,  # and, if wide, which half of them
            "wide": 1,
            "unsigned": 1,
            "slot": range(SLOTS),
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
            free.eq(free + self.release - Mux(self.issued & pass_last, word.live, 0)),
            raw.eq(self.weights.payload.word_select(step[:exact_log2(per_word)], len(raw))),
            beat.valid.eq(self.issued),
            beat.load.eq(self.issued & (step == 0)),
            beat.first.eq(self.issued & (step == 0) & word.first),
            beat.last.eq(self.issued & pass_last),
            beat.chunk.eq(Mux(word.wide, step >> 1, step)),
            beat.half.eq(step),
            beat.slot.eq(slot),
        ]
        passed = ("wide", "unsigned", "live", "tile_last", "instruction_last")
        m.d.sync += [beat[name].eq(word[name]) for name in passed]
        with m.If(self.issued):
            m.d.sync += step.eq(Mux(word_last, 0, step + 1))
            m.d.sync += slot.eq(slot + (pass_last & word.tile_last))
        return beat, raw

    def _packed(self, m: Module, raw, wide) -> list[Signal]:
        """Multiplier operands of a step: for each slot r and pair of columns, both weights in one number."""
        def weight(row: int, column: int):
            nibble = raw.word_select(row * self.config.columns + column, 4)
            sign = nibble[3] if row % 2 else nibble[3] & ~wide
            return Cat(nibble, sign).as_signed()

        packed = []
        for row in range(self.config.rows):
            for pair in range(self.config.columns // 2):
                operand = Signal(signed(LANE_BITS + 5), name=f"weight_{row}_{pair}", reset_less=True)
                m.d.sync += operand.eq((weight(row, 2 * pair + 1) << LANE_BITS) + weight(row, 2 * pair))
                packed.append(operand)
        return packed

    def _pixel(self, m: Module, p: int, beats: list, weights: list, bias) -> list[Signal]:
        """The dot products of pixel `p`: its C accumulators. `beats` are those it meets, stage by stage."""
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
            accumulator = Signal(signed(ACC_BITS), name=f"accumulator_{p}_{column}", reset_less=True)
            m.d.sync += total.eq(low + Mux(beats[3].wide, high << 4, high))
            with m.If(beats[4].valid):
                m.d.sync += accumulator.eq(Mux(beats[4].first, bias[column], accumulator) + total)
            accumulators.append(accumulator)
        return accumulators

    def _drain(self, m: Module, beat, sums: list[list[Signal]]) -> None:
        """From the last step of a pass, which pixel 0 adds in `beat`, the pixels' sums are final one by one."""
        config = self.config
        m.submodules.requantizer = requantizer = Requantizer(config.columns, data.StructLayout(
            {name: shape for name, shape in result_layout(config).members.items() if name != "codes"}))
        scale, bounds = Signal.like(self.scale, reset_less=True), Signal.like(self.bounds, reset_less=True)
        passed, draining, pixel = Signal.like(beat), Signal(), Signal(range(config.pixels))
        m.d.comb += self.scale_slot.eq(beat.slot)
        with m.If(beat.last):
            m.d.sync += [scale.eq(self.scale), bounds.eq(self.bounds), passed.eq(beat), draining.eq(1), pixel.eq(0)]
        with m.Else():
            m.d.sync += pixel.eq(pixel + 1)
            with m.If(pixel == config.pixels - 1):
                m.d.sync += draining.eq(0)

        last = pixel == passed.live - 1
        m.d.comb += [
            requantizer.i_valid.eq(draining & (pixel < passed.live)),
            requantizer.i_low.eq(bounds.low),
            requantizer.i_high.eq(bounds.high),
            requantizer.i_meta.slot.eq(passed.slot),
            requantizer.i_meta.tile_last.eq(last & passed.tile_last),
            requantizer.i_meta.instruction_last.eq(last & passed.instruction_last),
        ]
        with m.Switch(pixel):
            for p, accumulators in enumerate(sums):
                with m.Case(p):
                    m.d.comb += [requantizer.i_acc[c].eq(accumulator) for c, accumulator in enumerate(accumulators)]
        for column in range(config.columns):
            m.d.comb += requantizer.i_mult[column].eq(scale[column].mult)
            m.d.comb += requantizer.i_shift[column].eq(scale[column].shift)
        m.d.comb += [
            self.result_valid.eq(requantizer.o_valid),
            self.result.codes.eq(requantizer.o_code),
            self.result.slot.eq(requantizer.o_meta.slot),
            self.result.tile_last.eq(requantizer.o_meta.tile_last),
            self.result.instruction_last.eq(requantizer.o_meta.instruction_last),
        ]
