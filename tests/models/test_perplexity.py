"""Perplexity and agreement of predictors whose values are known, and the ladder from float to integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.kit.language import tiny_config
from weft.arch.errors import ModelError
from weft.models import perplexity
from weft.models.huggingface import load_huggingface
from weft.models.lfm2 import Lfm2
from weft.models.perplexity import STEPS, Agreement, compare, ladder, losses, rows
from weft.models.quantize_language import Options, calibration, integer_model, quantized, random_state
from weft.models.text import corpus
from weft.sim.golden_language import GoldenLanguage

CHECKPOINT = Path(perplexity.__file__).parent / "checkpoints" / "lfm2-nano"
TEXT = torch.from_numpy(np.random.default_rng(0).integers(0, 50, 203))


def certain(tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the token itself: 5 above the others."""
    return 5.0 * torch.nn.functional.one_hot(tokens, 50)


def uniform(tokens: torch.Tensor) -> torch.Tensor:
    return torch.ones(*tokens.shape, 50)


def test_known_predictors():
    got = compare(certain, {"same": certain, "uniform": uniform, "opposite": lambda x: -certain(x)}, TEXT, 50, batch=3)
    windows = TEXT[:200].view(4, 50)
    hits = float((windows[:, :-1] == windows[:, 1:]).double().mean())
    total = np.log(49 + np.exp(5.0))
    assert got["same"].perplexity == pytest.approx(np.exp(total - 5 * hits))
    assert (got["same"].cosine, got["same"].top1) == pytest.approx((1, 1))
    assert got["uniform"].perplexity == pytest.approx(50) and got["uniform"].cosine == pytest.approx(50**-0.5)
    assert got["opposite"].cosine == pytest.approx(-1) and got["opposite"].top1 < 0.1


def test_rows_run_one_sequence_at_a_time():
    seen = []

    def function(tokens: np.ndarray) -> np.ndarray:
        seen.append(tokens)
        return np.stack([tokens, tokens + 1], 1)

    got = rows(function)(TEXT[:6].view(2, 3))
    assert got.dtype == torch.float32 and got[..., 0].flatten().tolist() == TEXT[:6].tolist()
    assert [part.tolist() for part in seen] == TEXT[:6].view(2, 3).tolist()


@pytest.mark.parametrize("window", [1, 204])
def test_windows_must_fit(window):
    with pytest.raises(ModelError, match="a text of 203 tokens has no window"):
        compare(certain, {}, TEXT, window)


def test_ladder():
    config = tiny_config()
    state = random_state(config, 1)
    reference = Lfm2(config)
    reference.load_state_dict(state)
    samples = calibration(config, Options(TEXT.numpy(), 64))
    model = quantized(config, state)
    result = integer_model(model, samples)
    golden = GoldenLanguage(result)

    def integer(tokens: np.ndarray) -> np.ndarray:
        return golden.forward(tokens, golden.new_cache(), all_logits=True) * result.logit_scale

    steps = ladder(reference.eval(), model, rows(integer), TEXT, 60)
    assert tuple(steps) == STEPS and steps["float"].cosine == pytest.approx(1) and steps["float"].top1 == 1
    assert 1 > steps["weights"].cosine > 0.9
    near = compare(model, {"integer": rows(integer)}, TEXT, 60)["integer"]
    assert near.cosine > 0.998 > steps["functions"].cosine
    split = dict(losses(steps))
    assert list(split) == list(STEPS[1:])
    change = steps["functions"].perplexity / steps["float"].perplexity - 1
    assert sum(split.values()) == pytest.approx(change)


def test_the_trained_model_in_integers():
    """What is asked of the whole test split is asked here of a small part of it, with room for chance."""
    config, state, _ = load_huggingface(CHECKPOINT)
    model = quantized(config, state)
    result = integer_model(model, calibration(config, Options(corpus("train"), sequences=8)))
    golden = GoldenLanguage(result)

    def integer(tokens: np.ndarray) -> np.ndarray:
        return golden.forward(tokens, golden.new_cache(), all_logits=True) * result.logit_scale

    reference = Lfm2(config)
    reference.load_state_dict(state)
    text = corpus("test").astype(np.int64)
    starts = np.linspace(0, len(text) - 256, 5).astype(int)
    text = torch.from_numpy(np.concatenate([text[start : start + 256] for start in starts]))
    got = compare(reference.eval(), {"float": reference, "integer": rows(integer)}, text, 256)
    assert got["integer"].perplexity < 1.03 * got["float"].perplexity < 6
    assert got["integer"].cosine > 0.99 and got["integer"].top1 > 0.93


def test_losses_are_relative_to_the_first():
    steps = {name: Agreement(perplexity, 1, 1) for name, perplexity in (("a", 4.0), ("b", 5.0), ("c", 4.5))}
    assert dict(losses(steps)) == {"b": 0.25, "c": -0.125}
