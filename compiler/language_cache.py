"""The cache of a sequence as bytes of segment CACHE: what the engine stores while it runs, made from plain arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from weft.arch.isa import SCALE_FIELDS
from weft.compiler.language_pack import NOTHING, two_words
from weft.compiler.language_plan import Cache


@dataclass(frozen=True)
class KeysValues:
    """An attention layer's positions 0 .. n-1: codes int8 [kv heads, n, head_size], the rest [kv heads, n]."""

    keys: np.ndarray
    mult: np.ndarray
    shift: np.ndarray
    values: np.ndarray
    magnitudes: np.ndarray


def cache_bytes(cache: Cache, layers: list[np.ndarray | KeysValues]) -> bytes:
    """A sequence's part of segment CACHE. `layers`: the last kernel - 1 gated values int16 [tokens, width] of a
    convolution, or keys and values. Positions not seen yet are zero, as in an empty sequence."""
    raw = bytearray()
    for state in layers:
        if isinstance(state, KeysValues):
            for part in (_keys, _key_scales, _values, _magnitudes):
                raw += part(cache, state).tobytes()
        else:
            raw += two_words(state, cache.shape.config).swapaxes(1, 2).tobytes()  # [low, high][block][token]
    return bytes(raw) + bytes(cache.sequence_bytes - len(raw))


def _positions(cache: Cache, items: np.ndarray) -> np.ndarray:
    """[heads, n, ...] filled up with zeros to all positions."""
    room = [(0, 0), (0, cache.context - items.shape[1]), *[(0, 0)] * (items.ndim - 2)]
    return np.pad(items, room)


def _keys(cache: Cache, state: KeysValues) -> np.ndarray:
    order = np.array(cache.shape.head)
    keys = _positions(cache, state.keys)[:, :, order] * (order != NOTHING).astype(np.int8)
    heads, _, size = keys.shape
    return np.ascontiguousarray(keys.reshape(heads, -1, cache.shape.config.columns, size).swapaxes(2, 3))


def _key_scales(cache: Cache, state: KeysValues) -> np.ndarray:
    config = cache.shape.config
    entries = np.zeros((*state.mult.shape[:1], cache.context), np.dtype(SCALE_FIELDS))
    entries["mult"], entries["shift"] = _positions(cache, state.mult), _positions(cache, state.shift)
    tiles = entries.view(np.uint8).reshape(len(entries), -1, 4 * config.columns)
    return np.pad(tiles, ((0, 0), (0, 0), (0, config.plain_parameter_words * config.lanes - 4 * config.columns)))


def _values(cache: Cache, state: KeysValues) -> np.ndarray:
    values = _positions(cache, state.values)
    heads, positions, _ = values.shape
    return np.ascontiguousarray(values.reshape(heads, positions, -1, cache.shape.config.columns).swapaxes(1, 2))


def _magnitudes(cache: Cache, state: KeysValues) -> np.ndarray:
    both = two_words(_positions(cache, state.magnitudes), cache.shape.config)
    return np.ascontiguousarray(both.transpose(1, 2, 0, 3))  # [head][block][low, high]
