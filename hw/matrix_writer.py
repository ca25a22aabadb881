"""Results of the matrix unit on their way to the scratchpad."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from weft.arch.config import EngineConfig
from weft.hw.interfaces import ADDRESS_BITS, TAG_BITS, WritePort, write_layout
from weft.hw.matrix_layouts import SLOTS, descriptor_layout, result_layout, target_layout


class MatrixWriter(wiring.Component):
    """Writes each result wherever the descriptors of its tile say, one write per cycle.

    A plain instruction has no descriptors: its tiles go to one lane group after the other from `group` on, 16-bit
    results as a word of low bytes followed by one of high bytes. One that holds its sums writes nothing.

    Driven by: `instruction`, one item per instruction before its first result; `result`, the pixels of each
    tile in raster order. `descriptors` are those of slot `slot`, of the same cycle; `free` is high in the cycle
    the slot is no longer needed. `done` is high for a cycle after the last write of an instruction was
    accepted. `blocked`: a write waits for the scratchpad. `working`: results are in the writer.

    Throughput: one write per cycle; a result without any takes a cycle. Latency: 2 cycles.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        super().__init__({
            "instruction": In(stream.Signature(target_layout())),
            "result": In(stream.Signature(result_layout(config))),
            "slot": Out(range(SLOTS)),
            "descriptors": In(data.ArrayLayout(descriptor_layout(), config.max_writes)),
            "free": Out(1),
            "port": Out(WritePort(config)),
            "done": Out(1),
            "blocked": Out(1),
            "working": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        target, result = self.instruction.payload, self.result.payload
        take = Signal()

        # The raster of target words; column and x are 0 at the start of a tile by themselves.
        column, x, slot, row = (Signal(bits, name=name) for name, bits in
                                (("column", 12), ("x", 13), ("slot", 12), ("row", ADDRESS_BITS)))
        fresh = Signal(init=1)  # at the first result of a tile
        slot_now, row_now, slot_next = Signal.like(slot), Signal.like(row), Signal(13)
        m.d.comb += [
            slot_now.eq(Mux(fresh, target.anchor, slot)),
            row_now.eq(Mux(fresh, target.start, row)),
            slot_next.eq(slot_now + target.step_y),
        ]
        with m.If(take & ~target.hold):
            m.d.sync += [fresh.eq(result.tile_last), slot.eq(slot_now), row.eq(row_now)]
            m.d.sync += [column.eq(column + 1), x.eq(x + target.step_x)]
            with m.If(column == target.columns - 1):
                m.d.sync += [column.eq(0), x.eq(0), slot.eq(slot_next)]
                m.d.sync += row.eq(row_now + Mux(target.step_y[1], target.pitch << 1, target.pitch))
                with m.If(slot_next >= target.ring):  # exactly at its end: steps do not cross it
                    m.d.sync += [slot.eq(0), row.eq(target.target)]

        # Where a plain instruction's tile goes: the same for its low and high bytes but for the offset.
        groups = config.lanes // config.columns
        group, plane, begun = Signal(range(groups)), Signal(ADDRESS_BITS), Signal()
        group_now = Mux(begun, group, target.group)
        destinations = Signal.like(self.descriptors)
        m.d.comb += destinations.eq(self.descriptors)
        with m.If(target.plain):
            for high, destination in enumerate(destinations[index] for index in range(2)):
                m.d.comb += [
                    destination.offset.eq(plane + (target.high if high else 0)),
                    destination.group.eq(group_now),
                    destination.mask.eq(-1),
                ]
        with m.If(take & result.tile_last):
            m.d.sync += [group.eq(group_now + 1), begun.eq(1)]
            with m.If(group_now == groups - 1):
                m.d.sync += [group.eq(0), plane.eq(plane + target.plane)]
        with m.If(take & result.instruction_last):
            m.d.sync += [begun.eq(0), plane.eq(0)]

        # A result is held until its last write moves on.
        held = Signal(data.StructLayout({
            "valid": 1, "codes": result.codes.shape(), "double": 1, "position": ADDRESS_BITS, "tag": TAG_BITS,
            "left": config.max_writes, "descriptors": self.descriptors.shape(), "instruction_last": 1,
        }))
        write = Signal(data.StructLayout({
            "valid": 1, "real": 1, "request": write_layout(config), "instruction_last": 1,
        }))
        left_then, move, leave = Signal.like(held.left), Signal(), Signal()
        m.d.comb += [
            leave.eq(write.valid & (~write.real | self.port.request.ready)),
            move.eq(held.valid & (~write.valid | leave)),
            take.eq(self.result.valid & (~held.valid | (move & (left_then == 0)))),
            left_then.eq(held.left & (held.left - 1)),
            self.result.ready.eq(take),
            self.instruction.ready.eq(take & result.instruction_last),
            self.slot.eq(result.slot),
            self.free.eq(take & result.tile_last),
        ]
        real = Cat(descriptor.mask[:config.columns].any() for descriptor in self.descriptors)
        with m.If(take):
            m.d.sync += [
                held.valid.eq(1),
                held.codes.eq(result.codes),
                held.double.eq(target.double),
                held.position.eq(row_now + x),
                held.tag.eq(target.tag),
                held.left.eq(Mux(target.hold, 0, Mux(target.plain, Cat(1, target.double), real))),
                held.descriptors.eq(destinations),
                held.instruction_last.eq(result.instruction_last),
            ]
        with m.Elif(move):
            m.d.sync += [held.valid.eq(left_then != 0), held.left.eq(left_then)]

        chosen = Signal(descriptor_layout())
        for index in reversed(range(config.max_writes)):  # the first one left is assigned last
            with m.If(held.left[index]):
                m.d.comb += chosen.eq(held.descriptors[index])
        high = held.double & ~held.left[0]
        codes = Cat(Mux(high, code[8:], code[:8]) for code in held.codes)
        with m.If(move):
            m.d.sync += [
                write.valid.eq(1),
                write.real.eq(held.left != 0),
                write.request.address.eq(held.position + chosen.offset),
                write.request.data.eq(codes.replicate(groups)),
                write.request.mask.eq(Cat(Mux(chosen.group == group, chosen.mask[:config.columns], 0)
                                          for group in range(groups))),
                write.request.tag.eq(held.tag),
                write.instruction_last.eq(held.instruction_last & (left_then == 0)),
            ]
        with m.Elif(leave):
            m.d.sync += write.valid.eq(0)
        m.d.comb += [
            self.port.request.valid.eq(write.valid & write.real),
            self.port.request.payload.eq(write.request),
            self.blocked.eq(write.valid & ~leave),
            self.working.eq(self.result.valid | held.valid | write.valid),
        ]
        m.d.sync += self.done.eq(leave & write.instruction_last)
        return m
