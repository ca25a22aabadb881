"""The build helper: what it says when something is missing or wrong, and that it builds once."""

import ctypes
import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from weft.arch.errors import ToolError
from weft.sim import verilator

ADDER = {"adder.v": "module adder(input clk, input [31:0] a, output reg [31:0] q); "
                    "always @(posedge clk) q <= a + 1; endmodule"}
BENCH = """#include "Vtop.h"
extern "C" __attribute__((visibility("default"))) int add(int a) {
    Vtop top;
    top.clk = 0, top.a = a, top.eval();
    top.clk = 1, top.eval();
    return top.q;
}
"""


@pytest.fixture
def bench(tmp_path):
    path = tmp_path / "bench.cpp"
    path.write_text(BENCH)
    return [path]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def forbidden(*_):
    raise AssertionError("built again")


def test_builds_once(bench, monkeypatch):
    library = ctypes.CDLL(str(verilator.build(ADDER, "adder", bench)))
    assert library.add(41) == 42
    monkeypatch.setattr(verilator, "run", forbidden)
    verilator.build(ADDER, "adder", bench)
    with pytest.raises(AssertionError):  # other flags, other library
        verilator.build(ADDER, "adder", bench, flags=["--x-assign", "0"])


def test_missing_tools_are_named(monkeypatch, tmp_path, bench):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match=r"c\+\+, ar, make, perl.*apt-get install g\+\+ binutils make perl"):
        verilator.require_tools()
    with pytest.raises(ToolError, match=r"apt-get install g\+\+") as caught:
        verilator.build(ADDER, "adder", bench)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("sources, message", [
    ({"wrong.v": "module adder(input clk); assign q = ; endmodule"}, "wrong.v:1:"),
    ({"none.v": "module other; endmodule"}, "adder"),
])
def test_verilog_errors_are_shown(empty_cache, bench, sources, message):
    with pytest.raises(ToolError, match=message) as caught:
        verilator.build(sources, "adder", bench)
    log, = empty_cache.glob("adder-*.log")
    assert str(log) in str(caught.value) and "%Error" in log.read_text()
    assert not list(empty_cache.glob("*.so")) and not list(empty_cache.glob(".*.build"))


def test_cpp_errors_are_shown(empty_cache, bench):
    bench[0].write_text("int x = y;")
    with pytest.raises(ToolError, match=r"bench\.cpp:1:9: error: 'y' was not declared"):
        verilator.build(ADDER, "adder", bench)


def test_full_disk_seen_by_compiler(empty_cache, bench, tmp_path, monkeypatch):
    fake = tmp_path / "bin" / "c++"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 'fatal error: error writing to a.s: No space left on device' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    with pytest.raises(ToolError, match="disk is full"):
        verilator.build(ADDER, "adder", bench)


def test_full_disk_seen_by_us(empty_cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(verilator.os, "replace", full)
    with pytest.raises(ToolError, match=r"No space left on device.*WEFT_CACHE"):
        verilator.cached("thing", ".txt", ["a"], lambda path, log: path.write_text("a"))
    assert not list(empty_cache.glob("*.txt")) and not list(empty_cache.glob(".*.build"))


def test_unusable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ToolError, match="set WEFT_CACHE to another folder"):
        verilator.cached("thing", ".txt", ["a"], lambda path, log: path.write_text("a"))


def test_concurrent_requests_make_once(empty_cache):
    made = []

    def make(path, log):
        made.append(path)
        time.sleep(0.2)
        path.write_text("content")

    threads = [threading.Thread(target=verilator.cached, args=("thing", ".txt", ["a"], make)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and verilator.cached("thing", ".txt", ["a"], forbidden).read_text() == "content"
    assert verilator.cached("thing", ".txt", ["a", ""], make).read_text() == "content" and len(made) == 2


def test_interrupted_build_leaves_nothing(empty_cache, bench):
    script = ("import sys, pathlib; from weft.sim import verilator\n"
              f"verilator.build({ADDER!r}, 'adder', [pathlib.Path({str(bench[0])!r})])")
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(empty_cache.glob(".adder-*.build/*.cpp")))
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=10)[1]
    assert time.monotonic() - began < 5
    assert not list(empty_cache.glob("*.so")) and not list(empty_cache.glob(".*.build"))


def test_environment_runs_the_driver():
    environment = os.environ | verilator.environment()
    result = subprocess.run(["verilator", "--version"], env=environment, capture_output=True, text=True, check=True)
    assert "rev" in result.stdout
    assert verilator.version()[0].isdigit()


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
