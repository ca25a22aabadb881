"""The reading side of a Row instruction: which words, in which order."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from weft.arch.config import EngineConfig
from weft.arch.isa import RowOp
from weft.hw.interfaces import ADDRESS_BITS
from weft.hw.row_layouts import BUFFERS, FIELDS, Place, block_layout, item_layout

LENGTH_BITS = 17


class RowAddresses(wiring.Component):
    """The loop nest of a Row instruction: row, column, pass over the row, block, tap, word.

    Driven by: `instruction`, steady from `start` to the end; `start` for a cycle begins. Words leave on `item`, one per
    cycle, grouped by blocks (CONVOLVE: by taps of a block; rotate: by pairs of blocks). Each takes the next of
    BUFFERS buffers: `claim` is high, with `block`, as its first word is taken, which waits for `room`.

    QUANTIZE passes twice over a row, SOFTMAX three times; no pass but the last reads beyond the valid length.
    Rows of ARGMAX and EXPAND begin with a word of their own, which waits for `row_written` of the row before.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        super().__init__({
            "instruction": In(FIELDS),
            "start": In(1),
            "item": Out(stream.Signature(item_layout(config))),
            "room": In(1),
            "claim": Out(1),
            "block": Out(block_layout(config)),
            "row_written": In(1),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        config, now, item, flags = self.config, self.instruction, self.item.payload, self.block
        lanes, words = config.lanes, config.columns // 2
        operation = now.operation
        quantize, softmax = operation == RowOp.QUANTIZE, operation == RowOp.SOFTMAX
        convolve, argmax, expand = (operation == op for op in (RowOp.CONVOLVE, RowOp.ARGMAX, RowOp.EXPAND))
        rotated = quantize & now.rotate
        begins = argmax | expand  # with a word of the row

        # Registers of an instruction: products that the addresses need.
        pair_source, pair_other = Signal(ADDRESS_BITS), Signal(ADDRESS_BITS)
        two_operands = Signal()

        row, column, block = (Signal.like(now[name], name=f"count_{name}") for name in ("rows", "columns", "blocks"))
        tap, turn = Signal.like(now.span), Signal(2)  # turn: pass over the row
        length, left = Signal(LENGTH_BITS), Signal(LENGTH_BITS)  # valid numbers of the row, from this block on
        # First words of: row, (row, column), block, tap.
        x_row, x_column, x_block, x = (Signal(ADDRESS_BITS, name=f"x{at}") for at in ("_row", "_column", "_block", ""))
        o_row, o_column, o_block, o = (Signal(ADDRESS_BITS, name=f"o{at}") for at in ("_row", "_column", "_block", ""))
        c_row, c = Signal(ADDRESS_BITS), Signal(ADDRESS_BITS)
        place, sub, index, buffer = Signal(Place), Signal(), Signal.like(item.index), Signal(range(BUFFERS))
        factor = Signal(range(max(2, config.scaled_words)))  # block in its group of scales
        opening, waiting = Signal(), Signal()  # before the first word of a block; for the row before

        pair = rotated & (turn != 2) & (block < now.span)
        beyond = rotated & (block >= now.span)
        pair_last = pair & (block + 1 == now.span)
        tap_last = ~convolve | (tap + 1 == now.span)
        last_turn = turn == Mux(softmax, 2, quantize)
        short = left <= lanes  # the valid numbers end in this block
        block_last = Mux(pair, pair_last & ((now.span << 1) == now.blocks),
                         (block + 1 == now.blocks) | (short & (argmax | (softmax & ~last_turn))))
        column_last, row_last = column + 1 == now.columns, row + 1 == now.rows
        uses_other = two_operands | (softmax & (turn != 0))

        taken, last = Signal(), Signal()  # last: word of the block, pair or tap
        m.d.comb += [
            taken.eq(self.item.valid & self.item.ready),
            item.place.eq(place),
            item.sub.eq(sub),
            item.index.eq(index),
            item.buffer.eq(buffer),
            item.last.eq(last),
            flags.pair.eq(pair),
            flags.pair_last.eq(pair_last),
            flags.beyond.eq(beyond),
            flags.tap_first.eq(tap == 0),
            flags.power.eq(softmax & (turn != 0)),
            flags.reduce.eq(argmax | ((softmax | quantize) & ~last_turn)),
            flags.emit.eq(~argmax & last_turn & tap_last),
            flags.scaled.eq(expand | ((softmax | quantize) & last_turn)),
            flags.first.eq(block == 0),
            flags.last.eq(block_last & tap_last),
            flags.valid.eq(Mux(short & (softmax | argmax), left, lanes)),
        ]
        with m.Switch(place):
            with m.Case(Place.X_LOW, Place.X_HIGH):
                m.d.comb += [
                    item.address.eq(x + Mux(place == Place.X_HIGH, now.source_high, 0) + Mux(sub, pair_source, 0)),
                    last.eq((place == Place.X_HIGH) & ~uses_other),
                ]
            with m.Case(Place.O_LOW, Place.O_HIGH):
                m.d.comb += [
                    item.address.eq(o + Mux(place == Place.O_HIGH, now.other_high, 0) + Mux(sub, pair_other, 0)),
                    last.eq((place == Place.O_HIGH) & ~pair),
                ]
            with m.Case(Place.C_LOW, Place.C_HIGH):
                m.d.comb += [item.address.eq(c), last.eq((place == Place.C_HIGH) & sub)]
            with m.Case(Place.PRELUDE):
                parameter = (now.length << 2)[(lanes - 1).bit_length():]  # word of the column's scale
                m.d.comb += item.address.eq(o_column + Mux(expand, parameter, 0))
            with m.Default():
                m.d.comb += [item.address.eq(x), last.eq((place == Place.WEIGHTS) & (index == words - 1))]

        # ---- to the next word, tap, block, pass, column, row --------------------------------------------------
        def begin_pass(x_first, o_first, c_first, length) -> list:
            return [block.eq(0), tap.eq(0), x_block.eq(x_first), x.eq(x_first), o_block.eq(o_first), o.eq(o_first),
                    c.eq(c_first), left.eq(length), factor.eq(0),
                    place.eq(Mux(expand, Place.FACTORS, Place.X_LOW))]

        def begin_row(x_first, o_first, c_first, length) -> list:
            return [*begin_pass(x_first, o_first, c_first, length), turn.eq(0), x_column.eq(x_first),
                    o_column.eq(o_first), place.eq(Mux(begins, Place.PRELUDE, Place.X_LOW))]

        running = Signal()
        prelude = place == Place.PRELUDE
        needless = argmax & now.first  # no word to begin with
        m.d.comb += [
            self.item.valid.eq(running & Mux(prelude, ~waiting & ~needless, self.room | ~opening)),
            self.claim.eq(taken & opening & ~prelude),
        ]
        with m.If(self.row_written):
            m.d.sync += waiting.eq(0)
        with m.If(self.start):
            m.d.sync += [
                running.eq(1),
                pair_source.eq(now.span * now.source_plane),
                pair_other.eq(now.span * now.other_plane),
                two_operands.eq((quantize & now.weighted) | (operation < RowOp.QUANTIZE)),
                row.eq(0), column.eq(0), waiting.eq(0),
                x_row.eq(now.source), o_row.eq(now.other), c_row.eq(now.table), length.eq(now.length),
                *begin_row(now.source, now.other, now.table, now.length),
                opening.eq(1), sub.eq(0), index.eq(0),
            ]
        with m.Elif(running & prelude), m.If(taken | (~waiting & needless)):
            m.d.sync += [waiting.eq(1), place.eq(Mux(expand, Place.FACTORS, Place.X_LOW))]
        with m.Elif(taken & ~last):
            m.d.sync += opening.eq(0)
            with m.Switch(place):
                with m.Case(Place.X_LOW):
                    m.d.sync += place.eq(Place.X_HIGH)
                with m.Case(Place.X_HIGH):
                    m.d.sync += place.eq(Place.O_LOW)
                with m.Case(Place.O_LOW):
                    m.d.sync += place.eq(Place.O_HIGH)
                with m.Case(Place.O_HIGH):
                    m.d.sync += [place.eq(Mux(sub, Place.C_LOW, Place.X_LOW)), sub.eq(~sub)]
                with m.Case(Place.C_LOW):
                    m.d.sync += [place.eq(Place.C_HIGH), c.eq(c + 1)]
                with m.Case(Place.C_HIGH):
                    m.d.sync += [place.eq(Place.C_LOW), c.eq(c + 1), sub.eq(1)]
                with m.Case(Place.FACTORS):
                    m.d.sync += [place.eq(Place.WEIGHTS), x.eq(x + 1)]
                with m.Case(Place.WEIGHTS):
                    m.d.sync += [index.eq(index + 1), x.eq(x + 1)]
        with m.Elif(taken):
            group_end = factor == config.scaled_words - 1
            m.d.sync += [opening.eq(1), sub.eq(0), index.eq(0), buffer.eq(buffer + 1)]
            with m.If(~tap_last):
                m.d.sync += [tap.eq(tap + 1), place.eq(Place.X_LOW),
                             x.eq(x + now.source_column), o.eq(o + now.other_column)]
            with m.Elif(~block_last):
                x_next = x_block + now.source_plane + Mux(pair_last, pair_source, 0)
                o_next = o_block + now.other_plane + Mux(pair_last, pair_other, 0)
                m.d.sync += [
                    tap.eq(0),
                    block.eq(Mux(pair_last, now.span << 1, block + 1)),
                    x_block.eq(x_next), x.eq(Mux(expand, x + 1, x_next)),
                    o_block.eq(o_next), o.eq(o_next),
                    c.eq(c + 1),  # the last word of a pair
                    left.eq(Mux(short, 0, left - lanes)),
                    factor.eq(Mux(group_end, 0, factor + 1)),
                    place.eq(Mux(expand, Mux(group_end, Place.FACTORS, Place.WEIGHTS), Place.X_LOW)),
                ]
            with m.Elif(~last_turn):
                m.d.sync += [turn.eq(turn + 1), *begin_pass(x_column, o_column, c_row, length)]
            with m.Elif(~column_last):
                m.d.sync += [column.eq(column + 1),
                             *begin_row(x_column + now.source_column, o_column + now.other_column, c_row, length)]
            with m.Else():
                x_next, o_next, c_next = x_row + now.source_row, o_row + now.other_row, c_row + (now.span << 2)
                length_next = length + (now.length_step & softmax)
                m.d.sync += [column.eq(0), row.eq(row + 1), x_row.eq(x_next), o_row.eq(o_next), c_row.eq(c_next),
                             length.eq(length_next), *begin_row(x_next, o_next, c_next, length_next)]
                with m.If(row_last):
                    m.d.sync += running.eq(0)
        return m
