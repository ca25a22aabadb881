"""Weights of a language model as the engine reads them: streams of tiles, in order of use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weft.arch.config import EngineConfig
from weft.arch.isa import SCALE_FIELDS
from weft.arch.language import Linear

NOTHING = -1  # a place without a row or a group: zeros


@dataclass(frozen=True)
class Packed:
    """A matrix product's constants. `parameters` [tiles, words, lanes] and `stream` [tiles, words, lanes], uint8.

    `channels[i]` is the row at output position i = tile*C + column, or NOTHING; `blocks` the source words of a row.
    """

    parameters: np.ndarray
    stream: np.ndarray
    channels: tuple[int, ...]
    blocks: int

    @property
    def tiles(self) -> int:
        return len(self.stream)

    @property
    def tile_words(self) -> int:
        return self.parameters.shape[1] + self.stream.shape[1]

    def chunk(self, first: int, last: int) -> bytes:
        """Tiles first .. last-1: all their parameters, then all their weights."""
        return self.parameters[first:last].tobytes() + self.stream[first:last].tobytes()


def padded(count: int, size: int, start: int = 0) -> list[int]:
    """start .. start+count-1 and NOTHING up to a multiple of `size`."""
    return [*range(start, start + count), *[NOTHING] * (-count % size)]


def pack(linear: Linear, config: EngineConfig, unit: float, output: float | np.ndarray,
         rows: Sequence[int] | None = None, groups: Sequence[int] | None = None) -> Packed:
    """`linear` with its rows in the order `rows` (default: as they are, filled up to whole words) and its groups of
    32 inputs in the order `groups`; requantize parameters for inputs of row unit `unit` and outputs of scale `output`.
    """
    c, lanes = config.columns, config.lanes
    count, blocks = linear.factors.shape
    order = np.array(padded(count, lanes) if rows is None else rows)
    inputs = np.arange(blocks) if groups is None else np.array(groups)
    used = order != NOTHING
    codes = linear.codes.reshape(count, blocks, lanes)[order][:, inputs] * used[:, None, None].astype(np.int8)
    factors = linear.factors[order][:, inputs]
    tiles = len(order) // c
    entries = np.zeros((tiles, config.plain_parameter_words * lanes // 4), np.dtype(SCALE_FIELDS))
    mult, shift = linear.scales(unit, output)
    entries["mult"][:, :c] = (mult[order] * used).reshape(tiles, c)
    entries["shift"][:, :c] = (shift[order] * used).reshape(tiles, c)
    return Packed(
        entries.view(np.uint8).reshape(tiles, -1, lanes),
        _stream(codes.reshape(tiles, c, len(inputs), lanes), factors.reshape(tiles, c, -1), config),
        tuple(int(row) for row in order),
        len(inputs),
    )


def _stream(codes: np.ndarray, factors: np.ndarray, config: EngineConfig) -> np.ndarray:
    """Weight stream of 4-bit codes [tiles, C, blocks, lanes] and group factors [tiles, C, blocks]."""
    c, lanes, together = config.columns, config.lanes, config.scaled_words
    tiles, _, blocks, _ = codes.shape
    nibbles = (codes & 15).astype(np.uint8).reshape(tiles, c, blocks, lanes // 2, 2)
    weights = (nibbles[..., 0] | nibbles[..., 1] << 4).transpose(0, 2, 3, 1)  # tile, block, pair of lanes, column
    fill = -blocks % together
    weights = np.pad(weights.reshape(tiles, blocks, -1), ((0, 0), (0, fill), (0, 0)))
    scales = np.pad(factors, ((0, 0), (0, 0), (0, fill))).transpose(0, 2, 1)  # tile, block, column
    runs = (blocks + fill) // together
    parts = [scales.reshape(tiles, runs, lanes), weights.reshape(tiles, runs, -1)]
    words = config.tile_words(blocks, grouped=True)
    return np.concatenate(parts, axis=2).reshape(tiles, -1, lanes)[:, :words]


def two_words(codes: np.ndarray, config: EngineConfig) -> np.ndarray:
    """16-bit codes [..., n] as uint8 [2, ..., blocks, lanes]: low bytes, then high bytes."""
    fill = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % config.lanes)]
    words = np.pad(codes.astype(np.int64), fill).reshape(*codes.shape[:-1], -1, config.lanes)
    return np.stack([words & 255, words >> 8 & 255]).astype(np.uint8)


def scale_words(mult: int, shift: int, count: int, config: EngineConfig) -> bytes:
    """`count` tiles' plain parameters with the same scale in every column."""
    entries = np.zeros((count, config.plain_parameter_words * config.lanes // 4), np.dtype(SCALE_FIELDS))
    entries["mult"][:, : config.columns], entries["shift"][:, : config.columns] = mult, shift
    return entries.tobytes()
