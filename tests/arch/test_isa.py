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


def bindable(cls) -> dict[str, int]:
    """Names and widths of the fields that a register can be added to."""
    return {} if cls.unit is None else {item.name: item.metadata["width"] for item in fields(cls)
            if not item.metadata["low"] % 16 and item.metadata["width"] <= 32 and not item.name.startswith("bind")}


@st.composite
def bound_instructions(draw):
    """An instruction without bindings, registers for some of its fields, and the values of all registers."""
    cls = draw(st.sampled_from([cls for cls in CLASSES if bindable(cls)]))
    values = {item.name: draw(st.integers(*limits(item))) for item in fields(cls) if not item.name.startswith("bind")}
    names = draw(st.lists(st.sampled_from(sorted(bindable(cls))), max_size=isa.BINDINGS, unique=True))
    registers = {name: draw(st.integers(0, isa.REGISTERS - 1)) for name in names}
    contents = draw(st.lists(st.integers(0, (1 << 32) - 1), min_size=isa.REGISTERS, max_size=isa.REGISTERS))
    for name, register in registers.items():  # a narrow field must not overflow
        width = bindable(cls)[name]
        if width % 16:
            other = draw(st.integers(0, (1 << width) - 1))
            if [*registers.values()].count(register) == 1:
                contents[register] = (other - values[name] % (1 << width)) % (1 << 32)  # may be negative
            else:
                contents[register] = values[name] = 0
    return cls(**values), registers, contents


@given(bound_instructions())
def test_bindings_add_registers_to_fields(drawn):
    instruction, registers, contents = drawn
    bindings = instruction.bind(**registers)
    assert isa.decode(bindings.encode()) == bindings
    low = {item.name: item.metadata["low"] for item in fields(instruction)}
    assert bindings.bindings() == [
        (register, low[name] // 16, 32 if bindable(type(instruction))[name] > 16 else 16)
        for name, register in registers.items()]
    got = bindings.bound(contents)
    assert not got.bindings()
    for item in fields(instruction):
        value, width = getattr(instruction, item.name), item.metadata["width"]
        if item.name in registers:
            value = (value + contents[registers[item.name]]) % (1 << width)
            value -= (item.metadata["signed"] and value >> width - 1) << width
        assert getattr(got, item.name) == value, item.name


@given(bound_instructions())
def test_bindings_may_be_added_one_by_one(drawn):
    instruction, registers, contents = drawn
    together = instruction.bind(**registers)
    for name, register in registers.items():
        instruction = instruction.bind(**{name: register})
    assert instruction == together and instruction.bound(contents) == together.bound(contents)


@pytest.mark.parametrize("instruction, registers, match", [
    (isa.Load(), {"base": 8, "offset": 1, "address": 2, "run": 3, "rows": 4}, "no room to bind base, offset"),
    (isa.Load().bind(offset=1, address=2, run=3), {"rows": 4, "planes": 5}, "no room to bind rows, planes"),
    (isa.Load(), {"tag": 8}, "Load.tag cannot be bound"),
    (isa.Load(), {"offset": 32}, "Load.offset cannot be bound to register 32"),
    (isa.Load().bind(offset=8), {"offset": 9}, "Load.offset cannot be bound to register 9"),
    (isa.Store(), {"mask": 8}, "Store.mask cannot be bound"),
    (isa.Load(), {"bind0": 8}, "Load.bind0 cannot be bound"),
    (isa.Row(), {"blocks": -1}, "Row.blocks cannot be bound to register -1"),
    (isa.Row(), {"operation": 8}, "Row.operation cannot be bound"),
    (isa.Scalar(), {"value": 8}, "Scalar.value cannot be bound"),
])
def test_what_cannot_be_bound(instruction, registers, match):
    with pytest.raises(ValueError, match=match):
        instruction.bind(**registers)


def test_listing_names_bindings():
    assert isa.Load(run=3).bind(offset=8, run=31).listing() == "load run=3 offset+=r8 run+=r31"


def test_every_loop_count_and_address_of_a_unit_can_be_bound():
    """What the compiler varies from run to run."""
    wanted = {isa.Load: ("address", "offset", "run", "rows"), isa.Store: ("rotate", "address", "offset"),
              isa.Matrix: ("rows", "columns", "blocks", "tiles", "source", "target", "scales"),
              isa.Row: ("rows", "columns", "blocks", "length", "constant", "source", "target", "scale", "table")}
    for cls, names in wanted.items():
        assert set(names) <= set(bindable(cls))


def test_description_covers_every_field():
    description = isa.isa_description()
    assert set(description) == {cls.__name__ for cls in CLASSES}
    assert all(set(description[cls.__name__]) == {"opcode", *(item.name for item in fields(cls))} for cls in CLASSES)
