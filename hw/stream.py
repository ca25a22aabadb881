"""Small pieces around streams: a queue, a delay line, a scratchpad reader that never over-asks."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Shape, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from weft.arch.config import EngineConfig
from weft.hw.interfaces import ADDRESS_BITS, READ_LATENCY, ReadPort


def delay_line(m: Module, value, cycles: int, reset_less: bool = False) -> list:
    """`value` delayed by 0, 1, .. `cycles` cycles. Inside `m.If` the line moves only when the condition holds.

    Lines of data that a valid bit accompanies need no reset, which costs a gate per bit.
    """
    line = [value]
    for _ in range(cycles):
        stage = Signal.like(line[-1], reset_less=reset_less)
        m.d.sync += stage.eq(line[-1])
        line.append(stage)
    return line


class Queue(wiring.Component):
    """First in, first out, `depth` items of `shape` in distributed memory.

    An item accepted in one cycle is offered in the next; accepts and offers an item in every cycle. `i.ready`
    and `o.valid` come from a register. `level` is the number of items held.
    """

    def __init__(self, shape, depth: int) -> None:
        self.shape, self.depth = shape, depth
        super().__init__({
            "i": In(stream.Signature(shape)),
            "o": Out(stream.Signature(shape)),
            "level": Out(range(depth + 1)),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.fifo = fifo = SyncFIFO(width=Shape.cast(self.shape).width, depth=self.depth)
        m.d.comb += [
            fifo.w_data.eq(self.i.payload),
            fifo.w_en.eq(self.i.valid),
            self.i.ready.eq(fifo.w_rdy),
            self.o.payload.eq(fifo.r_data),
            self.o.valid.eq(fifo.r_rdy),
            fifo.r_en.eq(self.o.ready),
            self.level.eq(fifo.level),
        ]
        return m


def read_item(meta_shape) -> data.StructLayout:
    """What a Reader is asked for: a word, or zeros in its place without a memory access."""
    return data.StructLayout({"address": ADDRESS_BITS, "zero": 1, "meta": meta_shape})


class Reader(wiring.Component):
    """Reads words from the scratchpad into a buffer of `room` words that its user keeps.

    Driven by: items on `i`; each comes back in order on `o_word`, `o_meta` with `o_valid`, once, and must be
    taken. The reader counts the free places of the user's buffer and asks only while there is one; the user
    gives back `release` places in a cycle. An item with `zero` set occupies its turn and a place, but no
    memory port, and comes back as a word of zeros.

    Latency: READ_LATENCY cycles from the accepted item. Throughput: one item per cycle. `i.ready` depends on
    the scratchpad's `request.ready`; `i` must hold an item until it is taken.
    """

    def __init__(self, config: EngineConfig, meta_shape, room: int) -> None:
        self.meta_shape, self.room = meta_shape, room
        super().__init__({
            "i": In(stream.Signature(read_item(meta_shape))),
            "port": Out(ReadPort(config)),
            "o_valid": Out(1),
            "o_word": Out(8 * config.lanes),
            "o_meta": Out(meta_shape),
            "release": In(2),
        })

    def elaborate(self, platform):
        m = Module()
        free = Signal(range(self.room + 1), init=self.room)
        item, taken = self.i.payload, Signal()
        m.d.comb += [
            self.port.request.valid.eq(self.i.valid & ~item.zero & (free != 0)),
            self.port.request.payload.eq(item.address),
            self.i.ready.eq((free != 0) & (item.zero | self.port.request.ready)),
            taken.eq(self.i.valid & self.i.ready),
        ]
        m.d.sync += free.eq(free + self.release - taken)

        # The port answers after a fixed time, so what was asked for waits in plain registers.
        m.d.comb += [
            self.o_valid.eq(delay_line(m, taken, READ_LATENCY)[-1]),
            self.o_meta.eq(delay_line(m, item.meta, READ_LATENCY, reset_less=True)[-1]),
            self.o_word.eq(Mux(delay_line(m, item.zero, READ_LATENCY)[-1], 0, self.port.data)),
        ]
        return m
