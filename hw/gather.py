"""The sampling front end of the vector unit: which scratchpad words a tap needs, and the sample they make."""

from __future__ import annotations

from types import SimpleNamespace

from amaranth.hdl import Cat, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from weft.arch.config import EngineConfig
from weft.arch.isa import Sampling, Vector, VectorOp
from weft.arch.numerics import FRACTION_BITS
from weft.hw.interfaces import ADDRESS_BITS, ReadPort
from weft.hw.layouts import layout_of
from weft.hw.stream import Queue, Reader

NEIGHBOURS = 4  # read ports: (y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1)
MAX_TAPS = 25  # kernel of the largest depthwise layer, 5 x 5; bounds the weights kept on chip
TAP_BITS = (MAX_TAPS - 1).bit_length()
COORDINATE_BITS = 19  # 4095 columns of 63 bytes, and a sign
FIELDS = layout_of(Vector)


def field_shape(name: str):
    """Shape of one field of the instruction."""
    return FIELDS[name].shape


def step_layout(config: EngineConfig) -> data.StructLayout:
    """What travels with a sample: what to do with it and, if it is the `last` of its word, where that goes.

    `first` and `last` bracket the taps that make one output word; `block_end` marks the last tap of a
    channel block, `final` the last of the instruction.
    """
    return data.StructLayout({
        **{name: field_shape(name) for name in ("operation", "unsigned", "low", "high", "tag")},
        "index": TAP_BITS,
        "first": 1,
        "last": 1,
        "block_end": 1,
        "final": 1,
        "address": ADDRESS_BITS,
    })


def sample_layout(config: EngineConfig) -> data.StructLayout:
    """One tap's sample: a byte for each lane, and its step."""
    return data.StructLayout({"data": 8 * config.lanes, "step": step_layout(config)})


def tap_layout(config: EngineConfig) -> data.StructLayout:
    """One tap on its way to addresses. Rows count from `window_y`; a PACK column counts bytes.

    Position = (row, column) + reach * (step_y, step_x) + offset / 2**fraction.
    """
    lane_bits = (config.lanes - 1).bit_length()
    source = ("window_y", "height", "width", "ring", "anchor", "pitch", "pack_bytes", "fraction")
    return data.StructLayout({
        "row": signed(COORDINATE_BITS),
        "column": signed(COORDINATE_BITS),
        "reach_y": signed(8),
        "reach_x": signed(8),
        "step_y": signed(5),
        "step_x": signed(5),
        "offset_y": signed(8),
        "offset_x": signed(8),
        "base": ADDRESS_BITS,  # word of slot 0, column 0
        "pack_at": lane_bits,  # byte of the output word that this tap's first byte goes to
        "target_row": ADDRESS_BITS,  # the output word is at target_row + target_column
        "target_column": ADDRESS_BITS,
        **{name: field_shape(name) for name in source},
        "step": step_layout(config),
    })


def stage(m: Module, enable: Value, name: str, **values) -> SimpleNamespace:
    """A pipeline stage: one register for each value, loaded on `enable`. What no later stage reads costs nothing."""
    registers = SimpleNamespace()
    with m.If(enable):
        for key, value in values.items():
            register = Signal.like(value, name=f"{name}_{key}", reset_less=True)
            m.d.sync += register.eq(value)
            setattr(registers, key, register)
    return registers


class ReadQueue(wiring.Component):
    """Scratchpad reads as a stream of words, in the order of the addresses.

    Addresses wait here while the port is refused, words while the consumer is not ready; a request is made
    only when its word has a place.

    Latency: READ_LATENCY + 2 cycles. Throughput: one word per cycle if `depth` is at least READ_LATENCY + 2.
    """

    def __init__(self, config: EngineConfig, depth: int = 8, addresses: int = 4) -> None:
        self.config, self.depth, self.addresses = config, depth, addresses
        super().__init__({
            "address": In(stream.Signature(ADDRESS_BITS)),
            "word": Out(stream.Signature(8 * config.lanes)),
            "port": Out(ReadPort(config)),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.requests = requests = Queue(ADDRESS_BITS, self.addresses)
        m.submodules.reader = reader = Reader(self.config, unsigned(0), room=self.depth)
        m.submodules.words = words = Queue(8 * self.config.lanes, self.depth)
        connect(m, flipped(self.address), requests.i)
        connect(m, reader.port, flipped(self.port))
        connect(m, words.o, flipped(self.word))
        m.d.comb += [
            reader.i.payload.address.eq(requests.o.payload),
            reader.i.valid.eq(requests.o.valid),
            requests.o.ready.eq(reader.i.ready),
            words.i.payload.eq(reader.o_word),
            words.i.valid.eq(reader.o_valid),
            reader.release.eq(self.word.valid & self.word.ready),
        ]
        return m


class TapWalker(wiring.Component):
    """The loop nest of a Vector instruction: block, output row, output column, kernel row, kernel column.

    One tap per cycle while `tap` is ready, without a gap between pixels, rows, blocks and instructions. With a
    deformable sampling each pixel takes one word from `offset`, at its last tap; GRID takes none.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.lanes = config.lanes
        super().__init__({
            "instruction": In(stream.Signature(FIELDS)),
            "offset": In(stream.Signature(8 * config.lanes)),
            "tap": Out(stream.Signature(tap_layout(config))),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        offered, tap = self.instruction.payload, self.tap.payload
        now = Signal(FIELDS)
        running = Signal()
        square, pack = now.sampling == Sampling.SQUARE, now.operation == VectorOp.PACK
        columns = now.operation == VectorOp.COLUMNS
        deformed = now.sampling != Sampling.GRID

        counters = {name: Signal(field_shape(name), name=f"count_{name}")
                    for name in ("kernel_x", "kernel_y", "columns", "rows", "blocks")}
        at_last = [counter == now[name] - 1 for name, counter in counters.items()]
        step = Signal()
        # ends[i]: this tap is the last of all the loops up to the i-th, innermost first.
        ends = [Signal(name=f"end_{name}") for name in counters]
        for i, (end, last) in enumerate(zip(ends, at_last, strict=True)):
            m.d.comb += end.eq(last & ends[i - 1] if i else last)
        end_kernel_row, end_pixel, end_row, end_block, end_instruction = ends

        index = Signal(TAP_BITS)
        first_row, first_column = Signal(signed(COORDINATE_BITS)), Signal(signed(COORDINATE_BITS))
        row, column = Signal.like(first_row), Signal.like(first_column)
        plane, operand = Signal(ADDRESS_BITS), Signal(ADDRESS_BITS)  # source words: block, kernel column
        pack_at = Signal.like(tap.pack_at)
        target_first, target_slot = Signal(ADDRESS_BITS), Signal.like(now.target_anchor)
        target_plane, target_row = Signal(ADDRESS_BITS), Signal(ADDRESS_BITS)
        target_pixel, target_tap = Signal(ADDRESS_BITS), Signal(ADDRESS_BITS)

        m.d.comb += [
            self.tap.valid.eq(running & (self.offset.valid | ~deformed)),
            step.eq(self.tap.valid & self.tap.ready),
            self.offset.ready.eq(step & deformed & end_pixel),
            self.instruction.ready.eq(~running | (step & end_instruction)),
        ]
        with m.If(step):
            for counter, end, inner in zip(counters.values(), ends, [step, *ends[:-1]], strict=True):
                with m.If(inner):
                    m.d.sync += counter.eq(Mux(end, 0, counter + 1))
            m.d.sync += [
                index.eq(Mux(end_pixel, 0, index + 1)),
                pack_at.eq(Mux(end_pixel, 0, pack_at + now.pack_bytes)),
                operand.eq(Mux(end_kernel_row, 0, operand + now.tap_step)),
                target_tap.eq(Mux(end_pixel, 0, target_tap + now.target_tap)),
            ]
            with m.If(end_pixel):
                m.d.sync += [
                    column.eq(column + Mux(pack, now.pack_stride, now.stride_x)),
                    target_pixel.eq(target_pixel + now.target_step_x),
                ]
            with m.If(end_row):
                wrapped = target_slot + now.target_step_y >= now.target_ring  # by contract it is then equal
                m.d.sync += [
                    column.eq(first_column),
                    row.eq(row + now.stride_y),
                    target_pixel.eq(0),
                    target_slot.eq(Mux(wrapped, 0, target_slot + now.target_step_y)),
                    target_row.eq(Mux(wrapped, 0, target_row + (now.target_pitch << (now.target_step_y == 2)))),
                ]
            with m.If(end_block):
                m.d.sync += [
                    row.eq(first_row),
                    plane.eq(plane + now.plane),
                    target_slot.eq(now.target_anchor),
                    target_row.eq(target_first),
                    target_plane.eq(target_plane + now.target_plane),
                ]
            with m.If(end_instruction):
                m.d.sync += running.eq(0)

        with m.If(self.instruction.valid & self.instruction.ready):
            # Row of kernel row 0, in window coordinates; SQUARE counts kernel positions from the centre.
            grid_y = offered.grid_y - offered.window_y
            start = {
                Sampling.GRID: (0, -offered.pad_x),
                Sampling.SQUARE: (grid_y + (offered.kernel_y >> 1), (offered.kernel_x >> 1) - offered.pad_x),
                Sampling.OFFSETS: (grid_y, -offered.pad_x),
            }
            with m.Switch(offered.sampling):
                for sampling, (y, x) in start.items():
                    with m.Case(sampling):
                        x = Mux(offered.operation == VectorOp.PACK, 0, x)
                        m.d.sync += [first_row.eq(y), row.eq(y), first_column.eq(x), column.eq(x)]
            target_anchored = offered.target_anchor * offered.target_pitch
            m.d.sync += [
                now.eq(offered),
                running.eq(1),
                plane.eq(offered.source),
                target_first.eq(target_anchored),
                target_row.eq(target_anchored),
                target_slot.eq(offered.target_anchor),
                target_plane.eq(offered.target),
            ]

        dilation_s = self.offset.payload[:8].as_signed()
        codes = Signal(16)
        with m.If(now.sampling == Sampling.OFFSETS):
            m.d.comb += codes.eq(self.offset.payload.word_select(index[:(self.lanes // 2 - 1).bit_length()], 16))
        m.d.comb += [
            tap.row.eq(row),
            tap.column.eq(column),
            tap.reach_y.eq(Mux(square, dilation_s, now.dilation_y)),
            tap.reach_x.eq(Mux(square, dilation_s, now.dilation_x)),
            tap.step_y.eq(counters["kernel_y"] - Mux(square, now.kernel_y >> 1, 0)),
            tap.step_x.eq(Mux(pack, 0, counters["kernel_x"] - Mux(square, now.kernel_x >> 1, 0))),
            tap.offset_y.eq(codes[:8]),
            tap.offset_x.eq(codes[8:]),
            tap.base.eq(plane + operand),
            tap.pack_at.eq(pack_at),
            tap.target_row.eq(target_plane + target_row),
            tap.target_column.eq(target_pixel + Mux(columns, target_tap, 0)),
            *(tap[name].eq(now[name]) for name in
              ("window_y", "height", "width", "ring", "anchor", "pitch", "pack_bytes", "fraction")),
            *(tap.step[name].eq(now[name]) for name in ("operation", "unsigned", "low", "high", "tag")),
            tap.step.index.eq(index),
            tap.step.first.eq(((counters["kernel_y"] == 0) & (counters["kernel_x"] == 0)) | columns),
            tap.step.last.eq(end_pixel | columns),
            tap.step.block_end.eq(end_block),
            tap.step.final.eq(end_instruction),
        ]
        return m


def lerp(a: Value, b: Value, fraction: Value) -> Value:
    """numerics.lerp as adders: a multiplier block would be wasted on four bits."""
    difference = b - a
    terms = [Mux(fraction[i], difference << i, 0) for i in range(FRACTION_BITS)]
    return (a << FRACTION_BITS) + ((terms[0] + terms[1]) + (terms[2] + terms[3]))


def rotate_bytes_right(word: Value, amount: Value) -> Value:
    for i in range(len(amount)):
        word = Mux(amount[i], word.rotate_right(8 << i), word)
    return word


class Gather(wiring.Component):
    """Delivers the sample of every tap of a Vector instruction, in loop order, one word of `lanes` bytes per cycle.

    Every sampling passes the same pipeline, so a deformable tap takes the cycle a plain one takes:

        walk -> position -> slot -> row address -> four read queues -> join -> interpolate in x, in y -> rotate

    The four ports read the neighbours of a bilinear sample; a neighbour of zero weight, or outside the image
    or window, is not read. Whole positions (GRID, SQUARE) use port 0 only, PACK port 0 and, when its bytes
    cross into the next word, port 1. The ports run ahead of one another by as much as their queues hold.

    `instruction` may be any legal Vector instruction; the next one follows without a gap. `offset` delivers the
    offset words of deformable instructions in the order (block, oy, ox). `sample` is stalled by its consumer at will.

    Latency: 14 cycles from an accepted instruction to its first sample. Throughput: one tap per cycle.
    Assumes a ReadPort that answers READ_LATENCY cycles after acceptance.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        super().__init__({
            "instruction": In(stream.Signature(FIELDS)),
            "offset": In(stream.Signature(8 * config.lanes)),
            "port": Out(ReadPort(config)).array(NEIGHBOURS),
            "sample": Out(stream.Signature(sample_layout(config))),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        lanes, word_bits = self.config.lanes, 8 * self.config.lanes
        lane_bits = (lanes - 1).bit_length()
        m.submodules.walker = walker = TapWalker(self.config)
        connect(m, flipped(self.instruction), walker.instruction)
        connect(m, flipped(self.offset), walker.offset)
        queues = [ReadQueue(self.config) for _ in range(NEIGHBOURS)]
        for i, queue in enumerate(queues):
            m.submodules[f"queue{i}"] = queue
            connect(m, queue.port, flipped(self.port[i]))

        # ---- positions and addresses -------------------------------------------------------------------
        move = Signal()
        valid = Signal(6)
        m.d.comb += [walker.tap.ready.eq(move)]
        with m.If(move):
            m.d.sync += valid.eq(Cat(walker.tap.valid, valid))

        s1 = stage(m, move, "s1", tap=walker.tap.payload)
        fine = FRACTION_BITS - s1.tap.fraction
        s2 = stage(m, move, "s2", tap=s1.tap,
                   reach_y=s1.tap.reach_y * s1.tap.step_y, reach_x=s1.tap.reach_x * s1.tap.step_x,
                   offset_y=(s1.tap.offset_y << fine[:3])[:8 + FRACTION_BITS].as_signed(),
                   offset_x=(s1.tap.offset_x << fine[:3])[:8 + FRACTION_BITS].as_signed(),
                   address=s1.tap.target_row + s1.tap.target_column)

        pack = s2.tap.step.operation == VectorOp.PACK
        byte = Mux(pack, s2.tap.column[:lane_bits], 0)
        column = Mux(pack, s2.tap.column >> lane_bits, s2.tap.column + s2.reach_x + (s2.offset_x >> FRACTION_BITS))
        s3 = stage(m, move, "s3", tap=s2.tap, address=s2.address[:ADDRESS_BITS], pack=pack, byte=byte,
                   row=(s2.tap.row + s2.reach_y + (s2.offset_y >> FRACTION_BITS))[:COORDINATE_BITS].as_signed(),
                   column=column[:COORDINATE_BITS].as_signed(),
                   fy=s2.offset_y[:FRACTION_BITS], fx=s2.offset_x[:FRACTION_BITS],
                   spill=pack & (byte + s2.tap.pack_bytes > lanes))

        tap = s3.tap
        s4 = stage(m, move, "s4", tap=tap, address=s3.address, pack=s3.pack, byte=s3.byte, fy=s3.fy, fx=s3.fx,
                   image_row=s3.row + tap.window_y,
                   slot=tap.anchor + s3.row[:13].as_signed(),
                   row0=(s3.row >= 0) & (s3.row < tap.ring),
                   row1=(s3.row >= -1) & (s3.row < tap.ring - 1) & (s3.fy != 0),
                   column0=((s3.column >= 0) & (s3.column < tap.width)) | s3.pack,
                   column1=((s3.column >= -1) & (s3.column < tap.width - 1) & (s3.fx != 0)) | s3.spill,
                   word=(tap.base + s3.column)[:ADDRESS_BITS])

        tap = s4.tap
        row0 = s4.row0 & (s4.image_row >= 0) & (s4.image_row < tap.height)
        row1 = s4.row1 & (s4.image_row >= -1) & (s4.image_row < tap.height - 1)
        column1 = s4.column1
        s5 = stage(m, move, "s5", tap=tap, address=s4.address, pack=s4.pack, byte=s4.byte, fy=s4.fy, fx=s4.fx,
                   word=s4.word,
                   slot=Mux(s4.slot >= tap.ring, s4.slot - tap.ring, s4.slot)[:13].as_signed(),  # -1: row1 is slot 0
                   need=Cat(row0 & s4.column0, row0 & column1, row1 & s4.column0, row1 & column1))

        s6 = stage(m, move, "s6", tap=s5.tap, address=s5.address, pack=s5.pack, byte=s5.byte, fy=s5.fy, fx=s5.fx,
                   word=s5.word, need=s5.need,
                   row_words=(s5.slot * s5.tap.pitch)[:ADDRESS_BITS],
                   wraps=s5.slot + 1 == s5.tap.ring)

        # ---- reads, each port at its own pace ------------------------------------------------------------
        plan_layout = data.StructLayout({
            "need": NEIGHBOURS, "fy": FRACTION_BITS, "fx": FRACTION_BITS,
            "pack_bytes": field_shape("pack_bytes"), "byte": lane_bits, "rotate": lane_bits,
            "step": step_layout(self.config),
        })
        m.submodules.plans = plans = Queue(plan_layout, 16)
        entry, plan = plans.i.payload, plans.o.payload
        below = Mux(s6.wraps, 0, s6.row_words + s6.tap.pitch)
        accepting = Signal()
        push = valid[5] & accepting
        m.d.comb += [
            accepting.eq(plans.i.ready & Cat(queue.address.ready for queue in queues).all()),
            move.eq(accepting | ~valid[5]),
            plans.i.valid.eq(push),
            *(entry[name].eq(getattr(s6, name)) for name in ("need", "fy", "fx", "byte")),
            entry.pack_bytes.eq(s6.tap.pack_bytes),
            entry.rotate.eq(Mux(s6.pack, s6.byte - s6.tap.pack_at, 0)),
            entry.step.eq(s6.tap.step),
            entry.step.address.eq(s6.address),
        ]
        for i, queue in enumerate(queues):
            m.d.comb += [
                queue.address.payload.eq(s6.word + (below if i & 2 else s6.row_words) + (i & 1)),
                queue.address.valid.eq(push & s6.need[i]),
            ]

        # ---- samples -------------------------------------------------------------------------------------
        advance, joined = Signal(), Signal()
        filled = Signal(3)
        m.d.comb += [
            joined.eq(plans.o.valid & Cat(~plan.need[i] | queue.word.valid for i, queue in enumerate(queues)).all()),
            advance.eq(self.sample.ready | ~filled[2]),
            plans.o.ready.eq(joined & advance),
            *(queue.word.ready.eq(joined & advance & plan.need[i]) for i, queue in enumerate(queues)),
        ]
        with m.If(advance):
            m.d.sync += filled.eq(Cat(joined, filled))

        words = [Mux(plan.need[i], queue.word.payload, 0) for i, queue in enumerate(queues)]
        # PACK takes bytes `byte` onward of words 0 and 1; each byte keeps its place until the rotation.
        window = Signal(2 * lanes)
        m.d.comb += window.eq(((1 << plan.pack_bytes) - 1) << plan.byte)
        low_bytes, high_bytes = (Cat(bit.replicate(8) for bit in window[i * lanes:][:lanes]) for i in range(2))
        packed = (words[0] & low_bytes) | (words[1] & high_bytes)
        outside = Mux((plan.step.operation == VectorOp.MAXIMUM) & ~plan.step.unsigned, 0x80, 0)
        near = Mux(plan.need[0], queues[0].word.payload, Cat([outside[:8]] * lanes))
        corner = Mux(plan.step.operation == VectorOp.PACK, packed, near)
        d1 = stage(m, advance, "d1", step=plan.step, fy=plan.fy, fx=plan.fx, rotate=plan.rotate,
                   v00=corner, v01=words[1], v10=words[2], v11=words[3])

        def codes(word):
            bytes_ = (word[8 * i:8 * i + 8] for i in range(lanes))
            return [Cat(byte, byte[7] & ~d1.step.unsigned).as_signed() for byte in bytes_]

        across = {}  # 9-bit codes in sixteenths
        for name, left, right in (("top", d1.v00, d1.v01), ("bottom", d1.v10, d1.v11)):
            for i, (a, b) in enumerate(zip(codes(left), codes(right), strict=True)):
                across[f"{name}{i}"] = lerp(a, b, d1.fx)[:9 + FRACTION_BITS].as_signed()
        d2 = stage(m, advance, "d2", step=d1.step, fy=d1.fy, rotate=d1.rotate, **across)

        shift = 2 * FRACTION_BITS
        rounded = []
        for i in range(lanes):
            exact = lerp(getattr(d2, f"top{i}"), getattr(d2, f"bottom{i}"), d2.fy)
            rounded.append((exact + ((1 << shift - 1) - 1) + exact[shift])[shift:shift + 8])
        d3 = stage(m, advance, "d3", step=d2.step, rotate=d2.rotate, sample=Cat(rounded))

        assert len(d3.sample) == word_bits
        m.d.comb += [
            self.sample.valid.eq(filled[2]),
            self.sample.payload.data.eq(rotate_bytes_right(d3.sample, d3.rotate)),
            self.sample.payload.step.eq(d3.step),
        ]
        return m
