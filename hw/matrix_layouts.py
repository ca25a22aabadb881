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
SLOTS = 4  # tiles whose parameters are held: prefetched, in the array, draining
BOUND = signed(9)  # output codes


def word_layout(config: EngineConfig) -> data.StructLayout:
    """A word whose P source words are in the buffer."""
    return data.StructLayout({
        "first": 1,  # of its pass
        "last": 1,
        "wide": 1,
        "unsigned": 1,
        "live": range(config.pixels + 1),  # pixels 0 .. live-1 of the pass give results
        "tile_last": 1,  # the pass is the last one of its tile
        "instruction_last": 1,
    })


def fetch_layout() -> data.StructLayout:
    """A word whose weights are to be fetched."""
    return data.StructLayout({"first": 1, "tile_first": 1, "instruction_first": 1, "wide": 1})


def operands_layout() -> data.StructLayout:
    """Where an instruction's weights and parameters are, and its output bounds."""
    return data.StructLayout({"weights": ADDRESS_BITS, "parameters": ADDRESS_BITS, "low": BOUND, "high": BOUND})


def target_layout() -> data.StructLayout:
    """An instruction's output raster; `start` is the address of its first pixel."""
    return data.StructLayout({
        "start": ADDRESS_BITS, "target": ADDRESS_BITS, "pitch": 12, "ring": 12, "anchor": 12,
        "step_y": 2, "step_x": 2, "columns": 12, "tag": TAG_BITS,
    })


def bounds_layout() -> data.StructLayout:
    return data.StructLayout({"low": BOUND, "high": BOUND})


def scale_layout() -> data.StructLayout:
    return data.StructLayout({"mult": 16, "shift": 8, "unused": 8})


def descriptor_layout() -> data.StructLayout:
    return data.StructLayout({"offset": 16, "group": 8, "unused": 8, "mask": 32})


def result_layout(config: EngineConfig) -> data.StructLayout:
    """Codes of one pixel and tile."""
    return data.StructLayout({
        "codes": 8 * config.columns,
        "slot": range(SLOTS),
        "tile_last": 1,  # of the tile
        "instruction_last": 1,
    })
