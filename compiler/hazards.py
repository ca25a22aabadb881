"""Hazards: which earlier instructions an instruction must wait for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from weft.arch.config import EngineConfig
from weft.arch.isa import Unit
from weft.compiler.footprint import Footprint


class Hazards:
    """Who last touched each scratchpad or memory word, and what each unit already knows to be finished."""

    def __init__(self, config: EngineConfig, memory_words: Mapping[int, int]) -> None:
        spaces = {-1: config.pool_words, **memory_words}
        self.writer_unit = {s: np.full(n, -1, np.int8) for s, n in spaces.items()}
        self.writer = {s: np.full(n, -1, np.int32) for s, n in spaces.items()}
        self.reader = {s: np.full((len(Unit), n), -1, np.int32) for s, n in spaces.items()}
        self.issued = [0] * len(Unit)
        self.known: list[list[int]] = [[-1] * len(Unit) for _ in Unit]  # known[u][v]: last finished of v, as u knows
        self.at_start: list[list[list[int]]] = [[] for _ in Unit]

    def order(self, unit: Unit, touched: Footprint) -> dict[Unit, int]:
        """Registers the next instruction of `unit`; the instructions of other units it must wait for, by index."""
        index = self.issued[unit]
        self.issued[unit] += 1
        reads, writes = [(-1, touched.reads)], [(-1, touched.writes)]
        reads += [touched.memory_reads] if touched.memory_reads else []
        writes += [touched.memory_writes] if touched.memory_writes else []
        needed = [-1] * len(Unit)
        for space, words in reads:
            if space in self.writer:
                self._after_writers(space, words, needed)
        for space, words in writes:
            if space in self.writer and len(words):
                self._after_writers(space, words, needed, but=unit)
                for other in Unit:
                    if other != unit:  # a unit reads before it writes what comes later
                        needed[other] = max(needed[other], int(self.reader[space][other, words].max()))
        waits = {}
        known = self.known[unit]
        for other in sorted(Unit, key=lambda u: -needed[u]):
            if needed[other] > known[other]:
                waits[other] = needed[other]
                known[other] = needed[other]
                for third, finished in enumerate(self.at_start[other][needed[other]]):
                    if third != unit:
                        known[third] = max(known[third], finished)
        self.at_start[unit].append(list(known))
        for space, words in reads:
            if space in self.writer:
                self.reader[space][unit, words] = index
        for space, words in writes:
            if space in self.writer:
                self.writer[space][words], self.writer_unit[space][words] = index, unit
        return waits

    def _after_writers(self, space: int, words: np.ndarray, needed: list[int], but: Unit | None = None) -> None:
        owners, indices = self.writer_unit[space][words], self.writer[space][words]
        counts = np.bincount(owners + 1, minlength=len(Unit) + 1)[1:]  # most words have one and the same owner
        for other in np.flatnonzero(counts).tolist():
            if other != but:
                mine = indices if counts[other] == len(owners) else indices[owners == other]
                needed[other] = max(needed[other], int(mine.max()))

    def barrier(self) -> None:
        """From here on every unit knows all instructions before to be finished."""
        self.known = [[count - 1 for count in self.issued] for _ in Unit]
