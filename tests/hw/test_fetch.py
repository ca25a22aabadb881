"""Instruction fetch, behind the read channel."""

from __future__ import annotations

import dataclasses

import pytest
from amaranth.hdl import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from tests.kit.axi import AXIMemory
from tests.kit.streams import NONE, Waits, run, simulator, sink
from weft.arch.config import EngineConfig, load_config
from weft.arch.isa import INSTRUCTION_BYTES
from weft.hw.axi import AXI4
from weft.hw.dma import MemoryPort
from weft.hw.fetch import Fetch
from weft.hw.layouts import INSTRUCTION_BITS

TEST = load_config("test")
SIZE = 1 << 14


class FetchFromMemory(wiring.Component):
    def __init__(self, config: EngineConfig, address: int, length: int) -> None:
        self._config, self._address, self._length = config, address, length
        super().__init__({
            "instruction": Out(stream.Signature(INSTRUCTION_BITS)),
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
        connect(m, memory.bus, flipped(self.bus))
        m.d.comb += [
            fetch.address.eq(self._address),
            fetch.length.eq(self._length),
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
