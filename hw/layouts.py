"""The RTL view of the instruction fields: Amaranth layouts read from arch/isa.py."""

from __future__ import annotations

from dataclasses import fields

from amaranth.hdl import signed, unsigned
from amaranth.lib import data

from weft.arch.isa import INSTRUCTION_BYTES, OPCODE_BITS, Instruction

INSTRUCTION_BITS = 8 * INSTRUCTION_BYTES


def layout_of(cls: type[Instruction]) -> data.FlexibleLayout:
    """Layout of one instruction class over the whole instruction word; signed fields have signed shapes."""
    low, width = OPCODE_BITS
    members = {"opcode": data.Field(unsigned(width), low)}
    for item in fields(cls):
        shape = signed(item.metadata["width"]) if item.metadata["signed"] else unsigned(item.metadata["width"])
        members[item.name] = data.Field(shape, item.metadata["low"])
    return data.FlexibleLayout(INSTRUCTION_BITS, members)
