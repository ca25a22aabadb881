"""Checkpoints: safetensors files that hold the float and the quantized weights of one model."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from weft.arch.errors import ModelError
from weft.arch.program import write_atomically
from weft.models.codenet import CoDeNet, CoDeNetConfig

FORMAT = "weft.codenet/1"
PARTS = ("float", "quantized")


def state(model: CoDeNet) -> dict[str, Tensor]:
    """The model's tensors under the name of the mode it is in: `float.*` (with batch norm) or `quantized.*`."""
    part = PARTS[model.quantized]
    return {f"{part}.{key}": value.clone().contiguous() for key, value in model.state_dict().items()}


def save_checkpoint(path: str | os.PathLike, model: CoDeNet, tensors: dict[str, Tensor], recipe: dict,
                    accuracy: dict) -> None:  # fmt: skip
    """Write the tensors of both modes; metadata `weft`: JSON of format, config, recipe, accuracy, activation scales."""
    scales = {name: float(module.output.scale) for name, module in model.named_modules()
              if getattr(module, "output", None) is not None}  # fmt: skip
    metadata = {"format": FORMAT, "config": asdict(model.config), "recipe": recipe, "accuracy": accuracy,
                "scales": scales}  # fmt: skip
    # One metadata key, because safetensors writes several in random order and equal models are to be equal files.
    write_atomically(Path(path), save(tensors, {"weft": json.dumps(metadata, sort_keys=True)}))


def read_metadata(path: str | os.PathLike) -> dict:
    """Metadata of a checkpoint: format, config, recipe, accuracy, scales; ModelError if the file is none."""
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("weft", "{}"))
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ModelError(f"cannot read checkpoint {path} ({error}): train one with `weft train`") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ModelError(f"{path} is no {FORMAT} checkpoint: train it again")
    return metadata


def load_checkpoint(path: str | os.PathLike, quantized: bool = True) -> CoDeNet:
    """The model in eval mode, quantized (folded, integer forward) or float (as pretrained, with batch norm)."""
    model = CoDeNet(CoDeNetConfig.from_dict(read_metadata(path).get("config")))
    if quantized:
        model.fold()
    prefix = PARTS[quantized] + "."
    with safe_open(path, "pt") as file:
        tensors = {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ModelError(f"{path} holds values that are not finite: train it again")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ModelError(f"{path} does not fit its own configuration: {error}") from error
    return model.quantize(quantized).eval()
