"""What the units of the functional machine share: its state, faults, access to the scratchpad, the write log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np

from weft.arch.config import EngineConfig
from weft.arch.errors import EngineFault
from weft.arch.isa import SCALE_FIELDS, End, Instruction, Unit
from weft.arch.trace import WriteLog

ADDRESS_MASK = (1 << 16) - 1  # scratchpad address sums are modulo 2**16
NEVER = np.iinfo(np.int64).max  # time of a read of a word that must not be written at all
REMEDY = "the Program is wrong: compile it again, and report the model if that does not help"

ResultHook = Callable[[int, Instruction, np.ndarray], None]


def axes(*counts: int) -> list[np.ndarray]:
    """Index arrays of nested loops, each along an axis of its own: np.ogrid, but fast."""
    return [np.arange(n).reshape([-1 if axis == own else 1 for axis in range(len(counts))])
            for own, n in enumerate(counts)]


class MachineState:
    """See Machine."""

    def __init__(
        self, config: EngineConfig, memory: np.ndarray | None = None, segments: Sequence[int] = (),
        trace: bool = False, on_result: ResultHook | None = None, pool: np.ndarray | None = None,
    ) -> None:
        self.config = config
        self.memory = np.zeros(0, np.uint8) if memory is None else memory
        self.segments = segments
        self.trace = trace
        self.on_result = on_result
        self.pool = np.zeros((config.pool_words, config.lanes), np.uint8) if pool is None else pool
        self.tokens = np.zeros((len(Unit), len(Unit)), np.int64)
        self.held: np.ndarray | None = None  # sums int64 [pixels, C] that a MATRIX with `hold` has left
        self._index = 0
        self._instruction: Instruction = End()
        self._reads: list[tuple[np.ndarray, np.ndarray | int]] = []  # words read, and when in the loop nest
        self._writes: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # address, mask, data

    # Faults

    def _fault(self, reason: str, remedy: str = REMEDY) -> NoReturn:
        raise EngineFault(f"instruction {self._index} ({type(self._instruction).__name__.upper()}): {reason}; {remedy}")

    def _require(self, condition: object, reason: str, remedy: str = REMEDY) -> None:
        if not condition:
            self._fault(reason, remedy)

    def _require_positive(self, *names: str) -> None:
        for name in names:
            self._require(getattr(self._instruction, name) >= 1, f"{name} is 0, must be at least 1")

    # Scratchpad

    def _words(self, address: np.ndarray) -> np.ndarray:
        """Addresses modulo 2**16, all of them inside the pool."""
        address = address & ADDRESS_MASK
        if address.size and (most := int(address.max())) >= self.config.pool_words:
            self._fault(f"scratchpad word {most} is outside the pool of {self.config.pool_words} words")
        return address

    def _read_constants(self, first: int, count: int) -> np.ndarray:
        """`count` words of parameters or weights, uint8 [count, lanes]; they must stay while the instruction runs."""
        self._require(count <= self.config.pool_words, f"reads {count} words of constants, more than the pool holds")
        address = self._words(first + np.arange(count))
        self._reads.append((address, NEVER))
        first &= ADDRESS_MASK
        return self.pool[first : first + count] if first + count <= len(self.pool) else self.pool[address]

    def _scale_fields(self, words: np.ndarray, count: int, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `count` scales in `words` [n, words, lanes]: mult and shift, int64 [n, count], shifts to `most`."""
        scale = np.ascontiguousarray(words).reshape(len(words), -1).view(np.dtype(SCALE_FIELDS))[:, :count]
        mult, shift = scale["mult"].astype(np.int64), scale["shift"].astype(np.int64)
        self._require((shift <= most).all(), f"the shift of a scale is above {most}")
        return mult, shift

    def _write(self, address: np.ndarray, mask: np.ndarray, data: np.ndarray) -> None:
        """Logs writes in loop order: address [n], mask bool [n, lanes] or broadcastable, data [n, lanes]."""
        if self.trace:
            self._writes.append((address, np.broadcast_to(mask, data.shape), data))

    def _write_log(self, tag: int) -> WriteLog:
        lanes = self.config.lanes
        empty = (np.zeros(0, np.int64), np.zeros((0, lanes), bool), np.zeros((0, lanes), np.uint8))
        address, mask, data = (np.concatenate(parts) for parts in zip(*(self._writes or [empty]), strict=True))
        cycle, tags = np.zeros(len(address), np.uint64), np.full(len(address), tag, np.uint16)
        return WriteLog(cycle, address.astype(np.uint16), tags, data, mask)
