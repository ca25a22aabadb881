"""Small random language models in integers, with scales that make their codes fill the range and now and then clip."""

from __future__ import annotations

import math

import numpy as np

from weft.arch.language import (
    GROUP,
    Attention,
    Block,
    Convolution,
    FeedForward,
    LanguageConfig,
    LanguageModel,
    Linear,
    Norm,
)


def tiny_config(**changes) -> LanguageConfig:
    """Lengths that are no multiples of 32, and every kind of layer."""
    fields = {
        "name": "tiny", "vocab": 50, "width": 40, "layers": ("conv", "attention", "conv"), "heads": 4, "kv_heads": 2,
        "head_size": 12, "feed_forward": 56, "kernel": 4, "rope_theta": 100.0, "rotary": 8, "epsilon": 1e-5,
        "context": 200, "bos": 0, "eos": 1,
    }  # fmt: skip
    return LanguageConfig(**(fields | changes))


def random_language(config: LanguageConfig, seed: int = 0) -> LanguageModel:
    """A model whose features have a standard deviation of a few thousand codes."""
    rng = np.random.default_rng(seed)

    def linear(rows: int, columns: int) -> Linear:
        groups = -(-columns // GROUP)
        codes = rng.integers(-8, 8, (rows, groups * GROUP)).astype(np.int8)
        codes[:, columns:] = 0
        factors = rng.integers(1, 256, (rows, groups)).astype(np.uint8)
        # products of unit rows with these weights have a standard deviation of about 1
        scale = rng.uniform(0.5, 1.5, rows) / (4.6 * 150 * math.sqrt(columns))
        return Linear(codes, factors, scale.astype(np.float32))

    def norm(size: int) -> Norm:
        return Norm(rng.integers(-32767, 32768, size).astype(np.int16), 1.5 / 32767)

    def convolution() -> Convolution:
        peak = 65535 // config.kernel  # sums of a convolution must fit 32 bits
        kernel = rng.integers(-peak, peak, (config.width, config.kernel), endpoint=True).clip(-32767, 32767)
        return Convolution(
            norm(config.width), linear(3 * config.width, config.width), kernel.astype(np.int16), 1 / 16000,
            linear(config.width, config.width), b_scale=1e-4, c_scale=1.1e-4, x_scale=0.9e-4, gate_shift=13,
            kernel_shift=14, product_shift=13,
        )  # fmt: skip

    def attention() -> Attention:
        heads, keys = config.heads * config.head_size, config.kv_heads * config.head_size
        return Attention(
            norm(config.width), linear(heads, config.width), linear(keys, config.width), linear(keys, config.width),
            norm(config.head_size), norm(config.head_size), linear(config.width, heads), query_scale=1e-4,
            key_scale=1.1e-4, value_scale=0.9e-4, output_scale=0.8e-4,
        )  # fmt: skip

    def feed_forward(index: int) -> FeedForward:
        return FeedForward(
            norm(config.width), linear(config.feed_forward, config.width), linear(config.feed_forward, config.width),
            linear(config.width, config.feed_forward), up=index % 4, value_scale=1e-4, product_shift=11,
        )  # fmt: skip

    residual, blocks = 1e-4, []
    for index, kind in enumerate(config.layers):
        shifts = (index & 1, index >> 1 & 1)
        scales = (residual * 2.0 ** shifts[0], residual * 2.0 ** sum(shifts))
        blocks.append(Block(convolution() if kind == "conv" else attention(), feed_forward(index), shifts, scales))
        residual = scales[1]
    return LanguageModel(config, linear(config.vocab, config.width), 1e-4, tuple(blocks), norm(config.width), 1.5e-4)
