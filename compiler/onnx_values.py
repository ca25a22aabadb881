"""Value: what a tensor of an ONNX model stands for while the model is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from weft.compiler.graph import Add, Conv, Depthwise, Tensor


@dataclass(frozen=True)
class Image:
    """A float input, before its quantizer."""

    name: str
    height: int
    width: int
    channels: int


@dataclass(frozen=True)
class Weights:
    """A quantized constant: integer codes, float64 scale [1] or [channels], bits 4 or 8."""

    codes: np.ndarray
    scale: np.ndarray
    bits: int


@dataclass(frozen=True)
class Sum:
    """An accumulator before its quantizer: real value = scale[c] * (weight . codes) + bias[c] within [low, high]."""

    kind: type[Conv | Depthwise | Add]
    name: str
    inputs: tuple[str, ...]
    height: int
    width: int
    weight: np.ndarray  # [channels, ...], for Add [2]
    scale: np.ndarray  # float64 [channels]
    bias: np.ndarray  # float64 [channels]
    fields: dict[str, Any] = field(default_factory=dict)
    low: float = -math.inf
    high: float = math.inf

    @property
    def clamped(self) -> bool:
        """Whether an activation function follows already."""
        return (self.low, self.high) != (-math.inf, math.inf)


@dataclass(frozen=True)
class View:
    """A quantized tensor whose channel axis is reshaped: channel numbers in an array of any rank."""

    tensor: Tensor
    index: np.ndarray


@dataclass(frozen=True)
class Square:
    """The square operator's offsets in the making: dilation - 1, times `grid` once it is known."""

    dilation: Tensor
    grid: np.ndarray | None = None


class Unknown:
    """Result of a node that is impossible."""


Value: TypeAlias = np.ndarray | Tensor | Image | Weights | Sum | View | Square | Unknown


def kind_of(value: Value | None) -> str:
    """What a value is, in the user's words."""
    match value:
        case None:
            return "left out"
        case Tensor():
            return "a quantized tensor"
        case Image():
            return "the image before its quantizer"
        case Sum():
            return f"the result of '{value.name}' before a quantizer"
        case Weights():
            return "a quantized constant"
        case View():
            return "a tensor with reshaped channels"
        case Square():
            return "an offset computed from a dilation"
    return "a constant"
