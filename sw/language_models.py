"""Language models by name, folder or file, as the command line gives them. Loading float ones loads torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from weft.arch.errors import ModelError
from weft.arch.language import LanguageConfig, LanguageModel

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SUFFIX = ".lm"  # of a quantized language model
TRAINED = Path(__file__).parents[1] / "models" / "checkpoints"
NANO = "lfm2-nano"


@dataclass(frozen=True)
class Loaded:
    """A quantized model and the tokenizer of its text, if it has one."""

    model: LanguageModel
    tokenizer: Tokenizer | None

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, the beginning of the text marked. Raises ModelError without a tokenizer."""
        return [self.model.config.bos, *self._tokenizer().encode(text, add_special_tokens=False).ids]

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer().decode(tokens, skip_special_tokens=True)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ModelError(f"language model '{self.model.config.name}' has no tokenizer: put tokenizer.json into its "
                             "folder")
        return self.tokenizer


def language_rows() -> list[dict[str, object]]:
    """Shapes of the family's members."""
    from weft.models.lfm2 import LFM2_CONFIGS, parameter_count

    return [{
        "name": config.name, "width": config.width, "layers": len(config.layers),
        "attention": config.layers.count("attention"), "heads": config.heads, "kv_heads": config.kv_heads,
        "vocab": config.vocab, "parameters": parameter_count(config),
    } for config in LFM2_CONFIGS.values()]


def is_language(name: str) -> bool:
    """Whether the command line means a language model: a folder, a quantized file or a name of the family."""
    path = Path(name)
    return path.is_dir() or path.suffix == SUFFIX or name.startswith("lfm2")


def folder(name: str) -> Path:
    """The Hugging Face folder of a model. Raises ModelError for a name that has none here."""
    path = TRAINED / name if name == NANO else Path(name)
    if not path.is_dir():
        raise ModelError(f"no language model '{name}' here: give {NANO}, the folder of a Hugging Face checkpoint, or a "
                         f"file made by `weft quantize`, ending in {SUFFIX}")
    return path


def load_language(name: str, gptq: bool = False, calibration: str | None = None) -> Loaded:
    """A quantized file as it is; a checkpoint quantized now. `calibration`: a text file; default: the model's own text
    for lfm2-nano, else random tokens. Raises ModelError."""
    from weft.models.huggingface import read_tokenizer

    path = Path(name)
    if path.suffix == SUFFIX:
        model = LanguageModel.load(path)
        return Loaded(model, read_tokenizer(path.with_suffix(".tokenizer.json"), model.config))
    return quantize_folder(folder(name), name == NANO, gptq, calibration)


def quantize_folder(path: Path, own_text: bool, gptq: bool, calibration: str | None) -> Loaded:
    from weft.models.huggingface import load_huggingface
    from weft.models.quantize_language import Options, quantize

    found = load_huggingface(path)
    tokens = None
    if calibration is not None:
        if found.tokenizer is None:
            raise ModelError(f"{path}: a calibration text needs tokenizer.json in the folder")
        tokens = np.array(found.tokenizer.encode(read_text(calibration)).ids)
    elif own_text:
        from weft.models.text import corpus

        tokens = corpus("train")
    return Loaded(quantize(found.config, found.state, Options(calibration=tokens, gptq=gptq)), found.tokenizer)


def read_text(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read as text ({error})") from error


def random_language(name: str, seed: int) -> LanguageModel:
    """A published shape with random weights, for measuring cycles."""
    from weft.models.lfm2 import language_config
    from weft.models.quantize_language import Options, quantize, random_state

    config: LanguageConfig = language_config(name)
    return quantize(config, random_state(config, seed), Options(seed=seed, candidates=1, length=64))
