"""The integer operations against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.arch import numerics

acc = st.integers(numerics.ACC_MIN, numerics.ACC_MAX)
mults = st.integers(0, (1 << numerics.MULT_BITS) - 1)
shifts = st.integers(0, numerics.MAX_SHIFT)
codes = st.integers(-128, 255)
sixteenths = st.integers(0, 15)


@given(st.integers(-(1 << 48), 1 << 48), shifts)
def test_round_shift_is_half_even(x, shift):
    assert numerics.round_shift(x, shift) == round(Fraction(x, 1 << shift))
    assert numerics.round_shift(np.array([x]), np.array([shift])).item() == round(Fraction(x, 1 << shift))


@pytest.mark.parametrize("x, shift, want", [
    (1, 1, 0), (3, 1, 2), (-1, 1, 0), (-3, 1, -2), (5, 0, 5), (-7, 0, -7), (6, 2, 2), (10, 2, 2), (7, 2, 2), (9, 2, 2)])
def test_round_shift_ties(x, shift, want):
    assert numerics.round_shift(x, shift) == want


@given(acc, mults, shifts, codes, codes)
def test_requantize(value, mult, shift, a, b):
    low, high = min(a, b), max(a, b)
    want = max(low, min(high, round(Fraction(value * mult, 1 << shift))))
    assert numerics.requantize(np.array([value]), np.array([mult]), np.array([shift]), low, high).item() == want


@given(acc, mults)
def test_largest_shift_gives_zero(value, mult):
    assert numerics.requantize(np.array([value]), mult, numerics.MAX_SHIFT + 1, -128, 127).item() == 0


@given(st.floats(2.0**-31, 65000, allow_subnormal=False))
def test_requantize_parameters_are_within_their_bound(ratio):
    mult, shift = numerics.requantize_parameters(ratio)
    assert 1 << 15 <= mult < 1 << 16 and 0 <= shift <= numerics.MAX_SHIFT
    assert abs(Fraction(mult, 1 << shift) / Fraction(ratio) - 1) <= Fraction(1, 1 << 16)


@given(st.floats(2.0**-60, 2.0**-31))
def test_tiny_ratios_lose_low_bits_only(ratio):
    mult, shift = numerics.requantize_parameters(ratio)
    assert shift <= numerics.MAX_SHIFT
    assert abs(Fraction(mult, 1 << shift) - Fraction(ratio)) <= Fraction(1, 1 << numerics.MAX_SHIFT)


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf"), 65536.0, 1e30])
def test_impossible_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match="requantize ratio"):
        numerics.requantize_parameters(ratio)


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1.0))
def test_bias_code_saturates(bias, scale):
    code = numerics.bias_code(bias, scale)
    assert numerics.ACC_MIN <= code <= numerics.ACC_MAX
    assert code in (numerics.ACC_MIN, numerics.ACC_MAX) or abs(code - bias / scale) <= 0.5


@given(codes, codes, codes, codes, sixteenths, sixteenths)
def test_bilinear_is_exact_and_between_its_neighbours(v00, v01, v10, v11, fy, fx):
    y, x = Fraction(fy, 16), Fraction(fx, 16)
    exact = (1 - y) * ((1 - x) * v00 + x * v01) + y * ((1 - x) * v10 + x * v11)
    got = numerics.bilinear(*np.array([v00, v01, v10, v11, fy, fx]))
    assert got == round(exact)
    assert min(v00, v01, v10, v11) <= got <= max(v00, v01, v10, v11)


@given(st.integers(-300, 5000), st.integers(-128, 127), st.integers(0, numerics.FRACTION_BITS))
def test_split_position_keeps_the_coordinate(base, offset, fraction):
    whole, fine = numerics.split_position(base, offset, fraction)
    assert 0 <= fine < 16
    assert whole + Fraction(fine, 16) == base + Fraction(offset, 1 << fraction)


@given(st.integers(-128, 127))
def test_split_w8(weight):
    low, high = numerics.split_w8(weight)
    assert 0 <= low < 16 and -8 <= high < 8 and 16 * high + low == weight


@given(st.lists(st.tuples(st.integers(-128, 127), st.integers(0, 255)), max_size=12), st.integers(-9999, 9999))
def test_accumulator_bounds_hold_every_partial_sum(terms, bias):
    least, most = numerics.accumulator_bounds([w for w, _ in terms], 0, 255, bias)
    total = bias
    for weight, x in terms:
        total += weight * x
        assert least <= total <= most


def test_torch_agrees_with_numpy():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    values = rng.integers(numerics.ACC_MIN, numerics.ACC_MAX, 2000)
    mult, shift = rng.integers(0, 1 << 16, 2000), rng.integers(0, numerics.MAX_SHIFT + 1, 2000)
    corners, fine = rng.integers(-128, 256, (4, 2000)), rng.integers(0, 16, (2, 2000))
    calls = [
        (numerics.round_shift, (values, shift)),
        (lambda *a: numerics.requantize(*a, -128, 127), (values, mult, shift)),
        (numerics.bilinear, (*corners, *fine)),
        (lambda *a: numerics.split_position(*a, 3)[1], (values % 500, values % 256 - 128)),
        (lambda w: numerics.split_w8(w)[1], (values % 256 - 128,)),
    ]
    for function, arguments in calls:
        assert np.array_equal(function(*map(torch.from_numpy, arguments)).numpy(), function(*arguments))


# Scales found at run time

normal_mults = st.integers(1 << 15, (1 << 16) - 1)
int16s = st.integers(*numerics.INT16)


def one(function, *values):
    """The function of NumPy integers, as Python integers."""
    return tuple(int(part) for part in function(*map(np.int64, values)))


@given(mults, st.integers(0, 63), mults, st.integers(0, 63))
def test_combine_scales_cuts_the_product(mult_a, shift_a, mult_b, shift_b):
    mult, shift = one(numerics.combine_scales, mult_a, shift_a, mult_b, shift_b)
    product, carry = mult_a * mult_b, int(mult_a * mult_b >= 1 << 31)
    assert mult == product // (1 << 15 + carry) < 1 << 16
    assert shift == max(0, min(62, shift_a + shift_b - 15 - carry))


@given(normal_mults, st.integers(0, 40), normal_mults, st.integers(16, 37))
def test_combined_scales_keep_their_precision(mult_a, shift_a, mult_b, shift_b):
    mult, shift = one(numerics.combine_scales, mult_a, shift_a, mult_b, shift_b)
    exact = Fraction(mult_a, 1 << shift_a) * Fraction(mult_b, 1 << shift_b)
    assert mult >= 1 << 15
    assert 1 - Fraction(1, 1 << 15) < Fraction(mult, 1 << shift) / exact <= 1


@given(acc, normal_mults)
def test_largest_combined_shift_gives_zero(value, mult):
    assert numerics.requantize(np.array([value]), mult, numerics.MAX_COMBINED_SHIFT, *numerics.INT16).item() == 0


@given(st.one_of(st.integers(1, (1 << 32) - 1), st.integers(0, 31).map(lambda bit: 1 << bit)))
def test_normalize_is_exact(x):
    mantissa, bits = one(numerics.normalize, x)
    assert bits == x.bit_length() and 1 << 31 <= mantissa < 1 << 32
    assert mantissa * Fraction(2) ** (bits - 32) == x


@given(st.integers(1, (1 << 52) - 1))
def test_bit_length(x):
    assert numerics.bit_length(np.int64(x)) == x.bit_length()


@given(st.one_of(st.integers(1, (1 << 48) - 1), st.integers(1, (1 << 24) - 1).flatmap(
    lambda root: st.sampled_from([root * root, root * root + 1, max(1, root * root - 1)]))))
def test_normalized_root_is_rounded_down(x):
    mantissa, bits = one(numerics.normalized_root, x)
    unit = Fraction(2) ** (bits - 32)
    assert 1 << 31 <= mantissa < 1 << 32 and mantissa % 2 == 0
    assert (mantissa * unit) ** 2 <= x < ((mantissa + 2) * unit) ** 2


@given(st.integers(1, (1 << 32) - 1), st.integers(1 << 31, (1 << 32) - 1), st.integers(1, 32))
def test_ratio_scale_is_rounded_down(numerator, mantissa, bits):
    mult, shift = one(numerics.ratio_scale, numerator, mantissa, bits)
    exact = numerator / (mantissa * Fraction(2) ** (bits - 32))
    unit = Fraction(2) ** (numerics.SCALE_POINT - shift)
    assert 1 << 15 <= mult < 1 << 16 and shift >= 0
    assert mult * unit <= exact < (mult + 1) * unit


@pytest.mark.parametrize("peak", [numerics.CODE_PEAK, numerics.PROBABILITY_PEAK])
@given(values=st.lists(st.one_of(acc, int16s, st.integers(-9, 9)), min_size=1, max_size=40))
def test_quantize_row(peak, values):
    codes, magnitude = numerics.quantize_row(np.array(values), peak)
    largest = max(1, *map(abs, values))
    assert magnitude == largest
    for value, code in zip(values, codes.tolist(), strict=True):
        assert abs(code - Fraction(value * peak, largest)) <= Fraction(1, 2) + Fraction(peak, 1 << 15)
        if abs(value) == largest:
            assert abs(code) == peak
    assert np.array_equal(numerics.quantize_row(-np.array(values), peak)[0], -codes)


def test_quantize_rows_of_a_batch_one_by_one():
    values = np.random.default_rng(0).integers(-(1 << 31), 1 << 31, (2, 3, 50)) >> np.arange(6).reshape(2, 3, 1) * 6
    codes, magnitude = numerics.quantize_row(values, 127)
    for index in np.ndindex(2, 3):
        own, largest = numerics.quantize_row(values[index], 127)
        assert np.array_equal(codes[index], own) and magnitude[index] == largest
    assert not numerics.quantize_row(np.zeros((1, 9), np.int64), 127)[0].any()


# Functions of rows


def test_saturate16():
    values = np.array([-40000, -32768, 5, 32767, 32768])
    assert numerics.saturate16(values).tolist() == [-32768, -32768, 5, 32767, 32767]


def test_exp2_code():
    distance = np.arange(1 << 16)
    codes = numerics.exp2_code(distance)
    exact = 65535 * np.exp2(-distance / 256)
    assert codes[0] == 65535 and np.abs(codes - exact).max() <= 1 and (np.diff(codes) <= 0).all()
    assert not codes[17 * 256 :].any()


@given(st.lists(st.tuples(int16s, st.integers(1, 1 << 15)), min_size=1, max_size=60), st.sampled_from([0, 3, 6]))
def test_softmax_row(pairs, narrow):
    scores, weights = np.array(pairs).T
    scores = scores >> narrow
    codes, largest, total = numerics.softmax_row(scores, weights)
    powers = np.exp2((scores - scores.max()) / 256)
    expected = powers / powers.sum() * weights
    got = codes * (float(largest) / (255 * float(total)))
    # rounding of codes; of a power, and of their sum
    bound = expected.max() * (0.5 / 255 + 2.0**-14) + weights.max() / 65535 + expected * len(pairs) / 65535
    assert (np.abs(got - expected) <= 1.01 * bound).all()
    assert codes.min() >= 0 and codes.max() == 255 and 1 <= largest <= 65535 << 15


def test_softmax_rows_of_a_batch_one_by_one():
    rng = np.random.default_rng(1)
    scores, weights = rng.integers(-2000, 2000, (3, 40)), rng.integers(1, 32769, (3, 40))
    together = numerics.softmax_row(scores, weights)
    for row in range(3):
        for part, own in zip(together, numerics.softmax_row(scores[row], weights[row]), strict=True):
            assert np.array_equal(part[row], own)


@pytest.mark.parametrize("up", range(4))
def test_silu(up):
    """Every code there is."""
    x = np.arange(-(1 << 15), 1 << 15)
    real = x * 2.0 ** (up - 11)
    with np.errstate(over="ignore"):
        exact = x / (1 + np.exp(-real))
    got = numerics.silu(x, up)
    assert np.abs(got - exact).max() <= 0.5 + 1.5 * 2.0**-16 * (1 << 15)
    inner = np.abs(x) < 4096
    assert np.abs(got - exact)[inner].max() <= 0.5 + 1.5 * 2.0**-16 * 4096
    assert got[x == 0] == 0 and (got[x >= 0] <= x[x >= 0]).all() and (np.abs(got) <= np.abs(x)).all()


def test_sigmoid_table_is_symmetric_and_monotone():
    assert numerics.SIGMOID[0] == 1 << 15 and (np.diff(numerics.SIGMOID) >= 0).all()
    assert np.abs(numerics.SIGMOID - 65536 / (1 + np.exp(-np.arange(513) / 32))).max() <= 0.5
    assert numerics.SIGMOID[512] == 65536 and numerics.EXP2[0] == 65535


@given(st.integers(-32767, 32768), st.integers(-32767, 32768), int16s, int16s)
def test_rotate_is_a_complex_product(low, high, cosine, sine):
    """The pair is of halved products, which reach 32768."""
    a, b = one(numerics.rotate, low, high, cosine, sine)
    assert (a, b) == (low * cosine - high * sine, low * sine + high * cosine)
    assert numerics.ACC_MIN <= min(a, b) <= max(a, b) <= numerics.ACC_MAX


def test_rotation_keeps_lengths():
    angle = np.linspace(0, 2 * math.pi, 50)
    unit = 1 << numerics.ROTATION_BITS
    pair = numerics.rotate(np.int64(20000), np.int64(-7000), np.rint(np.cos(angle) * unit).astype(np.int64),
                           np.rint(np.sin(angle) * unit).astype(np.int64))
    assert np.abs(np.hypot(*pair) / unit / math.hypot(20000, 7000) - 1).max() < 1e-4
