"""Requantizer against numerics.requantize."""

import numpy as np
import pytest

from tests.kit.streams import Waits, run, simulator
from weft.arch.numerics import ACC_MAX, ACC_MIN, INT16, MAX_COMBINED_SHIFT, MULT_BITS, S8, U8, requantize
from weft.hw.requantize import Requantizer

LANES = 4


def items(seed: int, count: int, all_bounds):
    """Random items of every size, ties and corners among them."""
    rng = np.random.default_rng(seed)
    acc = rng.integers(ACC_MIN, ACC_MAX, (count, LANES), endpoint=True) >> rng.integers(0, 32, (count, LANES))
    mult = rng.integers(0, 1 << MULT_BITS, (count, LANES)) >> rng.integers(0, MULT_BITS, (count, LANES))
    shift = rng.integers(0, MAX_COMBINED_SHIFT, (count, LANES), endpoint=True)
    ties = rng.random((count, LANES)) < 0.3  # a small odd accumulator over a small power of two
    acc[ties] = rng.integers(-100, 100, ties.sum()) * 2 + 1
    mult[ties], shift[ties] = 1 << rng.integers(0, 3, ties.sum()), rng.integers(0, 5, ties.sum())
    corners = [(value, shift) for value in (ACC_MIN, ACC_MAX) for shift in (0, 46, 47, 48, 49, MAX_COMBINED_SHIFT)]
    for index, (acc[index], shift[index]) in enumerate(corners):
        mult[index] = (1 << MULT_BITS) - 1
    bounds = np.array(all_bounds)[rng.integers(0, len(all_bounds), count)]
    return acc, mult, shift, bounds


@pytest.mark.parametrize(("code_bits", "all_bounds"), [
    (8, [S8, U8, (0, 96), (-256, 255)]),
    (16, [S8, U8, INT16, (-1 << 16, (1 << 16) - 1)]),
])
def test_matches_numerics_under_stalls(code_bits, all_bounds):
    acc, mult, shift, bounds = items(1, 400, all_bounds)
    expected = requantize(acc, mult, shift, bounds[:, :1], bounds[:, 1:]) & (1 << code_bits) - 1
    dut = Requantizer(LANES, meta_shape=16, code_bits=code_bits)
    results = []

    async def drive(ctx):
        pause, gap = Waits(2), Waits(3)
        index = 0
        while len(results) < len(acc):
            moving, valid = not pause.now(), index < len(acc) and not gap.now()
            ctx.set(dut.enable, moving)
            ctx.set(dut.i_valid, valid)
            if valid:
                ctx.set(dut.i_acc, acc[index].tolist())
                ctx.set(dut.i_mult, mult[index].tolist())
                ctx.set(dut.i_shift, shift[index].tolist())
                ctx.set(dut.i_low, int(bounds[index, 0]))
                ctx.set(dut.i_high, int(bounds[index, 1]))
                ctx.set(dut.i_meta, index)
            if moving and ctx.get(dut.o_valid):
                results.append((ctx.get(dut.o_meta), [ctx.get(dut.o_code[lane]) for lane in range(LANES)]))
            await ctx.tick()
            index += moving and valid

    sim = simulator(dut)
    sim.add_testbench(drive)
    run(sim)
    assert results == list(enumerate(expected.tolist()))


def test_latency_and_throughput():
    dut = Requantizer(1, meta_shape=8)
    seen = []

    async def drive(ctx):
        for cycle in range(20):
            ctx.set(dut.i_valid, cycle < 10)
            ctx.set(dut.i_meta, cycle)
            if ctx.get(dut.o_valid):
                seen.append((cycle, ctx.get(dut.o_meta)))
            await ctx.tick()

    sim = simulator(dut)
    sim.add_testbench(drive)
    run(sim)
    assert seen == [(item + Requantizer.LATENCY, item) for item in range(10)]
