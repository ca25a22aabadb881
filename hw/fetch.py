"""Instruction fetch: the program as a stream of instruction words."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Signal, unsigned
from amaranth.lib import stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from weft.arch.config import EngineConfig
from weft.arch.isa import INSTRUCTION_BYTES
from weft.hw.dma import FETCH_BURSTS, Bursts, ReadClient, beat_address_bits
from weft.hw.layouts import INSTRUCTION_BITS

LENGTH_BITS = 32  # instructions of a program


class Fetch(wiring.Component):
    """Reads `length` instructions from `address` on, by bursts, ahead of the dispatcher.

    Starts when it leaves reset; `address` and `length` must then stay. `memory` belongs to the read
    channel; bursts are asked for only when the buffer (FETCH_BURSTS longest bursts) has room for all of
    their beats, so a beat is always taken at once. Delivers an instruction every 64 / bus_bytes cycles while
    memory keeps up. `error` pulses for a beat received with an error response. The bus must not be wider than
    an instruction.
    """

    def __init__(self, config: EngineConfig) -> None:
        if config.bus_bytes > INSTRUCTION_BYTES:
            raise ValueError(f"bus_bytes = {config.bus_bytes} exceeds the {INSTRUCTION_BYTES} bytes of an instruction")
        self._config = config
        super().__init__({
            "address": In(unsigned(config.address_bits)),
            "length": In(LENGTH_BITS),
            "memory": Out(ReadClient(config)),
            "instruction": Out(stream.Signature(INSTRUCTION_BITS)),
            "error": Out(1),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        config, beat, instruction = self._config, self.memory.data, self.instruction
        beats = INSTRUCTION_BYTES // config.bus_bytes
        m.submodules.bursts = bursts = Bursts(config, LENGTH_BITS)
        program, asked = bursts.nest.payload, Signal()
        m.d.comb += [
            bursts.nest.valid.eq(~asked & (self.length != 0)),
            program.start.eq(self.address[-beat_address_bits(config):]),
            program.run.eq(self.length << exact_log2(beats)),
            program.rows.eq(1),
            program.planes.eq(1),
        ]
        with m.If(bursts.nest.ready):
            m.d.sync += asked.eq(1)

        # Beats asked for and not yet taken out of the buffer.
        depth = max(FETCH_BURSTS * config.burst_beats, beats)
        m.submodules.buffer = buffer = SyncFIFOBuffered(width=8 * config.bus_bytes, depth=depth + 1)  # 1: its output
        held, takes = Signal(range(depth + 1)), buffer.r_rdy & buffer.r_en
        burst, request, fits = bursts.burst, self.memory.request, Signal()
        asks = request.valid & request.ready
        with m.If(asks):
            m.d.sync += held.eq(held + burst.payload.length + 1 - takes)
        with m.Else():
            m.d.sync += held.eq(held - takes)
        m.d.comb += [
            fits.eq(held + burst.payload.length < depth),
            request.payload.eq(burst.payload),
            request.valid.eq(burst.valid & fits),
            burst.ready.eq(request.ready & fits),
            beat.ready.eq(1),
            buffer.w_en.eq(beat.valid),
            buffer.w_data.eq(beat.payload.data),
        ]
        m.d.sync += self.error.eq(beat.valid & beat.payload.error)

        count = Signal(range(beats))
        m.d.comb += buffer.r_en.eq(~instruction.valid | instruction.ready)
        with m.If(instruction.ready):
            m.d.sync += instruction.valid.eq(0)
        with m.If(takes):
            m.d.sync += [
                instruction.payload.eq(Cat(instruction.payload, buffer.r_data)[8 * config.bus_bytes:]),
                count.eq(count + 1),
                instruction.valid.eq(count == beats - 1),
            ]
        return m
