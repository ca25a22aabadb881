"""Detection data: handwritten digits on photographs (nothing to download), and the user's own Pascal-VOC folders.

A sample is (image uint8 [S, S, 3] RGB, boxes float32 [n, 4] as x0, y0, x1, y1 in pixels, labels int64 [n]).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

import numpy as np
from PIL import Image, UnidentifiedImageError

from weft.arch.errors import ModelError

DIGIT_CLASSES = tuple("0123456789")
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
SPLITS = ("train", "test")
SPLIT_SEED = 2024  # fixes which digits and which part of each photograph are for testing
TEST_SHARE = 0.2
TRAIN_COLUMNS = 0.6  # left part of each photograph; the rest is for testing


class Sample(NamedTuple):
    """One image with its ground truth."""

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    bundle = load_digits()
    return bundle.images.astype(np.float32) / 16, bundle.target


@lru_cache(maxsize=1)
def _photographs() -> tuple[np.ndarray, ...]:
    from sklearn.datasets import load_sample_images

    return tuple(load_sample_images().images)


def digit_indices(split: str) -> np.ndarray:
    """Indices into scikit-learn's digits that belong to a split; the two splits share none."""
    if split not in SPLITS:
        raise ModelError(f"split {split!r} must be one of {', '.join(SPLITS)}")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(_digits()[0]))
    cut = round(len(order) * TEST_SHARE)
    return order[:cut] if split == "test" else order[cut:]


def backgrounds(split: str) -> list[np.ndarray]:
    """Photograph regions uint8 [H, W, 3] of a split; train and test regions do not touch."""
    if split not in SPLITS:
        raise ModelError(f"split {split!r} must be one of {', '.join(SPLITS)}")
    cuts = [(photo, round(photo.shape[1] * TRAIN_COLUMNS)) for photo in _photographs()]
    return [photo[:, cut:] if split == "test" else photo[:, :cut] for photo, cut in cuts]


class DigitScenes:
    """Procedural scenes: 1 to 4 bright digits, scaled, warped and tinted, on photograph crops.

    Scene i depends on (seed, split, i) only. Digits are a quarter to two thirds of the image side high and
    hardly overlap.
    """

    classes = DIGIT_CLASSES

    def __init__(self, split: str, size: int = 128, length: int = 1000, seed: int = 0):
        self.split, self.size, self.length, self.seed = split, size, length, seed
        self._indices, self._backgrounds = digit_indices(split), backgrounds(split)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        canvas = self._background(rng)
        boxes: list[tuple[int, int, int, int]] = []
        labels: list[int] = []
        for _ in range(rng.integers(1, 5)):
            digit = int(rng.choice(self._indices))
            mask = _warp(_digits()[0][digit], rng, round(self.size * rng.uniform(0.4, 0.85)))
            rows, cols = np.flatnonzero((mask > 0.5).any(1)), np.flatnonzero((mask > 0.5).any(0))
            if not len(rows):
                continue
            mask = mask[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
            box = _place(mask.shape, boxes, self.size, rng)
            if box is None:
                continue
            _paint(canvas, mask, box, rng)
            boxes.append(box)
            labels.append(int(_digits()[1][digit]))
        image = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
        return Sample(image, np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64))

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        region = self._backgrounds[rng.integers(len(self._backgrounds))]
        side = int(rng.integers(64, min(region.shape[:2]) + 1))
        top, left = rng.integers(region.shape[0] - side + 1), rng.integers(region.shape[1] - side + 1)
        crop = Image.fromarray(region[top : top + side, left : left + side])
        canvas = np.asarray(crop.resize((self.size, self.size), Image.Resampling.BILINEAR), np.float32)
        canvas = canvas[:, ::-1] if rng.random() < 0.5 else canvas
        return (canvas[..., rng.permutation(3)] - 128) * rng.uniform(0.3, 0.8) + 128 + rng.uniform(-60, 0)


def _warp(digit: np.ndarray, rng: np.random.Generator, side: int) -> np.ndarray:
    """A digit [8, 8] in [0, 1] as a smooth mask [side, side], rotated, sheared and stretched a little."""
    padded = Image.fromarray(np.pad(digit, 2))
    angle, shear = rng.uniform(-0.25, 0.25), rng.uniform(-0.25, 0.25)
    stretch = np.exp(rng.uniform(-0.2, 0.2, 2))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = rotation @ np.array([[1, shear], [0, 1]]) @ np.diag(12 / side * stretch)
    shift = 6 - matrix @ np.full(2, side / 2)
    coefficients = (*matrix[0], shift[0], *matrix[1], shift[1])
    mask = padded.transform((side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    return np.clip((np.asarray(mask) - 0.3) * 3, 0, 1)


def _place(shape: tuple[int, int], boxes: list, size: int, rng: np.random.Generator):
    """A box (x0, y0, x1, y1) of the mask's shape that covers at most a tenth of any other, or None."""
    height, width = shape
    if max(height, width) >= size or min(height, width) < 6:
        return None
    for _ in range(10):
        left, top = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
        box = (left, top, left + width, top + height)
        if all(_overlap(box, other) <= 0.1 for other in boxes):
            return box
    return None


def _overlap(a, b) -> float:
    """Intersection over the smaller area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def _paint(canvas: np.ndarray, mask: np.ndarray, box, rng: np.random.Generator) -> None:
    """Blend a coloured digit in; the colour stands out from what is behind it."""
    behind = canvas[box[1] : box[3], box[0] : box[2]]
    mean = behind.mean((0, 1))
    for _ in range(20):
        colour = rng.uniform(170, 255, 3)
        if abs(colour.mean() - mean.mean()) > 60:
            break
    alpha = mask[..., None] * rng.uniform(0.8, 1.0)
    behind += alpha * (colour + rng.normal(0, 6, behind.shape) - behind)


class VocDataset:
    """A folder in Pascal-VOC format: Annotations/*.xml, JPEGImages/*.jpg, ImageSets/Main/<split>.txt.

    Images are letterboxed to `size` (aspect kept, padded with grey 128 = code 0) and boxes with them. Objects marked
    difficult are left out. ModelError names the file and the remedy when something is missing or malformed.
    """

    def __init__(self, root: str | Path, split: str, size: int = 512, classes: tuple[str, ...] = VOC_CLASSES):
        self.root, self.size, self.classes = Path(root), size, tuple(classes)
        listing = self.root / "ImageSets" / "Main" / f"{split}.txt"
        try:
            lines = listing.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(
                f"cannot read the image list {listing} ({error}): point to the folder that holds ImageSets/, "
                "Annotations/ and JPEGImages/, and name a split listed in ImageSets/Main"
            ) from error
        self.names = [line.split()[0] for line in lines if line.strip()]
        if not self.names:
            raise ModelError(f"{listing} lists no image: write one image name (without .jpg) per line")
        for name in self.names:
            if Path(name).name != name or name in (".", ".."):
                raise ModelError(f"{listing}: {name!r} is not a plain image name: remove folders from it")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        name = self.names[index]
        path = self.root / "JPEGImages" / f"{name}.jpg"
        try:
            with Image.open(path) as file:
                picture = file.convert("RGB")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise ModelError(f"cannot read image {path} ({error}): add it or take {name} off the list") from error
        boxes, labels = self._annotation(self.root / "Annotations" / f"{name}.xml")
        image, scale, left, top = letterbox(picture, self.size)
        return Sample(image, boxes * scale + np.array([left, top, left, top], np.float32), labels)

    def _annotation(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        boxes, labels = [], []
        for fields in read_voc_objects(path):
            if fields.get("difficult") == "1":
                continue
            if fields.get("name") not in self.classes:
                raise ModelError(
                    f"{path}: class {fields.get('name')!r} is not in the class list ({', '.join(self.classes)}): "
                    "pass classes=... with every name that occurs"
                )
            try:
                x0, y0, x1, y1 = (float(fields[key]) for key in ("xmin", "ymin", "xmax", "ymax"))
            except (KeyError, ValueError) as error:
                raise ModelError(f"{path}: object {fields['name']!r} needs numeric xmin, ymin, xmax, ymax") from error
            if not (0 <= x0 - 1 < x1 < 1e6 and 0 <= y0 - 1 < y1 < 1e6):  # also false for nan
                raise ModelError(f"{path}: box {x0, y0, x1, y1} of {fields['name']!r} is empty or outside the image")
            boxes.append((x0 - 1, y0 - 1, x1, y1))  # VOC pixels are 1-based and inclusive
            labels.append(self.classes.index(fields["name"]))
        return np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64)


def letterbox(picture: Image.Image, size: int) -> tuple[np.ndarray, float, int, int]:
    """Fit a picture into a grey square: (uint8 [size, size, 3], scale, left, top) with new = old * scale + offset."""
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    left, top = (size - width) // 2, (size - height) // 2
    canvas = np.full((size, size, 3), 128, np.uint8)
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    canvas[top : top + height, left : left + width] = np.asarray(resized)
    return canvas, scale, left, top


def read_voc_objects(path: Path) -> list[dict[str, str]]:
    """The <object> elements of a VOC annotation: name, difficult, xmin, ymin, xmax, ymax as text.

    Entities and document types are refused, so a file cannot expand or include anything.
    """
    objects: list[dict[str, str]] = []
    stack: list[str] = []
    text: list[str] = []

    def start(tag, _attributes):
        stack.append(tag)
        text.clear()
        if stack == ["annotation", "object"]:
            objects.append({})

    def end(tag):
        # Deeper elements are body parts, which are not objects.
        if stack[:2] == ["annotation", "object"] and (len(stack) == 3 or stack[2:-1] == ["bndbox"]):
            objects[-1][tag] = "".join(text).strip()
        stack.pop()
        text.clear()

    def refuse(*_):
        raise ModelError(f"{path}: document types and entities are not accepted: remove the <!DOCTYPE ...> part")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text.append
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = parser.ExternalEntityRefHandler = refuse
    try:
        parser.Parse(path.read_bytes(), True)
    except OSError as error:
        raise ModelError(f"cannot read the annotation {path} ({error}): every listed image needs one") from error
    except expat.ExpatError as error:
        raise ModelError(f"{path} is not well-formed XML ({error}): export the annotation again") from error
    return objects
