"""Devices by name, as the command line gives them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from weft.arch.config import EngineConfig
from weft.arch.device import Device
from weft.arch.errors import ModelError

NAMES = ("functional", "rtl")
DEFAULT_MEMORY = "ddr3"


def make_device(name: str, config: EngineConfig, memory: str = DEFAULT_MEMORY, trace: bool = True,
                waves: Path | None = None, progress: Callable[[int], None] | None = None) -> Device:
    """The Device `name` for an engine. Raises ModelError for an unknown name or memory model."""
    from weft.sim.memory import parse_memory

    model = parse_memory(memory)
    if name == "functional":
        from weft.sim.functional import FunctionalDevice

        if waves:
            raise ModelError("the functional device has no waves; give --device rtl")
        return FunctionalDevice(config, trace=trace)
    if name == "rtl":
        from weft.sim.rtl import RtlDevice, Waves

        return RtlDevice(config, model, trace=trace, waves=Waves(waves) if waves else None, progress=progress)
    raise ModelError(f"no device named '{name}'; give one of {', '.join(NAMES)}")
