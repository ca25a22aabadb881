"""Foreign, damaged and malicious files end in a ModelError with one message, never in another exception or a hang."""

from __future__ import annotations

import random
import warnings

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.compiler.qonnx_models import Builder, two_layers
from tests.compiler.test_import_qonnx import MODELS
from weft.arch.errors import ModelError
from weft.compiler.frontend import load_graph


def rejected(path, content, match: str = ".") -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    with pytest.raises(ModelError, match=match) as error:
        load_graph(path)
    assert str(path) in str(error.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.onnx"


@pytest.fixture
def proto() -> onnx.ModelProto:
    return two_layers().proto("result")


def all_operators() -> bytes:
    b = Builder()
    return b.proto(*[build(b) for build in MODELS]).SerializeToString()


@pytest.mark.parametrize("sixteenth", range(16))
def test_truncated(sixteenth, path):
    raw = all_operators()
    rejected(path, raw[: len(raw) * sixteenth // 16])


@pytest.mark.parametrize("seed", range(8))
def test_flipped_bytes(seed, path):
    """Damage in weights may go unnoticed; everything else is a ModelError."""
    raw, rng = all_operators(), random.Random(seed)
    refused = 0
    for _ in range(25):
        damaged = bytearray(raw)
        for _ in range(rng.choice((1, 3, 30))):
            damaged[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                load_graph(path)
            except ModelError:
                refused += 1
    assert refused


@pytest.mark.parametrize("content", [b"", b"\0", b"import torch\n" * 50, b"PK\3\4" + bytes(500), bytes(range(256)) * 9,
                                     b"\x0a" * 10000, b"\x3a\xff\xff\xff\xff\x0f"])
def test_foreign_files(content, path):
    rejected(path, content)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "absent.onnx", tmp_path):
        with pytest.raises(ModelError, match="cannot be read"):
            load_graph(path)


def test_enormous_file(path):
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ModelError, match="larger than"):
        load_graph(path)


@pytest.mark.parametrize("location", ["/etc/passwd", "../../secret", "weights.bin"])
def test_external_data_is_not_opened(location, path, proto):
    tensor = proto.graph.initializer[4]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    rejected(path, proto, "another file")


@pytest.mark.parametrize("dims", [[1 << 40], [1 << 62, 1 << 62], [-1], [1 << 20, 1 << 20], [1000], [0]])
def test_absurd_constant_shapes(dims, path, proto):
    tensor = proto.graph.initializer[4]
    del tensor.dims[:]
    tensor.dims.extend(dims)
    rejected(path, proto)


@pytest.mark.parametrize("shape", [[1, 3, 1 << 40, 8], [1, 4, 5000, 8], [1, 1 << 20, 8, 8], [2, 4, 6, 7], [1, 4, 6], [],
                                   [1, 0, 6, 7], [1, 4, -6, 7], [1, 4, "height", 7], [1, 4, None, 7]])
def test_absurd_or_dynamic_input_shapes(shape, path, proto):
    del proto.graph.input[:]
    proto.graph.input.append(helper.make_tensor_value_info("image", TensorProto.FLOAT, shape))
    rejected(path, proto, "shape|dynamic")


def test_integer_input(path, proto):
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.INT8
    rejected(path, proto, "float32")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("role", ["weights", "scale", "bias"])
def test_nan_and_infinity(value, role, path):
    b = Builder()
    weight, scale, bias = np.ones((4, 4, 1, 1)), np.ones((4, 1, 1, 1)), np.ones(4)
    {"weights": weight, "scale": scale, "bias": bias}[role].flat[1] = value
    output = b.quant(b.node("Conv", b.image, b.quant(b.constant(weight), scale), b.constant(bias)), 1.0)
    rejected(path, b.proto(output), "NaN or infinity")


@pytest.mark.parametrize("kind", [TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.STRING, 99])
def test_wrong_data_type(kind, path, proto):
    proto.graph.initializer[4].data_type = kind
    rejected(path, proto, "data type")


def test_integer_weights_in_a_float_place(path):
    b = Builder()
    weight = b.quant(b.constant(np.ones((4, 4, 1, 1)), np.int32), 1.0)
    rejected(path, b.proto(b.quant(b.node("Conv", b.image, weight), 1.0)), "float32")


def test_cycle(path, proto):
    nodes = {node.name: node for node in proto.graph.node}
    relu = next(node for node in proto.graph.node if node.op_type == "Relu")
    relu.input[0] = nodes["result"].output[0]
    rejected(path, proto, "own result")


def test_self_loop(path, proto):
    relu = next(node for node in proto.graph.node if node.op_type == "Relu")
    relu.input[0] = relu.output[0]
    rejected(path, proto, "own result")


def test_missing_initializer(path, proto):
    del proto.graph.initializer[4]
    rejected(path, proto, "nothing makes")


def test_missing_output(path, proto):
    proto.graph.output[0].name = "other"
    rejected(path, proto, "made by no node")


def test_constant_or_input_as_output(path, proto):
    for name in ("image", proto.graph.initializer[0].name):
        proto.graph.output[0].name = name
        rejected(path, proto, "computed by no node")


def test_no_output_no_input_no_nodes(path):
    for name in ("output", "input", "node"):
        proto = two_layers().proto("result")
        del getattr(proto.graph, name)[:]
        rejected(path, proto)


def test_tensor_made_twice(path, proto):
    proto.graph.node[-1].output[0] = proto.graph.node[2].output[0]
    rejected(path, proto, "made twice")


def test_initializer_defined_twice(path, proto):
    proto.graph.initializer.append(proto.graph.initializer[0])
    rejected(path, proto, "defined twice")


@pytest.mark.parametrize("version", [0, 9, 99])
def test_opset(version, path, proto):
    proto.opset_import[0].version = version
    rejected(path, proto, "opset")


def test_shapes_that_double_at_every_node(path):
    b = Builder()
    x = b.image
    for _ in range(60):
        x = b.node("Concat", x, x, axis=1)
    rejected(path, b.proto(x), "channels")
    b = Builder()
    x = b.image
    for _ in range(60):
        x = b.node("Resize", x, "", b.constant([1, 1, 2, 2]), mode="nearest", nearest_mode="floor",
                   coordinate_transformation_mode="asymmetric")
    rejected(path, b.proto(x), "rows and columns")


def test_very_many_nodes(path):
    node = helper.make_node("Identity", ["image"], ["x"])
    rejected(path, helper.make_model(helper.make_graph([node] * 20000, "many", [], [])), "nodes")


def test_deep_chain_is_no_recursion(path):
    b = Builder()
    x = b.image
    for _ in range(3000):
        x = b.node("Relu", x)
    path.write_bytes(b.proto(b.quant(x, 1.0, signed=0)).SerializeToString())
    assert len(load_graph(path).ops) == 1


def test_overflowing_bias(path):
    b = Builder()
    weight = b.quant(b.constant(np.ones((4, 4, 1, 1))), 1.0)
    output = b.quant(b.node("Conv", b.image, weight, b.constant(np.full(4, 1e30))), 1.0)
    rejected(path, b.proto(output), "overflow its 32-bit accumulator: channel 0")


def test_subgraph_attribute(path):
    b = Builder()
    body = two_layers().proto("result").graph
    output = b.node("If", b.constant(True, np.bool_), then_branch=body, else_branch=body)
    rejected(path, b.proto(output), "straight model")
