"""Trace: what an execution did, stamped with cycles. Equal traces mean equal behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from weft.arch.isa import Unit

WRITERS = (Unit.LOAD, Unit.MATRIX, Unit.VECTOR, Unit.ROW)  # units that write the scratchpad


@dataclass
class WriteLog:
    """Scratchpad writes of one unit, in the order in which they took effect. n writes.

    cycle uint64[n] (zeros from a Device without time), address uint16[n], tag uint16[n],
    data uint8[n, lanes], mask bool[n, lanes]; bytes whose mask is false mean nothing.
    """

    cycle: np.ndarray
    address: np.ndarray
    tag: np.ndarray
    data: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.address)


@dataclass
class Trace:
    """Start and retire cycle of every instruction of every unit, and every scratchpad write.

    `start[unit][i]` and `retire[unit][i]` belong to the i-th instruction of that unit in program order,
    cycles counted from the engine's start.
    """

    start: dict[Unit, np.ndarray] = field(default_factory=dict)
    retire: dict[Unit, np.ndarray] = field(default_factory=dict)
    writes: dict[Unit, WriteLog] = field(default_factory=dict)
