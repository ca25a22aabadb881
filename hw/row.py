"""The row unit: what a language model needs besides sums of products, on whole rows of 16-bit numbers."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from weft.arch.config import EngineConfig
from weft.arch.isa import Row, RowLayout, RowOp
from weft.arch.numerics import MAX_COMBINED_SHIFT, MAX_SHIFT
from weft.hw.interfaces import ReadPort, UnitPort, WritePort
from weft.hw.row_addresses import RowAddresses
from weft.hw.row_arithmetic import RowArithmetic
from weft.hw.row_layouts import FIELDS
from weft.hw.row_operands import RowOperands
from weft.hw.row_reduction import RowReduction
from weft.hw.row_scalars import RowScalars
from weft.hw.row_writer import RowWriter

SILU_UP_MAX = 3


def illegal(config: EngineConfig, item: data.View) -> Value:
    """Whether the fields of a Row instruction are outside what the unit executes."""
    is_op = {op: item.operation == op for op in RowOp}
    quantize, expand = is_op[RowOp.QUANTIZE], is_op[RowOp.EXPAND]
    softmax, counted = is_op[RowOp.SOFTMAX], is_op[RowOp.SOFTMAX] | is_op[RowOp.ARGMAX]
    longest = item.length + Mux(softmax & item.length_step, item.rows - 1, 0)
    products = is_op[RowOp.MULTIPLY] | is_op[RowOp.SWIGLU] | is_op[RowOp.CONVOLVE]
    faults = [
        *(item[count] == 0 for count in ("rows", "columns", "blocks")),
        item.operation > max(RowOp),
        item.layout > max(RowLayout),
        is_op[RowOp.CONVOLVE] & ((item.span == 0) | (item.columns != 1)),
        is_op[RowOp.SWIGLU] & (item.up > SILU_UP_MAX),
        quantize & item.rotate & (~item.weighted | (item.span == 0) | ((item.span << 1) > item.blocks)),
        quantize & item.normalize & (item.constant == 0),
        counted & ((item.length == 0) | (longest > item.blocks * config.lanes)),
        expand & (item.length >= config.columns),
        (quantize | softmax | expand) & (item.shift > MAX_COMBINED_SHIFT),
        products & (item.shift > MAX_SHIFT),
    ]
    return Cat(faults).any()


class RowUnit(wiring.Component):
    """Executes Row instructions, one after the other: `row_lanes` numbers per cycle, whatever the operation.

        unit -> addresses -> operands -> arithmetic -> writer -> result
                                         arithmetic -> reduction -> scalars: maximum, factor, scale of the row

    Driven by `unit` (interfaces.UnitPort); `read` is one scratchpad read port, `result` writes whole words.

    Operands are read ahead as far as BUFFERS blocks, across the passes of a row and from row to row; an
    operation that needs a result of its row waits for it between passes, and the first pass of the next row
    follows the last one of this. An instruction is accepted when the one before it is done; one outside `illegal`
    is reported in the cycle after.

    Cycles from acceptance to `done` on `base` (row_lanes a quarter of lanes) with idle ports, for b blocks:

                                one row                every further row
        ADD, MULTIPLY, SWIGLU   25 + 4b                4b
        CONVOLVE                25 + 4b * span         4b * span
        EXPAND                  27 + 4.25b             24 + 4.25b
        ARGMAX                  23 + 4b                20 + 4b
        QUANTIZE                50 + 8b or 63 + 4b     27 + 8b, at least 42
          normalize             50 + 8b or 78 + 4b     27 + 8b, at least 57
          weighted              2 more                 the same
          rotate                16b for 8b, 13 more    27 + 16b, at least 59 (b: blocks, in pairs)
          KEYS                  53 + 12b               32 + 8b or 12b
          VALUES                54 + 8b                27 + 8b, at least 37
        SOFTMAX                 63 + 12b or 81 + 8b    40 + 12b, at least 52

    The greater of two counts; where both passes of a row are short, its scale comes last. The valid blocks of
    SOFTMAX count thrice, the others once.

    `stall_output`: no numbers were taken and the write port refuses; `stall_scratchpad`: none were taken and the
    read port refuses. `busy` is the rest of the time in which an instruction is held.

    Assumes the bounds that isa.Row states for sums, and no overlap of what is read and written but `target` on
    `source` or `other`.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        super().__init__({
            "unit": In(UnitPort(Row)),
            "read": Out(ReadPort(config)),
            "result": Out(WritePort(config)),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.addresses = addresses = RowAddresses(self.config)
        m.submodules.operands = operands = RowOperands(self.config)
        m.submodules.arithmetic = arithmetic = RowArithmetic(self.config)
        m.submodules.reduction = reduction = RowReduction(self.config)
        m.submodules.scalars = scalars = RowScalars()
        m.submodules.writer = writer = RowWriter(self.config)
        unit, now = self.unit, Signal(FIELDS)

        connect(m, addresses.item, operands.item)
        connect(m, operands.port, flipped(self.read))
        connect(m, operands.group, arithmetic.group)
        connect(m, arithmetic.codes, writer.codes)
        connect(m, scalars.scale, writer.scale)
        connect(m, writer.port, flipped(self.result))

        # ---- one instruction at a time -----------------------------------------------------------------------
        start = Signal()
        m.d.comb += [part.instruction.eq(now) for part in
                     (addresses, operands, arithmetic, reduction, scalars, writer)]
        m.d.comb += [addresses.start.eq(start), writer.start.eq(start), unit.done.eq(writer.done)]
        with m.FSM() as control:
            with m.State("accept"):
                m.d.comb += unit.instruction.ready.eq(1)
                with m.If(unit.instruction.valid):
                    m.d.sync += now.eq(unit.instruction.payload)
                    m.next = "check"
            with m.State("check"):
                m.d.comb += [unit.illegal.eq(illegal(self.config, now)), start.eq(~unit.illegal)]
                m.next = "run"
                with m.If(unit.illegal):
                    m.next = "accept"
            with m.State("run"), m.If(writer.done):
                m.next = "accept"

        # ---- between the parts -----------------------------------------------------------------------------------
        coded = (now.operation == RowOp.QUANTIZE) | (now.operation == RowOp.SOFTMAX)
        found_maximum = reduction.end & (now.operation == RowOp.SOFTMAX) & ~reduction.end_power
        m.d.comb += [
            operands.claim.eq(addresses.claim),
            operands.block.eq(addresses.block),
            addresses.room.eq(operands.room),
            addresses.row_written.eq(writer.row_written),
            operands.maximum_found.eq(found_maximum),
            operands.factor_found.eq(scalars.ready_soon),
            reduction.prelude.eq(operands.prelude),
            scalars.parameter.eq(operands.prelude[:32]),
            scalars.parameter_valid.eq(operands.prelude_valid),
            scalars.start.eq(reduction.end & coded & ~found_maximum),
            scalars.magnitude.eq(reduction.maximum),
            scalars.total.eq(reduction.total),
            arithmetic.factor.eq(scalars.factor),
            arithmetic.shift.eq(scalars.shift),
            writer.answer.eq(reduction.answer),
            writer.answer_valid.eq(reduction.end & (now.operation == RowOp.ARGMAX)),
        ]
        for name in ("key_valid", "key_first", "key_last", "key_power", "keys", "term_valid", "term_first", "terms"):
            m.d.comb += getattr(reduction, name).eq(getattr(arithmetic, name))
        with m.If(found_maximum):
            m.d.sync += arithmetic.maximum.eq(reduction.answer.value)

        # ---- what the dispatcher sees ------------------------------------------------------------------------------
        active = ~control.ongoing("accept")
        moved = operands.group.valid & operands.group.ready
        blocked = self.result.request.valid & ~self.result.request.ready
        starved = self.read.request.valid & ~self.read.request.ready
        m.d.comb += [
            unit.stall_output.eq(active & ~moved & blocked),
            unit.stall_scratchpad.eq(active & ~moved & ~blocked & starved),
            unit.busy.eq(active & ~unit.stall_output & ~unit.stall_scratchpad),
        ]
        return m
