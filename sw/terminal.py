"""What the command line prints: tables and messages, progress on stderr, JSON where asked, one line per failure."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from weft.arch.errors import ToolError, WeftError
from weft.arch.program import write_atomically

FILE_WIDTH = 200
INTERRUPTED = 130  # the shell's convention for SIGINT


class Terminal:
    """Where a command writes. With JSON on stdout, everything for people goes to stderr."""

    def __init__(self, json_to: str | None = None, quiet: bool = False) -> None:
        self.json_to, self.quiet = json_to, quiet
        self.console = Console(stderr=json_to == "-", quiet=quiet, highlight=False)
        if not self.console.is_terminal:
            self.console.width = FILE_WIDTH  # of a pipe or a file, which nothing folds

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def write(self, text: str) -> None:
        """Text as it is, without a new line, at once."""
        self.console.print(text, end="", markup=False, soft_wrap=True)

    @staticmethod
    def to_json(value: Any) -> str:
        return json.dumps(value, indent=1) + "\n"

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Columns whose name starts with '>' are aligned right."""
        table = Table(title=title or None, title_justify="left", box=None, header_style="dim", pad_edge=False)
        for name in columns:
            table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left",
                             overflow="fold")
        for row in rows:
            table.add_row(*(cell if isinstance(cell, Text) else escape(str(cell)) for cell in row))
        self.console.print(table)

    def result(self, value: Any) -> None:
        """Writes `value` as JSON to the file or stdout that --json names, if it was given."""
        if self.json_to is None:
            return
        text = self.to_json(value)
        path = Path(self.json_to)
        if self.json_to == "-":
            sys.stdout.write(text)
        elif path.exists() and not path.is_file():
            path.write_text(text)  # a pipe or a device must not be replaced by a file
        else:
            write_atomically(path, text)

    @contextmanager
    def progress(self, description: str, total: float | None, unit: str) -> Iterator[Callable[[float], None]]:
        """A bar with rate and remaining time on stderr; yields a function that takes what is done so far."""
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), _Rate(unit),
                   TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), disable=self.quiet, transient=True) as progress:
            task = progress.add_task(description, total=total)

            def done(amount: float) -> None:
                # An estimated total may be exceeded; the bar then stays just short of its end.
                late = total is not None and amount > total
                progress.update(task, completed=amount, total=amount * 1.02 if late else total)

            yield done


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed or 0.0
        return Text(f"{speed:,.0f} {self.unit}/s" if speed >= 10 else f"{speed:.2g} {self.unit}/s", style="dim")


@contextmanager
def reported() -> Iterator[None]:
    """Turns every expected failure into one message on stderr and its exit code. WEFT_DEBUG=1 shows the traceback."""
    try:
        yield
        sys.stdout.flush()  # a full disk shows here at the latest
    except KeyboardInterrupt:
        _fail("interrupted; nothing is left half-written", INTERRUPTED)
    except WeftError as error:
        _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        if (error.name or "weft").startswith("weft"):
            raise  # ours: a defect
        _fail(f"the package '{error.name}' is missing; install it with: pip install 'weft[models]', or run: make setup",
              ToolError.exit_code)
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader went away, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(0) from None
        where = f" {error.filename}" if error.filename else ""
        hint = "; free some space or choose another place" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _drop_stdout()
        _fail(f"cannot use{where or ' the output'}: {error.strerror or error}{hint}", ToolError.exit_code)
    except MemoryError:
        _fail("not enough memory; close other programs or use a smaller model", ToolError.exit_code)


def _fail(message: str, code: int) -> None:
    if os.environ.get("WEFT_DEBUG"):
        raise
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"weft: {message}", markup=False)
    raise typer.Exit(code) from None


def _drop_stdout() -> None:
    """What could not be written must not fail again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
