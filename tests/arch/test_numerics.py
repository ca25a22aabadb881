"""The integer operations against exact rational arithmetic."""

from __future__ import annotations

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
