"""What a legal Graph is. Checked after the import and after every pass, so that a fault is found where it arises."""

from __future__ import annotations

import enum
import math
from collections import Counter

import numpy as np

from weft.arch.errors import ModelError
from weft.arch.isa import Sampling
from weft.arch.numerics import ACC_MAX, ACC_MIN, FRACTION_BITS, MAX_SHIFT, accumulator_bounds
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
    Tensor,
    Upsample,
)


class Stage(enum.IntEnum):
    """How far a Graph has come; each stage keeps what the ones before it promise."""

    IMPORTED = 0  # as the user wrote it
    COLLAPSED = 1  # no Channels reads a Channels, and each of its inputs is used
    LIVE = 2  # every operator serves an output


def check(graph: Graph, stage: Stage = Stage.IMPORTED) -> None:
    """Raises ModelError naming the operator or tensor that is illegal at this stage, and why."""
    _check_names(graph)
    for op in graph.ops:
        _check_op(graph, op)
    if stage >= Stage.COLLAPSED:
        made_by = {op.output: op for op in graph.ops}
        for op in graph.ops:
            if isinstance(op, Channels):
                _require(not any(isinstance(made_by.get(name), Channels) for name in op.inputs), op,
                         "reads another Channels")
                _require(set(op.source) == set(range(len(op.inputs))), op, "has an input that it does not use")
    if stage >= Stage.LIVE:
        read = set(graph.outputs).union(*(op.inputs for op in graph.ops))
        for op in graph.ops:
            _require(op.output in read, op, f"computes '{op.output}', which nothing reads")


def _require(condition: bool, op: Op, reason: str) -> None:
    if not condition:
        raise ModelError(f"{type(op).__name__} '{op.name}' {reason}")


def _check_names(graph: Graph) -> None:
    """Tensors are defined before use, once, and none is left over."""
    repeated = [name for name, count in Counter(op.name for op in graph.ops).items() if count > 1]
    if repeated:
        raise ModelError(f"graph '{graph.name}': several operators are named '{repeated[0]}'")
    known = set(graph.inputs)
    for op in graph.ops:
        for name in op.inputs:
            _require(name in known, op, f"reads '{name}', which is not made before it")
        _require(op.output not in known, op, f"makes '{op.output}' a second time")
        known.add(op.output)
    for name in graph.outputs:
        if name not in known:
            raise ModelError(f"graph '{graph.name}': output '{name}' is made by no operator")
    if different := sorted(known ^ graph.tensors.keys()):
        raise ModelError(f"graph '{graph.name}': tensor '{different[0]}' is not both declared and made")
    for name, tensor in graph.tensors.items():
        if name != tensor.name or min(tensor.shape) < 1 or not (math.isfinite(tensor.scale) and tensor.scale > 0):
            raise ModelError(f"tensor '{name}' is illegal: {tensor}")


def _check_op(graph: Graph, op: Op) -> None:
    inputs, out = [graph.tensors[name] for name in op.inputs], graph.tensors[op.output]
    counts = {DeformConv: 2, DeformDepthwise: 2, Add: 2, Channels: len(inputs)}
    _require(len(inputs) == counts.get(type(op), 1) and len(inputs) > 0, op, f"has {len(inputs)} inputs")
    image = inputs[0]
    match op:
        case Conv() | Depthwise():
            _check_convolution(op, image, out)
            if isinstance(op, DeformConv | DeformDepthwise):
                _check_offsets(op, inputs[1], out)
        case MaxPool():
            _check_moved(op, inputs, out)
            _require(op.window.dilation == (1, 1), op, "pools with a dilation")
            _require((*op.window.output_size(image.height, image.width), image.channels) == out.shape, op,
                     f"cannot give {out.shape}")
        case Upsample():
            _check_moved(op, inputs, out)
            enlarged = image.height * op.factor, image.width * op.factor, image.channels
            _require(op.factor >= 2 and enlarged == out.shape, op,
                     f"enlarges {image.shape} to {out.shape} by {op.factor}")
        case Add():
            _require(inputs[0].shape == inputs[1].shape == out.shape, op, "adds tensors of different shapes")
            _require(op.weight.dtype == np.int8 and op.weight.shape == (2,), op, "needs two int8 weights")
            _check_requantize(op, op.requantize, out)
            ends = [sorted(int(weight) * limit for limit in tensor.limits)
                    for weight, tensor in zip(op.weight, inputs, strict=True)]
            least, most = (sum(pair) for pair in zip(*ends, strict=True))
            for channel, bias in enumerate(op.requantize.bias.tolist()):
                _require_range(op, channel, least + bias, most + bias)
        case Channels():
            _check_moved(op, inputs, out)
            _require(len(op.source) == len(op.index) == out.channels, op,
                     f"lists {len(op.source)} sources for {out.channels} channels")
            for source, index in zip(op.source, op.index, strict=True):
                _require(0 <= source < len(inputs) and 0 <= index < inputs[source].channels, op,
                         f"takes channel {index} of input {source}, which does not exist")
            _require(all((tensor.height, tensor.width) == (out.height, out.width) for tensor in inputs), op,
                     "joins tensors of different sizes")
        case _:
            raise ModelError(f"operator '{op.name}' of unknown type {type(op).__name__}")


def _check_moved(op: Op, inputs: list[Tensor], out: Tensor) -> None:
    """Operators without arithmetic keep codes, so scale and sign stay."""
    for tensor in inputs:
        _require((tensor.scale, tensor.unsigned) == (out.scale, out.unsigned), op,
                 f"changes the scale or sign of '{tensor.name}'; share one quantizer")


def _check_convolution(op: Conv | Depthwise, image: Tensor, out: Tensor) -> None:
    window, (ky, kx) = op.window, op.window.kernel
    shape = (out.channels, ky, kx, image.channels) if isinstance(op, Conv) else (out.channels, ky, kx)
    _require(op.weight.dtype == np.int8 and op.weight.shape == shape, op,
             f"has weights {op.weight.dtype}{list(op.weight.shape)}, needs int8{list(shape)}")
    _require(isinstance(op, Conv) or image.channels == out.channels, op, "changes the number of channels")
    _require(min(window.kernel + window.stride + window.dilation) >= 1 and min(window.padding) >= 0, op,
             f"has an illegal {window}")
    _require(window.output_size(image.height, image.width) == (out.height, out.width), op,
             f"cannot give {out.height} x {out.width} pixels from {image.height} x {image.width} with {window}")
    _require(op.bits in (4, 8), op, f"has weights of {op.bits} bits; 4 and 8 exist")
    limit = 1 << op.bits - 1
    _require(-limit <= op.weight.min() and op.weight.max() < limit, op, f"has weights outside {op.bits} bits")
    _check_requantize(op, op.requantize, out)
    flat = op.weight.reshape(out.channels, -1).astype(np.int64)
    # Weights of one sign reach their extremes together, so two sums per channel stand for all of them.
    parts = np.stack([flat.clip(min=0).sum(1), flat.clip(max=0).sum(1)], 1).tolist()
    for channel, (sums, bias) in enumerate(zip(parts, op.requantize.bias.tolist(), strict=True)):
        _require_range(op, channel, *accumulator_bounds(sums, *image.limits, bias))


def _require_range(op: Op, channel: int, least: int, most: int) -> None:
    _require(least >= ACC_MIN and most <= ACC_MAX, op,
             f"can overflow its 32-bit accumulator: channel {channel} reaches {least}..{most}; "
             "use smaller weights or a smaller bias, or calibrate the scales again")


def _check_requantize(op: Op, requantize: Requantize, out: Tensor) -> None:
    for name, dtype in (("bias", np.int32), ("mult", np.uint16), ("shift", np.uint8)):
        values = getattr(requantize, name)
        _require(values.dtype == dtype and values.shape == (out.channels,), op,
                 f"has {name} {values.dtype}{list(values.shape)}, needs {np.dtype(dtype)}[{out.channels}]")
    _require(int(requantize.shift.max()) <= MAX_SHIFT, op, f"shifts by more than {MAX_SHIFT}")
    _require(out.limits[0] <= requantize.low <= requantize.high <= out.limits[1], op,
             f"clamps to {requantize.low}..{requantize.high}, outside the codes of '{out.name}'")


def _check_offsets(op: DeformConv | DeformDepthwise, offsets: Tensor, out: Tensor) -> None:
    deformable, (ky, kx) = op.deformable, op.window.kernel
    square = deformable.sampling is Sampling.SQUARE
    _require(deformable.sampling in (Sampling.SQUARE, Sampling.OFFSETS), op, "does not deform")
    _require((offsets.height, offsets.width) == (out.height, out.width), op,
             "has offsets of another size than its result")
    wanted = 1 if square else 2 * ky * kx
    _require(offsets.channels == wanted, op, f"has {offsets.channels} offsets per pixel, needs {wanted}")
    _require(not offsets.unsigned, op, "has unsigned offsets")
    _require(0 <= deformable.fraction <= FRACTION_BITS and offsets.scale == 2.0**-deformable.fraction, op,
             f"has offsets of scale {offsets.scale:g} with {deformable.fraction} fraction bits")
    _require(deformable.reach >= 0, op, f"has reach {deformable.reach}")
    _require(not square or (ky * kx % 2 == 1 and op.window.dilation == (1, 1) and deformable.fraction == 0), op,
             "samples a square with an even kernel, a dilation or a fraction")
