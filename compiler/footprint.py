"""Footprint: which scratchpad and memory words an instruction reads and writes, from its fields alone.

Synchronization, verification and statistics rest on it. Sets are arrays of word numbers, duplicates allowed;
where the exact set depends on data (deformable sampling) it is the largest possible one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weft.arch.config import EngineConfig
from weft.arch.isa import Instruction, Load, Matrix, Sampling, Store, Vector, VectorOp

ADDRESS_SPACE = 1 << 16
NOTHING = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Footprint:
    """Scratchpad words read and written; external memory as (segment, words) read and written."""

    reads: np.ndarray
    writes: np.ndarray
    memory_reads: tuple[int, np.ndarray] | None = None
    memory_writes: tuple[int, np.ndarray] | None = None


def footprint(instruction: Instruction, config: EngineConfig, offsets: Sequence[int] = ()) -> Footprint:
    """What `instruction` touches. `offsets`: the write descriptors' offsets of a Matrix instruction."""
    if isinstance(instruction, Load):  # and Store
        local = _loops(
            instruction.address,
            (instruction.planes, instruction.plane_words),
            (instruction.rows, instruction.row_words),
            (instruction.run, 1),
        )
        remote = _loops(
            instruction.offset // config.lanes,
            (instruction.planes, instruction.plane_bytes // config.lanes),
            (instruction.rows, instruction.row_bytes // config.lanes),
            (instruction.run, 1),
        )
        if isinstance(instruction, Store):
            return Footprint(local, NOTHING, None, (instruction.base, remote))
        return Footprint(NOTHING, local, (instruction.base, remote), None)
    if isinstance(instruction, Matrix):
        return _matrix(instruction, config, offsets)
    if isinstance(instruction, Vector):
        return _vector(instruction, config)
    return Footprint(NOTHING, NOTHING)


def _loops(base: int, *loops: tuple[int, int]) -> np.ndarray:
    """All values of base + sum of i*step over nested loops (count, step)."""
    words = np.array([base], np.int64)
    for count, step in loops:
        words = (words[:, None] + np.arange(count) * step).ravel()
    return words


def _slots(anchor: int, ring: int, distance: np.ndarray) -> np.ndarray:
    slots = anchor + distance
    return np.where(slots >= ring, slots - ring, slots)


def _source(op: Matrix | Vector) -> np.ndarray:
    """Words of the source rows that the window reaches."""
    if isinstance(op, Vector) and op.sampling != Sampling.GRID:
        last = op.window_y + op.ring - 1
    else:
        last = op.window_y + (op.rows - 1) * op.stride_y + (op.kernel_y - 1) * op.dilation_y
    rows = np.arange(max(0, op.window_y), min(op.height - 1, last) + 1)
    starts = op.source + _slots(op.anchor, op.ring, rows - op.window_y) * op.pitch
    starts = (np.arange(op.blocks)[:, None] * op.plane + starts).ravel()
    packed = isinstance(op, Vector) and op.operation == VectorOp.PACK
    return (starts[:, None] + np.arange(op.pitch if packed else op.width)).ravel()


def _positions(op: Matrix | Vector) -> np.ndarray:
    rows = op.target + _slots(op.target_anchor, op.target_ring, np.arange(op.rows) * op.target_step_y) * op.target_pitch
    return (rows[:, None] + np.arange(op.columns) * op.target_step_x).ravel()


def _matrix(op: Matrix, config: EngineConfig, offsets: Sequence[int]) -> Footprint:
    words = op.kernel_y * op.kernel_x * op.blocks * config.columns // 2 * (2 if op.wide else 1)
    reads = [
        _source(op),
        op.parameters + np.arange(op.tiles * config.tile_parameter_words),
        op.weights + np.arange(op.tiles * words),
    ]
    unique = np.unique(np.asarray(offsets, np.int64))
    writes = (_positions(op)[:, None] + unique).ravel() % ADDRESS_SPACE
    return Footprint(np.concatenate(reads), writes)


def _vector(op: Vector, config: EngineConfig) -> Footprint:
    reads = [_source(op)]
    if op.tap_step:
        reads += [(reads[0] + i * op.tap_step) % ADDRESS_SPACE for i in range(1, op.kernel_x)]
    taps = op.kernel_y * op.kernel_x
    if op.operation == VectorOp.MULTIPLY:
        reads.append(op.parameters + np.arange(op.blocks * (config.block_parameter_words + taps)))
    if op.sampling != Sampling.GRID:
        rows = op.offsets + _slots(op.offset_anchor, op.offset_ring, np.arange(op.rows)) * op.offset_pitch
        reads.append((rows[:, None] + np.arange(op.columns)).ravel())
    writes = (_positions(op)[:, None] + np.arange(op.blocks) * op.target_plane).ravel()
    if op.operation == VectorOp.COLUMNS:
        writes = (writes[:, None] + np.arange(taps) * op.target_tap).ravel()
    return Footprint(np.concatenate(reads), writes)
