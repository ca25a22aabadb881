"""Golden language model: what every operator must give, bit for bit, on plain arrays without engine or addresses.

Rows are tokens: features are int64 [n, channels] of 16-bit codes, in the order of the weights' rows. A quantized row
is a pair (codes [..., channels], scale), a scale the pair (mult, shift) of arrays [...].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from weft.arch.errors import ModelError
from weft.arch.language import (
    UNIT_SCALE,
    Attention,
    Block,
    Convolution,
    FeedForward,
    LanguageModel,
    Linear,
    Norm,
    norm_constant,
    rotation_table,
    row_unit,
)  # fmt: skip
from weft.arch.numerics import (
    ACC_MAX,
    CODE_PEAK,
    INT16,
    PROBABILITY_PEAK,
    ROTATION_BITS,
    combine_scales,
    normalize,
    normalized_root,
    quantize_row,
    ratio_scale,
    requantize,
    rotate,
    round_shift,
    saturate16,
    silu,
    softmax_row,
)  # fmt: skip

Scale = tuple[np.ndarray, np.ndarray]
QuantizedRow = tuple[np.ndarray, Scale]
Record = Callable[[str, np.ndarray], None]

UNSEEN = -(1 << 20)  # a score so low that its exponential is 0
MAX_POSITIONS = min(ACC_MAX // (PROBABILITY_PEAK * CODE_PEAK), ((1 << 32) - 1) // 65535)  # sums of a softmax fit
BLOCK_ROWS = 4096  # rows of a weight matrix turned to float64 at a time
BLOCK_RESULTS = 1 << 16  # results of a matrix product computed at a time, so that they stay in the cache
BLOCK_SCORES = 1 << 22  # scores computed at a time


@dataclass
class KeyValues:
    """Keys and values of an attention layer: codes [kv_heads, length, head_size], scales and magnitudes
    [kv_heads, length]."""

    keys: np.ndarray
    key_mult: np.ndarray
    key_shift: np.ndarray
    values: np.ndarray
    magnitudes: np.ndarray

    def append(self, *parts: np.ndarray) -> KeyValues:
        """Those of more positions, in the order of the fields."""
        return KeyValues(*(np.concatenate(pair, axis=1) for pair in zip(vars(self).values(), parts, strict=True)))


@dataclass
class Cache:
    """What the tokens seen leave behind: their number, and for every layer its last gates [taps - 1, width], or its
    keys and values."""

    length: int
    layers: list[np.ndarray | KeyValues]


class Product:
    """A matrix product: quantized rows to int16 codes. Raises ModelError where its sums might leave int32."""

    def __init__(self, name: str, linear: Linear, inputs: int, unit: float, output: float | np.ndarray):
        self.weights = linear.weights()[:, :inputs]  # the rest meets zeros
        reach = CODE_PEAK * int(np.abs(self.weights).sum(axis=1, dtype=np.int64).max())
        if reach > ACC_MAX:
            raise ModelError(f"{name}: a sum of products can reach {reach}, outside int32; quantize the model with "
                             "smaller group factors")  # fmt: skip
        try:
            self.mult, self.shift = linear.scales(unit, output)
        except ValueError as error:
            raise ModelError(f"{name}: {error}; quantize the model again") from error

    def __call__(self, row: QuantizedRow) -> np.ndarray:
        codes, (mult, shift) = row
        wide = codes.astype(np.float64)  # exact below 2**53, because NumPy multiplies integer matrices slowly
        out = np.empty((len(codes), len(self.weights)), np.int64)
        step = max(1, min(BLOCK_ROWS, BLOCK_RESULTS // len(codes)))
        for first in range(0, len(self.weights), step):
            part = slice(first, first + step)
            acc = (wide @ self.weights[part].astype(np.float64).T).astype(np.int64)
            scale = combine_scales(mult[:, None], shift[:, None], self.mult[part], self.shift[part])
            out[:, part] = requantize(acc, *scale, *INT16)
        return out


def row_scale(magnitude: np.ndarray, mantissa: np.ndarray, bits: np.ndarray, factor: tuple[int, int]) -> Scale:
    """magnitude / normalized number, times a factor."""
    return combine_scales(*ratio_scale(magnitude, mantissa, bits), *factor)


def plain_row(values: np.ndarray) -> QuantizedRow:
    """`values` [n, channels] as a quantized row."""
    codes, magnitude = quantize_row(values, CODE_PEAK)
    return codes, row_scale(magnitude, *normalize(np.ones_like(magnitude)), UNIT_SCALE)


def normalized_row(values: np.ndarray, norm: Norm, constant: int) -> QuantizedRow:
    """`values` [n, channels] divided by their root mean square, times the norm's weights, as a quantized row."""
    codes, magnitude = quantize_row(values * norm.codes, CODE_PEAK)
    return codes, row_scale(magnitude, *normalized_root((values * values).sum(axis=-1) + constant), UNIT_SCALE)


def rotated_row(
    values: np.ndarray, norm: Norm, constant: int, cosine: np.ndarray, sine: np.ndarray, factor: tuple[int, int]
) -> QuantizedRow:
    """Heads `values` [n, heads, head_size], normalized and rotated by cosine, sine [n, rotary / 2], as quantized rows
    with their scales times a factor."""
    weighted = round_shift(values * norm.codes, 15)
    half = cosine.shape[-1]
    low, high, rest = np.split(weighted, (half, 2 * half), axis=-1)
    turned = np.concatenate([*rotate(low, high, cosine[:, None], sine[:, None]), rest << ROTATION_BITS], axis=-1)
    codes, magnitude = quantize_row(turned, CODE_PEAK)
    return codes, row_scale(magnitude, *normalized_root((values * values).sum(axis=-1) + constant), factor)


class ConvolutionMixer:
    """Gated short convolution: features and the past gates to features and the gates to keep."""

    def __init__(self, name: str, part: Convolution, width: int):
        self.part, self.kernel = part, part.kernel.astype(np.int64)
        scales = np.repeat([part.b_scale, part.c_scale, part.x_scale], width)
        self.in_projection = Product(f"{name}.in_projection", part.in_projection, width, part.norm.unit(), scales)

    def empty(self) -> np.ndarray:
        width, taps = self.kernel.shape
        return np.zeros((taps - 1, width), np.int64)

    def __call__(self, row: QuantizedRow, past: np.ndarray, positions: np.ndarray, record: Record):
        part, taps = self.part, self.kernel.shape[1]
        projected = self.in_projection(row)
        record("in_projection", projected)
        b, c, x = np.split(projected, 3, axis=-1)
        gate = saturate16(round_shift(b * x, part.gate_shift))
        record("gate", gate)
        seen = np.concatenate([past, gate])
        acc = sum(seen[tap : tap + len(gate)] * self.kernel[:, tap] for tap in range(taps))
        convolved = saturate16(round_shift(acc, part.kernel_shift))
        record("convolution", convolved)
        product = saturate16(round_shift(c * convolved, part.product_shift))
        record("product", product)
        return product, seen[len(gate) :]


class AttentionMixer:
    """Grouped-query attention: features, keys and values before to features, keys and values."""

    def __init__(self, name: str, part: Attention, model: LanguageModel):
        config = model.config
        self.part, self.config = part, config
        unit = part.norm.unit()
        self.query = Product(f"{name}.query", part.query, config.width, unit, part.query_scale)
        self.key = Product(f"{name}.key", part.key, config.width, unit, part.key_scale)
        self.value = Product(f"{name}.value", part.value, config.width, unit, part.value_scale)
        self.query_constant = norm_constant(config.head_size, config.epsilon, part.query_scale)
        self.key_constant = norm_constant(config.head_size, config.epsilon, part.key_scale)
        try:
            self.key_factor, self.value_parameters = part.key_factor(), part.value_parameters()
        except ValueError as error:
            raise ModelError(f"{name}: {error}; quantize the model again") from error

    def empty(self) -> KeyValues:
        kv = self.config.kv_heads
        codes, scalars = np.zeros((kv, 0, self.config.head_size), np.int8), np.zeros((kv, 0), np.int64)
        return KeyValues(codes, scalars, scalars, codes, scalars)

    def __call__(self, row: QuantizedRow, past: KeyValues, positions: np.ndarray, record: Record):
        part, config, n = self.part, self.config, len(positions)
        query, key, value = self.query(row), self.key(row), self.value(row)
        for name, codes in (("query", query), ("key", key), ("value", value)):
            record(name, codes)
        rotation = rotation_table(config, positions)
        heads = query.reshape(n, config.heads, config.head_size)
        query, scale = rotated_row(heads, part.query_norm, self.query_constant, *rotation, UNIT_SCALE)
        heads = key.reshape(n, config.kv_heads, config.head_size)
        key, key_scale = rotated_row(heads, part.key_norm, self.key_constant, *rotation, self.key_factor)
        value, magnitude = quantize_row(value.reshape(heads.shape), CODE_PEAK)
        for name, codes in (("query_row", query), ("key_row", key), ("value_row", value)):
            record(name, codes.reshape(n, -1))
        now = past.append(key.swapaxes(0, 1).astype(np.int8), *(part.T for part in key_scale),
                          value.swapaxes(0, 1).astype(np.int8), magnitude.T)  # fmt: skip
        step = max(1, BLOCK_SCORES // (config.heads * now.keys.shape[1]))
        blocks = [slice(first, first + step) for first in range(0, n, step)]
        output = np.concatenate(
            [self._attend(query[b], (scale[0][b], scale[1][b]), now, positions[b]) for b in blocks]
        )
        record("output", output)
        return output, now

    def _attend(self, query: np.ndarray, scale: Scale, cache: KeyValues, positions: np.ndarray) -> np.ndarray:
        """Queries [n, heads, head_size] at `positions` -> int16 codes [n, heads * head_size]."""
        n, heads, size = query.shape
        kv = self.config.kv_heads

        def by_key_head(x: np.ndarray) -> np.ndarray:  # [n, heads, ...] -> [kv_heads, n, queries, ...]
            return x.reshape(n, kv, heads // kv, *x.shape[2:]).swapaxes(0, 1)

        mult, shift = (by_key_head(part)[..., None] for part in scale)
        acc = _product(by_key_head(query), cache.keys.swapaxes(1, 2))
        scale = combine_scales(mult, shift, cache.key_mult[:, None, None], cache.key_shift[:, None, None])
        scores = requantize(acc, *scale, *INT16)
        seen = np.arange(cache.keys.shape[1]) <= positions[:, None, None]
        weights = cache.magnitudes[:, None, None]
        codes, largest, total = softmax_row(np.where(seen, scores, UNSEEN), weights)
        mult, shift = row_scale(largest, *normalize(total), UNIT_SCALE)
        scale = combine_scales(mult[..., None], shift[..., None], *self.value_parameters)
        output = requantize(_product(codes, cache.values), *scale, *INT16)
        return output.swapaxes(0, 1).reshape(n, heads * size)


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Exact products of 8-bit matrices: a [kv_heads, n, queries, inner], b [kv_heads, inner, outer]."""
    rows = a.reshape(len(a), -1, a.shape[-1])
    return (rows.astype(np.float64) @ b.astype(np.float64)).astype(np.int64).reshape(*a.shape[:-1], b.shape[-1])


class FeedForwardPart:
    """SwiGLU on features."""

    def __init__(self, name: str, part: FeedForward, width: int):
        self.part = part
        self.gate = Product(f"{name}.gate", part.gate, width, part.norm.unit(), part.gate_scale)
        self.value = Product(f"{name}.value", part.value, width, part.norm.unit(), part.value_scale)

    def __call__(self, row: QuantizedRow, record: Record) -> np.ndarray:
        gate, value = self.gate(row), self.value(row)
        record("gate", gate)
        record("value", value)
        product = saturate16(round_shift(silu(gate, self.part.up) * value, self.part.product_shift))
        record("product", product)
        return product


class GoldenBlock:
    """A layer: mixer, then feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, name: str, block: Block, scale: float, model: LanguageModel):
        config, mixer, part = model.config, block.mixer, block.feed_forward
        self.name, self.block = name, block
        after_mixer, after = block.residual
        self.constants = [norm_constant(config.width, config.epsilon, s) for s in (scale, after_mixer)]
        if isinstance(mixer, Convolution):
            self.mixer = ConvolutionMixer(f"{name}.mixer", mixer, config.width)
            inputs, inner = config.width, mixer.product_scale
        else:
            self.mixer = AttentionMixer(f"{name}.mixer", mixer, model)
            inputs, inner = config.heads * config.head_size, mixer.output_scale
        self.out_projection = Product(f"{name}.mixer.out_projection", mixer.out_projection, inputs, row_unit(inner),
                                      after_mixer)  # fmt: skip
        self.feed_forward = FeedForwardPart(f"{name}.feed_forward", part, config.width)
        self.down = Product(f"{name}.feed_forward.down", part.down, config.feed_forward, row_unit(part.product_scale),
                            after)  # fmt: skip

    def __call__(self, h: np.ndarray, state, positions: np.ndarray, record: Record):
        def under(part: str) -> Record:
            return lambda name, codes: record(f"{self.name}.{part}.{name}", codes)

        block, note = self.block, under("mixer")
        row = normalized_row(h, block.mixer.norm, self.constants[0])
        note("norm", row[0])
        output, state = self.mixer(row, state, positions, note)
        h = self._add(h, block.shifts[0], output, self.out_projection, "out_projection", note)
        note = under("feed_forward")
        row = normalized_row(h, block.feed_forward.norm, self.constants[1])
        note("norm", row[0])
        output = self.feed_forward(row, note)
        return self._add(h, block.shifts[1], output, self.down, "down", note), state

    @staticmethod
    def _add(h: np.ndarray, shift: int, output: np.ndarray, product: Product, name: str, note: Record) -> np.ndarray:
        row = plain_row(output)
        note("row", row[0])
        o = product(row)
        note(name, o)
        h = saturate16(round_shift(h, shift) + o)
        note("residual", h)
        return h


class GoldenLanguage:
    """The integer language model. Raises ModelError if some sum might not fit the engine's accumulator."""

    def __init__(self, model: LanguageModel):
        self.model, config = model, model.config
        model.check(config.name)
        self.head = Product("embedding", model.embedding, config.width, model.norm.unit(), model.logit_scale)
        scales = [model.residual, *(block.residual[1] for block in model.blocks)]
        self.blocks = [GoldenBlock(str(i), block, scales[i], model) for i, block in enumerate(model.blocks)]
        self.constant = norm_constant(config.width, config.epsilon, scales[-1])
        self.positions = min(config.context, MAX_POSITIONS)
        try:
            self.expand = combine_scales(self.head.mult, self.head.shift, *model.expand_factor())
        except ValueError as error:
            raise ModelError(f"embedding: {error}; quantize the model again") from error

    def new_cache(self) -> Cache:
        """The state before the first token."""
        return Cache(0, [block.mixer.empty() for block in self.blocks])

    def forward(self, tokens: np.ndarray, cache: Cache, record: dict[str, np.ndarray] | None = None,
                all_logits: bool = False) -> np.ndarray:  # fmt: skip
        """Logits as int32 codes [vocab] of the last of `tokens` [n], or with `all_logits` of all of them [n, vocab].

        The tokens continue what the cache holds; it is brought up to date. `record` receives the output of every
        operator, int32 [n, channels], under its name (`embedding`, `0.mixer.norm`, ..., `norm`, `logits`).
        Raises ModelError for tokens outside the vocabulary or past the last position.
        """
        tokens = self._checked(tokens, cache)

        def note(name: str, codes: np.ndarray) -> None:
            if record is not None:
                record[name] = codes.astype(np.int32)

        mult, shift = (part[tokens, None] for part in self.expand)
        h = requantize(self.head.weights[tokens].astype(np.int64), mult, shift, *INT16)
        note("embedding", h)
        positions = cache.length + np.arange(len(tokens))
        after = []
        for block, state in zip(self.blocks, cache.layers, strict=True):
            h, state = block(h, state, positions, note)
            after.append(state)
        cache.length, cache.layers = cache.length + len(tokens), after
        row = normalized_row(h if all_logits else h[-1:], self.model.norm, self.constant)
        note("norm", row[0])
        logits = self.head(row)
        note("logits", logits)
        return (logits if all_logits else logits[0]).astype(np.int32)

    @staticmethod
    def answer(logits: np.ndarray) -> int:
        """The token with the greatest code, the first of equals."""
        return int(np.argmax(logits))

    def _checked(self, tokens: np.ndarray, cache: Cache) -> np.ndarray:
        name, tokens = self.model.config.name, np.asarray(tokens)
        if tokens.ndim != 1 or not tokens.size or tokens.dtype.kind not in "iu":
            raise ModelError(f"{name}: tokens must be integers [n] with n > 0, got {tokens.dtype} {tokens.shape}")
        outside = tokens[(tokens < 0) | (tokens >= self.model.config.vocab)]
        if outside.size:
            raise ModelError(f"{name}: token {outside[0]} is outside its vocabulary of {self.model.config.vocab}: use "
                             "the tokenizer that belongs to the model")  # fmt: skip
        if cache.length + len(tokens) > self.positions:
            raise ModelError(f"{name}: {cache.length + len(tokens)} tokens exceed the {self.positions} positions that "
                             "can be used: shorten the text")  # fmt: skip
        return tokens.astype(np.int64)
