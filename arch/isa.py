"""The instruction set, declared once: each instruction is named bit ranges with its meaning beside them.

Encoder, decoder, listing, functional machine, RTL decoder and reference page all read these classes;
no opcode and no field position is typed anywhere else.

Common to all instructions
--------------------------
An instruction is 64 bytes, little endian. The dispatcher executes the instructions without a unit itself
(arithmetic on its registers, branches) and hands the others, in program order, to the in-order queue of
their unit. Units meet through counting tokens, one counter for every (producer, consumer) pair:

    before it starts, an instruction takes one token from counter[u][own unit] for every u in `wait`;
    when its last write has reached memory, it adds one to counter[own unit][u] for every u in `signal`;
    a full counter delays the addition, never loses it.

A unit may overlap the start of an instruction with the end of the one before it; an instruction that
needs its predecessor in the same unit to have finished says so by a token to itself.

Registers
---------
The dispatcher has 32 registers of 32 bits, two's complement, arithmetic modulo 2**32. Registers 0..7 are the
arguments the host has set for this run, read only; 31 is always 0; the others must be written before they are
read. An instruction for a unit may bind up to four of its fields to registers: on dispatch, the register's value
is added to the field. Bound fields are 16 or 32 bits at a multiple of 16 (`bind`); a narrower field there
must not overflow by the sum. So one program serves any number of tokens at any position.

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

Numbers of 16 bits, two's complement, take two words: the low bytes of `lanes` of them in one, the high bytes
in another, at a distance that the instruction gives (`high`). A scale is a word that begins with its
SCALE_FIELDS; its value is mult / 2**shift.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

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
    ROW = 4


class Opcode(enum.IntEnum):
    ILLEGAL = 0  # zeroed memory is not a program
    END = 1
    LOAD = 2
    STORE = 3
    MATRIX = 4
    VECTOR = 5
    ROW = 6
    SCALAR = 7
    READ = 8
    BRANCH = 9
    BARRIER = 10


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


class RowOp(enum.IntEnum):
    """What the row unit makes of a row of 16-bit numbers."""

    ADD = 0
    MULTIPLY = 1
    CONVOLVE = 2
    SWIGLU = 3
    QUANTIZE = 4
    SOFTMAX = 5
    ARGMAX = 6
    EXPAND = 7


class RowLayout(enum.IntEnum):
    """How QUANTIZE and SOFTMAX write their codes and their scale."""

    PLAIN = 0  # a block of codes to a word; the scale word
    KEYS = 1  # as columns of a wide weight stream: every code C times side by side; the scale word
    VALUES = 2  # as rows of a wide weight stream: C codes, repeated through the word; the magnitude in two words


class ScalarOp(enum.IntEnum):
    ADD = 0
    SUBTRACT = 1
    MULTIPLY = 2
    MINIMUM = 3
    MAXIMUM = 4
    SHIFT = 5  # arithmetic, to the right


REGISTERS = 32
ARGUMENTS = 8  # registers 0 .. 7 are set by the host
ZERO = 31  # register that is always 0
BINDINGS = 4  # fields of an instruction that may be bound to registers
BINDING_LOW, BINDING_BITS = 464, 12


def bits(low: int, width: int, doc: str, signed: bool = False) -> Any:
    """Declares an instruction field: `width` bits from bit `low` upward."""
    return field(default=0, metadata={"low": low, "width": width, "doc": doc, "signed": signed})


@dataclass(frozen=True)
class Instruction:
    """Base: encoding, decoding and listing follow from the fields of each subclass."""

    wait: int = bits(4, 5, "units a token is taken from before the start, one bit per Unit")
    signal: int = bits(9, 5, "units a token is given to at the end, one bit per Unit")
    tag: int = bits(14, 16, "layer number, for traces and reports; no effect")
    bind0: int = bits(464, 12, "binding: register 5 bits, place (in 16 bits) 5 bits, 1: 32 bits wide, 1: in force")
    bind1: int = bits(476, 12, "binding, as bind0")
    bind2: int = bits(488, 12, "binding, as bind0")
    bind3: int = bits(500, 12, "binding, as bind0")

    opcode: ClassVar[Opcode]
    unit: ClassVar[Unit | None]

    @classmethod
    @functools.cache
    def _places(cls) -> list[tuple[str, int, int, bool]]:
        """Name, lowest bit, width and signedness of every field."""
        return [(item.name, *(item.metadata[key] for key in ("low", "width", "signed"))) for item in fields(cls)]

    def encode(self) -> bytes:
        """The 64 bytes. Raises ValueError naming the field whose value does not fit."""
        word = int(self.opcode)
        for name, low, width, signed in self._places():
            value = int(getattr(self, name))
            least, most = (-(1 << width - 1), (1 << width - 1) - 1) if signed else (0, (1 << width) - 1)
            if not least <= value <= most:
                raise ValueError(f"{type(self).__name__}.{name} = {value} is outside {least}..{most}")
            word |= (value & (1 << width) - 1) << low
        return word.to_bytes(INSTRUCTION_BYTES, "little")

    def listing(self) -> str:
        """One line of text: the opcode, every field that is not zero, and what registers are added to fields."""
        names = {item.metadata["low"]: item.name for item in fields(self)}
        parts = [f"{item.name}={getattr(self, item.name)}" for item in fields(self)
                 if getattr(self, item.name) and not item.name.startswith("bind")]
        parts += [f"{names.get(16 * place, 16 * place)}+=r{register}" for register, place, _ in self.bindings()]
        return " ".join([type(self).__name__.lower(), *parts])

    def bindings(self) -> list[tuple[int, int, int]]:
        """Register, place (a multiple of 16 bits) and width in bits of the bindings in force."""
        values = [getattr(self, f"bind{number}") for number in range(BINDINGS)]
        return [(value & 31, value >> 5 & 31, 32 if value >> 10 & 1 else 16) for value in values if value >> 11]

    def bind(self, **registers: int) -> Self:
        """This instruction with fields bound to registers. Raises ValueError for a field that cannot be bound."""
        metadata = {item.name: item.metadata for item in fields(self)}
        free = [f"bind{number}" for number in range(BINDINGS) if not getattr(self, f"bind{number}") >> 11]
        if len(registers) > len(free):
            raise ValueError(f"{type(self).__name__} has no room to bind {', '.join(registers)}")
        values = {}
        for slot, (name, register) in zip(free, registers.items(), strict=False):
            low, width = metadata[name]["low"], metadata[name]["width"]
            taken = low // 16 in [place for _, place, _ in self.bindings()]
            bindable = self.unit is not None and low % 16 == 0 and width <= 32 and low < BINDING_LOW
            if not bindable or taken or not 0 <= register < REGISTERS:
                raise ValueError(f"{type(self).__name__}.{name} cannot be bound to register {register}")
            values[slot] = 1 << 11 | int(width > 16) << 10 | low // 16 << 5 | register
        return replace(self, **values)

    def bound(self, registers: Sequence[int]) -> Self:
        """The instruction as dispatched: values of `registers` added, bindings removed."""
        word = int.from_bytes(self.encode(), "little")
        for register, place, width in self.bindings():
            mask = (1 << width) - 1
            part = (word >> 16 * place) + registers[register] & mask
            word = word & ~(mask << 16 * place) | part << 16 * place
        word &= (1 << BINDING_LOW) - 1
        instruction = decode(word.to_bytes(INSTRUCTION_BYTES, "little"))
        assert isinstance(instruction, type(self))
        return instruction


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

    base: int = bits(224, 4, "memory segment register added to offset")
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

    Bit i of `mask`, rotated left by `rotate` within the lanes, is lane i of the word. Packed buffers of channel
    shuffles are filled by several producers, each of which stores its own lanes; the key/value cache is filled
    position by position.
    """

    mask: int = bits(256, 128, "lanes written to memory")
    rotate: int = bits(384, 7, "lanes by which the mask is rotated, below the number of lanes")

    opcode = Opcode.STORE
    unit = Unit.STORE


@dataclass(frozen=True)
class _Window(Instruction):
    """Fields of a compute instruction's source window, kernel and output tile."""

    source: int = bits(32, 16, "source tensor: first word (block 0, slot 0, x 0)")
    plane: int = bits(48, 16, "source: words from channel block to channel block")
    parameters: int = bits(64, 16, "first word of bias, scale and (matrix) write descriptors or (vector) weights")
    target: int = bits(80, 16, "destination: first word (block 0, slot 0, x 0)")
    rows: int = bits(96, 12, "output rows of this instruction, at least 1")
    kernel_y: int = bits(108, 4, "kernel rows, at least 1")
    columns: int = bits(112, 12, "output columns, at least 1")
    kernel_x: int = bits(124, 4, "kernel columns, at least 1")
    blocks: int = bits(128, 12, "source channel blocks, at least 1")
    stride_y: int = bits(140, 4, "source rows per output row")
    height: int = bits(144, 12, "source: image height; rows outside read as zero")
    stride_x: int = bits(156, 4, "source columns per output column")
    window_y: int = bits(160, 13, "source: image row of the first kernel row of the first output row", signed=True)
    target_step_y: int = bits(173, 2, "destination rows per output row, 1 or 2; a step never crosses the ring's end")
    unsigned: int = bits(175, 1, "source codes are uint8, otherwise int8")
    target_plane: int = bits(176, 16, "destination: words from channel block to channel block")
    pitch: int = bits(192, 12, "source: words from row to row")
    dilation_y: int = bits(204, 4, "source rows per kernel row")
    ring: int = bits(208, 12, "source: rows held")
    dilation_x: int = bits(220, 4, "source columns per kernel column")
    anchor: int = bits(224, 12, "source: slot of image row window_y, below ring")
    pad_x: int = bits(236, 4, "columns of padding on the left")
    width: int = bits(240, 12, "source: image width; columns outside read as zero")
    target_step_x: int = bits(252, 2, "destination columns per output column, 1 or 2")
    low: int = bits(256, 9, "smallest output code", signed=True)
    high: int = bits(265, 9, "largest output code", signed=True)
    target_pitch: int = bits(274, 12, "destination: words from row to row")
    target_ring: int = bits(286, 12, "destination: rows held")
    target_anchor: int = bits(298, 12, "destination: slot of the first output row")


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

    With `plain` there are no descriptors and no bias: for g = group + t the C results of tile t go to lane group
    g % (L/C) of the word at position + (g // (L/C)) * target_plane. With `double`, which asks for `plain`, results
    are clamped to 16 bits instead of low .. high; their low bytes go there, their high bytes to the word target_high
    further on.

    Weights start at `weights` and are read once for every group of P pixels. Each step of the unit takes
    R*C/2 bytes, byte i*C + c for output column c. With 4-bit weights step s of a word covers lanes s*R ..
    s*R+R-1, the low nibble of byte i being lane s*R + 2i and the high one lane s*R + 2i + 1; with `wide` (8-bit)
    weights it covers lanes s*R/2 .. s*R/2+R/2-1, byte i being lane s*R/2 + i. Steps are packed in order (tile,
    ky, kx, block, step) without gaps. With `grouped`, one word of scales stands before the weights of each L/C
    successive words of a tile (fewer at its end): byte k*C + c is the factor, uint8, by which the sum over word k
    of column c is multiplied before it is added to acc[c].

    Parameters of a tile: ceil(4C/L) words of int32 bias, as many of scale (uint16 mult, uint8 shift, one
    byte unused), one word of four descriptors of 8 bytes (uint16 offset, uint8 group, uint8 unused,
    uint32 mask); with `plain` the words of scale only. Tiles follow each other.

    With `scaled`, the scale of pixel (oy, ox) is the word at scales + oy*scales_pitch + ox, and the result is
    requantize(acc, *combine_scales(pixel's mult, shift, mult[tile][c], shift[tile][c])).

    A sum too long for one instruction is cut: `hold` leaves acc in the unit and writes nothing, `resume` goes on
    from there instead of from bias. Both ask for one tile and at most P pixels, and nothing else between.
    """

    target_high: int = bits(320, 16, "destination of 16-bit results: words from low to high bytes")
    weights: int = bits(336, 16, "first word of the weight stream")
    tiles: int = bits(352, 12, "output tiles, at least 1")
    wide: int = bits(364, 1, "8-bit weights")
    plain: int = bits(365, 1, "results to successive lanes; parameters are scales only")
    grouped: int = bits(366, 1, "a scale for every word of weights and column")
    scaled: int = bits(367, 1, "a scale for every pixel")
    scales: int = bits(368, 16, "scale of pixel (0, 0)")
    scales_pitch: int = bits(384, 12, "words from the scales of one row to the next")
    double: int = bits(396, 1, "16-bit results")
    resume: int = bits(397, 1, "go on with the sums the unit holds")
    hold: int = bits(398, 1, "keep the sums for the next instruction")
    group: int = bits(399, 5, "plain: lane group of tile 0, below L/C")

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

    operation: int = bits(310, 2, "VectorOp")
    sampling: int = bits(312, 2, "Sampling; only MULTIPLY and COLUMNS may deform")
    fraction: int = bits(314, 3, "fraction bits of an offset code, 0..4")
    tap_step: int = bits(320, 16, "words added to the source address per kernel column: a second operand")
    target_tap: int = bits(336, 16, "COLUMNS: words from tap to tap")
    offsets: int = bits(352, 16, "offset tensor: first word")
    offset_pitch: int = bits(368, 12, "offset tensor: words from row to row")
    offset_ring: int = bits(380, 12, "offset tensor: rows held")
    offset_anchor: int = bits(392, 12, "offset tensor: slot of the first output row")
    grid_y: int = bits(404, 13, "image row of kernel row 0 of output row 0 (deformable sampling)", signed=True)
    pack_bytes: int = bits(417, 6, "PACK: bytes taken per tap")
    pack_stride: int = bits(423, 6, "PACK: bytes from output column to output column")

    opcode = Opcode.VECTOR
    unit = Unit.VECTOR


@dataclass(frozen=True)
class Row(Instruction):
    """Work on whole rows: the features of a token, the scores of a query. C, L: columns and lanes of the config.

        for row in range(rows): for column in range(columns):
            x[b*L + l] = 16-bit number, lane l of (source + row*source_row + column*source_column + b*source_plane,
                         the same + source_high);  b in range(blocks)
            o[b*L + l] = likewise with other, other_row, other_column, other_plane, other_high
            do `operation`; results go to target + row*target_row + column*target_column + ...

    Operations that give numbers:

        ADD       y = saturate16(round_shift(x, up) + o)
        MULTIPLY  y = saturate16(round_shift(x * o, shift))
        SWIGLU    y = saturate16(round_shift(silu(x, up) * o, shift))
        CONVOLVE  y = saturate16(round_shift(sum over j < span of x_j * o_j, shift)), the sum in 32 bits,
                  x_j and o_j being read j*source_column and j*other_column further on; columns = 1
        EXPAND    y = requantize(weight * group scale, *combine_scales(column's mult, shift, mult, shift)) to 16 bits:
                  column `length` of a 4-bit grouped tile of `blocks` words whose weight stream starts at the place of
                  x; the scale of the column is read from the tile's plain parameters at the place of o

    The low bytes of block b go to target + b*target_plane, the high bytes target_high further on.

    Operations that give codes:

        QUANTIZE  v = x; with `weighted` v = x * o; with `rotate`, which asks for `weighted`, round_shift(x * o, 15)
                  is rotated: for b < span, (v[b], v[b + span]) = rotate((..)[b], (..)[b + span], cosine[b], sine[b]),
                  and blocks from 2*span on are shifted left by ROTATION_BITS. cosine[b] and sine[b] are 16-bit numbers
                  in words table + 4*(row*span + b), + 1 (cosine: low bytes, high bytes), + 2, + 3 (sine).
                  codes, magnitude = quantize_row(v, 127); divisor = 1, or with `normalize`
                  normalized_root(sum of x**2 + constant), the sum below 2**48
        SOFTMAX   codes, magnitude, divisor = softmax_row(x, o) over the first n = length + row*length_step elements of
                  the row, which has as many; the rest of the codes is 0. Elements of o are unsigned, 1 .. 2**15.

    Codes of block b are written as `layout` says; with target_plane for p:

        PLAIN   word target + b*p: code[b*L + l] in lane l
        KEYS    words target + b*p + w, w < C: code[b*L + w*(L/C) + l//C] in lane l
        VALUES  words target + (b*(L/C) + t)*p, t < L/C: code[b*L + t*C + l%C] in lane l

    and the row's scale, combine_scales(*ratio_scale(magnitude, divisor), mult, shift), to the word at
    scale + row*scale_row + column*scale_column, as SCALE_FIELDS repeated through the word. With VALUES, instead,
    the low byte of the magnitude, which is below 2**16, in every lane of that word, the high byte in every lane of
    the next.

    ARGMAX finds the first of the greatest of the first `length` elements, all of them after those that the word at the
    place of o speaks of, unless `first`; it writes (int16 value, uint16 0, uint32 constant + index, zeros) to target.
    The word at the place of o has the same form; it stays the answer unless exceeded.

    x and o are read before y is written, block by block, so `target` may be `source` or `other`; any other
    overlap of what is read and written is not allowed.
    """

    source: int = bits(32, 16, "first operand: first word")
    source_plane: int = bits(48, 16, "words from block to block")
    source_high: int = bits(64, 16, "words from low to high bytes")
    source_row: int = bits(80, 16, "words from row to row")
    source_column: int = bits(96, 16, "words from column to column (CONVOLVE: from tap to tap)")
    other: int = bits(112, 16, "second operand: first word")
    other_plane: int = bits(128, 16, "words from block to block")
    other_high: int = bits(144, 16, "words from low to high bytes")
    other_row: int = bits(160, 16, "words from row to row")
    other_column: int = bits(176, 16, "words from column to column (CONVOLVE: from tap to tap)")
    target: int = bits(192, 16, "destination: first word")
    target_plane: int = bits(208, 16, "words from block to block (VALUES: from tile to tile)")
    target_high: int = bits(224, 16, "words from low to high bytes")
    target_row: int = bits(240, 16, "words from row to row")
    target_column: int = bits(256, 16, "words from column to column")
    scale: int = bits(272, 16, "scales of the results: first word")
    scale_row: int = bits(288, 16, "words from row to row")
    scale_column: int = bits(304, 16, "words from column to column")
    rows: int = bits(320, 12, "outer loop, at least 1")
    operation: int = bits(332, 4, "RowOp")
    columns: int = bits(336, 12, "inner loop, at least 1")
    span: int = bits(348, 4, "CONVOLVE: taps, at least 1; rotate: blocks from one half of a pair to the other")
    blocks: int = bits(352, 12, "words of `lanes` numbers in a row, at least 1")
    normalize: int = bits(364, 1, "QUANTIZE: divide by the root of the sum of squares")
    weighted: int = bits(365, 1, "QUANTIZE: multiply by the second operand")
    rotate: int = bits(366, 1, "QUANTIZE: rotary position embedding")
    first: int = bits(367, 1, "ARGMAX: there is no earlier word")
    length: int = bits(368, 16, "SOFTMAX, ARGMAX: elements of row 0, at least 1; EXPAND: column of the tile")
    constant: int = bits(384, 32, "QUANTIZE normalize: added to the sum, at least 1; ARGMAX: number of element 0")
    table: int = bits(416, 16, "rotate: first word of cosines and sines")
    mult: int = bits(432, 16, "factor of the scale: mult")
    shift: int = bits(448, 8, "factor of the scale: shift, at most 62; or right shift of a product, at most 47")
    layout: int = bits(456, 2, "RowLayout")
    length_step: int = bits(458, 1, "SOFTMAX: elements that each row has more than the one before")
    up: int = bits(459, 4, "SWIGLU: see silu, 0..3; ADD: right shift of the first operand")

    opcode = Opcode.ROW
    unit = Unit.ROW


@dataclass(frozen=True)
class Scalar(Instruction):
    """Arithmetic in the dispatcher: register[target] = register[first] `operation` b, b as in Branch."""

    operation: int = bits(32, 4, "ScalarOp")
    target: int = bits(36, 5, "register written, ARGUMENTS .. 30")
    first: int = bits(41, 5, "first operand")
    second: int = bits(46, 5, "second operand, unless `literal`")
    literal: int = bits(51, 1, "the second operand is `value`")
    value: int = bits(64, 32, "literal operand", signed=True)

    opcode = Opcode.SCALAR
    unit = None


@dataclass(frozen=True)
class Read(Instruction):
    """register[target] = 32-bit word, little endian, at memory segment[base] + offset + register[first].

    The address is a multiple of 4. Memory is read as the host left it: what the store unit writes in the same run may
    or may not be seen.
    """

    target: int = bits(36, 5, "register written, ARGUMENTS .. 30")
    first: int = bits(41, 5, "register added to the address")
    base: int = bits(52, 4, "memory segment register")
    offset: int = bits(64, 32, "bytes from the start of the segment")

    opcode = Opcode.READ
    unit = None


@dataclass(frozen=True)
class Branch(Instruction):
    """If register[first] < b (signed), the next instruction is number `destination` of the program, otherwise the
    following one; b = `value` if `literal`, else register[second]."""

    first: int = bits(41, 5, "first operand")
    second: int = bits(46, 5, "second operand, unless `literal`")
    literal: int = bits(51, 1, "the second operand is `value`")
    value: int = bits(64, 32, "literal operand", signed=True)
    destination: int = bits(96, 32, "instruction that follows if the condition holds")

    opcode = Opcode.BRANCH
    unit = None


@dataclass(frozen=True)
class Barrier(Instruction):
    """Waits until every unit has finished everything. No tokens are taken or given."""

    opcode = Opcode.BARRIER
    unit = None


INSTRUCTIONS: dict[Opcode, type[Instruction]] = {
    cls.opcode: cls for cls in (End, Load, Store, Matrix, Vector, Row, Scalar, Read, Branch, Barrier)
}


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
    for name, low, width, signed in cls._places():
        value = word >> low & (1 << width) - 1
        values[name] = value - (1 << width) if signed and value >> width - 1 else value
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
