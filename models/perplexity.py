"""Perplexity of a language model from float to integers, and which part of quantization costs how much.

A predictor maps tokens int64 [batch, n] to logits float [batch, n, vocab], as `Lfm2` does. The integer model is
given as one (`rows` makes it of a function of a single row): how it is computed is no matter of this folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from weft.arch.errors import ModelError
from weft.models.lfm2 import Lfm2
from weft.models.quantize_language import precision

Predictor = Callable[[Tensor], Tensor]
STEPS = ("float", "weights", "activations", "cache", "functions")


@dataclass(frozen=True)
class Agreement:
    """How a model predicts a text, and how near its logits are to those of the reference."""

    perplexity: float  # per token
    cosine: float  # of the logits, mean over positions
    top1: float  # share of positions with the same most likely token


def rows(function: Callable[[np.ndarray], np.ndarray]) -> Predictor:
    """A predictor made of a function of the tokens [n] of one sequence to their logits [n, vocab]."""
    return lambda tokens: torch.stack([torch.from_numpy(np.float32(function(row.numpy()))) for row in tokens])


@torch.no_grad()
def compare(reference: Predictor, others: dict[str, Predictor], text: Tensor, window: int = 512, batch: int = 8
            ) -> dict[str, Agreement]:  # fmt: skip
    """Agreement of each of `others` with the reference on text int64 [n], cut into windows that know nothing of each
    other; all but the first token of a window are predicted. ModelError for a text shorter than one window."""
    if not 1 < window <= len(text):
        raise ModelError(f"a text of {len(text)} tokens has no window of {window}: choose 2 to {len(text)}")
    windows = text[: len(text) // window * window].view(-1, window)
    sums = {name: np.zeros(3) for name in others}
    for part in windows.split(batch):
        inputs, targets = part[:, :-1], part[:, 1:].flatten()
        want = reference(inputs).flatten(0, 1)
        for name, predictor in others.items():
            got = predictor(inputs).flatten(0, 1)
            sums[name] += [float(F.cross_entropy(got, targets, reduction="sum")),
                           float(F.cosine_similarity(got, want, dim=-1).sum()),
                           float((got.argmax(-1) == want.argmax(-1)).sum())]  # fmt: skip
    count = windows.numel() - len(windows)
    return {name: Agreement(math.exp(loss / count), float(cosine / count), float(same / count))
            for name, (loss, cosine, same) in sums.items()}  # fmt: skip


def ladder(reference: Lfm2, model: Lfm2, integer: Predictor, text: Tensor, window: int = 512
           ) -> dict[str, Agreement]:  # fmt: skip
    """STEPS, each with all that stands before it: float, then int4 weights, int8 rows into matrix products, int8 keys
    and values (all three of the quantized network `model`), and at last integer functions: the integer model."""

    def step(*enabled: bool) -> Predictor:
        def predict(tokens: Tensor) -> Tensor:
            with precision(model, *enabled):
                return model(tokens)

        return predict

    predictors = (reference, step(True, False, False), step(True, True, False), step(True, True, True), integer)
    return compare(reference, dict(zip(STEPS, predictors, strict=True)), text, window)


def losses(steps: dict[str, Agreement]) -> Iterator[tuple[str, float]]:
    """How much each step adds to the perplexity of the one before, relative to that of the first."""
    values = list(steps.items())
    for (_, before), (name, after) in pairwise(values):
        yield name, (after.perplexity - before.perplexity) / values[0][1].perplexity
