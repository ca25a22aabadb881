"""The engine: all units, wired."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, ResetInserter
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, Signature, connect, flipped

from weft.arch.config import EngineConfig
from weft.arch.isa import Unit
from weft.arch.registers import ADDRESS_BITS
from weft.arch.trace import WRITERS
from weft.hw.axi import AXI4, AXI4Lite
from weft.hw.csr import ControlRegisters
from weft.hw.dispatch import Dispatch
from weft.hw.dma import LoadUnit, MemoryPort, StoreUnit
from weft.hw.fetch import Fetch
from weft.hw.interfaces import write_layout
from weft.hw.matrix import MatrixUnit
from weft.hw.row import RowUnit
from weft.hw.scratchpad import Scratchpad
from weft.hw.vector import VectorUnit


class WriteMonitor(Signature):
    """One writer of the scratchpad: `valid` in a cycle in which a write was accepted."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__({"valid": Out(1)} | {name: Out(field.shape) for name, field in write_layout(config)})


class Monitor(Signature):
    """What a simulation may watch; no effect on the engine. `start` and `retire` have one bit per Unit.

    `running` is high in the cycles that the engine counts.
    """

    def __init__(self, config: EngineConfig) -> None:
        writers = {unit.name.lower(): Out(WriteMonitor(config)) for unit in WRITERS}
        super().__init__(writers | {"start": Out(len(Unit)), "retire": Out(len(Unit)), "running": Out(1)})


class Engine(wiring.Component):
    """The whole accelerator: an AXI4 manager for memory, an AXI4-Lite subordinate for the host, an interrupt.

    The host writes the registers of arch/registers.py and starts; the engine fetches the program from memory, runs
    it, and raises `irq` at its end. Everything but registers and memory port is in reset while no program runs.
    The order of the scratchpad's ports is their priority.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        super().__init__({
            "bus": Out(AXI4(config.bus_bytes, config.address_bits)),
            "control": In(AXI4Lite(ADDRESS_BITS)),
            "irq": Out(1),
            "monitor": Out(Monitor(config)),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        config = self._config
        m.submodules.registers = registers = ControlRegisters(config)
        m.submodules.memory = memory = MemoryPort(config)
        fetch, dispatch = Fetch(config), Dispatch(config)
        load, store, matrix, vector = LoadUnit(config), StoreUnit(config), MatrixUnit(config), VectorUnit(config)
        row = RowUnit(config)
        units = {Unit.LOAD: load, Unit.STORE: store, Unit.MATRIX: matrix, Unit.VECTOR: vector, Unit.ROW: row}
        reads = [matrix.activation, matrix.weight, *vector.sample, vector.parameter, row.read, store.read]
        writes = {Unit.MATRIX: matrix.result, Unit.VECTOR: vector.result, Unit.ROW: row.result, Unit.LOAD: load.write}
        scratchpad = Scratchpad(config, readers=len(reads), writers=len(writes))
        in_reset = {"fetch": fetch, "dispatch": dispatch, "scratchpad": scratchpad}
        in_reset |= {unit.name.lower(): component for unit, component in units.items()}
        for name, component in in_reset.items():
            m.submodules[name] = ResetInserter(~registers.running)(component)

        connect(m, flipped(self.control), registers.bus)
        connect(m, memory.bus, flipped(self.bus))
        connect(m, fetch.memory, memory.fetch)
        connect(m, load.memory, memory.load)
        connect(m, store.memory, memory.store)
        connect(m, fetch.instruction, dispatch.program)
        connect(m, dispatch.read, fetch.read)
        connect(m, fetch.answer, dispatch.answer)
        for port, read in zip(scratchpad.read, reads, strict=True):
            connect(m, read, port)
        for port, write in zip(scratchpad.write, writes.values(), strict=True):
            connect(m, write, port)
        m.d.comb += [
            self.irq.eq(registers.irq),
            memory.stop.eq(~registers.running),
            fetch.address.eq(registers.program_address),
            fetch.length.eq(registers.program_length),
            fetch.segments.eq(registers.segments),
            fetch.jump.eq(dispatch.jump),
            fetch.destination.eq(dispatch.destination),
            load.segments.eq(registers.segments),
            store.segments.eq(registers.segments),
            dispatch.length.eq(registers.program_length),
            dispatch.arguments.eq(registers.arguments),
            dispatch.watchdog.eq(registers.watchdog),
            dispatch.fetch_error.eq(fetch.error),
            dispatch.load_error.eq(load.error),
            dispatch.store_error.eq(store.error),
            dispatch.address_error.eq(scratchpad.fault),
            registers.idle.eq(memory.idle),
            registers.finished.eq(dispatch.finished),
            registers.fault_valid.eq(dispatch.fault_valid),
            registers.fault.eq(dispatch.fault),
            registers.index.eq(dispatch.index),
            registers.read_beat.eq(memory.read_beat),
            registers.write_beat.eq(memory.write_beat),
            self.monitor.start.eq(dispatch.start),
            self.monitor.retire.eq(dispatch.retire),
            self.monitor.running.eq(registers.running),
        ]
        for unit, component in units.items():
            port, activity = component.unit, registers.activity[unit]
            connect(m, getattr(dispatch, unit.name.lower()), port)
            m.d.comb += [
                activity.retired.eq(dispatch.retire[unit]),
                activity.busy.eq(port.busy),
                activity.stall.eq(Cat(  # in the order of Stall
                    dispatch.token_stall[unit], port.stall_scratchpad, port.stall_memory, port.stall_output)),
            ]
        for unit in WRITERS:
            watched, request = getattr(self.monitor, unit.name.lower()), writes[unit].request
            m.d.comb += watched.valid.eq(request.valid & request.ready)
            m.d.comb += [getattr(watched, name).eq(request.payload[name]) for name, _ in write_layout(config)]
        return m
