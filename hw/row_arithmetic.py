"""The arithmetic of the row unit: `row_lanes` numbers per cycle, through one pipeline for all operations."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from weft.arch.config import EngineConfig
from weft.arch.isa import RowOp
from weft.arch.numerics import (
    CODE_PEAK,
    EXP2,
    INT16,
    PROBABILITY_PEAK,
    ROTATION_BITS,
    SIGMOID,
    SIGMOID_FRACTION,
    SIGMOID_STEP_BITS,
)
from weft.hw.gather import stage
from weft.hw.row_layouts import (
    FACTOR_BITS,
    FACTOR_SHIFT_BITS,
    FIELDS,
    KEY_BITS,
    NUMBER_BITS,
    TERM_BITS,
    codes_layout,
    group_layout,
    step_layout,
)

OPERAND_BITS = 18  # of the first two products: a number with its sign, doubled
SUM_BITS = 36  # 15 products of numbers; a rotated pair; a product of unsigned numbers
SCALED_BITS = 50  # 33 bits times 16, and half a step
MAX_SHIFT = 48  # makes 0 of any sum times a factor
ROUND_BITS = 16  # after the first product
TABLE_BITS = 26
SIGMOID_STEPS = len(SIGMOID) - 1
ARGUMENT_MAX = (1 << SIGMOID_FRACTION + 4) - 1
DISTANCE_MAX = 17  # a larger shift makes 0 of any power
STAGES = 13


def table() -> list[int]:
    """Sigmoid less 1/2 and its step to the next entry; behind it, the powers of 2."""
    half = 1 << 15
    return [int(value - half | step << 16) for value, step in zip(SIGMOID, SIGMOID[1:] - SIGMOID[:-1], strict=False)] \
        + [int(value) for value in EXP2]


def round_half_even(value: Value, bits: int) -> Value:
    """numerics.round_shift by a constant."""
    return (value + Const((1 << bits - 1) - 1) + value[bits]) >> bits


class RowArithmetic(wiring.Component):
    """Codes of groups of numbers, and what goes into the maximum and the sum of a row.

        x -> table: sigmoid, power of 2 -> first product x * m, rounded by 16 -> second product a * b
          -> sum of taps, of a rotated pair -> times factor -> round, shift, clamp -> codes

    m, a, b by operation: ADD 2**(16 - up), rounded product, 1 (the sum begins with o); SWIGLU sigmoid, rounded
    product, o; rotation 2*o, rounded product, cosine or sine; otherwise x for the sum of squares, x (or the
    power), o or 1. `factor` / 2**`shift` is 1 / 2**shift of the instruction, or what was found in the row.

    Driven by: `instruction`, steady while anything is in the pipeline; `group`, taken in every cycle unless a block
    is complete and `codes` not ready. `maximum` is read one cycle after a group is taken, `factor` and `shift`
    FACTOR_TIME cycles after. `keys` (sums as unsigned numbers of the same order; lanes that do not count are
    least) and `terms` (squares, powers) are valid with `key_valid` and `term_valid` for one cycle.

    Latency: a group's codes are on `codes` STAGES cycles after it was taken, its keys 9, its terms 6.
    Throughput: one group per cycle.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        super().__init__({
            "instruction": In(FIELDS),
            "group": In(stream.Signature(group_layout(config))),
            "maximum": In(signed(NUMBER_BITS)),
            "factor": In(FACTOR_BITS),
            "shift": In(FACTOR_SHIFT_BITS),
            "codes": Out(stream.Signature(codes_layout(config))),
            "key_valid": Out(1),
            "key_first": Out(1),
            "key_last": Out(1),
            "key_power": Out(1),
            "keys": Out(data.ArrayLayout(KEY_BITS, config.row_lanes)),
            "term_valid": Out(1),
            "term_first": Out(1),
            "terms": Out(data.ArrayLayout(TERM_BITS, config.row_lanes)),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        config, now = self.config, self.instruction
        row_lanes = config.row_lanes
        groups = config.lanes // row_lanes

        # ---- what moves ------------------------------------------------------------------------------------------
        move = Signal()
        held = [Signal(name=f"held{k}") for k in range(STAGES)]  # a group is in stage k
        enter = [Signal(name=f"enter{k}") for k in range(STAGES)]  # one moves into stage k
        steps = [Signal(step_layout(config), name=f"step{k}", reset_less=True) for k in range(STAGES)]
        arriving = [self.group.valid, *held]
        for k in range(STAGES):
            goes_on = steps[8].emit if k == 9 else 1
            m.d.comb += enter[k].eq(move & arriving[k] & goes_on)
            with m.If(move):
                m.d.sync += held[k].eq(arriving[k] & goes_on)
            with m.If(enter[k]):
                m.d.sync += steps[k].eq(self.group.payload.step if k == 0 else steps[k - 1])
        m.d.comb += self.group.ready.eq(move)

        # ---- scaling: the same for all lanes -----------------------------------------------------------------------
        operation = now.operation
        is_op = {op: operation == op for op in RowOp}
        scaled = is_op[RowOp.QUANTIZE] | is_op[RowOp.SOFTMAX] | is_op[RowOp.EXPAND]
        common = {"factor": Signal(FACTOR_BITS), "shift": Signal(FACTOR_SHIFT_BITS), "last_bit": Signal(MAX_SHIFT + 1),
                  "half": Signal(MAX_SHIFT), "low": Signal(signed(NUMBER_BITS)), "high": Signal(signed(NUMBER_BITS))}
        power_of_2 = Signal(MAX_SHIFT + 1)
        m.d.comb += [
            common["factor"].eq(Mux(scaled, self.factor, 1)),
            common["shift"].eq(Mux(scaled, self.shift, Mux(is_op[RowOp.ADD], 0, now.shift))),
            power_of_2.eq(1 << common["shift"]),
            common["low"].eq(Mux(is_op[RowOp.QUANTIZE], -CODE_PEAK, Mux(is_op[RowOp.SOFTMAX], 0, INT16[0]))),
            common["high"].eq(Mux(is_op[RowOp.QUANTIZE], CODE_PEAK,
                                  Mux(is_op[RowOp.SOFTMAX], PROBABILITY_PEAK, INT16[1]))),
        ]
        m.d.sync += [
            common["last_bit"].eq(power_of_2 & ~1),
            common["half"].eq((power_of_2 - 1)[1:]),
        ]

        # ---- sums of the taps of a block -----------------------------------------------------------------------
        convolve = is_op[RowOp.CONVOLVE]
        m.submodules.sums = memory = Memory(shape=SUM_BITS * row_lanes, depth=groups, init=[])
        write, read = memory.write_port(), memory.read_port(domain="comb")
        before = Signal(data.ArrayLayout(signed(SUM_BITS), row_lanes))
        after = Signal(data.ArrayLayout(signed(SUM_BITS), row_lanes))
        m.d.comb += [
            read.addr.eq(steps[7].group),
            before.eq(Mux(convolve & ~steps[7].tap_first, read.data, 0)),
            write.addr.eq(steps[7].group),
            write.en.eq(enter[8] & convolve),
            write.data.eq(after),
        ]

        codes = [self._lane(m, lane, enter, steps, is_op, common, before, after) for lane in range(row_lanes)]
        m.d.comb += [
            self.term_valid.eq(move & held[5] & steps[5].term),
            self.term_first.eq(steps[5].term_first),
            self.key_valid.eq(move & held[8] & steps[8].key),
            self.key_first.eq(steps[8].key_first),
            self.key_last.eq(steps[8].pass_last),
            self.key_power.eq(steps[8].power),
        ]

        # ---- words -----------------------------------------------------------------------------------------------
        step, taken = steps[STAGES - 1], Signal()
        low, high = (Signal(8 * config.lanes, name=name, reset_less=True) for name in ("low_bytes", "high_bytes"))
        low_codes = Cat(code[:8] for code in codes)
        high_codes = Mux(step.pair, low_codes, Cat(code[8:] for code in codes))
        upper = step.pair & step.phase[1]  # codes of a pair's upper block
        low_next = Mux(upper, low, Cat(low[8 * row_lanes:], low_codes))
        high_next = Cat(high[8 * row_lanes:], high_codes)
        m.d.comb += [
            self.codes.valid.eq(held[STAGES - 1] & step.block_end),
            move.eq(~self.codes.valid | self.codes.ready),
            taken.eq(move & held[STAGES - 1]),
            self.codes.payload.low.eq(low_next),
            self.codes.payload.high.eq(high_next),
            *(self.codes.payload[name].eq(step[name]) for name in ("pair", "pair_last", "row_end")),
        ]
        with m.If(taken):
            m.d.sync += low.eq(low_next)
            with m.If(~step.pair | upper):
                m.d.sync += high.eq(high_next)
        return m

    def _lane(self, m: Module, lane: int, enter, steps, is_op, common, before, after) -> Value:
        """One lane: 16 bits of result in the last stage."""
        now, given = self.instruction, self.group.payload
        swiglu, add, softmax = is_op[RowOp.SWIGLU], is_op[RowOp.ADD], is_op[RowOp.SOFTMAX]
        looks_up = [swiglu | step.power for step in steps]

        def registers(k: int, condition: Value | int = 1, **values):
            """Stage k of the pipeline, or those of its registers that are needed on `condition`."""
            name = f"lane{lane}_{k}" if isinstance(condition, int) else f"lane{lane}_{k}t"
            return stage(m, enter[k] & condition, name, **values)

        s0 = registers(0, x=given.x[lane], o=given.o[lane], c=given.c[lane], valid=given.valid[lane])

        # ---- 1, 2, 3, 4: sigmoid or power of 2
        magnitude = Mux(s0.x < 0, -s0.x, s0.x)[:NUMBER_BITS]
        scaled = magnitude << now.up[:2]
        argument = Mux(scaled > ARGUMENT_MAX, ARGUMENT_MAX, scaled)[:SIGMOID_FRACTION + 4]
        distance = (self.maximum - s0.x)[:NUMBER_BITS]
        far = distance[8:]
        t1 = registers(1, looks_up[0],
                       index=Mux(swiglu, argument[SIGMOID_STEP_BITS:], Const(SIGMOID_STEPS, 10) | distance[:8]),
                       fraction=Mux(swiglu, argument[:SIGMOID_STEP_BITS],
                                    Mux(far > DISTANCE_MAX, DISTANCE_MAX, far[:5])))
        s1 = registers(1, x=s0.x, o=s0.o, c=s0.c, valid=s0.valid)

        m.submodules[f"table{lane}"] = memory = Memory(shape=TABLE_BITS, depth=len(table()), init=table())
        read = memory.read_port()
        m.d.comb += [read.addr.eq(t1.index), read.en.eq(enter[2] & looks_up[1])]
        t2 = registers(2, looks_up[1], fraction=t1.fraction)
        s2 = registers(2, x=s1.x, o=s1.o, c=s1.c, valid=s1.valid)

        entry, step = read.data[:16], read.data[16:]
        t3 = registers(3, looks_up[2],
                       sigmoid=entry, product=step * t2.fraction,
                       shifted=Cat(Const(0, DISTANCE_MAX), entry) >> t2.fraction[:5])
        s3 = registers(3, x=s2.x, o=s2.o, c=s2.c, valid=s2.valid)

        half = 1 << SIGMOID_STEP_BITS - 1
        sigmoid = 32768 + t3.sigmoid + ((t3.product + half) >> SIGMOID_STEP_BITS)
        quotient, rest = t3.shifted[DISTANCE_MAX:], t3.shifted[:DISTANCE_MAX]
        power = quotient + (rest[-1] & (rest[:-1].any() | quotient[0]))
        doubled = (s3.o << 1).as_signed()
        m4 = Signal(signed(OPERAND_BITS))
        with m.If(swiglu):
            m.d.comb += m4.eq(Mux(s3.x < 0, 65536 - sigmoid, sigmoid))
        with m.Elif(add):
            m.d.comb += m4.eq(65536 >> now.up)
        with m.Else():
            m.d.comb += m4.eq(Mux(steps[3].turned, doubled, s3.x))
        number = Signal(signed(NUMBER_BITS + 1))  # x, or the power that takes its place
        m.d.comb += number.eq(Mux(steps[3].power, Mux(s3.valid, power, 0), s3.x))
        s4 = registers(4, x=number, factor=m4, o=s3.o, c=s3.c, valid=s3.valid)

        # ---- 5, 6: the first product
        s5 = registers(5, product=s4.x * s4.factor, x=s4.x, o=s4.o, c=s4.c, valid=s4.valid)
        m.d.comb += self.terms[lane].eq(Mux(steps[5].power, s5.x, s5.product)[:TERM_BITS])

        rounded = round_half_even(s5.product, ROUND_BITS)[:OPERAND_BITS].as_signed()
        turned, low, high = (Signal(signed(OPERAND_BITS), name=f"lane{lane}_{name}", reset_less=True)
                             for name in ("turned", "turned_low", "turned_high"))
        pair, phase = steps[5].pair, steps[5].phase
        with m.If(enter[6] & pair):
            with m.If(phase == 0):
                m.d.sync += low.eq(rounded)
            with m.If(phase == 1):
                m.d.sync += high.eq(rounded)
        m.d.comb += turned.eq(Mux(phase[1], Mux(phase[0], low, high), rounded))
        a6, b6 = Signal(signed(OPERAND_BITS)), Signal(signed(OPERAND_BITS))
        one = add | is_op[RowOp.ARGMAX] | (is_op[RowOp.QUANTIZE] & ~now.weighted) | (softmax & ~steps[5].power)
        m.d.comb += [
            a6.eq(Mux(pair, turned, Mux(swiglu | add | steps[5].turned, rounded, s5.x))),
            b6.eq(Mux(pair, s5.c, Mux(one, 1, Mux(
                steps[5].beyond, 1 << ROTATION_BITS, Mux(softmax, s5.o.as_unsigned(), s5.o))))),
        ]
        s6 = registers(6, a=a6, b=b6, o=s5.o, valid=s5.valid)

        # ---- 7, 8: the second product, sums
        s7 = registers(7, product=s6.a * s6.b, o=s6.o, valid=s6.valid)
        sum8 = Signal(signed(SUM_BITS), name=f"lane{lane}_sum", reset_less=True)
        base = Mux(steps[7].pair & steps[7].phase[0], sum8, Mux(add, s7.o, before[lane]))
        minus = steps[7].pair & (steps[7].phase == 1)
        m.d.comb += after[lane].eq(base + Mux(minus, -s7.product, s7.product))
        with m.If(enter[8]):
            m.d.sync += sum8.eq(after[lane])
        s8 = registers(8, valid=s7.valid)

        plain = is_op[RowOp.ARGMAX] | (softmax & ~steps[8].power)
        with m.If(plain):
            m.d.comb += self.keys[lane].eq(Mux(s8.valid, Cat(sum8[:15], ~sum8[15]), 0))
        with m.Else():
            m.d.comb += self.keys[lane].eq(Mux(sum8 < 0, -sum8, sum8))

        # ---- 9 .. 12: scaling
        s9 = registers(9, product=(sum8 * common["factor"])[:SCALED_BITS].as_signed())
        odd = (s9.product & common["last_bit"]).any()
        s10 = registers(10, rounded=(s9.product + common["half"] + odd)[:SCALED_BITS].as_signed())
        s11 = registers(11, shifted=s10.rounded >> common["shift"])
        s12 = registers(12, code=Mux(s11.shifted < common["low"], common["low"],
                                     Mux(s11.shifted > common["high"], common["high"], s11.shifted))[:NUMBER_BITS])
        return s12.code
