"""Models by name or checkpoint file, as the command line gives them. Loading this module loads torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from weft.arch.errors import ModelError
from weft.models import zoo
from weft.models.checkpoint import load_checkpoint
from weft.models.codenet import CoDeNet
from weft.models.layers import QuantLayer


def load_model(name_or_path: str, quantized: bool = True) -> CoDeNet:
    """A member of the zoo by name, or any checkpoint file. Raises ModelError."""
    if Path(name_or_path).suffix == ".safetensors":
        return load_checkpoint(name_or_path, quantized)
    if name_or_path not in zoo.ENTRIES:
        raise ModelError(f"no model named '{name_or_path}'; give one of {', '.join(zoo.ENTRIES)}, "
                         "or a checkpoint file ending in .safetensors")
    return zoo.load(name_or_path, quantized)


@contextmanager
def fake_quantized(model: CoDeNet) -> Iterator[CoDeNet]:
    """Inside the block, the quantized model computes in floats between its quantizers, as QAT tools usually do."""
    layers = model.layers()

    def fake(layer: QuantLayer):
        def codes(x, weight, output, offset):
            bias = None if layer.conv.bias is None else layer.conv.bias[:, None, None]
            return torch.round(layer.fake(x, weight.value, output, offset, bias) / output.scale)

        return codes

    for layer in layers:
        layer.exact = fake(layer)  # shadows the method
    try:
        yield model
    finally:
        for layer in layers:
            del layer.exact
