"""The detection models by name: configuration, data, weights, accuracy and where they come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weft.arch.errors import ModelError
from weft.models.checkpoint import load_checkpoint, read_metadata
from weft.models.codenet import CONFIGS, CoDeNet, CoDeNetConfig, config, random_model
from weft.models.data import DigitScenes

CHECKPOINTS = Path(__file__).parent / "checkpoints"


@dataclass(frozen=True)
class Entry:
    """One model of the zoo. `checkpoint` is None where only random weights exist (speed, not accuracy)."""

    config: CoDeNetConfig
    origin: str
    data: str
    checkpoint: Path | None = None

    def accuracy(self) -> dict[str, dict[str, float]]:
        """{'float': {'ap50': ...}, 'quantized': {...}} as measured when the checkpoint was trained; {} without one."""
        return {} if self.checkpoint is None else read_metadata(self.checkpoint)["accuracy"]


_PAPER = "architecture of arXiv 2006.08357 (quantized network), random weights"
ENTRIES = {
    name: Entry(member, _PAPER, "Pascal VOC, 20 classes: bring your own images (VocDataset)")
    for name, member in CONFIGS.items()
} | {
    "codenet-nano": Entry(
        CONFIGS["codenet-nano"],
        "own small member of the family, trained here: weft.models.train.train('codenet-nano', out)",
        "digit scenes from scikit-learn's bundled digits and photographs (DigitScenes)",
        CHECKPOINTS / "codenet-nano.safetensors",
    )
}


def entry(name: str) -> Entry:
    """The named entry; ModelError for an unknown name."""
    if name not in ENTRIES:
        raise ModelError(f"no model named {name!r}; known: {', '.join(ENTRIES)}")
    return ENTRIES[name]


def calibration_images(size: int, count: int = 4, seed: int = 0) -> np.ndarray:
    """uint8 RGB [count, size, size, 3]: digit scenes, the images that random models are calibrated on."""
    scenes = DigitScenes("train", size, count, seed)
    return np.stack([scenes[index].image for index in range(count)])


def build(name: str, seed: int = 0, **changes) -> CoDeNet:
    """Any member, quantized, with random weights and calibrated scales; `changes` replace configuration fields."""
    member = config(name, **changes)
    return random_model(member, calibration_images(member.size, seed=seed), seed)


def load(name: str, quantized: bool = True) -> CoDeNet:
    """The named model in eval mode: from its checkpoint, or with random weights where there is none.

    Models without a checkpoint exist quantized only.
    """
    found = entry(name)
    if found.checkpoint is not None:
        return load_checkpoint(found.checkpoint, quantized)
    if not quantized:
        raise ModelError(f"{name} has random weights and exists quantized only: load it with quantized=True")
    return build(name)
