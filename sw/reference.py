"""Reference execution of a Graph by the golden operators: what every Device must reproduce, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from weft.arch.errors import ModelError
from weft.arch.isa import Sampling
from weft.compiler.graph import (
    Add,
    Channels,
    Conv,
    DeformConv,
    DeformDepthwise,
    Depthwise,
    Graph,
    MaxPool,
    Op,
    Requantize,
    Upsample,
    Window,
)
from weft.sim import golden


def evaluate(graph: Graph, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Codes int16 [height, width, channels] of every tensor, given the codes of the inputs.

    Raises ModelError for an input that is missing, of another shape or out of range.
    """
    codes: dict[str, np.ndarray] = {}
    for name in graph.inputs:
        tensor = graph.tensors[name]
        if name not in inputs:
            raise ModelError(f"input '{name}' is missing; give codes {list(tensor.shape)} (H, W, C)")
        image, (low, high) = inputs[name], tensor.limits
        if image.shape != tensor.shape or image.dtype.kind not in "iu" or not low <= image.min() <= image.max() <= high:
            raise ModelError(f"input '{name}' is {image.dtype}{list(image.shape)}; "
                             f"give integers {list(tensor.shape)} (H, W, C) within {low}..{high}")
        codes[name] = image.astype(np.int16)
    for op in graph.ops:
        codes[op.output] = _execute(op, [codes[name] for name in op.inputs]).astype(np.int16)
    return codes


def _execute(op: Op, inputs: list[np.ndarray]) -> np.ndarray:
    match op:
        case DeformConv() | DeformDepthwise():
            image, offsets = inputs
            depthwise = isinstance(op, DeformDepthwise)
            if op.deformable.sampling is Sampling.SQUARE:
                offsets = golden.square_offsets(offsets, op.window.kernel)
            return golden.deform_conv2d(
                image, op.weight[..., None] if depthwise else op.weight, offsets, op.deformable.fraction,
                *_constants(op.requantize), groups=image.shape[2] if depthwise else 1, **_geometry(op.window))
        case Conv():
            return golden.conv2d(*inputs, op.weight, *_constants(op.requantize), **_geometry(op.window))
        case Depthwise():
            return golden.depthwise_conv2d(*inputs, op.weight, *_constants(op.requantize), **_geometry(op.window))
        case MaxPool(window=window):
            return golden.max_pool(*inputs, window.kernel, stride=window.stride, pads=window.padding)
        case Upsample(factor=factor):
            return golden.upsample_nearest(*inputs, factor)
        case Add(weight=weight):
            return golden.add(*inputs, *weight.tolist(), *_constants(op.requantize))
        case Channels():
            return np.stack([inputs[s][:, :, i] for s, i in zip(op.source, op.index, strict=True)], axis=2)
    raise ModelError(f"operator '{op.name}' of type {type(op).__name__} has no golden operator")


def _constants(requantize: Requantize) -> tuple[np.ndarray, golden.Scale]:
    scale = golden.Scale(requantize.mult, requantize.shift, requantize.low, requantize.high)
    return requantize.bias.astype(np.int64), scale


def _geometry(window: Window) -> dict[str, tuple[int, ...]]:
    return {"stride": window.stride, "pads": window.padding, "dilation": window.dilation}
