"""Verdict: what becomes of each node of a user's model, said before anything is compiled."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from weft.arch.errors import ModelError


class Place(enum.Enum):
    """Where a node's work is done."""

    ENGINE = "engine"
    FOLDED = "folded"
    HOST = "host"
    IMPOSSIBLE = "impossible"


@dataclass(frozen=True)
class Verdict:
    """What becomes of one ONNX node. `detail`: the unit, what it is folded into or the reason; `rewrite`: a way out."""

    node: str
    operation: str
    place: Place
    detail: str
    rewrite: str = ""

    def __str__(self) -> str:
        text = f"{self.operation} '{self.node}': {self.place.value}, {self.detail}"
        return f"{text}; {self.rewrite}" if self.rewrite else text


class Unsupported(Exception):
    """The engine cannot do what a node asks: the reason, and what to write instead."""

    def __init__(self, reason: str, rewrite: str) -> None:
        super().__init__(reason)
        self.reason, self.rewrite = reason, rewrite


def require_supported(verdicts: Iterable[Verdict]) -> None:
    """Raises ModelError that names every impossible node, its reason and a rewrite."""
    impossible = [verdict for verdict in verdicts if verdict.place is Place.IMPOSSIBLE]
    if impossible:
        lines = "".join(f"\n  {verdict}" for verdict in impossible)
        raise ModelError(f"{len(impossible)} node{'s' * (len(impossible) > 1)} cannot run on this engine:{lines}")


def unsupported_operation(operation: str) -> Unsupported:
    """Reason and rewrite for an ONNX operation that no unit executes."""
    return _KNOWN.get(operation) or Unsupported(
        f"{operation} is not an operation of this engine", "write it with convolutions, ReLU, max pooling, "
        "nearest x2 upsampling and channel moves, or leave it out of the exported model and compute it on the host")


_AT_THE_END = "leave it out of the exported model and apply it on the host to the dequantized output"
_RELU = "train with ReLU, or with a clip (ReLU6)"
_AS_CONVOLUTION = "write it as a 1x1 convolution on a [1, channels, height, width] tensor"
_QONNX = "export with Quant nodes (brevitas.export.export_qonnx)"
_STATIC = "export with constant folding and fixed sizes, so that it disappears"

_KNOWN = {
    operation: Unsupported(reason, rewrite)
    for operations, reason, rewrite in (
        (("Sigmoid", "Softmax", "LogSoftmax", "ArgMax", "TopK", "NonMaxSuppression", "Exp"),
         "decoding is not done in integers", _AT_THE_END),
        (("HardSigmoid", "HardSwish", "LeakyRelu", "PRelu", "Elu", "Gelu", "Mish", "Softplus", "Tanh", "Erf", "Swish"),
         "ReLU and clips are the only activation functions", _RELU),
        (("Gemm", "MatMul"), "there is no linear layer of its own", _AS_CONVOLUTION),
        (("Flatten", "Squeeze", "Unsqueeze"), "tensors always have height, width and channels", _AS_CONVOLUTION),
        (("AveragePool", "GlobalAveragePool", "ReduceMean"), "there is no averaging unit",
         "write it as a depthwise convolution with constant weights 1/n, followed by a quantizer"),
        (("GlobalMaxPool", "ReduceMax"), "the pooling window must be given",
         "use MaxPool with a kernel of the image's size"),
        (("ConvTranspose",), "there is no transposed convolution", "use nearest x2 upsampling and a convolution"),
        (("LayerNormalization", "InstanceNormalization", "GroupNormalization"), "statistics are not computed",
         "use batch normalization after a convolution; it is folded away"),
        (("QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"),
         "the QDQ and integer dialects are not read", _QONNX),
        (("BipolarQuant", "Trunc", "FloatQuant", "MultiThreshold"), "only the Quant node is read",
         "use signed or unsigned integer quantizers of 2 to 8 bits, scale per tensor, zero point 0"),
        (("If", "Loop", "Scan"), "control flow cannot be scheduled ahead", "export a straight model"),
        (("Shape", "Cast", "Expand", "Tile", "Range", "ConstantOfShape", "Where"),
         "sizes are not computed at run time", _STATIC),
        (("Pad",), "padding belongs to the convolution", "give the convolution or pooling its pads instead"),
        (("DepthToSpace", "SpaceToDepth"), "pixels do not become channels", "use nearest x2 upsampling or stride 2"),
        (("GridSample", "RoiAlign"), "only DeformConv samples between pixels", "write it as DeformConv"),
    )
    for operation in operations
}
