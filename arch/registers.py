"""Host-visible registers of the engine, on AXI4-Lite: 32-bit words at these byte offsets.

64-bit values occupy two words, low word first. The RTL register block, the drivers and the reference
page read this table.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from weft.arch.isa import ARGUMENTS, Unit

MAGIC = 0x57454654  # "WEFT"
SEGMENTS = 8  # memory segment registers
NO_UNIT = 0xFF  # unit of a fault outside the units: fetch, or an unknown instruction


class Status(enum.IntEnum):
    """Value of the STATUS register's low byte."""

    IDLE = 0
    RUNNING = 1
    DONE = 2
    ILLEGAL_INSTRUCTION = 3  # unknown opcode, or a field value that the engine cannot execute
    BUS_ERROR = 4  # SLVERR or DECERR on a read or a write
    WATCHDOG = 5  # no instruction retired for WATCHDOG cycles
    ADDRESS_ERROR = 6  # scratchpad address outside the pool


STATUS_MEANING = {
    Status.IDLE: "idle: not started since reset",
    Status.RUNNING: "running",
    Status.DONE: "done",
    Status.ILLEGAL_INSTRUCTION: "illegal instruction",
    Status.BUS_ERROR: "memory bus error",
    Status.WATCHDOG: "watchdog time-out: no instruction retired in the allowed cycles",
    Status.ADDRESS_ERROR: "scratchpad address outside the pool",
}


class Stall(enum.IntEnum):
    """Why a unit that has an instruction made no progress in a cycle; one counter per unit and cause."""

    TOKEN = 0  # waits for another unit
    SCRATCHPAD = 1  # bank conflict, or operands not there yet
    MEMORY = 2  # waits for the memory bus
    OUTPUT = 3  # results cannot be written yet


@dataclass(frozen=True)
class Register:
    name: str
    offset: int  # bytes
    words: int  # 32-bit words
    writable: bool
    doc: str


def _table() -> dict[str, Register]:
    entries: list[tuple[str, int, bool, str]] = [
        ("magic", 1, False, "always 0x57454654"),
        ("control", 1, True, "write 1: start; write 2: stop and reset every unit"),
        ("status", 1, False, "bits 7..0 Status, bits 15..8 Unit at fault or 255"),
        ("fault_index", 1, False, "index of the instruction at fault (dispatch order), else of the next to dispatch"),
        ("fingerprint", 2, False, "EngineConfig fingerprint"),
        ("watchdog", 1, True, "cycles without a retired instruction before the engine stops; 0: never"),
        ("program_length", 1, True, "instructions, END included"),
        ("program_address", 2, True, "memory address of the first instruction, a multiple of 64"),
        *(
            (f"segment{i}", 2, True, f"memory address of segment {i}, a multiple of the word size")
            for i in range(SEGMENTS)
        ),
        *((f"argument{i}", 1, True, f"register {i} of the program, not to be changed while it runs")
          for i in range(ARGUMENTS)),
        ("cycles", 2, False, "cycles from start to done"),
        ("bytes_read", 2, False, "bytes received from memory, instructions included"),
        ("bytes_written", 2, False, "bytes sent to memory"),
    ]
    for unit in Unit:
        name = unit.name.lower()
        entries.append((f"{name}_retired", 1, False, f"instructions completed by the {name} unit"))
        entries.append((f"{name}_busy", 1, False, f"cycles in which the {name} unit made progress"))
        entries += [
            (f"{name}_stall_{s.name.lower()}", 1, False, f"{name} unit: cycles stalled by {s.name.lower()}")
            for s in Stall
        ]
    table, offset = {}, 0
    for name, words, writable, doc in entries:
        if words == 2:
            offset += offset % 8  # 64-bit values are 8-byte aligned
        table[name] = Register(name, offset, words, writable, doc)
        offset += 4 * words
    return table


REGISTERS = _table()
ADDRESS_BITS = 10  # of the AXI4-Lite port
CONTROL_START, CONTROL_RESET = 1, 2

assert max(r.offset + 4 * r.words for r in REGISTERS.values()) <= 1 << ADDRESS_BITS
