"""PyVerilator 0.7 with today's Verilator: the four places where it breaks are replaced while it builds.

PyVerilator was written for the Verilator of 2019. Nothing else in Weft depends on it: RtlDevice is faster and
complete; this serves those who know PyVerilator's way of driving a module's ports.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import IO, Any
from unittest import mock

from weft.arch.errors import ToolError
from weft.sim import verilator


def build(verilog: str, top: str) -> Any:
    """A PyVerilator object for module `top`, its library cached by content. Raises ToolError.

    Drive it as PyVerilator documents: `dut.io.a = 1`, `dut.clock.tick()`, `int(dut.io.q)`. Names with two
    underscores in a row, `dut.internals`, GTKWave, and a second object of the same module are not available.
    """
    module = _pyverilator()
    verilator.require_tools()

    def make(path: Path, log: IO[str]) -> None:
        folder = path.parent / "model"
        (path.parent / f"{top}.v").write_text(verilog)
        template = module.template_cpp.template_cpp

        def call(command: list[str], quiet: bool = False) -> None:
            verilator.run([[part.replace("--std=c++11", "--std=c++17") for part in command]], path.parent, log)

        def template_with_names(name: str, *arguments: Any) -> str:
            *groups, json_data = arguments  # Verilator declares small ports by reference: VL_IN8(&clk,0,0)
            ports = [[(port.lstrip("&"), width) for port, width in group] for group in groups]
            return template(name, *ports, json_data)

        with (mock.patch.dict(os.environ, verilator.environment()),  # it looks for `verilator` on PATH
              mock.patch.object(module, "call_process", call),
              mock.patch.object(module.template_cpp, "template_cpp", template_with_names)):
            only_build = module.PyVerilator.build.__func__  # with a class whose objects do not load the library
            only_build(lambda library, command_args: None, str(path.parent / f"{top}.v"), build_dir=str(folder))
        os.replace(folder / f"V{top}", path)

    return module.PyVerilator(str(verilator.cached(f"py-{top}", ".so", [verilator.version(), top, verilog], make)))


def _pyverilator() -> types.ModuleType:
    sys.modules.setdefault("tclwrapper", types.ModuleType("tclwrapper"))  # for GTKWave; fails on Python 3.11
    try:
        import pyverilator.pyverilator as module
    except ImportError as error:
        raise ToolError(f"PyVerilator cannot be used ({error}); install it with: pip install PyVerilator") from error
    return module
