"""Encoding: what is encoded is decoded, and nothing else can be encoded."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.arch import isa

CLASSES = list(isa.INSTRUCTIONS.values())
FIELDS = [(cls, item) for cls in CLASSES for item in fields(cls)]


def limits(item) -> tuple[int, int]:
    width = item.metadata["width"]
    return (-(1 << width - 1), (1 << width - 1) - 1) if item.metadata["signed"] else (0, (1 << width) - 1)


@st.composite
def instructions(draw):
    cls = draw(st.sampled_from(CLASSES))
    return cls(**{item.name: draw(st.integers(*limits(item))) for item in fields(cls)})


@given(instructions())
def test_round_trip(instruction):
    raw = instruction.encode()
    assert len(raw) == isa.INSTRUCTION_BYTES
    assert isa.decode(raw) == instruction
    assert isa.decode(raw).encode() == raw


@pytest.mark.parametrize("cls, item", FIELDS, ids=lambda value: getattr(value, "name", getattr(value, "__name__", "")))
def test_field_limits_and_position(cls, item):
    least, most = limits(item)
    low, width = item.metadata["low"], item.metadata["width"]
    for value in (least, most):
        assert getattr(isa.decode(cls(**{item.name: value}).encode()), item.name) == value
    for value in (least - 1, most + 1):
        with pytest.raises(ValueError, match=f"{cls.__name__}.{item.name} = {value} is outside {least}..{most}"):
            cls(**{item.name: value}).encode()
    changed = int.from_bytes(cls(**{item.name: -1 if least else most}).encode(), "little")
    assert changed ^ int.from_bytes(cls().encode(), "little") == (1 << width) - 1 << low


@pytest.mark.parametrize("cls", CLASSES)
def test_fields_do_not_overlap(cls):
    used = set(range(isa.OPCODE_BITS[0], sum(isa.OPCODE_BITS)))
    for item in fields(cls):
        own = set(range(item.metadata["low"], item.metadata["low"] + item.metadata["width"]))
        assert not own & used and max(own) < 8 * isa.INSTRUCTION_BYTES
        assert item.metadata["doc"]
        used |= own


def test_declarations_that_overlap_are_refused(monkeypatch):
    class Overlapping(isa.Instruction):
        opcode, unit = isa.Opcode.END, None

    from dataclasses import dataclass
    Overlapping.__annotations__ = {"extra": int}
    Overlapping.extra = isa.bits(20, 4, "inside the tag")
    monkeypatch.setitem(isa.INSTRUCTIONS, isa.Opcode.END, dataclass(frozen=True)(Overlapping))
    with pytest.raises(AssertionError, match=r"\.extra overlaps"):
        isa._check_declarations()


@pytest.mark.parametrize("opcode", sorted(set(range(16)) - set(isa.INSTRUCTIONS)))
def test_unknown_opcodes_are_refused(opcode):
    with pytest.raises(ValueError, match=f"unknown opcode {opcode}"):
        isa.decode(bytes([opcode]) + bytes(63))


def test_listing_names_what_is_not_zero():
    assert isa.Load(run=3, tag=7).listing() == "load tag=7 run=3"
    assert isa.End().listing() == "end"


def test_description_covers_every_field():
    description = isa.isa_description()
    assert set(description) == {cls.__name__ for cls in CLASSES}
    assert all(set(description[cls.__name__]) == {"opcode", *(item.name for item in fields(cls))} for cls in CLASSES)
