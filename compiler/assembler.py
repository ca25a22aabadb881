"""Assembler: instructions in program order, kept in order between the units by tokens.

Every instruction's footprint is compared with who touched the same words last; where another unit did, the
instruction waits for a token that the other one gives. A wait is left out when an earlier one implies it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from weft.arch.config import EngineConfig
from weft.arch.isa import ARGUMENTS, ZERO, Barrier, Branch, Instruction, Scalar, ScalarOp, Unit
from weft.compiler.footprint import Footprint
from weft.compiler.hazards import Hazards


class Assembler:
    """Collects instructions. `rows[i]` and `parts[i]` are Program.first_row and first_part of instruction i."""

    def __init__(self, config: EngineConfig, memory_words: Mapping[int, int]) -> None:
        self.hazards = Hazards(config, memory_words)
        self.instructions: list[Instruction] = []
        self.rows: list[int] = []
        self.parts: list[int] = []
        self._positions: list[list[int]] = [[] for _ in Unit]  # unit -> index in program of its i-th instruction
        self._registers = ARGUMENTS

    def append(self, instruction: Instruction, touched: Footprint | None = None, row: int = 0, part: int = 0) -> None:
        """Adds an instruction; `touched` is what one for a unit reads and writes at most."""
        unit = instruction.unit
        if unit is not None:
            assert touched is not None
            waits = self.hazards.order(unit, touched)
            instruction = replace(instruction, wait=sum(1 << other for other in waits))
            for other, index in waits.items():
                at = self._positions[other][index]
                giver = self.instructions[at]
                self.instructions[at] = replace(giver, signal=giver.signal | 1 << unit)
            self._positions[unit].append(len(self.instructions))
        self.instructions.append(instruction)
        self.rows.append(row)
        self.parts.append(part)

    # -- control

    def register(self) -> int:
        """A register of the program's own."""
        if self._registers == ZERO:
            raise ValueError("all registers are taken")
        self._registers += 1
        return self._registers - 1

    def compute(self, target: int, first: int, operation: ScalarOp, second: int | None = None, *,
                value: int = 0) -> None:
        """register[target] = register[first] operation register[second], or operation `value`."""
        literal = second is None
        self.append(Scalar(operation=operation, target=target, first=first, second=second or 0, literal=literal,
                           value=value))

    def set(self, target: int, value: int) -> None:
        self.compute(target, ZERO, ScalarOp.ADD, value=value)

    def barrier(self) -> None:
        """From here on everything before is known to be finished; where loops begin and end."""
        self.append(Barrier())
        self.hazards.barrier()

    def loop(self) -> int:
        """Begins a loop body: the place for `again`. What the body needs from before is finished by then."""
        self.barrier()
        return len(self.instructions)

    def again(self, start: int, first: int, second: int, independent: bool = False) -> None:
        """Ends a loop body that runs again while register[first] < register[second].

        Rounds that are `independent` of each other may overlap; a barrier then follows the last.
        """
        if not independent:
            self.barrier()
        self.append(Branch(first=first, second=second, destination=start))
        if independent:
            self.barrier()
