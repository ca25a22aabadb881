"""What the parts of the row unit hand to each other."""

from __future__ import annotations

import enum

from amaranth.hdl import signed
from amaranth.lib import data

from weft.arch.config import EngineConfig
from weft.arch.isa import Row
from weft.hw.interfaces import ADDRESS_BITS
from weft.hw.layouts import layout_of

FIELDS = layout_of(Row)
BUFFERS = 8  # blocks of operands read ahead
NUMBER_BITS = 16
KEY_BITS = 32  # magnitudes of products, signed numbers with their sign bit turned
TERM_BITS = 31  # squares
SUM_BITS = 48
FACTOR_BITS, FACTOR_SHIFT_BITS = 16, 6
FACTOR_TIME = 9  # cycles between a group's issue and the use of the factor of its row


class Place(enum.IntEnum):
    """What a word read is."""

    X_LOW = 0
    X_HIGH = 1
    O_LOW = 2
    O_HIGH = 3
    C_LOW = 4  # cosine, sine
    C_HIGH = 5
    PRELUDE = 6  # EXPAND: parameters, ARGMAX: the answer so far
    FACTORS = 7  # EXPAND: group scales
    WEIGHTS = 8


PLACE_BITS = max(Place).bit_length()


def block_layout(config: EngineConfig) -> data.StructLayout:
    """What to do with the operands of a block, of a pair of blocks (rotate), or of a block's tap (CONVOLVE)."""
    return data.StructLayout({
        "pair": 1,  # two blocks to be rotated
        "pair_last": 1,
        "beyond": 1,  # a block of a rotated row that is not rotated
        "tap_first": 1,
        "power": 1,  # the numbers are exponents: SOFTMAX after its first pass
        "reduce": 1,  # results go into maximum and sum
        "emit": 1,  # results are written
        "scaled": 1,  # the factor is one found in this row
        "first": 1,  # of the pass
        "last": 1,
        "valid": range(config.lanes + 1),  # lanes that count
    })


def item_layout(config: EngineConfig) -> data.StructLayout:
    """A word to be read. `sub` tells apart the two blocks of a pair, cosine and sine; `index` counts WEIGHTS."""
    return data.StructLayout({
        "address": ADDRESS_BITS,
        "place": PLACE_BITS,
        "sub": 1,
        "index": range(max(2, config.columns // 2)),
        "buffer": range(BUFFERS),
        "last": 1,
    })


def step_layout(config: EngineConfig) -> data.StructLayout:
    """What travels with a group of numbers through the arithmetic.

    A pair takes four phases for each group: x * o of the lower block, of the upper block and then their squares
    come first; phases 0 and 1 together make the lower block's results, 2 and 3 the upper one's.
    """
    flags = ("pair", "pair_last", "beyond", "tap_first", "power")
    return data.StructLayout({
        **dict.fromkeys(flags, 1),
        "phase": 2,
        "group": range(max(2, config.lanes // config.row_lanes)),
        "turned": 1,  # the first product is that of operands to be rotated
        "emit": 1,  # the sum is complete and goes to the writer
        "key": 1,  # the sum is complete and goes into the maximum
        "key_first": 1,
        "term": 1,  # the first product or the power goes into the sum
        "term_first": 1,
        "pass_last": 1,  # last key of the pass
        "block_end": 1,  # last result of a block or pair
        "row_end": 1,  # last result of a row
    })


def group_layout(config: EngineConfig) -> data.StructLayout:
    """`row_lanes` numbers of each operand; `valid` marks those that count."""
    numbers = data.ArrayLayout(signed(NUMBER_BITS), config.row_lanes)
    return data.StructLayout({"x": numbers, "o": numbers, "c": numbers, "valid": config.row_lanes,
                              "step": step_layout(config)})


def codes_layout(config: EngineConfig) -> data.StructLayout:
    """Results of a block: low and high bytes; or codes in `low`, those of a pair's upper block in `high`."""
    return data.StructLayout({"low": 8 * config.lanes, "high": 8 * config.lanes,
                              "pair": 1, "pair_last": 1, "row_end": 1})


SCALE = data.StructLayout({"mult": 16, "shift": 8, "magnitude": 16})
ANSWER = data.StructLayout({"value": 16, "zero": 16, "index": 32})  # the word of ARGMAX
PARAMETER = data.StructLayout({"mult": 16, "shift": 8, "unused": 8})  # isa.SCALE_FIELDS
