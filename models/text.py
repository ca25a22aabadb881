"""A text corpus with nothing to download: the language reference that Python carries for `help()`.

Texts are uint8 arrays of UTF-8 bytes; byte 0, which no text holds, stands before, between and after documents.
"""

from __future__ import annotations

import hashlib

import numpy as np

from weft.arch.errors import ModelError

SPLITS = ("train", "test")
TEST_PART = 10  # one topic in ten, by the hash of its name: the same ones in every version of Python


def topics() -> dict[str, str]:
    """Name to text of every documentation topic of the running Python (some 0.5 MB); they differ between versions."""
    from pydoc_data.topics import topics as bundled

    return dict(bundled)


def held_out(name: str) -> bool:
    """Whether a topic belongs to the test split."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest(), "big") % TEST_PART == 0


def documents(split: str) -> list[str]:
    """The texts of a split, in the order of their names; ModelError for an unknown split.

    Topics quote each other: a paragraph that occurs in the test split is left out of the training split.
    """
    if split not in SPLITS:
        raise ModelError(f"split {split!r} must be one of {', '.join(SPLITS)}")
    texts = sorted(topics().items())
    test = [text for name, text in texts if held_out(name)]
    if split == "test":
        return test
    known = {paragraph.strip() for text in test for paragraph in text.split("\n\n")}
    return [
        "\n\n".join(paragraph for paragraph in text.split("\n\n") if paragraph.strip() not in known)
        for name, text in texts
        if not held_out(name)
    ]


def corpus(split: str) -> np.ndarray:
    """All documents of a split as one array: 0, document, 0, document, ..., 0."""
    joined = "\0".join(["", *documents(split), ""])
    return np.frombuffer(joined.encode(), np.uint8)
