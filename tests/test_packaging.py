"""What a wheel would contain: every module and every data file of every folder."""

import importlib.metadata
import re
import runpy
import tomllib
from pathlib import Path
from unittest import mock

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCE = {".py", ".pyc"}


def package_list() -> dict[str, Path]:
    """Package name to folder, as setup.py declares them."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    arguments = setup.call_args.kwargs
    folders = {}
    for package in arguments["packages"]:
        parent = max((name for name in arguments["package_dir"] if f"{package}.".startswith(f"{name}.")), key=len)
        below = package.removeprefix(parent).strip(".").replace(".", "/")
        folders[package] = ROOT / arguments["package_dir"][parent] / below
    return folders


def test_every_subpackage_is_listed(monkeypatch):
    monkeypatch.chdir(ROOT)
    folders = package_list()
    for package, folder in folders.items():
        assert (folder / "__init__.py").is_file(), package
    ours = {path.parent for top in ("weft", *PYPROJECT_FOLDERS) for path in (ROOT / top).rglob("*.py")}
    assert ours == set(folders.values())


def test_every_data_file_is_listed(monkeypatch):
    monkeypatch.chdir(ROOT)
    listed = set()
    for package, patterns in PYPROJECT["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            listed |= set(package_list()[package].glob(pattern))
    for folder in package_list().values():
        data = {path for path in folder.iterdir() if path.is_file() and path.suffix not in SOURCE
                and not path.name.startswith(".")}
        assert data <= listed, f"not in package-data: {sorted(map(str, data - listed))}"
    data = {path for top in PYPROJECT_FOLDERS for path in (ROOT / top).rglob("*")
            if path.is_file() and path.suffix not in SOURCE and not path.name.startswith(".")}
    assert data <= listed


def test_every_requirement_has_a_tested_version():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {normal(line.split("==")[0]): line.split("==")[1] for line in lines if not line.startswith("#")}
    project = PYPROJECT["project"]
    wanted = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (Requirement(text) for group in wanted for text in group):
        assert normal(requirement.name) in pinned, f"{requirement.name}: run `make constraints`"
        assert requirement.specifier.contains(pinned[normal(requirement.name)], prereleases=True)
    assert not any("+" in line or "/" in line for line in lines if not line.startswith("#"))


def test_the_version_is_said_once():
    import weft

    assert weft.__version__ == PYPROJECT["project"]["version"] == importlib.metadata.version("weft")
    assert f"## {weft.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


PYPROJECT_FOLDERS = ("arch", "models", "compiler", "hw", "sim", "boards", "sw", "reports")
