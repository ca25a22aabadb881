"""Golden operators: what each layer must give, bit for bit, on plain arrays without engine, tiles or addresses.

Tensors are integer arrays [H, W, C] of codes. Every operator with weights ends in a requantization by `Scale`;
`RAW` leaves the int32 accumulator as it is. Loops run over kernel taps, arrays over pixels and channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from weft.arch import numerics
from weft.arch.errors import ModelError

Pair = tuple[int, int]
Pads = tuple[int, int, int, int]  # top, left, bottom, right: the order of ONNX


@dataclass(frozen=True)
class Scale:
    """From accumulator to code: mult and shift (ints or int arrays [C]), then the smallest and largest code."""

    mult: np.ndarray | int
    shift: np.ndarray | int
    low: int
    high: int


RAW = Scale(1, 0, numerics.ACC_MIN, numerics.ACC_MAX)


def requantize(acc: np.ndarray, scale: Scale) -> np.ndarray:
    """Codes of accumulators [..., C]. Raises ModelError when one does not fit int32."""
    if acc.size and not numerics.ACC_MIN <= acc.min() <= acc.max() <= numerics.ACC_MAX:
        raise ModelError(f"accumulator reaches {acc.min()}..{acc.max()}, outside int32; use smaller weights")
    return numerics.requantize(acc, np.asarray(scale.mult, np.int64), np.asarray(scale.shift, np.int64),
                               scale.low, scale.high)


def conv2d(
    x: np.ndarray, weights: np.ndarray, bias: np.ndarray | int = 0, scale: Scale = RAW, *,
    stride: Pair = (1, 1), pads: Pads = (0, 0, 0, 0), dilation: Pair = (1, 1),
) -> np.ndarray:
    """Convolution, cross-correlation as in ONNX: x [H, W, I], weights [O, kh, kw, I], bias [O] -> [OH, OW, O]."""
    if np.abs(weights.astype(np.int64)).sum() * _reach(x) >= 1 << 53:
        raise ModelError("convolution sums do not fit 53 bits; use smaller weights")
    acc = sum(  # float64, exact below 2**53, because NumPy multiplies integer matrices slowly
        window.astype(np.float64) @ weights[:, ky, kx].T.astype(np.float64)
        for ky, kx, window in _windows(x, weights.shape[1:3], stride, pads, dilation, outside=0)
    )
    return requantize(acc.astype(np.int64) + bias, scale)


def depthwise_conv2d(
    x: np.ndarray, weights: np.ndarray, bias: np.ndarray | int = 0, scale: Scale = RAW, *,
    stride: Pair = (1, 1), pads: Pads = (0, 0, 0, 0), dilation: Pair = (1, 1),
) -> np.ndarray:
    """Convolution of every channel on its own: x [H, W, C], weights [C, kh, kw], bias [C] -> [OH, OW, C]."""
    acc = sum(
        window * weights[:, ky, kx].astype(np.int64)
        for ky, kx, window in _windows(x, weights.shape[1:3], stride, pads, dilation, outside=0)
    )
    return requantize(acc + bias, scale)


def deform_conv2d(
    x: np.ndarray, weights: np.ndarray, offsets: np.ndarray, fraction: int, bias: np.ndarray | int = 0,
    scale: Scale = RAW, *, mask: np.ndarray | None = None, groups: int = 1, offset_groups: int = 1,
    stride: Pair = (1, 1), pads: Pads = (0, 0, 0, 0), dilation: Pair = (1, 1),
) -> np.ndarray:
    """Deformable convolution: x [H, W, I], weights [O, kh, kw, I/groups], bias [O] -> [OH, OW, O].

    `offsets` [OH, OW, offset_groups*kh*kw*2] are integers in units of 2**-fraction pixels, (dy, dx) for each tap in
    raster order. Samples are bilinear, rounded half-even to a code; neighbours outside the image count as zero
    (ONNX DeformConv). `mask` [OH, OW, offset_groups*kh*kw] multiplies the samples by integers; the accumulator
    then carries the mask's scale too. A depthwise layer has groups = I = O.
    """
    _, kh, kw, per_group = weights.shape
    out_height, out_width = offsets.shape[:2]
    offsets = offsets.reshape(out_height, out_width, offset_groups, kh, kw, 2).astype(np.int64)
    taps = offsets.shape[:-1]
    factors = np.ones(taps, np.int64) if mask is None else mask.reshape(taps).astype(np.int64)
    grid_y = (np.arange(out_height) * stride[0] - pads[0])[:, None]
    grid_x = (np.arange(out_width) * stride[1] - pads[1])[None, :]
    channels = np.split(x.astype(np.int64), offset_groups, axis=2)
    kernels = weights.reshape(groups, -1, kh, kw, per_group).astype(np.int64)
    acc = np.zeros((out_height, out_width, weights.shape[0]), np.int64)
    for ky in range(kh):
        for kx in range(kw):
            y, x0 = grid_y + ky * dilation[0], grid_x + kx * dilation[1]
            samples = np.concatenate([
                _bilinear(part, y, x0, offsets[:, :, g, ky, kx], fraction) * factors[:, :, g, ky, kx, None]
                for g, part in enumerate(channels)
            ], axis=2).reshape(out_height, out_width, groups, per_group)
            acc += np.einsum("yxgi,goi->yxgo", samples, kernels[:, :, ky, kx]).reshape(acc.shape)
    return requantize(acc + bias, scale)


def square_offsets(dilation_map: np.ndarray, kernel: Pair) -> np.ndarray:
    """Whole-pixel offsets [H, W, kh*kw*2] that give the pixel at (y, x) a kernel of dilation dilation_map[y, x, 0].

    For `deform_conv2d` with fraction 0 and dilation 1; a negative dilation mirrors the kernel about its centre.
    """
    steps = np.stack(np.meshgrid(*(np.arange(size) - size // 2 for size in kernel), indexing="ij"), axis=-1)
    return (dilation_map.astype(np.int64) - 1) * steps.reshape(-1)


def max_pool(x: np.ndarray, kernel: Pair, *, stride: Pair = (1, 1), pads: Pads = (0, 0, 0, 0)) -> np.ndarray:
    """Largest code of every window: [H, W, C] -> [OH, OW, C]. Padding never wins."""
    lowest = np.iinfo(np.int64).min
    return np.max([window for *_, window in _windows(x, kernel, stride, pads, (1, 1), lowest)], axis=0)


def upsample_nearest(x: np.ndarray, factor: int) -> np.ndarray:
    """Every pixel repeated factor x factor times: [H, W, C] -> [factor*H, factor*W, C]."""
    return x.repeat(factor, axis=0).repeat(factor, axis=1)


def add(
    a: np.ndarray, b: np.ndarray, weight_a: np.ndarray | int, weight_b: np.ndarray | int,
    bias: np.ndarray | int = 0, scale: Scale = RAW,
) -> np.ndarray:
    """Elementwise weight_a*a + weight_b*b + bias: the weights (ints or [C]) bring both operands to one scale."""
    return requantize(a.astype(np.int64) * weight_a + b.astype(np.int64) * weight_b + bias, scale)


def channel_shuffle(x: np.ndarray, groups: int) -> np.ndarray:
    """ShuffleNet's shuffle: channel g*n + i of [H, W, groups*n] becomes channel i*groups + g."""
    height, width, channels = x.shape
    return x.reshape(height, width, groups, -1).swapaxes(2, 3).reshape(height, width, channels)


def _reach(x: np.ndarray) -> int:
    return int(np.abs(x.astype(np.int64)).max(initial=0))


def _windows(x, kernel, stride, pads, dilation, outside):
    """For every tap (ky, kx) the int64 pixels [OH, OW, C] that it meets."""
    top, left, bottom, right = pads
    padded = np.pad(x.astype(np.int64), ((top, bottom), (left, right), (0, 0)), constant_values=outside)
    rows, columns = ((size - (k - 1) * d - 1) // s + 1
                     for size, k, s, d in zip(padded.shape, kernel, stride, dilation, strict=False))
    if rows < 1 or columns < 1:
        raise ModelError(f"a kernel {tuple(kernel)} with dilation {dilation} does not fit the padded image "
                         f"{padded.shape[:2]}; use a smaller kernel or more padding")
    for ky in range(kernel[0]):
        for kx in range(kernel[1]):
            y, x0 = ky * dilation[0], kx * dilation[1]
            yield ky, kx, padded[y : y + (rows - 1) * stride[0] + 1 : stride[0],
                                 x0 : x0 + (columns - 1) * stride[1] + 1 : stride[1]]


def _bilinear(x: np.ndarray, grid_y: np.ndarray, grid_x: np.ndarray, offset: np.ndarray, fraction: int) -> np.ndarray:
    """Samples [OH, OW, C] of x [H, W, C] at grid + offset [OH, OW, 2] / 2**fraction."""
    height, width = x.shape[:2]
    y, fine_y = numerics.split_position(grid_y, offset[..., 0], fraction)
    x0, fine_x = numerics.split_position(grid_x, offset[..., 1], fraction)

    def pixel(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        return np.where(inside[..., None], x[row.clip(0, height - 1), column.clip(0, width - 1)], 0)

    corners = (pixel(y + down, x0 + right) for down in (0, 1) for right in (0, 1))
    return numerics.bilinear(*corners, fine_y[..., None], fine_x[..., None])
