"""Small quantized networks that the tests share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weft.models.codenet import CoDeNet, CoDeNetConfig, random_model


def tiny_config(deform: str = "square", **changes) -> CoDeNetConfig:
    fields = {
        "name": "tiny", "size": 32, "classes": 3, "stem_channels": 8, "stem_pool": True, "stages": (12, 16, 20),
        "repeats": (2, 1, 2), "conv5": 24, "decoder": (16, 12, 8), "head": 8, "deform": deform,
    }  # fmt: skip
    return CoDeNetConfig(**(fields | changes))


def noise_images(size: int, count: int = 2, seed: int = 0) -> np.ndarray:
    """Blotchy random images, uint8 [count, size, size, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(0, 50, (count, size // 8, size // 8, 3)).repeat(8, 1).repeat(8, 2)
    return np.clip(128 + coarse + rng.normal(0, 20, (count, size, size, 3)), 0, 255).astype(np.uint8)


def tiny_model(deform: str = "square", **changes) -> CoDeNet:
    return random_model(tiny_config(deform, **changes), noise_images(changes.get("size", 32)))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
