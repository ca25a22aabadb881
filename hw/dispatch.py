"""In-order dispatch: instructions to the queues of their units, tokens between units, faults."""

from __future__ import annotations

from dataclasses import fields
from functools import reduce

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out, connect, flipped

from weft.arch.config import EngineConfig
from weft.arch.isa import INSTRUCTIONS, Instruction, Opcode, Unit
from weft.arch.registers import NO_UNIT, Status
from weft.hw.fetch import LENGTH_BITS
from weft.hw.interfaces import UnitPort
from weft.hw.layouts import INSTRUCTION_BITS, layout_of
from weft.hw.stream import Queue

UNIT_CLASSES: dict[Unit, type[Instruction]] = {cls.unit: cls for cls in INSTRUCTIONS.values() if cls.unit is not None}
IN_FLIGHT = 4  # instructions that a unit may have accepted and not finished
UNIT_BITS = 8

NUMBERED = data.StructLayout({"index": LENGTH_BITS, "word": INSTRUCTION_BITS})
FLIGHT = data.StructLayout({"index": LENGTH_BITS, "signal": len(Unit)})
FAULT = data.StructLayout({"status": UNIT_BITS, "unit": UNIT_BITS, "index": LENGTH_BITS})


def used_bits(cls: type[Instruction]) -> int:
    """Bits of the instruction word up to the last field of `cls`."""
    return max(item.metadata["low"] + item.metadata["width"] for item in fields(cls))


class UnitQueue(wiring.Component):
    """The instructions of one unit, from dispatch to their last token.

    `push` takes instructions (queue_depth of them, 2 cycles to the head). The head is offered to the unit
    when every counter named in its `wait` is `available`, and those are taken (`take`) as the unit accepts.
    `done` of the unit gives tokens (`give`) in the same cycle to the counters named in `signal`; a counter
    without `room` gets its token later. At most IN_FLIGHT instructions are in the unit at a time.

    `token_stall`: the head waits for tokens and the unit reports nothing. `oldest` is the index of the oldest
    unfinished instruction while `pending`, `latest` that of the one accepted last.
    """

    def __init__(self, config: EngineConfig, cls: type[Instruction]) -> None:
        self._config, self._cls = config, cls
        super().__init__({
            "push": In(stream.Signature(NUMBERED)),
            "unit": Out(UnitPort(cls)),
            "available": In(len(Unit)),
            "room": In(len(Unit)),
            "take": Out(len(Unit)),
            "give": Out(len(Unit)),
            "accepted": Out(1),
            "token_stall": Out(1),
            "pending": Out(1),
            "oldest": Out(LENGTH_BITS),
            "latest": Out(LENGTH_BITS),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        unit, bits = self.unit, used_bits(self._cls)
        m.submodules.queue = queue = SyncFIFOBuffered(width=LENGTH_BITS + bits, depth=self._config.queue_depth)
        m.submodules.flight = flight = Queue(FLIGHT, IN_FLIGHT)
        index, word = queue.r_data[:LENGTH_BITS], queue.r_data[LENGTH_BITS:]
        head, granted = unit.instruction.payload, Signal()
        m.d.comb += [
            self.push.ready.eq(queue.w_rdy),
            queue.w_en.eq(self.push.valid),
            queue.w_data.eq(Cat(self.push.payload.index, self.push.payload.word[:bits])),
            head.eq(word),
            granted.eq((head.wait & ~self.available) == 0),
            unit.instruction.valid.eq(queue.r_rdy & granted & flight.i.ready),
            self.accepted.eq(unit.instruction.valid & unit.instruction.ready),
            self.take.eq(Mux(self.accepted, head.wait, 0)),
            queue.r_en.eq(self.accepted),
            flight.i.valid.eq(self.accepted),
            flight.i.payload.index.eq(index),
            flight.i.payload.signal.eq(head.signal),
        ]
        with m.If(self.accepted):
            m.d.sync += self.latest.eq(index)

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
            self.oldest.eq(Mux(flight.o.valid, flight.o.payload.index, index)),
        ]
        return m


class Dispatch(wiring.Component):
    """Hands instructions in program order to the queues of their units and keeps the token counters.

    Driven by `program`, one instruction per cycle at most; an instruction whose queue is full holds up those
    behind it. A done pulse of one unit lets an instruction that waits for it start in the next cycle. END,
    when all units have finished, gives a pulse on `finished`.

    A fault gives a pulse on `fault_valid`, 1 cycle after its cause, with `fault`: unknown opcode or no END within
    `length` instructions, an instruction refused by a unit, an error of the bus or of a scratchpad address, or
    `watchdog` cycles (0: never) without an instruction finished. The dispatcher does not stop by itself; it is
    to be reset. `index` is the index of the next instruction to dispatch. A refused instruction is the one
    that the unit accepted last; for the other faults in a unit the oldest unfinished one is named.

    Assumes units that pulse `illegal` in the cycle after the instruction was accepted, and programs that cannot
    block on a full counter: a producer waits there for its consumer.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        super().__init__({
            "program": In(stream.Signature(INSTRUCTION_BITS)),
            "length": In(LENGTH_BITS),
            "watchdog": In(32),
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
        queues = [UnitQueue(self._config, UNIT_CLASSES[unit]) for unit in Unit]
        for unit, queue in zip(Unit, queues, strict=True):
            m.submodules[unit.name.lower()] = queue
            connect(m, queue.unit, flipped(getattr(self, unit.name.lower())))
            m.d.comb += [
                self.start[unit].eq(queue.accepted),
                self.retire[unit].eq(queue.unit.done),
                self.token_stall[unit].eq(queue.token_stall),
                queue.push.payload.index.eq(self.index),
                queue.push.payload.word.eq(self.program.payload),
            ]
        self._count_tokens(m, queues)

        opcode = data.View(layout_of(Instruction), self.program.payload).opcode
        unknown, idle, settled, missing = Signal(), Signal(), Signal(), Signal()
        m.d.sync += settled.eq(idle)  # the fault of a last access comes as late as this
        m.d.comb += idle.eq(~Cat(queue.pending for queue in queues).any())
        with m.Switch(opcode):
            for unit, queue in zip(Unit, queues, strict=True):
                with m.Case(UNIT_CLASSES[unit].opcode):
                    m.d.comb += [queue.push.valid.eq(self.program.valid), self.program.ready.eq(queue.push.ready)]
            with m.Case(Opcode.END):
                m.d.comb += self.finished.eq(self.program.valid & idle & settled)
            with m.Default():
                m.d.comb += unknown.eq(self.program.valid)
        with m.If(self.program.valid & self.program.ready):
            m.d.sync += self.index.eq(self.index + 1)
        m.d.sync += missing.eq((self.index == self.length) & ~self.program.valid)

        patience, late = Signal(32), Signal()
        m.d.sync += [patience.eq(patience + 1), late.eq((patience == self.watchdog) & (self.watchdog != 0))]
        with m.If(self.retire.any()):
            m.d.sync += patience.eq(0)

        oldest = _oldest(m, queues, self.index)
        load, store = (queues[unit].oldest for unit in (Unit.LOAD, Unit.STORE))
        causes = [
            (unknown | missing, Status.ILLEGAL_INSTRUCTION, NO_UNIT, self.index),
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
        first = a[0] & (~b[0] | (a[2] < b[2]))
        return a[0] | b[0], Mux(first, a[1], b[1]), Mux(first, a[2], b[2])

    pending, unit, index = reduce(older, [(queue.pending, unit, queue.oldest) for unit, queue in enumerate(queues)])
    oldest_unit, oldest_index = Signal(UNIT_BITS), Signal(LENGTH_BITS)
    m.d.sync += [oldest_unit.eq(Mux(pending, unit, NO_UNIT)), oldest_index.eq(Mux(pending, index, following))]
    return oldest_unit, oldest_index
