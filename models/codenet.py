"""CoDeNet: ShuffleNetV2 backbone, deformable decoder, CenterNet heads (arXiv 2006.08357, the quantized network).

The image enters as codes `pixel - 128` of scale 1/128; the heads leave at 1/4 of its resolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from weft.arch.errors import ModelError
from weft.models.layers import (
    DEFORM_VARIANTS,
    Activation,
    ActivationQuantizer,
    DeformConv,
    MaxPool,
    OffsetConv,
    QuantLayer,
    SquareOffsets,
    Upsample,
)

INPUT_SCALE = 1 / 128
HEADS = ("hm", "wh", "reg")


@dataclass(frozen=True)
class CoDeNetConfig:
    """One member of the family; `size` is the square input in pixels, a multiple of 32."""

    name: str
    size: int = 512
    classes: int = 20
    stem_channels: int = 24
    stem_pool: bool = False  # stride 2 + max pool instead of stride 4
    stages: tuple[int, ...] = (116, 232, 464)
    repeats: tuple[int, ...] = (4, 8, 4)  # blocks per stage, the stride-2 block included
    conv5: int = 1024
    decoder: tuple[int, ...] = (256, 128, 64)
    head: int = 64
    deform: str = "square"
    depthwise: bool = True  # False: full 3x3 deformable convolution

    def __post_init__(self):
        if self.size <= 0 or self.size % 32:
            raise ModelError(f"{self.name}: input size {self.size} must be a positive multiple of 32")
        if self.deform not in DEFORM_VARIANTS:
            raise ModelError(f"{self.name}: deform {self.deform!r} must be one of {', '.join(DEFORM_VARIANTS)}")
        if len(self.stages) != 3 or len(self.repeats) != 3 or len(self.decoder) != 3:
            raise ModelError(f"{self.name}: stages, repeats and decoder need three entries each")
        if any(channels % 4 for channels in self.stages):
            raise ModelError(f"{self.name}: stage channels {self.stages} must be multiples of 4")

    @classmethod
    def from_dict(cls, fields: object) -> CoDeNetConfig:
        """From the fields as JSON gives them back (lists for tuples); ModelError if they are no configuration."""
        try:
            return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})
        except (TypeError, AttributeError) as error:
            raise ModelError(f"not a CoDeNet configuration ({error}): {str(fields)[:80]}") from error


_WIDE = {"stages": (244, 488, 976), "conv5": 2153}
CONFIGS = {
    config.name: config
    for config in (
        CoDeNetConfig("codenet-a", size=256),
        CoDeNetConfig("codenet-b", size=256, stem_pool=True),
        CoDeNetConfig("codenet-c"),
        CoDeNetConfig("codenet-d", **_WIDE),
        CoDeNetConfig("codenet-e", stem_pool=True, **_WIDE),
        CoDeNetConfig("codenet-nano", size=128, classes=10, stem_channels=16, stem_pool=True, stages=(64, 128, 256),
                      repeats=(2, 2, 2), conv5=256, decoder=(128, 64, 32), head=32),
    )
}  # fmt: skip


def config(name: str, **changes) -> CoDeNetConfig:
    """The named member, with fields changed; ModelError for an unknown name."""
    if name not in CONFIGS:
        raise ModelError(f"no model named {name!r}; known: {', '.join(CONFIGS)}")
    return replace(CONFIGS[name], **changes)


class InputQuantizer(nn.Module):
    """Float image (pixel - 128) / 128 -> int8 codes of scale 1/128."""

    def __init__(self):
        super().__init__()
        self.output = ActivationQuantizer(fixed_scale=INPUT_SCALE)
        self.quantized = False

    def forward(self, image: Tensor) -> Activation:
        return Activation(self.output.fake(image), self.output.scale) if self.quantized else Activation(image)


class ShuffleBlock(nn.Module):
    """ShuffleNetV2 unit; stride 2 transforms both branches, stride 1 passes half of the channels on."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        half = cout // 2
        self.stride = stride
        if stride == 2:
            self.branch1 = nn.ModuleDict({
                "conv1": QuantLayer(cin, cin, 3, 2, groups=cin, relu=False),
                "conv2": QuantLayer(cin, half, own_output=False),
            })  # fmt: skip
        self.branch2 = nn.ModuleDict({
            "conv1": QuantLayer(cin if stride == 2 else half, half),
            "conv2": QuantLayer(half, half, 3, stride, groups=half, relu=False),
            "conv3": QuantLayer(half, half, own_output=False),
        })  # fmt: skip

    def forward(self, x: Activation, output: ActivationQuantizer) -> Activation:
        branch2 = self.branch2
        if self.stride == 2:
            left = self.branch1["conv2"](self.branch1["conv1"](x), output)
            right = x
        else:
            left, right = (Activation(half, x.scale) for half in x.value.split(x.value.shape[1] // 2, 1))
        right = branch2["conv3"](branch2["conv2"](branch2["conv1"](right)), output)
        n, half, rows, cols = (int(size) for size in left.value.shape)
        both = torch.cat([left.value, right.value], 1).reshape(n, 2, half, rows, cols)
        return Activation(both.transpose(1, 2).reshape(n, 2 * half, rows, cols), right.scale)


class Stage(nn.Module):
    """Blocks that share one output quantizer: concatenation, shuffle and split then need no rescaling."""

    def __init__(self, cin: int, cout: int, repeats: int):
        super().__init__()
        self.output = ActivationQuantizer(relu=True)
        self.blocks = nn.ModuleList(
            ShuffleBlock(cin if i == 0 else cout, cout, 2 if i == 0 else 1) for i in range(repeats)
        )

    def forward(self, x: Activation) -> Activation:
        for block in self.blocks:
            x = block(x, self.output)
        return x


class DecoderLevel(nn.Module):
    """Offsets, depthwise (or full) deformable 3x3, 1x1, nearest 2x upsampling."""

    def __init__(self, cin: int, cout: int, variant: str, depthwise: bool):
        super().__init__()
        groups = cin if depthwise else 1
        if variant == "none":
            self.offset, self.deform = None, QuantLayer(cin, cin, 3, groups=groups, relu=False, norm=False)
        else:
            self.offset, self.deform = OffsetConv(cin, variant), DeformConv(cin, cin, groups)
        self.spread = SquareOffsets() if variant == "square" else nn.Identity()
        self.conv = QuantLayer(cin, cout)
        self.upsample = Upsample()

    def forward(self, x: Activation) -> Activation:
        offset = None if self.offset is None else self.spread(self.offset(x))
        return self.upsample(self.conv(self.deform(x, offset=offset)))


class Head(nn.Module):
    """1x1, depthwise 3x3, 1x1 with bias."""

    def __init__(self, cin: int, width: int, cout: int):
        super().__init__()
        self.conv1 = QuantLayer(cin, width)
        self.conv2 = QuantLayer(width, width, 3, groups=width)
        self.conv3 = QuantLayer(width, cout, relu=False, norm=False, bias=True)

    def forward(self, x: Activation) -> Activation:
        return self.conv3(self.conv2(self.conv1(x)))


class CoDeNet(nn.Module):
    """Image [N, 3, S, S], float (pixel - 128) / 128 -> hm [N, classes, S/4, S/4] logits, wh and reg [N, 2, S/4, S/4].

    wh and reg are in units of output pixels. Quantized after `fold`, `calibrate` and `quantize`.
    """

    def __init__(self, config: CoDeNetConfig):
        super().__init__()
        self.config = config
        self.image = InputQuantizer()
        stem_stride = 2 if config.stem_pool else 4
        self.stem = QuantLayer(3, config.stem_channels, 3, stem_stride, weight_bits=8)
        self.pool = MaxPool() if config.stem_pool else nn.Identity()
        inputs = (config.stem_channels, *config.stages)
        self.stages = nn.ModuleList(
            Stage(cin, cout, n) for cin, cout, n in zip(inputs, config.stages, config.repeats, strict=False)
        )
        self.conv5 = QuantLayer(config.stages[-1], config.conv5)
        inputs = (config.conv5, *config.decoder)
        self.decoder = nn.ModuleList(
            DecoderLevel(cin, cout, config.deform, config.depthwise)
            for cin, cout in zip(inputs, config.decoder, strict=False)
        )
        outputs = (config.classes, 2, 2)
        self.heads = nn.ModuleDict(
            {name: Head(config.decoder[-1], config.head, n) for name, n in zip(HEADS, outputs, strict=True)}
        )
        nn.init.constant_(self.heads["hm"].conv3.conv.bias, -2.19)  # sigmoid 0.1: rare objects

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(activation.value for activation in self.activations(image))

    def activations(self, image: Tensor) -> tuple[Activation, ...]:
        """The three heads as activations (codes and scales)."""
        x = self.pool(self.stem(self.image(image)))
        for stage in self.stages:
            x = stage(x)
        x = self.conv5(x)
        for level in self.decoder:
            x = level(x)
        return tuple(self.heads[name](x) for name in HEADS)

    @property
    def quantized(self) -> bool:
        """Whether the forward pass is the integer one."""
        return self.image.quantized

    def quantize(self, enabled: bool = True) -> CoDeNet:
        """Switch between float and quantized mode."""
        if enabled and any(layer.norm is not None for layer in self.layers()):
            raise ModelError("fold batch norm before quantizing: call fold()")
        for module in (self.image, *self.layers()):
            module.quantized = enabled
        return self

    def layers(self) -> list[QuantLayer]:
        """All convolutions in definition order."""
        return [module for module in self.modules() if isinstance(module, QuantLayer)]

    def fold(self) -> CoDeNet:
        """Fold every batch norm into its convolution."""
        for layer in self.layers():
            layer.fold()
        return self

    @torch.no_grad()
    def calibrate(self, images: Tensor, batch: int = 16) -> CoDeNet:
        """Set every activation scale from a float pass over images [N, 3, S, S]."""
        quantizers = [module for module in self.modules() if isinstance(module, ActivationQuantizer)]
        was_quantized, was_training = self.quantized, self.training
        self.quantize(False).eval()
        for quantizer in quantizers:
            quantizer.observing, quantizer.observed = True, 0.0
        for part in images.split(batch):
            self(part)
        for quantizer in quantizers:
            quantizer.calibrate()
            quantizer.observing = False
        return self.quantize(was_quantized).train(was_training)

    def complexity(self) -> tuple[int, int, int]:
        """(convolution layers, parameters with biases and batch norm folded, multiply-accumulates of one image)."""
        parameters = macs = 0
        counts = {}

        def count(layer, _inputs, output):
            counts[layer] = output.value.shape[2] * output.value.shape[3]

        layers = self.layers()
        hooks = [layer.register_forward_hook(count) for layer in layers]
        mode = self.training
        with torch.no_grad():
            self.eval()(torch.zeros(1, 3, self.config.size, self.config.size))
        self.train(mode)
        for hook in hooks:
            hook.remove()
        for layer in layers:
            conv = layer.conv
            parameters += conv.weight.numel() + (0 if conv.bias is None else conv.bias.numel())
            macs += conv.weight.numel() * counts[layer]
        return len(layers), parameters, macs


def to_input(images: np.ndarray) -> Tensor:
    """uint8 RGB images [N, S, S, 3] -> network input, float [N, 3, S, S]."""
    return (torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() - 128) * INPUT_SCALE


@contextmanager
def recorded(model: CoDeNet) -> Iterator[dict[str, Tensor]]:
    """Collect integer codes by tensor name (int64, NCHW) during quantized forward passes inside the block.

    Names are module paths and equal the tensor names of the exported QONNX: `stem`, `stages.0.blocks.1`, `hm`, ...
    """
    codes: dict[str, Tensor] = {}

    def hook(name):
        def record(_module, _inputs, output):
            if isinstance(output, Activation) and output.scale is not None:
                codes[name] = output.code

        return record

    handles = [
        module.register_forward_hook(hook(tensor_name(path)))
        for path, module in model.named_modules()
        if isinstance(module, QuantLayer | ShuffleBlock | MaxPool | SquareOffsets | Upsample | InputQuantizer)
    ]
    try:
        yield codes
    finally:
        for handle in handles:
            handle.remove()


def tensor_name(path: str) -> str:
    """Tensor name of a module's output: its path, except that heads are named after what they predict."""
    parts = path.split(".")
    return parts[1] if parts[0] == "heads" and parts[-1] == "conv3" else {"image": "image.quant"}.get(path, path)


@torch.no_grad()
def random_model(config: CoDeNetConfig, images: np.ndarray, seed: int = 0) -> CoDeNet:
    """A quantized member with random weights, for benchmarks; batch norm and scales fit `images` (uint8 NHWC).

    Offsets vary over the image: their convolution gets weights that spread them over a few pixels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CoDeNet(config)
        for layer in model.layers():
            nn.init.kaiming_normal_(layer.conv.weight, nonlinearity="relu")
            if isinstance(layer, OffsetConv):
                layer.conv.weight.mul_(1.5)
    norms = [layer.norm for layer in model.layers() if layer.norm is not None]
    for norm in norms:
        norm.momentum = None  # cumulative average: statistics of exactly these images
    inputs = to_input(images)
    model.train()(inputs)
    model.eval().fold()
    return model.calibrate(inputs).quantize()
