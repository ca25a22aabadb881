"""Instruction fetch: the program as a stream of instruction words that can jump, and single words of memory."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, ResetInserter, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from weft.arch.config import EngineConfig
from weft.arch.isa import INSTRUCTION_BYTES
from weft.arch.registers import SEGMENTS
from weft.hw.dma import FETCH_AHEAD, ReadClient, beat_address_bits, burst_layout
from weft.hw.layouts import INSTRUCTION_BITS

LENGTH_BITS = 32  # instructions of a program
VALUE_BITS = 32  # of a word read from memory

PLACE = data.StructLayout({"segment": exact_log2(SEGMENTS), "offset": 32})  # of a word in memory


class Fetch(wiring.Component):
    """Reads `length` instructions from `address` on, by bursts, ahead of the dispatcher, and words of memory for it.

    Starts when it leaves reset; `address`, `length` and `segments` must then stay. A pulse on `jump` makes instruction
    `destination`, below `length`, the next one delivered; nothing may be taken from `instruction` in that cycle. What
    is still to arrive of the old stream is received and dropped.

    `read` asks for the 32-bit word, at a multiple of 4, at segments[segment] + offset; `answer` delivers it and must be
    taken at once. One at a time, and no jump meanwhile.

    `memory` belongs to the read channel; bursts of instructions are asked for only when the buffer (FETCH_AHEAD longest
    bursts) has room for all of their beats, so a beat is always taken at once. Delivers an instruction every
    64 / bus_bytes cycles while memory keeps up. From `jump` to the request 1 cycle, from the beat that completes the
    first instruction to its delivery 2; from `read` to the request 1 cycle, from its beat to `answer` 1. `error`
    pulses for a beat received with an error response. The bus must not be wider than an instruction, nor narrower than
    a word.
    """

    def __init__(self, config: EngineConfig) -> None:
        if config.bus_bytes > INSTRUCTION_BYTES:
            raise ValueError(f"bus_bytes = {config.bus_bytes} exceeds the {INSTRUCTION_BYTES} bytes of an instruction")
        if 8 * config.bus_bytes < VALUE_BITS:
            raise ValueError(f"bus_bytes = {config.bus_bytes} is below the {VALUE_BITS // 8} bytes of a word read")
        self._config = config
        super().__init__({
            "address": In(unsigned(config.address_bits)),
            "length": In(LENGTH_BITS),
            "segments": In(data.ArrayLayout(unsigned(config.address_bits), SEGMENTS)),
            "memory": Out(ReadClient(config)),
            "instruction": Out(stream.Signature(INSTRUCTION_BITS)),
            "jump": In(1),
            "destination": In(LENGTH_BITS),
            "read": In(stream.Signature(PLACE)),
            "answer": Out(stream.Signature(VALUE_BITS, always_ready=True)),
            "error": Out(1),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        config, beat, instruction = self._config, self.memory.data, self.instruction
        bus, beats = exact_log2(config.bus_bytes), INSTRUCTION_BYTES // config.bus_bytes
        depth = max(FETCH_AHEAD * config.burst_beats, beats)
        burst = Signal(burst_layout(config))
        asks, asks_word, answers = Signal(), Signal(), Signal()  # for a burst of instructions, for a word; it is here
        arrives = beat.valid & ~answers  # a beat of instructions

        begun, address = Signal(), Signal(beat_address_bits(config))
        left = Signal(LENGTH_BITS + exact_log2(beats))
        first, room = Mux(begun, self.destination, 0), Signal(range(config.burst_beats + 1))
        count = Signal(range(config.burst_beats + 1))
        m.d.comb += [  # a burst ends at the latest at a multiple of burst_beats, which keeps it inside 4 KB
            room.eq(config.burst_beats - address[:exact_log2(config.burst_beats)]),
            count.eq(Mux(left < room, left, room)),
            burst.address.eq(address << bus),
            burst.length.eq(count - 1),
        ]
        m.d.sync += begun.eq(1)
        with m.If(~begun | self.jump):
            m.d.sync += [
                address.eq(self.address[bus:] + (first << exact_log2(beats))),
                left.eq((self.length - first) << exact_log2(beats)),
            ]
        with m.Elif(asks):
            m.d.sync += [address.eq(address + count), left.eq(left - count)]

        # Beats of instructions: in flight, those of them to be dropped, those that have or will need a place.
        owed, dropped, held = Signal(range(2 * depth + 1)), Signal(range(2 * depth + 1)), Signal(range(depth + 1))
        owed_next, takes = Signal.like(owed), Signal()
        m.d.comb += owed_next.eq(owed + Mux(asks, count, 0) - arrives)
        m.d.sync += owed.eq(owed_next)
        with m.If(self.jump):
            m.d.sync += [dropped.eq(owed_next), held.eq(0)]
        with m.Else():
            m.d.sync += [
                dropped.eq(dropped - (arrives & (dropped != 0))),
                held.eq(held + Mux(asks, count, 0) - takes),
            ]

        # A word comes after all that was in flight when it was asked for.
        wanted, awaited, before = Signal(), Signal(), Signal.like(owed)
        place, word = self.read.payload, Signal(config.address_bits)
        m.d.comb += [self.read.ready.eq(~wanted & ~awaited), answers.eq(beat.valid & awaited & (before == 0))]
        with m.If(self.read.ready):
            m.d.sync += [wanted.eq(self.read.valid), word.eq(self.segments[place.segment] + place.offset)]
        with m.Elif(asks_word):
            m.d.sync += [wanted.eq(0), awaited.eq(1), before.eq(owed_next)]
        with m.Elif(answers):
            m.d.sync += awaited.eq(0)
        with m.Elif(arrives):
            m.d.sync += before.eq(before - 1)
        m.d.sync += [
            self.answer.valid.eq(answers),
            self.answer.payload.eq(beat.payload.data.word_select(word[2:bus], VALUE_BITS)),
            self.error.eq(beat.valid & beat.payload.error),
        ]

        request, fits = self.memory.request, Signal()
        m.d.comb += [
            fits.eq((left != 0) & (held + count <= depth) & (owed + count <= 2 * depth)),
            request.valid.eq(wanted | fits),
            request.payload.eq(burst),
            asks_word.eq(wanted & request.ready),
            asks.eq(~wanted & fits & request.ready),
            beat.ready.eq(1),
        ]
        with m.If(wanted):
            m.d.comb += [request.payload.address.eq(Cat(Const(0, bus), word[bus:])), request.payload.length.eq(0)]

        m.submodules.buffer = buffer = ResetInserter(self.jump)(
            SyncFIFOBuffered(width=8 * config.bus_bytes, depth=depth + 1))  # 1: its output
        early, number = Signal(INSTRUCTION_BITS - 8 * config.bus_bytes), Signal(range(beats))
        last = number == beats - 1
        m.d.comb += [
            buffer.w_en.eq(arrives & (dropped == 0)),
            buffer.w_data.eq(beat.payload.data),
            instruction.valid.eq(buffer.r_rdy & last),
            instruction.payload.eq(Cat(early, buffer.r_data)),
            takes.eq(buffer.r_rdy & (~last | instruction.ready)),
            buffer.r_en.eq(takes),
        ]
        with m.If(takes):
            m.d.sync += [early.eq(instruction.payload[8 * config.bus_bytes:]), number.eq(number + 1)]
        with m.If(self.jump):
            m.d.sync += number.eq(0)
        return m
