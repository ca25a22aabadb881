"""The vector unit: depthwise and deformable convolution, elementwise sums, pooling, im2col; every lane on its own."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out, connect, flipped

from weft.arch.config import EngineConfig
from weft.arch.isa import Sampling, Vector, VectorOp
from weft.arch.numerics import ACC_BITS, FRACTION_BITS, MULT_BITS
from weft.hw.gather import FIELDS, MAX_TAPS, NEIGHBOURS, TAP_BITS, Gather, stage, step_layout
from weft.hw.interfaces import ADDRESS_BITS, TAG_BITS, ReadPort, UnitPort, WritePort
from weft.hw.requantize import Requantizer
from weft.hw.stream import Queue, Reader

BANKS = 2  # parameters of the block in use and of the next one
OFFSET_WORDS = 8  # offset words read ahead
WRITES = 4  # words waiting for the write port
HELD_BITS = 8  # instructions between acceptance and `done`: fewer than the taps the pipelines hold
SCALE = data.StructLayout({"mult": MULT_BITS, "shift": 8, "unused": 8})


def illegal(config: EngineConfig, item: data.View, taps: Value) -> Value:
    """Whether the fields of a Vector instruction are outside what the unit executes; `taps` = kernel_y * kernel_x."""
    multiply, pack = item.operation == VectorOp.MULTIPLY, item.operation == VectorOp.PACK
    deformed, offsets = item.sampling != Sampling.GRID, item.sampling == Sampling.OFFSETS
    faults = [
        *(item[count] == 0 for count in ("rows", "columns", "blocks", "kernel_y", "kernel_x")),
        item.anchor >= item.ring,
        item.target_anchor >= item.target_ring,
        *((item[step] == 0) | (item[step] == 3) for step in ("target_step_y", "target_step_x")),
        item.sampling > max(Sampling),
        multiply & (taps > MAX_TAPS),
        deformed & ~multiply & (item.operation != VectorOp.COLUMNS),
        deformed & (item.offset_anchor >= item.offset_ring),
        offsets & (item.fraction > FRACTION_BITS),
        offsets & (2 * taps > config.lanes),
        pack & ((item.kernel_x != 1) | (item.blocks != 1)),
        pack & ((item.pack_bytes == 0) | (item.pack_bytes * item.kernel_y > config.lanes)),
    ]
    return Cat(faults).any()


class LoadPort(wiring.Signature):
    """From Prefetch to BlockParameters: `claim` takes a `free` bank, then come the words of one block, in order."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__({
            "free": In(1),
            "claim": Out(1),
            "valid": Out(1),
            "index": Out(range(config.block_parameter_words + MAX_TAPS)),
            "last": Out(1),
            "word": Out(8 * config.lanes),
        })


class Prefetch(wiring.Component):
    """Accepts instructions, hands them to the gather, and reads all that is not samples ahead of it.

    In program order, for every block: its parameters, if it multiplies, then the offset words of its pixels, if
    it is deformed. Parameters wait for a free bank, offset words for room in a queue; so the parameters of the
    next block or instruction are there before its first tap, and neither costs a cycle while the taps of
    OFFSET_WORDS pixels take longer than the parameters of a block.

    An instruction outside `illegal` is swallowed and reported. Latency: an instruction is offered to the gather two
    cycles after acceptance. Throughput: one parameter or offset word per cycle.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        super().__init__({
            "instruction": In(stream.Signature(FIELDS)),
            "port": Out(ReadPort(config)),
            "gather": Out(stream.Signature(FIELDS)),
            "offset": Out(stream.Signature(8 * config.lanes)),
            "load": Out(LoadPort(config)),
            "illegal": Out(1),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        load = self.load
        meta = data.StructLayout({"offset": 1, "index": load.index.shape(), "last": 1})
        m.submodules.reader = reader = Reader(self.config, meta, room=OFFSET_WORDS)
        m.submodules.offsets = offsets = Queue(8 * self.config.lanes, OFFSET_WORDS)
        connect(m, reader.port, flipped(self.port))
        connect(m, offsets.o, flipped(self.offset))

        now = Signal(FIELDS)
        offered = Signal()  # to the gather
        taps = now.kernel_y * now.kernel_x
        multiply, deformed = now.operation == VectorOp.MULTIPLY, now.sampling != Sampling.GRID
        index, last_index = Signal.like(load.index), Signal.like(load.index)
        block, row, column = (Signal.like(now[name], name=f"count_{name}") for name in ("blocks", "rows", "columns"))
        parameter = Signal(ADDRESS_BITS)
        first_row, slot = Signal(ADDRESS_BITS), Signal.like(now.offset_anchor)
        row_address = Signal(ADDRESS_BITS)

        item, taken = reader.i.payload, Signal()
        last_word, last_block = index == last_index, block == now.blocks - 1
        last_column, last_row = column == now.columns - 1, row == now.rows - 1
        m.d.comb += [
            self.gather.payload.eq(now),
            self.gather.valid.eq(offered),
            taken.eq(reader.i.valid & reader.i.ready),
        ]
        with m.If(self.gather.ready):
            m.d.sync += offered.eq(0)

        with m.FSM():
            with m.State("accept"):
                m.d.comb += self.instruction.ready.eq(~offered)
                with m.If(self.instruction.valid & ~offered):
                    m.d.sync += now.eq(self.instruction.payload)
                    m.next = "check"
            with m.State("check"):
                anchored = now.offset_anchor * now.offset_pitch
                m.d.sync += [
                    block.eq(0), row.eq(0), column.eq(0), index.eq(0),
                    last_index.eq(self.config.block_parameter_words - 1 + taps),
                    parameter.eq(now.parameters),
                    first_row.eq(anchored), row_address.eq(anchored),
                    slot.eq(now.offset_anchor),
                ]
                with m.If(illegal(self.config, now, taps)):
                    m.d.comb += self.illegal.eq(1)
                    m.next = "accept"
                with m.Else():
                    m.d.sync += offered.eq(1)
                    with m.If(multiply):
                        m.next = "parameters"
                    with m.Elif(deformed):
                        m.next = "offsets"
                    with m.Else():
                        m.next = "accept"
            with m.State("parameters"):
                m.d.comb += [
                    reader.i.valid.eq((index != 0) | load.free),
                    item.address.eq(parameter),
                    item.meta.index.eq(index),
                    item.meta.last.eq(last_word),
                    load.claim.eq(taken & (index == 0)),
                ]
                with m.If(taken):
                    m.d.sync += [parameter.eq(parameter + 1), index.eq(Mux(last_word, 0, index + 1))]
                    with m.If(last_word & deformed):
                        m.next = "offsets"
                    with m.Elif(last_word):
                        m.d.sync += block.eq(block + 1)
                        with m.If(last_block):
                            m.next = "accept"
            with m.State("offsets"):
                m.d.comb += [
                    reader.i.valid.eq(1),
                    item.address.eq(now.offsets + row_address + column),
                    item.meta.offset.eq(1),
                ]
                with m.If(taken):
                    m.d.sync += column.eq(Mux(last_column, 0, column + 1))
                with m.If(taken & last_column):
                    wraps = slot + 1 == now.offset_ring
                    m.d.sync += [
                        row.eq(row + 1),
                        slot.eq(Mux(wraps, 0, slot + 1)),
                        row_address.eq(Mux(wraps, 0, row_address + now.offset_pitch)),
                    ]
                with m.If(taken & last_column & last_row):
                    m.d.sync += [row.eq(0), slot.eq(now.offset_anchor), row_address.eq(first_row), block.eq(block + 1)]
                    with m.If(last_block):
                        m.next = "accept"
                    with m.Elif(multiply):
                        m.next = "parameters"

        is_offset = reader.o_meta.offset
        m.d.comb += [
            offsets.i.valid.eq(reader.o_valid & is_offset),
            offsets.i.payload.eq(reader.o_word),
            load.valid.eq(reader.o_valid & ~is_offset),
            load.index.eq(reader.o_meta.index),
            load.last.eq(reader.o_meta.last),
            load.word.eq(reader.o_word),
            # A parameter leaves its place at once, an offset word when its pixel is through.
            reader.release.eq(load.valid + (self.offset.valid & self.offset.ready)),
        ]
        return m


class BlockParameters(wiring.Component):
    """Bias, scale and tap weights of two channel blocks: one in use, the next being loaded.

    Three hands pass from bank to bank: `load` (its last word makes the bank `ready`), the accumulators (`bank`,
    moved by `step`) and the requantizer (moved by `release`, which frees the bank). `weights` follows
    (`bank`, `tap`) by one cycle of `enable`; `bias` and `scale` follow `bias_bank` and `scale_bank` at once.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        super().__init__({
            "load": In(LoadPort(config)),
            "ready": Out(1),
            "bank": Out(1),
            "step": In(1),
            "release": In(1),
            "enable": In(1),
            "tap": In(TAP_BITS),
            "weights": Out(data.ArrayLayout(signed(8), config.lanes)),
            "bias_bank": In(1),
            "bias": Out(data.ArrayLayout(signed(ACC_BITS), config.lanes)),
            "scale_bank": Out(1),
            "scale": Out(data.ArrayLayout(SCALE, config.lanes)),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        load = self.load
        word_bits, words = 8 * self.config.lanes, self.config.four_byte_words(self.config.lanes)
        load_bank, unclaimed, full = Signal(), Signal(range(BANKS + 1), init=BANKS), Signal(BANKS)

        for first, name, bank, out in ((0, "biases", self.bias_bank, self.bias),
                                       (words, "scales", self.scale_bank, self.scale)):
            m.submodules[name] = memory = Memory(shape=words * word_bits, depth=BANKS, init=[])
            write, read = memory.write_port(granularity=word_bits), memory.read_port(domain="comb")
            m.d.comb += [
                write.addr.eq(load_bank),
                write.data.eq(Cat([load.word] * words)),
                write.en.eq(Cat(load.valid & (load.index == first + i) for i in range(words))),
                read.addr.eq(bank),
                out.eq(read.data),
            ]
        m.submodules.tap_weights = memory = Memory(shape=word_bits, depth=BANKS << TAP_BITS, init=[])
        write, read = memory.write_port(), memory.read_port()
        m.d.comb += [
            write.addr.eq(Cat((load.index - 2 * words)[:TAP_BITS], load_bank)),
            write.data.eq(load.word),
            write.en.eq(load.valid & (load.index >= 2 * words)),
            read.addr.eq(Cat(self.tap, self.bank)),
            read.en.eq(self.enable),
            self.weights.eq(read.data),
        ]

        m.d.comb += [load.free.eq(unclaimed != 0), self.ready.eq(full.bit_select(self.bank, 1))]
        m.d.sync += unclaimed.eq(unclaimed - load.claim + self.release)
        with m.If(load.valid & load.last):
            m.d.sync += [full.bit_select(load_bank, 1).eq(1), load_bank.eq(~load_bank)]
        with m.If(self.step):
            m.d.sync += self.bank.eq(~self.bank)
        with m.If(self.release):
            m.d.sync += [full.bit_select(self.scale_bank, 1).eq(0), self.scale_bank.eq(~self.scale_bank)]
        return m


class VectorUnit(wiring.Component):
    """Executes Vector instructions: one tap of `lanes` channels per cycle, whatever its sampling.

        unit -> Prefetch -> Gather -> multiply | largest | pack -> accumulate -> requantize -> result

    Driven by `unit` (interfaces.UnitPort); `sample` are the four read ports of the gather, `parameter` reads bias,
    scale, weights and offset words, `result` writes whole words.

    The accumulators of a finished pixel are requantized `post_lanes` at a time while the taps of the next
    pixel accumulate; only a MULTIPLY of fewer than lanes / post_lanes taps waits for it. The other operations
    write one word per pixel (COLUMNS: per tap) and bypass it. An instruction may start while the ones before it
    drain; writes keep program order.

    Latency from acceptance to the first write, 3 x 3 taps on `base` with idle ports: 28 cycles for MAXIMUM, 42 for
    MULTIPLY (its parameters come first), 56 if deformed. Throughput: one tap per cycle, without gaps between
    pixels, blocks and instructions, while the ports are granted.

    `stall_output`: no tap was taken and the write port refuses; `stall_scratchpad`: no tap was taken and a read
    port refuses. `busy` is the rest of the time in which an instruction is held.

    Assumes that the accumulator never overflows (the compiler proves it) and shifts within numerics.MAX_SHIFT.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        super().__init__({
            "unit": In(UnitPort(Vector)),
            "sample": Out(ReadPort(config)).array(NEIGHBOURS),
            "parameter": Out(ReadPort(config)),
            "result": Out(WritePort(config)),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        lanes, post_lanes = self.config.lanes, self.config.post_lanes
        groups = lanes // post_lanes
        step_shape = step_layout(self.config)
        m.submodules.prefetch = prefetch = Prefetch(self.config)
        m.submodules.gather = gather = Gather(self.config)
        m.submodules.parameters = parameters = BlockParameters(self.config)
        connect(m, flipped(self.unit.instruction), prefetch.instruction)
        connect(m, prefetch.port, flipped(self.parameter))
        connect(m, prefetch.gather, gather.instruction)
        connect(m, prefetch.offset, gather.offset)
        for i in range(NEIGHBOURS):
            connect(m, gather.port[i], flipped(self.sample[i]))
        connect(m, prefetch.load, parameters.load)

        # ---- taps: operands, products, sums -----------------------------------------------------------------
        advance, taken = Signal(), Signal()
        valid = Signal(3)
        sample = gather.sample
        multiply = sample.payload.step.operation == VectorOp.MULTIPLY
        m.d.comb += [
            sample.ready.eq(advance & (parameters.ready | ~multiply)),
            taken.eq(sample.valid & sample.ready),
            parameters.tap.eq(sample.payload.step.index),
            parameters.enable.eq(advance),
            parameters.step.eq(taken & multiply & sample.payload.step.block_end),
        ]
        with m.If(advance):
            m.d.sync += valid.eq(Cat(taken, valid))

        t1 = stage(m, advance, "t1", step=sample.payload.step, data=sample.payload.data, bank=parameters.bank)
        products = {}
        for i in range(lanes):
            byte = t1.data[8 * i:8 * i + 8]
            code = Cat(byte, byte[7] & ~t1.step.unsigned).as_signed()
            products[f"product{i}"] = (code * parameters.weights[i])[:16].as_signed()  # -128*255 and 255*127 fit
        t2 = stage(m, advance, "t2", step=t1.step, data=t1.data, bank=t1.bank, **products)

        m.d.comb += parameters.bias_bank.eq(t2.bank)
        t3 = stage(m, advance, "t3", step=t2.step)
        accumulators = [Signal(signed(ACC_BITS), name=f"accumulator{i}", reset_less=True) for i in range(lanes)]
        word = Signal(8 * lanes, reset_less=True)
        sign = Mux(t2.step.unsigned, 0, 0x80)  # makes int8 codes compare as unsigned ones
        largest = []
        for i in range(lanes):
            new, old = t2.data[8 * i:8 * i + 8], word[8 * i:8 * i + 8]
            largest.append(Mux((new ^ sign) > (old ^ sign), new, old))
        with m.If(advance & valid[1]):
            for i, accumulator in enumerate(accumulators):
                start = Mux(t2.step.first, parameters.bias[i], accumulator)
                m.d.sync += accumulator.eq(start + getattr(t2, f"product{i}"))
            with m.If(t2.step.first):
                m.d.sync += word.eq(t2.data)
            with m.Elif(t2.step.operation == VectorOp.MAXIMUM):
                m.d.sync += word.eq(Cat(largest))
            with m.Else():
                m.d.sync += word.eq(word | t2.data)

        # ---- finished pixels: requantized group by group, or as they are ---------------------------------------
        place = {"address": ADDRESS_BITS, "tag": TAG_BITS, "final": 1}
        m.submodules.writes = writes = Queue(data.StructLayout({"data": 8 * lanes, **place}), WRITES)
        m.submodules.requantizer = requantizer = Requantizer(post_lanes, data.StructLayout({**place, "last": 1}))
        held = [Signal(signed(ACC_BITS), name=f"held{i}", reset_less=True) for i in range(lanes)]
        held_step = Signal(step_shape)
        group, holding = Signal(range(groups)), Signal()
        pending = Signal(range(Requantizer.LATENCY + 3))  # pixels between accumulators and write queue

        finished, multiplied = valid[2] & t3.step.last, t3.step.operation == VectorOp.MULTIPLY
        last_group = group == groups - 1
        complete = requantizer.o_valid & requantizer.o_meta.last
        take, bypass = Signal(), Signal()
        m.d.comb += [
            requantizer.enable.eq(writes.i.ready | ~complete),
            take.eq(finished & multiplied & (~holding | (last_group & requantizer.enable))),
            bypass.eq(finished & ~multiplied & (pending == 0) & writes.i.ready),
            advance.eq(~finished | take | bypass),
        ]
        with m.If(requantizer.enable & holding):
            m.d.sync += group.eq(group + 1)
            m.d.sync += [held[i].eq(held[i + post_lanes]) for i in range(lanes - post_lanes)]
            with m.If(last_group):
                m.d.sync += [group.eq(0), holding.eq(0)]
        with m.If(take):
            m.d.sync += [held[i].eq(accumulators[i]) for i in range(lanes)]
            m.d.sync += [held_step.eq(t3.step), holding.eq(1)]

        scales = Signal(data.ArrayLayout(SCALE, post_lanes))
        with m.Switch(group):
            for i in range(groups):
                with m.Case(i):
                    m.d.comb += [scales[j].eq(parameters.scale[i * post_lanes + j]) for j in range(post_lanes)]
        codes = Signal(8 * lanes, reset_less=True)
        all_codes = Cat(codes[8 * post_lanes:], requantizer.o_code)
        m.d.comb += requantizer.i_valid.eq(holding)
        for i in range(post_lanes):
            m.d.comb += [
                requantizer.i_acc[i].eq(held[i]),
                requantizer.i_mult[i].eq(scales[i].mult),
                requantizer.i_shift[i].eq(scales[i].shift),
            ]
        m.d.comb += [
            requantizer.i_low.eq(held_step.low),
            requantizer.i_high.eq(held_step.high),
            *(requantizer.i_meta[name].eq(held_step[name]) for name in place),
            requantizer.i_meta.last.eq(last_group),
            parameters.release.eq(holding & requantizer.enable & last_group & held_step.block_end),
        ]
        with m.If(requantizer.enable & requantizer.o_valid):
            m.d.sync += codes.eq(all_codes)
        m.d.sync += pending.eq(pending + take - (complete & requantizer.enable))

        # ---- writes ------------------------------------------------------------------------------------------------
        with m.If(complete):
            m.d.comb += [writes.i.valid.eq(1), writes.i.payload.data.eq(all_codes)]
            m.d.comb += [writes.i.payload[name].eq(requantizer.o_meta[name]) for name in place]
        with m.Else():
            m.d.comb += [writes.i.valid.eq(bypass), writes.i.payload.data.eq(word)]
            m.d.comb += [writes.i.payload[name].eq(t3.step[name]) for name in place]
        request = self.result.request
        m.d.comb += [
            request.valid.eq(writes.o.valid),
            writes.o.ready.eq(request.ready),
            request.payload.mask.eq(~0),
            *(request.payload[name].eq(writes.o.payload[name]) for name in ("address", "data", "tag")),
        ]
        m.d.sync += self.unit.done.eq(request.valid & request.ready & writes.o.payload.final)

        # ---- what the dispatcher sees ------------------------------------------------------------------------------
        instructions = Signal(HELD_BITS)
        accepted = self.unit.instruction.valid & self.unit.instruction.ready
        m.d.sync += instructions.eq(instructions + accepted - self.unit.done - self.unit.illegal)
        ports = [self.parameter, *(self.sample[i] for i in range(NEIGHBOURS))]
        starved = Cat(port.request.valid & ~port.request.ready for port in ports).any()
        blocked = request.valid & ~request.ready
        active = instructions != 0
        m.d.comb += [
            self.unit.illegal.eq(prefetch.illegal),
            self.unit.stall_output.eq(active & ~taken & blocked),
            self.unit.stall_scratchpad.eq(active & ~taken & ~blocked & starved),
            self.unit.busy.eq(active & ~self.unit.stall_output & ~self.unit.stall_scratchpad),
        ]
        return m
