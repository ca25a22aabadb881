"""The reference pages, written from the declarations in arch/: `make reference`, or run this module."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path

from weft.arch import isa, registers
from weft.arch.program import write_atomically

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
NOTE = "<!-- Written by `make reference` from {source}; change that instead. -->\n"


def pages() -> dict[str, str]:
    """File name to text of every generated page."""
    return {"isa.md": isa_page(), "registers.md": registers_page()}


def isa_page() -> str:
    """Instructions with meaning and bit fields."""
    parts = [NOTE.format(source="arch/isa.py"), "# Instruction set\n", _text(isa)]
    common = {item.name for item in fields(isa.Instruction)}
    parts += ["## Fields of every instruction\n", _table("bits", [
        (_bits(*isa.OPCODE_BITS), "opcode", "the instruction"), *_fields(isa.Instruction, set())], "field")]
    for enumeration in (isa.Unit, isa.Opcode, isa.VectorOp, isa.Sampling, isa.RowOp, isa.RowLayout, isa.ScalarOp):
        parts += [f"## {enumeration.__name__}\n", _text(enumeration),
                  _table("value", [(str(item.value), item.name, "") for item in enumeration], "name", last="")]
    for cls in isa.INSTRUCTIONS.values():
        unit = "the dispatcher" if cls.unit is None else f"the {cls.unit.name.lower()} unit"
        parts += [f"## {cls.__name__.upper()}\n", f"Opcode {int(cls.opcode)}, executed by {unit}.\n", _text(cls)]
        if own := _fields(cls, common):
            parts.append(_table("bits", own, "field"))
    return "\n".join(parts)


def registers_page() -> str:
    """Registers, status codes and stall causes."""
    rows = [(f"{item.offset:#05x}", item.name, f"{32 * item.words} bits, {'read, write' if item.writable else 'read'}: "
             f"{item.doc}") for item in registers.REGISTERS.values()]
    meanings = [(str(status.value), status.name, meaning) for status, meaning in registers.STATUS_MEANING.items()]
    return "\n".join([
        NOTE.format(source="arch/registers.py"), "# Registers\n", _text(registers),
        _table("offset", rows, "register"), "## Status\n", _text(registers.Status), _table("value", meanings, "name"),
        "## Stall causes\n", _text(registers.Stall),
        _table("value", [(str(item.value), item.name, "") for item in registers.Stall], "name", last="")])


def _text(item: object) -> str:
    """A docstring as Markdown: its paragraphs, and its indented parts as code."""
    lines = inspect.cleandoc(getattr(item, "__doc__", None) or "").splitlines()
    out, code = [], False
    for number, line in enumerate(lines):
        if set(line) == {"-"} or (number + 1 < len(lines) and lines[number + 1] and set(lines[number + 1]) == {"-"}):
            out += [] if set(line) == {"-"} else [f"## {line}", ""]
            continue
        inside = line.startswith("    ") or (code and not line)
        if inside and not code:
            out.append("```")
        elif code and not inside:
            while not out[-1]:
                out.pop()
            out += ["```", ""]
        code = inside
        out.append(line.removeprefix("    "))
    while out and not out[-1]:
        out.pop()
    return "\n".join([*out, "```"] if code else out) + "\n"


def _bits(low: int, width: int) -> str:
    return str(low) if width == 1 else f"{low + width - 1}..{low}"


def _fields(cls: type[isa.Instruction], skip: set[str]) -> list[tuple[str, str, str]]:
    return [(_bits(item.metadata["low"], item.metadata["width"]), item.name,
             item.metadata["doc"] + (" (signed)" if item.metadata["signed"] else ""))
            for item in sorted(fields(cls), key=lambda item: item.metadata["low"]) if item.name not in skip]


def _table(first: str, rows: list[tuple[str, str, str]], second: str, last: str = "meaning") -> str:
    width = 3 if last else 2
    lines = [(first, second, last)[:width], ("---",) * width, *((a, f"`{b}`", c)[:width] for a, b, c in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    for name, text in pages().items():
        write_atomically(FOLDER / name, text)


if __name__ == "__main__":
    main()
