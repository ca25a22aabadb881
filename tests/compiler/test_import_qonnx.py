"""What the importer makes of a model computes what the model says: equal integers, not similar floats."""

from __future__ import annotations

import numpy as np
import pytest

from tests.compiler.qonnx_models import Builder, oracle, two_layers
from weft.arch.isa import Sampling
from weft.compiler.frontend import load_graph
from weft.compiler.graph import Add, Conv, DeformConv, DeformDepthwise, Depthwise
from weft.compiler.import_qonnx import import_qonnx
from weft.sw.reference import evaluate


def strided(b: Builder) -> str:
    return b.quant(b.conv(b.image, 4, 6, (3, 2), strides=[2, 1], pads=[1, 0, 0, 1], bias=False), 2.0**-4)


def dilated(b: Builder) -> str:
    return b.quant(b.conv(b.image, 4, 6, dilations=[2, 1], pads=[2, 1, 2, 1], bits=8, narrow=0), 2.0**-1)


def depthwise(b: Builder) -> str:
    return b.quant(b.node("Relu", b.conv(b.image, 4, 4, group=4, strides=[2, 2])), 2.0**-5, signed=0)


def clipped(b: Builder) -> str:
    limits = b.constant(-0.7), b.constant(1.3)
    return b.quant(b.node("Clip", b.conv(b.image, 4, 5, (1, 1)), *limits), 2.0**-4)


def relu6_of_four_bits(b: Builder) -> str:
    return b.quant(b.node("Clip", b.conv(b.image, 4, 5), b.constant(0.0), b.constant(6.0)), 0.25, signed=0, bits=4)


def signed_after_relu(b: Builder) -> str:
    return b.quant(b.node("Relu", b.conv(b.image, 4, 5)), 2.0**-3)


def batch_norm(b: Builder) -> str:
    gamma, beta, mean, variance = [2, -1, 0, 0.5, -4], [0.5, 1, -0.25, 0, 0], [1, 0.5, 2, 0, -1], [4, 1, 16, 0.25, 1]
    parameters = map(b.constant, (gamma, beta, mean, variance))
    y = b.node("BatchNormalization", b.conv(b.image, 4, 5), *parameters, epsilon=0.0)
    return b.quant(b.node("Relu", y), 2.0**-3, signed=0)


def bias_added(b: Builder) -> str:
    addend = b.constant(np.arange(5).reshape(1, 5, 1, 1) / 4)
    return b.quant(b.node("Add", addend, b.conv(b.image, 4, 5)), 2.0**-3)


def quantized_bias(b: Builder) -> str:
    bias = b.quant(b.constant(b.rng.integers(-99, 99, 5) / 64), np.full(5, 2.0**-6), bits=32)
    return b.quant(b.node("Conv", b.image, b.weights(5, 4, 1, 1), bias), 2.0**-4)


def pooled(b: Builder) -> str:
    return b.node("MaxPool", b.image, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])


def enlarged(b: Builder) -> str:
    scales = b.constant([1, 1, 2, 2])
    return b.node("Resize", b.image, "", scales, mode="nearest", nearest_mode="floor",
                  coordinate_transformation_mode="asymmetric")


def shuffled(b: Builder) -> str:
    left = b.node("Split", b.image, b.constant([1, 3], np.int64), axis=1, outputs=2)
    starts, ends, axes, steps = (b.constant([v], np.int64) for v in (3, -(1 << 63), 1, -1))
    backward = b.node("Slice", b.image, starts, ends, axes, steps)
    picked = b.node("Gather", b.image, b.constant([2, -1, 2], np.int64), axis=1)
    x = b.node("Concat", left, backward, f"{left}.1", picked, b.image, b.node("Identity", left), axis=1)
    x = b.node("Reshape", x, b.constant([0, 4, -1, 6, 7], np.int64))
    return b.node("Reshape", b.node("Transpose", x, perm=[0, 2, 1, 3, 4]), b.constant([1, 16, 6, 7], np.int64))


def requantized(b: Builder) -> str:
    return b.quant(b.node("Relu", b.image), 2.0**-5, signed=0)


def added(b: Builder) -> str:
    y = b.quant(b.conv(b.image, 4, 4), 2.0**-4)
    return b.quant(b.node("Relu", b.node("Add", b.image, y)), 2.0**-4, signed=0)


def square_grid(b: Builder) -> str:
    return b.constant(np.array([[y, x] for y in (-1, 0, 1) for x in (-1, 0, 1)]).reshape(1, 18, 1, 1))


def square(b: Builder, outputs: int = 4, group: int = 4) -> str:
    s = b.quant(b.node("Clip", b.conv(b.image, 4, 1, (1, 1), bits=8), b.constant(-7.0), b.constant(8.0)), 1.0)
    offsets = b.node("Mul", b.node("Sub", s, b.constant(1.0)), square_grid(b))
    y = b.node("DeformConv", b.image, b.weights(outputs, 4 // group, 3, 3), offsets, pads=[1, 1, 1, 1], group=group)
    return b.quant(y, 2.0**-4)


def full_square(b: Builder) -> str:
    return square(b, 5, 1)


def whole_offsets(b: Builder) -> str:
    offsets = b.quant(b.conv(b.image, 4, 8, (1, 1), bits=8, pads=[0, 0, 0, 0]), 1.0)
    image = b.node("Resize", b.image, "", b.constant([1, 1, 2, 2]), mode="nearest", nearest_mode="floor",
                   coordinate_transformation_mode="asymmetric")
    bias = b.constant([1, 0.5, -1, 0, 0.25])
    return b.quant(b.node("DeformConv", image, b.weights(5, 4, 2, 2), offsets, bias, strides=[2, 2]), 2.0**-4)


MODELS = (strided, dilated, depthwise, clipped, relu6_of_four_bits, signed_after_relu, batch_norm, bias_added,
          quantized_bias, pooled, enlarged, shuffled, requantized, added, square, full_square, whole_offsets)


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_integers_equal_the_exact_float_model(build, tmp_path):
    b = Builder(seed=len(build.__name__))
    output = build(b)
    codes = b.rng.integers(-128, 128, (6, 7, 4))
    expected, = oracle(b.proto(output), codes)
    for load in (import_qonnx, load_graph):
        graph = load(b.save(tmp_path, output))
        result = evaluate(graph, {"image": codes})[graph.outputs[0]]
        assert np.array_equal(result * graph.tensors[graph.outputs[0]].scale, expected)
    assert expected.any()


def test_operators_and_geometry(tmp_path):
    graph = import_qonnx(two_layers().save(tmp_path, "result"))
    assert graph.inputs == ["image"] and graph.outputs == ["result"]
    image, features = graph.tensors["image"], graph.tensors["features"]
    assert (image.shape, image.scale, image.unsigned) == ((6, 7, 4), 2.0**-7, False)
    assert (features.shape, features.scale, features.unsigned) == ((6, 7, 8), 2.0**-4, True)
    first, second = graph.ops
    assert isinstance(first, Conv) and first.weight.shape == (8, 3, 3, 4) and first.bits == 4
    assert (first.requantize.low, first.requantize.high) == (0, 255)
    assert (second.requantize.low, second.requantize.high) == (-128, 127)


def test_weights_are_rounded_half_even_and_clamped(tmp_path):
    b = Builder(channels=1)
    weight = b.constant(np.array([0.5, 1.5, -2.5, 3.4, 90, -90]).reshape(6, 1, 1, 1))
    b.quant(b.node("Conv", b.image, b.quant(weight, 1.0, bits=4, narrow=1)), 1.0, name="result")
    op, = import_qonnx(b.save(tmp_path, "result")).ops
    assert op.weight.ravel().tolist() == [0, 2, -2, 3, 7, -7]


@pytest.mark.parametrize(("bits", "stored"), [(2, 4), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_weight_bits_are_four_or_eight(bits, stored, tmp_path):
    b = Builder()
    b.quant(b.conv(b.image, 4, 3, bits=bits), 1.0, name="result")
    assert import_qonnx(b.save(tmp_path, "result")).ops[0].bits == stored


@pytest.mark.parametrize(("build", "kind", "reach"), [(square, DeformDepthwise, 8), (full_square, DeformConv, 8),
                                                      (whole_offsets, DeformConv, 128)])
def test_deformable_sampling(build, kind, reach, tmp_path):
    b = Builder()
    op = import_qonnx(b.save(tmp_path, build(b))).ops[-1]
    sampling = Sampling.OFFSETS if build is whole_offsets else Sampling.SQUARE
    assert isinstance(op, kind) and (op.deformable.sampling, op.deformable.reach) == (sampling, reach)


@pytest.mark.parametrize("fraction", range(5))
def test_offset_fraction_follows_from_the_scale(fraction, tmp_path):
    b = Builder()
    offsets = b.quant(b.conv(b.image, 4, 18, (1, 1)), 2.0**-fraction)
    y = b.node("DeformConv", b.image, b.weights(4, 1, 3, 3), offsets, pads=[1, 1, 1, 1], group=4)
    deformable = import_qonnx(b.save(tmp_path, b.quant(y, 1.0))).ops[-1].deformable
    assert (deformable.fraction, deformable.reach) == (fraction, 128 >> fraction)


def test_addition_of_equal_scales_is_exact(tmp_path):
    b = Builder()
    y = b.quant(b.conv(b.image, 4, 4), 2.0**-7)
    b.quant(b.node("Add", b.image, y), 2.0**-6, name="result")
    op = import_qonnx(b.save(tmp_path, "result")).ops[-1]
    assert isinstance(op, Add) and op.weight.tolist() == [1, 1]


def test_one_convolution_with_two_quantizers(tmp_path):
    b = Builder()
    y = b.conv(b.image, 4, 4)
    names = b.quant(y, 0.5), b.quant(b.node("Relu", y), 0.25, signed=0)
    graph = load_graph(b.save(tmp_path, *names))
    assert len({op.name for op in graph.ops}) == 2 and graph.outputs == list(names)


def test_second_quantizer_of_equal_scale_disappears(tmp_path):
    b = Builder()
    x = b.quant(b.conv(b.image, 4, 4), 0.5)
    b.quant(b.conv(b.quant(x, 0.5), 4, 4, group=4), 0.5, name="result")
    assert [type(op) for op in load_graph(b.save(tmp_path, "result")).ops] == [Conv, Depthwise]


@pytest.mark.parametrize("load", [import_qonnx, load_graph])
@pytest.mark.parametrize("model", ["nano", "tiny_bounded"])
def test_codes_equal_the_trained_model(model, load, request):
    exported = request.getfixturevalue(model)
    graph = load(exported.path)
    codes = evaluate(graph, {"image": exported.codes["image"]})
    compared = codes.keys() & exported.codes.keys()
    assert {"image", "hm", "wh", "reg", "stem", "conv5", "decoder.2.deform"} <= compared
    unused = [name for name in exported.codes if name not in compared and not name.endswith(".spread")]
    assert load is load_graph or not unused  # the passes drop what only channel moves read
    for name in compared:
        assert np.array_equal(codes[name], exported.codes[name]), name


def test_nano_graph(nano, golden):
    golden("nano_graph.txt", str(load_graph(nano.path)))
