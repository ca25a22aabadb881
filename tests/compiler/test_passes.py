"""Passes keep what every output computes and do what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compiler.qonnx_models import Builder
from weft.compiler.graph import Channels, Graph, MaxPool, Tensor, Window
from weft.compiler.import_qonnx import import_qonnx
from weft.compiler.passes.channels import collapse_channels
from weft.compiler.passes.dead import remove_dead
from weft.compiler.passes.fold_batchnorm import fold_batchnorm
from weft.compiler.spec import Stage, check
from weft.compiler.verdict import Unsupported
from weft.sw.reference import evaluate


def graph_of(*ops, outputs, channels=4) -> Graph:
    """A graph on the image [2, 2, channels]; Channels and 1x1 MaxPool operators only."""
    graph = Graph("small", {"image": Tensor("image", 2, 2, channels, 1.0, False)}, list(ops), ["image"], list(outputs))
    for op in ops:
        count = len(op.index) if isinstance(op, Channels) else graph.tensors[op.inputs[0]].channels
        graph.tensors[op.output] = Tensor(op.output, 2, 2, count, 1.0, False)
    return graph


def move(output: str, inputs: tuple[str, ...], *origin: tuple[int, int]) -> Channels:
    return Channels(output, inputs, output, *zip(*origin, strict=True))


def compute(output: str, source: str) -> MaxPool:
    return MaxPool(output, (source,), output, Window((1, 1)))


def test_chains_compose():
    graph = graph_of(
        compute("a", "image"),
        move("back", ("a",), (0, 3), (0, 2), (0, 1), (0, 0)),
        move("mixed", ("image", "back"), (1, 0), (0, 1), (1, 3)),
        compute("out", "mixed"), outputs=["out"])
    result = remove_dead(collapse_channels(graph))
    check(result, Stage.LIVE)
    assert [op.output for op in result.ops] == ["a", "mixed", "out"]
    assert result.ops[1] == move("mixed", ("a", "image"), (0, 3), (1, 1), (0, 0))


def test_identities_are_bypassed_unless_they_name_an_output():
    graph = graph_of(
        move("back", ("image",), (0, 3), (0, 2), (0, 1), (0, 0)),
        move("again", ("back",), (0, 3), (0, 2), (0, 1), (0, 0)),
        compute("out", "again"),
        move("named", ("out",), *((0, i) for i in range(4))), outputs=["out", "named"])
    result = remove_dead(collapse_channels(graph))
    check(result, Stage.LIVE)
    assert result.ops == [compute("out", "image"), graph.ops[-1]]


def test_half_of_a_tensor_is_no_identity():
    graph = graph_of(move("half", ("image",), (0, 0), (0, 1)), compute("out", "half"), outputs=["out"])
    assert collapse_channels(graph).ops == graph.ops


def test_dead_operators_and_tensors_disappear_and_inputs_stay():
    graph = graph_of(compute("a", "image"), compute("b", "a"), compute("c", "image"), outputs=["c"])
    result = remove_dead(graph)
    check(result, Stage.LIVE)
    assert [op.output for op in result.ops] == ["c"] and set(result.tensors) == {"image", "c"}
    assert len(graph.ops) == 3 and set(graph.tensors) == {"image", "a", "b", "c"}  # passes do not touch their argument
    assert remove_dead(graph_of(outputs=["image"])).inputs == ["image"]


@st.composite
def channel_graphs(draw) -> Graph:
    """Random mixtures of channel moves and computations."""
    sizes = {"image": draw(st.integers(1, 4))}
    ops = []
    for number in range(draw(st.integers(1, 8))):
        name = f"t{number}"
        if draw(st.booleans()):
            inputs = tuple(dict.fromkeys(draw(st.lists(st.sampled_from(sorted(sizes)), min_size=1, max_size=3))))
            source = draw(st.lists(st.integers(0, len(inputs) - 1), min_size=1, max_size=6))
            ops.append(move(name, inputs, *((s, draw(st.integers(0, sizes[inputs[s]] - 1))) for s in source)))
            sizes[name] = len(source)
        else:
            ops.append(compute(name, draw(st.sampled_from(sorted(sizes)))))
            sizes[name] = sizes[ops[-1].inputs[0]]
    outputs = draw(st.lists(st.sampled_from([op.output for op in ops]), min_size=1, max_size=3, unique=True))
    return graph_of(*ops, outputs=outputs, channels=sizes["image"])


@given(channel_graphs())
@settings(max_examples=150, deadline=None)
def test_random_graphs_keep_their_outputs(graph):
    image = np.arange(4 * graph.tensors["image"].channels).reshape(graph.tensors["image"].shape)
    expected = evaluate(graph, {"image": image})
    check(graph)
    collapsed = collapse_channels(graph)
    check(collapsed, Stage.COLLAPSED)
    live = remove_dead(collapsed)
    check(live, Stage.LIVE)
    for result in (evaluate(collapsed, {"image": image}), evaluate(live, {"image": image})):
        assert all(np.array_equal(result[name], expected[name]) for name in graph.outputs)
    again = remove_dead(collapse_channels(live))
    assert (again.ops, again.tensors) == (live.ops, live.tensors)


def test_batch_norm_keeps_the_real_value_and_positive_scales():
    rng = np.random.default_rng(0)
    weight, x = rng.integers(-7, 8, (6, 3, 3, 2)), rng.integers(0, 256, (3, 3, 2))
    scale, bias, shift = rng.uniform(0.1, 1, 6), rng.normal(size=6), rng.normal(size=6)
    gain = np.array([1, -2, 0, 0.5, -0.5, 3])
    folded_weight, folded_scale, folded_bias = fold_batchnorm(weight, scale, bias, gain, shift, bits=4)
    before = gain * (scale * (weight * x).sum((1, 2, 3)) + bias) + shift
    assert np.allclose(folded_scale * (folded_weight * x).sum((1, 2, 3)) + folded_bias, before)
    assert (folded_scale > 0).all() and folded_weight.min() >= -7 and not folded_weight[2].any()


def test_batch_norm_that_cannot_negate_a_weight():
    one = np.ones(2)
    with pytest.raises(Unsupported, match="channel 1 turns its weight -8"):
        fold_batchnorm(np.array([[-8], [-8]]), one, one, np.array([1.0, -1.0]), one, bits=4)
    fold_batchnorm(np.array([[-8], [-8]]), one, one, np.array([1.0, -1.0]), one, bits=8)


def test_shuffle_net_block_becomes_one_gather(tmp_path):
    b = Builder()
    x = b.image
    for _ in range(3):
        left = b.node("Split", x, axis=1, num_outputs=2, outputs=2)
        x = b.node("Concat", left, b.quant(b.conv(f"{left}.1", 2, 2), 2.0**-7), axis=1)
        x = b.node("Reshape", x, b.constant([1, 2, 2, 6, 7], np.int64))
        x = b.node("Reshape", b.node("Transpose", x, perm=[0, 2, 1, 3, 4]), b.constant([1, 4, 6, 7], np.int64))
    graph = import_qonnx(b.save(tmp_path, x))
    live = remove_dead(collapse_channels(graph))
    check(live, Stage.LIVE)
    moves = [op for op in live.ops if isinstance(op, Channels)]
    assert len(moves) == 4 and sum(isinstance(op, Channels) for op in graph.ops) == 12
    codes = b.rng.integers(-128, 128, (6, 7, 4))
    assert np.array_equal(evaluate(live, {"image": codes})[x], evaluate(graph, {"image": codes})[x])
