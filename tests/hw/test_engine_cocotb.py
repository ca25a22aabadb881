"""Builds the engine under Verilator for cocotb and runs cocotb_engine.py. The build is cached by content."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from cocotb_tools.runner import get_runner
from filelock import FileLock

from weft.arch.config import load_config
from weft.hw.verilog import TOP, verilog
from weft.sim.verilator import environment, require_tools, version

BUILD = Path(__file__).parents[2] / "build" / "cocotb"
# cocotb would make every signal public, which triples the build time: only the ports of the top are needed.
PUBLIC = f'`verilator_config\npublic_flat_rw -module "{TOP}" -var "*"\n'
OPTIMIZE = "-O1"  # the bench runs for seconds, mostly in Python
FLAGS = ["-Wno-fatal", "-Wno-lint", "--no-public-flat-rw", "-O3", "--x-assign", "fast", "--x-initial", "fast"]


@pytest.fixture
def runner(monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MAKEFLAGS", f"{environment()['MAKEFLAGS']} OPT_FAST={OPTIMIZE}")
    require_tools()
    return get_runner("verilator")


def build(runner) -> Path:
    text = verilog(load_config("test"))
    key = hashlib.sha256("\n".join([version(), *FLAGS, OPTIMIZE, PUBLIC, text]).encode()).hexdigest()[:16]
    folder = BUILD / key
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / f"{key}.lock"):
        if not (folder / "complete").exists():
            (folder / "public.vlt").write_text(PUBLIC)
            (folder / "engine.v").write_text(text)
            runner.build(sources=[folder / "public.vlt", folder / "engine.v"], hdl_toplevel=TOP, build_dir=folder,
                         build_args=FLAGS, always=True, log_file=folder / "build.log")
            (folder / "complete").touch()
    return folder


def test_engine_under_cocotb(runner, tmp_path):
    folder = build(runner)
    log = tmp_path / "log"
    try:
        runner.test(hdl_toplevel=TOP, hdl_toplevel_lang="verilog", test_module="tests.hw.cocotb_engine",
                    build_dir=folder, test_dir=tmp_path, results_xml=tmp_path / "results.xml", log_file=log)
    except SystemExit:
        pytest.fail(f"the end of {log}:\n{log.read_text()[-6000:]}")
