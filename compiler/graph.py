"""Graph: typed operators on quantized tensors, what the importers make and the passes rewrite.

Tensors are [height, width, channels] of integer codes; a real value is code * scale. An operator names its
input and output tensors; operators stand in execution order. The engine's arithmetic is already chosen:
weights are integers, `bias` is in accumulator units, (mult, shift) requantize the accumulator.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from weft.arch.isa import Sampling
from weft.arch.numerics import S8, U8


@dataclass(frozen=True)
class Tensor:
    """A tensor of 8-bit codes: int8, or uint8 when `unsigned`."""

    name: str
    height: int
    width: int
    channels: int
    scale: float
    unsigned: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.height, self.width, self.channels

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return U8 if self.unsigned else S8


@dataclass(frozen=True)
class Op:
    """Base of all operators. `name` is the node's name in the user's model."""

    name: str
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Window:
    """Kernel geometry of convolutions and pooling; padding as (top, left, bottom, right)."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        (ky, kx), (sy, sx), (dy, dx), (top, left, bottom, right) = self.kernel, self.stride, self.dilation, self.padding
        return (height + top + bottom - dy * (ky - 1) - 1) // sy + 1, (
            width + left + right - dx * (kx - 1) - 1
        ) // sx + 1


@dataclass(frozen=True)
class Requantize:
    """Accumulator to code, per output channel: bias int32 [C], mult uint16 [C], shift uint8 [C], clamp [low, high]."""

    bias: np.ndarray
    mult: np.ndarray
    shift: np.ndarray
    low: int
    high: int


@dataclass(frozen=True)
class Conv(Op):
    """Convolution over all input channels. `weight` int8 [O, kernel_y, kernel_x, I], `bits` 4 or 8."""

    window: Window
    weight: np.ndarray
    bits: int
    requantize: Requantize


@dataclass(frozen=True)
class Depthwise(Op):
    """Depthwise convolution. `weight` int8 [C, kernel_y, kernel_x]."""

    window: Window
    weight: np.ndarray
    bits: int
    requantize: Requantize


@dataclass(frozen=True)
class Deformable:
    """How a deformable convolution samples: `inputs[1]` of its operator holds the offset codes.

    SQUARE: one code per pixel, the dilation. OFFSETS: 2*taps codes, (dy, dx) of each tap, in units of
    2**-fraction pixels; `reach` is the largest |offset| in whole pixels that the clamp allows.
    """

    sampling: Sampling
    fraction: int
    reach: int


@dataclass(frozen=True)
class DeformConv(Conv):
    """Full deformable convolution: inputs (image, offsets)."""

    deformable: Deformable


@dataclass(frozen=True)
class DeformDepthwise(Depthwise):
    """Depthwise deformable convolution: inputs (image, offsets)."""

    deformable: Deformable


@dataclass(frozen=True)
class MaxPool(Op):
    """Largest code of each window; padding never wins."""

    window: Window


@dataclass(frozen=True)
class Upsample(Op):
    """Nearest-neighbour enlargement by `factor` in both directions."""

    factor: int


@dataclass(frozen=True)
class Add(Op):
    """Elementwise sum: requantize(mult_a*a + mult_b*b); `weight` int8 [2] are the two multipliers."""

    weight: np.ndarray
    requantize: Requantize


@dataclass(frozen=True)
class Channels(Op):
    """Channel split, concatenation and shuffle in one: output channel i is channel `index[i]` of `inputs[source[i]]`.

    No arithmetic and, on the engine, no copy: producers write each channel where its readers want it.
    """

    source: tuple[int, ...]
    index: tuple[int, ...]


@dataclass
class Graph:
    """A network: tensors by name, operators in execution order, names of inputs and outputs."""

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def producer(self, tensor: str) -> Op | None:
        return next((op for op in self.ops if op.output == tensor), None)

    def consumers(self, tensor: str) -> list[Op]:
        return [op for op in self.ops if tensor in op.inputs]

    def macs(self, op: Op) -> int:
        """Useful multiply-accumulates of one operator, padding not counted."""
        out = self.tensors[op.output]
        pixels = out.height * out.width
        if isinstance(op, (Conv, Depthwise)):
            return pixels * op.weight.size
        return 0

    def __str__(self) -> str:
        """One line per operator, for people and golden files."""
        lines = [f"graph {self.name}"]
        lines += [f"  input {name} {_describe(self.tensors[name])}" for name in self.inputs]
        for op in self.ops:
            lines.append(
                f"  {op.output} {_describe(self.tensors[op.output])} = {type(op).__name__}({', '.join(op.inputs)})"
            )
        lines += [f"  output {name}" for name in self.outputs]
        return "\n".join(lines)


def _describe(tensor: Tensor) -> str:
    return f"{'u8' if tensor.unsigned else 's8'}[{tensor.height},{tensor.width},{tensor.channels}]"
