"""Quantized language models survive a file; damaged files and impossible models are refused with a clear word."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from tests.kit.language import random_language, tiny_config
from weft.arch import language
from weft.arch.errors import ModelError
from weft.arch.language import (
    METADATA,
    Attention,
    Convolution,
    LanguageModel,
    Linear,
    Norm,
    norm_constant,
    rotation_table,
    row_unit,
)

# A file


@pytest.fixture
def model() -> LanguageModel:
    return random_language(tiny_config())


@pytest.fixture
def path(model, tmp_path):
    path = tmp_path / "folder" / "tiny.lm.safetensors"
    model.save(path)
    return path


def assert_same(a, b) -> None:
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    elif hasattr(a, "__dataclass_fields__"):
        assert type(a) is type(b)
        for field in fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, tuple):
        assert isinstance(b, tuple) and len(a) == len(b)
        for ours, theirs in zip(a, b, strict=True):
            assert_same(ours, theirs)
    else:
        assert type(a) is type(b) and a == b


def test_round_trip(model, path, tmp_path):
    loaded = LanguageModel.load(path)
    assert_same(model, loaded)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_truncated_files_are_refused(path):
    raw = path.read_bytes()
    for size in {0, 1, 7, 8, 100, len(raw) // 2, len(raw) - 1}:
        path.write_bytes(raw[:size])
        with pytest.raises(ModelError, match=r"tiny\.lm\.safetensors: not a safetensors file, or cut short"):
            LanguageModel.load(path)


def test_foreign_files_are_refused(path, tmp_path):
    path.write_bytes(b"#!/bin/sh\necho not a model\n" * 10)
    with pytest.raises(ModelError, match="not a safetensors file"):
        LanguageModel.load(path)
    save_file({"weights": np.zeros(3)}, path)
    with pytest.raises(ModelError, match="a safetensors file, but not a quantized language model"):
        LanguageModel.load(path)
    for missing in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ModelError, match=r"cannot be read|not a safetensors file"):
            LanguageModel.load(missing)


def test_numbers_that_numpy_has_not_are_refused(path):
    header = json.dumps({"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(ModelError, match=r"tiny\.lm\.safetensors"):
        LanguageModel.load(path)


def test_large_files_are_refused(path, monkeypatch):
    monkeypatch.setattr(language, "MAX_FILE_BYTES", 100)
    with pytest.raises(ModelError, match=r"safetensors: larger than 100 bytes"):
        LanguageModel.load(path)


def rewrite(path, change) -> None:
    with language.safe_open(path, "numpy") as file:
        meta, tensors = json.loads(file.metadata()[METADATA]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = change(meta, tensors)
    path.write_bytes(save(tensors, {METADATA: text if isinstance(text, str) else json.dumps(meta)}))


def put(**changes):
    return lambda meta, tensors: meta["values"].update({name.replace("__", "."): x for name, x in changes.items()})


def config(**changes):
    return lambda meta, tensors: meta["config"].update(changes)


@pytest.mark.parametrize("change, message", [
    (lambda meta, tensors: "{", "malformed language model"),
    (lambda meta, tensors: "[]", "malformed language model"),
    (lambda meta, tensors: "[" * 100000, "malformed language model"),
    (lambda meta, tensors: meta.update(format=99), "safetensors: format 99, this Weft reads 1"),
    (lambda meta, tensors: meta.pop("format"), "malformed language model"),
    (lambda meta, tensors: meta.pop("values"), "malformed language model"),
    (lambda meta, tensors: meta.update(values=[]), "malformed language model"),
    (lambda meta, tensors: meta["values"].pop("logit_scale"), r"malformed language model \('logit_scale'\)"),
    (lambda meta, tensors: meta["config"].pop("width"), "malformed language model"),
    (config(layers=3), "malformed language model"),
    (config(colour=3), "malformed language model"),
    (config(layers=["conv", "dense", "conv"]), "layer kind 'dense' is not one of conv, attention"),
    (config(layers=["conv", "attention"]), "its configuration has no blocks.2"),
    (config(layers=["conv", "conv", "conv"]), "malformed language model"),
    (config(layers=[]), "it has no layers"),
    (config(width="40"), "width must be a positive integer, got '40'"),
    (config(width=-40), "width must be a positive integer"),
    (config(width=64), r"embedding.codes must be int8 \[50, 64\]|norm must be int16 \[64\]"),
    (config(vocab=51), r"embedding.codes must be int8 \[51, 64\], got int8 \(50, 64\)"),
    (config(heads=3), "3 heads do not divide among 2 key heads"),
    (config(rotary=7), "rotary must be even"),
    (config(rotary=14), "at most head_size = 12, got 14"),
    (config(epsilon=0.0), "epsilon must be in"),
    (config(epsilon=float("nan")), "epsilon must be in"),
    (config(epsilon="small"), "malformed language model"),
    (config(rope_theta=1), "rope_theta must be above 1"),
    (config(kernel=16), "16 taps exceeds the engine's 15"),
    (config(kernel=3), r"blocks.0.mixer.kernel must be int16 \[40, 3\]"),
    (config(eos=50), "eos is not a token"),
    (lambda meta, tensors: tensors.clear(), "malformed language model"),
    (lambda meta, tensors: tensors.update(more=np.zeros(1)), "its configuration has no more"),
    (put(logit_scale="1"), "logit_scale must be a positive number, got '1'"),
    (put(logit_scale=float("nan")), "logit_scale must be a positive number"),
    (put(logit_scale=0.0), "logit_scale must be a positive number"),
    (put(residual=float("inf")), "residual must be a positive number"),
    (put(norm__scale=-1.0), "norm.scale must be a positive number"),
    (put(blocks__1__mixer__key_norm__scale=None), "blocks.1.mixer.key_norm.scale must be a positive number, got None"),
    (put(blocks__0__mixer__gate_shift=48), r"blocks.0.mixer.gate_shift must be 0\.\.47, got 48"),
    (put(blocks__0__mixer__gate_shift=1.5), r"gate_shift must be 0\.\.47, got 1\.5"),
    (put(blocks__2__feed_forward__product_shift=-1), r"product_shift must be 0\.\.47, got -1"),
    (put(blocks__2__feed_forward__up=4), r"blocks.2.feed_forward.up must be 0\.\.3"),
    (put(blocks__2__feed_forward__up=0.5), r"blocks.2.feed_forward.up must be 0\.\.3"),
    (put(blocks__1__shifts=[0, 16]), "blocks.1.shifts must be two integers"),
    (put(blocks__1__shifts=[0]), "blocks.1.shifts must be two integers"),
    (put(blocks__1__shifts=[0, 0]), "blocks.1.residual must be"),
    (put(blocks__1__shifts=3), "blocks.1.shifts must be two integers"),
    (put(blocks__1__residual=[1.0, 1.0]), "blocks.1.residual must be"),
    (put(blocks__1__residual=["a", "b"]), "its configuration has no blocks.1.residual"),
])
def test_malformed_files_are_refused(path, change, message):
    rewrite(path, change)
    with pytest.raises(ModelError, match=message) as caught:
        LanguageModel.load(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("name, change, message", [
    ("embedding.codes", lambda x: x.astype(np.int16), "embedding.codes must be int8"),
    ("embedding.codes", lambda x: x[:, :32], r"embedding.codes must be int8 \[50, 64\], got int8 \(50, 32\)"),
    ("embedding.codes", lambda x: np.where(x == 7, 8, x).astype(np.int8), "embedding has codes outside -8..7"),
    ("embedding.codes", lambda x: np.where(x == 7, -9, x).astype(np.int8), "embedding has codes outside -8..7"),
    ("embedding.codes", lambda x: x.reshape(-1), "embedding.codes must be int8"),
    ("embedding.factors", lambda x: x.astype(np.int8), "embedding.factors must be uint8"),
    ("embedding.factors", lambda x: x[:, :1], "embedding.factors must be uint8"),
    ("embedding.scale", lambda x: x * 0, "embedding.scale must be 50 positive numbers"),
    ("embedding.scale", lambda x: x * np.float32(np.nan), "embedding.scale must be 50 positive numbers"),
    ("embedding.scale", lambda x: -x, "embedding.scale must be 50 positive numbers"),
    ("embedding.scale", lambda x: x.astype(np.float64), "of float32"),
    ("embedding.scale", lambda x: x[:7], "embedding.scale must be 50 positive numbers"),
    ("norm.codes", lambda x: x[:7], r"norm must be int16 \[40\]"),
    ("norm.codes", lambda x: x.astype(np.int32), r"norm must be int16 \[40\]"),
    ("norm.codes", lambda x: np.full_like(x, -32768), "norm has the code -32768"),
    ("blocks.1.mixer.query_norm.codes", lambda x: x[:7], r"blocks.1.mixer.query_norm must be int16 \[12\]"),
    ("blocks.1.mixer.value.codes", lambda x: x[:7], r"blocks.1.mixer.value.codes must be int8 \[24, 64\]"),
    ("blocks.1.mixer.out_projection.factors", lambda x: x[:7], "blocks.1.mixer.out_projection.factors must be uint8"),
    ("blocks.0.mixer.in_projection.codes", lambda x: x[:40], r"blocks.0.mixer.in_projection.codes must be int8 \[120"),
    ("blocks.0.mixer.kernel", lambda x: x.astype(np.int8), r"blocks.0.mixer.kernel must be int16 \[40, 4\]"),
    ("blocks.0.mixer.kernel", lambda x: np.full_like(x, -32768), "kernel could overflow the sum"),
    ("blocks.2.feed_forward.down.codes", lambda x: x.T, r"blocks.2.feed_forward.down.codes must be int8 \[40, 64\]"),
    ("blocks.2.feed_forward.gate.codes", lambda x: None, r"malformed language model \('blocks.2.feed_forward.gate"),
])
def test_malformed_tensors_are_refused(path, name, change, message):
    def edit(meta, tensors):
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = np.ascontiguousarray(changed)

    rewrite(path, edit)
    with pytest.raises(ModelError, match=message):
        LanguageModel.load(path)


def test_a_number_does_not_replace_a_tensor(path):
    def edit(meta, tensors):
        del tensors["norm.codes"]
        meta["values"]["norm.codes"] = [1] * 40

    rewrite(path, edit)
    with pytest.raises(ModelError, match=r"malformed language model \('norm.codes'\)"):
        LanguageModel.load(path)


def test_models_in_memory_are_checked(model):
    model.check("tiny")
    with pytest.raises(ModelError, match="has 2 blocks, 3 are configured"):
        replace(model, blocks=model.blocks[:2]).check("tiny")
    with pytest.raises(ModelError, match=r"tiny: blocks.0 is not of kind conv"):
        replace(model, blocks=(model.blocks[1], model.blocks[1], model.blocks[2])).check("tiny")


# Units and factors: what codes and scales mean in real numbers


def test_weights_are_code_times_group_factor(model):
    item = model.embedding
    assert item.weights().dtype == np.int16
    for row, column in ((0, 0), (3, 31), (3, 32), (49, 39)):
        assert item.weights()[row, column] == int(item.codes[row, column]) * int(item.factors[row, column // 32])


def test_scales_give_the_real_ratio():
    item = Linear(np.zeros((2, 32), np.int8), np.ones((2, 1), np.uint8), np.array([1e-3, 3e-5], np.float32))
    mult, shift = item.scales(2.0, np.array([0.5, 0.25]))
    assert mult * 0.5**shift == pytest.approx(np.float64(item.scale) * 2.0 / [0.5, 0.25], rel=2**-16)


def test_units_are_real_values():
    mult, shift = language.UNIT_SCALE
    # a plain row: value = code * magnitude / 127 * scale; row scale = magnitude in units of 2**-16, times UNIT_SCALE
    assert row_unit(0.5) * mult / 2**shift == pytest.approx(65536 / 127 * 0.5)
    assert Norm(np.ones(16, np.int16), 0.5).unit() == pytest.approx(4 * row_unit(0.5))


def test_norm_constant_is_epsilon_in_squared_codes():
    assert norm_constant(64, 1e-5, 1e-3) == 640
    assert norm_constant(64, 1e-5, 1e3) == 1 and norm_constant(64, 0.5, 1e-9) == (1 << 32) - 1


def test_factors_are_products_of_scales(model):
    attention = model.blocks[1].mixer
    assert isinstance(attention, Attention)
    mult, shift = attention.key_factor()
    step = 256 * math.log2(math.e)
    keys = 2 * 65536 * attention.key_norm.scale / 127
    assert mult / 2**shift == pytest.approx(attention.query_unit() * keys * step, rel=2**-15)
    mult, shift = model.expand_factor()
    token = 7
    logits = np.float64(model.embedding.scale[token]) * model.norm.unit() / model.logit_scale
    assert logits * mult / 2**shift == pytest.approx(model.embedding.scale[token] / model.residual, rel=2**-15)


def test_shifts_give_the_scales_of_products(model):
    mixer, part = model.blocks[0].mixer, model.blocks[0].feed_forward
    assert isinstance(mixer, Convolution)
    assert mixer.gate_scale == mixer.b_scale * mixer.x_scale * 2**mixer.gate_shift
    shift = mixer.kernel_shift + mixer.product_shift
    assert mixer.product_scale == pytest.approx(mixer.c_scale * mixer.kernel_scale * mixer.gate_scale * 2**shift)
    assert part.product_scale == pytest.approx(2.0 ** (part.up - 11) * part.value_scale * 2**part.product_shift)


def test_rotation_table():
    shape = tiny_config(rotary=8, rope_theta=16.0)
    cosine, sine = rotation_table(shape, np.array([0, 1, 199]))
    assert cosine.shape == sine.shape == (3, 4) and cosine.dtype == sine.dtype == np.int64
    assert cosine[0].tolist() == [16384] * 4 and sine[0].tolist() == [0] * 4
    for row, position in enumerate((0, 1, 199)):
        for i, frequency in enumerate((1, 1 / 2, 1 / 4, 1 / 8)):
            assert cosine[row, i] == round(math.cos(position * frequency) * 16384)
            assert sine[row, i] == round(math.sin(position * frequency) * 16384)
