"""What Weft needs from the machine: what is there, what is accepted, and the line that mends what is not."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion

from weft.arch.errors import ToolError
from weft.sim.verilator import PACKAGES, cache_directory

TOOL_VERSIONS = {"c++": ">=9", "make": ">=4", "perl": ">=5.10", "ar": ">=2"}  # c++: for -std=c++17
FREE_BYTES = 1 << 30  # a few simulators and the report
EXTRAS = {"models": "train, quantize, demo", "test": "make test"}


@dataclass(frozen=True)
class Finding:
    """One needed thing. `found` is empty when it is missing; only `required` ones make `weft doctor` fail."""

    name: str
    needed_for: str
    found: str
    accepted: str
    ok: bool
    required: bool
    mend: str


def examine() -> list[Finding]:
    """Everything Weft needs, in the order in which it should be mended."""
    return [_python(), *_tools(), *_packages(), _space()]


def healthy(findings: list[Finding]) -> bool:
    return all(finding.ok for finding in findings if finding.required)


def _python() -> Finding:
    accepted = _own_metadata().get("Requires-Python") or ">=3.11"
    found = platform.python_version()
    return Finding("python", "everything", found, accepted, found in SpecifierSet(accepted), True,
                   "sudo apt-get install python3 python3-venv")


def _tools() -> Iterator[Finding]:
    for tool, package in PACKAGES.items():
        accepted = TOOL_VERSIONS[tool]
        found = _tool_version(tool)
        yield Finding(tool, "RTL simulation", found, accepted, bool(found) and found in SpecifierSet(accepted), True,
                      f"sudo apt-get install {package}")


def _tool_version(tool: str) -> str:
    """Version that the tool prints; empty when it is missing or does not run."""
    if shutil.which(tool) is None:
        return ""
    try:
        done = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    # The last version of the first line that has one: g++ and ar print the distribution's in brackets before theirs.
    found = (re.findall(r"\bv?(\d+(?:\.\d+)+)", line) for line in done.stdout.splitlines())
    return next((versions[-1] for versions in found if versions), "")


def _packages() -> Iterator[Finding]:
    """The dependencies that the package itself declares."""
    for text in _own_metadata().get_all("Requires-Dist") or ():
        requirement = Requirement(text)
        extra = next((name for name in EXTRAS if f'extra == "{name}"' in str(requirement.marker)), "")
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            found = metadata.version(requirement.name)
            ok = requirement.specifier.contains(found, prereleases=True)
        except (metadata.PackageNotFoundError, InvalidVersion):
            found, ok = "", False
        yield Finding(requirement.name, EXTRAS.get(extra, "everything"), found, str(requirement.specifier) or "any", ok,
                      not extra, f"pip install '{requirement.name}{requirement.specifier}'")


def _own_metadata() -> metadata.PackageMetadata:
    try:
        return metadata.metadata("weft")
    except metadata.PackageNotFoundError:
        raise ToolError("Weft itself is not installed; run: make setup") from None


def _space() -> Finding:
    folder = cache_directory()
    existing = next(path for path in (folder, *folder.parents, Path("/")) if path.exists())
    free = shutil.disk_usage(existing).free
    return Finding("disk space", "simulators", f"{free / 2**30:.1f} GiB", f">={FREE_BYTES / 2**30:.0f} GiB",
                   free >= FREE_BYTES, True, f"free some space in {folder}, or set WEFT_CACHE to another folder")
