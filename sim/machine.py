"""Machine: architectural state and the effect of every instruction on it, as the loop nests of `arch.isa` say.

One method per instruction class, each a whole instruction in array operations. Instructions run in program
order; there is no time. Whatever the engine could not execute, or would execute in a way that depends on
its pipelining, is an EngineFault that names the instruction.
"""

from __future__ import annotations

import numpy as np

from weft.arch.isa import Instruction, Load, Matrix, Row, Store, Unit, Vector
from weft.arch.trace import WRITERS, WriteLog
from weft.sim.machine_matrix import MatrixUnit
from weft.sim.machine_row import RowUnit
from weft.sim.machine_state import axes
from weft.sim.machine_vector import VectorUnit


class Machine(MatrixUnit, VectorUnit, RowUnit):
    """Scratchpad, token counters and memory of one engine, and the sums that its matrix unit holds.

    `pool` is uint8 [pool_words, lanes], `tokens[a, b]` the counter from unit a to unit b, `memory` uint8 [bytes],
    `segments` the byte addresses in the segment registers. With `trace`, `step` returns the scratchpad writes
    of the instruction in ISA loop order. `on_result(index, instruction, codes)` is called with the codes (int64)
    of each compute instruction before they are written:

        MATRIX [rows, columns, tiles*C], but for one with `hold`
        VECTOR [rows, columns, blocks*lanes], its COLUMNS [rows, columns, taps, blocks*lanes]
        ROW    [rows, columns, blocks*lanes], its ARGMAX [rows, columns, 2]: the greatest element and its number

    All reads of an instruction precede its writes; where that would differ from the loop nest (an instruction
    that reads a word it has written) the instruction is a fault, because the engine's pipeline decides the result.

    Instructions of the dispatcher have no effect here: see `arch.control`.
    """

    def step(self, index: int, instruction: Instruction) -> WriteLog | None:
        """Executes one instruction. Returns its scratchpad writes when tracing. Raises EngineFault."""
        self._index, self._instruction = index, instruction
        self._reads.clear()
        self._writes.clear()
        self._take_tokens(instruction)
        match instruction:
            case Store():
                self._store(instruction)
            case Load():
                self._load(instruction)
            case Matrix():
                self._matrix(instruction)
            case Vector():
                self._vector(instruction)
            case Row():
                self._row(instruction)
        if instruction.unit is not None:
            for other in Unit:
                self.tokens[instruction.unit, other] += instruction.signal >> other & 1
        return self._write_log(instruction.tag) if self.trace and instruction.unit in WRITERS else None

    def _take_tokens(self, instruction: Instruction) -> None:
        own = instruction.unit
        if own is None:
            self._require(not (instruction.wait or instruction.signal),
                          f"{type(instruction).__name__.upper()} has no unit and no tokens")
            return
        for other in Unit:
            if instruction.wait >> other & 1:
                self._require(
                    self.tokens[other, own] > 0,
                    f"waits for a token from {other.name} that no earlier instruction has given: the engine would hang")
                self.tokens[other, own] -= 1

    # LOAD and STORE

    def _transfer(self, i: Load) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scratchpad words [n], memory words [n] and the memory as words [m, lanes], in loop order."""
        self._require_positive("run", "rows", "planes")
        size = self.config.word_bytes
        self._require(i.base < len(self.segments), f"segment register {i.base} is not set")
        start = self.segments[i.base]
        for name, value in (("offset", i.offset), ("row_bytes", i.row_bytes), ("plane_bytes", i.plane_bytes),
                            ("segment address", start)):
            self._require(value % size == 0, f"{name} {value} is not a multiple of the word size {size}")
        last = start + i.offset + (i.planes - 1) * i.plane_bytes + (i.rows - 1) * i.row_bytes + i.run * size
        self._require(last <= len(self.memory), f"touches memory up to byte {last}, memory ends at {len(self.memory)}")
        plane, row, word = axes(i.planes, i.rows, i.run)
        pool = self._words(i.address + plane * i.plane_words + row * i.row_words + word).ravel()
        memory = (start + i.offset + plane * i.plane_bytes + row * i.row_bytes) // size + word
        return pool, memory.ravel(), self.memory[: len(self.memory) // size * size].reshape(-1, size)

    def _load(self, i: Load) -> None:
        pool, source, memory = self._transfer(i)
        data = memory[source]
        self.pool[pool] = data
        self._write(pool, np.ones(1, bool), data)

    def _store(self, i: Store) -> None:
        pool, target, memory = self._transfer(i)
        self._require(not i.mask >> self.config.lanes, f"mask names a lane beyond {self.config.lanes - 1}")
        self._require(i.rotate < self.config.lanes, f"rotate {i.rotate} is not below {self.config.lanes} lanes")
        lanes = np.flatnonzero([i.mask >> lane & 1 for lane in range(self.config.lanes)])
        lanes = (lanes + i.rotate) % self.config.lanes
        memory[target[:, None], lanes] = self.pool[pool[:, None], lanes]
