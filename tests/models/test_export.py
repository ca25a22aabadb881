"""The exported QONNX, executed by other people's code, against the integer forward pass."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.transformation.infer_shapes import InferShapes

from tests.models.conftest import noise_images, tiny_config, tiny_model
from weft.arch import numerics
from weft.arch.errors import ModelError
from weft.models.codenet import CoDeNet, recorded, to_input
from weft.models.export import QONNX_DOMAIN, export_qonnx, export_with_codes

# The reference evaluator divides by zero on a map of one pixel and is slow, hence 64 pixels and few channels.
SMALL = {"size": 64, "conv5": 4, "decoder": (4, 4, 4)}


class Quant(OpRun):
    """QONNX Quant for ONNX' reference evaluator, from its specification."""

    op_domain = QONNX_DOMAIN

    def _run(self, x, scale, zero_point, bits, narrow=None, rounding_mode=None, signed=None):
        assert rounding_mode == "ROUND" and zero_point == 0
        low, high = (-(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        return ((np.clip(np.rint(x / scale), low, high) * scale).astype(np.float32),)


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """(model, exported network, codes, image) of a square network, shared because exporting is slow."""
    model = tiny_model(**SMALL)
    return model, *exported(model, tmp_path_factory.mktemp("square"))


def exported(model, tmp_path):
    images = noise_images(model.config.size)
    path = tmp_path / "model.onnx"
    codes = export_with_codes(model, images[0], path)
    return onnx.load(path), codes, to_input(images[:1]).numpy()


def constants(proto):
    return {init.name: numpy_helper.to_array(init) for init in proto.graph.initializer}


def run_layer_by_layer(proto, codes, image):
    """Execute node by node; after each quantizer compare codes, then continue from the integer machine's."""
    values, scales = {"image": image, "": None}, {}
    known = constants(proto)
    values.update(known)
    worst = {}
    for node in proto.graph.node:
        inputs = [name for name in node.input if name]
        graph = onnx.helper.make_graph(
            [node], "one", [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UNDEFINED, None) for n in inputs],
            [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UNDEFINED, None) for n in node.output],
        )  # fmt: skip
        one = onnx.helper.make_model(graph, opset_imports=proto.opset_import)
        results = ReferenceEvaluator(one, new_ops=[Quant]).run(None, {n: values[n] for n in inputs})
        for name, result in zip(node.output, results, strict=True):
            values[name] = result
        name = node.output[0]
        key = "image" if name == "image.quant" else name
        if node.op_type == "Quant" and key in codes:
            scales[name] = known[node.input[1]]
            worst[name] = np.abs(np.rint(values[name] / scales[name]) - codes[key]).max()
            values[name] = (codes[key] * scales[name]).astype(np.float32)
    return worst


@pytest.mark.parametrize("deform", ["square", "bounded"])
def test_every_layer_within_one_lsb_of_onnx_reference(deform, square, tmp_path):
    """Bound per layer, from equal inputs: 1 LSB (16-bit multiplier, float32 rounding); with interpolation also the
    rounding of the nine samples, half a code each, times |w| in output codes."""
    model, proto, codes, image = square
    if deform != "square":
        model = tiny_model(deform, **SMALL)
        proto, codes, image = exported(model, tmp_path)
    worst = run_layer_by_layer(proto, codes, image)
    assert len(worst) == len(model.layers()) + 1
    known = constants(proto)
    for name, error in worst.items():
        bound = 1
        if deform == "bounded" and name.endswith(".deform"):
            weight = np.abs(known[f"{name}.weight"]).sum((1, 2, 3)).max()
            level = int(name.split(".")[1])
            x = "conv5" if level == 0 else f"decoder.{level - 1}.conv"
            bound += int(np.ceil(0.5 * weight * known[f"{x}.scale"] / known[f"{name}.scale"]))
        assert error <= bound, (name, error, bound)


def test_whole_network_in_qonnx(tmp_path):
    """qonnx and onnxruntime on the variant without DeformConv, end to end.

    The first layer is within 1 LSB; single LSBs then drift through some 20 layers of random 4-bit weights (measured:
    at most 12 codes of 255).
    """
    proto, codes, image = exported(tiny_model("none"), tmp_path)
    wrapped = ModelWrapper(proto).transform(InferShapes())
    result = execute_onnx(wrapped, {"image": image}, return_full_exec_context=True)
    for name, largest, mean in (("stem", 1, 0.01), ("hm", 24, 6), ("wh", 24, 6), ("reg", 24, 6)):
        error = np.abs(np.rint(result[name] / constants(proto)[f"{name}.scale"]) - codes[name])
        assert error.max() <= largest and error.mean() <= mean, name


def test_conventions(square):
    model, proto, codes, _ = square
    onnx.checker.check_model(proto)
    graph, known = proto.graph, constants(proto)
    assert [value.name for value in graph.input] == ["image"]
    assert [value.name for value in graph.output] == ["hm", "wh", "reg"]
    assert not any(node.op_type == "BatchNormalization" for node in graph.node)
    assert next(o.version for o in proto.opset_import if not o.domain) >= 19
    producer = {name: node for node in graph.node for name in node.output}
    assert known["image.quant.scale"] == 1 / 128
    assert set(codes) - {"image"} <= set(producer)
    for node in graph.node:
        if node.op_type in ("Conv", "DeformConv"):
            weight = producer[node.input[1]]
            layer = dict(model.named_modules())[node.name.removesuffix(f".{node.op_type.lower()}")]
            assert weight.op_type == "Quant" and known[weight.input[1]].shape == (layer.conv.out_channels, 1, 1, 1)
            assert int(known[weight.input[3]]) == (8 if node.name == "stem.conv" else 4)
        if node.op_type == "Concat":
            left, right = (name for name in node.input)
            while left not in known and f"{left}.scale" not in known:
                left = producer[left].input[0]
            assert known[f"{left}.scale"] == known[f"{right}.scale"]
        if node.op_type == "DeformConv":
            mul = producer[node.input[2]]
            sub = producer[mul.input[0]]
            quant = producer[sub.input[0]]
            clip = producer[quant.input[0]]
            assert [mul.op_type, sub.op_type, quant.op_type, clip.op_type] == ["Mul", "Sub", "Quant", "Clip"]
            grid = [[ky, kx] for ky in (-1, 0, 1) for kx in (-1, 0, 1)]
            assert known[mul.input[1]].reshape(9, 2).tolist() == grid and known[sub.input[1]] == 1
            assert (known[clip.input[1]], known[clip.input[2]], known[quant.input[1]]) == (-7, 8, 1)


def test_bias_codes_reproduce_the_forward_pass(square):
    """One exported layer evaluated with integers from the file alone."""
    _, proto, codes, _ = square
    known = constants(proto)
    name, source = "conv5", "stages.2.blocks.1"
    scale_in, scale_out = float(known["stages.2.blocks.1.branch2.conv3.scale"]), float(known[f"{name}.scale"])
    weight_scale = known[f"{name}.weight_quant.scale"].reshape(-1)
    weight = np.rint(known[f"{name}.weight"][:, :, 0, 0] / weight_scale[:, None]).astype(np.int64)
    acc = np.einsum("oc,nchw->nohw", weight, codes[source].astype(np.int64))
    for channel, scale in enumerate(weight_scale):
        mult, shift = numerics.requantize_parameters(scale_in * float(scale) / scale_out)
        bias = numerics.bias_code(float(known[f"{name}.bias"][channel]), scale_in * float(scale))
        expected = numerics.requantize(acc[:, channel] + bias, mult, shift, 0, 255)
        np.testing.assert_array_equal(codes[name][:, channel], expected)


def test_same_model_same_bytes_and_no_partial_files(square, tmp_path):
    model, proto, codes, _ = square
    export_qonnx(tiny_model(**SMALL), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == proto.SerializeToString(deterministic=True)
    assert [path.name for path in tmp_path.iterdir()] == ["again.onnx"]
    with torch.no_grad(), recorded(model) as after:  # exporting leaves the model as it was
        model(to_input(noise_images(64)[:1]))
    assert all((after[name].numpy() == codes[name]).all() for name in codes if name != "image")


def test_float_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="quantize"):
        export_qonnx(CoDeNet(tiny_config()), tmp_path / "model.onnx")
