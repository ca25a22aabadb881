"""Timing of the memory behind the engine's AXI4 port in RTL simulation."""

from __future__ import annotations

from dataclasses import dataclass

from weft.arch.errors import ModelError

FORMS = "fixed:LATENCY:BYTES_PER_CYCLE, gate:LATENCY:OPEN:PERIOD"


@dataclass(frozen=True)
class MemoryModel:
    """When data beats may move. The address range `error` serves tests: it is answered with SLVERR.

    latency: cycles from an accepted read address to its first beat, and from the last write beat to its response.
    bytes_per_cycle: mean rate in data bytes per engine cycle; 0: one beat of the bus on each channel per cycle.
    shared: reads and writes share that rate; otherwise each has it for itself.
    gate_open, gate_period: data moves only in the first `gate_open` of every `gate_period` cycles, which count
        freely from reset; a read beat once offered stays offered, as AXI demands.
    error: first address and the one after the last.
    """

    latency: int = 1
    bytes_per_cycle: float = 0
    shared: bool = True
    gate_open: int = 1
    gate_period: int = 1
    error: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        def require(condition: bool, reason: str) -> None:
            if not condition:
                raise ModelError(f"memory model: {reason}")

        require(1 <= self.latency < 1 << 20, f"latency must be 1 .. {(1 << 20) - 1} cycles, got {self.latency}")
        require(0 <= self.bytes_per_cycle < 1 << 16, f"bytes per cycle must be positive, got {self.bytes_per_cycle}")
        require(1 <= self.gate_open <= self.gate_period,
                f"a gate is open 1 .. PERIOD cycles of PERIOD, got {self.gate_open} of {self.gate_period}")


PRESETS = {
    "ideal": MemoryModel(),
    # rates of boards' memories at the clocks planned for them; the latencies are assumptions
    "sdr": MemoryModel(latency=20, bytes_per_cycle=2.5),
    "ddr3": MemoryModel(latency=40, bytes_per_cycle=14.5),
    "ultra96": MemoryModel(latency=100, bytes_per_cycle=15.8),
    "kv260": MemoryModel(latency=150, bytes_per_cycle=60),
    "nngen": MemoryModel(latency=10, gate_open=15, gate_period=19),  # the default model of Veriloggen and NNgen
}


def parse_memory(text: str) -> MemoryModel:
    """A preset by name, `fixed:LATENCY:BYTES_PER_CYCLE` or `gate:LATENCY:OPEN:PERIOD`. Raises ModelError."""
    if text in PRESETS:
        return PRESETS[text]
    try:
        match text.split(":"):
            case ["fixed", latency, rate] if float(rate) > 0:
                return MemoryModel(latency=int(latency), bytes_per_cycle=float(rate))
            case ["gate", latency, gate_open, gate_period]:
                return MemoryModel(latency=int(latency), gate_open=int(gate_open), gate_period=int(gate_period))
    except ModelError:
        raise
    except ValueError:
        pass  # not numbers: the message below says what is wanted
    raise ModelError(f"memory model {text!r} not understood; give one of {', '.join(PRESETS)}, or one of the forms "
                     f"{FORMS}")
