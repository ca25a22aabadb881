"""The register block, driven by AXI4-Lite accesses."""

from __future__ import annotations

import random

import pytest
from amaranth.hdl import Cat
from amaranth.lib.wiring import Out

from tests.kit.streams import run, simulator
from weft.arch.config import load_config
from weft.arch.isa import ARGUMENTS, Unit
from weft.arch.registers import CONTROL_RESET, CONTROL_START, MAGIC, REGISTERS, Stall, Status
from weft.hw.csr import ControlRegisters
from weft.hw.engine import Engine
from weft.hw.verilog import Top

CONFIG = load_config("test")


class Host:
    """AXI4-Lite accesses; address and data of a write come in either order, answers are taken late."""

    def __init__(self, ctx, dut: ControlRegisters, seed: int = 0) -> None:
        self.ctx, self.dut, self.bus, self.random = ctx, dut, dut.bus, random.Random(seed)

    async def write_word(self, address: int, value: int, strb: int = 15) -> None:
        ctx, bus = self.ctx, self.bus
        ctx.set(bus.awaddr, address)
        ctx.set(bus.wdata, value)
        ctx.set(bus.wstrb, strb)
        first, second = self.random.sample([bus.awvalid, bus.wvalid], 2)
        ctx.set(first, 1)
        await ctx.tick().repeat(self.random.randint(1, 3))
        ctx.set(second, 1)
        await ctx.tick().until(bus.awready & bus.wready)
        ctx.set(bus.awvalid, 0)
        ctx.set(bus.wvalid, 0)
        await ctx.tick().repeat(self.random.randint(1, 3))
        ctx.set(bus.bready, 1)
        (response,) = await ctx.tick().sample(bus.bresp).until(bus.bvalid)
        ctx.set(bus.bready, 0)
        assert response == 0

    async def read_word(self, address: int) -> int:
        ctx, bus = self.ctx, self.bus
        ctx.set(bus.araddr, address)
        ctx.set(bus.arvalid, 1)
        await ctx.tick().until(bus.arready)
        ctx.set(bus.arvalid, 0)
        await ctx.tick().repeat(self.random.randint(1, 3))
        ctx.set(bus.rready, 1)
        response, value = await ctx.tick().sample(bus.rresp, bus.rdata).until(bus.rvalid)
        ctx.set(bus.rready, 0)
        assert response == 0
        return value

    async def write(self, name: str, value: int) -> None:
        register = REGISTERS[name]
        for number in range(register.words):
            await self.write_word(register.offset + 4 * number, value >> 32 * number & 0xFFFFFFFF)

    async def read(self, name: str) -> int:
        register = REGISTERS[name]
        words = [await self.read_word(register.offset + 4 * number) for number in range(register.words)]
        return sum(value << 32 * number for number, value in enumerate(words))

    async def start(self) -> None:
        self.ctx.set(self.dut.idle, 1)
        await self.write("control", CONTROL_START)
        assert self.ctx.get(self.dut.running)

    async def pulse(self, *signals) -> None:
        for signal in signals:
            self.ctx.set(signal, 1)
        await self.ctx.tick()
        for signal in signals:
            self.ctx.set(signal, 0)


def check(scenario) -> None:
    dut = ControlRegisters(CONFIG)
    sim = simulator(dut)

    async def testbench(ctx) -> None:
        await scenario(ctx, dut, Host(ctx, dut))

    sim.add_testbench(testbench)
    run(sim)


def test_writable_registers_keep_what_is_written_and_no_other_does():
    async def scenario(ctx, dut, host) -> None:
        names = [name for name in REGISTERS if name != "control"]
        values = {name: host.random.getrandbits(32 * REGISTERS[name].words) for name in names}
        fixed = {"magic": MAGIC, "fingerprint": int(CONFIG.fingerprint, 16)}
        for name, value in values.items():
            await host.write(name, value)
        for name, value in values.items():
            bits = CONFIG.address_bits if name.startswith(("program_address", "segment")) else 64
            expected = value & (1 << bits) - 1 if REGISTERS[name].writable else fixed.get(name, 0)
            assert await host.read(name) == expected, name
        assert ctx.get(dut.segments[3]) == values["segment3"] & (1 << CONFIG.address_bits) - 1
        for number in range(ARGUMENTS):
            assert ctx.get(dut.arguments[number]) == values[f"argument{number}"]

    check(scenario)


def test_write_strobes_and_unknown_addresses():
    async def scenario(ctx, dut, host) -> None:
        offset = REGISTERS["watchdog"].offset
        await host.write_word(offset, 0x11223344)
        await host.write_word(offset, 0xAABBCCDD, strb=0b0101)
        assert await host.read_word(offset) == 0x11BB33DD
        last = max(REGISTERS.values(), key=lambda item: item.offset)
        await host.write_word(last.offset + 4 * last.words, 5)
        assert await host.read_word(last.offset + 4 * last.words) == 0

    check(scenario)


def test_start_waits_for_the_memory_port():
    async def scenario(ctx, dut, host) -> None:
        assert await host.read("status") == Status.IDLE
        await host.write("control", CONTROL_START)
        await ctx.tick().repeat(5)
        assert await host.read("status") == Status.RUNNING and not ctx.get(dut.running)
        ctx.set(dut.idle, 1)
        await ctx.tick()
        assert ctx.get(dut.running) and not ctx.get(dut.irq)
        ctx.set(dut.index, 7)
        await ctx.tick()
        assert await host.read("fault_index") == 7
        await host.pulse(dut.finished)
        assert not ctx.get(dut.running) and ctx.get(dut.irq)
        assert await host.read("status") == Status.DONE
        await host.start()
        assert not ctx.get(dut.irq)

    check(scenario)


def test_fault_is_kept_until_reset():
    async def scenario(ctx, dut, host) -> None:
        await host.start()
        ctx.set(dut.fault, {"status": Status.BUS_ERROR, "unit": Unit.STORE, "index": 99})
        await host.pulse(dut.fault_valid, dut.finished)
        ctx.set(dut.fault.index, 1)
        await host.pulse(dut.fault_valid)
        assert ctx.get(dut.irq) and not ctx.get(dut.running)
        assert await host.read("status") == Status.BUS_ERROR | Unit.STORE << 8
        assert await host.read("fault_index") == 99
        await host.write("control", CONTROL_RESET)
        assert await host.read("status") == Status.IDLE and not ctx.get(dut.irq)
        await host.start()
        await host.write("control", CONTROL_RESET)
        assert await host.read("status") == Status.IDLE and not ctx.get(dut.running)
        await host.write("control", CONTROL_RESET | CONTROL_START)
        assert await host.read("status") == Status.RUNNING

    check(scenario)


def test_counters_count_while_running_and_start_from_zero():
    async def scenario(ctx, dut, host) -> None:
        for _ in range(2):
            await host.start()
            counted = {unit: {"retired": 3 + unit, "busy": 11 - unit} | {cause: 2 + 3 * cause + unit for cause in Stall}
                       for unit in Unit}
            for cycle in range(20):
                for unit, numbers in counted.items():
                    activity = dut.activity[unit]
                    ctx.set(activity.retired, cycle < numbers["retired"])
                    ctx.set(activity.busy, cycle < numbers["busy"])
                    ctx.set(activity.stall, sum(1 << cause for cause in Stall if cycle < numbers[cause]))
                ctx.set(Cat(dut.read_beat, dut.write_beat), int(cycle < 5) | int(cycle < 9) << 1)
                await ctx.tick()
            before = await host.read("cycles")
            await host.pulse(dut.finished)
            await ctx.tick()
            after = await host.read("cycles")
            ctx.set(dut.read_beat, 1)
            assert before < after == await host.read("cycles")
            assert await host.read("bytes_read") == 5 * CONFIG.bus_bytes
            assert await host.read("bytes_written") == 9 * CONFIG.bus_bytes
            ctx.set(dut.read_beat, 0)
            for unit, numbers in counted.items():
                name = unit.name.lower()
                assert await host.read(f"{name}_retired") == numbers["retired"]
                assert await host.read(f"{name}_busy") == numbers["busy"]
                for cause in Stall:
                    assert await host.read(f"{name}_stall_{cause.name.lower()}") == numbers[cause]

    check(scenario)


@pytest.mark.parametrize("name", ["test", "base"])
def test_ports_of_the_top_have_flat_names(name):
    config = load_config(name)
    top, engine = Top(config), Engine(config)
    names = set(top.signature.members)
    assert not [port for port in names if "__" in port]
    assert {"m_axi_araddr", "s_axil_wstrb", "irq", "mon_start", "mon_retire", "mon_running", "mon_row_valid"} <= names
    assert len(names) == len(list(engine.signature.flatten(engine)))
    assert top.signature.members["m_axi_wdata"].flow is Out and len(top.m_axi_wdata) == 8 * config.bus_bytes
