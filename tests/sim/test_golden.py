"""Golden operators against ONNX: its reference evaluator and the vectors of its DeformConv node tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx.backend.test
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, load, load_tensor, numpy_helper
from onnx.reference import ReferenceEvaluator

from weft.arch.errors import ModelError
from weft.sim import golden

NODES = Path(onnx.backend.test.__file__).parent / "data" / "node"
SETTINGS = settings(max_examples=25, deadline=None)
seeds, sizes = st.integers(0, 2**32 - 1), st.integers(1, 3)
PADS = st.tuples(*[st.integers(0, 2)] * 4)
PAIRS = st.tuples(st.integers(1, 2), st.integers(1, 2))


def evaluate(operator: str, inputs: list[np.ndarray], **attributes) -> np.ndarray:
    """One ONNX node on float64 tensors, by the reference evaluator."""
    names = [f"i{k}" for k in range(len(inputs))]
    graph = helper.make_graph(
        [helper.make_node(operator, names, ["out"], **attributes)], "node",
        [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in names],
        [helper.make_tensor_value_info("out", TensorProto.DOUBLE, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)])
    return ReferenceEvaluator(model).run(None, dict(zip(names, (a.astype(np.float64) for a in inputs), strict=True)))[0]


def nchw(x: np.ndarray) -> np.ndarray:
    return x.transpose(2, 0, 1)[None]


def nhwc(x: np.ndarray) -> np.ndarray:
    return x[0].transpose(1, 2, 0)


def oihw(weights: np.ndarray) -> np.ndarray:
    return weights.transpose(0, 3, 1, 2)


@SETTINGS
@given(seeds, sizes, sizes, PAIRS, PADS, PAIRS)
def test_conv2d_equals_onnx(seed, kh, kw, stride, pads, dilation):
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 256, (7, 6, 5))
    weights, bias = rng.integers(-128, 128, (4, kh, kw, 5)), rng.integers(-1000, 1000, 4)
    want = evaluate("Conv", [nchw(x), oihw(weights), bias], strides=stride, pads=pads, dilations=dilation)
    got = golden.conv2d(x, weights, bias, stride=stride, pads=pads, dilation=dilation)
    assert got.dtype == np.int64 and np.array_equal(got, nhwc(want))


@SETTINGS
@given(seeds, sizes, sizes, PAIRS, PADS, PAIRS)
def test_depthwise_conv2d_equals_onnx(seed, kh, kw, stride, pads, dilation):
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 256, (7, 6, 5))
    weights, bias = rng.integers(-128, 128, (5, kh, kw)), rng.integers(-1000, 1000, 5)
    want = evaluate("Conv", [nchw(x), weights[:, None], bias], strides=stride, pads=pads, dilations=dilation, group=5)
    got = golden.depthwise_conv2d(x, weights, bias, stride=stride, pads=pads, dilation=dilation)
    assert np.array_equal(got, nhwc(want))


@SETTINGS
@given(seeds, st.integers(2, 3), PAIRS, st.integers(0, 1))
def test_max_pool_equals_onnx(seed, kernel, stride, pad):
    pads = (pad,) * 4  # with unequal pads the reference evaluator shifts its windows
    x = np.random.default_rng(seed).integers(-128, 128, (7, 6, 3))
    want = evaluate("MaxPool", [nchw(x)], kernel_shape=[kernel, kernel], strides=stride, pads=pads)
    assert np.array_equal(golden.max_pool(x, (kernel, kernel), stride=stride, pads=pads), nhwc(want))


def test_upsample_and_shuffle_equal_onnx():
    x = np.random.default_rng(0).integers(-128, 128, (3, 4, 6))
    shuffled = nchw(x).reshape(1, 2, 3, 3, 4).transpose(0, 2, 1, 3, 4).reshape(1, 6, 3, 4)
    assert np.array_equal(golden.channel_shuffle(x, 2), nhwc(shuffled))
    assert golden.channel_shuffle(np.arange(6).reshape(1, 1, 6), 2).ravel().tolist() == [0, 3, 1, 4, 2, 5]
    enlarged = golden.upsample_nearest(x, 2)
    assert enlarged.shape == (6, 8, 6) and all((enlarged[dy::2, dx::2] == x).all() for dy in (0, 1) for dx in (0, 1))


def test_add_and_requantize():
    a, b = np.full((1, 1, 2), 100), np.full((1, 1, 2), -50)
    scale = golden.Scale(np.array([1, 1]), np.array([4, 1]), -128, 20)
    got = golden.add(a, b, np.array([3, 1]), 2, np.array([0, 5]), scale)
    assert got.ravel().tolist() == [12, 2]  # 200/16 = 12.5 and 5/2 = 2.5, both to even
    with pytest.raises(ModelError, match="outside int32"):
        golden.requantize(np.array([1 << 31]), golden.RAW)
    with pytest.raises(ModelError, match="does not fit"):
        golden.conv2d(np.zeros((2, 2, 1), int), np.zeros((1, 3, 3, 1), int))


# Deformable convolution


@settings(SETTINGS, max_examples=10)
@given(seeds, PAIRS, st.tuples(*[st.integers(0, 1)] * 4), PAIRS, st.sampled_from([(2, 3), (1, 6), (6, 2), (3, 1)]))
def test_deform_conv2d_equals_onnx_at_whole_pixels(seed, stride, pads, dilation, groups):
    weight_groups, offset_groups = groups
    rng = np.random.default_rng(seed)
    x, weights = rng.integers(-128, 256, (6, 5, 6)), rng.integers(-8, 8, (6, 3, 2, 6 // weight_groups))
    height = (6 + pads[0] + pads[2] - 2 * dilation[0] - 1) // stride[0] + 1
    width = (5 + pads[1] + pads[3] - dilation[1] - 1) // stride[1] + 1
    bias, offsets = rng.integers(-99, 99, 6), rng.integers(-6, 7, (height, width, offset_groups * 12))
    mask = rng.integers(0, 4, (height, width, offset_groups * 6))
    want = evaluate("DeformConv", [nchw(x), oihw(weights), nchw(offsets), bias, nchw(mask)], strides=stride, pads=pads,
                    dilations=dilation, group=weight_groups, offset_group=offset_groups)
    got = golden.deform_conv2d(x, weights, offsets, 0, bias, mask=mask, groups=weight_groups,
                               offset_groups=offset_groups, stride=stride, pads=pads, dilation=dilation)
    assert np.abs(nhwc(want) - got).max() < 1e-6


@settings(SETTINGS, max_examples=10)
@given(seeds, st.integers(1, 4))
def test_fractional_samples_are_within_half_a_code_of_onnx(seed, fraction):
    rng = np.random.default_rng(seed)
    x, weights = rng.integers(-128, 128, (6, 5, 2)), rng.integers(-8, 8, (2, 3, 3, 1))
    offsets = rng.integers(-128, 128, (6, 5, 18))
    want = evaluate("DeformConv", [nchw(x), oihw(weights), nchw(offsets / (1 << fraction)), np.zeros(2)],
                    pads=[1] * 4, group=2)
    got = golden.deform_conv2d(x, weights, offsets, fraction, groups=2, pads=(1, 1, 1, 1))
    assert (np.abs(nhwc(want) - got) <= np.abs(weights).sum(axis=(1, 2, 3)) / 2 + 1e-6).all()


CASES = {
    "test_basic_deform_conv_with_padding": 1,
    "test_basic_deform_conv_without_padding": 1,
    "test_deform_conv_with_mask_bias": 1,
    "test_deform_conv_with_multiple_offset_groups": 2,
}


@pytest.mark.parametrize("name", CASES)
def test_onnx_backend_nodes(name):
    """Inputs in sixteenths, offsets in sixteenths of a pixel, masks in 255ths.

    Only an offset of -0.1 is not a multiple of 1/16 (nearest is -0.125): its sample moves by 0.025 at most, as
    neighbours differ by 1; the rounding of that sample adds half a sixteenth. At most one such tap in an output.
    """
    node = load(NODES / name / "model.onnx").graph.node[0]
    files = sorted((NODES / name / "test_data_set_0").glob("input_*.pb"))
    arrays = (numpy_helper.to_array(load_tensor(file)) for file in files)
    tensors = dict(zip((i for i in node.input if i), arrays, strict=True))
    x, weights, offsets, bias, mask = (tensors.get(i) for i in [*node.input, "", ""][:5])
    want = numpy_helper.to_array(load_tensor(NODES / name / "test_data_set_0" / "output_0.pb"))
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    unit = 16 if mask is None else 16 * 255
    got = golden.deform_conv2d(
        np.rint(nhwc(x) * 16).astype(int), weights.transpose(0, 2, 3, 1).astype(int),
        np.rint(nhwc(offsets) * 16).astype(int), 4, 0 if bias is None else (bias * unit).astype(int),
        mask=None if mask is None else np.rint(nhwc(mask) * 255).astype(int),
        offset_groups=attributes.get("offset_group", 1), pads=tuple(attributes["pads"]))
    error = np.abs(nhwc(want) - got / unit)
    assert error.max() <= 0.025 + 0.5 / 16 + 1e-6
    assert (error > 1e-5).sum() <= 1


@SETTINGS
@given(seeds, st.sampled_from([(3, 3), (5, 3)]))
def test_square_form_is_a_kernel_of_each_pixels_dilation(seed, kernel):
    rng = np.random.default_rng(seed)
    x, weights = rng.integers(-128, 128, (7, 8, 2)), rng.integers(-8, 8, (2, *kernel, 1))
    pads = (kernel[0] // 2, kernel[1] // 2) * 2
    dilations = rng.integers(-4, 5, (7, 8, 1))
    got = golden.deform_conv2d(x, weights, golden.square_offsets(dilations, kernel), 0, groups=2, pads=pads)
    for dilation in range(-4, 5):
        kernels = weights[..., 0] if dilation >= 0 else weights[:, ::-1, ::-1, 0]
        size = abs(dilation)
        if size == 0:
            want = x * weights[..., 0].sum(axis=(1, 2))
        else:
            want = golden.depthwise_conv2d(x, kernels, pads=tuple(p * size for p in pads), dilation=(size, size))
        chosen = dilations[..., 0] == dilation
        assert np.array_equal(got[chosen], want[chosen])


@pytest.mark.parametrize("y, x, value", [
    (-1, 0, 0), (-0.5, 0, 2), (-0.5, -0.5, 1), (2.5, 0, 2), (2.5, 2.5, 1), (3, 1, 0), (0, -0.25, 3), (1, 1, 4)])
def test_edges_of_a_constant_image(y, x, value):
    offset = np.array([[[int(16 * y), int(16 * x)]]])
    got = golden.deform_conv2d(np.full((3, 3, 1), 4), np.ones((1, 1, 1, 1), int), offset, 4)
    assert got.item() == value
