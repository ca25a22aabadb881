"""The float language model against the reference implementation: logits, every layer, caches."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Lfm2Config, Lfm2ForCausalLM

from weft.arch.errors import ModelError
from weft.arch.language import LanguageConfig
from weft.models import train_language as training
from weft.models.huggingface import load_model
from weft.models.lfm2 import (
    LFM2_CONFIGS,
    Cache,
    Lfm2,
    Probe,
    language_config,
    layer_kinds,
    parameter_count,
    recorded,
    rotate,
)
from weft.models.text import corpus, documents, held_out, topics
from weft.models.train_language import Recipe, cross_entropy, fit, read_training, tokens, train_language

CHECKPOINTS = Path(__file__).parents[2] / "models" / "checkpoints"

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
PARAMETERS = {  # as the published model cards count them
    "lfm2-350m": 354_483_968,
    "lfm2-700m": 742_489_344,
    "lfm2-1.2b": 1_170_340_608,
    "lfm2-2.6b": 2_569_272_320,
}
TINY = LanguageConfig(
    name="tiny", vocab=61, width=64, layers=layer_kinds(4, (1, 3)), heads=4, kv_heads=2, head_size=16, feed_forward=96,
    kernel=3, rope_theta=1e4, rotary=16, epsilon=1e-5, context=64, bos=1, eos=2,
)  # fmt: skip
VARIANTS = {
    "tiny": TINY,
    "nano": language_config("lfm2-nano"),
    "kernel 4": replace(TINY, kernel=4),
    "kernel 1": replace(TINY, kernel=1),
    "every head its own key": replace(TINY, kv_heads=4),
    "one key head": replace(TINY, kv_heads=1, rope_theta=1e6),
    "one conv layer": replace(TINY, layers=("conv",)),
    "one attention layer": replace(TINY, layers=("attention",)),
    "head 32": replace(TINY, head_size=32, rotary=32),  # 4 * 32 is not the width
    "odd widths": replace(TINY, width=80, heads=5, kv_heads=1, feed_forward=72, vocab=33, epsilon=1e-3),
}


def random_model(config: LanguageConfig, seed: int = 0) -> Lfm2:
    """Weights far enough from their initial values that no norm or gain is neutral."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Lfm2(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def reference(model: Lfm2) -> Lfm2ForCausalLM:
    """The same weights in transformers' model; names are written out here, apart from our own writer's."""
    config = model.config
    twin = Lfm2ForCausalLM(Lfm2Config(
        vocab_size=config.vocab, hidden_size=config.width, intermediate_size=config.feed_forward,
        num_hidden_layers=len(config.layers), num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.context, norm_eps=config.epsilon, conv_L_cache=config.kernel,
        layer_types=["conv" if kind == "conv" else "full_attention" for kind in config.layers], pad_token_id=None,
        block_auto_adjust_ff_dim=False, rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        head_dim=config.head_size, attn_implementation="eager",
    )).eval()  # fmt: skip
    copied = 0

    @torch.no_grad()
    def copy(theirs: nn.Module, ours: nn.Module) -> None:
        nonlocal copied
        assert theirs.weight.shape == ours.weight.shape
        theirs.weight.copy_(ours.weight)
        copied += 1

    copy(twin.model.embed_tokens, model.embedding)
    copy(twin.model.embedding_norm, model.norm)
    for theirs, ours in zip(twin.model.layers, model.layers, strict=True):
        copy(theirs.operator_norm, ours.operator_norm)
        copy(theirs.ffn_norm, ours.ffn_norm)
        for name in ("w1", "w2", "w3"):
            copy(getattr(theirs.feed_forward, name), getattr(ours.feed_forward, name))
        if theirs.is_attention_layer:
            copy(theirs.self_attn.q_layernorm, ours.mixer.q_norm)
            copy(theirs.self_attn.k_layernorm, ours.mixer.k_norm)
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                copy(getattr(theirs.self_attn, name), getattr(ours.mixer, name))
        else:
            for name in ("in_proj", "conv", "out_proj"):
                copy(getattr(theirs.conv, name), getattr(ours.mixer, name))
    assert copied == sum(1 for _ in model.parameters()) == sum(1 for _ in twin.parameters())
    return twin


def random_tokens(config: LanguageConfig, batch: int = 2, n: int = 40) -> torch.Tensor:
    return torch.randint(config.vocab, (batch, n), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_equals_the_reference_layer_by_layer(name):
    model = random_model(VARIANTS[name])
    twin, tokens = reference(model), random_tokens(model.config)
    expected = {}

    def keep(path):
        def hook(_module, _inputs, output):
            expected[path] = output[0] if isinstance(output, tuple) else output

        return hook

    for index, layer in enumerate(twin.model.layers):
        layer.register_forward_hook(keep(f"layers.{index}.output"))
        mixer = layer.self_attn if layer.is_attention_layer else layer.conv
        mixer.register_forward_hook(keep(f"layers.{index}.mixer.output"))
        layer.feed_forward.register_forward_hook(keep(f"layers.{index}.feed_forward.output"))
    expected["logits"] = twin(tokens, use_cache=False).logits
    with recorded(model) as got:
        logits = model(tokens)
    assert len(expected) == 1 + 3 * len(model.layers)
    for path, tensor in expected.items():
        torch.testing.assert_close(got[path], tensor, **TOLERANCE, msg=lambda text, path=path: f"{path}: {text}")
    assert torch.equal(logits, got["logits"])


@pytest.mark.parametrize(
    "chunks", [(40,), (1,) * 40, (7, 1, 1, 20, 11), (2, 38)], ids=lambda chunks: f"{len(chunks)} chunks"
)
@pytest.mark.parametrize("name", ["tiny", "nano", "kernel 4", "kernel 1"])
@torch.no_grad()
def test_a_cache_changes_nothing(name, chunks):
    model = random_model(VARIANTS[name])
    tokens, cache = random_tokens(model.config), Cache()
    parts = [model(part, cache) for part in tokens.split(chunks, 1)]
    assert cache.length == 40
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), **TOLERANCE)


@torch.no_grad()
def test_a_cache_equals_the_reference_token_by_token():
    model = random_model(TINY)
    twin, tokens, cache, past = reference(model), random_tokens(TINY), Cache(), None
    for part in tokens.split((5,) + (1,) * 35, 1):
        theirs = twin(part, past_key_values=past, use_cache=True)
        past = theirs.past_key_values
        torch.testing.assert_close(model(part, cache), theirs.logits, **TOLERANCE)


@torch.no_grad()
def test_the_cache_holds_what_it_says():
    model, cache = random_model(replace(TINY, kernel=4)), Cache()
    with recorded(model) as got:
        model(random_tokens(TINY, n=9), cache)
    assert torch.equal(cache.states[0], got["layers.0.mixer.gated"][:, -3:].transpose(1, 2))
    keys, values = cache.states[1]
    assert torch.equal(keys, got["layers.1.mixer.k_rotated"]) and torch.equal(values, got["layers.1.mixer.v"])


@torch.no_grad()
def test_no_position_sees_the_future():
    model, tokens = random_model(TINY), random_tokens(TINY)
    changed = tokens.clone()
    changed[:, 25:] = (changed[:, 25:] + 1) % TINY.vocab
    torch.testing.assert_close(model(tokens)[:, :25], model(changed)[:, :25], rtol=0, atol=0)
    assert (model(tokens)[:, 25] != model(changed)[:, 25]).any()


@torch.no_grad()
def test_every_operator_can_be_replaced():
    """Each leaf module's output reaches the logits, so a quantized one in its place takes effect."""
    model, tokens = random_model(TINY), random_tokens(TINY, n=12)
    with recorded(model) as got:
        logits = model(tokens)
    leaves = {name for name, module in model.named_modules() if not list(module.children())} - {"rotary"}
    assert leaves == set(got)
    for name in leaves:
        handle = model.get_submodule(name).register_forward_hook(lambda _module, _inputs, output: output.flip(-1))
        assert not torch.equal(model(tokens), logits), name
        handle.remove()


def test_probes_stand_between_all_operators():
    conv = ("b", "c", "x", "gated", "convolved", "product", "output")
    shapes = {f"layers.0.mixer.{name}": [2, 12, 64] for name in conv} | {
        "embedded": [2, 12, 64], "logits": [2, 12, 61], "layers.0.mixed": [2, 12, 64], "layers.0.output": [2, 12, 64],
        "layers.1.mixer.q": [2, 4, 12, 16], "layers.1.mixer.k": [2, 2, 12, 16], "layers.1.mixer.v": [2, 2, 12, 16],
        "layers.1.mixer.q_rotated": [2, 4, 12, 16], "layers.1.mixer.k_rotated": [2, 2, 12, 16],
        "layers.1.mixer.scores": [2, 2, 24, 12], "layers.1.mixer.probabilities": [2, 2, 24, 12],
        "layers.1.mixer.attended": [2, 12, 64], "layers.1.mixer.output": [2, 12, 64],
        "layers.1.feed_forward.gate": [2, 12, 96], "layers.1.feed_forward.up": [2, 12, 96],
        "layers.1.feed_forward.product": [2, 12, 96], "layers.1.feed_forward.output": [2, 12, 64],
    }  # fmt: skip
    model = random_model(TINY)
    with torch.no_grad(), recorded(model) as got:
        model(random_tokens(TINY, n=12))
    for name, shape in shapes.items():
        assert isinstance(model.get_submodule(name), Probe)
        assert list(got[name].shape) == shape, name


def test_partial_rotation_leaves_the_rest_alone():
    x = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = torch.full((5, 4), 0.6), torch.full((5, 4), 0.8)
    turned = rotate(x, cos, sin)
    assert torch.equal(turned[..., 8:], x[..., 8:])
    torch.testing.assert_close(turned[..., :4], 0.6 * x[..., :4] - 0.8 * x[..., 4:8])
    torch.testing.assert_close(turned[..., 4:8], 0.6 * x[..., 4:8] + 0.8 * x[..., :4])
    with torch.no_grad():
        model = random_model(replace(TINY, rotary=8))
        with recorded(model) as got:
            model(random_tokens(TINY))
    q = got["layers.1.mixer.q_norm"]
    assert torch.equal(got["layers.1.mixer.q_rotated"][..., 8:], q[..., 8:])
    assert not torch.equal(got["layers.1.mixer.q_rotated"][..., :8], q[..., :8])


def test_published_configurations_count_as_published():
    assert {name: parameter_count(LFM2_CONFIGS[name]) for name in PARAMETERS} == PARAMETERS
    assert 1_000_000 < parameter_count(language_config("lfm2-nano")) < 2_000_000


def test_input_errors():
    model = random_model(TINY)
    with pytest.raises(ModelError, match="no language model named 'lfm9'"):
        language_config("lfm9")
    for wrong in (torch.zeros(3, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 3)):
        with pytest.raises(ModelError, match="encode the text"):
            model(wrong)
    for token in (-1, 61):
        with pytest.raises(ModelError, match=f"token {token} is outside its vocabulary of 61"):
            model(torch.tensor([[0, token]]))
    cache = Cache()
    model(torch.zeros(1, 60, dtype=torch.int64), cache)
    with pytest.raises(ModelError, match="65 tokens exceed its context of 64"):
        model(torch.zeros(1, 5, dtype=torch.int64), cache)
    assert cache.length == 60


# --- text and training --------------------------------------------------------------------------------------

MINUTE = Recipe(steps=6, batch=4, length=16, long_steps=2, stretch=2, learning_rate=1e-2)
SMALL = {"width": 32, "layers": ("conv", "attention"), "heads": 2, "head_size": 16, "rotary": 16, "feed_forward": 32}


def test_splits_share_no_paragraph():
    train, test = documents("train"), documents("test")
    known = {part.strip() for text in test for part in text.split("\n\n")}
    assert not any(part.strip() in known for text in train for part in text.split("\n\n"))
    assert 0.05 < len(corpus("test")) / (len(corpus("train")) + len(corpus("test"))) < 0.15
    assert sum(map(held_out, topics())) == len(test) and len(test) + len(train) == len(topics())
    assert [name for name in ("if", "lists", "string-methods", "with") if held_out(name)] == ["string-methods"]


def test_a_corpus_is_bytes_with_zeros_between_documents():
    text = corpus("test")
    assert text.dtype == np.uint8 and text[0] == text[-1] == 0
    assert text.tobytes()[1:-1].decode().split("\0") == documents("test")
    with pytest.raises(ModelError, match="must be one of train, test"):
        corpus("validation")


@torch.no_grad()
def test_cross_entropy_predicts_all_but_the_first_of_each_window():
    model, text = random_model(TINY), random_tokens(TINY, 1, 50)[0]
    losses = [F.cross_entropy(model(part[None, :-1])[0], part[1:]) for part in text[:48].split(16)]
    assert cross_entropy(model, text, window=16, batch=2) == pytest.approx(float(sum(losses)) / 3, rel=1e-5)
    assert cross_entropy(ignorant_model(61), text, window=50) == pytest.approx(math.log(61))
    for window in (1, 51):
        with pytest.raises(ModelError, match="choose 2 to 50"):
            cross_entropy(model, text, window)


def ignorant_model(vocab: int) -> nn.Module:
    """A model that knows nothing."""
    model = nn.Embedding(vocab, vocab)
    nn.init.zeros_(model.weight)
    return model


def test_training_is_deterministic_and_its_folder_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "corpus", lambda split: corpus(split)[:5000])
    folders = [tmp_path / "a", tmp_path / "b"]
    results = [train_language(out=folder, seed=1, progress=False, recipe=MINUTE, **SMALL) for folder in folders]
    assert results[0] == results[1]
    for name in ("model.safetensors", "tokenizer.json", "training.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    record = read_training(folders[0])
    assert record["accuracy"] == results[0] and record["recipe"]["seed"] == 1
    model, tokenizer = load_model(folders[0])
    assert tokenizer.encode("é").ids == [195, 169]
    assert cross_entropy(model, tokens("test")) == results[0]["float"]["loss"]
    assert results[0]["float"]["perplexity"] == pytest.approx(math.exp(results[0]["float"]["loss"]))


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    losses: list[float] = []
    model = Lfm2(replace(language_config("lfm2-nano"), **SMALL))
    fit(model, tokens("train")[:4000], replace(MINUTE, steps=60), losses.append)
    assert len(losses) == 60 and np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])
    assert not any(module._forward_hooks for module in model.modules())


def test_training_errors(tmp_path):
    with pytest.raises(ModelError, match="use lfm2-nano"):
        train_language("lfm2-350m", progress=False)
    for changes in ({"steps": 0}, {"context": 16, "recipe": MINUTE}):
        with pytest.raises(ModelError, match="nothing to train"):
            train_language(progress=False, **changes)
    with pytest.raises(ModelError, match=r"cannot read .*training\.json"):
        read_training(tmp_path)
    (tmp_path / "training.json").write_text("[]")
    with pytest.raises(ModelError, match=r"cannot read .*training\.json"):
        read_training(tmp_path)


def test_the_shipped_model_is_as_good_as_its_record_says():
    """On a fifth of the held-out text, spread over it; other versions of Python have slightly other texts."""
    model, tokenizer = load_model(CHECKPOINTS / "lfm2-nano")
    assert model.config == language_config("lfm2-nano")
    assert tokenizer.get_vocab_size() == 256
    recorded_loss = read_training(CHECKPOINTS / "lfm2-nano")["accuracy"]["float"]["loss"]
    test = tokens("test")
    part = test[: len(test) // 512 * 512].view(-1, 512)[::5].flatten()
    assert cross_entropy(model, part) == pytest.approx(recorded_loss, abs=0.15)
