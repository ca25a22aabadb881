"""The import directions of the architecture: which folder may import which."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EVERYTHING = {"arch", "models", "compiler", "hw", "sim", "boards", "sw", "reports"}
MAY_IMPORT = {
    "arch": set(),
    "models": {"arch"},
    "compiler": {"arch"},
    "hw": {"arch"},
    "sim": {"arch", "hw"},
    "boards": {"arch", "hw"},
    "reports": {"arch"},
    "sw": EVERYTHING,
}
HEAVY = {"torch", "brevitas", "onnx", "amaranth", "matplotlib"}  # never at the command line's start
LIGHT = ("sw/cli.py", "sw/terminal.py", "sw/devices.py", "sw/doctor.py")


def imports(path: Path, top_level: bool = False) -> set[str]:
    """Dotted names of the modules that a file imports; with `top_level`, those that importing it loads."""
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_it_may(folder):
    for path in (ROOT / folder).rglob("*.py"):
        used = {name.split(".")[1] for name in imports(path) if name.startswith("weft.")}
        forbidden = (used & EVERYTHING) - MAY_IMPORT[folder] - {folder}
        assert not forbidden, f"{path.relative_to(ROOT)} imports {', '.join(sorted(forbidden))}"


def test_the_table_covers_every_folder():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"weft", "tests"} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", LIGHT)
def test_the_command_line_starts_without_heavy_modules(path):
    assert not {name.split(".")[0] for name in imports(ROOT / path, top_level=True)} & HEAVY


def test_the_contract_needs_numpy_only():
    used = {name.split(".")[0] for path in (ROOT / "arch").rglob("*.py") for name in imports(path)}
    assert not used & HEAVY
