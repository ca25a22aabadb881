"""Instruction fetch, jumps and reads of words, behind the read channel."""

from __future__ import annotations

import dataclasses
import random

import pytest
from amaranth.hdl import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from tests.kit.axi import AXIMemory
from tests.kit.streams import NONE, Waits, get, put, run, simulator, sink
from weft.arch.config import EngineConfig, load_config
from weft.arch.isa import INSTRUCTION_BYTES
from weft.arch.registers import SEGMENTS
from weft.hw.axi import AXI4
from weft.hw.dma import MemoryPort
from weft.hw.fetch import LENGTH_BITS, PLACE, VALUE_BITS, Fetch
from weft.hw.layouts import INSTRUCTION_BITS

TEST = load_config("test")
SIZE = 1 << 14
SEGMENT_STEP = 1024 + 4


class FetchFromMemory(wiring.Component):
    def __init__(self, config: EngineConfig, address: int, length: int) -> None:
        self._config, self._address, self._length = config, address, length
        super().__init__({
            "instruction": Out(stream.Signature(INSTRUCTION_BITS)),
            "jump": In(1),
            "destination": In(LENGTH_BITS),
            "read": In(stream.Signature(PLACE)),
            "answer": Out(stream.Signature(VALUE_BITS, always_ready=True)),
            "error": Out(1),
            "stop": In(1),
            "idle": Out(1),
            "bus": Out(AXI4(config.bus_bytes, config.address_bits)),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.fetch = fetch = Fetch(self._config)
        m.submodules.memory = memory = MemoryPort(self._config)
        connect(m, fetch.memory, memory.fetch)
        connect(m, fetch.instruction, flipped(self.instruction))
        connect(m, flipped(self.read), fetch.read)
        connect(m, fetch.answer, flipped(self.answer))
        connect(m, memory.bus, flipped(self.bus))
        m.d.comb += [
            fetch.address.eq(self._address),
            fetch.length.eq(self._length),
            fetch.jump.eq(self.jump),
            fetch.destination.eq(self.destination),
            *(fetch.segments[number].eq(SEGMENT_STEP * number) for number in range(SEGMENTS)),
            self.error.eq(fetch.error),
            memory.stop.eq(self.stop),
            self.idle.eq(memory.idle),
        ]
        return m


def bench(config, address, length, waits=NONE, **options):
    dut = FetchFromMemory(config, address, length)
    sim, memory = simulator(dut), AXIMemory(config, SIZE, waits=waits, **options)
    sim.add_testbench(memory.serve(dut.bus), background=True)
    return dut, sim, memory


def words(memory: AXIMemory, address: int, length: int) -> list[int]:
    end = address + length * INSTRUCTION_BYTES
    return [int.from_bytes(memory.bytes[at:at + INSTRUCTION_BYTES].tobytes(), "little")
            for at in range(address, end, INSTRUCTION_BYTES)]


@pytest.mark.parametrize("bus_bytes, burst_beats", [(4, 8), (8, 8), (16, 16), (32, 1), (8, 256)])
@pytest.mark.parametrize("chance", [0.0, 0.4])
def test_delivers_the_program_in_order(bus_bytes, burst_beats, chance):
    config = dataclasses.replace(TEST, bus_bytes=bus_bytes, burst_beats=burst_beats)
    address, length = 4096 - 3 * INSTRUCTION_BYTES, 11
    dut, sim, memory = bench(config, address, length, Waits(1, chance), latency=9)
    taken: list[int] = []
    sim.add_testbench(sink(dut.instruction, length, taken, Waits(2, chance)))
    run(sim)
    assert taken == words(memory, address, length)
    assert sum(burst.beats for burst in memory.bursts) == length * INSTRUCTION_BYTES // bus_bytes


def test_runs_ahead_by_its_buffer_only():
    _, sim, memory = bench(TEST, 0, 64)

    async def wait(ctx) -> None:
        await ctx.tick().repeat(400)

    sim.add_testbench(wait)
    run(sim)
    assert 2 * TEST.burst_beats <= memory.beats_read <= 3 * TEST.burst_beats


def test_latency_is_hidden():
    config, length = load_config("base"), 24
    dut, sim, _ = bench(config, 0, length, latency=12)
    taken: list[bool] = []

    async def take(ctx) -> None:
        ctx.set(dut.instruction.ready, 1)
        while sum(taken) < length:
            *_, valid = await ctx.tick().sample(dut.instruction.valid)
            taken.append(valid)

    sim.add_testbench(take)
    run(sim)
    assert len(taken) <= 25 + length * (INSTRUCTION_BYTES // config.bus_bytes)


class Dispatcher:
    """Takes instructions, jumps and reads words, in random order; every instruction and word must be the right one."""

    def __init__(self, dut, memory: AXIMemory, address: int, length: int, waits: Waits, seed: int) -> None:
        self.dut, self.waits, self.random = dut, waits, random.Random(seed)
        self.program, self.memory = words(memory, address, length), memory
        self.place = 0

    async def take(self, ctx) -> None:
        for _ in range(min(self.random.randint(0, 6), len(self.program) - self.place)):
            await self.waits(ctx)
            assert await get(ctx, self.dut.instruction) == self.program[self.place], self.place
            self.place += 1

    async def jump(self, ctx) -> None:
        self.place = self.random.randrange(len(self.program))
        ctx.set(self.dut.destination, self.place)
        ctx.set(self.dut.jump, 1)
        await ctx.tick()
        ctx.set(self.dut.jump, 0)

    async def read(self, ctx) -> None:
        segment, offset = self.random.randrange(SEGMENTS), 4 * self.random.randrange(64)
        await put(ctx, self.dut.read, {"segment": segment, "offset": offset})
        (value,) = await ctx.tick().sample(self.dut.answer.payload).until(self.dut.answer.valid)
        expected = self.memory.bytes[SEGMENT_STEP * segment + offset:][:4].tobytes()
        assert value == int.from_bytes(expected, "little")

    async def bench(self, ctx) -> None:
        for _ in range(60):
            await self.random.choices([self.take, self.jump, self.read], [4, 2, 1])[0](ctx)
            for _ in range(self.random.choice([0, 0, 1, 5, 30])):
                await ctx.tick()


@pytest.mark.parametrize("bus_bytes, burst_beats", [(4, 8), (8, 4), (16, 16), (32, 1), (64, 8)])
@pytest.mark.parametrize("chance, latency", [(0.0, 1), (0.0, 33), (0.5, 9)])
def test_jumps_and_reads_at_any_time(bus_bytes, burst_beats, chance, latency):
    config = dataclasses.replace(TEST, lanes=64, bus_bytes=bus_bytes, burst_beats=burst_beats)
    address, length = 4096 - 3 * INSTRUCTION_BYTES, 40
    dut, sim, memory = bench(config, address, length, Waits(3, chance), latency=latency)
    sim.add_testbench(Dispatcher(dut, memory, address, length, Waits(4, chance), latency).bench)
    run(sim, cycles=60_000)
    assert all(address <= burst.address < address + length * INSTRUCTION_BYTES or burst.beats == 1
               for burst in memory.bursts)


def cycles_until(signal, seen: list[int]):
    """Testbench: the number of cycles until `signal` is high."""
    async def bench(ctx) -> None:
        count = 0
        while not ctx.get(signal):
            await ctx.tick()
            count += 1
        seen.append(count)

    return bench


def test_latencies():
    """What the datasheet says, behind a memory that answers in the cycle after the address."""
    config = load_config("base")
    dut, sim, _ = bench(config, 0, 40, latency=1)
    seen: list[int] = []

    async def jump(ctx) -> None:
        await ctx.tick().repeat(100)
        ctx.set(dut.destination, 20)
        ctx.set(dut.jump, 1)
        await ctx.tick()
        ctx.set(dut.jump, 0)
        await cycles_until(dut.bus.arvalid, seen)(ctx)
        await cycles_until(dut.instruction.valid, seen)(ctx)
        await ctx.tick().repeat(100)
        await put(ctx, dut.read, {"segment": 0, "offset": 0})
        await cycles_until(dut.bus.arvalid, seen)(ctx)
        await cycles_until(dut.bus.rvalid, seen)(ctx)
        await cycles_until(dut.answer.valid, seen)(ctx)

    sim.add_testbench(jump)
    run(sim)
    request, delivery, asked, _, answer = seen
    assert (request, asked, answer) == (1, 1, 1)
    assert delivery <= 2 + INSTRUCTION_BYTES // config.bus_bytes + 2


def test_reports_error_responses():
    dut, sim, _ = bench(TEST, 0, 2, failing=lambda address: address == INSTRUCTION_BYTES)

    async def watch(ctx) -> None:
        await ctx.tick().until(dut.error)

    sim.add_testbench(watch)
    run(sim)


def test_bus_wider_than_an_instruction_is_refused():
    wide = dataclasses.replace(TEST, lanes=128, bus_bytes=128)
    with pytest.raises(ValueError, match="bus_bytes = 128"):
        Fetch(wide)


def test_bus_narrower_than_a_word_is_refused():
    with pytest.raises(ValueError, match="bus_bytes = 2"):
        Fetch(dataclasses.replace(TEST, bus_bytes=2))
