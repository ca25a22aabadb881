"""The instruction set, declared once: each instruction is named bit ranges with its meaning beside them.

Encoder, decoder, listing, functional machine, RTL decoder and reference page all read these classes;
no opcode and no field position is typed anywhere else.

Common to all instructions
--------------------------
An instruction is 64 bytes, little endian. The dispatcher hands it, in program order, to the in-order
queue of its unit. Units meet through counting tokens, one counter for every (producer, consumer) pair:

    before it starts, an instruction takes one token from counter[u][own unit] for every u in `wait`;
    when its last write has reached memory, it adds one to counter[own unit][u] for every u in `signal`;
    a full counter delays the addition, never loses it.

A unit may overlap the start of an instruction with the end of the one before it; an instruction that
needs its predecessor in the same unit to have finished says so by a token to itself.

Tensors in the scratchpad
-------------------------
A word is one pixel of one block of `lanes` channels. Word (block, y, x) of a tensor is at

    base + block * plane + slot(y) * pitch + x,      slot(y) = wrap(anchor + (y - window_y))
    wrap(s) = s - ring if s >= ring else s

so a buffer of `ring` rows may hold a sliding window of a taller image: `anchor` is the slot of image
row `window_y`, and an instruction touches rows window_y <= y < window_y + ring only. A whole image has
ring = height, anchor = window_y = 0 (or any consistent pair). Reads of rows outside [0, height) or
columns outside [0, width) give zero (the most negative code in a max-pool). If pitch mod 8 is in 2..6,
the four neighbours of a bilinear sample lie in four different banks.

Addresses are scratchpad words; sums are taken modulo 2**16 and must fall inside the pool.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

INSTRUCTION_BYTES = 64

# Parameter words of Matrix and Vector, as the fields of NumPy structures.
SCALE_FIELDS = [("mult", "<u2"), ("shift", "u1"), ("unused", "u1")]
DESCRIPTOR_FIELDS = [("offset", "<u2"), ("group", "u1"), ("unused", "u1"), ("mask", "<u4")]


class Unit(enum.IntEnum):
    """The units that execute instructions; the values number token counters and trace events."""

    LOAD = 0
    STORE = 1
    MATRIX = 2
    VECTOR = 3


class Opcode(enum.IntEnum):
    ILLEGAL = 0  # zeroed memory is not a program
    END = 1
    LOAD = 2
    STORE = 3
    MATRIX = 4
    VECTOR = 5


class VectorOp(enum.IntEnum):
    """What the vector unit does with the samples of an output pixel's taps."""

    MULTIPLY = 0  # acc = bias + sum of weight[tap] * sample[tap], then requantize
    MAXIMUM = 1  # largest sample
    PACK = 2  # bytes of the raw rows of an image side by side in one word (im2col of the stem)
    COLUMNS = 3  # each sample to a word of its own (im2col of a full deformable convolution)


class Sampling(enum.IntEnum):
    """Where the vector unit takes the sample of tap (ky, kx) for output pixel (oy, ox)."""

    GRID = 0  # y = oy*stride_y + ky*dilation_y - pad_y, x likewise
    SQUARE = 1  # GRID with both dilations replaced by a signed code per pixel, taps counted from the centre
    OFFSETS = 2  # GRID plus a signed (dy, dx) per pixel and tap, bilinear


def bits(low: int, width: int, doc: str, signed: bool = False) -> Any:
    """Declares an instruction field: `width` bits from bit `low` upward."""
    return field(default=0, metadata={"low": low, "width": width, "doc": doc, "signed": signed})


@dataclass(frozen=True)
class Instruction:
    """Base: encoding, decoding and listing follow from the fields of each subclass."""

    wait: int = bits(4, 4, "units a token is taken from before the start, one bit per Unit")
    signal: int = bits(8, 4, "units a token is given to at the end, one bit per Unit")
    tag: int = bits(12, 16, "layer number, for traces and reports; no effect")

    opcode: ClassVar[Opcode]
    unit: ClassVar[Unit | None]

    def encode(self) -> bytes:
        """The 64 bytes. Raises ValueError naming the field whose value does not fit."""
        word = int(self.opcode)
        for item in fields(self):
            meta, value = item.metadata, int(getattr(self, item.name))
            width = meta["width"]
            least, most = (-(1 << width - 1), (1 << width - 1) - 1) if meta["signed"] else (0, (1 << width) - 1)
            if not least <= value <= most:
                raise ValueError(f"{type(self).__name__}.{item.name} = {value} is outside {least}..{most}")
            word |= (value & (1 << width) - 1) << meta["low"]
        return word.to_bytes(INSTRUCTION_BYTES, "little")

    def listing(self) -> str:
        """One line of text: the opcode and every field that is not zero."""
        parts = [f"{item.name}={getattr(self, item.name)}" for item in fields(self) if getattr(self, item.name)]
        return " ".join([type(self).__name__.lower(), *parts])


OPCODE_BITS = (0, 4)  # low bit and width of the opcode


@dataclass(frozen=True)
class End(Instruction):
    """Ends the program: executed by the dispatcher when every unit is idle; the engine then reports done."""

    opcode = Opcode.END
    unit = None


@dataclass(frozen=True)
class Load(Instruction):
    """Memory to scratchpad, `planes` x `rows` runs of `run` words:

        for p in range(planes): for r in range(rows): for w in range(run):
            pool[address + p*plane_words + r*row_words + w] =
                memory[segment[base] + offset + p*plane_bytes + r*row_bytes + w*word_bytes :][:word_bytes]

    `offset`, `plane_bytes` and `row_bytes` are multiples of the word size.
    """

    base: int = bits(28, 4, "memory segment register added to offset")
    address: int = bits(32, 16, "first scratchpad word")
    offset: int = bits(48, 32, "first byte in the segment")
    run: int = bits(80, 16, "words in a contiguous run, at least 1")
    rows: int = bits(96, 16, "runs in a plane, at least 1")
    planes: int = bits(112, 16, "planes, at least 1")
    row_words: int = bits(128, 16, "scratchpad words from run to run")
    plane_words: int = bits(144, 16, "scratchpad words from plane to plane")
    row_bytes: int = bits(160, 32, "memory bytes from run to run")
    plane_bytes: int = bits(192, 32, "memory bytes from plane to plane")

    opcode = Opcode.LOAD
    unit = Unit.LOAD


@dataclass(frozen=True)
class Store(Load):
    """Scratchpad to memory, the same loops as Load; bytes whose bit in `mask` is 0 keep their value in memory.

    Bit i of `mask` is lane i of the word. Packed buffers of channel shuffles are filled by several
    producers, each of which stores its own lanes.
    """

    mask: int = bits(256, 128, "lanes written to memory")

    opcode = Opcode.STORE
    unit = Unit.STORE


@dataclass(frozen=True)
class _Window(Instruction):
    """Fields of a compute instruction's source window, kernel and output tile."""

    source: int = bits(32, 16, "source tensor: first word (block 0, slot 0, x 0)")
    plane: int = bits(48, 16, "source: words from channel block to channel block")
    pitch: int = bits(64, 12, "source: words from row to row")
    ring: int = bits(76, 12, "source: rows held")
    anchor: int = bits(88, 12, "source: slot of image row window_y, below ring")
    window_y: int = bits(100, 13, "source: image row of the first kernel row of the first output row", signed=True)
    height: int = bits(113, 12, "source: image height; rows outside read as zero")
    width: int = bits(125, 12, "source: image width; columns outside read as zero")
    kernel_y: int = bits(137, 4, "kernel rows, at least 1")
    kernel_x: int = bits(141, 4, "kernel columns, at least 1")
    stride_y: int = bits(145, 4, "source rows per output row")
    stride_x: int = bits(149, 4, "source columns per output column")
    dilation_y: int = bits(153, 4, "source rows per kernel row")
    dilation_x: int = bits(157, 4, "source columns per kernel column")
    pad_x: int = bits(161, 4, "columns of padding on the left")
    rows: int = bits(165, 12, "output rows of this instruction, at least 1")
    columns: int = bits(177, 12, "output columns, at least 1")
    blocks: int = bits(189, 10, "source channel blocks, at least 1")
    unsigned: int = bits(199, 1, "source codes are uint8, otherwise int8")
    low: int = bits(200, 9, "smallest output code", signed=True)
    high: int = bits(209, 9, "largest output code", signed=True)
    parameters: int = bits(218, 16, "first word of bias, scale and (matrix) write descriptors or (vector) weights")
    target: int = bits(234, 16, "destination: first word (block 0, slot 0, x 0)")
    target_pitch: int = bits(250, 12, "destination: words from row to row")
    target_ring: int = bits(262, 12, "destination: rows held")
    target_anchor: int = bits(274, 12, "destination: slot of the first output row")
    target_step_y: int = bits(286, 2, "destination rows per output row, 1 or 2; a step never crosses the ring's end")
    target_step_x: int = bits(288, 2, "destination columns per output column, 1 or 2")


@dataclass(frozen=True)
class Matrix(_Window):
    """Convolution or linear layer over all source channels. R, C, P, L: rows, columns, pixels, lanes of the config.

        for tile in range(tiles):                                        # C output channels each
          for pixel (oy, ox) in raster order over rows x columns:        # P at a time
            acc[c] = bias[tile][c]
            for ky, kx, block:                                           # block innermost
              y = window_y + oy*stride_y + ky*dilation_y;  x = ox*stride_x + kx*dilation_x - pad_x
              acc[c] += sum over lanes l of source(block, y, x)[l] * weight[tile][ky][kx][block][l][c]
            code[c] = requantize(acc[c], mult[tile][c], shift[tile][c], low, high)
            position = target + wrap(target_anchor + oy*target_step_y)*target_pitch + ox*target_step_x
            for d in range(4) where mask[tile][d] != 0:
              for c where bit c of mask[tile][d] is set:
                pool[position + offset[tile][d]] lane (group[tile][d]*C + c) = code[c]

    Several descriptors write one result to several places: packed regions of the layers that will read a
    shuffled channel, or the four copies of a nearest 2x upsampling.

    Weights start at `weights` and are read once for every group of P pixels. Each step of the unit takes
    R*C nibbles (low nibble of a byte first), nibble r*C + c for input slot r and output column c. With 4-bit
    weights step s of a word covers lanes s*R .. s*R+R-1, one nibble each; with `wide` (8-bit) weights it
    covers lanes s*R/2 .. s*R/2+R/2-1, slot 2i being the unsigned low and 2i+1 the signed high nibble of
    lane i. Steps are packed in order (tile, ky, kx, block, step) without gaps.

    Parameters of a tile: ceil(4C/L) words of int32 bias, as many of scale (uint16 mult, uint8 shift, one
    byte unused), one word of four descriptors of 8 bytes (uint16 offset, uint8 group, uint8 unused,
    uint32 mask). Tiles follow each other.
    """

    weights: int = bits(290, 16, "first word of the weight stream")
    tiles: int = bits(306, 10, "output tiles, at least 1")
    wide: int = bits(316, 1, "8-bit weights")

    opcode = Opcode.MATRIX
    unit = Unit.MATRIX


@dataclass(frozen=True)
class Vector(_Window):
    """Depthwise work: every lane on its own. L: lanes of the config.

        for block in range(blocks):
          for pixel (oy, ox) in raster order over rows x columns:
            for tap = ky*kernel_x + kx:                                  # ky outer, kx inner
              sample = see Sampling; `tap_step`*kx is added to its address
              MULTIPLY: acc[l] += sample[l] * weight[block][tap][l], starting from bias[block][l]
              MAXIMUM:  best[l] = max(best[l], sample[l])
              COLUMNS:  pool[position + tap*target_tap][l] = sample[l]
              PACK:     word[tap*pack_bytes + i] = image byte, i < pack_bytes
            MULTIPLY writes requantize(acc, mult, shift, low, high), MAXIMUM best, PACK word, to pool[position]
            position = target + block*target_plane + wrap(target_anchor + oy*target_step_y)*target_pitch
                       + ox*target_step_x

    Sampling (window coordinates: y counts from image row window_y of output row 0, kernel row 0):
        GRID     y = window_y + oy*stride_y + ky*dilation_y;  x = ox*stride_x + kx*dilation_x - pad_x
        SQUARE   the code s = lane 0 of the offset word of (oy, ox), signed;
                 y = centre_y + oy*stride_y + s*(ky - kernel_y//2);  x = ox*stride_x - pad_x + kernel_x//2 +
                 s*(kx - kernel_x//2);  centre_y = `grid_y` + kernel_y//2
        OFFSETS  (dy, dx) = lanes 2*tap, 2*tap+1 of the offset word of (oy, ox), signed, in units of
                 2**-fraction pixels; y = grid_y + oy*stride_y + ky*dilation_y + dy, x as GRID + dx; bilinear,
                 every neighbour outside the image or the window [window_y, window_y + ring) is zero
    `grid_y` is the image row of kernel row 0 for output row 0; `window_y` may lie above it, to leave room
    for negative offsets. For SQUARE, too, rows outside the window read as zero.
    The offset word of (oy, ox) is at offsets + wrap(offset_anchor + oy)*offset_pitch + ox, in a ring of offset_ring.

    PACK reads raw image rows: pitch is the words of a row, row y starts at byte 0 of slot(y), and tap ky takes
    bytes ox*pack_stride .. ox*pack_stride + pack_bytes - 1 of row y = window_y + oy*stride_y + ky*dilation_y
    (pack_stride = 3 channels x stride of the stem, pack_bytes = 3 channels x kernel columns, at most L in all
    taps together). kernel_x = blocks = 1; stride_x, dilation_x, pad_x and width are not used, because the image
    carries its own left and right border; unused lanes of the word become 0.

    Parameters of a block: ceil(4L/L) words of int32 bias, as many of scale (uint16 mult, uint8 shift, one byte
    unused), then one word of int8 weights per tap. Only MULTIPLY reads them. Blocks follow each other.
    """

    operation: int = bits(317, 2, "VectorOp")
    sampling: int = bits(319, 2, "Sampling; only MULTIPLY and COLUMNS may deform")
    tap_step: int = bits(321, 16, "words added to the source address per kernel column: a second operand")
    target_plane: int = bits(337, 16, "destination: words from channel block to channel block")
    target_tap: int = bits(353, 16, "COLUMNS: words from tap to tap")
    offsets: int = bits(369, 16, "offset tensor: first word")
    offset_pitch: int = bits(385, 12, "offset tensor: words from row to row")
    offset_ring: int = bits(397, 12, "offset tensor: rows held")
    offset_anchor: int = bits(409, 12, "offset tensor: slot of the first output row")
    fraction: int = bits(421, 3, "fraction bits of an offset code, 0..4")
    grid_y: int = bits(424, 13, "image row of kernel row 0 of output row 0 (deformable sampling)", signed=True)
    pack_bytes: int = bits(437, 6, "PACK: bytes taken per tap")
    pack_stride: int = bits(443, 6, "PACK: bytes from output column to output column")

    opcode = Opcode.VECTOR
    unit = Unit.VECTOR


INSTRUCTIONS: dict[Opcode, type[Instruction]] = {cls.opcode: cls for cls in (End, Load, Store, Matrix, Vector)}


def decode(data: bytes) -> Instruction:
    """The instruction in 64 bytes. Raises ValueError for an unknown opcode."""
    word = int.from_bytes(data[:INSTRUCTION_BYTES], "little")
    low, width = OPCODE_BITS
    code = word >> low & (1 << width) - 1
    try:
        cls = INSTRUCTIONS[Opcode(code)]
    except (KeyError, ValueError):
        raise ValueError(f"unknown opcode {code}") from None
    values = {}
    for item in fields(cls):
        value = word >> item.metadata["low"] & (1 << item.metadata["width"]) - 1
        if item.metadata["signed"] and value >> item.metadata["width"] - 1:
            value -= 1 << item.metadata["width"]
        values[item.name] = value
    return cls(**values)


def isa_description() -> dict[str, dict[str, list[int]]]:
    """Field positions of every instruction: what a Program's fingerprint depends on."""
    return {
        cls.__name__: {"opcode": [int(cls.opcode)]}
        | {
            item.name: [item.metadata["low"], item.metadata["width"], int(item.metadata["signed"])]
            for item in fields(cls)
        }
        for cls in INSTRUCTIONS.values()
    }


def _check_declarations() -> None:
    """Fields of one instruction must not overlap nor leave the instruction."""
    for cls in INSTRUCTIONS.values():
        used = (1 << OPCODE_BITS[1]) - 1 << OPCODE_BITS[0]
        for item in fields(cls):
            mask = (1 << item.metadata["width"]) - 1 << item.metadata["low"]
            if used & mask or mask >> 8 * INSTRUCTION_BYTES:
                raise AssertionError(f"{cls.__name__}.{item.name} overlaps another field or the end of the instruction")
            used |= mask


_check_declarations()
