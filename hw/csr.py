"""Host-visible registers: control, status, program location, segments, arguments, counters."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from weft.arch.config import EngineConfig
from weft.arch.isa import ARGUMENTS, Unit
from weft.arch.registers import (
    ADDRESS_BITS,
    CONTROL_RESET,
    CONTROL_START,
    MAGIC,
    REGISTERS,
    SEGMENTS,
    Register,
    Stall,
    Status,
)
from weft.hw.axi import AXI4Lite
from weft.hw.dispatch import FAULT
from weft.hw.fetch import LENGTH_BITS

WORD = 32
ACTIVITY = data.StructLayout({"retired": 1, "busy": 1, "stall": len(Stall)})  # of one unit in one cycle


class ControlRegisters(wiring.Component):
    """The AXI4-Lite register block of arch/registers.py and the engine's run state.

    Writing 1 to control starts a program: when both memory channels are idle, `running` rises and all counters
    are cleared. It falls on `finished`, on `fault_valid`, or when the host writes 2. The units are held in reset
    and the memory channels stopped while it is low, so every program starts from a fresh engine. A start
    while running is ignored; 3 stops and starts again. `irq` is high from the end of a program, good or bad, to
    the next start or reset.

    Counters run only while `running`; a 64-bit one is to be read when it has stopped. Counted bytes are whole
    beats of the bus, bytes masked off included. Segment and program addresses keep `address_bits` bits. Unknown
    addresses read as zero and writes to read-only registers are ignored, without an error response. One access of
    each direction at a time, 2 cycles each.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        super().__init__({
            "bus": In(AXI4Lite(ADDRESS_BITS)),
            "idle": In(1),
            "running": Out(1),
            "irq": Out(1),
            "finished": In(1),
            "fault_valid": In(1),
            "fault": In(FAULT),
            "index": In(LENGTH_BITS),
            "read_beat": In(1),
            "write_beat": In(1),
            "activity": In(data.ArrayLayout(ACTIVITY, len(Unit))),
            "watchdog": Out(WORD),
            "program_length": Out(LENGTH_BITS),
            "program_address": Out(unsigned(config.address_bits)),
            "segments": Out(data.ArrayLayout(unsigned(config.address_bits), SEGMENTS)),
            "arguments": Out(data.ArrayLayout(WORD, ARGUMENTS)),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        control, status, unit, index = Signal(2), Signal(8), Signal(8), Signal(LENGTH_BITS)
        self._control(m, control, status, unit, index)
        values = {
            "status": Cat(status, unit),
            "fault_index": index,
            "magic": Const(MAGIC, WORD),
            "fingerprint": Const(int(self._config.fingerprint, 16), 2 * WORD),
            "watchdog": self.watchdog,
            "program_length": self.program_length,
            "program_address": self.program_address,
            **{f"segment{number}": self.segments[number] for number in range(SEGMENTS)},
            **{f"argument{number}": self.arguments[number] for number in range(ARGUMENTS)},
        }
        values |= self._counters(m)
        self._read_side(m, values)
        self._write_side(m, {name: value for name, value in values.items() if REGISTERS[name].writable}, control)
        return m

    def _control(self, m: Module, control: Signal, status: Signal, unit: Signal, index: Signal) -> None:
        starts, resets = (control & CONTROL_START).any(), (control & CONTROL_RESET).any()
        m.d.comb += self.irq.eq(status > Status.RUNNING)
        with m.If(self.running):
            m.d.sync += index.eq(self.index)
            with m.If(self.fault_valid):
                m.d.sync += [
                    self.running.eq(0),
                    Cat(status, unit, index).eq(self.fault),
                ]
            with m.Elif(self.finished):
                m.d.sync += [self.running.eq(0), status.eq(Status.DONE)]
        with m.Elif((status == Status.RUNNING) & self.idle):
            m.d.sync += self.running.eq(1)
        with m.If(resets):
            m.d.sync += [self.running.eq(0), status.eq(Status.IDLE), unit.eq(0), index.eq(0)]
        with m.If(starts & (resets | (status != Status.RUNNING))):
            m.d.sync += [status.eq(Status.RUNNING), unit.eq(0), index.eq(0)]

    def _counters(self, m: Module) -> dict:
        """Counters by register name; what they count is registered first, to keep their carries off other paths."""
        beat = exact_log2(self._config.bus_bytes)
        counted = {
            "cycles": (self.running, 0),
            "bytes_read": (self.read_beat, beat),
            "bytes_written": (self.write_beat, beat),
        }
        for unit in Unit:
            name, activity = unit.name.lower(), self.activity[unit]
            counted |= {f"{name}_retired": (activity.retired, 0), f"{name}_busy": (activity.busy, 0)}
            counted |= {f"{name}_stall_{cause.name.lower()}": (activity.stall[cause], 0) for cause in Stall}
        ran = Signal()
        m.d.sync += ran.eq(self.running)
        values = {}
        for name, (event, shift) in counted.items():
            count, step = Signal(WORD * REGISTERS[name].words - shift, name=name), Signal(name=f"{name}_step")
            m.d.sync += step.eq(event & self.running)
            with m.If(self.running & ~ran):
                m.d.sync += count.eq(0)
            with m.Elif(step):
                m.d.sync += count.eq(count + 1)
            values[name] = Cat(Const(0, shift), count) if shift else count
        return values

    def _read_side(self, m: Module, values: dict) -> None:
        bus = self.bus
        m.d.comb += bus.arready.eq(~bus.rvalid)
        with m.If(bus.arvalid & bus.arready):
            m.d.sync += [bus.rvalid.eq(1), bus.rdata.eq(0)]
            with m.Switch(bus.araddr[2:]):
                for name, value in values.items():
                    for number, word in _words(REGISTERS[name], value):
                        with m.Case(number):
                            m.d.sync += bus.rdata.eq(word)
        with m.Elif(bus.rready):
            m.d.sync += bus.rvalid.eq(0)

    def _write_side(self, m: Module, values: dict, control: Signal) -> None:
        bus, accepts = self.bus, Signal()
        m.d.comb += [
            accepts.eq(bus.awvalid & bus.wvalid & ~bus.bvalid),
            bus.awready.eq(accepts),
            bus.wready.eq(accepts),
        ]
        m.d.sync += control.eq(0)
        with m.If(accepts):
            m.d.sync += bus.bvalid.eq(1)
            with m.Switch(bus.awaddr[2:]):
                with m.Case(REGISTERS["control"].offset // 4):
                    m.d.sync += control.eq(Mux(bus.wstrb[0], bus.wdata, 0))
                for name, value in values.items():
                    for number, word in _words(REGISTERS[name], value):
                        with m.Case(number):
                            for byte in range(-(-len(word) // 8)):
                                with m.If(bus.wstrb[byte]):
                                    m.d.sync += word[8 * byte:8 * byte + 8].eq(bus.wdata.word_select(byte, 8))
        with m.Elif(bus.bready):
            m.d.sync += bus.bvalid.eq(0)


def _words(register: Register, value) -> list:
    """Word address and value of each 32-bit word of a register; words beyond the value's width are left out."""
    slices = [value[WORD * i:WORD * (i + 1)] for i in range(register.words)]
    return [(register.offset // 4 + i, part) for i, part in enumerate(slices) if len(part)]
