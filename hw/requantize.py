"""Accumulator to activation code, one vector of lanes per cycle."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from weft.arch.numerics import ACC_BITS, MULT_BITS, SHIFT_BITS
from weft.hw.stream import delay_line

PRODUCT_BITS = ACC_BITS + MULT_BITS


class Requantizer(wiring.Component):
    """`lanes` times numerics.requantize, pipelined: clamp(round_half_even(acc * mult / 2**shift), low, high).

    Driven by: `i_valid` with `i_acc`, `i_mult`, `i_shift` of every lane, one `i_low` and `i_high` for all, and
    `i_meta`, which passes through untouched (any shape; None: no bits). All of them move with the item, so
    each may change in any cycle. In a cycle with `enable` low nothing moves and no item is taken.

    Latency: LATENCY cycles with `enable` high. Throughput: one item per cycle.

    Assumes shift <= 63 (upper bits are ignored; 48 and more make 0 of anything) and bounds in the range of
    `code_bits` + 1 bits, low <= high. `o_code` is the low `code_bits` of the code: signed or unsigned, as the
    bounds make it.
    """

    LATENCY = 5

    def __init__(self, lanes: int, meta_shape=None, code_bits: int = 8) -> None:
        self.lanes, self.code_bits = lanes, code_bits
        meta_shape = unsigned(0) if meta_shape is None else meta_shape
        super().__init__({
            "enable": In(1, init=1),
            "i_valid": In(1),
            "i_acc": In(data.ArrayLayout(signed(ACC_BITS), lanes)),
            "i_mult": In(data.ArrayLayout(MULT_BITS, lanes)),
            "i_shift": In(data.ArrayLayout(8, lanes)),
            "i_low": In(signed(code_bits + 1)),
            "i_high": In(signed(code_bits + 1)),
            "i_meta": In(meta_shape),
            "o_valid": Out(1),
            "o_code": Out(data.ArrayLayout(code_bits, lanes)),
            "o_meta": Out(meta_shape),
        })

    def elaborate(self, platform):
        m = Module()
        with m.If(self.enable):
            valid = delay_line(m, self.i_valid, self.LATENCY)[-1]
            meta = delay_line(m, self.i_meta, self.LATENCY, reset_less=True)[-1]
            low, high = (delay_line(m, bound, self.LATENCY - 1, reset_less=True)[-1]
                         for bound in (self.i_low, self.i_high))
            codes = [self._lane(m, lane, low, high) for lane in range(self.lanes)]
        m.d.comb += [self.o_valid.eq(valid), self.o_meta.eq(meta)]
        m.d.comb += [self.o_code[lane].eq(code) for lane, code in enumerate(codes)]
        return m

    def _lane(self, m: Module, lane: int, low, high):
        """Code of one lane, LATENCY stages behind the inputs; `low` and `high` one stage less."""
        def register(shape, name: str) -> Signal:
            return Signal(shape, name=f"{name}{lane}", reset_less=True)

        acc, mult = register(signed(ACC_BITS), "acc"), register(MULT_BITS, "mult")
        product = register(signed(PRODUCT_BITS), "product")
        rounded = register(signed(PRODUCT_BITS + 1), "rounded")  # product plus nearly half an output step
        shifted = register(signed(PRODUCT_BITS + 1), "shifted")
        code = register(self.code_bits, "code")
        shift = delay_line(m, self.i_shift[lane][:SHIFT_BITS], 3, reset_less=True)

        ones = ((1 << shift[2]) - 1)[:PRODUCT_BITS]
        odd = (product >> shift[2])[0] & ones[0]  # numerics.round_shift explains the sum
        m.d.sync += [
            acc.eq(self.i_acc[lane]),
            mult.eq(self.i_mult[lane]),
            product.eq(acc * mult),
            rounded.eq(product + ones[1:] + odd),
            shifted.eq(rounded >> shift[3]),
            code.eq(Mux(shifted < low, low, Mux(shifted > high, high, shifted))),
        ]
        return code
