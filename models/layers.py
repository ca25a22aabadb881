"""Brevitas layers whose quantized forward pass is the integer arithmetic of `arch/numerics.py`.

A layer is a convolution, optionally batch norm and ReLU, and an output quantizer. It runs in one of two modes:

* float: plain convolution, batch norm, ReLU; for pretraining, and for calibration once batch norm is folded;
* quantized: the integer path gives the value, bit for bit what the engine computes, and the differentiable
  fake-quantized path of Brevitas the gradient: `fake + (exact - fake).detach()`. In training mode the value is that
  of the fake path too: it is within 1 LSB and twice as fast.

Tensors travel as `Activation`: NCHW float values together with their scale. Shapes below are NCHW.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import brevitas.nn as qnn
import torch
import torch.nn.functional as F
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat
from torch import Tensor, nn

from weft.arch import numerics
from weft.arch.errors import ModelError

MIN_WEIGHT_RANGE = 2.0**-16  # max|w| of an all-zero channel; keeps bias codes within int32
EXACT_FLOAT32 = 1 << 23  # integers below this survive float32 sums with a bit to spare
SQUARE_RANGE = (-7, 8)  # integer dilation of the square operator
BOUNDED_FRACTION_BITS = 4  # int8 sixteenths: [-8, 7.9375]
DEFORM_VARIANTS = ("none", "original", "bounded", "square")


class Activation(NamedTuple):
    """Values [N, C, H, W] and their float32 scale (None in float mode); value = code * scale."""

    value: Tensor
    scale: Tensor | None = None

    @property
    def code(self) -> Tensor:
        """Integer codes, int64."""
        return torch.round(self.value / self.scale).long()

    def map(self, function) -> Activation:
        """Apply a function that only moves or selects values (pool, upsample, slice)."""
        return Activation(function(self.value), self.scale)


class ActivationQuantizer(nn.Module):
    """Per-tensor 8-bit quantizer: unsigned after ReLU, signed otherwise; zero point 0.

    `fixed_scale` freezes the scale, otherwise it is calibrated and then learned. `clip` narrows the code range of a
    quantizer of scale 1.
    """

    def __init__(self, relu: bool = False, fixed_scale: float | None = None, clip: tuple[int, int] | None = None):
        super().__init__()
        self.relu, self.clip, self.fixed = relu, clip, fixed_scale is not None
        self.power_of_two = False  # set by layers whose codes are sample positions
        self.levels = 255 if relu else 128
        layer, quant = (qnn.QuantReLU, Uint8ActPerTensorFloat) if relu else (qnn.QuantIdentity, Int8ActPerTensorFloat)
        scale = fixed_scale or 1 / self.levels
        self.quant = layer(act_quant=quant, scaling_impl_type="parameter", scaling_init=scale * self.levels)
        self.low, self.high = clip or (numerics.U8 if relu else numerics.S8)
        self.observing, self.observed = False, 0.0

    @property
    def _threshold(self) -> nn.Parameter:
        return self.quant.act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value

    @property
    def scale(self) -> Tensor:
        """The scale, a float32 scalar tensor."""
        return self.quant.act_quant.scale()

    def freeze(self) -> None:
        """Keep training away from a scale that is not to be learned; Brevitas forgets this when a state is loaded."""
        self._threshold.requires_grad_(not (self.fixed or self.power_of_two))

    def calibrate(self) -> None:
        """Take the scale from what was observed (power-of-two scales are rounded up, fraction bits in [0, 4])."""
        if self.fixed or not self.observed:
            return
        scale = self.observed / (255 if self.relu else 127)
        if self.power_of_two:
            scale = 2.0 ** min(0, max(-numerics.FRACTION_BITS, math.ceil(math.log2(scale))))
        with torch.no_grad():
            self._threshold.fill_(scale * self.levels)

    def restrict(self, value: Tensor) -> Tensor:
        """The float meaning of the layer's non-linearity."""
        if self.relu:
            value = F.relu(value)
        if self.observing and not self.fixed:
            flat = value.detach().abs().flatten()
            peak = flat.kthvalue(max(1, math.ceil(flat.numel() * 0.9999))).values
            self.observed = max(self.observed, float(peak))
        return value.clamp(self.low * self.scale, self.high * self.scale) if self.fixed else value

    def fake(self, value: Tensor) -> Tensor:
        """Brevitas fake quantization; its straight-through gradient."""
        value = value.clamp(*self.clip) if self.clip else value
        quantized = self.quant(value)
        return getattr(quantized, "value", quantized)


class QuantLayer(nn.Module):
    """Convolution [+ batch norm] [+ ReLU] + quantizer: x [N, Cin, H, W] -> [N, Cout, H/stride, W/stride].

    Weights are signed, symmetric per output channel, scale = max|w| / (2**(bits-1) - 1); padding keeps the size.
    With `own_output=False` the caller passes the quantizer, so that several layers can share one scale.
    """

    def __init__(self, cin: int, cout: int, kernel: int = 1, stride: int = 1, groups: int = 1, *, relu: bool = True,
                 norm: bool = True, bias: bool = False, weight_bits: int = 4, own_output: bool = True,
                 output: ActivationQuantizer | None = None):  # fmt: skip
        super().__init__()
        self.conv = qnn.QuantConv2d(
            cin, cout, kernel, stride, kernel // 2, groups=groups, bias=bias or norm,
            weight_quant=Int8WeightPerChannelFloat, weight_bit_width=weight_bits,
            weight_scaling_min_val=MIN_WEIGHT_RANGE,
        )  # fmt: skip
        self.norm = nn.BatchNorm2d(cout) if norm else None
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        self.output = (output or ActivationQuantizer(relu)) if own_output else None
        self.quantized = False

    def fold(self) -> None:
        """Fold batch norm into the convolution; the eval-mode float function is unchanged."""
        if self.norm is None:
            return
        with torch.no_grad():
            gain = self.norm.weight / torch.sqrt(self.norm.running_var + self.norm.eps)
            self.conv.weight.mul_(gain[:, None, None, None])
            self.conv.bias.copy_(self.norm.bias + (self.conv.bias - self.norm.running_mean) * gain)
        self.norm = None

    def multiply(self, samples, weight: Tensor) -> Tensor:
        """The layer's sum of products without bias; linear in both arguments."""
        conv = self.conv
        return F.conv2d(samples, weight, None, conv.stride, conv.padding, 1, conv.groups)

    def products(self, x: Activation, weight: Tensor, offset: Activation | None) -> Tensor:
        """Sum of products of float values, differentiable."""
        return self.multiply(x.value, weight)

    def samples(self, x: Activation, offset: Activation | None) -> Tensor:
        """What the weights multiply, as float tensor of integer codes."""
        return torch.round(x.value / x.scale)

    def forward(self, x: Activation, output: ActivationQuantizer | None = None,
                offset: Activation | None = None) -> Activation:  # fmt: skip
        output = output or self.output
        bias = None if self.conv.bias is None else self.conv.bias[:, None, None]
        if not self.quantized:
            y = self.products(x, self.conv.weight, offset)
            y = y if bias is None else y + bias
            return Activation(output.restrict(y if self.norm is None else self.norm(y)))
        if self.conv.weight_quant.export_mode:
            return Activation(output.fake(self.trace(x.value, None if offset is None else offset.value)), x.scale)
        weight = self.conv.quant_weight()
        if self.training:
            return Activation(self.fake(x, weight.value, output, offset, bias), output.scale)
        exact = Activation(self.exact(x, weight, output, offset) * output.scale, output.scale)
        if not torch.is_grad_enabled():
            return exact
        fake = self.fake(x, weight.value, output, offset, bias)
        return Activation(fake + (exact.value - fake).detach(), output.scale)

    def fake(self, x: Activation, weight: Tensor, output: ActivationQuantizer, offset: Activation | None,
             bias: Tensor | None) -> Tensor:  # fmt: skip
        """Fake-quantized output values, differentiable."""
        y = self.products(x, weight, offset)
        return output.fake(y if bias is None else y + bias)

    def trace(self, value: Tensor, offset: Tensor | None) -> Tensor:
        """The layer as the ONNX exporter is to see it."""
        return self.conv(value)

    @torch.no_grad()
    def exact(self, x: Activation, weight, output: ActivationQuantizer, offset: Activation | None) -> Tensor:
        """Output codes (float tensor of integers), computed with integers only."""
        code = torch.round(weight.value / weight.scale)
        samples = self.samples(x, offset)
        # Sums of integers are exact in float32 while they stay small, and convolve fastest there.
        if code.abs().sum((1, 2, 3)).max() * 255 >= EXACT_FLOAT32:
            samples, code = samples.double(), code.double()
        acc = torch.round(self.multiply(samples, code)).long()
        bias, mult, shift = self.constants(x.scale, weight.scale, output.scale)
        return numerics.requantize(acc + bias, mult, shift, output.low, output.high).float()

    def constants(self, s_in: Tensor, s_weight: Tensor, s_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(bias code, mult, shift), int64 [Cout, 1, 1] each, from float32 scales by float64 arithmetic."""
        acc_scales = [float(s_in) * scale for scale in s_weight.flatten().tolist()]
        biases = [0.0] * len(acc_scales) if self.conv.bias is None else self.conv.bias.tolist()
        codes = [numerics.bias_code(b, s) for b, s in zip(biases, acc_scales, strict=True)]
        pairs = [numerics.requantize_parameters(s / float(s_out)) for s in acc_scales]
        mult, shift = zip(*pairs, strict=True)
        return tuple(torch.tensor(column)[:, None, None] for column in (codes, mult, shift))


# --- deformable convolution ---------------------------------------------------------------------------------


def tap_grid(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Integer sample rows and columns of an undeformed 3x3, pad 1 convolution: two int64 [9, H, W], row-major taps."""
    ky, kx = torch.meshgrid(torch.arange(-1, 2), torch.arange(-1, 2), indexing="ij")
    y = torch.arange(rows)[None, :, None] + ky.reshape(9, 1, 1)
    x = torch.arange(cols)[None, None, :] + kx.reshape(9, 1, 1)
    return y.expand(9, rows, cols), x.expand(9, rows, cols)


def pixel_index(y: Tensor, x: Tensor, rows: int, cols: int) -> Tensor:
    """Row of `pixel_rows` that holds integer position y, x [N, 9, H, W]: int64 of the same shape."""
    n = y.shape[0]
    inside = (y >= 0) & (y < rows) & (x >= 0) & (x < cols)
    first = torch.arange(n).reshape(n, 1, 1, 1) * (rows * cols)
    return torch.where(inside, first + y * cols + x, n * rows * cols)


def pixel_rows(image: Tensor) -> Tensor:
    """image [N, C, H, W] as [N * H * W + 1, C]; the last row is the 0 outside the image."""
    return F.pad(image.permute(0, 2, 3, 1).reshape(-1, image.shape[1]), (0, 0, 0, 1))


def gather(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """image [N, C, H, W] at integer y, x [N, 9, H, W] -> [N, 9, H, W, C]; 0 outside the image."""
    index = pixel_index(y, x, *image.shape[2:])
    return pixel_rows(image).index_select(0, index.flatten()).reshape(*y.shape, -1)


def sample_float(image: Tensor, offset: Tensor) -> Tensor:
    """Differentiable bilinear samples [N, 9, H, W, C] of image [N, C, H, W] at offset [N, 18, H, W].

    Offsets are in pixels, (dy, dx) interleaved, taps row-major (ONNX DeformConv, torchvision). At integer positions
    the derivative is the forward difference: the surrogate gradient of the square operator.
    """
    grid_y, grid_x = tap_grid(*image.shape[2:])
    y, x = grid_y + offset[:, 0::2], grid_x + offset[:, 1::2]
    y0, x0 = y.detach().floor(), x.detach().floor()
    fy, fx = (y - y0)[..., None], (x - x0)[..., None]
    y0, x0 = y0.long(), x0.long()
    v00, v01 = gather(image, y0, x0), gather(image, y0, x0 + 1)
    v10, v11 = gather(image, y0 + 1, x0), gather(image, y0 + 1, x0 + 1)
    top, bottom = v00 + fx * (v01 - v00), v10 + fx * (v11 - v10)
    return top + fy * (bottom - top)


class DepthwiseIntegerDeform(torch.autograd.Function):
    """`sample_float` and depthwise multiplication for integer offsets, tap by tap: temporaries stay in the cache.

    (image [N, C, H, W], weight [C, 1, 3, 3], offset [N, 18, H, W]) -> [N, C, H, W].
    """

    @staticmethod
    def forward(ctx, image, weight, offset):
        n, channels, rows, cols = ctx.shape = image.shape
        grid_y, grid_x = tap_grid(rows, cols)
        y, x = (grid_y + offset[:, 0::2]).long(), (grid_x + offset[:, 1::2]).long()
        here, below, right = (
            pixel_index(*position, rows, cols).transpose(0, 1).reshape(9, -1)
            for position in ((y, x), (y + 1, x), (y, x + 1))
        )
        pixels, taps = pixel_rows(image), weight.reshape(channels, 9).T.contiguous()
        out = pixels.new_zeros(n * rows * cols, channels)
        for k in range(9):
            out.addcmul_(pixels.index_select(0, here[k]), taps[k])
        ctx.save_for_backward(pixels, taps, here, below, right)
        return out.reshape(n, rows, cols, channels).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, gradient):
        pixels, taps, here, below, right = ctx.saved_tensors
        n, channels, rows, cols = ctx.shape
        gradient = gradient.permute(0, 2, 3, 1).reshape(-1, channels).contiguous()
        d_pixels, d_taps = torch.zeros_like(pixels), torch.empty_like(taps)
        d_offset = gradient.new_empty(18, len(gradient))
        for k in range(9):
            sample, scaled = pixels.index_select(0, here[k]), gradient * taps[k]
            d_pixels.index_add_(0, here[k], scaled)
            d_taps[k] = (gradient * sample).sum(0)
            d_offset[2 * k] = (scaled * (pixels.index_select(0, below[k]) - sample)).sum(1)
            d_offset[2 * k + 1] = (scaled * (pixels.index_select(0, right[k]) - sample)).sum(1)
        d_image = d_pixels[:-1].reshape(n, rows, cols, channels).permute(0, 3, 1, 2)
        d_weight = d_taps.T.reshape(channels, 1, 3, 3)
        return d_image, d_weight, d_offset.reshape(18, n, rows, cols).transpose(0, 1)


def sample_code(image: Tensor, offset: Tensor, fraction_bits: int) -> Tensor:
    """Integer samples [N, 9, H, W, C] of codes image [N, C, H, W] at offset codes [N, 18, H, W] of scale 2**-f."""
    grid_y, grid_x = tap_grid(*image.shape[2:])
    y0, fy = numerics.split_position(grid_y, offset[:, 0::2], fraction_bits)
    x0, fx = numerics.split_position(grid_x, offset[:, 1::2], fraction_bits)
    v00 = gather(image, y0, x0)
    if fraction_bits == 0:  # positions are integers: the other three neighbours have weight 0
        return v00
    v01, v10, v11 = gather(image, y0, x0 + 1), gather(image, y0 + 1, x0), gather(image, y0 + 1, x0 + 1)
    return numerics.bilinear(v00, v01, v10, v11, fy[..., None], fx[..., None])


def fraction_bits(scale: Tensor) -> int:
    """f of an offset scale 2**-f."""
    return 1 - math.frexp(float(scale))[1]


class DeformConvFunction(torch.autograd.Function):
    """Stands for ONNX DeformConv (3x3, stride 1, pad 1) while a model is traced for export."""

    @staticmethod
    def symbolic(g, value, weight, offset, groups):
        y = g.op("DeformConv", value, weight, offset, dilations_i=[1, 1], group_i=groups, kernel_shape_i=[3, 3],
                 offset_group_i=1, pads_i=[1, 1, 1, 1], strides_i=[1, 1])  # fmt: skip
        y.setType(value.type().with_sizes([1, weight.type().sizes()[0], *value.type().sizes()[2:]]))
        return y

    @staticmethod
    def forward(ctx, value, weight, offset, groups):
        return F.conv2d(value, weight, padding=1, groups=groups) + 0 * offset.sum()


class OffsetConv(QuantLayer):
    """1x1 convolution that predicts sample offsets: x [N, C, H, W] -> [N, 18, H, W] in pixels, or [N, 1, H, W].

    square: one integer dilation per pixel in [-7, 8], scale 1 (see `SquareOffsets`). bounded: 18 offsets, scale 1/16.
    original: 18 offsets, scale 2**-f with f in [0, 4] calibrated.
    """

    def __init__(self, cin: int, variant: str):
        if variant not in DEFORM_VARIANTS[1:]:
            raise ModelError(f"offsets of variant {variant!r}: expected one of {', '.join(DEFORM_VARIANTS[1:])}")
        square = variant == "square"
        scale = {"square": 1.0, "bounded": 2.0**-BOUNDED_FRACTION_BITS, "original": None}[variant]
        output = ActivationQuantizer(fixed_scale=scale, clip=SQUARE_RANGE if square else None)
        output.power_of_two = True
        super().__init__(cin, 1 if square else 18, norm=False, bias=True, output=output)
        nn.init.zeros_(self.conv.weight)
        nn.init.constant_(self.conv.bias, 1.0 if square else 0.0)


class SquareOffsets(nn.Module):
    """Dilation s [N, 1, H, W] -> offsets [N, 18, H, W]: tap (ky, kx) is displaced by (s - 1) * (ky, kx).

    s = 1 is the plain 3x3 kernel, s = 0 samples the centre nine times, negative s mirrors the kernel.
    """

    def __init__(self):
        super().__init__()
        taps = torch.tensor([[ky, kx] for ky in (-1, 0, 1) for kx in (-1, 0, 1)], dtype=torch.float32)
        self.register_buffer("grid", taps.reshape(1, 18, 1, 1), persistent=False)

    def forward(self, s: Activation) -> Activation:
        value = s.value
        if s.scale is None:  # an integer dilation in float mode too, so that quantization does not change it
            value = value + (torch.round(value) - value).detach()
        return Activation((value - 1) * self.grid, s.scale)


class DeformConv(QuantLayer):
    """3x3 convolution sampled at offsets [N, 18, H, W]; depthwise if groups = channels. No batch norm, no ReLU."""

    def __init__(self, cin: int, cout: int, groups: int = 1):
        super().__init__(cin, cout, 3, groups=groups, relu=False, norm=False)
        if groups not in (1, cin) or (groups == cin and cin != cout):
            raise ModelError(f"deformable convolution {cin}->{cout} must be full or depthwise, got groups={groups}")

    def products(self, x: Activation, weight: Tensor, offset: Activation | None) -> Tensor:
        if self.conv.groups > 1 and torch.equal(offset.value, offset.value.round()):
            return DepthwiseIntegerDeform.apply(x.value, weight, offset.value)
        return self.multiply(sample_float(x.value, offset.value), weight)

    def samples(self, x: Activation, offset: Activation | None) -> Tensor:
        return sample_code(x.code, offset.code, fraction_bits(offset.scale)).float()

    def multiply(self, samples: Tensor, weight: Tensor) -> Tensor:
        if self.conv.groups > 1:
            y = (samples * weight.reshape(-1, 9).T[:, None, None]).sum(1)
        else:
            y = torch.einsum("nkhwc,ock->nhwo", samples, weight.flatten(2))
        return y.permute(0, 3, 1, 2)

    def trace(self, value: Tensor, offset: Tensor) -> Tensor:
        weight = self.conv.quant_weight()
        return DeformConvFunction.apply(value, getattr(weight, "value", weight), offset, self.conv.groups)


class MaxPool(nn.Module):
    """3x3 maximum, stride 2, pad 1."""

    def forward(self, x: Activation) -> Activation:
        return x.map(lambda v: F.max_pool2d(v, 3, 2, 1))


class Upsample(nn.Module):
    """Nearest neighbour, twice the size."""

    def forward(self, x: Activation) -> Activation:
        return x.map(lambda v: F.interpolate(v, scale_factor=2, mode="nearest"))
