"""Source addresses of the matrix unit."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from weft.arch.config import EngineConfig
from weft.arch.isa import Matrix
from weft.hw.interfaces import ADDRESS_BITS
from weft.hw.layouts import layout_of
from weft.hw.matrix_layouts import fetch_layout, word_layout
from weft.hw.stream import read_item

Y, X = unsigned(17), signed(18)  # window row and image column of any sample


def source_meta(config: EngineConfig) -> data.StructLayout:
    """Travels with a source word; `word` counts in the last one of its P."""
    return data.StructLayout({"last": 1, "word": word_layout(config)})


class MatrixSequencer(wiring.Component):
    """Turns an instruction into the source words it reads and the weights it needs, both in order of use.

    Loops, outermost first: tile, group of P pixels, ky, kx, block, pixel of the group. The pixels of a group
    follow each other in the raster whatever its width, so a group may cross rows; behind the last pixel it is
    filled up with zero words. Words outside the image are zero words, too.

    Driven by: legal instructions on `instruction`. `source` gives the source words (for a Reader); `fetch` one
    item per word of the pass, at the time of its first source word. `active` is high while an instruction has
    source words left.

    Throughput: one source word per cycle, also from instruction to instruction. Latency: 5 cycles.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        super().__init__({
            "instruction": In(stream.Signature(layout_of(Matrix))),
            "source": Out(stream.Signature(read_item(source_meta(config)))),
            "fetch": Out(stream.Signature(fetch_layout())),
            "active": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        i = Signal(layout_of(Matrix))  # the instruction being sequenced
        move = Signal()  # the address pipeline moves on
        step = Signal()  # a source word enters it

        # Loop counters; products of counters and strides are kept by addition.
        pixel, block, kx, ky, tile = Signal(range(self.config.pixels)), Signal(12), Signal(4), Signal(4), Signal(12)
        kernel_x, kernel_y, block_base = Signal(8), Signal(8), Signal(ADDRESS_BITS)
        word_first, tile_first, instruction_first = Signal(), Signal(), Signal()
        pixel_last, block_last, kx_last, pass_last = Signal(), Signal(), Signal(), Signal()
        tile_last, instruction_last, finish = Signal(), Signal(), Signal()
        m.d.comb += [
            self.fetch.valid.eq(self.active & move & (pixel == 0)),
            step.eq(self.active & move & ((pixel != 0) | self.fetch.ready)),
            self.fetch.payload.first.eq(word_first),
            self.fetch.payload.last.eq(pass_last),
            self.fetch.payload.tile_first.eq(tile_first),
            self.fetch.payload.instruction_first.eq(instruction_first),
            pixel_last.eq(pixel == self.config.pixels - 1),
            block_last.eq(block == i.blocks - 1),
            kx_last.eq(block_last & (kx == i.kernel_x - 1)),
            pass_last.eq(kx_last & (ky == i.kernel_y - 1)),
            instruction_last.eq(tile_last & (tile == i.tiles - 1)),
            finish.eq(step & pixel_last & pass_last & instruction_last),
        ]
        with m.If(step):
            m.d.sync += pixel.eq(Mux(pixel_last, 0, pixel + 1))
        with m.If(step & pixel_last):
            m.d.sync += [block.eq(block + 1), block_base.eq(block_base + i.plane)]
            m.d.sync += [word_first.eq(pass_last), tile_first.eq(pass_last & tile_last), instruction_first.eq(0)]
            with m.If(block_last):
                m.d.sync += [block.eq(0), block_base.eq(i.source), kx.eq(kx + 1), kernel_x.eq(kernel_x + i.dilation_x)]
            with m.If(kx_last):
                m.d.sync += [kx.eq(0), kernel_x.eq(0), ky.eq(ky + 1), kernel_y.eq(kernel_y + i.dilation_y)]
            with m.If(pass_last):
                m.d.sync += [ky.eq(0), kernel_y.eq(0), tile.eq(tile + tile_last)]

        # The raster moves on during the first word of a pass; the other words repeat the pixels it gave.
        raster = Signal(data.StructLayout({"y": Y, "x": X, "live": 1}))
        column, row, live = Signal(12), Signal(12), Signal(range(self.config.pixels + 1))
        column_last, raster_last, live_now = Signal(), Signal(), Signal.like(live)
        m.submodules.pixels = pixels = Memory(shape=raster.shape(), depth=max(2, self.config.pixels), init=[])
        store, again = pixels.write_port(), pixels.read_port(domain="comb")
        current = Signal.like(raster)
        m.d.comb += [
            column_last.eq(column == i.columns - 1),
            raster_last.eq(column_last & (row == i.rows - 1)),
            tile_last.eq(~raster.live | (word_first & raster_last)),
            store.addr.eq(pixel),
            store.data.eq(raster),
            store.en.eq(step & word_first),
            again.addr.eq(pixel),
            current.eq(Mux(word_first, raster, again.data)),
            live_now.eq(Mux(word_first, Mux(pixel == 0, 0, live) + raster.live, live)),
        ]
        with m.If(step):
            m.d.sync += live.eq(live_now)
        with m.If(step & word_first & raster.live):
            m.d.sync += [column.eq(column + 1), raster.x.eq(raster.x + i.stride_x)]
            with m.If(column_last):
                m.d.sync += [column.eq(0), raster.x.eq(-i.pad_x), row.eq(row + 1), raster.y.eq(raster.y + i.stride_y)]
            with m.If(raster_last):
                m.d.sync += [row.eq(0), raster.y.eq(0), raster.live.eq(0)]
        with m.If(step & pixel_last & pass_last & tile_last):
            m.d.sync += raster.live.eq(1)

        m.d.comb += self.instruction.ready.eq(~self.active | finish)
        with m.If(finish):
            m.d.sync += self.active.eq(0)
        with m.If(self.instruction.valid & self.instruction.ready):
            following = self.instruction.payload
            m.d.sync += [
                i.eq(following), self.active.eq(1), tile.eq(0), block_base.eq(following.source),
                word_first.eq(1), tile_first.eq(1), instruction_first.eq(1),
                raster.x.eq(-following.pad_x), raster.live.eq(1),
            ]

        meta = Signal(source_meta(self.config))
        m.d.comb += [
            meta.last.eq(pixel_last),
            meta.word.first.eq(word_first & ~i.resume),
            meta.word.last.eq(pass_last),
            meta.word.scaled.eq(i.scaled & ~i.hold),
            meta.word.live.eq(live_now),
            meta.word.tile_last.eq(tile_last),
            meta.word.instruction_last.eq(instruction_last),
        ]
        m.d.comb += [meta.word[name].eq(i[name]) for name in ("wide", "unsigned", "plain", "grouped", "hold")]
        self._address(m, move, {
            "valid": step, "meta": meta, "live": current.live, "base": block_base,
            "y": (current.y + kernel_y)[:len(raster.y)], "x": (current.x + kernel_x)[:len(raster.x)],
            "window_y": i.window_y, "height": i.height, "width": i.width,
            "anchor": i.anchor, "ring": i.ring, "pitch": i.pitch,
        })
        return m

    def _address(self, m: Module, move: Signal, item: dict) -> None:
        """From window coordinates to addresses. Fields of the instruction travel along: the next may have begun."""
        def stage(name: str, **fields) -> data.View:
            """A pipeline register of `fields`: their shapes and, when the pipeline moves, their values."""
            shapes = {field: value.shape() for field, value in fields.items()}
            register = Signal(data.StructLayout(shapes), name=name)
            with m.If(move):
                m.d.sync += [register[field].eq(value) for field, value in fields.items()]
            return register

        def keep(register, *names: str) -> dict:
            return {name: register[name] for name in ("valid", "meta", *names)}

        a = stage("sampled", **{name: value for name, value in item.items() if name not in ("x", "y")},
                  x=item["x"].as_signed(), y=item["y"])
        b = stage("placed", **keep(a, "live", "x", "height", "width", "ring", "pitch"),
                  y=a.window_y + a.y, slot=a.anchor + a.y, base=(a.base + a.x)[:ADDRESS_BITS])
        inside = b.live & (b.y >= 0) & (b.y < b.height) & (b.x >= 0) & (b.x < b.width)
        c = stage("wrapped", **keep(b, "pitch", "base"), zero=~inside,
                  slot=Mux(b.slot >= b.ring, b.slot - b.ring, b.slot)[:12])
        d = stage("multiplied", **keep(c, "zero", "base"), offset=(c.slot * c.pitch)[:ADDRESS_BITS])
        e = stage("addressed", **keep(d, "zero"), address=(d.base + d.offset)[:ADDRESS_BITS])
        m.d.comb += [
            move.eq(~e.valid | self.source.ready),
            self.source.valid.eq(e.valid),
            self.source.payload.address.eq(e.address),
            self.source.payload.zero.eq(e.zero),
            self.source.payload.meta.eq(e.meta),
        ]
