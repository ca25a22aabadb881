"""Every integer operation of Weft, defined once.

The functions work on NumPy arrays and, because they use only operators and the `clip` method, on
torch int64 tensors too: the Brevitas layers, the functional machine and the constants baked into
the RTL are all readers of this file. Arguments are integers held in int64 (NumPy or torch);
nothing here touches floating point except the two functions that turn a float scale into integers.
"""

from __future__ import annotations

import math

ACC_BITS = 32  # accumulator of the matrix and vector units, two's complement
MULT_BITS = 16  # requantize multiplier, unsigned
SHIFT_BITS = 6  # requantize shift
MAX_SHIFT = ACC_BITS + MULT_BITS - 1  # a larger shift always gives 0
FRACTION_BITS = 4  # sub-pixel bits of a bilinear sample position

ACC_MIN, ACC_MAX = -(1 << (ACC_BITS - 1)), (1 << (ACC_BITS - 1)) - 1
U8 = (0, 255)
S8 = (-128, 127)


def saturate(x, low: int, high: int):
    """Clamp `x` to [low, high]."""
    return x.clip(low, high)


def round_shift(x, shift):
    """`x / 2**shift` rounded to the nearest integer, ties to even. `shift` >= 0, may broadcast.

    Half-even, because half-up drifts: 16 LSB over 32 residual additions (references/llm.md).
    """
    ones = (1 << shift) - 1
    odd = (x >> shift) & ones & 1  # 0 when shift is 0
    # half - 1 + odd carries when the remainder is above half, or is half beside an odd quotient.
    return (x + (ones >> 1) + odd) >> shift


def requantize(acc, mult, shift, low: int, high: int):
    """Accumulator to activation code: `clamp(round_half_even(acc * mult / 2**shift))`.

    `acc` is int32 in range, `mult` in [0, 2**16), `shift` in [0, 47]; the product needs 48 bits.
    """
    return saturate(round_shift(acc * mult, shift), low, high)


def requantize_parameters(ratio: float) -> tuple[int, int]:
    """The (mult, shift) whose quotient is nearest to `ratio`, with `mult` normalized to 16 bits.

    `ratio` is s_in * s_weight / s_out, computed in float64 from the stored float32 scales.
    Relative error at most 2**-16. Raises ValueError for a ratio that no pair can express.
    """
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"requantize ratio must be finite and positive, got {ratio!r}")
    mantissa, exponent = math.frexp(ratio)  # ratio = mantissa * 2**exponent, mantissa in [0.5, 1)
    mult = round(mantissa * (1 << MULT_BITS))
    shift = MULT_BITS - exponent
    if mult == 1 << MULT_BITS:
        mult, shift = mult >> 1, shift - 1
    while shift > MAX_SHIFT:  # tiny ratio: give up low bits of the multiplier
        mult, shift = mult >> 1, shift - 1
    if shift < 0:
        raise ValueError(f"requantize ratio {ratio!r} is above {(1 << MULT_BITS) - 1}")
    return mult, shift


def bias_code(bias: float, accumulator_scale: float) -> int:
    """Bias in accumulator units: `round_half_even(bias / (s_in * s_weight))`, saturated to int32."""
    return max(ACC_MIN, min(ACC_MAX, round(bias / accumulator_scale)))


def lerp(a, b, fraction):
    """`a * 16 + fraction * (b - a)`: linear interpolation scaled by 2**FRACTION_BITS, exact."""
    return (a << FRACTION_BITS) + fraction * (b - a)


def bilinear(v00, v01, v10, v11, fy, fx):
    """Bilinear sample of four neighbour codes, rounded half-even back to a code.

    v00 is (y0, x0), v01 (y0, x0 + 1), v10 (y0 + 1, x0), v11 (y0 + 1, x0 + 1); a neighbour outside
    the image is 0 (ONNX DeformConv edge rule). `fy`, `fx` in [0, 16) are sixteenths of a pixel.
    The result lies between the smallest and the largest neighbour, so it needs no clamp.
    """
    top, bottom = lerp(v00, v01, fx), lerp(v10, v11, fx)
    return round_shift(lerp(top, bottom, fy), 2 * FRACTION_BITS)


def split_position(base, offset, fraction_bits: int):
    """Sample coordinate `base + offset / 2**fraction_bits` as (integer part, sixteenths).

    `base` is the integer grid coordinate, `offset` a signed 8-bit code, `fraction_bits` in [0, 4].
    """
    fine = offset << (FRACTION_BITS - fraction_bits)
    return base + (fine >> FRACTION_BITS), fine & ((1 << FRACTION_BITS) - 1)


def split_w8(weight):
    """An int8 weight as (low, high): unsigned low nibble and signed high nibble, w = 16*high + low."""
    return weight & 15, weight >> 4


def accumulator_bounds(weights, low: int, high: int, bias: int) -> tuple[int, int]:
    """Smallest and largest value that `bias + sum(w * x)` can take for any x in [low, high].

    The sum over any prefix is bounded by the same pair extended to 0, because each term's own
    bounds include 0 whenever `low <= 0 <= high`; so partial sums never overflow either.
    `weights` is a flat sequence of ints.
    """
    least = sum(min(int(w) * low, int(w) * high) for w in weights)
    most = sum(max(int(w) * low, int(w) * high) for w in weights)
    return min(bias, bias + least), max(bias, bias + most)
