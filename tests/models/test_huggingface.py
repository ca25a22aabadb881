"""Checkpoint folders: what transformers writes and reads, the tokenizer, and everything that can be wrong with one."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import Lfm2Config, Lfm2ForCausalLM

from tests.models.test_lfm2 import TINY, TOLERANCE, VARIANTS, random_model, random_tokens
from weft.arch.errors import ModelError
from weft.models.huggingface import (
    byte_tokenizer,
    load_huggingface,
    load_model,
    read_config,
    save_huggingface,
)
from weft.models.lfm2 import LFM2_CONFIGS, Lfm2, language_config, layer_kinds

EMBEDDING = "model.embed_tokens.weight"
PUBLISHED = {  # the fields as the published config.json files have them
    "vocab_size": 65536, "norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 128000, "conv_L_cache": 3,
    "conv_bias": False, "tie_embedding": True, "bos_token_id": 1, "eos_token_id": 7, "model_type": "lfm2",
    "num_key_value_heads": 8, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    """A good checkpoint of the tiny model, without tokenizer."""
    save_huggingface(tmp_path / "tiny", TINY, random_model(TINY))
    return tmp_path / "tiny"


def configure(folder: Path, **changes) -> None:
    """Change fields of config.json; None removes one."""
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


def weigh(folder: Path, **changes) -> None:
    """Change tensors of model.safetensors; None removes one. Dots are written as double underscores."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | {key.replace("__", "."): value for key, value in changes.items()}
    save_file({key: value for key, value in tensors.items() if value is not None}, path, {"format": "pt"})


def refuses(folder: Path, *reasons: str) -> None:
    """Loading fails with one message that holds all of the texts."""
    with pytest.raises(ModelError) as caught:
        load_huggingface(folder)
    message = str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in message and ": " in message
    for reason in reasons:
        assert reason in message


# --- what is written and read -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_transformers_reads_what_is_saved(name, tmp_path):
    model = random_model(VARIANTS[name])
    save_huggingface(tmp_path, model.config, model)
    twin, report = Lfm2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens = random_tokens(model.config)
    torch.testing.assert_close(model(tokens), twin.eval()(tokens, use_cache=False).logits, **TOLERANCE)
    again, tokenizer = load_model(tmp_path)
    assert tokenizer is None and not again.training and again.head.weight is again.embedding.weight
    assert again.config == replace(model.config, name=tmp_path.name)
    assert torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_rounded_weights(dtype, tmp_path):
    model = random_model(TINY)
    save_huggingface(tmp_path, TINY, model, dtype)
    state = load_huggingface(tmp_path).state
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == torch.float32 and torch.equal(state[name], tensor.to(dtype).float()), name


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
@torch.no_grad()
def test_reads_what_transformers_saves(shard, tmp_path):
    """Fields that transformers leaves out, its own field names, and weights in several files."""
    torch.manual_seed(0)
    twin = Lfm2ForCausalLM(Lfm2Config(
        vocab_size=97, hidden_size=64, intermediate_size=200, block_multiple_of=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, full_attn_idxs=[1], conv_L_cache=4, pad_token_id=None,
    )).eval()  # fmt: skip
    twin.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "1GB")
    model, _ = load_model(tmp_path)
    assert model.config.layers == layer_kinds(3, (1,)) and model.config.feed_forward == 160
    assert (model.config.rope_theta, model.config.context, model.config.eos) == (1e6, 128000, 2)
    tokens = random_tokens(model.config)
    torch.testing.assert_close(model(tokens), twin(tokens).logits, **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("lfm2-350m", {"hidden_size": 1024, "num_attention_heads": 16, "block_ff_dim": 6656}),
        ("lfm2-700m", {"hidden_size": 1536, "num_attention_heads": 24, "intermediate_size": 10240}),
        ("lfm2-1.2b", {"hidden_size": 2048, "num_attention_heads": 32, "block_ff_dim": 12288}),
        ("lfm2-2.6b", {"hidden_size": 2048, "num_attention_heads": 32, "intermediate_size": 10752,
                       "block_auto_adjust_ff_dim": False}),
    ],
)  # fmt: skip
def test_published_fields_give_the_published_configurations(name, fields, tmp_path):
    expected = LFM2_CONFIGS[name]
    attention = [index for index, kind in enumerate(expected.layers) if kind == "attention"]
    fields = PUBLISHED | fields | {"num_hidden_layers": len(expected.layers), "full_attn_idxs": attention}
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    assert read_config(folder) == expected


def test_a_copy_of_the_embedding_as_output_weights_is_in_order(folder):
    weigh(folder, lm_head__weight=random_model(TINY).embedding.weight.detach().clone())
    assert torch.equal(load_huggingface(folder).state["head.weight"], random_model(TINY).embedding.weight)


def test_several_end_tokens(folder):
    configure(folder, eos_token_id=[5, 6])
    assert load_huggingface(folder).config.eos == 5


# --- tokenizer ----------------------------------------------------------------------------------------------


def test_byte_tokens_are_bytes(tmp_path):
    config = replace(TINY, vocab=256)
    save_huggingface(tmp_path, config, Lfm2(config), tokenizer=byte_tokenizer())
    tokenizer = load_huggingface(tmp_path).tokenizer
    text = bytes(range(128)).decode() + "  é€😀 <|x|> \r\n\n"
    assert bytes(tokenizer.encode(text).ids) == text.encode()
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.decode([104, 105, 255, 33]) == "hi\N{REPLACEMENT CHARACTER}!"
    assert sorted(tokenizer.get_vocab().values()) == list(range(256))


def test_a_vocabulary_may_be_padded_but_not_exceeded(tmp_path):
    folder = tmp_path / "model"
    for vocab, fits in ((255, False), (256, True), (300, True), (512, True), (513, False)):
        config = replace(TINY, vocab=vocab)
        save_huggingface(folder, config, Lfm2(config), tokenizer=byte_tokenizer())
        if fits:
            assert load_huggingface(folder).tokenizer.get_vocab_size() == 256
        else:
            refuses(folder, "tokenizer.json", "256 tokens", f"vocabulary of {vocab}")


@pytest.mark.parametrize("content", [b"{", b"\xff", b"{}"])
def test_a_broken_tokenizer(folder, content):
    (folder / "tokenizer.json").write_bytes(content)
    refuses(folder, "cannot read tokenizer", "tokenizer.json")


def test_an_empty_tokenizer(folder):
    (folder / "tokenizer.json").write_text(Tokenizer(models.BPE()).to_str())
    refuses(folder, "0 tokens")


# --- what is refused ----------------------------------------------------------------------------------------


def test_a_missing_folder(tmp_path):
    refuses(tmp_path / "nowhere", "cannot read", "config.json", "point to a folder")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100000, b'{"hidden_size": ' + b"9" * 5000 + b"}"])
def test_a_config_that_is_no_json(folder, content):
    (folder / "config.json").write_bytes(content)
    refuses(folder, "cannot read", "config.json")


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"model_type": "llama"}, ["model_type 'llama' is not supported", "'lfm2'"]),
        ({"model_type": None}, ["model_type None is not supported"]),
        ({"model_type": ["lfm2"]}, ["is not supported"]),
        ({"model_type": "lfm2_moe"}, ["mixtures of experts are not supported yet"]),
        ({"num_experts": 32}, ["mixtures of experts are not supported yet"]),
        ({"conv_bias": True}, ["conv_bias is true", "not supported"]),
        ({"conv_bias": 0}, ["conv_bias must be true or false, got 0"]),
        ({"tie_word_embeddings": False}, ["tied embeddings"]),
        ({"tie_embedding": False}, ["tied embeddings"]),
        ({"hidden_size": 0}, ["hidden_size must be an integer from 1", "got 0"]),
        ({"hidden_size": 1 << 40}, ["hidden_size must be an integer"]),
        ({"hidden_size": 64.0}, ["hidden_size must be an integer"]),
        ({"num_attention_heads": True}, ["num_attention_heads must be an integer", "got True"]),
        ({"num_attention_heads": "4"}, ["num_attention_heads must be an integer", "got '4'"]),
        ({"num_key_value_heads": 3}, ["4 heads do not divide among 3"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers must be an integer from 1 to 1024"]),
        ({"num_hidden_layers": 5}, ["layer_types must list 5 layers"]),
        ({"layer_types": ["conv", "conv", "sliding_attention", "conv"]}, ["'sliding_attention' is not supported"]),
        ({"layer_types": ["conv", "conv", {}, "conv"]}, ["layer type {} is not supported"]),
        ({"layer_types": "conv"}, ["layer_types must list 4 layers"]),
        ({"layer_types": None, "full_attn_idxs": 3}, ["full_attn_idxs must list layers"]),
        ({"head_dim": 15}, ["rotary must be even"]),
        ({"head_dim": None, "num_attention_heads": 128}, ["head_size must be a positive integer"]),
        ({"norm_eps": 0}, ["norm_eps must be a positive number"]),
        ({"norm_eps": float("nan")}, ["norm_eps must be a positive number, got nan"]),
        ({"norm_eps": 2.0}, ["epsilon must be in (0, 1)"]),
        ({"rope_theta": float("inf")}, ["rope_theta must be a positive number"]),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["'yarn' are not supported"]),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ["'linear' are not supported"]),
        ({"rope_parameters": 5}, ["rope_parameters must be an object"]),
        ({"bos_token_id": 61}, ["bos is not a token of the vocabulary"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id must be an integer"]),
        ({"conv_L_cache": -1}, ["conv_L_cache must be an integer"]),
        ({"block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": -1}, ["block_ffn_dim_multiplier must be"]),
        ({"block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1e9}, ["adjusted feed-forward size", "is not"]),
        ({"block_auto_adjust_ff_dim": True, "intermediate_size": 1}, ["adjusted feed-forward size 0"]),
        # The largest sizes allowed are harmless: nothing is made before the weights have been seen to have them.
        ({"hidden_size": 1 << 20, "num_attention_heads": 1 << 20, "head_dim": 1 << 20}, ["has shape [61, 64]"]),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_used(folder, changes, reasons):
    configure(folder, **changes)
    refuses(folder, *reasons)


def test_a_config_that_is_a_list(folder):
    (folder / "config.json").write_text("[1]")
    refuses(folder, "holds no JSON object")


def test_missing_and_pickled_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuses(folder, "cannot read weights", "model.safetensors", "pickled ones are not read")


def test_damaged_weights(folder):
    path = folder / "model.safetensors"
    good = path.read_bytes()
    for bad in (b"", good[:-1], good[:100], b"\xff" * 8 + good[8:], good + b"\0"):
        path.write_bytes(bad)
        refuses(folder, "cannot read weights", "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"model__embedding_norm__weight": None}, ["1 tensors are missing", "model.embedding_norm.weight"]),
        ({"model__embed_tokens__weight": None}, ["1 tensors are missing", EMBEDDING]),
        ({"model__embedding_norm__weight": torch.ones(63)}, ["embedding_norm.weight has shape [63]", "asks for [64]"]),
        ({"model__layers__0__conv__conv__weight": torch.ones(64, 3)}, ["has shape [64, 3]", "asks for [64, 1, 3]"]),
        ({"model__layers__0__conv__conv__bias": torch.ones(64)}, ["conv.bias is no tensor of the model"]),
        ({"model__layers__4__ffn_norm__weight": torch.ones(64)}, ["layers.4.ffn_norm.weight is no tensor"]),
        ({"model__embedding_norm__weight": torch.ones(64, dtype=torch.int8)}, ["has dtype I8", "F32, BF16, F16"]),
        ({"model__embedding_norm__weight": torch.ones(64).double()}, ["has dtype F64"]),
        ({"model__embedding_norm__weight": torch.ones(64).to(torch.float8_e4m3fn)}, ["has dtype F8_E4M3"]),
        ({"model__embedding_norm__weight": torch.full((64,), torch.nan)}, ["not finite"]),
        ({"model__embedding_norm__weight": torch.full((64,), torch.inf).half()}, ["not finite"]),
        ({"lm_head__weight": torch.ones(61, 64)}, ["lm_head.weight differs from the embedding"]),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[0],
)
def test_weights_that_cannot_be_used(folder, changes, reasons):
    weigh(folder, **changes)
    refuses(folder, *reasons)


def shard(folder: Path, changes: dict) -> None:
    """Move the weights into one shard with an index; `changes` are those of the index."""
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": dict.fromkeys(names, "a.safetensors") | changes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_one_shard_is_in_order(folder):
    shard(folder, {})
    assert load_huggingface(folder).state.keys() == random_model(TINY).state_dict().keys()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({EMBEDDING: "b.safetensors"}, "cannot read weights"),
        ({EMBEDDING: "../a.safetensors"}, "'../a.safetensors' is not the plain name"),
        ({EMBEDDING: "a.bin"}, "'a.bin' is not the plain name"),
        ({EMBEDDING: 3}, "has no weight_map"),
        ({"model.layers.9.ffn_norm.weight": "a.safetensors"}, "lacks model.layers.9"),
    ],
)
def test_an_index_that_cannot_be_used(folder, changes, reason):
    shard(folder, changes)
    refuses(folder, reason)


def test_a_broken_index(folder):
    shard(folder, {})
    path = folder / "model.safetensors.index.json"
    for content, reason in (("{", "cannot read"), ("{}", "has no weight_map"), ("[]", "holds no JSON object")):
        path.write_text(content)
        refuses(folder, reason, path.name)


def test_what_cannot_be_saved(tmp_path):
    model = random_model(TINY)
    with pytest.raises(ModelError, match="rotates whole heads"):
        save_huggingface(tmp_path, replace(TINY, rotary=8), model)
    with pytest.raises(ModelError, match="use float32, bfloat16 or float16"):
        save_huggingface(tmp_path, TINY, model, torch.float64)
    assert not list(tmp_path.iterdir())


def test_saving_is_reproducible(tmp_path):
    for name in ("a", "b"):
        save_huggingface(tmp_path / name, language_config("lfm2-nano"), random_model(language_config("lfm2-nano")))
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert asdict(read_config(tmp_path / "a")) == asdict(language_config("lfm2-nano")) | {"name": "a"}
