"""In-order dispatch: a program's instructions to the queues of their units, tokens between units, faults."""

from __future__ import annotations

from dataclasses import fields
from functools import reduce

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out, connect, flipped

from weft.arch.config import EngineConfig
from weft.arch.isa import ARGUMENTS, INSTRUCTIONS, Instruction, Unit
from weft.arch.registers import NO_UNIT, Status
from weft.hw.control import Control
from weft.hw.fetch import LENGTH_BITS, PLACE, VALUE_BITS
from weft.hw.interfaces import UnitPort
from weft.hw.layouts import INSTRUCTION_BITS, layout_of
from weft.hw.stream import Queue

UNIT_CLASSES: dict[Unit, type[Instruction]] = {cls.unit: cls for cls in INSTRUCTIONS.values() if cls.unit is not None}
IN_FLIGHT = 4  # instructions that a unit may have accepted and not finished
UNIT_BITS = 8

FAULT = data.StructLayout({"status": UNIT_BITS, "unit": UNIT_BITS, "index": LENGTH_BITS})


def used_bits(cls: type[Instruction]) -> int:
    """Bits of the instruction word up to the last field of `cls`, bindings apart, which are executed before."""
    return max(item.metadata["low"] + item.metadata["width"]
               for item in fields(cls) if not item.name.startswith("bind"))


def number_layout(config: EngineConfig) -> data.StructLayout:
    """Of an instruction: its number in the program, and the low bits of that in dispatch order, which tell its age."""
    unfinished = len(Unit) * (config.queue_depth + IN_FLIGHT)
    return data.StructLayout({"index": LENGTH_BITS, "order": (2 * unfinished).bit_length()})


class UnitQueue(wiring.Component):
    """The instructions of one unit, from dispatch to their last token.

    `push` takes instructions (queue_depth of them, 2 cycles to the head). The head is offered to the unit
    when every counter named in its `wait` is `available`, and those are taken (`take`) as the unit accepts.
    `done` of the unit gives tokens (`give`) in the same cycle to the counters named in `signal`; a counter
    without `room` gets its token later. At most IN_FLIGHT instructions are in the unit at a time.

    `token_stall`: the head waits for tokens and the unit reports nothing. `pending`: an instruction is unfinished.
    `oldest` is the oldest of them while `known`, from 2 cycles after the first was pushed on; `latest` is the index
    of the one accepted last.
    """

    def __init__(self, config: EngineConfig, cls: type[Instruction]) -> None:
        self._config, self._cls, self._number = config, cls, number_layout(config)
        super().__init__({
            "push": In(stream.Signature(data.StructLayout({"number": self._number, "word": INSTRUCTION_BITS}))),
            "unit": Out(UnitPort(cls)),
            "available": In(len(Unit)),
            "room": In(len(Unit)),
            "take": Out(len(Unit)),
            "give": Out(len(Unit)),
            "accepted": Out(1),
            "token_stall": Out(1),
            "pending": Out(1),
            "known": Out(1),
            "oldest": Out(self._number),
            "latest": Out(LENGTH_BITS),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        unit, bits = self.unit, used_bits(self._cls)
        held = data.StructLayout({"number": self._number, "word": bits})
        m.submodules.queue = queue = SyncFIFOBuffered(width=held.size, depth=self._config.queue_depth)
        flying = data.StructLayout({"number": self._number, "signal": len(Unit)})
        m.submodules.flight = flight = Queue(flying, IN_FLIGHT)
        first = data.View(held, queue.r_data)
        head, granted = unit.instruction.payload, Signal()
        m.d.comb += [
            self.push.ready.eq(queue.w_rdy),
            queue.w_en.eq(self.push.valid),
            queue.w_data.eq(Cat(self.push.payload.number, self.push.payload.word[:bits])),
            head.eq(first.word),
            granted.eq((head.wait & ~self.available) == 0),
            unit.instruction.valid.eq(queue.r_rdy & granted & flight.i.ready),
            self.accepted.eq(unit.instruction.valid & unit.instruction.ready),
            self.take.eq(Mux(self.accepted, head.wait, 0)),
            queue.r_en.eq(self.accepted),
            flight.i.valid.eq(self.accepted),
            flight.i.payload.number.eq(first.number),
            flight.i.payload.signal.eq(head.signal),
        ]
        with m.If(self.accepted):
            m.d.sync += self.latest.eq(first.number.index)

        finished = Signal(range(IN_FLIGHT + 1))  # done, tokens not given yet
        owed, owes, retires = Signal(len(Unit)), Signal(len(Unit)), Signal()
        m.d.comb += [
            retires.eq((unit.done | (finished != 0)) & (owed == 0)),
            flight.o.ready.eq(retires),
            owes.eq(owed | Mux(retires, flight.o.payload.signal, 0)),
            self.give.eq(owes & self.room),
        ]
        m.d.sync += [owed.eq(owes & ~self.room), finished.eq(finished + unit.done - retires)]

        occupied = unit.busy | unit.stall_scratchpad | unit.stall_memory | unit.stall_output
        m.d.comb += [
            self.token_stall.eq(queue.r_rdy & ~granted & ~occupied),
            self.pending.eq((queue.level != 0) | flight.o.valid),
            self.known.eq(queue.r_rdy | flight.o.valid),
            self.oldest.eq(Mux(flight.o.valid, flight.o.payload.number, first.number)),
        ]
        return m


class Dispatch(wiring.Component):
    """Runs a program: what Control does itself, the rest in program order to the queues of the units; keeps the tokens.

    Driven by `program`, one instruction per cycle at most; an instruction whose queue is full holds up those
    behind it. `jump`, `destination`, `read` and `answer` are for Fetch. A done pulse of one unit lets an instruction
    that waits for it start in the next cycle. END, when all units have finished, gives a pulse on `finished`.

    A fault gives a pulse on `fault_valid`, 1 cycle after its cause, with `fault`: an instruction that Control cannot
    execute, one refused by a unit, an error of the bus or of a scratchpad address, or `watchdog` cycles (0: never)
    without an instruction finished by a unit. The dispatcher does not stop by itself; it is to be reset. `index` is the
    number in the program of the next instruction to dispatch. A refused instruction is the one that the unit accepted
    last; for the other faults in a unit the oldest unfinished one is named.

    Assumes units that pulse `illegal` in the cycle after the instruction was accepted, and programs that cannot
    block on a full counter: a producer waits there for its consumer.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        super().__init__({
            "program": In(stream.Signature(INSTRUCTION_BITS)),
            "length": In(LENGTH_BITS),
            "arguments": In(data.ArrayLayout(VALUE_BITS, ARGUMENTS)),
            "watchdog": In(32),
            "jump": Out(1),
            "destination": Out(LENGTH_BITS),
            "read": Out(stream.Signature(PLACE)),
            "answer": In(stream.Signature(VALUE_BITS, always_ready=True)),
            "fetch_error": In(1),
            "load_error": In(1),
            "store_error": In(1),
            "address_error": In(1),
            **{unit.name.lower(): Out(UnitPort(cls)) for unit, cls in UNIT_CLASSES.items()},
            "index": Out(LENGTH_BITS),
            "finished": Out(1),
            "fault_valid": Out(1),
            "fault": Out(FAULT),
            "start": Out(len(Unit)),
            "retire": Out(len(Unit)),
            "token_stall": Out(len(Unit)),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.control = control = Control()
        connect(m, flipped(self.program), control.program)
        connect(m, control.read, flipped(self.read))
        connect(m, flipped(self.answer), control.answer)
        order, given = Signal(number_layout(self._config)["order"].shape), control.instruction
        queues = [UnitQueue(self._config, UNIT_CLASSES[unit]) for unit in Unit]
        for unit, queue in zip(Unit, queues, strict=True):
            m.submodules[unit.name.lower()] = queue
            connect(m, queue.unit, flipped(getattr(self, unit.name.lower())))
            m.d.comb += [
                self.start[unit].eq(queue.accepted),
                self.retire[unit].eq(queue.unit.done),
                self.token_stall[unit].eq(queue.token_stall),
                queue.push.payload.number.index.eq(control.index),
                queue.push.payload.number.order.eq(order),
                queue.push.payload.word.eq(given.payload),
            ]
        self._count_tokens(m, queues)

        idle, settled = Signal(), Signal()
        m.d.sync += settled.eq(idle)  # the fault of a last access comes as late as this
        m.d.comb += [
            idle.eq(~Cat(queue.pending for queue in queues).any()),
            control.length.eq(self.length),
            control.arguments.eq(self.arguments),
            control.settled.eq(idle & settled),
            self.jump.eq(control.jump),
            self.destination.eq(control.destination),
            self.index.eq(control.index),
            self.finished.eq(control.finished),
        ]
        with m.Switch(data.View(layout_of(Instruction), given.payload).opcode):
            for unit, queue in zip(Unit, queues, strict=True):
                with m.Case(UNIT_CLASSES[unit].opcode):
                    m.d.comb += [queue.push.valid.eq(given.valid), given.ready.eq(queue.push.ready)]
        with m.If(given.valid & given.ready):
            m.d.sync += order.eq(order + 1)

        patience, late = Signal(32), Signal()
        m.d.sync += [patience.eq(patience + 1), late.eq((patience == self.watchdog) & (self.watchdog != 0))]
        with m.If(self.retire.any()):
            m.d.sync += patience.eq(0)

        oldest = _oldest(m, queues, self.index)
        load, store = (queues[unit].oldest.index for unit in (Unit.LOAD, Unit.STORE))
        causes = [
            (control.illegal, Status.ILLEGAL_INSTRUCTION, NO_UNIT, self.index),
            *((queue.unit.illegal, Status.ILLEGAL_INSTRUCTION, unit, queue.latest)
              for unit, queue in zip(Unit, queues, strict=True)),
            (self.fetch_error, Status.BUS_ERROR, NO_UNIT, self.index),
            (self.load_error, Status.BUS_ERROR, Unit.LOAD, load),
            (self.store_error, Status.BUS_ERROR, Unit.STORE, store),
            (self.address_error, Status.ADDRESS_ERROR, *oldest),
            (late, Status.WATCHDOG, *oldest),
        ]
        m.d.sync += self.fault_valid.eq(Cat(cause for cause, *_ in causes).any())
        for cause, status, unit, index in reversed(causes):
            with m.If(cause):
                m.d.sync += [self.fault.status.eq(status), self.fault.unit.eq(unit), self.fault.index.eq(index)]
        return m

    def _count_tokens(self, m: Module, queues: list[UnitQueue]) -> None:
        for producer in Unit:
            for consumer in Unit:
                count = Signal(self._config.token_bits, name=f"tokens_{producer.name}_{consumer.name}".lower())
                gives, takes = queues[producer].give[consumer], queues[consumer].take[producer]
                m.d.sync += count.eq(count + gives - takes)
                m.d.comb += [
                    queues[consumer].available[producer].eq(count != 0),
                    queues[producer].room[consumer].eq(~count.all()),
                ]


def _oldest(m: Module, queues: list[UnitQueue], following: Value) -> tuple[Value, Value]:
    """Unit and index of the oldest unfinished instruction, registered; `following` if there is none."""
    def older(a, b):
        first = a[0] & (~b[0] | (a[2].order - b[2].order)[len(a[2].order) - 1])  # their distance modulo 2**bits
        number = Signal.like(queues[0].oldest)
        m.d.comb += number.eq(Mux(first, a[2], b[2]))
        return a[0] | b[0], Mux(first, a[1], b[1]), number

    known, unit, number = reduce(older, [(queue.known, unit, queue.oldest) for unit, queue in enumerate(queues)])
    oldest_unit, oldest_index = Signal(UNIT_BITS), Signal(LENGTH_BITS)
    m.d.sync += [oldest_unit.eq(Mux(known, unit, NO_UNIT)), oldest_index.eq(Mux(known, number.index, following))]
    return oldest_unit, oldest_index
