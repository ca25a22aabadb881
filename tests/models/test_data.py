"""Digit scenes and the Pascal-VOC loader."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from weft.arch.errors import ModelError
from weft.models.data import DigitScenes, VocDataset, backgrounds, digit_indices

ANNOTATION = """<annotation><object><name>cat</name><difficult>0</difficult>
<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>50</xmax><ymax>40</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>
<object><name>dog</name><difficult>1</difficult>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"""


def test_scenes_are_deterministic_and_random_access():
    first, second = DigitScenes("train", 96, 20, seed=3), DigitScenes("train", 96, 20, seed=3)
    for index in (7, 0, 7):
        assert all(np.array_equal(a, b) for a, b in zip(first[index], second[index], strict=True))
    assert not np.array_equal(first[0].image, first[1].image)
    assert not np.array_equal(first[0].image, DigitScenes("train", 96, 20, seed=4)[0].image)
    with pytest.raises(IndexError):
        first[20]


@pytest.mark.parametrize("split", ["train", "test"])
def test_scenes_are_well_formed(split):
    for sample in (scenes := DigitScenes(split, 128, 30)):
        assert sample.image.shape == (128, 128, 3) and sample.image.dtype == np.uint8
        assert sample.boxes.shape == (len(sample.labels), 4) and len(sample.labels) <= 6
        assert (sample.boxes >= 0).all() and (sample.boxes <= 128).all()
        assert (sample.boxes[:, 2:] - sample.boxes[:, :2] >= 6).all()
    assert {label for sample in scenes for label in sample.labels.tolist()} == set(range(10))


def test_splits_are_disjoint():
    train, test = (set(digit_indices(split).tolist()) for split in ("train", "test"))
    assert not train & test and len(train | test) == 1797 and len(test) == 359
    for left, right in zip(backgrounds("train"), backgrounds("test"), strict=True):
        assert left.shape[1] + right.shape[1] == 640 and left.base is not None
        assert not np.shares_memory(left, right)
    with pytest.raises(ModelError, match="train, test"):
        digit_indices("val")


def voc(tmp_path, annotation=ANNOTATION, names="one\n"):
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text(names)
    (tmp_path / "Annotations/one.xml").write_text(annotation)
    Image.fromarray(np.full((50, 100, 3), 200, np.uint8)).save(tmp_path / "JPEGImages/one.jpg")
    return tmp_path


def test_voc_sample(tmp_path):
    data = VocDataset(voc(tmp_path), "train", 64)
    sample = data[0]
    assert len(data) == 1 and sample.image.shape == (64, 64, 3)
    assert sample.labels.tolist() == [7]
    np.testing.assert_allclose(sample.boxes, [[6.4, 28.8, 32.0, 41.6]], atol=1e-5)
    assert (sample.image[:16] == 128).all() and (sample.image[20:40] > 190).all()


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ("<annotation><object>", "not well-formed"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "DOCTYPE"),
        (ANNOTATION.replace("cat", "unicorn"), "'unicorn' is not in the class list"),
        (ANNOTATION.replace("<xmin>11</xmin>", ""), "needs numeric xmin"),
        (ANNOTATION.replace("<xmin>11</xmin>", "<xmin>x</xmin>"), "needs numeric xmin"),
        (ANNOTATION.replace("<xmin>11</xmin>", "<xmin>nan</xmin>"), "empty or outside"),
        (ANNOTATION.replace("<xmax>50</xmax>", "<xmax>5</xmax>"), "empty or outside"),
    ],
)
def test_voc_annotation_errors(tmp_path, annotation, message):
    with pytest.raises(ModelError, match=message) as error:
        VocDataset(voc(tmp_path, annotation), "train")[0]
    assert "one.xml" in str(error.value)


def test_voc_file_errors(tmp_path):
    with pytest.raises(ModelError, match=r"val\.txt.*ImageSets"):
        VocDataset(voc(tmp_path), "val")
    (tmp_path / "JPEGImages/one.jpg").write_bytes(b"no picture")
    with pytest.raises(ModelError, match=r"one\.jpg"):
        VocDataset(tmp_path, "train")[0]
    (tmp_path / "Annotations/one.xml").unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / "JPEGImages/one.jpg")
    with pytest.raises(ModelError, match=r"one\.xml.*every listed image"):
        VocDataset(tmp_path, "train")[0]
    for names, message in (("\n", "lists no image"), ("../../etc/passwd\n", "plain image name")):
        (tmp_path / "ImageSets/Main/train.txt").write_text(names)
        with pytest.raises(ModelError, match=message):
            VocDataset(tmp_path, "train")
