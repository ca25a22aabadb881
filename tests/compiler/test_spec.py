"""Illegal graphs are refused with the name of what is wrong; each case breaks one rule of a legal graph."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.compiler.qonnx_models import Builder
from tests.compiler.test_import_qonnx import added, full_square, pooled, shuffled, two_layers, whole_offsets
from weft.arch.errors import ModelError
from weft.arch.numerics import accumulator_bounds
from weft.compiler.frontend import load_graph
from weft.compiler.graph import Channels, Conv, Graph, Upsample
from weft.compiler.import_qonnx import import_qonnx
from weft.compiler.spec import Stage, check


@pytest.fixture
def graph(tmp_path) -> Graph:
    """Image -> convolution `features` -> 1x1 convolution `result`."""
    return load_graph(two_layers().save(tmp_path, "result"))


def built(build, folder) -> Graph:
    b = Builder()
    return load_graph(b.save(folder, build(b)))


def refused(graph: Graph, match: str, stage: Stage = Stage.IMPORTED) -> None:
    with pytest.raises(ModelError, match=match):
        check(graph, stage)


def altered(graph: Graph, index: int, /, **changes) -> Graph:
    ops = list(graph.ops)
    ops[index] = replace(ops[index], **changes)
    return replace(graph, ops=ops)


def retyped(graph: Graph, name: str, /, **changes) -> Graph:
    return replace(graph, tensors=graph.tensors | {name: replace(graph.tensors[name], **changes)})


def test_legal_graph_passes_every_stage(graph):
    for stage in Stage:
        check(graph, stage)


def test_names(graph):
    first, second = graph.ops
    refused(altered(graph, 1, name=first.name), "several operators are named")
    refused(replace(graph, ops=[second, first]), "reads 'features', which is not made before it")
    refused(altered(graph, 1, output="features"), "makes 'features' a second time")
    refused(replace(graph, outputs=["other"]), "output 'other' is made by no operator")
    declared = graph.tensors | {"other": graph.tensors["image"]}
    refused(replace(graph, tensors=declared), "'other' is not both declared and made")
    refused(replace(graph, ops=[first], outputs=["features"]), "'result' is not both declared and made")


@pytest.mark.parametrize("changes", [{"name": "other"}, {"height": 0}, {"scale": 0.0}, {"scale": float("nan")}])
def test_tensors(changes, graph):
    refused(retyped(graph, "image", **changes), "tensor 'image' is illegal")


def test_convolution(graph):
    op = graph.ops[0]
    refused(altered(graph, 0, weight=op.weight.astype(np.int16)), "has weights int16")
    refused(altered(graph, 0, weight=op.weight[:, :, :, :3]), r"needs int8\[8, 3, 3, 4\]")
    refused(altered(graph, 0, weight=op.weight + np.int8(8)), "weights outside 4 bits")
    refused(altered(graph, 0, bits=5), "weights of 5 bits")
    refused(altered(graph, 0, window=replace(op.window, stride=(2, 2))), "cannot give 6 x 7 pixels")
    refused(altered(graph, 0, window=replace(op.window, stride=(0, 1))), "illegal Window")
    refused(altered(graph, 0, inputs=("image", "image")), "has 2 inputs")
    refused(retyped(graph, "image", channels=5), "has weights")


def test_requantize(graph):
    scale = graph.ops[0].requantize
    for changes, match in (
        ({"bias": scale.bias.astype(np.int64)}, "bias int64"),
        ({"mult": scale.mult[:3]}, r"mult uint16\[3\]"),
        ({"shift": scale.shift + np.uint8(48)}, "shifts by more than 47"),
        ({"low": -1}, "clamps to -1..255"),
        ({"high": 256}, "clamps to 0..256"),
        ({"low": 9, "high": 8}, "clamps to 9..8"),
    ):
        refused(altered(graph, 0, requantize=replace(scale, **changes)), match)


@pytest.mark.parametrize(("bias", "sign"), [(2**31 - 1, 1), (-(2**31), -1)])
def test_accumulator_overflow_names_layer_and_channel(bias, sign, graph):
    op = graph.ops[1]
    weight = np.zeros_like(op.weight)
    weight[3] = sign
    biases = np.zeros_like(op.requantize.bias)
    biases[3] = bias
    overflowing = altered(graph, 1, weight=weight, requantize=replace(op.requantize, bias=biases))
    refused(overflowing, f"Conv '{op.name}' can overflow its 32-bit accumulator: channel 3 reaches")
    least, most = accumulator_bounds(weight[3].ravel(), *graph.tensors["features"].limits, 0)
    biases[3] -= most if sign > 0 else least
    check(altered(graph, 1, weight=weight, requantize=replace(op.requantize, bias=biases)))


def test_deformable(tmp_path):
    for build, wrong in ((full_square, 2), (whole_offsets, 6)):
        graph = built(build, tmp_path)
        op = graph.ops[-1]
        offsets, index = op.inputs[1], len(graph.ops) - 1
        refused(altered(graph, index, deformable=replace(op.deformable, fraction=5)), "5 fraction bits")
        refused(altered(graph, index, deformable=replace(op.deformable, reach=-1)), "reach -1")
        refused(altered(graph, index, window=replace(op.window, dilation=(2, 2))), "dilation|cannot give")
        maker = next(i for i, other in enumerate(graph.ops) if other.output == offsets)
        weight, scale = graph.ops[maker].weight, graph.ops[maker].requantize
        constants = {key: getattr(scale, key).repeat(wrong)[:wrong] for key in ("bias", "mult", "shift")}
        narrow = altered(graph, maker, weight=weight.repeat(wrong, 0)[:wrong], requantize=replace(scale, **constants))
        refused(retyped(narrow, offsets, channels=wrong), f"has {wrong} offsets per pixel")


def test_movers_keep_scale_sign_and_size(tmp_path):
    graph = built(pooled, tmp_path)
    output = graph.outputs[0]
    refused(retyped(graph, output, scale=1.0), "changes the scale or sign")
    refused(retyped(graph, output, unsigned=True), "changes the scale or sign")
    refused(retyped(graph, output, height=9), "cannot give")
    refused(altered(graph, 0, window=replace(graph.ops[0].window, dilation=(2, 2))), "pools with a dilation")
    enlarged = replace(graph, ops=[Upsample("up", ("image",), output, 3)])
    refused(enlarged, "by 3")
    check(retyped(enlarged, output, height=18, width=21))


def test_channels(tmp_path):
    graph = built(shuffled, tmp_path)
    op, index = graph.ops[0], len(graph.ops) - 1
    assert index == 0 and isinstance(op, Channels)
    refused(altered(graph, 0, source=op.source[1:]), "lists 15 sources for 16 channels")
    refused(altered(graph, 0, index=(4, *op.index[1:])), "takes channel 4 of input 0")
    refused(altered(graph, 0, inputs=("image", "image")), "an input that it does not use", Stage.COLLAPSED)
    refused(retyped(graph, op.output, width=8), "different sizes")
    b = Builder()
    refused(import_qonnx(b.save(tmp_path, shuffled(b))), "reads another Channels", Stage.COLLAPSED)


def test_addition(tmp_path):
    graph = built(added, tmp_path)
    op, index = graph.ops[-1], len(graph.ops) - 1
    refused(altered(graph, index, weight=op.weight.astype(np.int64)), "two int8 weights")
    refused(retyped(graph, op.output, channels=5), "different shapes")
    bias = np.full_like(op.requantize.bias, 2**31 - 1)
    refused(altered(graph, index, requantize=replace(op.requantize, bias=bias)), "overflow")


def test_dead_operator(graph):
    refused(replace(graph, outputs=["features"]), "which nothing reads", Stage.LIVE)
    assert isinstance(graph.ops[1], Conv)
