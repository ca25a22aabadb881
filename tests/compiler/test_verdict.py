"""Every node gets a verdict, and impossible ones a reason and a way out."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.compiler.qonnx_models import Builder, two_layers
from tests.compiler.test_import_qonnx import MODELS
from weft.arch.errors import ModelError
from weft.compiler.import_qonnx import import_qonnx, verdicts
from weft.compiler.onnx_model import load_model
from weft.compiler.verdict import Place, Verdict, require_supported

E, F, H, X = Place.ENGINE, Place.FOLDED, Place.HOST, Place.IMPOSSIBLE


def judge(b: Builder, folder, *outputs: str) -> list[Verdict]:
    return verdicts(load_model(b.save(folder, *outputs)))


def test_one_verdict_per_node(tmp_path):
    judged = judge(two_layers(), tmp_path, "result")
    assert [(v.operation, v.place) for v in judged] == [
        ("Quant", H), ("Quant", F), ("Conv", E), ("Relu", F), ("Quant", F), ("Quant", F), ("Conv", E), ("Quant", F)]
    conv = judged[2]
    assert "matrix unit" in conv.detail and conv.node in judged[1].detail and conv.node in judged[4].detail


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_supported_models_have_no_impossible_node(build, tmp_path):
    b = Builder()
    output = build(b)
    judged = judge(b, tmp_path, output)
    require_supported(judged)
    assert [v.node for v in judged] == [node.name for node in b.nodes]


def conv(b, **attributes):
    return b.quant(b.conv(b.image, 4, 4, **attributes), 1.0)


def weighted(b, weight, **attributes):
    return b.quant(b.node("Conv", b.image, weight, **attributes), 1.0)


def deform(b, offset_channels=18, scale=1.0, extra=(), **attributes):
    offsets = b.quant(b.conv(b.image, 4, offset_channels, (1, 1)), scale)
    attributes = {"pads": [1, 1, 1, 1], "group": 4} | attributes
    return b.quant(b.node("DeformConv", b.image, b.weights(4, 1, 3, 3), offsets, *extra, **attributes), 1.0)


def square(b):
    s = b.quant(b.conv(b.image, 4, 1, (1, 1)), 1.0)
    offsets = b.node("Mul", b.node("Sub", s, b.constant(1.0)), b.constant(np.ones((1, 18, 1, 1))))
    return b.quant(b.node("DeformConv", b.image, b.weights(4, 1, 3, 3), offsets, pads=[1, 1, 1, 1], group=4), 1.0)


def batch_norm(b, x, variance=1.0, **attributes):
    parameters = [b.constant(np.full(4, value)) for value in (-1.0, 0, 0, variance)]
    return b.quant(b.node("BatchNormalization", x, *parameters, **attributes), 1.0)


def resize(b, mode="nearest", scales=(1, 1, 2, 2), rounding="floor"):
    return b.node("Resize", b.image, "", b.constant(scales), mode=mode, nearest_mode=rounding,
                  coordinate_transformation_mode="asymmetric")


def pool(b, **attributes):
    return b.node("MaxPool", b.image, **{"kernel_shape": [3, 3]} | attributes)


def integers(b, *values):
    return b.constant(values, np.int64)


IMPOSSIBLE = {  # model, operation to blame, words of the rewrite
    "sigmoid": (lambda b: b.node("Sigmoid", conv(b)), "Sigmoid", "host"),
    "softmax": (lambda b: b.node("Softmax", conv(b)), "Softmax", "host"),
    "gemm": (lambda b: b.node("Gemm", b.image, b.constant(np.ones((4, 4)))), "Gemm", "1x1 convolution"),
    "leaky": (lambda b: b.quant(b.node("LeakyRelu", b.conv(b.image, 4, 4)), 1.0), "LeakyRelu", "ReLU"),
    "unheard of": (lambda b: b.node("Zeta", b.image), "Zeta", "host"),
    "foreign": (lambda b: b.node("Conv", b.image, domain="com.example"), "com.example.Conv", "host"),
    "qdq": (lambda b: b.node("QuantizeLinear", b.image, b.constant(1.0)), "QuantizeLinear", "Quant nodes"),
    "average": (lambda b: b.node("GlobalAveragePool", b.image), "GlobalAveragePool", "depthwise"),
    "zero point": (lambda b: b.quant(b.conv(b.image, 4, 4), 1.0, zero_point=3.0), "Quant", "symmetric"),
    "rounding": (lambda b: b.quant(b.conv(b.image, 4, 4), 1.0, rounding_mode="FLOOR"), "Quant", "half to even"),
    "scale per channel": (lambda b: b.quant(b.conv(b.image, 4, 4), np.ones((1, 4, 1, 1))), "Quant", "one scale"),
    "scale zero": (lambda b: b.quant(b.conv(b.image, 4, 4), 0.0), "Quant", "calibrate"),
    "scale tiny": (lambda b: b.quant(b.conv(b.image, 4, 4), 1e-30), "Quant", "calibrate"),
    "half bits": (lambda b: b.quant(b.conv(b.image, 4, 4), 1.0, bits=4.5), "Quant", "whole bit widths"),
    "16 bits": (lambda b: b.quant(b.conv(b.image, 4, 4), 1.0, bits=16), "Quant", "8 bits"),
    "second image quantizer": (lambda b: b.node("Concat", b.image, b.quant("image", 1.0), axis=1),
                               "Quant", "one quantizer"),
    "float image": (lambda b: b.quant(b.node("Conv", "image", b.weights(4, 4, 1, 1)), 1.0), "Conv", "put a Quant"),
    "float weights": (lambda b: weighted(b, b.constant(np.ones((4, 4, 1, 1)))), "Conv", "quantize"),
    "wide weights": (lambda b: weighted(b, b.weights(4, 4, 1, 1, bits=16)), "Conv", "4 or 8"),
    "weight scale": (lambda b: weighted(b, b.quant(b.constant(np.ones((4, 4, 1, 1))), np.ones((1, 4, 1, 1)))), "Quant",
                     "per output channel"),
    "one-dimensional": (lambda b: weighted(b, b.weights(4, 4, 3)), "Conv", "two-dimensional"),
    "grouped": (lambda b: weighted(b, b.weights(4, 2, 1, 1), group=2), "Conv", "depthwise"),
    "depth multiplier": (lambda b: weighted(b, b.weights(8, 1, 1, 1), group=4), "Conv", "depthwise"),
    "huge kernel": (lambda b: weighted(b, b.weights(4, 4, 1, 17), pads=[0, 8, 0, 8]), "Conv", "instruction"),
    "huge stride": (lambda b: conv(b, strides=[16, 1]), "Conv", "instruction"),
    "auto pad": (lambda b: conv(b, auto_pad="SAME_UPPER"), "Conv", "explicit pads"),
    "no pixels": (lambda b: conv(b, kernel=(8, 8), pads=[0] * 4), "Conv", "smaller"),
    "no quantizer": (lambda b: b.conv(b.image, 4, 4), "Conv", "results of a Quant"),
    "pool before quantizer": (lambda b: b.node("MaxPool", b.conv(b.image, 4, 4), kernel_shape=[2, 2]),
                              "MaxPool", "put a Quant"),
    "mask": (lambda b: deform(b, extra=("", b.constant(np.ones((1, 9, 6, 7))))), "DeformConv", "mask"),
    "offset groups": (lambda b: deform(b, 36, offset_group=2), "DeformConv", "offset_group=1"),
    "offset count": (lambda b: deform(b, 16), "DeformConv", "predict 18"),
    "offset scale": (lambda b: deform(b, scale=0.3), "DeformConv", "2**-f"),
    "offset fraction": (lambda b: deform(b, scale=2.0**-5), "DeformConv", "2**-f"),
    "offset size": (lambda b: deform(b, pads=[0] * 4), "DeformConv", "each output pixel"),
    "grid": (square, "DeformConv", "offset = (dilation - 1)"),
    "plain product": (lambda b: b.node("Mul", b.image, b.constant(2.0)), "Mul", "convolution"),
    "plain difference": (lambda b: b.node("Sub", b.image, b.constant(2.0)), "Sub", "Add"),
    "norm after relu": (lambda b: batch_norm(b, b.node("Relu", b.conv(b.image, 4, 4))), "BatchNormalization", "behind"),
    "norm in training": (lambda b: batch_norm(b, b.conv(b.image, 4, 4), training_mode=1),
                         "BatchNormalization", "eval()"),
    "norm variance": (lambda b: batch_norm(b, b.conv(b.image, 4, 4), variance=-1.0), "BatchNormalization", "train"),
    "norm of wide weights": (lambda b: batch_norm(b, weighted_sum(b)), "BatchNormalization", "narrow=1"),
    "norm of the sum": (lambda b: batch_norm(b, b.node("Add", b.image, b.image)), "BatchNormalization", "behind"),
    "bias after relu": (lambda b: b.quant(b.node("Add", b.node("Relu", b.conv(b.image, 4, 4)), b.constant(1.0)), 1.0),
                        "Add", "before"),
    "sum of shapes": (lambda b: b.quant(b.node("Add", b.image, conv(b, strides=[2, 2])), 1.0), "Add", "equal shape"),
    "sum of scales": (lambda b: b.quant(b.node("Add", b.image, conv_scaled(b, 100.0)), 1.0),
                      "Add", "share one quantizer"),
    "concat of scales": (lambda b: b.node("Concat", b.image, conv(b), axis=1), "Concat", "share one quantizer"),
    "concat of rows": (lambda b: b.node("Concat", b.image, b.image, axis=2), "Concat", "axis 1"),
    "concat of sizes": (lambda b: b.node("Concat", b.image, pool(b), axis=1), "Concat", "equal size"),
    "split": (lambda b: b.node("Split", b.image, integers(b, 1, 1), axis=1, outputs=2), "Split", "export"),
    "slice of rows": (lambda b: b.node("Slice", b.image, *(integers(b, v) for v in (0, 2, 2))), "Slice", "axis 1"),
    "empty slice": (lambda b: b.node("Slice", b.image, *(integers(b, v) for v in (4, 4, 1))), "Slice", "keep from 1"),
    "gather beyond": (lambda b: b.node("Gather", b.image, integers(b, 4), axis=1), "Gather", "export"),
    "flattening": (lambda b: b.node("Reshape", b.image, integers(b, 1, -1)), "Reshape", "channel shuffle"),
    "rotation": (lambda b: b.node("Transpose", b.image, perm=[0, 1, 3, 2]), "Transpose", "channel shuffle"),
    "half a shuffle": (lambda b: b.node("Reshape", b.image, integers(b, 1, 2, 2, 6, 7)),
                       "Reshape", "results of a Quant"),
    "bilinear": (lambda b: resize(b, mode="linear"), "Resize", "nearest"),
    "rounding up": (lambda b: resize(b, rounding="ceil"), "Resize", "nearest"),
    "times four": (lambda b: resize(b, scales=(1, 1, 4, 4)), "Resize", "twice"),
    "pool positions": (lambda b: b.node("MaxPool", b.image, kernel_shape=[2, 2], outputs=2), "MaxPool", "one output"),
    "pool ceil": (lambda b: pool(b, strides=[2, 2], ceil_mode=1), "MaxPool", "ceil_mode=0"),
    "pool dilation": (lambda b: pool(b, dilations=[2, 2]), "MaxPool", "dilation 1"),
    "pool padding": (lambda b: pool(b, pads=[3, 3, 3, 3]), "MaxPool", "below the kernel"),
    "clip limits": (lambda b: b.quant(b.node("Clip", b.image, b.constant(2.0), b.constant(1.0)), 1.0), "Clip", "swap"),
}  # fmt: skip


def weighted_sum(b):
    weight = b.quant(b.constant(np.full((4, 4, 1, 1), -8.0)), 1.0, bits=4)
    return b.node("Conv", b.image, weight)


def conv_scaled(b, scale):
    return b.quant(b.conv(b.image, 4, 4), scale)


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_nodes_are_named_with_a_rewrite(case, tmp_path):
    build, operation, rewrite = IMPOSSIBLE[case]
    b = Builder()
    judged = judge(b, tmp_path, build(b))
    impossible = [v for v in judged if v.place is X]
    assert len(judged) == len(b.nodes) and [v.operation for v in impossible] == [operation], impossible
    assert rewrite in str(impossible[0]) and impossible[0].rewrite
    with pytest.raises(ModelError) as error:
        import_qonnx(tmp_path / "small.onnx")
    assert impossible[0].node in str(error.value) and impossible[0].rewrite in str(error.value)
    assert error.value.exit_code == 2


def test_all_impossible_nodes_are_named_at_once_and_what_follows_is_not_blamed(tmp_path):
    b = Builder()
    x = b.quant(b.node("Tanh", b.conv(b.image, 4, 4)), 1.0)
    output = b.node("Softmax", b.quant(b.conv(x, 4, 4), 1.0))
    assert [v.operation for v in judge(b, tmp_path, output) if v.place is X] == ["Tanh", "Softmax"]
    with pytest.raises(ModelError, match=r"2 nodes cannot run.*\n.*Tanh.*\n.*Softmax"):
        import_qonnx(tmp_path / "small.onnx")


def test_an_attribute_of_the_wrong_type_is_a_model_error(tmp_path):
    b = Builder()
    proto = b.proto(b.quant(b.node("Conv", b.image, b.weights(4, 4, 1, 1), group=1.5), 1.0))
    path = tmp_path / "wrong.onnx"
    onnx.save(proto, path)
    with pytest.raises(ModelError, match="attribute 'group'"):
        import_qonnx(path)


def test_nano_is_supported_and_only_its_image_is_quantized_on_the_host(nano):
    judged = verdicts(load_model(nano.path))
    assert {v.place for v in judged} == {E, F, H} and [v.node for v in judged if v.place is H] == ["image.quant"]
