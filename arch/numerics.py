"""Every integer operation of Weft, defined once.

The functions work on NumPy arrays and, because they use only operators and the `clip` method, on
torch int64 tensors too (but for the rows of language models, which are NumPy only): the Brevitas layers,
the functional machine and the constants baked into the RTL are all readers of this file. Arguments are
integers held in int64; floating point serves to make integers of float scales, to fill tables, and inside
exact integer functions.
"""

from __future__ import annotations

import math

import numpy as np

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


# Scales found at run time: of a token's activations, of a key. A scale is a pair (mult, shift), its value
# mult / 2**shift; mult has 16 bits, the highest of them set unless precision ran out. Functions of this part
# work on NumPy int64 only.

INT16 = (-(1 << 15), (1 << 15) - 1)
MAX_COMBINED_SHIFT = 62  # of combine_scales; such a shift makes 0 of any accumulator
SCALE_POINT = 16  # ratio_scale gives its quotient in units of 2**-16
CODE_PEAK, PROBABILITY_PEAK = 127, 255  # greatest code of a quantized row: int8, uint8


def combine_scales(mult_a, shift_a, mult_b, shift_b):
    """The product of two scales, cut (not rounded) to 16 bits: relative error below 2**-15."""
    product = mult_a * mult_b
    carry = product >> 31
    return product >> (15 + carry), (shift_a + shift_b - 15 - carry).clip(0, MAX_COMBINED_SHIFT)


def bit_length(x: np.ndarray) -> np.ndarray:
    """Bits of positive integers below 2**52."""
    return np.frexp(np.asarray(x, np.float64))[1].astype(np.int64)


def normalize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positive integers below 2**32 as (mantissa in [2**31, 2**32), bits): x = mantissa * 2**(bits - 32)."""
    bits = bit_length(x)
    return np.asarray(x, np.int64) << (32 - bits), bits


def normalized_root(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The square root of integers in [1, 2**48) in the form of `normalize`, its mantissa even and rounded down."""
    half = (62 - bit_length(x)) >> 1
    radicand = np.asarray(x, np.int64) << 2 * half  # in [2**60, 2**62)
    root = np.sqrt(radicand.astype(np.float64)).astype(np.int64)
    root -= root * root > radicand  # the float root is off by less than one
    root += (root + 1) * (root + 1) <= radicand
    return root << 1, 31 - half


def ratio_scale(numerator: np.ndarray, mantissa: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`numerator` (1 .. 2**32 - 1) over a normalized number, rounded down to a scale in units of 2**-SCALE_POINT.

    numerator / (mantissa * 2**(bits - 32)) = mult / 2**(shift - 16), mult in [2**15, 2**16).
    """
    above, numerator_bits = normalize(numerator)
    small = (above < mantissa).astype(np.int64)
    return (above << (15 + small)) // mantissa, 31 + small - numerator_bits + bits


def quantize_row(values: np.ndarray, peak: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of `values` [..., n] scaled so that the largest magnitude of a row becomes `peak`.

    `values` are int32; their magnitudes are below 2**31 + 1. Returns codes and the largest magnitude [...] (1 at
    least): a value is code * magnitude / peak.
    """
    magnitude = np.maximum(np.abs(values).max(axis=-1), 1)
    mult, shift = ratio_scale(np.full_like(magnitude, peak), *normalize(magnitude))
    codes = requantize(values, mult[..., None], shift[..., None] - SCALE_POINT, -peak, peak)
    return codes, magnitude


# Functions of rows of int16 codes.

EXP2_BITS = 8  # fraction bits of a score: scores are base-2 logarithms in units of 2**-8
EXP2 = np.array([round(65535 * 2 ** (-i / 256)) for i in range(256)], np.int64)
SIGMOID_FRACTION = 11  # the argument of the sigmoid table has 4 integer and 11 fraction bits
SIGMOID_STEP_BITS = 6  # of them between two entries
SIGMOID = np.array([round(65536 / (1 + math.exp(-i / 32))) for i in range(513)], np.int64)
ROTATION_BITS = 14  # fraction bits of a cosine


def saturate16(x):
    return saturate(x, *INT16)


def exp2_code(distance: np.ndarray) -> np.ndarray:
    """2**(-distance / 256) in units of 1 / 65535, for distance >= 0."""
    return round_shift(EXP2[distance & 255], (distance >> EXP2_BITS).clip(0, 17))


def softmax_row(scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities of a row of int16 scores [..., n], each times its weight (1 .. 32768), as uint8 codes.

    The sums are of integers, so no order of tiles can change them. Returns codes [..., n], the largest product
    and the sum of the exponentials [...]: probability * weight = code * largest / (255 * sum).
    """
    powers = exp2_code(scores.max(axis=-1, keepdims=True) - scores)
    codes, largest = quantize_row(powers * weights, PROBABILITY_PEAK)
    return codes, largest, powers.sum(axis=-1)


def silu(x: np.ndarray, up: int) -> np.ndarray:
    """x * sigmoid(x) in the units of `x`, an int16 code in units of 2**(up - 11), `up` in [0, 3].

    The sigmoid is interpolated between 513 table entries; beyond +-16 it takes its value there.
    """
    argument = (np.abs(x) << up).clip(0, (1 << 15) - 1)
    index, fraction = argument >> SIGMOID_STEP_BITS, argument & (1 << SIGMOID_STEP_BITS) - 1
    step = (SIGMOID[index + 1] - SIGMOID[index]) * fraction
    sigmoid = SIGMOID[index] + ((step + (1 << SIGMOID_STEP_BITS - 1)) >> SIGMOID_STEP_BITS)
    return round_shift(x * np.where(x < 0, 65536 - sigmoid, sigmoid), 16)


def rotate(low: np.ndarray, high: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotary position embedding of the pairs (low, high), in units of 2**-14 of theirs: exact, below 2**31."""
    return low * cosine - high * sine, high * cosine + low * sine
