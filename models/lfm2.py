"""LFM2: a causal language model of gated short convolutions and grouped-query attention, in float.

Tokens are int64 [batch, n]; features are float [batch, n, width]. Every operator is a module that is called, and every
tensor between two operators passes a `Probe`, so that quantization can replace the one and watch the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from weft.arch.errors import ModelError
from weft.arch.language import LanguageConfig


def layer_kinds(count: int, attention: tuple[int, ...]) -> tuple[str, ...]:
    """The kind of each of `count` layers: "attention" at the given indices, "conv" elsewhere."""
    return tuple("attention" if index in attention else "conv" for index in range(count))


def _published(name: str, width: int, heads: int, feed_forward: int, layers: tuple[str, ...]) -> LanguageConfig:
    return LanguageConfig(
        name=name, vocab=65536, width=width, layers=layers, heads=heads, kv_heads=8, head_size=64,
        feed_forward=feed_forward, kernel=3, rope_theta=1e6, rotary=64, epsilon=1e-5, context=128000, bos=1, eos=7,
    )  # fmt: skip


_SIXTEEN = layer_kinds(16, (2, 5, 8, 10, 12, 14))
LFM2_CONFIGS = {
    config.name: config
    for config in (
        # A token is a byte; byte 0 opens and closes a document.
        LanguageConfig(
            name="lfm2-nano", vocab=256, width=128, layers=layer_kinds(7, (2, 4, 6)), heads=2, kv_heads=1, head_size=64,
            feed_forward=384, kernel=3, rope_theta=1e4, rotary=64, epsilon=1e-5, context=2048, bos=0, eos=0,
        ),
        _published("lfm2-350m", 1024, 16, 4608, _SIXTEEN),
        _published("lfm2-700m", 1536, 24, 6912, _SIXTEEN),
        _published("lfm2-1.2b", 2048, 32, 8192, _SIXTEEN),
        _published("lfm2-2.6b", 2048, 32, 10752, layer_kinds(30, (2, 5, 9, 13, 17, 21, 24, 27))),
    )
}  # fmt: skip


def language_config(name: str) -> LanguageConfig:
    """The named member of the family; ModelError for an unknown name."""
    if name not in LFM2_CONFIGS:
        raise ModelError(f"no language model named {name!r}: choose one of {', '.join(LFM2_CONFIGS)}")
    return LFM2_CONFIGS[name]


class Probe(nn.Identity):
    """A named point between two operators: hands its tensor on; calibration listens, quantization replaces it."""


class RMSNorm(nn.Module):
    """x [..., size] -> x / rms(x) * weight; the root mean square in float32, as the reference computes it."""

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)).to(x.dtype)


class Rotary(nn.Module):
    """Angles of the rotary position embedding: (start, n) -> cos, sin, each float32 [n, rotary / 2]."""

    def __init__(self, rotary: int, theta: float):
        super().__init__()
        self.rotary, self.theta = rotary, theta

    def forward(self, start: int, n: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        # Computed anew each time: a buffer would have no values in a model made without memory and filled later.
        exponent = torch.arange(0, self.rotary, 2, dtype=torch.float32, device=device) / self.rotary
        position = torch.arange(start, start + n, dtype=torch.float32, device=device)
        angle = position[:, None] * (1.0 / self.theta**exponent)
        return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + rotary / 2) of x [..., n, head_size]; dimensions from `rotary` on stay as they are."""
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


class GatedConv(nn.Module):
    """Gated short convolution: C * conv(B * x), depthwise and causal.

    State: the last kernel - 1 gated values, [batch, width, kernel - 1], zeros at the start of a sequence.
    """

    def __init__(self, config: LanguageConfig):
        super().__init__()
        width = config.width
        self.past = config.kernel - 1
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.b, self.c, self.x = Probe(), Probe(), Probe()
        self.gated = Probe()
        self.conv = nn.Conv1d(width, width, config.kernel, groups=width, bias=False)
        self.convolved = Probe()
        self.product = Probe()
        self.out_proj = nn.Linear(width, width, bias=False)
        self.output = Probe()

    def empty(self, batch: int, like: Tensor) -> Tensor:
        """The state before the first token."""
        return like.new_zeros(batch, self.conv.in_channels, self.past)

    def forward(self, u: Tensor, rotation: tuple[Tensor, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        b, c, x = self.in_proj(u).chunk(3, -1)
        gated = self.gated(self.b(b) * self.x(x)).transpose(1, 2)
        seen = torch.cat([state, gated], -1)
        convolved = self.convolved(self.conv(seen).transpose(1, 2))
        y = self.output(self.out_proj(self.product(self.c(c) * convolved)))
        return y, seen[..., seen.shape[-1] - self.past :]


class Attention(nn.Module):
    """Causal grouped-query attention with normalized queries and keys and rotary positions.

    State: keys (normalized and rotated) and values, each [batch, kv_heads, length, head_size].
    """

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_size = config.heads, config.kv_heads, config.head_size
        self.q_proj = nn.Linear(config.width, config.heads * config.head_size, bias=False)
        self.k_proj = nn.Linear(config.width, config.kv_heads * config.head_size, bias=False)
        self.v_proj = nn.Linear(config.width, config.kv_heads * config.head_size, bias=False)
        self.q, self.k, self.v = Probe(), Probe(), Probe()
        self.q_norm = RMSNorm(config.head_size, config.epsilon)
        self.k_norm = RMSNorm(config.head_size, config.epsilon)
        self.q_rotated, self.k_rotated = Probe(), Probe()
        self.scores, self.probabilities, self.attended = Probe(), Probe(), Probe()
        self.out_proj = nn.Linear(config.heads * config.head_size, config.width, bias=False)
        self.output = Probe()

    def empty(self, batch: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The state before the first token."""
        none = like.new_zeros(batch, self.kv_heads, 0, self.head_size)
        return none, none

    def forward(self, u: Tensor, rotation: tuple[Tensor, Tensor], state: tuple[Tensor, Tensor]
                ) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
        batch, n, _ = u.shape
        q = self.q_norm(self.q(self._split(self.q_proj(u))))
        k = self.k_norm(self.k(self._split(self.k_proj(u))))
        q, k = self.q_rotated(rotate(q, *rotation)), self.k_rotated(rotate(k, *rotation))
        keys = torch.cat([state[0], k], 2)
        values = torch.cat([state[1], self.v(self._split(self.v_proj(u)))], 2)
        # Query heads that share a key head are further rows of its matrix product.
        rows = q.reshape(batch, self.kv_heads, -1, self.head_size)
        scores = self.scores(rows @ keys.transpose(2, 3) * self.head_size**-0.5)
        total = keys.shape[2]
        hidden = torch.ones(n, total, dtype=torch.bool, device=u.device).triu(total - n + 1)
        scores = scores.masked_fill(hidden.repeat(self.heads // self.kv_heads, 1), -math.inf)
        probabilities = self.probabilities(scores.softmax(-1, torch.float32).to(scores.dtype))
        attended = (probabilities @ values).reshape(batch, self.heads, n, self.head_size)
        attended = self.attended(attended.transpose(1, 2).reshape(batch, n, -1))
        return self.output(self.out_proj(attended)), (keys, values)

    def _split(self, x: Tensor) -> Tensor:
        """[batch, n, heads * head_size] -> [batch, heads, n, head_size]."""
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 z) * (w3 z))."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.w1 = nn.Linear(config.width, config.feed_forward, bias=False)
        self.w3 = nn.Linear(config.width, config.feed_forward, bias=False)
        self.gate, self.up = Probe(), Probe()
        self.silu = nn.SiLU()
        self.product = Probe()
        self.w2 = nn.Linear(config.feed_forward, config.width, bias=False)
        self.output = Probe()

    def forward(self, z: Tensor) -> Tensor:
        product = self.product(self.silu(self.gate(self.w1(z))) * self.up(self.w3(z)))
        return self.output(self.w2(product))


class Layer(nn.Module):
    """h += mixer(norm(h)), then h += feed_forward(norm(h))."""

    def __init__(self, config: LanguageConfig, kind: str):
        super().__init__()
        self.operator_norm = RMSNorm(config.width, config.epsilon)
        self.mixer = {"conv": GatedConv, "attention": Attention}[kind](config)
        self.mixed = Probe()
        self.ffn_norm = RMSNorm(config.width, config.epsilon)
        self.feed_forward = FeedForward(config)
        self.output = Probe()

    def forward(self, h: Tensor, rotation: tuple[Tensor, Tensor], state):
        y, state = self.mixer(self.operator_norm(h), rotation, state)
        h = self.mixed(h + y)
        return self.output(h + self.feed_forward(self.ffn_norm(h))), state


@dataclass
class Cache:
    """What the tokens seen so far leave behind: their number, and one state per layer (none before the first)."""

    length: int = 0
    states: list = field(default_factory=list)


class Lfm2(nn.Module):
    """Tokens [batch, n] -> logits [batch, n, vocab]; position i sees the tokens up to i and what the cache holds.

    Linear and embedding weights are drawn from torch's global generator; `head.weight` is `embedding.weight`.
    """

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.embedded = Probe()
        self.rotary = Rotary(config.rotary, config.rope_theta)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.layers)
        self.norm = RMSNorm(config.width, config.epsilon)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.logits = Probe()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for layer in self.layers:  # what is added to the stream starts small, so that its variance does not grow
            for last in (layer.mixer.out_proj, layer.feed_forward.w2):
                nn.init.normal_(last.weight, std=(2 * len(self.layers) * last.in_features) ** -0.5)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits for every position; with a cache the tokens continue what it holds, and it is brought up to date.

        ModelError for tokens of another shape or outside the vocabulary, and past the end of the context.
        """
        cache = Cache() if cache is None else cache
        self._check(tokens, cache)
        batch, n = tokens.shape
        h = self.embedded(self.embedding(tokens))
        rotation = self.rotary(cache.length, n, tokens.device)
        before = cache.states or [layer.mixer.empty(batch, h) for layer in self.layers]
        after = []
        for layer, state in zip(self.layers, before, strict=True):
            h, state = layer(h, rotation, state)
            after.append(state)
        cache.length, cache.states = cache.length + n, after
        return self.logits(self.head(self.norm(h)))

    def _check(self, tokens: Tensor, cache: Cache) -> None:
        config = self.config
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32) or not tokens.numel():
            raise ModelError(f"{config.name}: tokens must be integers [batch, n], none of them 0, got {tokens.dtype} "
                             f"{list(tokens.shape)}: encode the text first")  # fmt: skip
        if cache.length + tokens.shape[1] > config.context:
            raise ModelError(f"{config.name}: {cache.length + tokens.shape[1]} tokens exceed its context of "
                             f"{config.context}: shorten the text")  # fmt: skip
        low, high = (int(bound) for bound in tokens.aminmax())
        if low < 0 or high >= config.vocab:
            raise ModelError(f"{config.name}: token {low if low < 0 else high} is outside its vocabulary of "
                             f"{config.vocab}: use the tokenizer that belongs to the model")  # fmt: skip


def parameter_count(config: LanguageConfig) -> int:
    """Trained values of the model, the tied embedding once; takes no memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Lfm2(config).parameters())


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the latest output of every leaf module (probes, norms, projections, ...) during forward passes.

    Names are module paths: `embedded`, `layers.0.mixer.gated`, `layers.2.feed_forward.product`, `logits`, ...
    """
    outputs: dict[str, Tensor] = {}

    def hook(name):
        def record(_module, _inputs, output):
            outputs[name] = output

        return record

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()
               if not isinstance(module, Rotary) and not any(True for _ in module.children())]  # fmt: skip
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
