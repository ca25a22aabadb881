"""What the dispatcher does with a program: registers, branches, bindings; in front of every unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from weft.arch.errors import EngineFault
from weft.arch.isa import (
    ARGUMENTS,
    REGISTERS,
    ZERO,
    Branch,
    End,
    Instruction,
    Read,
    Scalar,
    ScalarOp,
)

WORD = 1 << 32


def signed(value: int) -> int:
    """The low 32 bits as a two's complement number."""
    return (value + WORD // 2) % WORD - WORD // 2


def scalar(operation: int, a: int, b: int) -> int:
    """Result of a Scalar instruction, in [0, 2**32). Raises ValueError for an unknown operation."""
    match ScalarOp(operation):
        case ScalarOp.ADD:
            result = a + b
        case ScalarOp.SUBTRACT:
            result = a - b
        case ScalarOp.MULTIPLY:
            result = a * b
        case ScalarOp.MINIMUM:
            result = min(signed(a), signed(b))
        case ScalarOp.MAXIMUM:
            result = max(signed(a), signed(b))
        case ScalarOp.SHIFT:
            result = signed(a) >> (b & 31)
    return result % WORD


def dispatched(
    fetch: Callable[[int], Instruction], length: int, arguments: Sequence[int], read: Callable[[int, int], int]
) -> Iterator[tuple[int, Instruction]]:
    """(number in the program, instruction as its unit gets it) in the order of dispatch, BARRIERs and END included.

    `fetch(i)` gives instruction i of `length`, `read(segment, offset)` a 32-bit word of memory. Raises EngineFault
    where the engine would stop, and for a register read before it was written.
    """
    given = [value % WORD for value in arguments]
    registers: list[int | None] = [*given, *[0] * (ARGUMENTS - len(given)), *[None] * (REGISTERS - ARGUMENTS)]
    registers[ZERO] = 0
    index = 0

    def fault(reason: str) -> EngineFault:
        return EngineFault(f"instruction {index}: {reason}; compile the Program again")

    def value(register: int) -> int:
        found = registers[register]
        if found is None:
            raise fault(f"register {register} is read before it was written")
        return found

    def store(register: int, result: int) -> None:
        if not ARGUMENTS <= register < ZERO:
            raise fault(f"register {register} cannot be written")
        registers[register] = result

    while index < length:
        instruction = fetch(index)
        following = index + 1
        if isinstance(instruction, Scalar | Branch):
            b = instruction.value % WORD if instruction.literal else value(instruction.second)
        if isinstance(instruction, Scalar):
            try:
                store(instruction.target, scalar(instruction.operation, value(instruction.first), b))
            except ValueError:
                raise fault(f"scalar operation {instruction.operation} is not defined") from None
        elif isinstance(instruction, Read):
            store(instruction.target, read(instruction.base, (instruction.offset + value(instruction.first)) % WORD))
        elif isinstance(instruction, Branch):
            if signed(value(instruction.first)) < signed(b):
                following = instruction.destination
        else:
            needed = {register: value(register) for register, _, _ in instruction.bindings()}
            yield index, instruction.bound([needed.get(i, 0) for i in range(REGISTERS)]) if needed else instruction
            if isinstance(instruction, End):
                return
        index = following
    raise EngineFault(f"the Program's {length} instructions have no END; compile it again")
