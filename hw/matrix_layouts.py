"""What the parts of the matrix unit hand to each other. Terms used by all of them:

pass    one group of P pixels of one output tile, all kernel positions and blocks: P*C results
word    one source word of each of the P pixels of a pass, worked on for `steps_per_word` steps (twice if wide)
step    R input channels by C output channels, one cycle of the array for each pixel
"""

from __future__ import annotations

from amaranth.hdl import signed
from amaranth.lib import data

from weft.arch.config import EngineConfig
from weft.hw.interfaces import ADDRESS_BITS, TAG_BITS

INSTRUCTIONS = 4  # in flight in the unit
SLOTS = 8  # tiles whose parameters are held: prefetched, in the array, draining
CODE_BITS = 16  # of a result
BOUND = signed(CODE_BITS + 1)


def word_layout(config: EngineConfig) -> data.StructLayout:
    """A word whose P source words are in the buffer."""
    return data.StructLayout({
        "first": 1,  # the sums of its pass begin with it
        "last": 1,  # of its pass
        "wide": 1,
        "unsigned": 1,
        "plain": 1,
        "grouped": 1,
        "scaled": 1,
        "hold": 1,
        "live": range(config.pixels + 1),  # pixels 0 .. live-1 of the pass give results
        "tile_last": 1,  # the pass is the last one of its tile
        "instruction_last": 1,
    })


def fetch_layout() -> data.StructLayout:
    """A word whose weights are to be fetched: the first or last one of its pass, the first one of its tile, .."""
    return data.StructLayout({"first": 1, "last": 1, "tile_first": 1, "instruction_first": 1})


def operands_layout() -> data.StructLayout:
    """Where an instruction's weights, parameters and pixel scales are, and its output bounds."""
    return data.StructLayout({
        "weights": ADDRESS_BITS, "parameters": ADDRESS_BITS, "low": BOUND, "high": BOUND,
        "wide": 1, "plain": 1, "grouped": 1, "scaled": 1,
        "scales": ADDRESS_BITS, "scales_pitch": 12, "rows": 12, "columns": 12,
    })


def target_layout() -> data.StructLayout:
    """An instruction's output raster; `start` is the address of its first pixel."""
    return data.StructLayout({
        "start": ADDRESS_BITS, "target": ADDRESS_BITS, "pitch": 12, "ring": 12, "anchor": 12,
        "step_y": 2, "step_x": 2, "columns": 12, "tag": TAG_BITS,
        "plane": ADDRESS_BITS, "high": ADDRESS_BITS, "group": 5, "plain": 1, "double": 1, "hold": 1,
    })


def bounds_layout() -> data.StructLayout:
    return data.StructLayout({"low": BOUND, "high": BOUND})


def scale_layout() -> data.StructLayout:
    return data.StructLayout({"mult": 16, "shift": 8, "unused": 8})


def descriptor_layout() -> data.StructLayout:
    return data.StructLayout({"offset": 16, "group": 8, "unused": 8, "mask": 32})


def result_layout(config: EngineConfig) -> data.StructLayout:
    """Codes of one pixel and tile; of an instruction that holds its sums, one item without meaning."""
    return data.StructLayout({
        "codes": data.ArrayLayout(CODE_BITS, config.columns),
        "slot": range(SLOTS),
        "tile_last": 1,  # of the tile
        "instruction_last": 1,
    })
