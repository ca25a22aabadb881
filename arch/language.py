"""The integer language model: what quantization hands to compiler and golden model, and every constant they share.

A decoder of the LFM2 family as integers with float scales: real value = code * scale. File format: safetensors
with one tensor per array, and the rest as JSON in the header's metadata under the key `weft-language`.

What is computed, token by token (all functions are those of arch/numerics.py; h is the residual stream, int16):

    z    = quantized row of h * norm weight / rms(h)                       int8 and a scale
    conv      B, C, x = in_projection(z);  g = B*x;  c = causal convolution of g;  y = C*c;  o = out_projection(y)
    attention q, k, v = projections(z); q and k normalized by head, rotated, quantized by head; v quantized by head;
              scores = q . k, base-2 logarithms in units of 2**-8;  y = softmax(scores) . v;  o = out_projection(y)
    h    = (h >> up) + o, then likewise for the feed-forward part: y = silu(gate(z)) * value(z), o = down(y)
    logits = embedding(quantized row of the last norm)

Every operator output named here is int16 with a scale fixed by calibration; every input of a matrix product is
int8 (probabilities: uint8) with a scale per row, found at run time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from weft.arch.errors import ModelError
from weft.arch.numerics import (
    CODE_PEAK,
    EXP2_BITS,
    PROBABILITY_PEAK,
    ROTATION_BITS,
    SCALE_POINT,
    requantize_parameters,
)  # fmt: skip
from weft.arch.program import write_atomically

FORMAT = 1
GROUP = 32  # input channels that share a weight scale
FACTOR_MAX = 255  # group scales are uint8
KINDS = ("conv", "attention")
UNIT_SCALE = (65535, 16)  # factor of a row's scale where nothing else is wanted: as near to 1 as 16 bits come
SCORE_STEP = math.log2(math.e) * (1 << EXP2_BITS)  # score codes in one unit of the natural exponent
MAX_FILE_BYTES = 1 << 34
METADATA = "weft-language"


@dataclass(frozen=True)
class LanguageConfig:
    """Shape of a decoder. Lengths in elements."""

    name: str
    vocab: int
    width: int  # of the residual stream
    layers: tuple[str, ...]  # "conv" or "attention"
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    kernel: int  # taps of the short convolution
    rope_theta: float
    rotary: int  # leading dimensions of a head that are rotated
    epsilon: float
    context: int  # positions that may be used
    bos: int
    eos: int

    def __post_init__(self) -> None:
        def require(condition: bool, reason: str) -> None:
            if not condition:
                raise ModelError(f"language model '{self.name}': {reason}")

        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and field.name not in ("bos", "eos"):
                require(isinstance(value, int) and value > 0, f"{field.name} must be a positive integer, got {value!r}")
        require(bool(self.layers), "it has no layers")
        for kind in self.layers:
            require(kind in KINDS, f"layer kind {kind!r} is not one of {', '.join(KINDS)}")
        require(self.heads % self.kv_heads == 0, f"{self.heads} heads do not divide among {self.kv_heads} key heads")
        require(self.rotary % 2 == 0 and self.rotary <= self.head_size,
                f"rotary must be even and at most head_size = {self.head_size}, got {self.rotary}")
        require(0 < self.epsilon < 1, f"epsilon must be in (0, 1), got {self.epsilon!r}")
        require(self.rope_theta > 1, f"rope_theta must be above 1, got {self.rope_theta!r}")
        require(self.kernel <= 15, f"a convolution of {self.kernel} taps exceeds the engine's 15")
        for name in ("bos", "eos"):
            require(0 <= getattr(self, name) < self.vocab, f"{name} is not a token of the vocabulary")

    @property
    def queries(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads


def rotation_table(config: LanguageConfig, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of rotary `positions` [n], in units of 2**-ROTATION_BITS: int64 [n, rotary / 2] each."""
    frequencies = np.float64(config.rope_theta) ** (-np.arange(0, config.rotary, 2) / config.rotary)
    angles = np.asarray(positions, np.float64)[:, None] * frequencies
    cosine, sine = (np.rint(part * (1 << ROTATION_BITS)).astype(np.int64) for part in (np.cos(angles), np.sin(angles)))
    return cosine, sine


@dataclass(frozen=True)
class Linear:
    """Weights of a matrix product: codes [out, in] int8 in -8..7, factors [out, in/32] uint8, scale [out] float32.

    A real weight is code * factor of its group * scale of its row. `in` is padded to a multiple of 32 by zeros.
    """

    codes: np.ndarray
    factors: np.ndarray
    scale: np.ndarray

    def weights(self) -> np.ndarray:
        """code * factor, int16 [out, in]."""
        return self.codes.astype(np.int16) * self.factors.astype(np.int16).repeat(GROUP, axis=1)

    def scales(self, unit: float, output: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Requantize parameters (mult, shift) [out] of outputs with scale `output` from inputs with row unit `unit`."""
        ratios = np.float64(unit) * self.scale.astype(np.float64) / output
        pairs = [requantize_parameters(float(ratio)) for ratio in ratios]
        return np.array([mult for mult, _ in pairs], np.int64), np.array([shift for _, shift in pairs], np.int64)


def row_unit(scale: float) -> float:
    """Real value of code * row scale of a row quantized from numbers with `scale`, its factor being UNIT_SCALE."""
    mult, shift = UNIT_SCALE
    return scale / CODE_PEAK * (1 << SCALE_POINT) * (1 << shift) / mult


def norm_constant(elements: int, epsilon: float, scale: float) -> int:
    """epsilon * elements in units of squared codes: what RMS normalization adds to the sum of squares."""
    return max(1, min((1 << 32) - 1, round(elements * epsilon / scale**2)))


@dataclass(frozen=True)
class Norm:
    """Weights of an RMS normalization: codes [n] int16, |code| <= 32767, and their scale."""

    codes: np.ndarray
    scale: float

    def unit(self) -> float:
        """Real value of code * row scale of a normalized row of n elements: quantize_row of x * weight / rms."""
        return row_unit(self.scale) * math.sqrt(len(self.codes))


@dataclass(frozen=True)
class Convolution:
    """A gated short convolution. Scales are of int16 codes; shifts make the products fit.

    g = B*x >> gate_shift, c = sum of kernel*g >> kernel_shift, y = C*c >> product_shift.
    """

    norm: Norm
    in_projection: Linear  # rows: B, C, x
    kernel: np.ndarray  # int16 [width, taps], oldest tap first
    kernel_scale: float
    out_projection: Linear
    b_scale: float
    c_scale: float
    x_scale: float
    gate_shift: int
    kernel_shift: int
    product_shift: int

    @property
    def gate_scale(self) -> float:
        return self.b_scale * self.x_scale * 2.0**self.gate_shift

    @property
    def product_scale(self) -> float:
        return self.c_scale * self.kernel_scale * self.gate_scale * 2.0 ** (self.kernel_shift + self.product_shift)


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention with normalized queries and keys. Scales are of int16 codes."""

    norm: Norm
    query: Linear
    key: Linear
    value: Linear
    query_norm: Norm  # [head_size]
    key_norm: Norm
    out_projection: Linear
    query_scale: float
    key_scale: float
    value_scale: float
    output_scale: float  # of the attention's result, in front of out_projection

    def query_unit(self) -> float:
        """Real value of code * row scale of a query: the rotation halves its products (numerics.rotate)."""
        return 2 * self.query_norm.unit()

    def key_factor(self) -> tuple[int, int]:
        """Factor of a key's scale that makes code . code * query scale * key scale a score."""
        # the root of head_size in the key's unit and the one that divides scores cancel
        key = 2 * (1 << SCALE_POINT) * self.key_norm.scale / CODE_PEAK
        return requantize_parameters(self.query_unit() * key * SCORE_STEP)

    def value_parameters(self) -> tuple[int, int]:
        """Requantize parameters from probability . value to the result."""
        return requantize_parameters(row_unit(self.value_scale) / PROBABILITY_PEAK / self.output_scale)


@dataclass(frozen=True)
class FeedForward:
    """SwiGLU: y = silu(gate) * value >> product_shift; gate codes are in units of 2**(up - 11)."""

    norm: Norm
    gate: Linear
    value: Linear
    down: Linear
    up: int
    value_scale: float
    product_shift: int

    @property
    def gate_scale(self) -> float:
        return 2.0 ** (self.up - 11)

    @property
    def product_scale(self) -> float:
        return self.gate_scale * self.value_scale * 2.0**self.product_shift


@dataclass(frozen=True)
class Block:
    """A layer. `residual` are the scales of h behind mixer and feed-forward, `shifts` by how much h gives way there."""

    mixer: Convolution | Attention
    feed_forward: FeedForward
    shifts: tuple[int, int]
    residual: tuple[float, float]


@dataclass(frozen=True)
class LanguageModel:
    """A whole decoder. `residual` is the scale of h at the embedding; `embedding` serves the logits too."""

    config: LanguageConfig
    embedding: Linear
    residual: float
    blocks: tuple[Block, ...]
    norm: Norm
    logit_scale: float

    def expand_factor(self) -> tuple[int, int]:
        """Factor that turns the logits' requantize parameters of a token into those of its embedding."""
        return requantize_parameters(self.logit_scale / (self.norm.unit() * self.residual))

    def save(self, path: str | Path) -> None:
        """Writes the file whole or not at all. Raises ToolError if the disk refuses."""
        tensors: dict[str, np.ndarray] = {}
        values: dict[str, Any] = {}
        for name, value in _leaves(self):
            if isinstance(value, np.ndarray):
                tensors[name] = np.ascontiguousarray(value)
            else:
                values[name] = value
        header = json.dumps({"format": FORMAT, "config": asdict(self.config), "values": values}, sort_keys=True)
        write_atomically(path, save(tensors, {METADATA: header}))

    @classmethod
    def load(cls, path: str | Path) -> LanguageModel:
        """Reads and checks a file. Raises ModelError that says what is wrong with it."""
        path = Path(path)
        try:
            size = path.stat().st_size
            if size <= MAX_FILE_BYTES:
                with safe_open(path, "numpy") as file:
                    header = file.metadata() or {}
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        except (SafetensorError, TypeError, ValueError) as error:  # TypeError: a number format NumPy has not
            raise ModelError(f"{path}: not a safetensors file, or cut short ({error}); quantize again") from error
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from error
        if size > MAX_FILE_BYTES:
            raise ModelError(f"{path}: larger than {MAX_FILE_BYTES} bytes, not a quantized language model")
        if METADATA not in header:
            raise ModelError(f"{path}: a safetensors file, but not a quantized language model; make one with "
                             "`weft quantize`")
        try:
            meta = json.loads(header[METADATA])
            kind, config = meta["format"], meta["config"]
            if kind == FORMAT:
                config = LanguageConfig(**config | {"layers": tuple(config["layers"])})
                model = _model(config, meta["values"], tensors)
                unknown = {*tensors, *meta["values"]} - {name for name, _ in _leaves(model)}
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ModelError(f"{path}: malformed language model ({error}); quantize again") from error
        if kind != FORMAT:
            raise ModelError(f"{path}: format {kind!r}, this Weft reads {FORMAT}; quantize again")
        if unknown:
            raise ModelError(f"{path}: malformed language model (its configuration has no {min(unknown)}); "
                             "quantize again")
        model.check(str(path))
        return model

    def check(self, where: str) -> None:
        """Raises ModelError unless shapes, ranges and scales are those of a model of this configuration."""
        c = self.config

        def require(condition: bool, what: str) -> None:
            if not condition:
                raise ModelError(f"{where}: {what}; quantize the model again")

        def linear(name: str, item: Linear, rows: int, columns: int) -> None:
            groups = -(-columns // GROUP)
            require(item.codes.dtype == np.int8 and item.codes.shape == (rows, groups * GROUP),
                    f"{name}.codes must be int8 [{rows}, {groups * GROUP}], got {item.codes.dtype} {item.codes.shape}")
            require(item.factors.dtype == np.uint8 and item.factors.shape == (rows, groups),
                    f"{name}.factors must be uint8 [{rows}, {groups}], got {item.factors.dtype} {item.factors.shape}")
            require(item.scale.dtype == np.float32 and item.scale.shape == (rows,)
                    and bool((np.isfinite(item.scale) & (item.scale > 0)).all()),
                    f"{name}.scale must be {rows} positive numbers of float32")
            require(bool((item.codes >= -8).all() and (item.codes <= 7).all()), f"{name} has codes outside -8..7")

        def norm(name: str, item: Norm, size: int) -> None:
            require(item.codes.dtype == np.int16 and item.codes.shape == (size,), f"{name} must be int16 [{size}]")
            require(bool((item.codes > -(1 << 15)).all()), f"{name} has the code -32768")

        def positive(value: Any) -> bool:
            return isinstance(value, float) and math.isfinite(value) and value > 0

        head = c.heads * c.head_size
        linear("embedding", self.embedding, c.vocab, c.width)
        norm("norm", self.norm, c.width)
        require(positive(self.residual), f"residual must be a positive number, got {self.residual!r}")
        residual = self.residual
        require(len(self.blocks) == len(c.layers), f"has {len(self.blocks)} blocks, {len(c.layers)} are configured")
        for index, (kind, block) in enumerate(zip(c.layers, self.blocks, strict=True)):
            name, mixer, part = f"blocks.{index}", block.mixer, block.feed_forward
            require(isinstance(mixer, Convolution if kind == "conv" else Attention), f"{name} is not of kind {kind}")
            norm(f"{name}.mixer.norm", mixer.norm, c.width)
            if isinstance(mixer, Convolution):
                linear(f"{name}.mixer.in_projection", mixer.in_projection, 3 * c.width, c.width)
                linear(f"{name}.mixer.out_projection", mixer.out_projection, c.width, c.width)
                require(mixer.kernel.dtype == np.int16 and mixer.kernel.shape == (c.width, c.kernel),
                        f"{name}.mixer.kernel must be int16 [{c.width}, {c.kernel}]")
                require(int(np.abs(mixer.kernel.astype(np.int64)).sum(axis=1).max()) < 1 << 16,
                        f"{name}.mixer.kernel could overflow the sum of a convolution")
            else:
                for projection, rows in (("query", head), ("key", c.kv_heads * c.head_size),
                                         ("value", c.kv_heads * c.head_size)):
                    linear(f"{name}.mixer.{projection}", getattr(mixer, projection), rows, c.width)
                linear(f"{name}.mixer.out_projection", mixer.out_projection, c.width, head)
                norm(f"{name}.mixer.query_norm", mixer.query_norm, c.head_size)
                norm(f"{name}.mixer.key_norm", mixer.key_norm, c.head_size)
            norm(f"{name}.feed_forward.norm", part.norm, c.width)
            linear(f"{name}.feed_forward.gate", part.gate, c.feed_forward, c.width)
            linear(f"{name}.feed_forward.value", part.value, c.feed_forward, c.width)
            linear(f"{name}.feed_forward.down", part.down, c.width, c.feed_forward)
            require(isinstance(part.up, int) and 0 <= part.up <= 3, f"{name}.feed_forward.up must be 0..3")
            require(isinstance(block.shifts, tuple) and len(block.shifts) == 2
                    and all(isinstance(s, int) and 0 <= s <= 15 for s in block.shifts),
                    f"{name}.shifts must be two integers of 0..15, got {block.shifts!r}")
            scales = tuple(residual * 2.0 ** sum(block.shifts[: stage + 1]) for stage in range(2))
            require(block.residual == scales and all(map(positive, scales)),
                    f"{name}.residual must be {scales}, as its shifts say, got {block.residual!r}")
            residual = scales[1]
        for name, value in _leaves(self):
            if name.endswith("scale") and not isinstance(value, np.ndarray):
                require(positive(value), f"{name} must be a positive number, got {value!r}")
            if name.endswith("shift"):
                require(isinstance(value, int) and 0 <= value <= 47, f"{name} must be 0..47, got {value!r}")


def _leaves(item: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of everything in a model that is not a structure; `config` left out."""
    if isinstance(item, tuple) and item and not isinstance(item[0], int | float):
        for index, part in enumerate(item):
            yield from _leaves(part, f"{prefix}{index}.")
    elif hasattr(item, "__dataclass_fields__"):
        for field in fields(item):
            if field.name != "config":
                yield from _leaves(getattr(item, field.name), f"{prefix}{field.name}.")
    else:
        yield prefix.removesuffix("."), item


def _model(config: LanguageConfig, values: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> LanguageModel:
    """The structure that _leaves took apart."""

    def part(cls: type, prefix: str, **given: Any) -> Any:
        arguments = dict(given)
        for field in fields(cls):
            name = f"{prefix}{field.name}"
            if field.name in arguments:
                continue
            if field.type in ("Linear", "Norm"):
                arguments[field.name] = part({"Linear": Linear, "Norm": Norm}[field.type], f"{name}.")
            elif field.type == "np.ndarray":
                arguments[field.name] = tensors[name]
            else:
                value = values[name]
                arguments[field.name] = tuple(value) if isinstance(value, list) else value
        return cls(**arguments)

    blocks = tuple(
        part(Block, f"blocks.{i}.",
             mixer=part(Convolution if kind == "conv" else Attention, f"blocks.{i}.mixer."),
             feed_forward=part(FeedForward, f"blocks.{i}.feed_forward."))
        for i, kind in enumerate(config.layers)
    )
    return part(LanguageModel, "", config=config, blocks=blocks)
