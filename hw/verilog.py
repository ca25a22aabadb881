"""The engine as one Verilog file."""

from __future__ import annotations

import gc
import re

from amaranth.back import verilog as backend
from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import Out

from weft.arch.config import EngineConfig
from weft.hw.engine import Engine

TOP = "weft_engine"
ZERO_CONTENTS = re.compile(r"^ +initial begin\n(?: +\S+ ?\[\d+\] = \d+'h0+;\n)+ +end\n", re.MULTILINE)
PREFIXES = {("bus",): "m_axi", ("control",): "s_axil", ("monitor",): "mon"}


class Top(wiring.Component):
    """The engine with flat port names: m_axi_araddr, s_axil_araddr, mon_load_valid, mon_start, irq."""

    def __init__(self, config: EngineConfig) -> None:
        self._engine = Engine(config)
        self._ports = {_name(path): (member, value) for path, member, value
                       in self._engine.signature.flatten(self._engine)}
        super().__init__({name: member.flow(value.shape()) for name, (member, value) in self._ports.items()})

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.engine = self._engine
        for name, (member, inner) in self._ports.items():
            m.d.comb += getattr(self, name).eq(inner) if member.flow is Out else inner.eq(getattr(self, name))
        return m


def verilog(config: EngineConfig) -> str:
    """Verilog of the engine, module weft_engine with clk, rst and the ports of Top.

    The same text for the same configuration. Only single underscores in port names, because simulators
    encode double ones. Memories carry no initial contents: ours start at zero, as simulators and FPGAs do by
    themselves, and a line for each of their words would be a fifth of the file.
    """
    collecting = gc.isenabled()
    gc.disable()  # millions of objects that live to the end: collecting them in vain doubles the time
    try:
        text = backend.convert(Top(config), name=TOP, emit_src=False, strip_internal_attrs=True)
    finally:
        if collecting:
            gc.enable()
    return ZERO_CONTENTS.sub("", text)


def _name(path: tuple[str | int, ...]) -> str:
    prefix = PREFIXES.get(path[:1])
    return "_".join(str(part) for part in ([prefix, *path[1:]] if prefix else path))
