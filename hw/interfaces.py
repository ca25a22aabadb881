"""Signatures through which the units of the engine meet. Directions are those of the unit that initiates."""

from __future__ import annotations

from amaranth.hdl import unsigned
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out, Signature

from weft.arch.config import EngineConfig
from weft.arch.isa import Instruction
from weft.hw.layouts import layout_of

ADDRESS_BITS = 16  # scratchpad word address
TAG_BITS = 16
READ_LATENCY = 2  # cycles from an accepted scratchpad read request to its data


class ReadPort(Signature):
    """Scratchpad read port, seen from the reading unit.

    A request is accepted in a cycle with `request.valid & request.ready`; its word is on `data` with
    `data_valid` high exactly READ_LATENCY cycles later. Responses cannot be stalled: a reader asks only
    for what it has room for. Requests of one port are answered in order.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__({
            "request": Out(stream.Signature(unsigned(ADDRESS_BITS))),
            "data": In(8 * config.lanes),
            "data_valid": In(1),
        })


def write_layout(config: EngineConfig) -> data.StructLayout:
    """One masked scratchpad write: word address, bytes, one mask bit per byte, tag of the instruction."""
    return data.StructLayout({
        "address": ADDRESS_BITS,
        "data": 8 * config.lanes,
        "mask": config.lanes,
        "tag": TAG_BITS,
    })


class WritePort(Signature):
    """Scratchpad write port, seen from the writing unit.

    A write accepted in some cycle is seen by every read request accepted in a later cycle. `request.valid`
    must not depend on `request.ready`.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__({"request": Out(stream.Signature(write_layout(config)))})


class UnitPort(Signature):
    """How the dispatcher drives a unit, seen from the dispatcher.

    `instruction` is offered once its tokens have been taken; a unit may accept the next one before the
    last is finished. `done` pulses once for each instruction, in order, in the cycle its last write is
    accepted or later, and the unit's writes of an instruction are all accepted before it. The stall outputs
    say why the unit, holding an instruction, made no progress in this cycle (at most one is high; `busy` is
    high when it progressed). `illegal` pulses instead of any work for an instruction the unit cannot
    execute; the engine then stops.
    """

    def __init__(self, cls: type[Instruction]) -> None:
        super().__init__({
            "instruction": Out(stream.Signature(layout_of(cls))),
            "done": In(1),
            "busy": In(1),
            "stall_scratchpad": In(1),
            "stall_memory": In(1),
            "stall_output": In(1),
            "illegal": In(1),
        })
