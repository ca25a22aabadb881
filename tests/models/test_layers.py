"""The quantized layers against integer arithmetic written a second time, in plain Python and fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from weft.arch import numerics
from weft.arch.errors import ModelError
from weft.models.layers import (
    Activation,
    DeformConv,
    OffsetConv,
    QuantLayer,
    SquareOffsets,
    fraction_bits,
    sample_code,
    sample_float,
)


def activation(shape, scale, low, high, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor(scale, dtype=torch.float32)
    return Activation(torch.randint(low, high + 1, shape, generator=generator).float() * scale, scale)


def randomized(layer, seed=0, out_scale=None):
    """Random weights and bias, an output scale of our choice, quantized eval mode."""
    torch.manual_seed(seed)
    with torch.no_grad():
        layer.conv.weight.normal_(0, 0.3)
        if layer.conv.bias is not None:
            layer.conv.bias.normal_(0, 0.5)
        if out_scale is not None:
            layer.output.observed = out_scale * (255 if layer.output.relu else 127)
            layer.output.calibrate()
    layer.quantized = True
    return layer.eval()


def weight_codes(layer, bits):
    """Codes and float32 scales from the raw weights, without Brevitas."""
    weight = layer.conv.weight.detach().numpy()
    scale = np.abs(weight).max((1, 2, 3)) / np.float32(2 ** (bits - 1) - 1)
    return np.rint(weight / scale[:, None, None, None]).astype(int), scale


def requantized(acc, s_in, s_weight, s_out, bias, low, high):
    """Half-even rounding by fractions."""
    mult, shift = numerics.requantize_parameters(float(s_in) * float(s_weight) / float(s_out.detach()))
    total = acc + round(float(bias) / (float(s_in) * float(s_weight)))
    return max(low, min(high, round(Fraction(total * mult, 2**shift))))


def integer_layer(x, taps, codes, scales, layer, s_in, low, high):
    """Output codes from taps(channel, oy, ox, ky, kx) -> integer sample; plain loops."""
    cout, per_group, kernel, _ = codes.shape
    conv, s_out = layer.conv, layer.output.scale
    rows, cols = (-(-size // conv.stride[0]) for size in x.shape[1:])
    bias = np.zeros(cout) if conv.bias is None else conv.bias.detach().numpy()
    out = np.zeros((cout, rows, cols), int)
    for o in range(cout):
        first = o // (cout // conv.groups) * per_group
        for oy in range(rows):
            for ox in range(cols):
                acc = sum(
                    int(codes[o, c, ky, kx]) * taps(first + c, oy, ox, ky, kx)
                    for c in range(per_group) for ky in range(kernel) for kx in range(kernel)
                )  # fmt: skip
                out[o, oy, ox] = requantized(acc, s_in, scales[o], s_out, bias[o], low, high)
    return out


def pixel(x, c, y, col):
    inside = 0 <= y < x.shape[1] and 0 <= col < x.shape[2]
    return int(x[c, y, col]) if inside else 0


@pytest.mark.parametrize(
    ("arguments", "bits", "relu", "signed_input"),
    [
        ((3, 5, 3, 2), 8, True, True),  # the stem
        ((6, 7, 1), 4, True, False),
        ((6, 6, 3, 1, 6), 4, False, False),  # depthwise
        ((6, 6, 3, 2, 6), 4, False, True),
    ],
)
def test_convolution_is_integer_arithmetic(arguments, bits, relu, signed_input):
    layer = randomized(QuantLayer(*arguments, relu=relu, norm=False, bias=True, weight_bits=bits), out_scale=0.021)
    x = activation((1, arguments[0], 7, 7), 0.0137, *((-128, 127) if signed_input else (0, 255)))
    codes, scales = weight_codes(layer, bits)
    image, conv = x.code[0].numpy(), layer.conv

    def taps(c, oy, ox, ky, kx):
        stride, pad = conv.stride[0], conv.padding[0]
        return pixel(image, c, oy * stride + ky - pad, ox * stride + kx - pad)

    low, high = (0, 255) if relu else (-128, 127)
    expected = integer_layer(image, taps, codes, scales, layer, x.scale, low, high)
    assert len(np.unique(expected)) > 20
    np.testing.assert_array_equal(layer(x).code[0].numpy(), expected)


@pytest.mark.parametrize("depthwise", [True, False])
@pytest.mark.parametrize("variant", ["square", "bounded", "original"])
def test_deformable_convolution_is_integer_arithmetic(variant, depthwise):
    layer = randomized(DeformConv(4, 4, 4 if depthwise else 1), out_scale=0.02)
    x = activation((1, 4, 6, 5), 0.01, 0, 255)
    if variant == "square":
        s = activation((1, 1, 6, 5), 1.0, -2, 3, seed=3)
        offset = SquareOffsets()(s)
    else:
        offset = activation((1, 18, 6, 5), 1 / 16 if variant == "bounded" else 1 / 4, -20, 20, seed=3)
    codes, scales = weight_codes(layer, 4)
    image, moves = x.code[0].numpy(), offset.code[0].numpy()

    def taps(c, oy, ox, ky, kx):
        tap = 3 * ky + kx
        if variant == "square":  # dilation s, no interpolation
            dilation = int(s.code[0, 0, oy, ox])
            return pixel(image, c, oy + dilation * (ky - 1), ox + dilation * (kx - 1))
        step = Fraction(1, 2 ** fraction_bits(offset.scale))
        y, col = oy + ky - 1 + int(moves[2 * tap, oy, ox]) * step, ox + kx - 1 + int(moves[2 * tap + 1, oy, ox]) * step
        y0, x0 = y.__floor__(), col.__floor__()
        total = sum(
            (1 - abs(y - y0 - dy)) * (1 - abs(col - x0 - dx)) * pixel(image, c, y0 + dy, x0 + dx)
            for dy in (0, 1) for dx in (0, 1)
        )  # fmt: skip
        return round(total)

    expected = integer_layer(image, taps, codes, scales, layer, x.scale, -128, 127)
    assert len(np.unique(expected)) > 20
    np.testing.assert_array_equal(layer(x, offset=offset).code[0].numpy(), expected)


@pytest.mark.parametrize("variant", ["square", "bounded"])
def test_deformable_accumulator_against_onnx_reference(variant):
    """ONNX DeformConv on codes: equal for integer dilations, else within half a code per tap (sample rounding)."""
    x = activation((1, 3, 6, 6), 1.0, 0, 255)
    if variant == "square":
        offset = SquareOffsets()(activation((1, 1, 6, 6), 1.0, -7, 8, seed=1))
    else:
        offset = activation((1, 18, 6, 6), 1 / 16, -128, 127, seed=1)
    weight = activation((3, 1, 3, 3), 1.0, -7, 7, seed=2).value
    names = ["x", "w", "offset"]
    node = helper.make_node("DeformConv", names, ["y"], group=3, kernel_shape=[3, 3], pads=[1] * 4, offset_group=1)
    graph = helper.make_graph(
        [node], "one", [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )  # fmt: skip
    reference = ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)]))
    feeds = dict(zip(names, (x.value.numpy(), weight.numpy(), offset.value.numpy()), strict=True))
    expected = reference.run(None, feeds)[0]
    samples = sample_code(x.code, offset.code, fraction_bits(offset.scale)).float()
    got = DeformConv(3, 3, 3).multiply(samples, weight).numpy()
    bound = 0 if variant == "square" else 0.5 * weight.abs().sum((1, 2, 3)).numpy()[None, :, None, None]
    assert np.all(np.abs(got - expected) <= bound + 1e-3)
    if variant == "bounded":
        assert np.abs(got - expected).max() > 0.1  # rounding is really there
    np.testing.assert_allclose(DeformConv(3, 3, 3).multiply(sample_float(x.value, offset.value), weight).numpy(),
                               expected, atol=1e-2)  # fmt: skip


# The node tests of ONNX: X = 0..8 as 3x3, W = ones 2x2; Y as listed in the standard's test case file.
X = np.arange(9.0).reshape(3, 3)
NODE_CASES = {
    "with_padding": (
        [X], {(0, 0, 0, 0): 0.5, (0, 5, 1, 2): -0.1}, 1, {}, 0.0,
        [[0, 1, 3, 2], [3, 8, 11.9, 7], [9, 20, 24, 13], [6, 13, 15, 8]],
    ),
    "without_padding": ([X], {(0, 0, 0, 0): 0.5, (0, 5, 0, 1): -0.1}, 0, {}, 0.0, [[9.5, 11.9], [20, 24]]),
    "with_mask_bias": (
        [X], {(0, 0, 0, 0): 0.5, (0, 5, 0, 1): -0.1}, 0, {(2, 1, 1): 0.2}, 1.0, [[10.5, 12.9], [21, 19.4]],
    ),
    "multiple_offset_groups": (
        [X, 8 - X], {(0, 0, 0, 0): 0.5, (1, 5, 0, 1): -0.1}, 0, {}, 0.0, [[33.5, 32.1], [32, 32]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NODE_CASES)
def test_onnx_node_cases(case):
    """Integer samples of the standard's examples; offsets in sixteenths, values in codes of 1/15.

    Bound: half a code per sample, and an offset error of at most 1/32 pixel times the largest neighbour difference.
    """
    images, offsets, pad, masks, bias, expected = NODE_CASES[case]
    expected, codes_per_unit = np.array(expected), 15
    side = expected.shape[0]
    total = np.full((side, side), bias)
    for group, image in enumerate(images):
        # A 2x2 kernel with padding is a 3x3 kernel, padding 1, with zero weights, on a canvas with a zero border.
        canvas = np.zeros((1, 1, 4, 4), int)
        canvas[0, 0, :3, :3] = np.rint(image * codes_per_unit)
        first = 1 - pad
        offset = np.zeros((1, 18, 4, 4), int)
        for (owner, channel, oy, ox), value in offsets.items():
            if owner == group:
                tap, axis = divmod(channel, 2)
                offset[0, 2 * (3 * (tap // 2) + tap % 2) + axis, oy + first, ox + first] = round(value * 16)
        samples = sample_code(torch.tensor(canvas), torch.tensor(offset), 4)[0, ..., 0].numpy() / codes_per_unit
        for tap in range(4):
            mask = np.ones((side, side))
            for (masked, oy, ox), value in masks.items():
                mask[oy, ox] = value if masked == tap else mask[oy, ox]
            window = samples[3 * (tap // 2) + tap % 2, first : first + side, first : first + side]
            total += window * mask
    bound = 4 * len(images) * 0.5 / codes_per_unit + 8 / 32
    assert np.abs(total - expected).max() <= bound
    exact = np.ones_like(total, bool)
    for _, _, oy, ox in offsets:
        exact[oy, ox] = False
    np.testing.assert_allclose(total[exact], expected[exact], atol=1e-9)


def test_edge_rule():
    """Neighbours outside the image count 0, without renormalization (a constant 4 image)."""
    image = torch.full((1, 1, 3, 3), 64)
    cases = {(-1, 0): 0, (-0.5, 0): 32, (-0.5, -0.5): 16, (2.5, 0): 32, (2.5, 2.5): 16, (3, 1): 0, (0, -0.25): 48}
    for (y, x), expected in cases.items():
        offset = torch.zeros(1, 18, 3, 3, dtype=torch.long)
        offset[0, 8, 1, 1], offset[0, 9, 1, 1] = int((y - 1) * 16), int((x - 1) * 16)
        assert int(sample_code(image, offset, 4)[0, 4, 1, 1, 0]) == expected, (y, x)


def test_dilation_one_is_the_plain_kernel_and_zero_the_centre():
    x = activation((1, 2, 5, 5), 0.1, -128, 127)
    layer = randomized(DeformConv(2, 2, 2), out_scale=0.3)
    plain = randomized(QuantLayer(2, 2, 3, groups=2, relu=False, norm=False), out_scale=0.3)
    plain.load_state_dict(layer.state_dict())
    one = Activation(torch.ones(1, 1, 5, 5), torch.tensor(1.0))
    assert torch.equal(layer(x, offset=SquareOffsets()(one)).code, plain(x).code)
    zero = SquareOffsets()(Activation(torch.zeros(1, 1, 5, 5), torch.tensor(1.0)))
    samples = sample_code(x.code, zero.code, 0)
    assert torch.equal(samples, x.code.permute(0, 2, 3, 1)[:, None].expand_as(samples))


def test_offset_layer_starts_as_the_plain_kernel():
    x = activation((1, 4, 3, 3), 0.02, 0, 255)
    for variant, expected in (("square", 1), ("bounded", 0), ("original", 0)):
        layer = OffsetConv(4, variant).eval()
        layer.quantized = True
        assert layer(x).code.unique().tolist() == [expected]
    with pytest.raises(ModelError, match="expected one of"):
        OffsetConv(4, "none")


@pytest.mark.parametrize(("largest", "bits"), [(0.4, 4), (7.9, 4), (8.5, 3), (60.0, 1), (100.0, 0), (900.0, 0)])
def test_original_offsets_choose_their_fraction_bits(largest, bits):
    layer = OffsetConv(4, "original")
    layer.output.observed = largest
    layer.output.calibrate()
    assert fraction_bits(layer.output.scale) == bits
    assert float(layer.output.scale) == 2.0**-bits


def test_square_range_saturates():
    layer = OffsetConv(1, "square").eval()
    with torch.no_grad():
        layer.conv.weight.fill_(1.0)
    layer.quantized = True
    x = activation((1, 1, 16, 16), 0.2, -128, 127)
    codes = layer(x).code
    assert (int(codes.min()), int(codes.max())) == (-7, 8)


def test_gradient_is_straight_through_and_value_exact():
    layer = randomized(DeformConv(4, 4, 4), out_scale=0.02)
    x = activation((1, 4, 6, 5), 0.01, 0, 255)
    s = torch.full((1, 1, 6, 5), 2.0, requires_grad=True)
    y = layer(x, offset=SquareOffsets()(Activation(s, torch.tensor(1.0))))
    y.value.square().sum().backward()
    assert s.grad.abs().sum() > 0 and layer.conv.weight.grad.abs().sum() > 0
    with torch.no_grad():
        exact = layer(x, offset=SquareOffsets()(Activation(s, torch.tensor(1.0))))
    assert torch.equal(y.code, exact.code)
    fake = layer.train()(x, offset=SquareOffsets()(Activation(s, torch.tensor(1.0))))
    assert (fake.code - exact.code).abs().max() <= 1


def test_integer_deform_equals_bilinear_sampling_with_its_gradients():
    torch.manual_seed(0)
    layer = DeformConv(3, 3, 3)
    s = torch.randint(-3, 5, (2, 1, 6, 5)).float()
    image = torch.randn(2, 3, 6, 5)
    results = []
    for general in (True, False):
        inputs = [tensor.clone().requires_grad_() for tensor in (image, layer.conv.weight.detach(), s)]
        offset = SquareOffsets()(Activation(inputs[2]))
        if general:
            y = layer.multiply(sample_float(inputs[0], offset.value), inputs[1])
        else:
            y = layer.products(Activation(inputs[0]), inputs[1], offset)
        y.square().sum().backward()
        results.append([y.detach(), *(tensor.grad for tensor in inputs)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_folding_keeps_the_float_function():
    torch.manual_seed(0)
    layer = QuantLayer(5, 6, 3)
    x = Activation(torch.randn(8, 5, 6, 6))
    layer.train()(x)
    with torch.no_grad():
        layer.norm.weight.uniform_(-1, 2)
        layer.norm.bias.normal_()
    before = layer.eval()(x).value
    layer.fold()
    assert layer.norm is None
    torch.testing.assert_close(layer(x).value, before, atol=1e-5, rtol=1e-4)


def test_a_zero_channel_keeps_its_bias():
    layer = QuantLayer(2, 2, norm=False, bias=True, relu=False).eval()
    with torch.no_grad():
        layer.conv.weight.zero_()
        layer.conv.bias.copy_(torch.tensor([0.5, -0.25]))
    layer.output.observed = 1.27
    layer.output.calibrate()
    layer.quantized = True
    codes = layer(activation((1, 2, 2, 2), 0.01, 0, 255)).code
    assert codes[0, :, 0, 0].tolist() == [50, -25]
