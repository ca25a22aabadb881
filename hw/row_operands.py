"""The operands of a row: words on arrival, and the groups of numbers they make."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out, connect, flipped

from weft.arch.config import EngineConfig
from weft.arch.isa import RowOp
from weft.hw.interfaces import READ_LATENCY, ReadPort
from weft.hw.row_layouts import BUFFERS, FIELDS, Place, block_layout, group_layout, item_layout
from weft.hw.stream import Queue, delay_line

STORED = (Place.X_LOW, Place.X_HIGH, Place.O_LOW, Place.O_HIGH, Place.C_LOW, Place.C_HIGH)


def part(value: Value, index: Value, count: int) -> Value:
    """Part `index` of `count` equal ones."""
    if count == 1:
        return value
    return value.word_select(index[:(count - 1).bit_length()], len(value) // count)


class RowOperands(wiring.Component):
    """Reads the words of `item`, keeps BUFFERS blocks (or pairs, or taps) of them, and issues their numbers in groups.

    Driven by: `instruction`, steady; `item`, `claim` and `block` of RowAddresses, which may claim while there is
    `room`. Every group leaves on `group` with its step: `row_lanes` numbers in turn, four times for a pair.
    A row's blocks with `power` wait for a pulse on `maximum_found`, those with `scaled` for one on `factor_found`.

    4-bit weights become numbers on arrival: the nibbles of the column are x, the factor of their word is o.
    The first word of an ARGMAX or EXPAND row is kept in `prelude`; `prelude_valid` is high in the cycle after it came.

    Latency: 4 cycles from the last word's item to its first group. Throughput: one word and one group per cycle.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        super().__init__({
            "instruction": In(FIELDS),
            "item": In(stream.Signature(item_layout(config))),
            "room": Out(1),
            "claim": In(1),
            "block": In(block_layout(config)),
            "port": Out(ReadPort(config)),
            "prelude": Out(64),
            "prelude_valid": Out(1),
            "maximum_found": In(1),
            "factor_found": In(1),
            "group": Out(stream.Signature(group_layout(config))),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        config, now = self.config, self.instruction
        lanes, row_lanes, columns = config.lanes, config.row_lanes, config.columns
        words = columns // 2  # of weights for a block
        groups, word_bits = lanes // row_lanes, 8 * lanes

        # ---- requests and arrivals -----------------------------------------------------------------------------
        m.submodules.requests = requests = Queue(item_layout(config), 4)
        connect(m, flipped(self.item), requests.i)
        request = self.port.request
        meta = requests.o.payload
        m.d.comb += [
            request.valid.eq(requests.o.valid),
            request.payload.eq(meta.address),
            requests.o.ready.eq(request.ready),
        ]
        taken = request.valid & request.ready
        arrives = delay_line(m, taken, READ_LATENCY)[-1]
        arrived = {name: delay_line(m, meta[name], READ_LATENCY, reset_less=True)[-1]
                   for name in ("place", "sub", "index", "buffer", "last")}
        is_place = {place: arrives & (arrived["place"] == place) for place in Place}
        word, weights = self.port.data, is_place[Place.WEIGHTS]

        # The bytes of the column, and what they say.
        chosen = now.length[:(columns - 1).bit_length()]
        column_bytes = [part(word[8 * columns * k:8 * columns * (k + 1)], chosen, columns)
                        for k in range(lanes // columns)]
        nibbles = [nibble for byte in column_bytes for nibble in (byte[:4], byte[4:])]
        factors = Signal(data.ArrayLayout(8, lanes // columns))
        with m.If(is_place[Place.FACTORS]):
            m.d.sync += [factors[k].eq(byte) for k, byte in enumerate(column_bytes)]
        with m.If(weights & arrived["last"]):
            m.d.sync += [factors[k].eq(factors[k + 1]) for k in range(lanes // columns - 1)]
        parts = lanes // 4  # of a word of scales
        scale_word = part(word, now.length, parts)
        with m.If(is_place[Place.PRELUDE]):
            m.d.sync += self.prelude.eq(Mux(now.operation == RowOp.EXPAND, scale_word, word[:64]))
        m.d.sync += self.prelude_valid.eq(is_place[Place.PRELUDE])

        spread = {
            Place.X_LOW: Cat(*[Cat(nibble, nibble[3].replicate(4)) for nibble in nibbles] * words),
            Place.X_HIGH: Cat(*[nibble[3].replicate(8) for nibble in nibbles] * words),
            Place.O_LOW: factors[0].replicate(lanes),
            Place.O_HIGH: 0,
        }
        stored = {}
        read_at = Signal(range(2 * BUFFERS))
        for place in STORED:
            m.submodules[f"store_{place.name.lower()}"] = memory = Memory(shape=word_bits, depth=2 * BUFFERS, init=[])
            of_weights = place in (Place.X_LOW, Place.X_HIGH)
            write = memory.write_port(granularity=word_bits // words if of_weights else word_bits)
            read = memory.read_port(domain="comb")
            m.d.comb += [
                write.addr.eq(Cat(arrived["sub"], arrived["buffer"])),
                write.data.eq(word),
                write.en.eq(is_place[place].replicate(len(write.en))),
                read.addr.eq(read_at),
            ]
            with m.If(weights):
                if of_weights:
                    m.d.comb += write.en.eq(1 << arrived["index"])
                if place in spread:
                    m.d.comb += write.data.eq(spread[place])
                    if not of_weights:
                        m.d.comb += write.en.eq(1)
            stored[place] = read.data

        # ---- blocks held -------------------------------------------------------------------------------------------
        free, ready = Signal(range(BUFFERS + 1), init=BUFFERS), Signal(range(BUFFERS + 1))
        release = Signal()
        m.d.sync += [
            free.eq(free - self.claim + release),
            ready.eq(ready + (arrives & arrived["last"]) - release),
        ]
        m.d.comb += self.room.eq(free != 0)
        m.submodules.blocks = blocks = Queue(block_layout(config), BUFFERS)
        m.d.comb += [blocks.i.payload.eq(self.block), blocks.i.valid.eq(self.claim), blocks.o.ready.eq(release)]

        # ---- groups ------------------------------------------------------------------------------------------------
        block, step = blocks.o.payload, self.group.payload.step
        buffer = Signal(range(BUFFERS))
        group, phase = Signal.like(step.group), Signal(2)
        # A pair has four phases; a block beside the pairs two where its squares are asked for.
        twice = block.beyond & block.reduce
        phase_last = phase == Mux(block.pair, 3, twice)
        group_last = group == groups - 1
        first = block.first & (group == 0)
        complete = phase[0] | ~(block.pair | twice)
        issued = self.group.valid & self.group.ready
        maximum_ready, factor_ready = Signal(), Signal()
        with m.If(self.maximum_found):
            m.d.sync += maximum_ready.eq(1)
        with m.If(self.factor_found):
            m.d.sync += factor_ready.eq(1)
        with m.If(release & block.scaled & block.last):
            m.d.sync += [maximum_ready.eq(0), factor_ready.eq(0)]
        m.d.comb += [
            self.group.valid.eq((ready != 0) & (factor_ready | ~block.scaled)
                                & (maximum_ready | ~block.power)),
            release.eq(issued & phase_last & group_last),
            read_at.eq(Cat(phase[0] & block.pair, buffer)),
            *(step[name].eq(block[name]) for name in ("pair", "pair_last", "beyond", "tap_first", "power")),
            step.phase.eq(phase),
            step.group.eq(group),
            step.emit.eq(block.emit & complete),
            step.key.eq(block.reduce & complete),
            step.key_first.eq(first & ~phase[1]),
            step.term.eq(block.reduce & Mux(block.pair, phase[1], ~phase[0])),
            step.turned.eq(Mux(block.pair, ~phase[1], block.beyond & ~(twice & ~phase[0]))),
            step.term_first.eq(first & ~phase[0]),
            step.pass_last.eq(block.last & group_last & phase_last),
            step.block_end.eq(group_last & phase_last),
            step.row_end.eq(block.last),
        ]
        with m.If(issued):
            m.d.sync += phase.eq(Mux(phase_last, 0, phase + 1))
            with m.If(phase_last):
                m.d.sync += group.eq(Mux(group_last, 0, group + 1))
            with m.If(release):
                m.d.sync += buffer.eq(buffer + 1)

        taken_parts = {place: part(stored[place], group, groups) for place in STORED}
        for name, low, high in (("x", Place.X_LOW, Place.X_HIGH), ("o", Place.O_LOW, Place.O_HIGH),
                                ("c", Place.C_LOW, Place.C_HIGH)):
            for lane in range(row_lanes):
                m.d.comb += self.group.payload[name][lane].eq(
                    Cat(taken_parts[p][8 * lane:8 * lane + 8] for p in (low, high)))
        # Numbers from this group on that count: a lane is valid if it is below that.
        count = block.valid - group * row_lanes
        m.d.comb += [self.group.payload.valid[lane].eq(count > lane) for lane in range(row_lanes)]
        return m
