"""The golden language model against one in Python's own integers, and against itself in chunks of other lengths."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from tests.kit.language import random_language, tiny_config
from weft.arch.errors import ModelError
from weft.arch.language import GROUP, UNIT_SCALE, Convolution, norm_constant, row_unit
from weft.arch.numerics import EXP2, SIGMOID
from weft.sim import golden_language
from weft.sim.golden_language import GoldenLanguage, KeyValues

TOKENS = np.random.default_rng(7).integers(0, 50, 130)

# One number at a time: rounding by fractions, roots by math.isqrt, no arrays but the model's own.


def rounded(x: int, shift: int) -> int:
    return round(Fraction(x, 1 << shift))


def clamp(x: int, peak: int = 0) -> int:
    return max(-peak or -32768, min(peak or 32767, x))


def requantize(acc: int, scale: tuple[int, int], peak: int = 0) -> int:
    assert -(1 << 31) <= acc < 1 << 31
    return clamp(rounded(acc * scale[0], scale[1]), peak)


def combine(a, b):
    product, cut = int(a[0]) * int(b[0]), 15
    if product >= 1 << 31:
        cut += 1
    return product >> cut, max(0, min(62, int(a[1]) + int(b[1]) - cut))


def ratio(numerator: int, mantissa: int, bits: int):
    """numerator / (mantissa * 2**(bits - 32)), cut to 16 bits, in units of 2**-16."""
    quotient = Fraction(numerator << 32, mantissa) / Fraction(2) ** bits
    shift = 16
    while quotient * Fraction(2) ** (shift - 16) >= 1 << 16:
        shift -= 1
    while quotient * Fraction(2) ** (shift - 16) < 1 << 15:
        shift += 1
    return math.floor(quotient * Fraction(2) ** (shift - 16)), shift


def normalized(x: int):
    return x << (32 - x.bit_length()), x.bit_length()


def root(x: int):
    half = (62 - x.bit_length()) // 2
    return 2 * math.isqrt(x << 2 * half), 31 - half


def quantize(values: list[int], peak: int):
    magnitude = max(1, *(abs(v) for v in values))
    mult, shift = ratio(peak, *normalized(magnitude))
    assert shift >= 16
    return [requantize(v, (mult, shift - 16), peak) for v in values], magnitude


def plain(values: list[int]):
    codes, magnitude = quantize(values, 127)
    return codes, combine(ratio(magnitude, *normalized(1)), UNIT_SCALE)


def normed(values: list[int], norm, constant: int):
    codes, magnitude = quantize([v * int(w) for v, w in zip(values, norm.codes, strict=True)], 127)
    return codes, combine(ratio(magnitude, *root(sum(v * v for v in values) + constant)), UNIT_SCALE)


def product(row, linear, unit: float, output) -> list[int]:
    codes, scale = row
    mults, shifts = linear.scales(unit, output)
    factors = linear.factors.tolist()
    return [
        requantize(sum(x * w * factors[out][i // GROUP] for i, (x, w) in enumerate(zip(codes, weights, strict=False))),
                   combine(scale, (mults[out], shifts[out])))
        for out, weights in enumerate(linear.codes.tolist())
    ]


def silu(x: int, up: int) -> int:
    argument = min(abs(x) << up, 32767)
    index, fraction = divmod(argument, 64)
    low, high = int(SIGMOID[index]), int(SIGMOID[index + 1])
    sigmoid = low + math.floor(Fraction((high - low) * fraction, 64) + Fraction(1, 2))
    return rounded(x * (65536 - sigmoid if x < 0 else sigmoid), 16)


class SlowLanguage:
    """The whole model; a token at a time."""

    def __init__(self, model):
        self.model, self.seen = model, [[] for _ in model.blocks]
        self.position = 0

    def step(self, token: int) -> dict[str, list[int]]:
        model, config, record = self.model, self.model.config, {}
        mult, shift = (int(part[token]) for part in model.embedding.scales(model.norm.unit(), model.logit_scale))
        scale = combine((mult, shift), model.expand_factor())
        h = [requantize(int(w), scale) for w in model.embedding.weights()[token][: config.width]]
        record["embedding"] = h
        residual = model.residual
        for i, block in enumerate(model.blocks):
            mixer, part = block.mixer, block.feed_forward
            row = normed(h, mixer.norm, norm_constant(config.width, config.epsilon, residual))
            record[f"{i}.mixer.norm"] = row[0]
            y, scale = (self.convolve if isinstance(mixer, Convolution) else self.attend)(
                mixer, row, self.seen[i], record, f"{i}.mixer.")
            h = self.add(h, block.shifts[0], y, mixer.out_projection, scale, block.residual[0], record,
                         f"{i}.mixer.", "out_projection")
            row = normed(h, part.norm, norm_constant(config.width, config.epsilon, block.residual[0]))
            name = f"{i}.feed_forward."
            record[name + "norm"] = row[0]
            gate = record[name + "gate"] = product(row, part.gate, part.norm.unit(), part.gate_scale)
            value = record[name + "value"] = product(row, part.value, part.norm.unit(), part.value_scale)
            y = record[name + "product"] = [
                clamp(rounded(silu(a, part.up) * b, part.product_shift)) for a, b in zip(gate, value, strict=True)]
            h = self.add(h, block.shifts[1], y, part.down, part.product_scale, block.residual[1], record, name, "down")
            residual = block.residual[1]
        row = normed(h, model.norm, norm_constant(config.width, config.epsilon, residual))
        record["norm"] = row[0]
        record["logits"] = product(row, model.embedding, model.norm.unit(), model.logit_scale)
        self.position += 1
        return record

    @staticmethod
    def add(h, shift, y, linear, scale, output, record, prefix, name):
        row = plain(y)
        record[prefix + "row"] = row[0]
        o = record[prefix + name] = product(row, linear, row_unit(scale), output)
        h = record[prefix + "residual"] = [clamp(rounded(a, shift) + b) for a, b in zip(h, o, strict=True)]
        return h

    @staticmethod
    def convolve(mixer, row, past, record, name):
        width, taps = mixer.kernel.shape
        scales = np.array([s for s in (mixer.b_scale, mixer.c_scale, mixer.x_scale) for _ in range(width)])
        out = record[name + "in_projection"] = product(row, mixer.in_projection, mixer.norm.unit(), scales)
        b, c, x = out[:width], out[width : 2 * width], out[2 * width :]
        gate = [clamp(rounded(p * q, mixer.gate_shift)) for p, q in zip(b, x, strict=True)]
        past.append(gate)
        window = ([[0] * width] * taps + past)[-taps:]
        conv = [clamp(rounded(sum(int(mixer.kernel[i, j]) * window[j][i] for j in range(taps)), mixer.kernel_shift))
                for i in range(width)]
        y = [clamp(rounded(p * q, mixer.product_shift)) for p, q in zip(c, conv, strict=True)]
        record |= {name + "gate": gate, name + "convolution": conv, name + "product": y}
        return y, mixer.product_scale

    def attend(self, mixer, row, past, record, name):
        config, unit = self.model.config, mixer.norm.unit()
        size, half = config.head_size, config.rotary // 2
        angles = [self.position * config.rope_theta ** (-2 * i / config.rotary) for i in range(half)]
        table = [(round(math.cos(a) * 2**14), round(math.sin(a) * 2**14)) for a in angles]

        def heads(codes):
            return [codes[first : first + size] for first in range(0, len(codes), size)]

        def turned(head, norm, scale, factor):
            x = [rounded(a * int(w), 15) for a, w in zip(head, norm.codes, strict=True)]
            v = [a << 14 for a in x]
            for i, (cosine, sine) in enumerate(table):
                v[i] = x[i] * cosine - x[i + half] * sine
                v[i + half] = x[i + half] * cosine + x[i] * sine
            codes, magnitude = quantize(v, 127)
            constant = norm_constant(size, config.epsilon, scale)
            return codes, combine(ratio(magnitude, *root(sum(a * a for a in head) + constant)), factor)

        q = product(row, mixer.query, unit, mixer.query_scale)
        k = product(row, mixer.key, unit, mixer.key_scale)
        v = product(row, mixer.value, unit, mixer.value_scale)
        queries = [turned(head, mixer.query_norm, mixer.query_scale, UNIT_SCALE) for head in heads(q)]
        keys = [turned(head, mixer.key_norm, mixer.key_scale, mixer.key_factor()) for head in heads(k)]
        values = [quantize(head, 127) for head in heads(v)]
        past.append((keys, values))
        output = []
        for head, (query, query_scale) in enumerate(queries):
            kv = head // config.queries
            scores = [requantize(sum(a * b for a, b in zip(query, keys[kv][0], strict=True)),
                                 combine(query_scale, keys[kv][1])) for keys, _ in past]
            powers = []
            for score in scores:
                whole, part = divmod(max(scores) - score, 256)
                powers.append(rounded(int(EXP2[part]), min(whole, 17)))
            codes, largest = quantize([p * values[kv][1] for p, (_, values) in zip(powers, past, strict=True)], 255)
            scale = combine(ratio(largest, *normalized(sum(powers))), UNIT_SCALE)
            output += [requantize(sum(c * values[kv][0][i] for c, (_, values) in zip(codes, past, strict=True)),
                                  combine(scale, mixer.value_parameters())) for i in range(size)]
        record |= {name + "query": q, name + "key": k, name + "value": v, name + "output": output}
        for part, rows in (("query_row", queries), ("key_row", keys), ("value_row", values)):
            record[name + part] = [code for codes, _ in rows for code in codes]
        return output, mixer.output_scale


@pytest.mark.parametrize("seed", [0, 1])
def test_equals_a_model_in_pythons_integers(seed):
    model = random_language(tiny_config(), seed)
    slow, golden = SlowLanguage(model), GoldenLanguage(model)
    record: dict[str, np.ndarray] = {}
    logits = golden.forward(TOKENS[:9], golden.new_cache(), record, all_logits=True)
    for n, token in enumerate(TOKENS[:9].tolist()):
        want = slow.step(token)
        assert list(record) != [] and set(record) == set(want)
        for name, codes in want.items():
            assert record[name].dtype == np.int32 and record[name][n].tolist() == codes, name
        assert logits[n].tolist() == want["logits"]


def assert_same(a, b):
    assert a.length == b.length
    for ours, theirs in zip(a.layers, b.layers, strict=True):
        parts = [list(vars(x).values()) if isinstance(x, KeyValues) else [x] for x in (ours, theirs)]
        assert all(np.array_equal(x, y) for x, y in zip(*parts, strict=True))


def test_chunks_make_no_difference(monkeypatch):
    golden = GoldenLanguage(random_language(tiny_config()))
    whole = golden.new_cache()
    want = golden.forward(TOKENS, whole, all_logits=True)
    assert want.dtype == np.int32 and want.shape == (130, 50) and len(np.unique(want)) > 1000
    for chunk in (1, 7, 64):
        monkeypatch.setattr(golden_language, "BLOCK_SCORES", chunk * 900)  # attention in blocks of queries, too
        monkeypatch.setattr(golden_language, "BLOCK_ROWS", 10 + chunk)
        monkeypatch.setattr(golden_language, "BLOCK_RESULTS", 300)
        cache, got = golden.new_cache(), []
        for first in range(0, len(TOKENS), chunk):
            record = {}
            got.append(golden.forward(TOKENS[first : first + chunk], cache, record))
            assert np.array_equal(record["logits"], got[-1][None]) and record["norm"].shape == (1, 40)
        assert_same(cache, whole)
        assert np.array_equal(got, want[np.minimum(np.arange(len(got)) * chunk + chunk, 130) - 1])


def test_longer_kernels_than_texts_and_whole_heads_rotated():
    golden = GoldenLanguage(random_language(tiny_config(kernel=15, rotary=12, heads=2, epsilon=0.9)))
    whole, parts = golden.new_cache(), golden.new_cache()
    want = golden.forward(TOKENS[:6], whole)
    for token in TOKENS[:6]:
        got = golden.forward(np.array([token]), parts)
    assert np.array_equal(got, want)
    assert_same(whole, parts)


def test_the_answer_is_the_first_of_the_greatest():
    assert GoldenLanguage.answer(np.array([3, 9, -1, 9])) == 1


def test_unusable_tokens_are_refused():
    golden = GoldenLanguage(random_language(tiny_config()))
    cache = golden.new_cache()
    for tokens in ([0, 50], [-1]):
        with pytest.raises(ModelError, match="outside its vocabulary of 50"):
            golden.forward(np.array(tokens), cache)
    for tokens in (np.zeros((1, 2), int), np.zeros(0, int), np.zeros(2)):
        with pytest.raises(ModelError, match="tokens must be integers"):
            golden.forward(tokens, cache)
    with pytest.raises(ModelError, match="201 tokens exceed the 200 positions"):
        golden.forward(np.zeros(201, int), cache)
    assert cache.length == 0
    golden.forward(np.zeros(200, int), cache)
    with pytest.raises(ModelError, match="201 tokens exceed"):
        golden.forward(np.zeros(1, int), cache)


def test_positions_end_where_the_sums_of_a_softmax_might_overflow():
    golden = GoldenLanguage(random_language(tiny_config(context=128000)))
    assert golden.positions * 65535 < 1 << 32 and golden.positions * 255 * 127 < 1 << 31
    with pytest.raises(ModelError, match="positions that can be used"):
        golden.forward(np.zeros(golden.positions + 1, int), golden.new_cache())


def test_sums_that_might_leave_int32_are_refused():
    wide = tiny_config(feed_forward=9216, layers=("conv",))
    model = random_language(wide)
    GoldenLanguage(model)
    down = model.blocks[0].feed_forward.down
    codes, factors = down.codes.copy(), down.factors.copy()
    codes[3], factors[3] = -8, 255
    part = replace(model.blocks[0].feed_forward, down=replace(down, codes=codes, factors=factors))
    model = replace(model, blocks=(replace(model.blocks[0], feed_forward=part),))
    with pytest.raises(ModelError, match=r"0\.feed_forward\.down: a sum of products can reach 2387"):
        GoldenLanguage(model)


def test_scales_that_no_factor_expresses_are_refused():
    model = random_language(tiny_config())
    with pytest.raises(ModelError, match="embedding: requantize ratio"):
        GoldenLanguage(replace(model, logit_scale=1e-13))
    with pytest.raises(ModelError, match=r"1\.mixer.*: requantize ratio"):
        mixer = replace(model.blocks[1].mixer, output_scale=1e-12)
        GoldenLanguage(replace(model, blocks=(model.blocks[0], replace(model.blocks[1], mixer=mixer), model.blocks[2])))
