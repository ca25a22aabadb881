"""LFM2 checkpoints as Hugging Face lays them out: config.json, model.safetensors, tokenizer.json. Never pickle.

Nothing in such a folder is trusted: every number is checked before it decides a size, every tensor before it is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from weft.arch.errors import ModelError
from weft.arch.language import LanguageConfig
from weft.arch.program import write_atomically
from weft.models.lfm2 import Lfm2

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
INDEX = WEIGHTS + ".index.json"
OUTPUT = "lm_head.weight"  # tied, so normally absent
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors names them
LARGEST = 1 << 20  # any size in a configuration: far above all published models, far below what fills a memory
MOST_LAYERS = 1024
KINDS = {"full_attention": "attention", "conv": "conv"}
MIXERS = {"attention": "self_attn", "conv": "conv"}


class Checkpoint(NamedTuple):
    """What a folder holds: `state` is the float32 state of `Lfm2(config)`, the tokenizer None if there is no file."""

    config: LanguageConfig
    state: dict[str, Tensor]
    tokenizer: Tokenizer | None


def load_huggingface(directory: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint of the LFM2 family; ModelError says what is missing, malformed or not supported."""
    directory = Path(directory)
    config = read_config(directory)
    return Checkpoint(config, _read_state(directory, config), read_tokenizer(directory / TOKENIZER, config))


def load_model(directory: str | os.PathLike) -> tuple[Lfm2, Tokenizer | None]:
    """The checkpoint as a model in eval mode, and its tokenizer; ModelError as `load_huggingface`."""
    config, state, tokenizer = load_huggingface(directory)
    with torch.device("meta"):  # the weights are not to be in memory twice
        model = Lfm2(config)
    model.load_state_dict(state, assign=True)
    model.head.weight = model.embedding.weight
    return model.eval(), tokenizer


def save_huggingface(directory: str | os.PathLike, config: LanguageConfig, model: Lfm2,
                     dtype: torch.dtype = torch.float32, tokenizer: Tokenizer | None = None) -> None:  # fmt: skip
    """Write a folder that `load_huggingface` and transformers' Lfm2ForCausalLM read.

    ModelError for a configuration that LFM2 cannot express and for another dtype than float32, bfloat16, float16.
    """
    if config.rotary != config.head_size:
        raise ModelError(f"{config.name}: LFM2 rotates whole heads, not {config.rotary} of {config.head_size} "
                         "dimensions: save a configuration with rotary = head_size")  # fmt: skip
    if dtype not in DTYPES.values():
        raise ModelError(f"{config.name}: weights cannot be saved as {dtype}: use float32, bfloat16 or float16")
    fields = {
        "architectures": ["Lfm2ForCausalLM"],
        "model_type": "lfm2",
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward,
        "block_auto_adjust_ff_dim": False,
        "num_hidden_layers": len(config.layers),
        "layer_types": [kind if kind == "conv" else "full_attention" for kind in config.layers],
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "conv_L_cache": config.kernel,
        "conv_bias": False,
        "norm_eps": config.epsilon,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.context,
        "tie_word_embeddings": True,
        "bos_token_id": config.bos,
        "eos_token_id": config.eos,
        "pad_token_id": None,
    }
    tensors = {_published(name, config): tensor.detach().to(dtype).contiguous()
               for name, tensor in model.state_dict().items() if name != "head.weight"}  # fmt: skip
    directory = Path(directory)
    write_atomically(directory / CONFIG, json.dumps(fields, indent=2) + "\n")
    write_atomically(directory / WEIGHTS, save(tensors, {"format": "pt"}))
    if tokenizer is not None:
        write_atomically(directory / TOKENIZER, tokenizer.to_str(pretty=True) + "\n")


def byte_tokenizer() -> Tokenizer:
    """Text to its UTF-8 bytes and back: token = byte. Bytes that are no UTF-8 decode to replacement characters."""
    # The library writes a byte that prints as itself, and the others, in order, as the characters from 256 on.
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    printing = {ord(name): name for name in names if ord(name) < 256}
    others = dict(zip(sorted(set(range(256)) - set(printing)), names[len(printing) :], strict=True))
    vocabulary = {name: byte for byte, name in (printing | others).items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


# --- configuration ------------------------------------------------------------------------------------------


def read_config(directory: str | os.PathLike) -> LanguageConfig:
    """The configuration in a folder's config.json, named like the folder; ModelError if it is none of LFM2."""
    directory = Path(directory)
    path = directory / CONFIG
    fields = _read_json(path, "point to a folder with config.json, model.safetensors and tokenizer.json")
    kind = fields.get("model_type")
    if kind == "lfm2_moe" or fields.get("num_experts"):
        raise ModelError(f"{path}: mixtures of experts are not supported yet: use a dense LFM2 model")
    if kind != "lfm2":
        raise ModelError(f"{path}: model_type {kind!r} is not supported: use a model of type 'lfm2'")

    def refuse(reason: str, remedy: str):
        raise ModelError(f"{path}: {reason}: {remedy}")

    def integer(key: str, default: int | None = None, high: int = LARGEST, low: int = 1) -> int:
        value = fields.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            refuse(f"{key} must be an integer from {low} to {high}, got {value!r}", "download the file again")
        return value

    def number(key: str, default: float, source: dict | None = None) -> float:
        value = (fields if source is None else source).get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:  # false for nan
            refuse(f"{key} must be a positive number, got {value!r}", "download the file again")
        return float(value)

    def flag(key: str, default: bool) -> bool:
        value = fields.get(key, default)
        if not isinstance(value, bool):
            refuse(f"{key} must be true or false, got {value!r}", "download the file again")
        return value

    # What a file leaves out has the value that transformers' Lfm2Config gives it.
    if flag("conv_bias", False):
        refuse("conv_bias is true, convolutions with bias are not supported", "use a model without")
    if not flag("tie_embedding" if "tie_embedding" in fields else "tie_word_embeddings", True):
        refuse("output weights other than the embedding's are not supported", "use a model with tied embeddings")
    width, heads = integer("hidden_size", 2560), integer("num_attention_heads", 32)
    eos = fields.get("eos_token_id", 2)
    if isinstance(eos, list) and eos:  # several end tokens: the first one counts
        fields["eos_token_id"] = eos[0]
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        refuse(f"rope_parameters must be an object, got {rope!r}", "download the file again")
    style = rope.get("rope_type", rope.get("type", "default"))
    if style != "default":
        refuse(f"rotary positions of type {style!r} are not supported", "use a model with type 'default'")
    head_size = width // heads if fields.get("head_dim") is None else integer("head_dim")
    feed_forward = integer("block_ff_dim" if "block_ff_dim" in fields else "intermediate_size", 12288)
    if flag("block_auto_adjust_ff_dim", True):  # published files give a size yet to be shrunk and rounded up
        multiple = integer("block_multiple_of", 256)
        shrunk = int(number("block_ffn_dim_multiplier", 1.0) * int(2 * feed_forward / 3))
        feed_forward = multiple * -(-shrunk // multiple)
        if not 1 <= feed_forward <= LARGEST:
            refuse(f"the adjusted feed-forward size {feed_forward} is not from 1 to {LARGEST}", "download it again")
    return LanguageConfig(
        name=directory.resolve().name,
        vocab=integer("vocab_size", 65536),
        width=width,
        layers=_layer_kinds(path, fields, integer("num_hidden_layers", 32, MOST_LAYERS)),
        heads=heads,
        kv_heads=integer("num_key_value_heads", 8),
        head_size=head_size,
        feed_forward=feed_forward,
        kernel=integer("conv_L_cache", 3),
        rope_theta=number("rope_theta", number("rope_theta", 1e6), rope),
        rotary=head_size,
        epsilon=number("norm_eps", 1e-5),
        context=integer("max_position_embeddings", 128000),
        bos=integer("bos_token_id", 1, low=0),
        eos=integer("eos_token_id", 2, low=0),
    )


def _layer_kinds(path: Path, fields: dict, count: int) -> tuple[str, ...]:
    kinds = fields.get("layer_types")
    if kinds is None:
        attention = fields.get("full_attn_idxs")
        attention = range(count) if attention is None else attention
        if not isinstance(attention, list | range):
            raise ModelError(f"{path}: full_attn_idxs must list layers, got {attention!r}: download the file again")
        kinds = ["full_attention" if index in attention else "conv" for index in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count:
        raise ModelError(f"{path}: layer_types must list {count} layers, got {str(kinds)[:60]}: download it again")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in KINDS:
            raise ModelError(f"{path}: layer type {kind!r} is not supported: use a model of {' and '.join(KINDS)} only")
    return tuple(KINDS[kind] for kind in kinds)


def _read_json(path: Path, remedy: str) -> dict:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path} ({error}): {remedy}") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{path} holds no JSON object: {remedy}")
    return fields


# --- weights ------------------------------------------------------------------------------------------------


def _published(name: str, config: LanguageConfig) -> str:
    """The name that published files give to a tensor of `Lfm2`."""
    if not name.startswith("layers."):
        return {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.embedding_norm.weight"}[name]
    _, index, part, *rest = name.split(".")
    if part == "mixer":
        part = MIXERS[config.layers[int(index)]]
    rest = [{"q_norm": "q_layernorm", "k_norm": "k_layernorm"}.get(word, word) for word in rest]
    return ".".join(("model.layers", index, part, *rest))


def _read_state(directory: Path, config: LanguageConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Lfm2(config).state_dict().items()}
    del shapes["head.weight"]
    names = {_published(name, config): name for name in shapes}
    wanted = {published: shapes[name] for published, name in names.items()}
    read = dict(_tensors(directory, wanted | {OUTPUT: shapes["embedding.weight"]}))
    missing = [published for published in names if published not in read]
    if missing:
        raise ModelError(f"{directory}: {len(missing)} tensors are missing, the first is {missing[0]}: "
                         "use the files of one checkpoint")  # fmt: skip
    output = read.pop(OUTPUT, None)
    state = {names[published]: tensor for published, tensor in read.items()}
    if output is not None and not torch.equal(output, state["embedding.weight"]):
        raise ModelError(f"{directory}: {OUTPUT} differs from the embedding, which is not supported: use a model "
                         "with tied embeddings")  # fmt: skip
    return state | {"head.weight": state["embedding.weight"]}


def _tensors(directory: Path, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 tensor) of all in the folder's weight files; ModelError for one that is not as in `shapes`."""
    for path, promised in _weight_files(directory):

        def refuse(reason: str, remedy: str = "use the files of one checkpoint", path=path):
            raise ModelError(f"{path}: {reason}: {remedy}")

        try:
            with safe_open(path, "pt") as file:
                held = sorted(file.keys())
                for name in held if promised is None else promised:
                    if name not in held:
                        refuse(f"it lacks {name}, which {INDEX} promises", "download it again")
                    if name not in shapes:
                        refuse(f"{name} is no tensor of the model that {CONFIG} describes")
                    view = file.get_slice(name)
                    if tuple(view.get_shape()) != shapes[name]:
                        refuse(f"{name} has shape {view.get_shape()}, {CONFIG} asks for {list(shapes[name])}")
                    if view.get_dtype() not in DTYPES:
                        refuse(f"{name} has dtype {view.get_dtype()}", f"convert it to one of {', '.join(DTYPES)}")
                    tensor = file.get_tensor(name)
                    if not torch.isfinite(tensor).all():
                        refuse(f"{name} holds values that are not finite", "download or train it again")
                    yield name, tensor.float()
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read weights {path} ({error}): download or train them again, as safetensors "
                             "(pickled ones are not read)") from error  # fmt: skip


def _weight_files(directory: Path) -> list[tuple[Path, list[str] | None]]:
    """The weight files, each with the tensors to take from it (None: all)."""
    if (directory / WEIGHTS).exists() or not (directory / INDEX).exists():
        return [(directory / WEIGHTS, None)]
    path = directory / INDEX
    held = _read_json(path, "download it again").get("weight_map")
    if not isinstance(held, dict) or not all(isinstance(name, str) for name in held.values()):
        raise ModelError(f"{path} has no weight_map from tensors to files: download it again")
    shards: dict[str, list[str]] = {}
    for tensor, name in held.items():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{path}: {name!r} is not the plain name of a safetensors file: download it again")
        shards.setdefault(name, []).append(tensor)
    return [(directory / name, tensors) for name, tensors in shards.items()]


# --- tokenizer ----------------------------------------------------------------------------------------------


def read_tokenizer(path: Path, config: LanguageConfig) -> Tokenizer | None:
    """The tokenizer in a file, None if there is no file; ModelError for one that does not belong to the model."""
    if not path.exists():
        return None
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing more special
        raise ModelError(f"cannot read tokenizer {path} ({error}): download it again or remove it") from error
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    # Vocabularies are padded a little, so fewer tokens are in order; half of them belong to another model.
    if max(ids, default=-1) >= config.vocab or 2 * len(ids) < config.vocab:
        raise ModelError(f"{path}: {len(ids)} tokens up to {max(ids, default=-1)} do not fit the model's vocabulary of "
                         f"{config.vocab}: use the tokenizer that belongs to the model")  # fmt: skip
    return tokenizer
