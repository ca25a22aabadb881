"""Small QONNX models, and a float oracle for them: ONNX' reference evaluator with a Quant of our own.

With scales and parameters that are powers of two every float of such a model is exact, so that integers computed
from it must be equal to ours, not merely close.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

QONNX = "qonnx.custom_op.general"
IMAGE_SCALE = 2.0**-7


class Builder:
    """A model under construction. Methods add a node and give the name of its (first) result."""

    def __init__(self, channels: int = 4, height: int = 6, width: int = 7, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.shape = [1, channels, height, width]
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.image = self.quant("image", IMAGE_SCALE, name="image.quant")

    def constant(self, value, dtype=np.float32) -> str:
        name = f"constant{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def node(self, operation: str, *inputs: str, name: str = "", outputs: int = 1, domain: str = "",
             **attributes) -> str:
        name = name or f"{operation.lower()}{len(self.nodes)}"
        names = [name, *(f"{name}.{index}" for index in range(1, outputs))]
        self.nodes.append(helper.make_node(operation, list(inputs), names, name, domain=domain, **attributes))
        return name

    def quant(self, x: str, scale=1.0, signed: int = 1, bits: int = 8, zero_point: float = 0.0, narrow: int = 0,
              rounding_mode: str = "ROUND", name: str = "") -> str:
        return self.node("Quant", x, self.constant(scale), self.constant(zero_point), self.constant(float(bits)),
                         name=name, domain=QONNX, signed=signed, narrow=narrow, rounding_mode=rounding_mode)

    def weights(self, *shape: int, bits: int = 4, narrow: int = 1) -> str:
        """Quantized weights whose scales are powers of two that differ between channels."""
        exponents = self.rng.integers(-4, -1, (shape[0], *(1,) * (len(shape) - 1)))
        limit = 1 << bits - 1
        codes = self.rng.integers(1 - limit if narrow else -limit, limit, shape)
        return self.quant(self.constant(codes * 2.0**exponents), 2.0**exponents, bits=bits, narrow=narrow)

    def conv(self, x: str, inputs: int, outputs: int, kernel: tuple[int, int] = (3, 3), bits: int = 4,
             bias: bool = True, narrow: int = 1, **attributes) -> str:
        """A convolution without its quantizer; `group=inputs` makes it depthwise."""
        weight = self.weights(outputs, inputs // attributes.get("group", 1), *kernel, bits=bits, narrow=narrow)
        operands = [self.constant(self.rng.integers(-64, 64, outputs) / 64)] if bias else []
        attributes.setdefault("pads", [kernel[0] // 2, kernel[1] // 2] * 2)
        return self.node("Conv", x, weight, *operands, **attributes)

    def proto(self, *outputs: str, opset: int = 19) -> onnx.ModelProto:
        def value(name: str, shape: list[int] | None) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        graph = helper.make_graph(self.nodes, "small", [value("image", self.shape)],
                                  [value(name, None) for name in outputs], self.initializers)
        imports = [helper.make_opsetid("", opset), helper.make_opsetid(QONNX, 2)]
        return helper.make_model(graph, opset_imports=imports, ir_version=9)

    def save(self, folder: Path, *outputs: str) -> Path:
        path = folder / "small.onnx"
        path.write_bytes(self.proto(*outputs).SerializeToString())
        return path


class Quant(OpRun):
    """Symmetric QONNX quantizer."""

    op_domain = QONNX

    def _run(self, x, scale, zero_point, bits, signed=1, narrow=0, rounding_mode="ROUND"):
        high = 2 ** (bits.item() - signed) - 1
        low = -high - 1 + narrow if signed else 0
        return ((np.rint(x / scale).clip(low, high) * scale).astype(np.float32),)


def oracle(proto: onnx.ModelProto, codes: np.ndarray) -> list[np.ndarray]:
    """Real values [H, W, C] of the outputs for image codes [H, W, C]."""
    image = (codes * IMAGE_SCALE).astype(np.float32).transpose(2, 0, 1)[None]
    results = ReferenceEvaluator(proto, new_ops=[Quant]).run(None, {"image": image})
    return [result[0].transpose(1, 2, 0) for result in results]


def two_layers(seed: int = 0) -> Builder:
    """Image -> 3x3 convolution, ReLU, quantizer `features` -> 1x1 convolution, quantizer `result`."""
    b = Builder(seed=seed)
    x = b.quant(b.node("Relu", b.conv(b.image, 4, 8)), 2.0**-4, signed=0, name="features")
    b.quant(b.conv(x, 8, 5, (1, 1)), 2.0**-3, name="result")
    return b
