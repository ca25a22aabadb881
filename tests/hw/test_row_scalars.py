"""Division, root and product of scales against arch/numerics.py."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kit.streams import Waits, run, simulator
from weft.arch import numerics
from weft.arch.isa import Row, RowLayout, RowOp
from weft.hw.row_layouts import FACTOR_TIME, FIELDS
from weft.hw.row_scalars import RowScalars

READY_SOON = 14  # cycles after start
OFFERED = {"values": 24, "plain": 42, "softmax": 47, "root": 57}


def sizes(rng: np.random.Generator, bits: int, count: int) -> list[int]:
    """Positive integers of every size up to `bits` bits, powers of 2 and their neighbours among them."""
    some = [int(rng.integers(1 << 62)) % (1 << int(rng.integers(1, bits + 1))) for _ in range(count)]
    edges = [1 << int(bit) for bit in rng.integers(1, bits, 5)]
    return [max(1, value) for value in (*some, *edges, *(edge - 1 for edge in edges), (1 << bits) - 1, 1)]


def expected(item: Row, magnitude: int, total: int):
    """Factor, shift and scale."""
    magnitude = np.int64(max(magnitude, 1))
    softmax = item.operation == RowOp.SOFTMAX
    peak = numerics.PROBABILITY_PEAK if softmax else numerics.CODE_PEAK
    factor, shift = numerics.ratio_scale(np.int64(peak), *numerics.normalize(magnitude))
    if softmax:
        divisor = numerics.normalize(np.int64(total))
    elif item.normalize:
        divisor = numerics.normalized_root(np.int64(total + item.constant))
    else:
        divisor = numerics.normalize(np.int64(1))
    scale = numerics.combine_scales(*numerics.ratio_scale(magnitude, *divisor), item.mult, item.shift)
    return int(factor), int(shift) - numerics.SCALE_POINT, tuple(int(part) for part in scale)


def set_instruction(ctx, dut: RowScalars, item: Row) -> None:
    ctx.set(dut.instruction, FIELDS.from_bits(int.from_bytes(item.encode(), "little")))


@pytest.mark.parametrize("name", OFFERED)
def test_rows(name):
    rng = np.random.default_rng(3)
    item = Row(operation=RowOp.SOFTMAX if name == "softmax" else RowOp.QUANTIZE, normalize=int(name == "root"),
               layout=RowLayout.VALUES if name == "values" else RowLayout.PLAIN, constant=1)
    magnitudes = [*sizes(rng, 32, 20), 0]
    totals = [total - item.normalize for total in sizes(rng, 32 if name == "softmax" else 48, 20)]
    dut = RowScalars()
    sim = simulator(dut)

    async def drive(ctx):
        for magnitude, total in zip(magnitudes, totals, strict=False):
            mult, shift = int(rng.integers(1 << 16)), int(rng.integers(63))
            row = Row(**{**vars(item), "mult": mult, "shift": shift})
            set_instruction(ctx, dut, row)
            ctx.set(dut.magnitude, magnitude)
            ctx.set(dut.total, total)
            ctx.set(dut.start, 1)
            await ctx.tick()
            ctx.set(dut.start, 0)
            factor, factor_shift, scale = expected(row, magnitude, total)
            cycle, ready = 1, None
            while not ctx.get(dut.scale.valid):
                if ctx.get(dut.ready_soon):
                    assert ready is None
                    ready = cycle
                if ready is not None and cycle == ready + FACTOR_TIME + 1:
                    assert (ctx.get(dut.factor), ctx.get(dut.shift)) == (factor, factor_shift)
                await ctx.tick()
                cycle += 1
            assert (ready, cycle) == (READY_SOON, OFFERED[name])
            given = ctx.get(dut.scale.payload)
            assert given.magnitude == max(magnitude, 1) & 0xFFFF
            if name != "values":
                assert (given.mult, given.shift) == scale
            ctx.set(dut.scale.ready, 1)
            await ctx.tick()
            ctx.set(dut.scale.ready, 0)

    sim.add_testbench(drive)
    run(sim)


def test_next_row_while_the_scale_waits():
    """A row that ends early keeps its turn."""
    dut = RowScalars()
    sim = simulator(dut)
    item, magnitudes = Row(operation=RowOp.QUANTIZE, mult=1 << 15, shift=15), (5, 70000, 31)
    scales = []

    async def rows(ctx):
        set_instruction(ctx, dut, item)
        for magnitude in magnitudes:
            ctx.set(dut.magnitude, magnitude)
            ctx.set(dut.start, 1)
            await ctx.tick()
            ctx.set(dut.start, 0)
            await ctx.tick().until(dut.ready_soon)

    async def take(ctx):
        pause = Waits(2, chance=0.98)
        while len(scales) < len(magnitudes):
            await pause(ctx)
            ctx.set(dut.scale.ready, 1)
            *_, valid, scale = await ctx.tick().sample(dut.scale.valid, dut.scale.payload)
            ctx.set(dut.scale.ready, 0)
            scales.extend([(scale.mult, scale.shift)] * valid)

    sim.add_testbench(rows)
    sim.add_testbench(take)
    run(sim)
    assert scales == [expected(item, magnitude, 0)[2] for magnitude in magnitudes]


def test_scale_of_a_column():
    """EXPAND: the product of two scales, at once."""
    rng = np.random.default_rng(4)
    dut = RowScalars()
    sim = simulator(dut)

    async def drive(ctx):
        for _ in range(40):
            mult, other_mult = (int(rng.integers(1 << 16)) >> int(rng.integers(16)) for _ in range(2))
            shift, other_shift = int(rng.integers(63)), int(rng.integers(63))
            set_instruction(ctx, dut, Row(operation=RowOp.EXPAND, mult=mult, shift=shift))
            ctx.set(dut.parameter, {"mult": other_mult, "shift": other_shift})
            ctx.set(dut.parameter_valid, 1)
            await ctx.tick()
            ctx.set(dut.parameter_valid, 0)
            await ctx.tick().until(dut.ready_soon)
            product, total = numerics.combine_scales(
                np.int64(other_mult), np.int64(other_shift), np.int64(mult), np.int64(shift))
            assert (ctx.get(dut.factor), ctx.get(dut.shift)) == (product, min(total, 48))  # 48 makes 0 of every weight

    sim.add_testbench(drive)
    run(sim)
