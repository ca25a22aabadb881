"""Weights and tile parameters of the matrix unit: fetched through one port, ahead of their use."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, stream, wiring
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
    SLOTS slots in turn, which must be free: `free` high for a cycle gives back the oldest.

    Throughput: one word per cycle, less one cycle per tile. Latency: READ_LATENCY + 2 cycles.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        super().__init__({
            "instruction": In(stream.Signature(operands_layout())),
            "fetch": In(stream.Signature(fetch_layout())),
            "port": Out(ReadPort(config)),
            "weights": Out(stream.Signature(8 * config.lanes)),
            "parameter": Out(parameter_write(config)),
            "parameter_valid": Out(1),
            "free": In(1),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        weight_words = config.columns // 2  # per word of a pass, twice that if wide
        parameter_words = range(config.tile_parameter_words)
        meta_layout = data.StructLayout({"parameter": 1, "slot": range(SLOTS), "index": parameter_words})
        m.submodules.commands = commands = Queue(fetch_layout(), depth=8)
        m.submodules.reader = reader = Reader(config, meta_layout, room=WEIGHT_WORDS)
        m.submodules.words = words = Queue(unsigned(8 * config.lanes), depth=WEIGHT_WORDS)
        wiring.connect(m, wiring.flipped(self.fetch), commands.i)
        wiring.connect(m, reader.port, wiring.flipped(self.port))
        wiring.connect(m, words.o, wiring.flipped(self.weights))

        command, request = commands.o.payload, reader.i.payload
        weight, tile_weight, parameter = Signal(ADDRESS_BITS), Signal(ADDRESS_BITS), Signal(ADDRESS_BITS)
        index = Signal(range(max(2 * weight_words, config.tile_parameter_words)))
        slot, slots_free = Signal(range(SLOTS)), Signal(range(SLOTS + 1), init=SLOTS)
        bounds = Signal(bounds_layout())
        start, loaded, index_last = Signal(), Signal(), Signal()
        m.d.sync += slots_free.eq(slots_free + self.free - start)
        with m.FSM() as fsm:
            # The first pass of a tile goes on where the tile before ended; the others go back to its start.
            again = (index == 0) & command.first & ~command.tile_first
            m.d.comb += [
                request.meta.parameter.eq(fsm.ongoing("parameters")),
                request.meta.slot.eq(slot),
                request.meta.index.eq(index),
                request.address.eq(Mux(request.meta.parameter, parameter, Mux(again, tile_weight, weight))),
            ]
            with m.State("weights"):
                m.d.comb += index_last.eq(index == Mux(command.wide, 2 * weight_words - 1, weight_words - 1))
                with m.If(commands.o.valid & command.tile_first & ~loaded):
                    m.d.comb += start.eq((slots_free != 0) & (self.instruction.valid | ~command.instruction_first))
                    with m.If(start):
                        m.next = "parameters"
                with m.Else():
                    m.d.comb += reader.i.valid.eq(commands.o.valid)
                    with m.If(reader.i.valid & reader.i.ready):
                        m.d.comb += commands.o.ready.eq(index_last)
                        m.d.sync += [index.eq(index + 1), weight.eq(request.address + 1)]
                        with m.If(command.tile_first & (index == 0)):
                            m.d.sync += tile_weight.eq(weight)
                        with m.If(index_last):
                            m.d.sync += [index.eq(0), loaded.eq(0)]
            with m.State("parameters"):
                m.d.comb += reader.i.valid.eq(1)
                with m.If(reader.i.ready):
                    m.d.sync += [index.eq(index + 1), parameter.eq(parameter + 1)]
                    with m.If(index == config.tile_parameter_words - 1):
                        m.d.sync += [index.eq(0), slot.eq(slot + 1), loaded.eq(1)]
                        m.next = "weights"
        m.d.comb += self.instruction.ready.eq(start & command.instruction_first)
        with m.If(self.instruction.ready):
            following = self.instruction.payload
            m.d.sync += [weight.eq(following.weights), parameter.eq(following.parameters)]
            m.d.sync += [bounds.low.eq(following.low), bounds.high.eq(following.high)]

        m.d.comb += [
            self.parameter_valid.eq(reader.o_valid & reader.o_meta.parameter),
            self.parameter.slot.eq(reader.o_meta.slot),
            self.parameter.index.eq(reader.o_meta.index),
            self.parameter.word.eq(reader.o_word),
            self.parameter.bounds.eq(bounds),  # the next instruction's come later than these words
            words.i.payload.eq(reader.o_word),
            words.i.valid.eq(reader.o_valid & ~reader.o_meta.parameter),
            reader.release.eq(self.parameter_valid + (words.o.valid & words.o.ready)),
        ]
        return m


class TileParameters(wiring.Component):
    """Parameters of SLOTS tiles, in distributed memory: written word by word, read whole.

    Driven by: `write` in cycles with `write_valid`. What slot `scale_slot` holds is on `scale` in the same
    cycle, and so on: the array starts a tile, drains the one before and writes one before that.
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
        m.d.comb += self.bounds.eq(memory("bounds", 0, self.write.bounds, self.scale_slot, self.bounds.shape().size))
        return m
