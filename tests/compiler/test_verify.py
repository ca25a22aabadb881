"""The verifier: whatever is removed from or added to a Program's synchronization is noticed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.kit.graphs import shuffle_network
from weft.arch.config import load_config
from weft.arch.errors import ModelError
from weft.arch.isa import End, Instruction, Load, Matrix, Unit
from weft.arch.program import Program
from weft.compiler.pipeline import compile_graph
from weft.compiler.verify import verify


@pytest.fixture(scope="module")
def program() -> Program:
    return compile_graph(shuffle_network(), replace(load_config("base"), bank_words=256))


def edited(program: Program, index: int, instruction: Instruction) -> Program:
    rows = program.instructions.copy()
    rows[index] = np.frombuffer(instruction.encode(), np.uint8)
    return replace(program, instructions=rows)


def test_every_dropped_token_is_noticed(program):
    """Without one of its waits, that instruction or a later one runs too early."""
    waiting = [(i, x) for i, x in enumerate(program.decoded()) if x.wait]
    for index, instruction in waiting[::12]:
        lowest = instruction.wait & -instruction.wait
        with pytest.raises(ModelError, match="may run before"):
            verify(edited(program, index, replace(instruction, wait=instruction.wait ^ lowest)))


def test_a_token_nobody_gives(program):
    index, first = next((i, x) for i, x in enumerate(program.decoded()) if x.unit == Unit.LOAD)
    with pytest.raises(ModelError, match="waits for a token of the store unit that nobody gives"):
        verify(edited(program, index, replace(first, wait=1 << Unit.STORE)))


def test_bounds(program):
    index, load = next((i, x) for i, x in enumerate(program.decoded()) if isinstance(x, Load))
    with pytest.raises(ModelError, match="scratchpad words up to"):
        verify(edited(program, index, replace(load, address=program.config.pool_words - 1)))
    with pytest.raises(ModelError, match=f"leaves memory segment {load.base}"):
        verify(edited(program, index, replace(load, offset=1 << 30)))
    index, matrix = next((i, x) for i, x in enumerate(program.decoded()) if isinstance(x, Matrix))
    with pytest.raises(ModelError, match="reads scratchpad words"):
        verify(edited(program, index, replace(matrix, weights=program.config.pool_words - 1)))


def test_end(program):
    with pytest.raises(ModelError, match="does not end with END"):
        verify(replace(program, instructions=program.instructions[:-1]))
    with pytest.raises(ModelError, match="END before the end"):
        verify(edited(program, 0, End()))
