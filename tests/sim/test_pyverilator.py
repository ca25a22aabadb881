"""A unit of the engine driven through PyVerilator."""

import numpy as np
from amaranth.back import verilog

from weft.arch import numerics
from weft.hw.requantize import Requantizer
from weft.sim import pyverilator_shim

ITEMS = 200


def test_requantizer_equals_numerics():
    dut = pyverilator_shim.build(verilog.convert(Requantizer(1), name="requantizer"), "requantizer")
    random = np.random.default_rng(5)
    accumulators = random.integers(numerics.ACC_MIN, numerics.ACC_MAX, ITEMS, endpoint=True)
    accumulators >>= random.integers(0, 31, ITEMS)  # small ones, too
    multipliers = random.integers(0, 1 << numerics.MULT_BITS, ITEMS)
    shifts = random.integers(0, numerics.MAX_SHIFT, ITEMS, endpoint=True)
    io, codes = dut.io, []
    io.enable, io.i_valid, io.i_low, io.i_high = 1, 1, numerics.S8[0] & 511, numerics.S8[1]
    for item in range(ITEMS + Requantizer.LATENCY):
        valid = item < ITEMS
        io.i_valid = int(valid)
        if valid:
            io.i_acc, io.i_mult = int(accumulators[item]) & 0xFFFF_FFFF, int(multipliers[item])
            io.i_shift = int(shifts[item])
        dut.clock.tick()
        if io.o_valid:
            codes.append(int(io.o_code))
    expected = numerics.requantize(accumulators, multipliers, shifts, *numerics.S8)
    np.testing.assert_array_equal(np.array(codes, np.uint8).view(np.int8), expected)
