"""Images for a Program: files, folders, the digit test set, noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from weft.arch.errors import ModelError
from weft.arch.numerics import S8, U8
from weft.arch.program import InputTensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
MID_GREY = 128  # real value 0; pixel p stands for (p - 128) / 128


def load_images(source: str, count: int, size: tuple[int, int], seed: int = 0) -> list[tuple[str, np.ndarray]]:
    """(name, uint8 [height, width, 3]) of at most `count` images, fitted into `size` = (height, width).

    `source`: an image file, a folder of images, `digits` (the test split) or `random`. Raises ModelError.
    """
    height, width = size
    if count < 1:
        raise ModelError(f"{count} images; give at least 1")
    if source == "random":
        rng = np.random.default_rng(seed)
        return [(f"random {i}", rng.integers(0, 256, (height, width, 3), np.uint8)) for i in range(count)]
    if height != width:
        raise ModelError(f"the model wants images of {height} x {width}; only square ones can be fitted, "
                         "give --images random")
    if source == "digits":
        from weft.models.data import DigitScenes

        scenes = DigitScenes("test", height, count)
        return [(f"scene {i}", scenes[i].image) for i in range(count)]
    return [(path.name, _read(path, height)) for path in _files(Path(source))[:count]]


def to_codes(pixels: np.ndarray, tensor: InputTensor) -> np.ndarray:
    """Input codes [height, width, channels] of an RGB picture: (pixel - 128) / 128, quantized as the model asks."""
    low, high = U8 if tensor.unsigned else S8
    real = (pixels.astype(np.float64) - MID_GREY) / MID_GREY
    return np.rint(real / tensor.scale).clip(low, high).astype(np.int16)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not found:
            raise ModelError(f"{path}: no image in this folder; wanted are {', '.join(sorted(SUFFIXES))}")
        return found
    if not path.is_file():
        raise ModelError(f"{path}: no such image file or folder; give one, or --images digits or random")
    return [path]


def _read(path: Path, size: int) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    from weft.models.data import letterbox

    try:
        with Image.open(path) as picture:
            return letterbox(picture.convert("RGB"), size)[0]
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ModelError(f"{path}: cannot be read as an image ({error})") from error
