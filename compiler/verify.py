"""Verification of a Program before any Device runs it: bounds, token balance, freedom from races.

What is verified are runs: the instructions as they are dispatched for given arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np

from weft.arch.config import EngineConfig
from weft.arch.control import dispatched
from weft.arch.errors import EngineFault, ModelError
from weft.arch.isa import DESCRIPTOR_FIELDS, Barrier, End, Instruction, Load, Matrix, Unit
from weft.arch.program import Program, Segment
from weft.compiler.footprint import footprint
from weft.compiler.hazards import Hazards

READ_ONLY = (Segment.CONSTANTS, Segment.INPUT)
Memory = Callable[[int, int], int]


def _zeros(segment: int, offset: int) -> int:
    return 0


def verify(program: Program, runs: Sequence[Sequence[int]] = ((),), memory: Memory = _zeros) -> None:
    """Raises ModelError naming the first instruction that is out of bounds, unordered or out of balance.

    Each of `runs` is the arguments of a run from the idle engine; `memory(segment, offset)` gives the words that READ
    instructions find.
    """
    instructions = list(program.decoded())
    if not instructions or not isinstance(instructions[-1], End):
        raise ModelError(f"Program '{program.model}' does not end with END; compile it again")
    sizes = program.segment_bytes

    def read(segment: int, offset: int) -> int:
        size = sizes[segment] if segment < len(sizes) else 0
        if offset % 4 or offset + 4 > size:
            raise EngineFault(f"READ of byte {offset} of segment {segment}, which has {size} bytes")
        return memory(segment, offset)

    for arguments in runs:
        run = _Run(program)
        try:
            for index, instruction in dispatched(instructions.__getitem__, len(instructions), arguments, read):
                run.step(index, instruction)
        except EngineFault as error:
            raise ModelError(f"Program '{program.model}', arguments {list(arguments)}: {error}") from error


class _Run:
    """Follows one run of a Program."""

    def __init__(self, program: Program) -> None:
        self.program, self.config = program, program.config
        lanes, sizes = self.config.lanes, program.segment_bytes
        self.tokens = _Tokens(self.config)
        self.hazards = Hazards(self.config, {s: size // lanes for s, size in enumerate(sizes) if s not in READ_ONLY})
        # What the scratchpad holds of the constants, for the descriptors in them.
        self.shadow = np.zeros((self.config.pool_words, lanes), np.uint8)
        self.constants = np.zeros((-(-sizes[Segment.CONSTANTS] // lanes), lanes), np.uint8)
        self.constants.reshape(-1)[: program.constants.size] = program.constants

    def step(self, index: int, instruction: Instruction) -> None:
        """Checks the next instruction that is dispatched."""

        def fail(reason: str) -> NoReturn:
            raise ModelError(f"Program '{self.program.model}', instruction {index} ({instruction.listing()}): {reason}")

        unit = instruction.unit
        if unit is None:
            if isinstance(instruction, Barrier):
                self.tokens.barrier(fail)
                self.hazards.barrier()
            elif index != len(self.program.instructions) - 1:
                fail("END before the end")
            return
        try:
            touched = footprint(instruction, self.config, _descriptor_offsets(instruction, self.shadow, self.config))
        except ValueError as error:  # an operation that is not defined
            fail(str(error))
        for words, what in ((touched.reads, "reads"), (touched.writes, "writes")):
            if words.size and words.max() >= self.config.pool_words:
                fail(f"{what} scratchpad words up to {words.max()}, the pool has {self.config.pool_words}")
        sizes = self.program.segment_bytes
        for access in (touched.memory_reads, touched.memory_writes):
            if access is not None:
                segment, words = access
                if segment >= len(sizes) or (words.max() + 1) * self.config.lanes > sizes[segment]:
                    fail(f"leaves memory segment {segment}")
        if touched.memory_writes is not None and touched.memory_writes[0] in READ_ONLY:
            fail(f"writes memory segment {touched.memory_writes[0]}, which is the host's")
        if isinstance(instruction, Load) and unit == Unit.LOAD and instruction.base == Segment.CONSTANTS:
            assert touched.memory_reads is not None
            self.shadow[touched.writes] = self.constants[touched.memory_reads[1]]
        self.tokens.step(instruction, fail)
        for other, needed in self.hazards.order(unit, touched).items():
            if self.tokens.known[unit][other] < needed:
                fail(f"may run before instruction {needed} of the {other.name.lower()} unit, which shares words")


def _descriptor_offsets(instruction: Instruction, shadow: np.ndarray, config: EngineConfig) -> list[int]:
    if not isinstance(instruction, Matrix) or instruction.plain:
        return []
    layout = np.dtype(DESCRIPTOR_FIELDS)
    rows = instruction.parameters + (np.arange(instruction.tiles) + 1) * config.tile_parameter_words - 1
    if rows.max() >= config.pool_words:
        return [config.pool_words]
    entries = np.ascontiguousarray(shadow[rows, : layout.itemsize * config.max_writes]).view(layout)
    return [int(entry["offset"]) for entry in entries.ravel() if entry["mask"]]


class _Tokens:
    """Replays waits and signals in program order: what every instruction knows to be finished when it starts."""

    def __init__(self, config: EngineConfig) -> None:
        self.limit = (1 << config.token_bits) - 1
        self.given: dict[tuple[Unit, Unit], list[int]] = {}  # (producer, consumer) -> indices not yet taken
        self.issued = [0] * len(Unit)
        self.known = [[-1] * len(Unit) for _ in Unit]
        self.at_start: list[list[list[int]]] = [[] for _ in Unit]

    def step(self, instruction: Instruction, fail: Callable[[str], NoReturn]) -> None:
        unit = instruction.unit
        assert unit is not None
        known = self.known[unit]
        for other in Unit:
            if instruction.wait >> other & 1:
                queue = self.given.get((other, unit), [])
                if not queue:
                    fail(f"waits for a token of the {other.name.lower()} unit that nobody gives")
                finished = queue.pop(0)
                known[other] = max(known[other], finished)
                for third, index in enumerate(self.at_start[other][finished]):
                    if third != unit:
                        known[third] = max(known[third], index)
        self.at_start[unit].append(list(known))
        for other in Unit:
            if instruction.signal >> other & 1:
                queue = self.given.setdefault((unit, other), [])
                queue.append(self.issued[unit])
                if len(queue) > self.limit:
                    fail(f"gives the {other.name.lower()} unit more than {self.limit} tokens before it takes one")
        self.issued[unit] += 1

    def barrier(self, fail: Callable[[str], NoReturn]) -> None:
        for (producer, consumer), queue in self.given.items():
            if queue:
                fail(f"{len(queue)} tokens that the {producer.name.lower()} unit gave are not taken by the "
                     f"{consumer.name.lower()} unit before")
        self.known = [[count - 1 for count in self.issued] for _ in Unit]
