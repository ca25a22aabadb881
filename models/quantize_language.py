"""Quantization of LFM2 by Brevitas: int4 weights in groups with integer group factors, int8 rows; then all in integers.

`quantized` makes the fake-quantized network, in which linear layers, queries, keys and values are Brevitas modules.
`integer_model` reads their codes and scales, finds scales of the other operators by what passes the network's probes,
and hands both over as a LanguageModel.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import brevitas.nn as qnn
import numpy as np
import torch
import torch.nn.functional as F
from brevitas.proxy.groupwise_int_parameter_quant import GroupwiseWeightQuantProxyFromInjector
from brevitas.proxy.runtime_quant import DynamicActQuantProxyFromInjector
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat
from brevitas.quant.base import ScalingPerOutputType
from torch import Tensor, nn

from weft.arch import language
from weft.arch.errors import ModelError
from weft.arch.language import FACTOR_MAX, GROUP, LanguageConfig, LanguageModel, Linear, Norm
from weft.arch.numerics import INT16, MAX_SHIFT
from weft.models.lfm2 import Attention, GatedConv, Layer, Lfm2, Probe

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # advice to install a package for GPUs
    from brevitas.graph.gptq import GPTQ, gptq_mode

SCALE_BITS = 12  # of a row's scale: code (4) * factor (8) * scale is then exact in float32
SMALLEST_SCALE = 2.0**-40  # of a row of zeros
CODES = (-8, 7)
NARROWEST, CANDIDATES = 0.6, 13  # smallest group scale tried, relative to the one that clips nothing; how many
CHUNK = 1 << 18  # weights searched at a time: temporaries stay in the cache
PEAK = INT16[1]


@dataclass(frozen=True)
class Options:
    """How to quantize. `calibration` are tokens int [n], random ones if None."""

    calibration: np.ndarray | None = None
    length: int = 256  # tokens of a calibration sequence
    sequences: int = 32  # as many of them at most, evenly spread
    candidates: int = CANDIDATES  # group scales tried for the least squared error; 1: the one that clips nothing
    gptq: bool = False
    headroom: float = 2.0  # range of int16 features over the largest value in calibration
    seed: int = 0


def quantize(config: LanguageConfig, state: Mapping[str, Any], options: Options = Options()) -> LanguageModel:
    """The integer model of a float one; `state` holds the tensors of `Lfm2(config)`.

    Raises ModelError for tensors that are missing, of another shape or not finite.
    """
    samples = calibration(config, options)
    model = quantized(config, state, options.candidates)
    if options.gptq:
        apply_gptq(model, samples)
    return integer_model(model, samples, options.headroom)


def calibration(config: LanguageConfig, options: Options = Options()) -> Tensor:
    """Calibration sequences int64 [sequences, length]. Raises ModelError for tokens outside the vocabulary."""
    length = min(options.length, config.context)
    if options.calibration is None:
        generator = torch.Generator().manual_seed(options.seed)
        return torch.randint(config.vocab, (1, length), generator=generator)
    text = torch.as_tensor(np.asarray(options.calibration, np.int64))
    if text.ndim != 1 or not len(text):
        raise ModelError(f"{config.name}: calibration tokens must be integers [n] with n > 0, got {list(text.shape)}")
    length = min(length, len(text))
    count = min(options.sequences, len(text) // length)
    first = torch.linspace(0, len(text) - length, count).long()
    return text[first[:, None] + torch.arange(length)]


def random_state(config: LanguageConfig, seed: int = 0) -> dict[str, Tensor]:
    """Float weights of the right shapes, drawn so that features neither vanish nor grow."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Lfm2(config).state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        if name == "head.weight":
            state[name] = state["embedding.weight"]
        elif len(shape) == 1:
            state[name] = 1 + 0.1 * torch.randn(shape, generator=generator)
        else:
            last = name.endswith(("out_proj.weight", "w2.weight"))
            size = math.prod(shape[1:]) * (2 * len(config.layers) if last else 1)
            state[name] = torch.randn(shape, generator=generator).mul_(size**-0.5)
    return state


# --- quantizers ---------------------------------------------------------------------------------------------


def group_scales(weight: Tensor, candidates: int = CANDIDATES) -> tuple[Tensor, Tensor]:
    """Factors [out, groups] in 1..255 and row scales [out], both float32, of weights [out, in].

    Of `candidates` factors for a group, the one with the least squared error; the scale of a row is that which maps
    its largest weight to 7, and has SCALE_BITS bits.
    """
    rows, columns = weight.shape
    padded = F.pad(weight.detach(), (0, -columns % GROUP)).unflatten(1, (-1, GROUP))
    peaks = padded.abs().amax(2)
    mantissa, exponent = torch.frexp(peaks.amax(1) / (CODES[1] * FACTOR_MAX))
    scale = torch.ldexp((mantissa * (1 << SCALE_BITS)).round(), exponent - SCALE_BITS).clamp_min(SMALLEST_SCALE)
    widest = peaks / (CODES[1] * scale[:, None])
    if candidates == 1:
        return widest.round().clamp(1, FACTOR_MAX), scale
    factors = torch.empty_like(widest)
    for first in range(0, rows, step := max(1, CHUNK // columns)):
        part = slice(first, first + step)
        units = padded[part] / scale[part, None, None]
        best = torch.full_like(widest[part], math.inf)
        for ratio in torch.linspace(NARROWEST, 1, candidates):
            factor = (widest[part] * ratio).round_().clamp_(1, FACTOR_MAX)
            codes = (units / factor[..., None]).round_().clamp_(*CODES)
            error = codes.mul_(factor[..., None]).sub_(units).square_().sum(2)
            better = error < best
            factors[part] = torch.where(better, factor, factors[part])
            best = torch.where(better, error, best)
    return factors, scale


class GroupFactors(nn.Module):
    """Brevitas scaling of a weight [out, in]: integer factor of a group * scale of its row, fixed by `fit`."""

    def __init__(self, tracked_parameter_list: list[nn.Parameter]):
        super().__init__()
        (weight,) = tracked_parameter_list
        rows, columns = weight.shape
        self.register_buffer("factors", weight.new_ones(rows, -(-columns // GROUP)))
        self.register_buffer("scale", weight.new_ones(rows))

    def fit(self, weight: Tensor, candidates: int) -> None:
        self.factors, self.scale = group_scales(weight, candidates)

    def forward(self, weight: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The scale of every group, [out, groups, 1]."""
        return (self.factors * self.scale[:, None])[..., None]


class GroupWeight(Int8WeightPerChannelFloat):
    """Brevitas quantizer of weights: int4 in -8..7, in groups of 32 along the inputs, scaled by GroupFactors."""

    proxy_class = GroupwiseWeightQuantProxyFromInjector
    scaling_per_output_type = ScalingPerOutputType.GROUP
    scaling_impl = GroupFactors
    group_size, group_dim = GROUP, 1
    bit_width, narrow_range = 4, False


class RowPeak(nn.Module):
    """Brevitas scaling of activations [..., n]: the largest magnitude of a row."""

    def __init__(self):  # Brevitas injects by the names of its arguments
        super().__init__()

    def forward(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        peak = x.detach().abs().amax(-1, keepdim=True).clamp_min(SMALLEST_SCALE)
        return peak if threshold is None else peak / threshold


class RowActivation(Int8ActPerTensorFloat):
    """Brevitas quantizer of activations: int8 in -127..127, with a scale per row found at run time."""

    proxy_class = DynamicActQuantProxyFromInjector
    scaling_impl = RowPeak
    narrow_range = True


class TiedEmbedding(nn.Module):
    """Rows of the quantized weight of the layer that makes the logits."""

    def __init__(self, head: qnn.QuantLinear):
        super().__init__()
        self.tied = (head,)  # in a tuple: the parameters are the head's

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, plain(self.tied[0].quant_weight()))


def plain(value) -> Tensor:
    """The tensor in what Brevitas returns."""
    return getattr(value, "value", value)


def quantized(config: LanguageConfig, state: Mapping[str, Any], candidates: int = CANDIDATES) -> Lfm2:
    """The network with Brevitas layers, in eval mode; ModelError as `quantize`."""
    state = {name: torch.as_tensor(value).detach().float() for name, value in state.items()}
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{config.name}: {name} holds values that are not finite: train or download it again")
    if "embedding.weight" in state:
        state.setdefault("head.weight", state["embedding.weight"])
    with torch.device("meta"):  # the weights are not to be in memory twice
        model = Lfm2(config)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{config.name}: the weights do not fit the configuration: {error}") from error
    with torch.no_grad():
        for parent in [model, *(part for layer in model.layers for part in (layer.mixer, layer.feed_forward))]:
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, _quant_linear(child, candidates))
    for layer in model.layers:
        if isinstance(layer.mixer, Attention):
            layer.mixer.q_rotated, layer.mixer.k_rotated, layer.mixer.v = (
                qnn.QuantIdentity(act_quant=RowActivation) for _ in range(3)
            )
    model.embedding = TiedEmbedding(model.head)
    return model.eval()


def _quant_linear(linear: nn.Linear, candidates: int) -> qnn.QuantLinear:
    layer = qnn.QuantLinear(linear.in_features, linear.out_features, bias=False, weight_quant=GroupWeight,
                            input_quant=RowActivation, device="meta")  # fmt: skip
    layer.weight = nn.Parameter(linear.weight.detach())  # Brevitas makes the quantizer anew
    group_factors(layer).fit(layer.weight, candidates)
    return layer


def group_factors(layer: qnn.QuantLinear) -> GroupFactors:
    """The scaling of a layer's weights."""
    return layer.weight_quant.tensor_quant.scaling_impl


@contextmanager
def precision(model: Lfm2, weights: bool = True, activations: bool = True, cache: bool = True) -> Iterator[None]:
    """Quantize only some in a quantized network: weights, inputs of matrix products but the cache, keys and values."""
    proxies = [(layer.weight_quant, weights) for layer in model.modules() if isinstance(layer, qnn.QuantLinear)]
    proxies += [(layer.input_quant, activations) for layer in model.modules() if isinstance(layer, qnn.QuantLinear)]
    for layer in model.layers:
        if isinstance(layer.mixer, Attention):
            proxies.append((layer.mixer.q_rotated.act_quant, activations))
            proxies += [(part.act_quant, cache) for part in (layer.mixer.k_rotated, layer.mixer.v)]
    for proxy, enabled in proxies:
        proxy.disable_quant = not enabled
    try:
        yield
    finally:
        for proxy, _ in proxies:
            proxy.disable_quant = False


class _GroupGptq(GPTQ):
    def get_quant_weights(self, i: int, i1: int, permutation_list: list[Tensor]) -> Tensor:
        """Column i1 + i in the order of quantization, [1, out]; Brevitas would quantize all columns for each one."""
        column = permutation_list[0][i1 + i]
        step = group_factors(self.layer)(self.layer.weight)[:, column // GROUP, 0]
        return ((self.layer.weight[:, column] / step).round().clamp(*CODES) * step)[None]


class _GptqMode(gptq_mode):
    def _is_module_supported(self, module: nn.Module) -> bool:
        # The head is the embedding too: what suits the one is noise to the other.
        return module is not self.model.head and super()._is_module_supported(module)


@torch.no_grad()
def apply_gptq(model: Lfm2, samples: Tensor, batch: int = 32) -> None:
    """Change the weights of a quantized network so that rounding errors cancel on `samples` int64 [sequences, n]."""
    for layer in model.modules():
        if isinstance(layer, qnn.QuantLinear):
            layer.weight.data = layer.weight.data.clone()  # until here they may be the caller's
    same_inputs = [[f"layers.{i}.feed_forward.w{part}" for part in "13"] for i in range(len(model.layers))]
    same_inputs += [[f"layers.{i}.mixer.{part}_proj" for part in "qkv"]
                    for i, kind in enumerate(model.config.layers) if kind == "attention"]  # fmt: skip
    with _GptqMode(model, group_of_parallel_layers=same_inputs, create_weight_orig=False, use_quant_activations=True,
                   gptq_class=_GroupGptq) as gptq:  # fmt: skip
        for _ in range(gptq.num_layers):
            for part in samples.split(batch):
                gptq.model(part)
            gptq.update()


# --- integers -----------------------------------------------------------------------------------------------


@torch.no_grad()
def peaks(model: Lfm2, samples: Tensor, batch: int = 8) -> dict[str, float]:
    """Largest magnitude that passes each probe and quantized point, by module path, on int64 [sequences, n]."""
    found: dict[str, float] = {}

    def hook(name: str):
        def record(_module, _inputs, output):
            found[name] = max(found.get(name, 0.0), float(plain(output).abs().max()))

        return record

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()
               if isinstance(module, Probe | qnn.QuantIdentity)]  # fmt: skip
    try:
        for part in samples.split(batch):
            model(part)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def integer_model(model: Lfm2, samples: Tensor, headroom: float = 2.0) -> LanguageModel:
    """The LanguageModel of a quantized network: its codes and scales, and scales that hold `headroom` times what
    `samples` int64 [sequences, n] make of it."""
    highest = {name: headroom * (peak or 1.0) for name, peak in peaks(model, samples).items()}
    embedding = linear(model.head)
    # Of the embedding all values are known, so it needs no headroom.
    residual = scale = (float((np.abs(embedding.weights()).max(1) * embedding.scale).max()) or 1.0) / PEAK
    blocks = []
    for index, layer in enumerate(model.layers):
        block = _block(layer, f"layers.{index}.", highest, scale)
        blocks.append(block)
        scale = block.residual[1]
    result = LanguageModel(model.config, embedding, residual, tuple(blocks), norm(model.norm.weight),
                           highest["logits"] / PEAK)  # fmt: skip
    result.check(model.config.name)
    return result


def linear(layer: qnn.QuantLinear) -> Linear:
    """What Brevitas makes of a layer's weights."""
    weight, scaling = layer.quant_weight(), group_factors(layer)
    codes = (weight.value_ / weight.scale_).round_().to(torch.int8).flatten(1)  # [out, groups, 32], exact
    return Linear(codes.numpy(), scaling.factors.to(torch.uint8).numpy(), scaling.scale.numpy().copy())


def norm(weight: Tensor) -> Norm:
    """int16 weights of an RMS normalization."""
    scale = (float(weight.abs().max()) or 1.0) / PEAK
    return Norm(np.rint(weight.double().numpy() / scale).astype(np.int16), scale)


def _shift(peak: float, scale: float) -> int:
    """The least shift that makes int16 codes of `scale` hold `peak`."""
    return min(MAX_SHIFT, max(0, math.ceil(math.log2(peak / (PEAK * scale)))))


def _block(layer: Layer, name: str, highest: Mapping[str, float], scale: float) -> language.Block:
    mixer = (_convolution if isinstance(layer.mixer, GatedConv) else _attention)(layer, f"{name}mixer.", highest)
    first = _shift(max(highest[f"{name}mixed"], highest[f"{name}mixer.output"]), scale)
    scales = scale * 2.0**first
    second = _shift(max(highest[f"{name}output"], highest[f"{name}feed_forward.output"]), scales)
    return language.Block(mixer, _feed_forward(layer, f"{name}feed_forward.", highest), (first, second),
                          (scales, scales * 2.0**second))  # fmt: skip


def _convolution(layer: Layer, name: str, highest: Mapping[str, float]) -> language.Convolution:
    mixer = layer.mixer
    weights = mixer.conv.weight[:, 0].double().numpy()
    magnitudes = np.abs(weights)
    # Codes are int16, and those of a channel must not sum to 2**16 however they are rounded.
    taps = weights.shape[1]
    kernel_scale = max(magnitudes.max() / PEAK, magnitudes.sum(1).max() / ((1 << 16) - 1 - taps)) or 1.0 / PEAK
    part = language.Convolution(
        norm(layer.operator_norm.weight), linear(mixer.in_proj), np.rint(weights / kernel_scale).astype(np.int16),
        float(kernel_scale), linear(mixer.out_proj), *(highest[name + key] / PEAK for key in "bcx"), 0, 0, 0,
    )  # fmt: skip
    part = replace(part, gate_shift=_shift(highest[f"{name}gated"], part.gate_scale))
    part = replace(part, kernel_shift=_shift(highest[f"{name}convolved"], part.gate_scale * part.kernel_scale))
    return replace(part, product_shift=_shift(highest[f"{name}product"], part.product_scale))


def _attention(layer: Layer, name: str, highest: Mapping[str, float]) -> language.Attention:
    mixer = layer.mixer
    return language.Attention(
        norm(layer.operator_norm.weight), linear(mixer.q_proj), linear(mixer.k_proj), linear(mixer.v_proj),
        norm(mixer.q_norm.weight), norm(mixer.k_norm.weight), linear(mixer.out_proj),
        *(highest[name + key] / PEAK for key in ("q", "k", "v", "attended")),
    )  # fmt: skip


def _feed_forward(layer: Layer, name: str, highest: Mapping[str, float]) -> language.FeedForward:
    part, gate = layer.feed_forward, highest[f"{name}gate"]
    up = min(3, _shift(gate, 2.0**-11))  # beyond, the sigmoid is 0 or 1 and the gate clips
    result = language.FeedForward(norm(layer.ffn_norm.weight), linear(part.w1), linear(part.w3), linear(part.w2), up,
                                  highest[f"{name}up"] / PEAK, 0)  # fmt: skip
    return replace(result, product_shift=_shift(highest[f"{name}product"], result.product_scale))
