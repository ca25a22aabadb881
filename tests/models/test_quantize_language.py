"""Codes and scales that Brevitas holds are those that are exported, and the integers compute what the network does."""

from __future__ import annotations

from dataclasses import replace

import brevitas.nn as qnn
import numpy as np
import pytest
import torch
from brevitas.graph.gptq import GPTQ

from tests.kit.language import tiny_config
from weft.arch import numerics
from weft.arch.errors import ModelError
from weft.arch.language import GROUP, LanguageModel
from weft.models.lfm2 import Lfm2
from weft.models.quantize_language import (
    Options,
    RowActivation,
    _GroupGptq,
    apply_gptq,
    calibration,
    group_factors,
    group_scales,
    integer_model,
    linear,
    norm,
    plain,
    precision,
    quantize,
    quantized,
    random_state,
)
from weft.sim.golden_language import GoldenLanguage

CONFIG = tiny_config()
TEXT = np.random.default_rng(3).integers(0, CONFIG.vocab, 500)


@pytest.fixture(scope="module")
def state():
    return random_state(CONFIG, 1)


def layers(model):
    return [layer for layer in model.modules() if isinstance(layer, qnn.QuantLinear)]


def float_model(state, config=CONFIG) -> Lfm2:
    model = Lfm2(config)
    model.load_state_dict(state)
    return model.eval()


def cosine(a, b) -> float:
    a, b = np.float64(a).ravel(), np.float64(b).ravel()
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


# Weights


@pytest.mark.parametrize("gptq", [False, True])
def test_fake_quantized_weights_are_code_times_factor_times_scale(state, gptq):
    model = quantized(CONFIG, state)
    if gptq:
        apply_gptq(model, calibration(CONFIG, Options(TEXT, 64)))
    assert len(layers(model)) == 2 * 2 + 4 + 3 * 3 + 1
    for layer in layers(model):
        item = linear(layer)
        assert item.codes.dtype == np.int8 and -8 <= item.codes.min() < 0 < item.codes.max() <= 7
        assert item.codes.shape[1] == item.factors.shape[1] * GROUP and item.factors.min() >= 1
        assert not item.codes[:, layer.in_features :].any()
        weight = plain(layer.quant_weight()).detach().numpy()
        assert np.array_equal(weight, (item.weights() * np.float64(item.scale)[:, None])[:, : layer.in_features])


def test_one_tensor_is_embedding_and_head(state):
    model = quantized(CONFIG, state)
    tokens = torch.arange(CONFIG.vocab)
    assert torch.equal(model.embedding(tokens), plain(model.head.quant_weight()))
    assert "embedding.weight" not in dict(model.named_parameters())


def test_group_scales():
    weight = torch.randn(64, 72, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, 64)[:, None]
    weight[:, 32:64] *= 0.01
    weight[5] = 0
    factors, scale = group_scales(weight, 1)
    assert factors.shape == (64, 3) and ((factors >= 1) & (factors <= 255) & (factors == factors.round())).all()
    live = np.arange(64) != 5
    assert (factors[live].amax(1) >= 254).all() and ((scale > 0) & scale.isfinite()).all()
    mantissa = torch.frexp(scale)[0] * 4096
    assert torch.equal(mantissa, mantissa.round())
    reach = 7.5 * (factors * scale[:, None])[:, [0, 2]]  # in the group between, factors are a few units only
    assert (weight[:, :32].abs().amax(1) <= reach[:, 0]).all() and (weight[:, 64:].abs().amax(1) <= reach[:, 1]).all()

    def error(factors, scale):
        step = (factors * scale[:, None]).repeat_interleave(32, 1)[:, :72]
        return ((weight / step).round().clamp(-8, 7) * step - weight).square().sum(1)

    best = error(*group_scales(weight, 13))
    assert (best <= error(factors, scale) + 1e-12).all() and best.sum() < 0.95 * error(factors, scale).sum()


def test_chunks_of_rows_make_no_difference(monkeypatch):
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    want = group_scales(weight)
    monkeypatch.setattr("weft.models.quantize_language.CHUNK", 64 * 7)
    assert all(torch.equal(a, b) for a, b in zip(group_scales(weight), want, strict=True))


def test_gptq_lowers_the_error_on_its_samples(state):
    samples = calibration(CONFIG, Options(TEXT, 64))
    before, after = quantized(CONFIG, state), quantized(CONFIG, state)
    head = linear(after.head)
    apply_gptq(after, samples)
    assert np.array_equal(linear(after.head).codes, head.codes)
    inputs: list[torch.Tensor] = []
    name = "layers.0.feed_forward.w1"
    handle = before.get_submodule(name).register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    with torch.no_grad():
        before(samples)
        handle.remove()
        want = inputs[0] @ state[f"{name}.weight"].T
        errors = [float((layer.get_submodule(name)(inputs[0]) - want).square().mean()) for layer in (before, after)]
    assert errors[1] < 0.9 * errors[0]


def test_a_column_for_gptq_is_the_one_brevitas_makes(state):
    layer = quantized(CONFIG, state).layers[0].feed_forward.w2
    ours = _GroupGptq(layer, "", False, create_weight_orig=False, num_blocks=1, len_parallel_layers=1)
    order = [torch.randperm(CONFIG.feed_forward)]
    for column in (0, 31, 32, 55):
        assert torch.equal(ours.get_quant_weights(column, 0, order), GPTQ.get_quant_weights(ours, column, 0, order))


# Activations


def test_rows_are_quantized_as_the_engine_does():
    values = np.random.default_rng(0).integers(-30000, 30000, (50, 40))
    values[7] = 0
    codes, magnitude = numerics.quantize_row(values, 127)
    quantizer = qnn.QuantIdentity(act_quant=RowActivation, return_quant_tensor=True).eval()
    got = quantizer(torch.tensor(values, dtype=torch.float32)[None])
    assert np.abs(got.int()[0].numpy() - codes).max() <= 1  # half-way cases
    assert (got.int()[0].numpy() == codes).mean() > 0.99
    assert got.scale[0, live := np.arange(50) != 7, 0].numpy() == pytest.approx(magnitude[live] / 127)


def test_precision_switches_parts_on_and_off(state):
    tokens = torch.tensor(TEXT[:30])[None]
    reference, model = float_model(state), quantized(CONFIG, state)
    with torch.no_grad():
        want, full = reference(tokens), model(tokens)
        outputs = []
        for enabled in ((0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1), (0, 1, 0), (0, 0, 1)):
            with precision(model, *map(bool, enabled)):
                outputs.append(model(tokens))
        assert torch.equal(model(tokens), full)
    assert torch.allclose(outputs[0], want, atol=1e-5)
    assert torch.equal(outputs[3], full)
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
    errors = [float((output - want).square().mean()) for output in outputs]
    assert errors[1] > 10 * errors[4] > 0 and errors[1] > 10 * errors[5] > 0


# The integer model


def test_the_integers_compute_what_the_network_does(state):
    samples = calibration(CONFIG, Options(TEXT, 64))
    model = quantized(CONFIG, state)
    result = integer_model(model, samples)
    golden = GoldenLanguage(result)
    record: dict[str, np.ndarray] = {}
    got = golden.forward(samples[0].numpy(), golden.new_cache(), record, all_logits=True) * result.logit_scale
    with torch.no_grad():
        want = model(samples[:1])[0].numpy()
    assert cosine(got, want) > 0.998
    assert np.std(got) == pytest.approx(np.std(want), rel=0.02)
    for name, codes in record.items():  # calibration fits with headroom, and little of the range is wasted
        if name.rsplit(".", 1)[-1] not in ("norm", "row", "query_row", "key_row", "value_row", "gate"):
            assert 300 < np.abs(codes).max() < 32767, name


def test_integer_scales_follow_the_features(state):
    """A smaller embedding is normalized away by the first layer; the residual stream's scale grows there."""
    small = dict(state)
    small["embedding.weight"] = small["head.weight"] = state["embedding.weight"] / 32
    model, usual = quantize(CONFIG, small, Options(TEXT)), quantize(CONFIG, state, Options(TEXT))
    assert model.residual == pytest.approx(usual.residual / 32)
    assert model.blocks[0].shifts[0] >= usual.blocks[0].shifts[0] + 2 and max(model.blocks[1].shifts) <= 2
    golden = GoldenLanguage(model)
    got = golden.forward(TEXT[:40], golden.new_cache(), None, True)
    with torch.no_grad():
        want = quantized(CONFIG, small)(torch.tensor(TEXT[:40])[None])[0].numpy()
    assert cosine(got, want) > 0.99


@pytest.mark.parametrize("changes", [
    {"layers": ("conv",)}, {"layers": ("attention",)}, {"kernel": 1}, {"rotary": 12, "heads": 2}, {"width": 32}])
def test_other_shapes(changes):
    config = replace(CONFIG, **changes)
    state = random_state(config, 2)
    result = quantize(config, state, Options(TEXT, 64))
    golden = GoldenLanguage(result)
    got = golden.forward(TEXT[:50], golden.new_cache(), None, True)
    with torch.no_grad():
        want = quantized(config, state)(torch.tensor(TEXT[:50])[None])[0].numpy()
    assert cosine(got, want) > 0.99


def test_zero_weights_are_no_obstacle(state):
    nothing = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    golden = GoldenLanguage(quantize(CONFIG, nothing, Options(TEXT)))
    assert not golden.forward(TEXT[:5], golden.new_cache()).any()


def test_large_gates_get_a_coarser_sigmoid(state):
    scaled = dict(state)
    scaled["layers.0.feed_forward.w1.weight"] = 8 * state["layers.0.feed_forward.w1.weight"]
    model = quantize(CONFIG, scaled, Options(TEXT))
    assert model.blocks[0].feed_forward.up > model.blocks[1].feed_forward.up == 0
    scaled["layers.0.feed_forward.w1.weight"] *= 1000
    assert quantize(CONFIG, scaled, Options(TEXT)).blocks[0].feed_forward.up == 3


def test_norms_keep_their_sign_and_range():
    weight = torch.tensor([0.5, -2.0, 0.0, 1.0])
    item = norm(weight)
    assert item.codes.dtype == np.int16 and item.codes.tolist() == [8192, -32767, 0, 16384]
    assert item.scale * 32767 == 2.0


def test_same_seed_same_file(state, tmp_path):
    for name in ("a", "b"):
        quantize(CONFIG, random_state(CONFIG, 1), Options(gptq=True)).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    LanguageModel.load(tmp_path / "a")


def test_states_may_be_arrays_or_of_lower_precision(state):
    want = quantize(CONFIG, {name: tensor.bfloat16() for name, tensor in state.items()})
    arrays = {name: tensor.bfloat16().float().numpy() for name, tensor in state.items() if name != "head.weight"}
    got = quantize(CONFIG, arrays)
    assert np.array_equal(got.embedding.codes, want.embedding.codes) and got.logit_scale == want.logit_scale


# Mistakes


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(state, bad):
    name = "layers.1.mixer.k_proj.weight"
    broken = state | {name: state[name].clone()}
    broken[name][3, 4] = bad
    with pytest.raises(ModelError, match=f"tiny: {name} holds values that are not finite"):
        quantize(CONFIG, broken)


def test_weights_of_another_model_are_refused(state):
    for broken in ({}, state | {"norm.weight": torch.ones(7)}, state | {"more": torch.ones(7)},
                   {name: tensor for name, tensor in state.items() if name != "norm.weight"}):
        with pytest.raises(ModelError, match="tiny: the weights do not fit the configuration"):
            quantize(CONFIG, broken)


def test_unusable_calibration_is_refused(state):
    for tokens in (np.zeros((2, 2), int), np.zeros(0, int)):
        with pytest.raises(ModelError, match="calibration tokens must be integers"):
            quantize(CONFIG, state, Options(tokens))
    with pytest.raises(ModelError, match="token 50 is outside its vocabulary"):
        quantize(CONFIG, state, Options(np.array([1, 50])))


def test_calibration_is_spread_over_the_text():
    got = calibration(CONFIG, Options(TEXT, length=20, sequences=4))
    assert got.shape == (4, 20) and got[0].tolist() == TEXT[:20].tolist() and got[-1].tolist() == TEXT[-20:].tolist()
    assert calibration(CONFIG, Options(TEXT[:7])).tolist() == [TEXT[:7].tolist()]
    assert calibration(CONFIG, Options(seed=1)).shape == (1, 200)  # random, no longer than the context


def test_random_states_depend_on_the_seed(state):
    again, other = random_state(CONFIG, 1), random_state(CONFIG, 2)
    assert again["head.weight"] is again["embedding.weight"]
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert not torch.equal(other["embedding.weight"], state["embedding.weight"])
    assert set(state) == set(Lfm2(CONFIG).state_dict())


def test_factors_stay_fixed(state):
    """Scales must not follow the weights, or columns that GPTQ has finished would change again."""
    layer = quantized(CONFIG, state).head
    before = group_factors(layer).factors.clone()
    with torch.no_grad():
        layer.weight.mul_(2)
    layer.quant_weight()
    assert torch.equal(group_factors(layer).factors, before)
