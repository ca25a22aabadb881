"""Training of the byte-level language model: next-byte cross entropy on `text.corpus`, in float."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.arch.errors import ModelError
from weft.arch.program import write_atomically
from weft.models.huggingface import byte_tokenizer, save_huggingface
from weft.models.lfm2 import Lfm2, language_config
from weft.models.text import corpus
from weft.models.train import bars

TRAINING = "training.json"


@dataclass(frozen=True)
class Recipe:
    """What determines a training run, together with the versions of Python (its texts) and of the libraries."""

    steps: int = 1200  # some six times the text; more of them learn it by heart
    batch: int = 8
    length: int = 256  # bytes of a sample
    long_steps: int = 120  # the last of `steps`, whose samples are `stretch` times as long and as many times fewer
    stretch: int = 4
    learning_rate: float = 4e-3
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.3
    dropout: float = 0.2
    seed: int = 0


def tokens(split: str) -> Tensor:
    """A split of the corpus as tokens, int64 [bytes]."""
    return torch.from_numpy(corpus(split).astype(np.int64))


@torch.no_grad()
def cross_entropy(model: nn.Module, text: Tensor, window: int = 512, batch: int = 16) -> float:
    """Mean loss in nats of text int64 [n] under any model tokens -> logits; exp() of it is the perplexity.

    The text is cut into windows that know nothing of each other; all but the first token of each are predicted.
    ModelError for a text shorter than one window.
    """
    if not 1 < window <= len(text):
        raise ModelError(f"a text of {len(text)} tokens has no window of {window}: choose 2 to {len(text)}")
    training = model.training
    model.eval()
    windows = text[: len(text) // window * window].view(-1, window)
    total = sum(float(_loss(model, part, "sum")) for part in windows.split(batch))
    model.train(training)
    return total / (windows.numel() - len(windows))


def fit(model: Lfm2, text: Tensor, recipe: Recipe, advance: Callable[[float], None]) -> None:
    """Train on random pieces of text int64 [n]; AdamW, warm-up and cosine. `advance(loss)` follows every step."""
    generator = torch.Generator().manual_seed(recipe.seed)
    # Gains and the embedding, whose rows the logits need apart, are not decayed.
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and not name.startswith("embedding")]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or name.startswith("embedding")]
    optimizer = torch.optim.AdamW([
        {"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0},
    ], lr=recipe.learning_rate, betas=(0.9, 0.98))  # fmt: skip
    rise = max(1, round(recipe.warmup * recipe.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / rise) * (0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))
    )
    model.train()
    with _dropout(model, recipe.dropout):
        for step in range(recipe.steps):
            stretch = recipe.stretch if step >= recipe.steps - recipe.long_steps else 1
            length, batch = recipe.length * stretch, max(1, recipe.batch // stretch)
            start = torch.randint(len(text) - length, (batch, 1), generator=generator)
            loss = _loss(model, text[start + torch.arange(length + 1)])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            advance(float(loss.detach()))
    model.eval()


def train_language(name: str = "lfm2-nano", out: str | os.PathLike | None = None, steps: int | None = None,
                   seed: int = 0, progress: bool = True, recipe: Recipe | None = None, **changes
                   ) -> dict[str, dict[str, float]]:  # fmt: skip
    """Train a byte-level model and write it to the folder `out` (nothing if None), as Hugging Face lays it out.

    `changes` replace fields of the model's configuration (width=64, ...). Weights are bfloat16 in the file, and what
    is returned is measured with those: {'float': {'loss': nats per byte, 'perplexity': per byte}} on the test split.
    Deterministic for a given seed and given versions. ModelError for a model that is not byte-level.
    """
    config = replace(language_config(name), **changes)
    if config.vocab != 256:
        raise ModelError(f"{name} has a vocabulary of {config.vocab}, training is for bytes: use lfm2-nano")
    fields = asdict(recipe or Recipe()) | {"seed": seed}
    if steps is not None:
        fields |= {"steps": steps, "long_steps": min(fields["long_steps"], steps // 10)}
    recipe = Recipe(**fields)
    text, test = tokens("train"), tokens("test")
    longest = recipe.length * recipe.stretch
    if recipe.steps < 1 or not longest <= min(config.context, len(text) - 1):
        raise ModelError(f"nothing to train: {recipe.steps} steps of {recipe.length} to {longest} bytes, context "
                         f"{config.context}: choose more steps or shorter samples")  # fmt: skip
    torch.set_num_threads(1)  # sums in another order make another network
    with bars(progress) as bar, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Lfm2(config)
        fit(model, text, recipe, bar("float", recipe.steps))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    loss = cross_entropy(model, test)
    accuracy = {"float": {"loss": loss, "perplexity": math.exp(loss)}}
    if out is not None:
        save_huggingface(out, config, model, torch.bfloat16, byte_tokenizer())
        record = {"recipe": asdict(recipe), "accuracy": accuracy}
        write_atomically(Path(out) / TRAINING, json.dumps(record, indent=2) + "\n")
    return accuracy


def read_training(directory: str | os.PathLike) -> dict:
    """{'recipe': ..., 'accuracy': ...} as written beside a trained model; ModelError if it cannot be read."""
    path = Path(directory) / TRAINING
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"recipe": record["recipe"], "accuracy": record["accuracy"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot read {path} ({error}): train the model with `weft train`") from error


def _loss(model: nn.Module, pieces: Tensor, reduction: str = "mean") -> Tensor:
    """Loss of predicting each token of pieces [batch, n] but the first."""
    return F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten(), reduction=reduction)


@contextmanager
def _dropout(model: Lfm2, share: float) -> Iterator[None]:
    """Drop a share of what layers add to the stream while training; no part of the model, so done from outside."""

    def drop(module: nn.Module, _inputs, output: Tensor) -> Tensor:
        return F.dropout(output, share, module.training)

    handles = [probe.register_forward_hook(drop)
               for layer in model.layers for probe in (layer.mixer.output, layer.feed_forward.output)]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
