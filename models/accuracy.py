"""Average precision as the field computes it: pycocotools, with its printing silenced."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import numpy as np

from weft.arch.errors import ModelError
from weft.models.data import Sample
from weft.models.decode import Detections


def average_precision(predictions: Sequence[Detections], truths: Sequence[Sample], classes: int) -> dict[str, float]:
    """{'ap', 'ap50', 'ap75'} in [0, 1] of predictions against ground truth, image by image.

    COCO's definition: 101-point interpolation, mean over classes, at most 100 detections per image; `ap` averages
    IoU thresholds 0.50 to 0.95.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if len(predictions) != len(truths):
        raise ModelError(f"{len(predictions)} predictions for {len(truths)} images: give one per image")
    annotations = [
        {"id": 0, "image_id": image, "category_id": int(label), "bbox": _xywh(box), "iscrowd": 0,
         "area": float((box[2] - box[0]) * (box[3] - box[1]))}
        for image, truth in enumerate(truths)
        for box, label in zip(truth.boxes, truth.labels, strict=True)
    ]  # fmt: skip
    if not annotations:
        raise ModelError("no ground-truth box in any image: average precision is undefined")
    for number, annotation in enumerate(annotations, 1):  # id 0 would count as unmatched
        annotation["id"] = number
    results = [
        {"image_id": image, "category_id": int(label), "bbox": _xywh(box), "score": float(score)}
        for image, found in enumerate(predictions)
        for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True)
    ]
    if not results:
        return {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": image} for image in range(len(truths))],
            "annotations": annotations,
            "categories": [{"id": label} for label in range(classes)],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(("ap", "ap50", "ap75"), (float(value) for value in evaluation.stats[:3]), strict=True))


def _xywh(box: np.ndarray) -> list[float]:
    x0, y0, x1, y1 = (float(value) for value in box)
    return [x0, y0, x1 - x0, y1 - y0]
