"""The matrix unit: convolutions and linear layers, R x C x P multiply-accumulates per cycle."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from weft.arch.config import EngineConfig
from weft.arch.isa import Matrix
from weft.arch.numerics import INT16
from weft.hw.interfaces import ADDRESS_BITS, ReadPort, UnitPort, WritePort
from weft.hw.matrix_array import MatrixArray, result_room
from weft.hw.matrix_layouts import INSTRUCTIONS, operands_layout, result_layout, target_layout, word_layout
from weft.hw.matrix_operands import TileParameters, WeightFetcher
from weft.hw.matrix_sequencer import MatrixSequencer, source_meta
from weft.hw.matrix_writer import MatrixWriter
from weft.hw.stream import Queue, Reader


class MatrixUnit(wiring.Component):
    """Executes Matrix instructions of arch/isa.py.

        instruction -> MatrixSequencer -> Reader(activation) -> sources, words -> MatrixArray -> results -> MatrixWriter
                             `-> WeightFetcher(weight) -> weights, TileParameters -'

    Driven by: `unit`; scratchpad ports `activation` (source words), `weight` (weights and parameters) and
    `result`. Up to INSTRUCTIONS of them overlap: the next one's operands are fetched while this one is
    computed and the one before is written. An instruction that no loop can execute is refused by `illegal`.

    Throughput: steps_per_word steps (twice that if wide) for each pass (output tile and group of P pixels) and
    word (kernel position and channel block), without a gap between passes, tiles and instructions, as long as
    `activation` takes one request in each of P of these cycles; `weight` C/2 (twice that if wide) per word, one per
    scaled_words words of a pass if grouped, one per live pixel and pass if scaled, and the parameter words of a
    tile + 1 per tile; and `result` one per pixel and descriptor (two per pixel if double). `activation` cannot catch
    up what it missed when P = steps_per_word, so it deserves the first priority; `weight` can.

    Latency: about 2 P + 33 cycles from an instruction to the first write of its first pass, steps not counted.

    Sums that an instruction with `hold` leaves stay for the next instruction, which must be one with `resume`.

    Assumes 2 <= columns <= 32 (two columns share a multiplier; a descriptor's mask has 32 bits).
    """

    def __init__(self, config: EngineConfig) -> None:
        if not 2 <= config.columns <= 32:
            raise ValueError(f"the matrix unit needs 2 to 32 columns, got {config.columns}")
        self.config = config
        super().__init__({
            "unit": In(UnitPort(Matrix)),
            "activation": Out(ReadPort(config)),
            "weight": Out(ReadPort(config)),
            "result": Out(WritePort(config)),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        source_room = 16 * -(-(2 * config.pixels + 8) // 16)  # the words worked on, and those on their way
        m.submodules.sequencer = sequencer = MatrixSequencer(config)
        m.submodules.reader = reader = Reader(config, source_meta(config), source_room)
        m.submodules.sources = sources = Queue(unsigned(8 * config.lanes), source_room)
        m.submodules.words = words = Queue(word_layout(config), source_room // config.pixels + 1)
        m.submodules.fetcher = fetcher = WeightFetcher(config)
        m.submodules.parameters = parameters = TileParameters(config)
        m.submodules.array = array = MatrixArray(config)
        m.submodules.results = results = Queue(result_layout(config), result_room(config))
        m.submodules.writer = writer = MatrixWriter(config)
        for source, sink in (
            (sequencer.source, reader.i), (sequencer.fetch, fetcher.fetch), (reader.port, flipped(self.activation)),
            (sources.o, array.sources), (words.o, array.words), (fetcher.port, flipped(self.weight)),
            (fetcher.weights, array.weights), (fetcher.groups, array.groups), (fetcher.scales, array.scales),
            (results.o, writer.result), (writer.port, flipped(self.result)),
        ):
            connect(m, source, sink)
        m.d.comb += [
            # Buffers are never full: the reader and the array count what they have room for. A word stays in
            # `words` until its last step, when its source words have left.
            sources.i.payload.eq(reader.o_word),
            sources.i.valid.eq(reader.o_valid),
            words.i.payload.eq(reader.o_meta.word),
            words.i.valid.eq(reader.o_valid & reader.o_meta.last),
            reader.release.eq(sources.o.valid & sources.o.ready),
            results.i.payload.eq(array.result),
            results.i.valid.eq(array.result_valid),
            array.release.eq(results.o.valid & results.o.ready),

            parameters.write.eq(fetcher.parameter),
            parameters.write_valid.eq(fetcher.parameter_valid),
            parameters.bias_slot.eq(array.bias_slot),
            array.bias.eq(parameters.bias),
            parameters.scale_slot.eq(array.scale_slot),
            array.scale.eq(parameters.scale),
            parameters.bounds_slot.eq(array.bounds_slot),
            array.bounds.eq(parameters.bounds),
            parameters.descriptor_slot.eq(writer.slot),
            writer.descriptors.eq(parameters.descriptors),
            fetcher.free.eq(writer.free),
        ]
        in_flight, to_issue = Signal(range(INSTRUCTIONS + 1)), Signal(range(INSTRUCTIONS + 1))
        accepted = self._accept(m, sequencer, fetcher, writer, room=in_flight != INSTRUCTIONS)

        # Whether this cycle was of use, and if not, why.
        issued_last = array.words.ready & array.words.payload.last & array.words.payload.instruction_last
        m.d.sync += in_flight.eq(in_flight + accepted - writer.done)
        m.d.sync += to_issue.eq(to_issue + accepted - issued_last)
        m.d.comb += [
            self.unit.done.eq(writer.done),
            self.unit.stall_output.eq(array.full | ((to_issue == 0) & writer.blocked)),
            self.unit.stall_scratchpad.eq((to_issue != 0) & ~array.issued & ~array.full),
            self.unit.busy.eq((in_flight != 0) & ~self.unit.stall_output & ~self.unit.stall_scratchpad),
        ]
        return m

    def _accept(self, m: Module, sequencer, fetcher, writer, room):
        """Hands each part what it needs of an instruction, for later. Returns the signal that says it did."""
        offered = self.unit.instruction
        i = offered.payload
        legal, accepted = Signal(), Signal()
        counts = (i.rows, i.columns, i.tiles, i.blocks, i.kernel_y, i.kernel_x, i.ring, i.target_ring)
        pixels, few_bits = self.config.pixels, self.config.pixels.bit_length()
        few = (i.rows <= pixels) & (i.columns <= pixels) & (i.rows[:few_bits] * i.columns[:few_bits] <= pixels)
        m.d.comb += [
            legal.eq(Cat(*(count != 0 for count in counts),
                         *((step == 1) | (step == 2) for step in (i.target_step_y, i.target_step_x)),
                         i.plain | ~i.double, ~i.plain | (i.group < self.config.lanes // self.config.columns),
                         ~(i.resume | i.hold) | ((i.tiles == 1) & few)).all()),
            sequencer.instruction.payload.eq(i),
            sequencer.instruction.valid.eq(offered.valid & legal & room),
            offered.ready.eq(~legal | (sequencer.instruction.ready & room)),
            accepted.eq(offered.valid & legal & offered.ready),
        ]
        m.d.sync += self.unit.illegal.eq(offered.valid & ~legal)

        m.submodules.operands = operands = Queue(operands_layout(), INSTRUCTIONS)
        m.submodules.targets = targets = Queue(target_layout(), INSTRUCTIONS)
        connect(m, operands.o, fetcher.instruction)
        connect(m, targets.o, writer.instruction)
        m.d.comb += operands.i.valid.eq(accepted)
        m.d.comb += [operands.i.payload[name].eq(i[name]) for name in (
            "weights", "parameters", "wide", "plain", "grouped", "scales", "scales_pitch", "rows", "columns")]
        m.d.comb += [
            operands.i.payload.scaled.eq(i.scaled & ~i.hold),
            operands.i.payload.low.eq(Mux(i.double, INT16[0], i.low)),
            operands.i.payload.high.eq(Mux(i.double, INT16[1], i.high)),
        ]

        target, offset = Signal(target_layout()), Signal(ADDRESS_BITS)  # anchor * pitch takes a cycle
        m.d.sync += [
            target.target.eq(i.target),
            target.pitch.eq(i.target_pitch),
            target.ring.eq(i.target_ring),
            target.anchor.eq(i.target_anchor),
            target.step_y.eq(i.target_step_y),
            target.step_x.eq(i.target_step_x),
            target.columns.eq(i.columns),
            target.tag.eq(i.tag),
            target.plane.eq(i.target_plane),
            target.high.eq(i.target_high),
            target.group.eq(i.group),
            target.plain.eq(i.plain),
            target.double.eq(i.double),
            target.hold.eq(i.hold),
            offset.eq(i.target_anchor * i.target_pitch),
            targets.i.valid.eq(accepted),
        ]
        m.d.comb += [targets.i.payload.eq(target), targets.i.payload.start.eq(target.target + offset)]
        return accepted
