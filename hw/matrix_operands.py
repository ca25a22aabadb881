"""Weights and tile parameters of the matrix unit: fetched through one port, ahead of their use."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from weft.arch.config import EngineConfig
from weft.arch.numerics import ACC_BITS
from weft.hw.interfaces import ADDRESS_BITS, ReadPort
from weft.hw.matrix_layouts import (
    SLOTS,
    bounds_layout,
    descriptor_layout,
    fetch_layout,
    operands_layout,
    scale_layout,
)
from weft.hw.stream import Queue, Reader

WEIGHT_WORDS = 16  # prefetched
GROUP_WORDS = 4  # words of group scales prefetched


class Kind(enum.Enum, shape=2):
    """What a word was fetched for."""

    WEIGHT = 0
    PARAMETER = 1
    GROUP = 2  # scales of the words of weights that follow
    PIXEL = 3  # scale of a pixel


def parameter_write(config: EngineConfig) -> data.StructLayout:
    """One parameter word of a tile on its way into slot `slot`."""
    return data.StructLayout({
        "slot": range(SLOTS), "index": range(config.tile_parameter_words), "word": 8 * config.lanes,
        "bounds": bounds_layout(),
    })


class WeightFetcher(wiring.Component):
    """Fetches, in order of use, the parameter words of each tile and the weight words of each of its passes.

    Driven by: `instruction`, one item per instruction; `fetch`, one item per word of a pass (see
    matrix_sequencer). Weight words leave on `weights`. Parameters leave on `parameter` in the cycle they
    arrive, `parameter_valid` high, before the first weights of their tile leave; each tile takes the next of
    SLOTS slots in turn, which must be free: `free` high for a cycle gives back the oldest. A plain tile has
    parameter words of scales only.

    A word of group scales leaves on `groups` before the first weights leave that it scales. The scales of the
    live pixels of a pass leave on `scales`, one by one, before the first weights of its last word.

    Throughput: one word per cycle, less one cycle per tile. Latency: READ_LATENCY + 2 cycles.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        super().__init__({
            "instruction": In(stream.Signature(operands_layout())),
            "fetch": In(stream.Signature(fetch_layout())),
            "port": Out(ReadPort(config)),
            "weights": Out(stream.Signature(8 * config.lanes)),
            "groups": Out(stream.Signature(8 * config.lanes)),
            "scales": Out(stream.Signature(scale_layout())),
            "parameter": Out(parameter_write(config)),
            "parameter_valid": Out(1),
            "free": In(1),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        weight_words, scale_index = config.columns // 2, config.four_byte_words(config.columns)
        meta_layout = data.StructLayout({
            "kind": Kind, "slot": range(SLOTS), "index": range(config.tile_parameter_words)})
        m.submodules.commands = commands = Queue(fetch_layout(), depth=8)
        m.submodules.reader = reader = Reader(config, meta_layout, room=WEIGHT_WORDS)
        m.submodules.words = words = Queue(unsigned(8 * config.lanes), depth=WEIGHT_WORDS)
        m.submodules.group_words = group_words = Queue(unsigned(8 * config.lanes), depth=GROUP_WORDS)
        pixel_room = 16 * -(-2 * config.pixels // 16)  # of the pass in the array and the next one
        m.submodules.pixel_scales = pixel_scales = Queue(scale_layout(), depth=pixel_room)
        wiring.connect(m, wiring.flipped(self.fetch), commands.i)
        wiring.connect(m, reader.port, wiring.flipped(self.port))
        wiring.connect(m, words.o, wiring.flipped(self.weights))
        wiring.connect(m, group_words.o, wiring.flipped(self.groups))
        wiring.connect(m, pixel_scales.o, wiring.flipped(self.scales))

        i = Signal(operands_layout())  # the instruction whose operands are fetched
        command, request = commands.o.payload, reader.i.payload
        weight, tile_weight, parameter = Signal(ADDRESS_BITS), Signal(ADDRESS_BITS), Signal(ADDRESS_BITS)
        index = Signal(range(max(2 * weight_words, config.tile_parameter_words)))
        slot, slots_free = Signal(range(SLOTS)), Signal(range(SLOTS + 1), init=SLOTS)
        start, loaded, take = Signal(), Signal(), Signal()
        m.d.sync += slots_free.eq(slots_free + self.free - start)

        # What a word needs besides its weights, once each.
        group, group_done = Signal(range(config.scaled_words)), Signal()  # words since the last scales
        pixels_done = Signal()
        room = {kind: Signal(range(places + 1), init=places, name=f"room_{kind.name}")
                for kind, places in ((Kind.GROUP, GROUP_WORDS), (Kind.PIXEL, pixel_room))}
        kind, index_last, allowed = Signal(Kind), Signal(), Signal()
        with m.If(i.scaled & command.last & ~pixels_done):
            m.d.comb += [kind.eq(Kind.PIXEL), allowed.eq(room[Kind.PIXEL] != 0)]
        with m.Elif(i.grouped & (group == 0) & ~group_done):
            m.d.comb += [kind.eq(Kind.GROUP), allowed.eq(room[Kind.GROUP] != 0)]
        with m.Else():
            m.d.comb += [kind.eq(Kind.WEIGHT), allowed.eq(1)]
        m.d.comb += [take.eq(reader.i.valid & reader.i.ready), request.meta.slot.eq(slot), request.meta.index.eq(index)]

        pixel_address, pixels_last = self._pixels(m, i, take & (request.meta.kind == Kind.PIXEL))
        with m.FSM():
            with m.State("weights"):
                # The first pass of a tile goes on where the tile before ended; the others go back to its start.
                begin = (index == 0) & ~group_done & command.first
                stream_address = Mux(begin & ~command.tile_first, tile_weight, weight)
                m.d.comb += [
                    index_last.eq(index == Mux(i.wide, 2 * weight_words - 1, weight_words - 1)),
                    request.meta.kind.eq(kind),
                    request.address.eq(Mux(kind == Kind.PIXEL, pixel_address, stream_address)),
                ]
                with m.If(commands.o.valid & command.tile_first & ~loaded):
                    m.d.comb += start.eq((slots_free != 0) & (self.instruction.valid | ~command.instruction_first))
                    with m.If(start):
                        plain = Mux(command.instruction_first, self.instruction.payload.plain, i.plain)
                        m.d.sync += index.eq(Mux(plain, scale_index, 0))
                        m.next = "parameters"
                with m.Else():
                    m.d.comb += reader.i.valid.eq(commands.o.valid & allowed)
                    with m.If(take & (kind != Kind.PIXEL)):
                        m.d.sync += weight.eq(stream_address + 1)
                        with m.If(begin & command.tile_first):
                            m.d.sync += tile_weight.eq(weight)
                    with m.If(take & (kind == Kind.PIXEL) & pixels_last):
                        m.d.sync += pixels_done.eq(1)
                    with m.If(take & (kind == Kind.GROUP)):
                        m.d.sync += group_done.eq(1)
                    with m.If(take & (kind == Kind.WEIGHT)):
                        m.d.comb += commands.o.ready.eq(index_last)
                        m.d.sync += index.eq(index + 1)
                        with m.If(index_last):
                            m.d.sync += [index.eq(0), loaded.eq(0), group_done.eq(0), pixels_done.eq(0)]
                            m.d.sync += group.eq(group + 1)
                            with m.If(command.last | (group == config.scaled_words - 1)):
                                m.d.sync += group.eq(0)
            with m.State("parameters"):
                m.d.comb += [
                    reader.i.valid.eq(1),
                    request.meta.kind.eq(Kind.PARAMETER),
                    request.address.eq(parameter),
                ]
                with m.If(reader.i.ready):
                    m.d.sync += [index.eq(index + 1), parameter.eq(parameter + 1)]
                    with m.If(index == Mux(i.plain, 2 * scale_index - 1, config.tile_parameter_words - 1)):
                        m.d.sync += [index.eq(0), slot.eq(slot + 1), loaded.eq(1)]
                        m.next = "weights"
        m.d.comb += self.instruction.ready.eq(start & command.instruction_first)
        with m.If(self.instruction.ready):
            following = self.instruction.payload
            m.d.sync += [i.eq(following), weight.eq(following.weights), parameter.eq(following.parameters)]

        arrived = {kind: Signal(name=f"arrived_{kind.name}") for kind in Kind}
        m.d.comb += [signal.eq(reader.o_valid & (reader.o_meta.kind == kind)) for kind, signal in arrived.items()]
        m.d.comb += [
            self.parameter_valid.eq(arrived[Kind.PARAMETER]),
            self.parameter.slot.eq(reader.o_meta.slot),
            self.parameter.index.eq(reader.o_meta.index),
            self.parameter.word.eq(reader.o_word),
            self.parameter.bounds.low.eq(i.low),  # the next instruction's come later than these words
            self.parameter.bounds.high.eq(i.high),
            words.i.payload.eq(reader.o_word),
            words.i.valid.eq(arrived[Kind.WEIGHT]),
            group_words.i.payload.eq(reader.o_word),
            group_words.i.valid.eq(arrived[Kind.GROUP]),
            pixel_scales.i.payload.eq(reader.o_word),
            pixel_scales.i.valid.eq(arrived[Kind.PIXEL]),
            # Only weights stay in the reader's room; group and pixel scales have their own.
            reader.release.eq((reader.o_valid & ~arrived[Kind.WEIGHT]) + (words.o.valid & words.o.ready)),
        ]
        for kind, queue in ((Kind.GROUP, group_words), (Kind.PIXEL, pixel_scales)):
            m.d.sync += room[kind].eq(room[kind] + (queue.o.valid & queue.o.ready)
                                      - (take & (request.meta.kind == kind)))
        return m

    def _pixels(self, m: Module, i, step):
        """Raster of the pixel scales. Returns the address of the next one and whether it is the last of its pass."""
        pixel, column, row = Signal(range(self.config.pixels)), Signal(12), Signal(12)
        start, address = Signal(ADDRESS_BITS), Signal(ADDRESS_BITS)  # of the row, of the pixel
        column_last, raster_last, last, row_start = Signal(), Signal(), Signal(), Signal(ADDRESS_BITS)
        m.d.comb += [
            column_last.eq(column == i.columns - 1),
            raster_last.eq(column_last & (row == i.rows - 1)),
            last.eq(raster_last | (pixel == self.config.pixels - 1)),
            row_start.eq(Mux(raster_last, i.scales, start + i.scales_pitch)),
        ]
        with m.If(self.instruction.ready):
            m.d.sync += [start.eq(self.instruction.payload.scales), address.eq(self.instruction.payload.scales)]
        with m.If(step):
            m.d.sync += [pixel.eq(Mux(last, 0, pixel + 1)), column.eq(column + 1), address.eq(address + 1)]
            with m.If(column_last):
                m.d.sync += [column.eq(0), row.eq(Mux(raster_last, 0, row + 1))]
                m.d.sync += [start.eq(row_start), address.eq(row_start)]
        return address, last


class TileParameters(wiring.Component):
    """Parameters of SLOTS tiles, in distributed memory: written word by word, read whole.

    Driven by: `write` in cycles with `write_valid`. What slot `scale_slot` holds is on `scale` in the same
    cycle, and so on: the array starts a tile, drains the one before and writes one before that. Of a plain tile
    only the scale is written, with the bounds; the rest of its slot has no meaning.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        columns = config.columns
        super().__init__({
            "write": In(parameter_write(config)),
            "write_valid": In(1),
            "bias_slot": In(range(SLOTS)),
            "bias": Out(data.ArrayLayout(signed(ACC_BITS), columns)),
            "scale_slot": In(range(SLOTS)),
            "scale": Out(data.ArrayLayout(scale_layout(), columns)),
            "bounds_slot": In(range(SLOTS)),
            "bounds": Out(bounds_layout()),
            "descriptor_slot": In(range(SLOTS)),
            "descriptors": Out(data.ArrayLayout(descriptor_layout(), config.max_writes)),
        })

    def elaborate(self, platform):
        m = Module()
        word_bits, count = 8 * self.config.lanes, self.config.four_byte_words(self.config.columns)

        def memory(name: str, index: int, value, slot, width: int):
            """Bits of `value` that come with parameter word `index`, as slot `slot` holds them."""
            m.submodules[name] = store = Memory(shape=unsigned(width), depth=SLOTS, init=[])
            write, read = store.write_port(), store.read_port(domain="comb")
            m.d.comb += [
                write.addr.eq(self.write.slot),
                write.data.eq(value),
                write.en.eq(self.write_valid & (self.write.index == index)),
                read.addr.eq(slot),
            ]
            return read.data

        def field(name: str, first: int, words: int, slot, target) -> None:
            """`target` from parameter words `first` ...; the last may be used in part."""
            target = target.as_value()
            parts = [memory(f"{name}{n}", first + n, self.write.word, slot, min(word_bits, len(target) - n * word_bits))
                     for n in range(words)]
            m.d.comb += target.eq(Cat(parts))

        field("bias", 0, count, self.bias_slot, self.bias)
        field("scale", count, count, self.scale_slot, self.scale)
        field("descriptors", 2 * count, 1, self.descriptor_slot, self.descriptors)
        m.d.comb += self.bounds.eq(memory("bounds", count, self.write.bounds, self.bounds_slot,
                                           self.bounds.shape().size))
        return m
