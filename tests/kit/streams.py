"""Both ends of a stream, as testbenches for Amaranth's simulator.

    sim.add_testbench(source(dut.i, values, Waits(1)))
    sim.add_testbench(sink(dut.o, len(values), results := [], Waits(2)))
    run(sim)                         # a clock, a time-out, all testbenches to their end
    assert results == expected
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from amaranth.sim import Simulator


class Waits:
    """Random pauses: `await waits(ctx)` lets 0 or more cycles pass, each with probability `chance`."""

    def __init__(self, seed: int = 0, chance: float = 0.3) -> None:
        self.random, self.chance = random.Random(seed), chance

    def now(self) -> bool:
        """Whether to pause in this cycle."""
        return self.random.random() < self.chance

    async def __call__(self, ctx) -> None:
        while self.now():
            await ctx.tick()


NONE = Waits(chance=0.0)


async def put(ctx, stream, value) -> None:
    """Offer one item until it is taken. Returns in the cycle after."""
    ctx.set(stream.payload, value)
    ctx.set(stream.valid, 1)
    await ctx.tick().until(stream.ready)
    ctx.set(stream.valid, 0)


async def get(ctx, stream):
    """Take one item. Returns it, in the cycle after."""
    ctx.set(stream.ready, 1)
    (value,) = await ctx.tick().sample(stream.payload).until(stream.valid)
    ctx.set(stream.ready, 0)
    return value


def source(stream, values: Iterable, waits: Waits = NONE):
    """Testbench that puts all `values`, pausing between them."""

    async def bench(ctx) -> None:
        for value in values:
            await waits(ctx)
            await put(ctx, stream, value)

    return bench


def sink(stream, count: int, values: list, waits: Waits = NONE):
    """Testbench that takes `count` items into `values`, pausing between them."""

    async def bench(ctx) -> None:
        while len(values) < count:
            await waits(ctx)
            values.append(await get(ctx, stream))

    return bench


def count_cycles(counts: dict[str, int], **signals):
    """Background testbench that counts into `counts` the cycles in which each of `signals` is high."""
    counts.update(dict.fromkeys(signals, 0))

    async def bench(ctx) -> None:
        while True:
            levels = (await ctx.tick().sample(*signals.values()))[2:]
            for name, level in zip(signals, levels, strict=True):
                counts[name] += bool(level)

    return bench


def simulator(dut) -> Simulator:
    """A simulator of `dut` with its clock."""
    sim = Simulator(dut)
    sim.add_clock(1e-8)
    return sim


class Timeout(AssertionError):
    """The testbenches did not end in time."""


def run(sim: Simulator, cycles: int = 20_000) -> None:
    """Run until every foreground testbench has ended; Timeout after `cycles` cycles of the clock of `simulator`."""

    async def watchdog(ctx) -> None:
        for _ in range(cycles):  # no async generator in a background bench: it could not be closed at the end
            await ctx.tick()
        raise Timeout(f"still running after {cycles} cycles")

    sim.add_testbench(watchdog, background=True)
    sim.run()
