"""The writing side of a Row instruction: code words, scales, answers, and where they go."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from weft.arch.config import EngineConfig
from weft.arch.isa import RowLayout, RowOp
from weft.hw.interfaces import ADDRESS_BITS, WritePort
from weft.hw.row_layouts import ANSWER, FIELDS, SCALE, codes_layout
from weft.hw.row_operands import part
from weft.hw.stream import Queue

BLOCKS = 4  # waiting to be written
SPAN_MAX = 15


class RowWriter(wiring.Component):
    """Writes the results of each row in the order of the instruction set: words of blocks, then the scale.

    Driven by: `instruction`, steady from `start` to `done`; `codes` of the blocks of each row in order, the upper
    block of a pair together with the lower one; `scale` once for a row of codes; `answer` with `answer_valid`, a
    pulse, once for a row of ARGMAX. `row_written` is high for a cycle when the row's last word is underway, `done`
    after the last write of the instruction was accepted.

    Throughput: one word per cycle. Latency: 2 cycles from a block to its first write.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        super().__init__({
            "instruction": In(FIELDS),
            "start": In(1),
            "codes": In(stream.Signature(codes_layout(config))),
            "scale": In(stream.Signature(SCALE)),
            "answer": In(ANSWER),
            "answer_valid": In(1),
            "port": Out(WritePort(config)),
            "row_written": Out(1),
            "done": Out(1),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        config, now = self.config, self.instruction
        lanes, columns = config.lanes, config.columns
        tiles = lanes // columns
        m.submodules.blocks = blocks = Queue(codes_layout(config), BLOCKS)
        m.submodules.upper = upper = Queue(8 * lanes, SPAN_MAX + 1)
        connect(m, flipped(self.codes), blocks.i)
        entry = blocks.o.payload
        coded = (now.operation == RowOp.QUANTIZE) | (now.operation == RowOp.SOFTMAX)
        keys, values = now.layout == RowLayout.KEYS, now.layout == RowLayout.VALUES

        row, column = Signal.like(now.rows), Signal.like(now.columns)
        row_target, column_target, target = (Signal(ADDRESS_BITS, name=f"target{at}") for at in ("_row", "_column", ""))
        row_scale, scale = Signal(ADDRESS_BITS), Signal(ADDRESS_BITS)
        index = Signal(range(max(2, columns, tiles)))  # word of the block
        row_end = Signal()  # the last pair was the end of the row

        # The word to be written: address, bytes.
        valid, ready = Signal(), Signal()
        address, word, final = Signal(ADDRESS_BITS), Signal(8 * lanes), Signal()
        put, next_row = Signal(), Signal()
        codes = Signal(8 * lanes)
        last_word = index == Mux(~coded, 1, Mux(keys, columns - 1, Mux(values, tiles - 1, 0)))
        m.d.comb += put.eq(valid & ready)

        scale_word = Cat(self.scale.payload.mult, self.scale.payload.shift, Const(0, 8))
        magnitude = self.scale.payload.magnitude
        argmax, answered = now.operation == RowOp.ARGMAX, Signal()
        with m.If(self.answer_valid):
            m.d.sync += answered.eq(1)
        with m.Elif(put):
            m.d.sync += answered.eq(0)

        def block_word() -> None:
            """A word of `entry` or, of codes, of `codes`."""
            with m.If(~coded):
                m.d.comb += [address.eq(target + Mux(index[0], now.target_high, 0)),
                             word.eq(Mux(index[0], entry.high, entry.low))]
            with m.Elif(keys):
                segment = part(codes, index, columns)
                m.d.comb += [address.eq(target + index),
                             word.eq(Cat(segment.word_select(lane // columns, 8) for lane in range(lanes)))]
            with m.Elif(values):
                m.d.comb += [address.eq(target), word.eq(part(codes, index, tiles).replicate(tiles))]
            with m.Else():
                m.d.comb += [address.eq(target), word.eq(codes)]
            with m.If(put):
                m.d.sync += index.eq(Mux(last_word, 0, index + 1))
                with m.If(last_word | (coded & values)):
                    m.d.sync += target.eq(target + now.target_plane)

        with m.FSM():
            with m.State("blocks"):
                m.d.comb += [valid.eq(Mux(argmax, answered, blocks.o.valid)), codes.eq(entry.low)]
                with m.If(argmax):
                    m.d.comb += [address.eq(target), word.eq(self.answer), next_row.eq(put)]
                with m.Else():
                    block_word()
                with m.If(put & last_word & ~argmax):
                    m.d.comb += [
                        blocks.o.ready.eq(1),
                        upper.i.valid.eq(entry.pair),
                        next_row.eq(~coded & entry.row_end),
                    ]
                    m.d.sync += row_end.eq(entry.row_end)
                    with m.If(entry.pair_last):
                        m.next = "upper"
                    with m.Elif(coded & entry.row_end):
                        m.next = "scale"
            with m.State("upper"):
                m.d.comb += [valid.eq(upper.o.valid), codes.eq(upper.o.payload)]
                block_word()
                with m.If(put & last_word):
                    m.d.comb += upper.o.ready.eq(1)
                    with m.If(upper.level == 1):
                        m.next = "blocks"
                        with m.If(row_end):
                            m.next = "scale"
            with m.State("scale"):
                m.d.comb += [
                    valid.eq(self.scale.valid),
                    address.eq(scale + index[0]),
                    word.eq(Mux(values, Mux(index[0], magnitude[8:], magnitude[:8]).replicate(lanes),
                                scale_word.replicate(lanes // 4))),
                ]
                with m.If(put):
                    m.d.sync += index.eq(values & ~index[0])
                    with m.If(~values | index[0]):
                        m.d.comb += [self.scale.ready.eq(1), next_row.eq(1)]
                        m.next = "blocks"

        column_last, row_last = column + 1 == now.columns, row + 1 == now.rows
        m.d.comb += final.eq(next_row & column_last & row_last)
        with m.If(next_row):
            m.d.sync += column.eq(Mux(column_last, 0, column + 1))
            with m.If(column_last):
                target_next, scale_next = row_target + now.target_row, row_scale + now.scale_row
                m.d.sync += [row.eq(row + 1), row_target.eq(target_next), column_target.eq(target_next),
                             target.eq(target_next), row_scale.eq(scale_next), scale.eq(scale_next)]
            with m.Else():
                target_next = column_target + now.target_column
                m.d.sync += [column_target.eq(target_next), target.eq(target_next),
                             scale.eq(scale + now.scale_column)]
        with m.If(self.start):
            m.d.sync += [
                row.eq(0), column.eq(0), index.eq(0), row_target.eq(now.target), column_target.eq(now.target),
                target.eq(now.target), row_scale.eq(now.scale), scale.eq(now.scale),
            ]
        m.d.comb += [self.row_written.eq(next_row), upper.i.payload.eq(entry.high)]

        # ---- the port --------------------------------------------------------------------------------------------
        request = self.port.request
        last = Signal()  # of the instruction
        m.d.comb += [ready.eq(~request.valid | request.ready), request.payload.mask.eq(~0)]
        with m.If(ready):
            m.d.sync += request.valid.eq(valid)
            with m.If(valid):
                m.d.sync += [request.payload.address.eq(address), request.payload.data.eq(word),
                             request.payload.tag.eq(now.tag), last.eq(final)]
        m.d.sync += self.done.eq(request.valid & request.ready & last)
        return m
