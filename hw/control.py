"""Sequencing in front of the units: registers, arithmetic, branches, reads of memory, bindings."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from weft.arch.isa import (
    ARGUMENTS,
    BINDING_BITS,
    BINDING_LOW,
    BINDINGS,
    INSTRUCTIONS,
    REGISTERS,
    ZERO,
    Branch,
    Instruction,
    Opcode,
    Read,
    Scalar,
    ScalarOp,
)
from weft.arch.registers import SEGMENTS
from weft.hw.fetch import LENGTH_BITS, PLACE, VALUE_BITS
from weft.hw.layouts import INSTRUCTION_BITS, layout_of

HALF = 16  # bits: what bindings count places in
PLACES = range(BINDING_LOW // HALF)  # behind them are the bindings themselves
REGISTER_BITS = exact_log2(REGISTERS)
FOR_UNITS = [opcode for opcode, cls in INSTRUCTIONS.items() if cls.unit is not None]

BINDING = data.StructLayout({
    "register": REGISTER_BITS, "place": BINDING_BITS - REGISTER_BITS - 2, "wide": 1, "in_force": 1})
SHARED = {Read: ("target", "first"), Branch: ("first", "second", "literal", "value")}  # decoded as fields of Scalar
assert all(layout_of(cls)[name] == layout_of(Scalar)[name] for cls, names in SHARED.items() for name in names)


class Registers(wiring.Component):
    """The dispatcher's registers, in distributed memory: two are read and one is written per cycle.

    `values[i]` is that of register `numbers[i]`, in the same cycle; a value written is read from the next cycle on.
    In the first ARGUMENTS + 1 cycles after reset the arguments and the zero are copied to their registers, then
    `ready` is high. The others keep what they held. Neither arguments nor zero may be written.
    """

    def __init__(self) -> None:
        super().__init__({
            "arguments": In(data.ArrayLayout(VALUE_BITS, ARGUMENTS)),
            "ready": Out(1),
            "numbers": In(unsigned(REGISTER_BITS)).array(2),
            "values": Out(VALUE_BITS).array(2),
            "write": In(1),
            "target": In(unsigned(REGISTER_BITS)),
            "value": In(VALUE_BITS),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.memory = memory = Memory(shape=unsigned(VALUE_BITS), depth=REGISTERS, init=[])
        for number, value in zip(self.numbers, self.values, strict=True):
            port = memory.read_port(domain="comb")
            m.d.comb += [port.addr.eq(number), value.eq(port.data)]
        write, copied = memory.write_port(), Signal(range(ARGUMENTS + 2))
        m.d.comb += self.ready.eq(copied == ARGUMENTS + 1)
        with m.If(self.ready):
            m.d.comb += [write.en.eq(self.write), write.addr.eq(self.target), write.data.eq(self.value)]
        with m.Else():
            m.d.comb += [write.en.eq(1), write.addr.eq(copied)]
            m.d.comb += write.data.eq(self.arguments[copied[:exact_log2(ARGUMENTS)]])
            with m.If(copied == ARGUMENTS):
                m.d.comb += [write.addr.eq(ZERO), write.data.eq(0)]
            m.d.sync += copied.eq(copied + 1)
        return m


class Arithmetic(wiring.Component):
    """The operations of ScalarOp, in the cycle of their operands; MULTIPLY in the next one, if the operands stay.

    `less` compares as signed numbers. The product takes three multipliers of 16 x 16 bits.
    """

    def __init__(self) -> None:
        super().__init__({
            "operation": In(layout_of(Scalar)["operation"].shape),
            "a": In(VALUE_BITS),
            "b": In(VALUE_BITS),
            "less": Out(1),
            "result": Out(VALUE_BITS),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        a, b = self.a, self.b
        parts = [(0, 0), (HALF, 0), (0, HALF)]  # halves of the factors; both high ones do not reach the low 32 bits
        products = [Signal(2 * HALF, name=f"product{number}") for number in range(len(parts))]
        for product, (first, second) in zip(products, parts, strict=True):
            m.d.sync += product.eq(a[first:first + HALF] * b[second:second + HALF])
        low, *high = products
        results = {
            ScalarOp.ADD: a + b,
            ScalarOp.SUBTRACT: a - b,
            ScalarOp.MULTIPLY: low + (sum(high) << HALF),
            ScalarOp.MINIMUM: Mux(self.less, a, b),
            ScalarOp.MAXIMUM: Mux(self.less, b, a),
            ScalarOp.SHIFT: a.as_signed() >> b[:exact_log2(VALUE_BITS)],
        }
        m.d.comb += self.less.eq(a.as_signed() < b.as_signed())
        with m.Switch(self.operation):
            for operation, result in results.items():
                with m.Case(operation):
                    m.d.comb += self.result.eq(result)
        return m


class Control(wiring.Component):
    """Executes the instructions without a unit and binds those for the units, in program order.

    Driven by `program`, which a pulse on `jump` takes to instruction `destination` (see Fetch). `instruction` offers
    the instructions for the units, with their bindings executed. `index` is the number in the program of the
    instruction under way, or else of the next. END gives a pulse on `finished` when `settled` says that the units have
    finished everything; BARRIER waits for the same. `length` and `arguments` must stay.

    `illegal` is high, and the program stands, for an unknown opcode or operation, a write to a register that cannot be
    written, a jump behind the end, a word of no segment or not aligned, and when no instruction is left.

    The first instruction is taken ARGUMENTS + 1 cycles after reset. Cycles that an instruction takes: for a unit 1,
    with bindings 2 and 1 for each of them; SCALAR 2, MULTIPLY 3; BRANCH 2 and, if taken, until Fetch delivers; READ 4
    and until Fetch answers; BARRIER 1 after `settled`.
    """

    def __init__(self) -> None:
        super().__init__({
            "program": In(stream.Signature(INSTRUCTION_BITS)),
            "length": In(LENGTH_BITS),
            "arguments": In(data.ArrayLayout(VALUE_BITS, ARGUMENTS)),
            "jump": Out(1),
            "destination": Out(LENGTH_BITS),
            "read": Out(stream.Signature(PLACE)),
            "answer": In(stream.Signature(VALUE_BITS, always_ready=True)),
            "settled": In(1),
            "instruction": Out(stream.Signature(INSTRUCTION_BITS)),
            "index": Out(LENGTH_BITS),
            "finished": Out(1),
            "illegal": Out(1),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.registers = registers = Registers()
        m.submodules.arithmetic = arithmetic = Arithmetic()
        word, valid, leaves = Signal(INSTRUCTION_BITS), Signal(), Signal()
        given, scalar, read, branch = (data.View(layout_of(cls), word) for cls in (Instruction, Scalar, Read, Branch))
        a, b, less = Signal(VALUE_BITS), Signal(VALUE_BITS), arithmetic.less
        writable, missing, adds, binding = Signal(), Signal(), Signal(), Signal(BINDING)

        with m.If(leaves):
            m.d.sync += [valid.eq(0), self.index.eq(Mux(self.jump, self.destination, self.index + 1))]
        with m.If(self.program.valid & self.program.ready):
            m.d.sync += [valid.eq(1), word.eq(self.program.payload)]
        m.d.sync += missing.eq(~valid & (self.index == self.length))
        m.d.comb += [
            self.program.ready.eq(registers.ready & (~valid | (leaves & ~self.jump))),
            self.instruction.payload.eq(word),
            self.destination.eq(branch.destination),
            self.read.payload.segment.eq(read.base),
            self.read.payload.offset.eq(a),
            self.illegal.eq(missing),
            registers.arguments.eq(self.arguments),
            registers.numbers[0].eq(scalar.first),
            registers.numbers[1].eq(scalar.second),
            registers.target.eq(scalar.target),
            registers.value.eq(arithmetic.result),
            writable.eq((scalar.target >= ARGUMENTS) & (scalar.target != ZERO)),
            arithmetic.a.eq(a),
            arithmetic.b.eq(b),
            arithmetic.operation.eq(Mux(given.opcode == Opcode.READ, ScalarOp.ADD, scalar.operation)),
        ]
        m.d.sync += adds.eq(0)
        with m.If(adds):
            self._add(m, word, binding, a)
        with m.FSM():
            with m.State("DECODE"):
                m.d.sync += [a.eq(registers.values[0]), b.eq(registers.values[1])]
                with m.If(scalar.literal):
                    m.d.sync += b.eq(scalar.value)
                with m.If(valid), m.Switch(given.opcode):
                    with m.Case(*FOR_UNITS):
                        bound = ~self._take_binding(m, word, registers, adds, binding) & ~adds
                        m.d.comb += [self.instruction.valid.eq(bound), leaves.eq(bound & self.instruction.ready)]
                    with m.Case(Opcode.END):
                        m.d.comb += self.finished.eq(self.settled)
                    with m.Case(Opcode.BARRIER):
                        m.d.comb += leaves.eq(self.settled)
                    with m.Case(Opcode.SCALAR):
                        m.d.comb += self.illegal.eq(~writable | (scalar.operation >= len(ScalarOp)))
                        m.next = "EXECUTE"
                    with m.Case(Opcode.READ):
                        m.d.comb += self.illegal.eq(~writable | (read.base >= SEGMENTS))
                        m.d.sync += b.eq(read.offset)
                        m.next = "EXECUTE"
                    with m.Case(Opcode.BRANCH):
                        m.next = "EXECUTE"
                    with m.Default():
                        m.d.comb += self.illegal.eq(1)
                with m.If(self.illegal):
                    m.next = "DECODE"
            with m.State("EXECUTE"), m.Switch(given.opcode):
                with m.Case(Opcode.SCALAR):
                    with m.If(scalar.operation == ScalarOp.MULTIPLY):
                        m.next = "WRITE"
                    with m.Else():
                        m.d.comb += [registers.write.eq(1), leaves.eq(1)]
                        m.next = "DECODE"
                with m.Case(Opcode.BRANCH):
                    with m.If(less & (branch.destination >= self.length)):
                        m.d.comb += self.illegal.eq(1)
                    with m.Else():
                        m.d.comb += [self.jump.eq(less), leaves.eq(1)]
                        m.next = "DECODE"
                with m.Case(Opcode.READ):
                    m.d.sync += a.eq(arithmetic.result)
                    m.next = "ASK"
            with m.State("WRITE"):
                m.d.comb += [registers.write.eq(1), leaves.eq(1)]
                m.next = "DECODE"
            with m.State("ASK"):
                aligned = a[:exact_log2(VALUE_BITS // 8)] == 0
                m.d.comb += [self.illegal.eq(~aligned), self.read.valid.eq(aligned)]
                with m.If(aligned & self.read.ready):
                    m.next = "ANSWER"
            with m.State("ANSWER"):
                m.d.comb += registers.value.eq(self.answer.payload)
                with m.If(self.answer.valid):
                    m.d.comb += [registers.write.eq(1), leaves.eq(1)]
                    m.next = "DECODE"
        return m

    @staticmethod
    def _take_binding(m: Module, word: Signal, registers: Registers, adds: Signal, binding: data.View) -> Value:
        """The first binding in force goes to `binding`, its register is read. Returns whether there is one."""
        items = [data.View(BINDING, word[low:low + BINDING_BITS])
                 for low in range(BINDING_LOW, BINDING_LOW + BINDINGS * BINDING_BITS, BINDING_BITS)]
        for number, item in enumerate(items):
            with m.If(item.in_force) if number == 0 else m.Elif(item.in_force):
                m.d.comb += registers.numbers[0].eq(item.register)
                m.d.sync += [adds.eq(1), binding.eq(item), item.in_force.eq(0)]
        return Cat(item.in_force for item in items).any()

    @staticmethod
    def _add(m: Module, word: Signal, binding: data.View, value: Signal) -> None:
        """Adds `value` to the halves of `word` that `binding` names."""
        part, total = Signal(2 * HALF), Signal(2 * HALF)
        m.d.comb += total.eq(part + value)
        with m.Switch(binding.place):
            for place in PLACES:
                low, high = (word[HALF * number:][:HALF] for number in (place, place + 1))
                with m.Case(place):
                    m.d.comb += part.eq(Cat(low, high))
                    m.d.sync += low.eq(total[:HALF])
                    if place + 1 in PLACES:
                        with m.If(binding.wide):
                            m.d.sync += high.eq(total[HALF:])
