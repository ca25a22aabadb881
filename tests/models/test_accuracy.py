"""Decoding and average precision on cases whose answer is known."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from weft.arch.errors import ModelError
from weft.models.accuracy import average_precision
from weft.models.data import Sample
from weft.models.decode import Detections, decode

BOX = np.array([[10, 10, 30, 40]], np.float32)
LABEL = np.array([1])
NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


def truth(boxes=BOX, labels=LABEL):
    return Sample(np.zeros((64, 64, 3), np.uint8), boxes, labels)


def found(boxes=BOX, labels=LABEL):
    return Detections(boxes, np.linspace(0.9, 0.5, len(boxes), dtype=np.float32), labels)


def test_average_precision_of_known_cases(capsys):
    assert average_precision([found()], [truth()], 2)["ap"] == pytest.approx(1)
    assert average_precision([found(labels=np.array([0]))], [truth()], 2)["ap50"] == 0
    assert average_precision([NOTHING], [truth()], 2)["ap50"] == 0
    shifted = BOX + np.array([0, 9, 0, 9], np.float32)  # IoU 21/39 = 0.54
    result = average_precision([found(shifted)], [truth()], 2)
    assert result["ap50"] == pytest.approx(1) and result["ap75"] == 0
    # One of two images found: precision 1 up to recall 0.5 is 51 of 101 recall points.
    assert average_precision([found(), NOTHING], [truth(), truth()], 2)["ap50"] == pytest.approx(51 / 101)
    assert capsys.readouterr().out == ""


def test_average_precision_errors():
    with pytest.raises(ModelError, match="one per image"):
        average_precision([found()], [], 2)
    with pytest.raises(ModelError, match="no ground-truth box"):
        average_precision([NOTHING], [truth(BOX[:0], LABEL[:0])], 2)


def test_decode_recovers_boxes():
    hm, wh, reg = np.full((2, 16, 16), -9.0), np.zeros((2, 16, 16)), np.zeros((2, 16, 16))
    hm[1, 6, 5], wh[:, 6, 5], reg[:, 6, 5] = 3.0, (5.0, 7.5), (0.0, 0.25)
    hm[1, 6, 6] = 2.0  # a neighbour, no peak
    hm[0, 2, 3], wh[:, 2, 3] = 1.0, (-4.0, 2.0)  # a negative size is an empty box
    boxes, scores, labels = decode(hm, wh, reg, threshold=0.3)
    np.testing.assert_allclose(boxes[0], [10, 10, 30, 40])
    np.testing.assert_allclose(scores, 1 / (1 + np.exp([-3.0, -1.0])), rtol=1e-6)
    assert labels.tolist() == [1, 0] and boxes[1, 0] == boxes[1, 2] == 12
    assert average_precision([Detections(boxes, scores, labels)], [truth()], 2)["ap50"] == pytest.approx(1)
    assert len(decode(hm, wh, reg, top=7).scores) == 7


def test_decoding_needs_no_torch():
    check = "import sys, weft.models.decode; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
