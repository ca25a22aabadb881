"""Exported models of the zoo with the codes that their own integer forward pass gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

TINY = {"size": 32, "stem_channels": 8, "stages": (16, 24, 32), "repeats": (1, 2, 1), "conv5": 24,
        "decoder": (16, 12, 8), "head": 8}


@dataclass(frozen=True)
class Exported:
    """A QONNX file and the codes [H, W, C] of its tensors for one image, keyed by tensor name."""

    path: Path
    codes: dict[str, np.ndarray]


def _export(folder: Path, **changes) -> Exported:
    codenet = pytest.importorskip("weft.models.codenet")
    from weft.models.export import export_with_codes

    config = codenet.config("codenet-nano", **changes)
    images = np.random.default_rng(0).integers(0, 256, (2, config.size, config.size, 3), dtype=np.uint8)
    path = folder / "nano.onnx"
    codes = export_with_codes(codenet.random_model(config, images), images[0], path)
    return Exported(path, {name: code[0].transpose(1, 2, 0) for name, code in codes.items()})


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """CoDeNet nano with the square operator."""
    return _export(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="session")
def tiny_bounded(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A very small CoDeNet with full deformable convolutions and bilinear samples."""
    return _export(tmp_path_factory.mktemp("bounded"), deform="bounded", depthwise=False, **TINY)
