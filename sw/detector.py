"""A detector's host side: what remains after the engine, and how pictures of it are recorded."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

import numpy as np

from weft.models.data import Sample
from weft.models.decode import Detections, decode
from weft.reports.schema import Box, Picture

HEADS = ("hm", "wh", "reg")
SHOWN = 0.3  # smallest score of a box that a report draws


def detections(codes: Mapping[str, np.ndarray], scales: Mapping[str, float]) -> Detections:
    """Boxes from the codes [height, width, channels] of the three heads."""
    return decode(*(codes[name].transpose(2, 0, 1) * scales[name] for name in HEADS))


def picture(name: str, sample: Sample, classes: tuple[str, ...], reference: Detections, engine: Detections) -> Picture:
    """The record of one test image and its boxes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(sample.image).save(buffer, "png")
    height, width = sample.image.shape[:2]
    truth = Detections(sample.boxes, np.ones(len(sample.labels), np.float32), sample.labels)
    return Picture(name, base64.b64encode(buffer.getvalue()).decode(), width, height,
                   *(_boxes(found, classes) for found in (truth, reference, engine)))


def _boxes(found: Detections, classes: tuple[str, ...]) -> list[Box]:
    return [Box(classes[label], round(float(score), 4), *(round(float(side), 2) for side in box))
            for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True) if score >= SHOWN]
