"""The verifier: whatever is removed from or added to a Program's synchronization is noticed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.kit.graphs import shuffle_network
from tests.kit.looped import MOST, ROWS, Looped
from weft.arch.config import load_config
from weft.arch.errors import ModelError
from weft.arch.isa import (
    ZERO,
    Barrier,
    End,
    Instruction,
    Load,
    Matrix,
    Read,
    Row,
    Scalar,
    ScalarOp,
    Store,
    Unit,
)
from weft.arch.program import Program, Segment
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


# Programs with registers and loops

RUNS = ((0, 1), (0, MOST), (3, 5))


@pytest.fixture(scope="module")
def looped() -> Program:
    return Looped.random(load_config("test")).program()


def places(program: Program, kind: type) -> list[tuple[int, Instruction]]:
    return [(i, x) for i, x in enumerate(program.decoded()) if type(x) is kind]


def test_loops(looped):
    verify(looped, RUNS)
    verify(looped, RUNS, lambda segment, offset: offset // 4 % ROWS)


def test_what_arguments_reach(looped):
    verify(looped, [(MOST - 1, 1)])
    with pytest.raises(ModelError, match=rf"arguments \[{MOST}, 1\]: .*READ of byte {4 * MOST} of segment 2"):
        verify(looped, [(0, 1), (MOST, 1)])
    with pytest.raises(ModelError, match="leaves memory segment 0"):  # a row that the table does not have
        verify(looped, [(0, 1)], lambda segment, offset: 99)
    index, store = places(looped, Store)[0]
    with pytest.raises(ModelError, match="leaves memory segment 3"):
        verify(edited(looped, index, replace(store, offset=64)), [(0, 1), (MOST - 1, 1)])
    index, read = places(looped, Read)[0]
    with pytest.raises(ModelError, match="READ of byte 2 of segment 2"):
        verify(edited(looped, index, replace(read, offset=2)), RUNS)


def test_registers(looped):
    index, read = places(looped, Read)[0]
    with pytest.raises(ModelError, match="register 30 is read before it was written"):
        verify(edited(looped, index, replace(read, first=30)), RUNS)
    with pytest.raises(ModelError, match="register 3 cannot be written"):
        verify(edited(looped, index, replace(read, target=3)), RUNS)


def test_every_dropped_token_of_a_loop_is_noticed(looped):
    for index, instruction in enumerate(looped.decoded()):
        for other in Unit:
            if instruction.wait >> other & 1:
                with pytest.raises(ModelError, match=r"may run before|are not taken"):
                    verify(edited(looped, index, replace(instruction, wait=instruction.wait ^ 1 << other)), RUNS)


def test_rounds_need_the_barrier(looped):
    """Without the barriers around the branch, a round overlaps the one before: loads come too early."""
    barriers = [index for index, _ in places(looped, Barrier)]
    assert len(barriers) == 2
    idle = Scalar(operation=ScalarOp.ADD, target=30, first=ZERO, second=ZERO)
    with pytest.raises(ModelError, match=r"load .*may run before instruction 0 of the row unit"):
        verify(edited(looped, barriers[1], idle), [(0, 2)])
    verify(edited(looped, barriers[1], idle), [(0, 1)])


def test_tokens_left_at_a_barrier(looped):
    index, matrix = places(looped, Matrix)[0]
    with pytest.raises(ModelError, match="1 tokens that the matrix unit gave are not taken by the vector unit"):
        verify(edited(looped, index, replace(matrix, signal=matrix.signal | 1 << Unit.VECTOR)), RUNS)


def test_memory_of_the_host(looped):
    index, store = places(looped, Store)[0]
    with pytest.raises(ModelError, match="writes memory segment 0, which is the host's"):
        verify(edited(looped, index, replace(store, base=0)), RUNS)
    index, row = places(looped, Row)[0]
    with pytest.raises(ModelError, match="12 is not a valid RowOp"):
        verify(edited(looped, index, replace(row, operation=12)), RUNS)


@pytest.mark.parametrize("segment", [Segment.ARENA, Segment.OUTPUT, Segment.CACHE])
def test_races_in_memory(segment):
    """A load of what was stored waits for the store; so does a store over what is loaded."""
    config = load_config("test")
    transfer = {"base": int(segment), "run": 4, "rows": 1, "planes": 1}
    store = Store(**transfer, address=0, mask=1)
    for first, second in ((store, Load(**transfer, address=100)), (Load(**transfer, address=100), store)):
        def program(signal: int, wait: int, first=first, second=second) -> Program:
            code = [replace(first, signal=signal << second.unit), replace(second, wait=wait << first.unit), End()]
            return Program(
                config=config, fingerprint=config.fingerprint, model="memory",
                instructions=np.array([np.frombuffer(i.encode(), np.uint8) for i in code]),
                constants=np.zeros(0, np.uint8), first_row=np.zeros(3, np.int32), first_part=np.zeros(3, np.int32),
                segment_bytes=(0, 128, 0, 128, 128), inputs=(), outputs=(), layers=())

        verify(program(1, 1))
        with pytest.raises(ModelError, match="may run before instruction 0"):
            verify(program(0, 0))
