"""What is computed once for a row: the factor of its codes, and its scale."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from weft.arch.isa import RowLayout, RowOp
from weft.arch.numerics import CODE_PEAK, MAX_COMBINED_SHIFT, PROBABILITY_PEAK, SCALE_POINT
from weft.hw.row_arithmetic import MAX_SHIFT
from weft.hw.row_layouts import (
    FACTOR_BITS,
    FACTOR_SHIFT_BITS,
    FACTOR_TIME,
    FIELDS,
    KEY_BITS,
    PARAMETER,
    SCALE,
    SUM_BITS,
)

QUOTIENT_BITS = 16
ROOT_BITS = 31
EXPONENT = signed(10)


class Root(wiring.Component):
    """numerics.normalized_root, a bit per cycle.

    Driven by: `start` with `x` (1 .. 2**48 - 1). `done` is high from some time later until the next start, with
    `mantissa` and `bits`. Latency: 5 + ROOT_BITS + 1 cycles.
    """

    def __init__(self) -> None:
        super().__init__({
            "start": In(1),
            "x": In(SUM_BITS),
            "done": Out(1),
            "mantissa": Out(KEY_BITS),
            "bits": Out(6),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        radicand, rest, root = Signal(2 * ROOT_BITS), Signal(ROOT_BITS + 2), Signal(ROOT_BITS)
        half, count = Signal(6), Signal(range(ROOT_BITS + 1))
        steps = (16, 8, 4, 2, 1)  # pairs of leading zeros
        m.d.comb += [self.mantissa.eq(root << 1), self.bits.eq(ROOT_BITS - half)]
        with m.FSM():
            with m.State("idle"), m.If(self.start):
                m.d.sync += [radicand.eq(self.x), rest.eq(0), root.eq(0), half.eq(0), count.eq(0), self.done.eq(0)]
                m.next = "normalize"
            with m.State("normalize"):
                m.d.sync += count.eq(count + 1)
                with m.Switch(count):
                    for i, step in enumerate(steps):
                        with m.Case(i), m.If(radicand[-2 * step:] == 0):
                            m.d.sync += [radicand.eq(radicand << 2 * step), half.eq(half + step)]
                with m.If(count == len(steps) - 1):
                    m.d.sync += count.eq(0)
                    m.next = "root"
            with m.State("root"):
                tried, subtrahend = Cat(radicand[-2:], rest)[:ROOT_BITS + 2], Cat(Const(1, 2), root)
                fits = tried >= subtrahend
                m.d.sync += [
                    rest.eq(Mux(fits, tried - subtrahend, tried)),
                    root.eq(Cat(fits, root)),
                    radicand.eq(radicand << 2),
                    count.eq(count + 1),
                ]
                with m.If(count == ROOT_BITS - 1):
                    m.d.sync += self.done.eq(1)
                    m.next = "idle"
        return m


class RowScalars(wiring.Component):
    """Division, root and product of scales for one row at a time.

    Driven by: `instruction`, steady. After `start`, a pulse, with `magnitude` and `total` (steady until `ready_soon`),
    it finds the factor of numerics.quantize_row, then the scale of the row, offered on `scale`; with
    RowLayout.VALUES the magnitude alone. After `parameter_valid` it makes the factor of EXPAND of `parameter`, steady
    then. A start may come while the row before is in work.

    `factor` / 2**`shift` are good from FACTOR_TIME + 1 cycles after a pulse on `ready_soon` until those of the next
    row. The shift is at most row_arithmetic.MAX_SHIFT.

    Latency from start: 14 cycles to `ready_soon`; to the scale 42 (QUANTIZE), 47 (SOFTMAX), 57 (with a root); to the
    magnitude alone 24. From `parameter_valid`: 3 cycles to `ready_soon`.
    """

    def __init__(self) -> None:
        super().__init__({
            "instruction": In(FIELDS),
            "start": In(1),
            "magnitude": In(KEY_BITS),
            "total": In(SUM_BITS),
            "parameter_valid": In(1),
            "parameter": In(PARAMETER),
            "ready_soon": Out(1),
            "factor": Out(FACTOR_BITS),
            "shift": Out(FACTOR_SHIFT_BITS),
            "scale": Out(stream.Signature(SCALE)),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        now = self.instruction
        m.submodules.root = root = Root()
        softmax, expand = now.operation == RowOp.SOFTMAX, now.operation == RowOp.EXPAND
        rooted = ~softmax & now.normalize

        pending = Signal()
        with m.If(self.start):
            m.d.sync += pending.eq(1)
        value, bits = Signal(KEY_BITS), Signal(6)  # normalized: the divisor
        above, above_bits = Signal(KEY_BITS), Signal(6)  # the dividend
        total, magnitude = Signal(KEY_BITS), Signal(16)
        second = Signal()  # division: for the scale
        rest, quotient, exponent = Signal(KEY_BITS), Signal(QUOTIENT_BITS), Signal(EXPONENT)
        count = Signal(range(QUOTIENT_BITS))
        product = Signal(2 * QUOTIENT_BITS)
        steps = (16, 8, 4, 2, 1)
        m.d.comb += root.x.eq(self.total + now.constant)

        with m.FSM():
            with m.State("idle"):
                m.d.sync += [second.eq(0), count.eq(0), bits.eq(32)]
                with m.If(self.parameter_valid & expand):
                    m.d.sync += [second.eq(1), quotient.eq(self.parameter.mult), exponent.eq(self.parameter.shift)]
                    m.next = "combine"
                with m.Elif(pending):
                    m.d.comb += root.start.eq(rooted)
                    m.d.sync += [
                        pending.eq(self.start),
                        value.eq(Mux(self.magnitude == 0, 1, self.magnitude)),
                        magnitude.eq(Mux(self.magnitude == 0, 1, self.magnitude)),
                        total.eq(self.total),
                        above.eq(Mux(softmax, PROBABILITY_PEAK << 24, CODE_PEAK << 25)),
                        above_bits.eq(Mux(softmax, PROBABILITY_PEAK.bit_length(), CODE_PEAK.bit_length())),
                    ]
                    m.next = "normalize"
            with m.State("normalize"):
                m.d.sync += count.eq(count + 1)
                with m.Switch(count):
                    for i, step in enumerate(steps):
                        with m.Case(i), m.If(value[-step:] == 0):
                            m.d.sync += [value.eq(value << step), bits.eq(bits - step)]
                with m.If(count == len(steps) - 1):
                    m.next = "compare"
            with m.State("compare"):  # the first bit of the quotient is 1
                small = above < value
                m.d.sync += [
                    rest.eq(Mux(small, above << 1, above) - value),
                    exponent.eq(31 + small - above_bits + bits),
                    quotient.eq(1),
                    count.eq(1),
                ]
                m.next = "divide"
            with m.State("divide"):
                twice = rest << 1
                fits = twice >= value
                m.d.sync += [
                    rest.eq(Mux(fits, twice - value, twice)),
                    quotient.eq(Cat(fits, quotient)),
                    count.eq(count + 1),
                ]
                m.d.comb += self.ready_soon.eq(~second & (count == QUOTIENT_BITS - FACTOR_TIME))
                with m.If(count == QUOTIENT_BITS - 1):
                    m.next = "factor"
                    with m.If(second):
                        m.next = "combine"
            with m.State("factor"):
                m.d.sync += [
                    self.factor.eq(quotient), self.shift.eq(exponent - SCALE_POINT),
                    above.eq(value), above_bits.eq(bits),
                    value.eq(Mux(softmax, total, 1 << 31)), bits.eq(Mux(softmax, 32, 1)),
                    second.eq(1), count.eq(0),
                ]
                with m.If(now.layout == RowLayout.VALUES):
                    m.next = "offer"
                with m.Elif(softmax):
                    m.next = "normalize"
                with m.Elif(rooted):
                    m.next = "root"
                with m.Else():
                    m.next = "compare"
            with m.State("root"):
                m.d.sync += [value.eq(root.mantissa), bits.eq(root.bits)]
                with m.If(root.done):
                    m.next = "compare"
            with m.State("combine"):
                m.d.sync += [product.eq(quotient * now.mult), exponent.eq(exponent + now.shift - 15)]
                m.next = "cut"
            with m.State("cut"):
                large = product[-1]
                m.d.sync += [
                    quotient.eq(Mux(large, product[16:], product[15:])),
                    exponent.eq(exponent - large),
                ]
                m.next = "offer"
                with m.If(expand):
                    m.next = "expand"
            with m.State("expand"):
                m.d.comb += self.ready_soon.eq(1)
                m.d.sync += [
                    self.factor.eq(quotient),
                    self.shift.eq(Mux(exponent < 0, 0, Mux(exponent > MAX_SHIFT, MAX_SHIFT, exponent))),
                ]
                m.next = "idle"
            with m.State("offer"):
                m.d.comb += self.scale.valid.eq(1)
                with m.If(self.scale.ready):
                    m.next = "idle"

        m.d.comb += [
            self.scale.payload.mult.eq(quotient),
            self.scale.payload.shift.eq(
                Mux(exponent < 0, 0, Mux(exponent > MAX_COMBINED_SHIFT, MAX_COMBINED_SHIFT, exponent))),
            self.scale.payload.magnitude.eq(magnitude),
        ]
        return m
