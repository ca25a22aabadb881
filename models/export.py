"""Export of a quantized model to QONNX, by Brevitas' exporter, then renamed into the conventions of the compiler.

* One input `image` [1, 3, S, S] float, then Quant(signed 8 bit, scale 1/128). Outputs `hm`, `wh`, `reg`.
* Conv/DeformConv weight = Quant(float initializer, per-channel scale [O, 1, 1, 1], 4 or 8 bit signed, zero point 0);
  the optional float bias is `numerics.bias_code(bias, s_in * s_weight[c])` in the integer machine.
* Output = Quant, directly (signed) or after Relu (unsigned) or Clip (square dilation); round half to even.
* Tensors that a `recorded` forward pass collects carry the same names: module paths.
"""

from __future__ import annotations

import io
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from brevitas.export import export_qonnx as brevitas_export
from onnx import numpy_helper

from weft.arch.errors import ModelError
from weft.arch.program import write_atomically
from weft.models.codenet import HEADS, CoDeNet, recorded, tensor_name, to_input

OPSET = 19  # the first with DeformConv
QONNX_DOMAIN = "qonnx.custom_op.general"
PASS_THROUGH = ("Relu", "Clip")  # between a convolution and its quantizer

MODULE_RESULTS = ("MaxPool", "Resize", "Mul")  # the result of the module they stand in; so is a shuffle's last Reshape
CONSTANT_ROLES = {
    "Quant": ("", "scale"),
    "Clip": ("", "low", "high"),
    "Reshape": ("", "shape"),
    "Split": ("", "sizes"),
    "Resize": ("", "roi", "scales"),
    "Sub": ("", "one"),
    "Mul": ("", "grid"),
}


def export_qonnx(model: CoDeNet, path: str | os.PathLike) -> onnx.ModelProto:
    """Write the quantized model to `path` (atomically) and return it; ModelError if it is not quantized yet.

    The same model gives the same bytes.
    """
    if not model.quantized:
        raise ModelError("only a quantized model can be exported: call fold(), calibrate(images) and quantize() first")
    image = torch.zeros(1, 3, model.config.size, model.config.size)
    training = model.training
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        proto = brevitas_export(
            model.eval(), image, export_path=os.path.join(folder, "model.onnx"), opset_version=OPSET, dynamo=False,
            input_names=["image"], output_names=list(HEADS),
        )  # fmt: skip
    model.train(training)
    proto = _renamed(proto)
    proto.graph.name = model.config.name
    onnx.checker.check_model(proto)
    write_atomically(path, proto.SerializeToString(deterministic=True))
    return proto


def _module_path(scope: str) -> str:
    """`/stages.0/blocks.0/branch2.conv1/conv/Conv` -> `stages.0.blocks.0.branch2.conv1.conv`.

    The tracer repeats the parent's name in children of containers (`/decoder/decoder.0`).
    """
    parts: list[str] = []
    for part in scope.strip("/").split("/")[:-1]:
        if parts and part.startswith(parts[-1] + "."):
            parts.pop()
        parts.append(part)
    return ".".join(parts)


def _renamed(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Nodes and tensors named after module paths, one initializer per use, no unused ones, no initializer inputs."""
    graph = proto.graph
    constants = {init.name: numpy_helper.to_array(init) for init in graph.initializer}
    followers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            followers.setdefault(name, set()).add(node.op_type)
    layer_of: dict[str, str] = {}  # old tensor name -> layer whose result it is on the way to be
    new_name = {"image": "image"}
    used: set[str] = set(new_name.values())
    initializers: dict[str, np.ndarray] = {}

    def unique(name: str) -> str:
        candidate, count = name, 1
        while candidate in used:
            count += 1
            candidate = f"{name}.{count}"
        used.add(candidate)
        return candidate

    for node in graph.node:
        path, kind = _module_path(node.name), node.op_type
        if kind == "Quant" and node.input[0] in constants:  # the weight's own name is the module path
            layer = layer_of[node.output[0]] = node.input[0].removesuffix(".conv.weight")
            name = unique(f"{layer}.weight_quant")
        elif kind in ("Conv", "DeformConv"):
            layer = layer_of[node.output[0]] = layer_of[node.input[1]]
            name = unique(f"{layer}.{kind.lower()}")
        elif kind in PASS_THROUGH:
            layer = layer_of[node.output[0]] = layer_of[node.input[0]]
            name = unique(f"{layer}.{kind.lower()}")
        elif kind == "Quant":
            name = unique(tensor_name(layer_of.get(node.input[0], "image")))
        elif kind in MODULE_RESULTS or (kind == "Reshape" and "Transpose" not in followers[node.output[0]]):
            name = unique(path)
        else:
            name = unique(f"{path}.{kind.lower()}")
        for index, old in enumerate(node.input):
            if old not in constants:
                node.input[index] = new_name.get(old, old)
                continue
            if kind == "Conv" or (kind == "Quant" and index == 0):  # weight and bias keep their module path
                new = old.replace(".conv.weight", ".weight").replace(".conv.bias", ".bias")
            elif kind == "Quant" and index == 2:
                new = "zero_point"
            elif kind == "Quant" and index == 3:
                new = f"bits_{int(constants[old])}"
            else:
                new = f"{name}.{CONSTANT_ROLES[kind][index]}"
            initializers[new] = constants[old]
            node.input[index] = new
        outputs = [name] if len(node.output) == 1 else [f"{name}.{index}" for index in range(len(node.output))]
        for old, new in zip(node.output, outputs, strict=True):
            new_name[old] = new
        node.name = name
        del node.output[:]
        node.output.extend(outputs)
    del graph.initializer[:]
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in initializers.items())
    kept = [value for value in graph.input if value.name == "image"]
    del graph.input[:], graph.value_info[:]
    graph.input.extend(kept)
    proto.producer_name, proto.producer_version = "weft", ""
    return proto


def export_with_codes(model: CoDeNet, pixels: np.ndarray, path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Export to `path` and, beside it as .npz, the integer codes of every layer for one uint8 RGB image [S, S, 3].

    Keys are tensor names of the QONNX, arrays NCHW (int16, so that signed and unsigned codes fit); key `image` holds
    the int8 input codes `pixel - 128`, NCHW as well.
    """
    export_qonnx(model, path)
    with torch.no_grad(), recorded(model) as codes:
        model.eval()(to_input(pixels[None]))
    arrays = {name: code.numpy().astype(np.int16) for name, code in codes.items()}
    arrays["image"] = arrays.pop("image.quant").astype(np.int8)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_atomically(Path(path).with_suffix(".npz"), content.getvalue())
    return arrays
