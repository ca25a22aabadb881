"""Batch normalization after a convolution becomes part of its scales, biases and signs of weights."""

from __future__ import annotations

import numpy as np

from weft.compiler.verdict import Unsupported


def fold_batchnorm(weight: np.ndarray, scale: np.ndarray, bias: np.ndarray, gain: np.ndarray, shift: np.ndarray,
                   bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`gain * (scale * acc + bias) + shift` as (weight, scale, bias) of another accumulator.

    weight: integers [channels, ...]; the others float64 [channels]. Scales stay positive: a negative gain
    negates the channel's weights, a zero gain clears them. Raises Unsupported where `bits` cannot hold -w.
    """
    sign = np.sign(gain).astype(weight.dtype)
    flipped = weight * sign.reshape(-1, *(1,) * (weight.ndim - 1))
    if flipped.size and flipped.max() >= 1 << bits - 1:
        channel = int(np.argmax(flipped.reshape(len(sign), -1).max(1)))
        raise Unsupported(f"negative gain of channel {channel} turns its weight {-(1 << bits - 1)} into one that "
                          f"{bits} bits cannot hold", "use narrow-range weights (Quant with narrow=1)")
    return flipped, np.where(gain == 0, scale, scale * np.abs(gain)), bias * gain + shift
