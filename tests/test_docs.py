"""The documentation: its commands run, its links lead somewhere, its generated pages are current.

A fenced block opened by ```bash is run, line by line, in an empty folder with `weft` on PATH. Lines of a block
opened by ```sh are too slow or change the machine; only the verbs and flags in them are checked.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from weft.sw.cli import app
from weft.sw.reference_pages import FOLDER, pages

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\(([^)#]+)[^)]*\)")


def commands(page: Path, kind: str) -> list[str]:
    return [line for language, text in FENCE.findall(page.read_text()) if language == kind
            for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page, "bash")], ids=lambda page: page.stem)
def test_commands_run(page, tmp_path):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for line in commands(page, "bash"):
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True,
                              timeout=300)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page):
    for line in [*commands(page, "bash"), *commands(page, "sh")]:
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        if words[:1] != ["weft"]:
            continue
        command, rest = typer.main.get_command(app), words[1:]
        while rest and rest[0] in getattr(command, "commands", {}):
            command, rest = command.commands[rest[0]], rest[1:]
        known = {"--help", "-h", *(flag for parameter in command.params for flag in parameter.opts)}
        flags = {word.split("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        assert flags <= known and (not hasattr(command, "commands") or flags), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page}: {target}"


def test_every_page_is_reachable():
    index, seen = ROOT / "docs" / "README.md", set()
    todo = [ROOT / "README.md", index]
    while todo:
        page = todo.pop().resolve()
        if page in seen or page.suffix != ".md" or not page.is_file():
            continue
        seen.add(page)
        todo += [page.parent / target for target in LINK.findall(page.read_text()) if not target.startswith("http")]
    assert {page.resolve() for page in PAGES} <= seen


@pytest.mark.parametrize("name", pages())
def test_reference_pages_are_current(name):
    assert (FOLDER / name).read_text() == pages()[name], "run `make reference`"
