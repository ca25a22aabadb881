"""The dispatcher against a tiny interpreter, and where it stops."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.arch.control import dispatched, scalar, signed
from weft.arch.errors import EngineFault
from weft.arch.isa import (
    ARGUMENTS,
    REGISTERS,
    ZERO,
    Barrier,
    Branch,
    End,
    Instruction,
    Load,
    Read,
    Row,
    Scalar,
    ScalarOp,
)

WORD = 1 << 32
EDGES = (0, 1, 2, 31, 32, 1 << 31, (1 << 31) - 1, WORD - 1, WORD - 5, 0xDEADBEEF)
words = st.one_of(st.sampled_from(EDGES), st.integers(0, WORD - 1))
STEPS = 300  # programs that run longer are cut


def memory(segment: int, offset: int) -> int:
    return (offset * 2654435761 + segment * 97) % WORD


class Interpreter:
    """Python integers, a list of registers, a program counter."""

    def __init__(self, arguments: list[int]) -> None:
        self.registers = (arguments + [0] * ARGUMENTS)[:ARGUMENTS] + [None] * (REGISTERS - ARGUMENTS)
        self.registers[ZERO] = 0

    def get(self, register: int) -> int:
        value = self.registers[register]
        if value is None:
            raise EngineFault("read before written")
        return value

    def put(self, register: int, value: int) -> None:
        if register < ARGUMENTS or register == ZERO:
            raise EngineFault("read only")
        self.registers[register] = value % WORD

    def run(self, code: list[Instruction]) -> list[tuple[int, Instruction]]:
        done, counter = [], 0
        for _ in range(STEPS):
            if counter >= len(code):
                raise EngineFault("no end")
            i, here = code[counter], counter
            counter += 1
            if isinstance(i, Scalar):
                a = self.get(i.first)
                b = i.value % WORD if i.literal else self.get(i.second)
                sa, sb = (v - WORD if v >= WORD // 2 else v for v in (a, b))
                self.put(i.target, [a + b, a - b, a * b, min(sa, sb), max(sa, sb), sa >> b % 32][i.operation])
            elif isinstance(i, Read):
                self.put(i.target, memory(i.base, (i.offset + self.get(i.first)) % WORD))
            elif isinstance(i, Branch):
                a = self.get(i.first)
                b = i.value % WORD if i.literal else self.get(i.second)
                sa, sb = (v - WORD if v >= WORD // 2 else v for v in (a, b))
                counter = i.destination if sa < sb else counter
            else:
                values = [self.get(register) for register, _, _ in i.bindings()]
                if isinstance(i, Load) and values:
                    i = Load(base=i.base, offset=(i.offset + values[0]) % WORD, rows=1, planes=1,
                             address=(i.address + values[1]) % (1 << 16), run=(i.run + values[2]) % (1 << 16))
                done.append((here, i))
                if isinstance(i, End):
                    return done
        return done


@st.composite
def programs(draw) -> list[Instruction]:
    """Straight-line pieces, reads, branches anywhere; the registers in use are mostly written before."""
    registers = st.sampled_from([0, 1, 7, 8, 9, 10, 11, ZERO])
    targets = st.sampled_from([8, 9, 10, 11])
    code: list[Instruction] = [Scalar(target=r, first=ZERO, literal=1, value=signed(draw(words))) for r in (8, 9, 10)]
    length = draw(st.integers(1, 12))
    for _ in range(length):
        match draw(st.integers(0, 5)):
            case 0 | 1:
                code.append(Scalar(operation=draw(st.sampled_from(list(ScalarOp))), target=draw(targets),
                                   first=draw(registers), second=draw(registers), literal=draw(st.integers(0, 1)),
                                   value=signed(draw(words))))
            case 2:
                code.append(Read(target=draw(targets), first=draw(registers), base=draw(st.integers(0, 7)),
                                 offset=draw(words)))
            case 3:
                code.append(Branch(first=draw(registers), second=draw(registers), literal=draw(st.integers(0, 1)),
                                   value=signed(draw(words)), destination=draw(st.integers(0, length + 5))))
            case 4:
                code.append(draw(st.sampled_from([Barrier(), Row(tag=3), Load(run=1)])))
            case 5:
                load = Load(base=1, offset=draw(words), address=draw(st.integers(0, 65535)), run=1, rows=1, planes=1)
                code.append(load.bind(offset=draw(registers), address=draw(registers), run=draw(registers)))
    return [*code, End()]


def taken(code: list[Instruction], arguments: list[int]) -> tuple[list, bool]:
    """What is dispatched, at most as many as the interpreter's steps allow, and whether it ends in a fault."""
    found = []
    budget = STEPS

    def fetch(index: int) -> Instruction:
        nonlocal budget
        if not budget:
            raise StopAsyncIteration
        budget -= 1
        return code[index]

    try:
        for item in dispatched(fetch, len(code), arguments, memory):
            found.append(item)
    except EngineFault:
        return found, True
    except StopAsyncIteration:
        pass
    return found, False


@settings(max_examples=400, deadline=None)
@given(programs(), st.lists(words, max_size=ARGUMENTS))
def test_random_programs(code, arguments):
    try:
        want, fault = Interpreter(list(arguments)).run(code), False
    except EngineFault:
        want, fault = None, True
    got, stopped = taken(code, arguments)
    assert stopped == fault
    if want is not None:
        assert got == want


@given(words, words)
def test_scalar_operations(a, b):
    sa, sb = signed(a), signed(b)
    assert -(1 << 31) <= sa < 1 << 31 and sa % WORD == a
    assert scalar(ScalarOp.ADD, a, b) == (a + b) % WORD and scalar(ScalarOp.SUBTRACT, a, b) == (a - b) % WORD
    assert scalar(ScalarOp.MULTIPLY, a, b) == sa * sb % WORD  # the low half is the same for either sign
    assert signed(scalar(ScalarOp.MINIMUM, a, b)) == min(sa, sb)
    assert signed(scalar(ScalarOp.MAXIMUM, a, b)) == max(sa, sb)
    assert signed(scalar(ScalarOp.SHIFT, a, b)) == sa >> (b & 31)


def run(*code: Instruction, arguments: tuple[int, ...] = ()) -> list[tuple[int, Instruction]]:
    return list(dispatched(code.__getitem__, len(code), arguments, memory))


def test_a_loop():
    """Bound fields follow the register of the loop; the bindings themselves are gone."""
    code = (Scalar(target=8, first=ZERO, literal=1, value=3), Load(run=1, offset=64).bind(offset=8), Barrier(),
            Scalar(target=8, first=8, literal=1, value=2), Branch(first=8, second=1, destination=1), End())
    assert run(*code, arguments=(0, 8)) == [
        (1, Load(run=1, offset=67)), (2, Barrier()), (1, Load(run=1, offset=69)), (2, Barrier()),
        (1, Load(run=1, offset=71)), (2, Barrier()), (5, End())]
    assert run(*code, arguments=(0, -1 % WORD))[-1] == (5, End())  # once, -1 being less than 5


def test_arguments_and_zero_are_read_only():
    for target in (*range(ARGUMENTS), ZERO):
        with pytest.raises(EngineFault, match=f"instruction 1: register {target} cannot be written"):
            run(Barrier(), Scalar(target=target, first=0, second=0), End())
        with pytest.raises(EngineFault, match=f"instruction 0: register {target} cannot be written"):
            run(Read(target=target), End())
    assert run(Load(run=7).bind(run=0), End(), arguments=(3,))[0] == (0, Load(run=10))
    assert run(Load(run=7).bind(run=5), End(), arguments=(3,))[0] == (0, Load(run=7))  # not given: 0


@pytest.mark.parametrize("code", [
    (Scalar(target=8, first=9),), (Scalar(target=8, first=0, second=9),), (Branch(first=9),),
    (Branch(first=0, second=9),), (Read(target=8, first=9),), (Load().bind(offset=9),)])
def test_registers_must_be_written_first(code):
    with pytest.raises(EngineFault, match="instruction 0: register 9 is read before it was written; compile"):
        run(*code, End())


def test_faults_of_the_program():
    with pytest.raises(EngineFault, match="instruction 0: scalar operation 6 is not defined"):
        run(Scalar(operation=6, target=8), End())
    with pytest.raises(EngineFault, match="2 instructions have no END"):
        run(Barrier(), Load())
    with pytest.raises(EngineFault, match="no END"):  # a branch behind the last instruction
        run(Branch(first=ZERO, literal=1, value=1, destination=99), End())
    assert run(Branch(first=ZERO, literal=1, value=0, destination=99), End()) == [(1, End())]
