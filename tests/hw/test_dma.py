"""Load and store unit behind their AXI channels, against the loops of the instruction set written in Python."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.sim import Simulator

from tests.kit.axi import AXIMemory
from tests.kit.memory import Memory
from tests.kit.streams import NONE, Waits, put, run, simulator
from weft.arch.config import EngineConfig, load_config
from weft.arch.isa import Load, Store
from weft.arch.registers import SEGMENTS
from weft.hw.axi import AXI4
from weft.hw.dma import LoadUnit, MemoryPort, StoreUnit
from weft.hw.interfaces import ReadPort, UnitPort, WritePort
from weft.hw.layouts import layout_of

BASE, TEST = load_config("base"), load_config("test")
SIZE = 1 << 16
SEGMENT = [4096 * i + 64 * (i % 2) for i in range(SEGMENTS)]


class Transfers(wiring.Component):
    """Both units and both channels, without soft reset."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        super().__init__({
            "load": In(UnitPort(Load)),
            "store": In(UnitPort(Store)),
            "read": Out(ReadPort(config)),
            "write": Out(WritePort(config)),
            "stop": In(1),
            "idle": Out(1),
            "bus": Out(AXI4(config.bus_bytes, config.address_bits)),
            "error": Out(2),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.load = load = LoadUnit(self._config)
        m.submodules.store = store = StoreUnit(self._config)
        m.submodules.memory = memory = MemoryPort(self._config)
        connect(m, flipped(self.load), load.unit)
        connect(m, flipped(self.store), store.unit)
        connect(m, load.write, flipped(self.write))
        connect(m, store.read, flipped(self.read))
        connect(m, load.memory, memory.load)
        connect(m, store.memory, memory.store)
        connect(m, memory.bus, flipped(self.bus))
        m.d.comb += [
            self.error.eq(load.error | store.error << 1),
            memory.stop.eq(self.stop),
            self.idle.eq(memory.idle),
            *(unit.segments[i].eq(SEGMENT[i]) for unit in (load, store) for i in range(SEGMENTS)),
        ]
        return m


def bench(config: EngineConfig, waits: Waits = NONE, **options) -> tuple[Transfers, Simulator, Memory, AXIMemory]:
    dut = Transfers(config)
    sim, pool, memory = simulator(dut), Memory(config, seed=2), AXIMemory(config, SIZE, waits=waits, **options)
    sim.add_testbench(pool.serve(reads=[dut.read], writes=[dut.write], waits=waits), background=True)
    sim.add_testbench(memory.serve(dut.bus), background=True)
    return dut, sim, pool, memory


def driver(port, instructions, waits: Waits = NONE, done: list[int] | None = None):
    """Testbench that feeds a unit, and one that waits for as many done pulses."""
    async def feed(ctx) -> None:
        for instruction in instructions:
            await waits(ctx)
            layout = layout_of(type(instruction))
            await put(ctx, port.instruction, layout.from_bits(int.from_bytes(instruction.encode(), "little")))

    async def finish(ctx) -> None:
        cycle, seen = 0, 0
        while seen < len(instructions):
            _, _, pulse, illegal = await ctx.tick().sample(port.done, port.illegal)
            assert not illegal
            cycle, seen = cycle + 1, seen + pulse
            if pulse and done is not None:
                done.append(cycle)

    return feed, finish


def words_of(config: EngineConfig, item: Load):
    """(scratchpad word, memory byte) of each word moved, in order."""
    for plane in range(item.planes):
        for row in range(item.rows):
            for word in range(item.run):
                yield ((item.address + plane * item.plane_words + row * item.row_words + word) & 0xFFFF,
                       (SEGMENT[item.base] + item.offset + plane * item.plane_bytes + row * item.row_bytes
                        + word * config.word_bytes) % (1 << config.address_bits))


def random_transfer(rng: random.Random, cls: type[Load], config: EngineConfig, region: int, **extra) -> Load:
    """Any shape, in the region-th 6 KB of memory and the region-th 256 words of the pool."""
    word, base = config.word_bytes, rng.randrange(SEGMENTS)
    run, rows, planes = rng.randint(1, 24), rng.randint(1, 3), rng.randint(1, 2)
    row = run + rng.choice([0, 0, 1, 5])
    offset = 6144 * region + word * rng.randrange(16) - SEGMENT[base]
    return cls(tag=rng.randrange(1 << 16), base=base, offset=offset % (1 << 32), row_bytes=row * word,
               plane_bytes=(rows * row + rng.choice([0, 3])) * word, address=256 * region + rng.randrange(8), run=run,
               rows=rows, planes=planes, row_words=run + rng.choice([0, 3]), plane_words=rows * (run + 3), **extra)


WIDE = dataclasses.replace(TEST, name="wide", bus_bytes=32, burst_beats=16)
PACES = [(TEST, 0.4), (BASE, 0.0), (BASE, 0.4), (WIDE, 0.4)]
paces = pytest.mark.parametrize("config, chance", PACES, ids=lambda value: getattr(value, "name", value))


@paces
def test_load_moves_every_word_in_order(config, chance):
    rng = random.Random(1)
    instructions = [random_transfer(rng, Load, config, region) for region in range(1, 7)]
    dut, sim, pool, memory = bench(config, Waits(5, chance), latency=7)
    for testbench in driver(dut.load, instructions, Waits(6, chance)):
        sim.add_testbench(testbench)
    run(sim)
    expected = [(where, memory.bytes[source:source + config.word_bytes].tobytes(), (1 << config.lanes) - 1, item.tag)
                for item in instructions for where, source in words_of(config, item)]
    assert [entry[1:] for entry in pool.log] == expected


@paces
def test_store_changes_the_bytes_of_its_rotated_mask_only(config, chance):
    rng = random.Random(2)
    masks = [(1 << config.lanes) - 1, 0, *(rng.getrandbits(config.lanes) for _ in range(4))]
    instructions = [random_transfer(rng, Store, config, region, mask=mask, rotate=rng.randrange(config.lanes))
                    for region, mask in enumerate(masks, 1)]
    dut, sim, pool, memory = bench(config, Waits(7, chance), latency=7)
    expected = memory.bytes.copy()
    for item in instructions:
        lanes = np.roll(np.array([item.mask >> lane & 1 for lane in range(config.lanes)], bool), item.rotate)
        for source, where in words_of(config, item):
            expected[where:where + config.word_bytes][lanes] = pool.words[source][lanes]
    for testbench in driver(dut.store, instructions, Waits(8, chance)):
        sim.add_testbench(testbench)
    run(sim)
    assert (memory.bytes == expected).all()


def test_runs_that_touch_in_memory_become_long_bursts():
    dut, sim, _, memory = bench(BASE)
    rows = Load(base=0, address=0, run=2, rows=32, planes=1, row_words=3, row_bytes=2 * BASE.word_bytes)
    for testbench in driver(dut.load, [rows]):
        sim.add_testbench(testbench)
    run(sim)
    assert [burst.beats for burst in memory.bursts] == [BASE.burst_beats] * (2 * 32 * BASE.word_bytes // 256)


@pytest.mark.parametrize("cls", [Load, Store])
def test_illegal_fields_are_refused_without_work(cls):
    dut, sim, pool, memory = bench(TEST)
    port = dut.load if cls is Load else dut.store
    fields = [{"run": 0}, {"rows": 0}, {"planes": 0}, {"base": SEGMENTS}, {"offset": 16}, {"row_bytes": 8},
              {"plane_bytes": 1}, *([{"rotate": TEST.lanes}, {"rotate": 127}] if cls is Store else [])]

    async def testbench(ctx) -> None:
        for wrong in fields:
            instruction = cls(**({"run": 4, "rows": 1, "planes": 1} | wrong))
            await put(ctx, port.instruction, layout_of(cls).from_bits(int.from_bytes(instruction.encode(), "little")))
            assert ctx.get(port.illegal), wrong
            for _ in range(12):
                *_, done, illegal = await ctx.tick().sample(port.done, port.illegal)
                assert not done
            assert not illegal and not memory.bursts and not pool.reads

    sim.add_testbench(testbench)
    run(sim)


@pytest.mark.parametrize("cls, bit", [(Load, 1), (Store, 2)])
def test_error_responses_are_reported(cls, bit):
    dut, sim, _, _ = bench(TEST, failing=lambda address: address >= SEGMENT[2])
    good, bad = (cls(base=base, run=4, rows=1, planes=1) for base in (1, 2))
    port = dut.load if cls is Load else dut.store
    for testbench in driver(port, [good, bad]):
        sim.add_testbench(testbench)
    seen: list[int] = []

    async def watch(ctx) -> None:
        async for *_, error in ctx.tick().sample(dut.error):
            seen.append(error)

    async def settle(ctx) -> None:
        await ctx.tick().repeat(200)

    sim.add_testbench(watch, background=True)
    sim.add_testbench(settle)
    run(sim)
    per_word = TEST.word_bytes // TEST.bus_bytes
    assert sum(seen) == bit * (4 * per_word if cls is Load else 4 * per_word // TEST.burst_beats)


def efficiency(config: EngineConfig, instructions, port: str, rate: float, latency: int = 40) -> float:
    """Bytes moved per cycle over what the port could move, from the first to the last instruction's end."""
    dut, sim, _, _ = bench(config, latency=latency, rate=rate)
    ends: list[int] = []
    for testbench in driver(getattr(dut, port), instructions, done=ends):
        sim.add_testbench(testbench)
    run(sim)
    moved = sum(item.run * item.rows * item.planes * config.word_bytes for item in instructions)
    return moved / ends[-1] / rate


def test_load_throughput_at_latency_40():
    long = [Load(run=256, rows=1, planes=1) for _ in range(3)]
    rows = [Load(run=28, rows=9, planes=1, row_words=30, row_bytes=28 * 32) for _ in range(3)]
    figures = {name: efficiency(BASE, items, "load", 14.5) for name, items in {"long": long, "rows": rows}.items()}
    print(figures)
    assert min(figures.values()) >= 0.95


def test_store_throughput_at_latency_40():
    figure = efficiency(BASE, [Store(run=256, rows=1, planes=1, mask=(1 << 32) - 1) for _ in range(3)], "store", 16)
    print(figure)
    assert figure >= 0.9


@pytest.mark.parametrize("moment", range(5, 60, 13))
def test_stop_drains_the_bus(moment):
    """Stopped at any time, the channels finish their bursts, begin none, and change no further byte."""
    dut, sim, _, memory = bench(TEST, Waits(moment, 0.3), latency=5)
    sim.add_testbench(driver(dut.load, [Load(run=60, rows=1, planes=1)])[0])
    sim.add_testbench(driver(dut.store, [Store(base=4, run=60, rows=1, planes=1, mask=(1 << TEST.lanes) - 1)])[0])

    async def stop(ctx) -> None:
        await ctx.tick().repeat(moment)
        ctx.set(dut.stop, 1)
        await ctx.tick().repeat(40)  # what stood on the channels has moved
        bursts, before = len(memory.bursts), memory.bytes.copy()
        await ctx.tick().repeat(200)
        assert ctx.get(dut.idle) and len(memory.bursts) == bursts and (memory.bytes == before).all()

    sim.add_testbench(stop)
    run(sim)
