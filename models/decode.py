"""CenterNet decoding: head outputs to boxes. NumPy only, so that the host runtime can use it on any device's output."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

DOWN_RATIO = 4  # image pixels per output pixel


class Detections(NamedTuple):
    """Boxes of one image, best first: boxes float32 [n, 4] (x0, y0, x1, y1), scores float32 [n], labels int64 [n]."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def decode(hm: np.ndarray, wh: np.ndarray, reg: np.ndarray, top: int = 100, threshold: float = 0.0) -> Detections:
    """Peaks of the heat map as boxes in image pixels.

    hm [classes, H, W] logits; wh [2, H, W] (width, height) and reg [2, H, W] (dx, dy) in output pixels. A peak is a
    cell not below any of its 8 neighbours of the same class. At most `top` detections with score >= threshold.
    """
    classes, rows, cols = hm.shape
    scores = 1 / (1 + np.exp(-hm.astype(np.float64)))
    padded = np.pad(hm, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    around = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2)).max((3, 4))
    candidates = np.flatnonzero((hm >= around) & (scores >= threshold))
    best = candidates[np.argsort(-scores.ravel()[candidates], kind="stable")[:top]]
    labels, y, x = np.unravel_index(best, (classes, rows, cols))
    centre = np.stack([x + reg[0, y, x], y + reg[1, y, x]], 1)
    half = np.maximum(wh[:, y, x].T, 0) / 2
    boxes = np.concatenate([centre - half, centre + half], 1) * DOWN_RATIO
    return Detections(boxes.astype(np.float32), scores.ravel()[best].astype(np.float32), labels.astype(np.int64))
