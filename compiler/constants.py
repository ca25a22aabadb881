"""Constants: a task's parameters and weights as the bytes that arch/isa.py describes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from weft.arch.config import EngineConfig
from weft.arch.isa import DESCRIPTOR_FIELDS, SCALE_FIELDS, VectorOp
from weft.compiler.graph import Requantize
from weft.compiler.lower import MatrixTask, Task, VectorTask
from weft.compiler.placement import Write


def weight_step_words(task: MatrixTask, config: EngineConfig) -> int:
    """Scratchpad words of the weights of one tile."""
    _, ky, kx, lanes = task.weight.shape
    nibbles = ky * kx * lanes * config.columns * (2 if task.wide else 1)
    return nibbles // 2 // config.lanes


def words_per_tile(task: MatrixTask, config: EngineConfig) -> int:
    return config.tile_parameter_words + weight_step_words(task, config)


def constant_words(task: Task, config: EngineConfig) -> int:
    """Scratchpad words of a task's parameters and weights; 0 for a task that has none."""
    if isinstance(task, MatrixTask):
        return task.parts * words_per_tile(task, config)
    if isinstance(task, VectorTask) and task.operation == VectorOp.MULTIPLY:
        return task.parts * block_words(task, config)
    return 0


def block_words(task: VectorTask, config: EngineConfig) -> int:
    """Scratchpad words of bias, scale and tap weights of one channel block."""
    assert task.weight is not None
    return config.block_parameter_words + task.weight.shape[1] * task.weight.shape[2]


def pack_constants(task: Task, config: EngineConfig, locate: Callable[[Write], list[tuple[int, int]]]) -> bytes:
    """All parameters, then all weights, of a matrix task; per block both, of a vector task.

    `locate` gives word offset and lane group of every copy of a Write.
    """
    if isinstance(task, MatrixTask):
        return _matrix_parameters(task, config, locate) + _matrix_weights(task, config)
    if isinstance(task, VectorTask) and task.operation == VectorOp.MULTIPLY:
        return _vector_constants(task, config)
    return b""


def _words(raw: bytes, config: EngineConfig) -> bytes:
    return raw + bytes(-len(raw) % config.lanes)


def _scale_bytes(requantize: Requantize, part: slice, config: EngineConfig) -> bytes:
    """Bias words, then (uint16 mult, uint8 shift, unused byte) words."""
    bias = requantize.bias[part].astype("<i4").tobytes()
    scale = np.zeros(len(requantize.mult[part]), np.dtype(SCALE_FIELDS))
    scale["mult"], scale["shift"] = requantize.mult[part], requantize.shift[part]
    return _words(bias, config) + _words(scale.tobytes(), config)


def _matrix_parameters(
    task: MatrixTask, config: EngineConfig, locate: Callable[[Write], list[tuple[int, int]]]
) -> bytes:
    chunks = []
    for index, tile in enumerate(task.tiles):
        part = slice(index * config.columns, (index + 1) * config.columns)
        descriptors = np.zeros(
            config.max_writes, np.dtype(DESCRIPTOR_FIELDS)
        )
        writes = [(offset, group, write.mask) for write in tile.writes for offset, group in locate(write)]
        for slot, (offset, group, mask) in enumerate(writes):
            descriptors[slot] = (offset, group, 0, mask)
        chunks += [_scale_bytes(task.requantize, part, config), _words(descriptors.tobytes(), config)]
    return b"".join(chunks)


def _matrix_weights(task: MatrixTask, config: EngineConfig) -> bytes:
    tiles, (_, ky, kx, lanes) = task.parts, task.weight.shape
    weight = task.weight.reshape(tiles, config.columns, ky, kx, lanes)
    weight = weight.transpose(0, 2, 3, 4, 1).astype(np.uint8)  # tile, ky, kx, lane, column
    if not task.wide:  # a byte holds two neighbouring lanes of a column
        weight = weight[:, :, :, ::2] & 15 | weight[:, :, :, 1::2] << 4
    return weight.tobytes()


def _vector_constants(task: VectorTask, config: EngineConfig) -> bytes:
    assert task.weight is not None and task.requantize is not None
    chunks = []
    for block in range(task.parts):
        part = slice(block * config.lanes, (block + 1) * config.lanes)
        taps = task.weight[part].reshape(config.lanes, -1).T  # tap, lane
        chunks += [_scale_bytes(task.requantize, part, config), taps.astype(np.int8).tobytes()]
    return b"".join(chunks)
