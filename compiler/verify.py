"""Verification of a Program before any Device runs it: bounds, token balance, freedom from races."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from weft.arch.config import EngineConfig
from weft.arch.errors import ModelError
from weft.arch.isa import DESCRIPTOR_FIELDS, End, Instruction, Load, Matrix, Unit
from weft.arch.program import Program, Segment
from weft.compiler.emit import Hazards
from weft.compiler.footprint import footprint


def verify(program: Program) -> None:
    """Raises ModelError naming the first instruction that is out of bounds, unordered or out of balance."""
    config, instructions = program.config, list(program.decoded())
    if not instructions or not isinstance(instructions[-1], End):
        raise ModelError(f"Program '{program.model}' does not end with END; compile it again")
    tokens = _Tokens(config)
    shadow = np.zeros((config.pool_words, config.lanes), np.uint8)  # constants, for the descriptors in them
    hazards = Hazards(
        config, {int(s): program.segment_bytes[s] // config.lanes for s in (Segment.ARENA, Segment.OUTPUT)}
    )
    for index, instruction in enumerate(instructions):

        def fail(reason: str, index: int = index, instruction: Instruction = instruction) -> None:
            raise ModelError(f"Program '{program.model}', instruction {index} ({instruction.listing()}): {reason}")

        if instruction.unit is None:
            if index != len(instructions) - 1:
                fail("END before the end")
            continue
        offsets = _descriptor_offsets(instruction, shadow, config)
        touched = footprint(instruction, config, offsets)
        for words, what in ((touched.reads, "reads"), (touched.writes, "writes")):
            if words.size and not 0 <= words.min() <= words.max() < config.pool_words:
                fail(f"{what} scratchpad words up to {words.max()}, the pool has {config.pool_words}")
        for access in (touched.memory_reads, touched.memory_writes):
            if access is not None:
                segment, words = access
                if (
                    segment >= len(program.segment_bytes)
                    or (words.max() + 1) * config.lanes > program.segment_bytes[segment]
                ):
                    fail(f"leaves memory segment {segment}")
        if isinstance(instruction, Load) and instruction.unit == Unit.LOAD and instruction.base == Segment.CONSTANTS:
            source = program.constants.reshape(-1, config.lanes)
            assert touched.memory_reads is not None
            shadow[touched.writes] = source[touched.memory_reads[1]]
        tokens.step(instruction, fail)
        for other, needed in hazards.order(instruction.unit, touched).items():
            if tokens.known[instruction.unit][other] < needed:
                fail(
                    f"may run before instruction {needed} of the {other.name.lower()} unit, which shares words"
                )


def _descriptor_offsets(instruction: Instruction, shadow: np.ndarray, config: EngineConfig) -> list[int]:
    if not isinstance(instruction, Matrix):
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
        self.given: dict[tuple[int, int], list[int]] = {}  # (producer, consumer) -> indices not yet taken
        self.issued = [0] * len(Unit)
        self.known = [[-1] * len(Unit) for _ in Unit]
        self.at_start: list[list[list[int]]] = [[] for _ in Unit]

    def step(self, instruction: Instruction, fail: Callable[[str], None]) -> None:
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
