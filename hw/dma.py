"""Movement between memory and scratchpad: load unit, store unit, and the AXI channels under them.

The units hold the loops of their instructions; the channels hold the AXI protocol. A soft reset of the
units may come at any time: the channels then finish on their own what they owe the bus.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import exact_log2

from weft.arch.config import EngineConfig
from weft.arch.isa import Load, Store
from weft.arch.registers import SEGMENTS
from weft.hw.axi import AXI4
from weft.hw.interfaces import ADDRESS_BITS, TAG_BITS, ReadPort, UnitPort, WritePort
from weft.hw.layouts import layout_of
from weft.hw.stream import Queue

COUNT_BITS = 16  # run, rows and planes of an instruction
LENGTH_BITS = 8  # AXI4 burst length
FETCH_AHEAD = 2  # longest bursts of instructions read ahead
FETCH_BURSTS = 2 * FETCH_AHEAD  # bursts of instructions in flight: after a jump, those of the old stream too
STORE_WORDS = 8  # words read ahead by the store unit: covers the scratchpad's latency and a few conflicts
INCR = 0b01
FETCH_ID, LOAD_ID = 0, 1


def beat_address_bits(config: EngineConfig) -> int:
    return config.address_bits - exact_log2(config.bus_bytes)


def burst_layout(config: EngineConfig) -> data.StructLayout:
    """A burst: byte address, beats - 1, and whether it is the last of its transfer."""
    return data.StructLayout({"address": config.address_bits, "length": LENGTH_BITS, "last": 1})


def read_beat_layout(config: EngineConfig) -> data.StructLayout:
    return data.StructLayout({"data": 8 * config.bus_bytes, "last": 1, "error": 1})


def write_beat_layout(config: EngineConfig) -> data.StructLayout:
    return data.StructLayout({"data": 8 * config.bus_bytes, "strb": config.bus_bytes})


def nest_layout(address_bits: int, run_bits: int) -> data.StructLayout:
    """`planes` x `rows` runs of `run` consecutive addresses from `start`; counts are at least 1."""
    return data.StructLayout({
        "start": address_bits,
        "run": run_bits,
        "rows": COUNT_BITS,
        "planes": COUNT_BITS,
        "row_step": address_bits,
        "plane_step": address_bits,
    })


def place_layout(label_bits: int) -> data.StructLayout:
    """The scratchpad side of a transfer, with a label that goes along with every word."""
    return data.StructLayout({"nest": nest_layout(ADDRESS_BITS, COUNT_BITS), "label": label_bits})


class ReadClient(wiring.Signature):
    """How memory is read, seen from the reader: bursts asked for, their beats in the order of the requests."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__({
            "request": Out(stream.Signature(burst_layout(config))),
            "data": In(stream.Signature(read_beat_layout(config))),
        })


class WriteClient(wiring.Signature):
    """How memory is written, seen from the writer: beats and responses in the order of the requests.

    The payload of a response is high for an error.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__({
            "request": Out(stream.Signature(burst_layout(config))),
            "data": Out(stream.Signature(write_beat_layout(config))),
            "response": In(stream.Signature(1)),
        })


class Runs(wiring.Component):
    """First addresses of the runs of a loop nest, one per cycle, without a gap from one nest to the next.

    Latency 1 cycle from an accepted nest to its first run.
    """

    def __init__(self, address_bits: int, run_bits: int) -> None:
        super().__init__({
            "nest": In(stream.Signature(nest_layout(address_bits, run_bits))),
            "run": Out(stream.Signature(data.StructLayout({"start": address_bits, "length": run_bits, "last": 1}))),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        nest, active = Signal.like(self.nest.payload), Signal()
        start, plane = Signal.like(nest.start), Signal.like(nest.start)
        rows, planes = Signal(COUNT_BITS), Signal(COUNT_BITS)
        last_row, next_plane = rows == 1, plane + nest.plane_step
        moves = ~active | self.run.ready
        m.d.comb += [
            self.run.valid.eq(active),
            self.run.payload.start.eq(start),
            self.run.payload.length.eq(nest.run),
            self.run.payload.last.eq(last_row & (planes == 1)),
            self.nest.ready.eq(moves & (~active | self.run.payload.last)),
        ]
        with m.If(moves):
            with m.If(self.nest.ready):
                m.d.sync += [
                    active.eq(self.nest.valid),
                    nest.eq(self.nest.payload),
                    start.eq(self.nest.payload.start),
                    plane.eq(self.nest.payload.start),
                    rows.eq(self.nest.payload.rows),
                    planes.eq(self.nest.payload.planes),
                ]
            with m.Elif(last_row):
                m.d.sync += [start.eq(next_plane), plane.eq(next_plane), rows.eq(nest.rows), planes.eq(planes - 1)]
            with m.Else():
                m.d.sync += [start.eq(start + nest.row_step), rows.eq(rows - 1)]
        return m


class Words(wiring.Component):
    """Scratchpad addresses of a transfer's words, one per cycle, each with the transfer's label.

    One transfer at a time: the next is taken 1 cycle after the last word of the one before.
    """

    def __init__(self, label_bits: int) -> None:
        super().__init__({
            "place": In(stream.Signature(place_layout(label_bits))),
            "word": Out(stream.Signature(data.StructLayout({"address": ADDRESS_BITS, "label": label_bits, "last": 1}))),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.runs = runs = Runs(ADDRESS_BITS, COUNT_BITS)
        run, word, busy = runs.run, self.word, Signal()
        left, last_run = Signal(COUNT_BITS), Signal()
        m.d.comb += [
            self.place.ready.eq(~busy),
            runs.nest.valid.eq(self.place.valid & ~busy),
            runs.nest.payload.eq(self.place.payload.nest),
            word.payload.last.eq(last_run & (left == 1)),
            run.ready.eq(~word.valid | (word.ready & (left == 1))),
        ]
        with m.If(self.place.valid & ~busy):
            m.d.sync += [busy.eq(1), word.payload.label.eq(self.place.payload.label)]
        with m.Elif(word.valid & word.ready & word.payload.last):
            m.d.sync += busy.eq(0)
        with m.If(run.ready):
            m.d.sync += [
                word.valid.eq(run.valid),
                word.payload.address.eq(run.payload.start),
                left.eq(run.payload.length),
                last_run.eq(run.payload.last),
            ]
        with m.Elif(word.ready):
            m.d.sync += [word.payload.address.eq(word.payload.address + 1), left.eq(left - 1)]
        return m


class Bursts(wiring.Component):
    """Cuts a loop nest over beat addresses into AXI bursts.

    A run that starts where the one before ended joins it, within one nest. A burst ends at the latest at
    a multiple of `burst_beats`, which keeps it inside 4 KB. One cycle per run and one per burst.
    """

    def __init__(self, config: EngineConfig, run_bits: int) -> None:
        self._config, self._run_bits = config, run_bits
        super().__init__({
            "nest": In(stream.Signature(nest_layout(beat_address_bits(config), run_bits))),
            "burst": Out(stream.Signature(burst_layout(config))),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        config = self._config
        m.submodules.runs = runs = Runs(beat_address_bits(config), self._run_bits)
        connect(m, flipped(self.nest), runs.nest)
        run, burst = runs.run, self.burst
        address, end = Signal(beat_address_bits(config)), Signal(beat_address_bits(config))
        left, last_run = Signal(self._run_bits + 1), Signal()

        room = Signal(range(config.burst_beats + 1))  # beats to the next multiple of burst_beats
        length = Signal(range(config.burst_beats + 1))
        joins = (left < config.burst_beats) & (run.payload.start == end) & ~last_run
        m.d.comb += [
            room.eq(config.burst_beats - address[:exact_log2(config.burst_beats)]),
            length.eq(Mux(left < room, left, room)),
            run.ready.eq((left == 0) | (run.valid & joins)),
            burst.valid.eq((left != 0) & ~run.ready),
            burst.payload.address.eq(address << exact_log2(config.bus_bytes)),
            burst.payload.length.eq(length - 1),
            burst.payload.last.eq(last_run & (left == length)),
        ]
        with m.If(run.valid & run.ready):
            m.d.sync += [
                left.eq(left + run.payload.length),
                end.eq(run.payload.start + run.payload.length),
                last_run.eq(run.payload.last),
            ]
            with m.If(left == 0):
                m.d.sync += address.eq(run.payload.start)
        with m.Elif(burst.valid & burst.ready):
            m.d.sync += [left.eq(left - length), address.eq(address + length)]
        return m


class TransferDecode(wiring.Component):
    """First stage of load and store: adds the segment, checks the fields, registers the two loop nests.

    Latency 1 cycle, one instruction per cycle. The label of a load is its tag, that of a store its rotated mask.
    Zero counts, a segment that does not exist, memory offsets that are no multiple of a word and a rotation by all
    lanes or more are illegal: `illegal` pulses 1 cycle after the instruction was accepted.
    """

    def __init__(self, config: EngineConfig, cls: type[Load]) -> None:
        self._config, self._stores = config, cls is Store
        self.run_bits = COUNT_BITS + exact_log2(config.word_bytes // config.bus_bytes)
        super().__init__({
            "instruction": In(stream.Signature(layout_of(cls))),
            "segments": In(data.ArrayLayout(unsigned(config.address_bits), SEGMENTS)),
            "memory": Out(stream.Signature(nest_layout(beat_address_bits(config), self.run_bits))),
            "place": Out(stream.Signature(place_layout(config.lanes if cls is Store else TAG_BITS))),
            "illegal": Out(1),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        config, given = self._config, self.instruction.payload
        beat, aligned = exact_log2(config.bus_bytes), exact_log2(config.word_bytes)
        valid, memory, place = Signal(), self.memory.payload, self.place.payload

        if self._stores:
            label = given.mask[:config.lanes]
            for bit in range(exact_log2(config.lanes)):
                label = Mux(given.rotate[bit], label.rotate_left(1 << bit), label)
        else:
            label = given.tag
        wrong = Cat(
            given.run == 0, given.rows == 0, given.planes == 0, given.base >= SEGMENTS,
            given.offset[:aligned] != 0, given.row_bytes[:aligned] != 0, given.plane_bytes[:aligned] != 0,
            given.rotate >= config.lanes if self._stores else 0,
        ).any()
        m.d.comb += [  # both nests leave together
            self.memory.valid.eq(valid & self.place.ready),
            self.place.valid.eq(valid & self.memory.ready),
            self.instruction.ready.eq(~valid | (self.memory.ready & self.place.ready)),
        ]
        m.d.sync += self.illegal.eq(self.instruction.valid & self.instruction.ready & wrong)
        with m.If(self.instruction.ready):
            m.d.sync += [
                valid.eq(self.instruction.valid & ~wrong),
                memory.start.eq((self.segments[given.base[:exact_log2(SEGMENTS)]] + given.offset) >> beat),
                memory.run.eq(given.run << self.run_bits - COUNT_BITS),
                memory.rows.eq(given.rows),
                memory.planes.eq(given.planes),
                memory.row_step.eq(given.row_bytes >> beat),
                memory.plane_step.eq(given.plane_bytes >> beat),
                place.nest.start.eq(given.address),
                place.nest.run.eq(given.run),
                place.nest.rows.eq(given.rows),
                place.nest.planes.eq(given.planes),
                place.nest.row_step.eq(given.row_words),
                place.nest.plane_step.eq(given.plane_words),
                place.label.eq(label),
            ]
        return m


class LoadUnit(wiring.Component):
    """Executes LOAD: read bursts, words assembled from beats, whole words written to the scratchpad.

    Driven by the dispatcher through `unit`; `memory` belongs to the read channel. Up to `outstanding` bursts
    in flight; the addresses of the next instructions go out while data of earlier ones arrive. One beat per cycle
    as long as the scratchpad takes a word every word_bytes / bus_bytes cycles. `done` pulses when the last word
    is accepted. `error` pulses for a beat received with an error response. Latency from an accepted instruction
    to its first request: 3 cycles.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        super().__init__({
            "unit": In(UnitPort(Load)),
            "segments": In(data.ArrayLayout(unsigned(config.address_bits), SEGMENTS)),
            "memory": Out(ReadClient(config)),
            "write": Out(WritePort(config)),
            "error": Out(1),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        config, unit, beat, write = self._config, self.unit, self.memory.data, self.write.request
        m.submodules.decode = decode = TransferDecode(config, Load)
        m.submodules.bursts = bursts = Bursts(config, decode.run_bits)
        m.submodules.places = places = Queue(place_layout(TAG_BITS), config.outstanding)
        m.submodules.words = words = Words(TAG_BITS)
        m.d.comb += decode.segments.eq(self.segments)
        connect(m, flipped(unit.instruction), decode.instruction)
        connect(m, decode.memory, bursts.nest)
        connect(m, decode.place, places.i)
        connect(m, places.o, words.place)

        request, in_flight = self.memory.request, Signal(range(config.outstanding + 1))
        may_ask = in_flight != config.outstanding
        m.d.comb += [
            request.payload.eq(bursts.burst.payload),
            request.valid.eq(bursts.burst.valid & may_ask),
            bursts.burst.ready.eq(request.ready & may_ask),
        ]
        takes = beat.valid & beat.ready
        m.d.sync += in_flight.eq(in_flight + (request.valid & request.ready) - (takes & beat.payload.last))

        beats = config.word_bytes // config.bus_bytes
        m.submodules.buffer = buffer = Queue(8 * config.word_bytes, 2)  # keeps beat.ready a register
        if beats > 1:
            early, count = Signal(8 * (config.word_bytes - config.bus_bytes)), Signal(range(beats))
            completes = count == beats - 1
            word = Cat(early, beat.payload.data)
            with m.If(takes):
                m.d.sync += [early.eq(word[8 * config.bus_bytes:]), count.eq(count + 1)]
        else:
            completes, word = 1, beat.payload.data
        m.d.comb += [
            beat.ready.eq(~completes | buffer.i.ready),
            buffer.i.payload.eq(word),
            buffer.i.valid.eq(beat.valid & completes),
            write.valid.eq(buffer.o.valid & words.word.valid),
            write.payload.address.eq(words.word.payload.address),
            write.payload.data.eq(buffer.o.payload),
            write.payload.mask.eq(~0),
            write.payload.tag.eq(words.word.payload.label),
            buffer.o.ready.eq(write.ready & words.word.valid),
            words.word.ready.eq(write.ready & buffer.o.valid),
        ]
        m.d.sync += self.error.eq(takes & beat.payload.error)

        active = decode.place.valid | decode.memory.valid | places.o.valid | ~words.place.ready
        writes = write.valid & write.ready
        m.d.comb += [
            unit.done.eq(writes & words.word.payload.last),
            unit.illegal.eq(decode.illegal),
            unit.busy.eq(takes | writes),
            unit.stall_scratchpad.eq(~unit.busy & write.valid),
            unit.stall_memory.eq(~unit.busy & ~write.valid & active),
        ]
        return m


class StoreUnit(wiring.Component):
    """Executes STORE: words read from the scratchpad, cut into beats, written by bursts under the rotated byte mask.

    Driven by the dispatcher through `unit`; `memory` belongs to the write channel. Up to `outstanding` bursts
    wait for their response; the next instructions start meanwhile. One beat per cycle as long as the scratchpad
    delivers a word every word_bytes / bus_bytes cycles. `done` pulses with the response of the last burst.
    `error` pulses for an error response. Latency from an accepted instruction to its first request: 3 cycles.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        super().__init__({
            "unit": In(UnitPort(Store)),
            "segments": In(data.ArrayLayout(unsigned(config.address_bits), SEGMENTS)),
            "read": Out(ReadPort(config)),
            "memory": Out(WriteClient(config)),
            "error": Out(1),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        config, unit, read = self._config, self.unit, self.read
        request, beat, response = self.memory.request, self.memory.data, self.memory.response
        m.submodules.decode = decode = TransferDecode(config, Store)
        m.submodules.bursts = bursts = Bursts(config, decode.run_bits)
        m.submodules.places = places = Queue(place_layout(config.lanes), 2)
        m.submodules.words = words = Words(config.lanes)
        m.d.comb += decode.segments.eq(self.segments)
        connect(m, flipped(unit.instruction), decode.instruction)
        connect(m, decode.memory, bursts.nest)
        connect(m, decode.place, places.i)
        connect(m, places.o, words.place)

        # `masks` holds every word from its request to its last beat, so its room is the room of `buffer`.
        m.submodules.masks = masks = Queue(config.lanes, STORE_WORDS)
        m.submodules.buffer = buffer = Queue(8 * config.word_bytes, STORE_WORDS)
        beats = config.word_bytes // config.bus_bytes
        count, sends = Signal(range(beats)), Signal()
        m.d.comb += [
            read.request.valid.eq(words.word.valid & masks.i.ready),
            read.request.payload.eq(words.word.payload.address),
            words.word.ready.eq(read.request.ready & masks.i.ready),
            masks.i.valid.eq(words.word.valid & read.request.ready),
            masks.i.payload.eq(words.word.payload.label),
            buffer.i.valid.eq(read.data_valid),
            buffer.i.payload.eq(read.data),
            beat.valid.eq(buffer.o.valid),
            beat.payload.data.eq(buffer.o.payload.word_select(count, 8 * config.bus_bytes)),
            beat.payload.strb.eq(masks.o.payload.word_select(count, config.bus_bytes)),
            sends.eq(beat.valid & beat.ready),
            buffer.o.ready.eq(sends & (count == beats - 1)),
            masks.o.ready.eq(buffer.o.ready),
        ]
        with m.If(sends):
            m.d.sync += count.eq(count + 1)

        m.submodules.lasts = lasts = Queue(1, config.outstanding)  # of the bursts in flight
        m.d.comb += [
            request.payload.eq(bursts.burst.payload),
            request.valid.eq(bursts.burst.valid & lasts.i.ready),
            bursts.burst.ready.eq(request.ready & lasts.i.ready),
            lasts.i.valid.eq(bursts.burst.valid & request.ready),
            lasts.i.payload.eq(bursts.burst.payload.last),
            response.ready.eq(1),
            lasts.o.ready.eq(response.valid),
        ]
        m.d.sync += self.error.eq(response.valid & response.payload)

        reading = decode.place.valid | decode.memory.valid | places.o.valid | ~words.place.ready
        active = reading | masks.o.valid | bursts.burst.valid | lasts.o.valid
        m.d.comb += [
            unit.done.eq(response.valid & lasts.o.payload),
            unit.illegal.eq(decode.illegal),
            unit.busy.eq(sends),
            unit.stall_scratchpad.eq(~sends & active & ~beat.valid & (reading | masks.o.valid)),
            unit.stall_memory.eq(~sends & active & ~unit.stall_scratchpad),
        ]
        return m


class ReadChannel(wiring.Component):
    """AXI read channels, shared by instruction fetch (first) and load unit, told apart by their ID.

    Requests are taken one per cycle and appear on AR 1 cycle later; R goes straight to its client. While `stop`
    is high nothing new is asked for and what still arrives is dropped; `idle` says that nothing is owed.
    `beat` is high for each beat received. Fetch asks only for what it has room for, so it never stands in the
    way of the load unit.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        super().__init__({
            "stop": In(1),
            "idle": Out(1),
            "beat": Out(1),
            "fetch": In(ReadClient(config)),
            "load": In(ReadClient(config)),
            "bus": Out(AXI4(config.bus_bytes, config.address_bits)),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        config, bus, clients = self._config, self.bus, {FETCH_ID: self.fetch, LOAD_ID: self.load}
        most = config.outstanding + FETCH_BURSTS
        in_flight, asks, ends = Signal(range(most + 1)), Signal(), Signal()

        free = ~self.stop & (~bus.arvalid | bus.arready) & (in_flight != most)
        grant = Mux(self.fetch.request.valid, FETCH_ID, LOAD_ID)
        chosen = Mux(grant == LOAD_ID, self.load.request.payload, self.fetch.request.payload)
        m.d.comb += [
            bus.arsize.eq(exact_log2(config.bus_bytes)),
            bus.arburst.eq(INCR),
            asks.eq(free & (self.fetch.request.valid | self.load.request.valid)),
            bus.rready.eq(self.stop),
            self.beat.eq(bus.rvalid & bus.rready),
            ends.eq(self.beat & bus.rlast),
            self.idle.eq(in_flight == 0),
        ]
        for number, client in clients.items():
            m.d.comb += [
                client.request.ready.eq(free & (grant == number)),
                client.data.valid.eq(bus.rvalid & (bus.rid == number) & ~self.stop),
                client.data.payload.data.eq(bus.rdata),
                client.data.payload.last.eq(bus.rlast),
                client.data.payload.error.eq(bus.rresp[1]),  # SLVERR or DECERR
            ]
            with m.If(bus.rid == number):
                m.d.comb += bus.rready.eq(self.stop | client.data.ready)
        with m.If(asks):
            burst = data.View(burst_layout(config), chosen)
            m.d.sync += [
                bus.arvalid.eq(1), bus.arid.eq(grant), bus.araddr.eq(burst.address), bus.arlen.eq(burst.length),
            ]
        with m.Elif(bus.arready):
            m.d.sync += bus.arvalid.eq(0)
        m.d.sync += in_flight.eq(in_flight + asks - ends)
        return m


class WriteChannel(wiring.Component):
    """AXI write channels of the store unit.

    Requests and beats are taken one per cycle and appear on AW and W 1 cycle later; a beat is taken after the
    request of its request.payload. Responses come in order. While `stop` is high nothing new is begun, the beats still
    owed are sent without any byte enabled and responses are dropped; `idle` says that nothing is owed. `beat`
    is high for each beat sent.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        super().__init__({
            "stop": In(1),
            "idle": Out(1),
            "beat": Out(1),
            "store": In(WriteClient(config)),
            "bus": Out(AXI4(config.bus_bytes, config.address_bits)),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        config, bus, request = self._config, self.bus, self.store.request
        m.submodules.lengths = lengths = Queue(LENGTH_BITS, config.outstanding)
        in_flight = Signal(range(config.outstanding + 1))
        asks, ends = Signal(), Signal()
        m.d.comb += [
            bus.awid.eq(0),
            bus.awsize.eq(exact_log2(config.bus_bytes)),
            bus.awburst.eq(INCR),
            request.ready.eq(~self.stop & (~bus.awvalid | bus.awready) & (in_flight != config.outstanding)),
            asks.eq(request.valid & request.ready),
            lengths.i.valid.eq(asks),
            lengths.i.payload.eq(request.payload.length),
            self.idle.eq(in_flight == 0),
        ]
        with m.If(asks):
            burst = request.payload
            m.d.sync += [bus.awvalid.eq(1), bus.awaddr.eq(burst.address), bus.awlen.eq(burst.length)]
        with m.Elif(bus.awready):
            m.d.sync += bus.awvalid.eq(0)

        count, free, sends = Signal(LENGTH_BITS), Signal(), Signal()
        last = count == lengths.o.payload
        m.d.comb += [
            free.eq(lengths.o.valid & (~bus.wvalid | bus.wready)),
            self.store.data.ready.eq(free & ~self.stop),
            sends.eq(free & (self.store.data.valid | self.stop)),
            lengths.o.ready.eq(sends & last),
            self.beat.eq(bus.wvalid & bus.wready),
        ]
        with m.If(sends):
            m.d.sync += [
                bus.wvalid.eq(1),
                bus.wdata.eq(self.store.data.payload.data),
                bus.wstrb.eq(Mux(self.stop, 0, self.store.data.payload.strb)),
                bus.wlast.eq(last),
                count.eq(Mux(last, 0, count + 1)),
            ]
        with m.Elif(bus.wready):
            m.d.sync += bus.wvalid.eq(0)

        m.d.comb += [
            bus.bready.eq(1),
            ends.eq(bus.bvalid),
            self.store.response.valid.eq(bus.bvalid & ~self.stop),
            self.store.response.payload.eq(bus.bresp[1]),  # SLVERR or DECERR
        ]
        m.d.sync += in_flight.eq(in_flight + asks - ends)
        return m


class MemoryPort(wiring.Component):
    """Both channels on one AXI4 port."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        super().__init__({
            "stop": In(1),
            "idle": Out(1),
            "read_beat": Out(1),
            "write_beat": Out(1),
            "fetch": In(ReadClient(config)),
            "load": In(ReadClient(config)),
            "store": In(WriteClient(config)),
            "bus": Out(AXI4(config.bus_bytes, config.address_bits)),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.reads = reads = ReadChannel(self._config)
        m.submodules.writes = writes = WriteChannel(self._config)
        connect(m, flipped(self.fetch), reads.fetch)
        connect(m, flipped(self.load), reads.load)
        connect(m, flipped(self.store), writes.store)
        m.d.comb += [
            reads.stop.eq(self.stop),
            writes.stop.eq(self.stop),
            self.idle.eq(reads.idle & writes.idle),
            self.read_beat.eq(reads.beat),
            self.write_beat.eq(writes.beat),
        ]
        for name, member in self.bus.signature.members.items():
            channel = reads if name.startswith(("ar", "r")) else writes
            outer, inner = getattr(self.bus, name), getattr(channel.bus, name)
            m.d.comb += outer.eq(inner) if member.flow is Out else inner.eq(outer)
        return m
