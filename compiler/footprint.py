"""Footprint: which scratchpad and memory words an instruction reads and writes, from its fields alone.

Synchronization, verification and statistics rest on it. Sets are arrays of word numbers, duplicates allowed;
where the exact set depends on data (deformable sampling) it is the largest possible one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from weft.arch.config import EngineConfig
from weft.arch.isa import Instruction, Load, Matrix, Row, RowLayout, RowOp, Sampling, Store, Vector, VectorOp

ADDRESS_SPACE = 1 << 16
NOTHING = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Footprint:
    """Scratchpad words read and written; external memory as (segment, words) read and written.

    Scratchpad words are below 2**16, but not necessarily inside the pool.
    """

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
        ) % ADDRESS_SPACE
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
    if isinstance(instruction, Row):
        return _row(instruction, config)
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
    if isinstance(op, Vector) and op.operation == VectorOp.PACK:
        columns = np.arange(op.pitch)
    elif isinstance(op, Vector) and op.sampling != Sampling.GRID:
        columns = np.arange(op.width)
    else:
        last = (op.columns - 1) * op.stride_x + (op.kernel_x - 1) * op.dilation_x - op.pad_x
        columns = np.arange(max(0, -op.pad_x), min(op.width - 1, last) + 1)
    return (starts[:, None] + columns).ravel() % ADDRESS_SPACE


def _positions(op: Matrix | Vector) -> np.ndarray:
    rows = op.target + _slots(op.target_anchor, op.target_ring, np.arange(op.rows) * op.target_step_y) * op.target_pitch
    return (rows[:, None] + np.arange(op.columns) * op.target_step_x).ravel()


def _matrix(op: Matrix, config: EngineConfig, offsets: Sequence[int]) -> Footprint:
    words = config.tile_words(op.kernel_y * op.kernel_x * op.blocks, bool(op.wide), bool(op.grouped))
    parameters = config.plain_parameter_words if op.plain else config.tile_parameter_words
    reads = [
        _source(op),
        op.parameters + np.arange(op.tiles * parameters),
        op.weights + np.arange(op.tiles * words),
    ]
    if op.scaled and not op.hold:
        reads.append(_loops(op.scales, (op.rows, op.scales_pitch), (op.columns, 1)))
    if op.hold:
        places = NOTHING
    elif op.plain:
        places = np.unique((op.group + np.arange(op.tiles)) // (config.lanes // config.columns)) * op.target_plane
        places = np.concatenate([places, places + op.target_high]) if op.double else places
    else:
        places = np.unique(np.asarray(offsets, np.int64))
    writes = (_positions(op)[:, None] + places).ravel()
    return Footprint(np.concatenate(reads) % ADDRESS_SPACE, writes % ADDRESS_SPACE)


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
    return Footprint(np.concatenate(reads) % ADDRESS_SPACE, writes % ADDRESS_SPACE)


def _row(op: Row, config: EngineConfig) -> Footprint:
    def loops(first: int, row: int, column: int, *more: tuple[int, int]) -> np.ndarray:
        return _loops(first, (op.rows, row), (op.columns, column), *more)

    def numbers(name: str, taps: int = 1) -> np.ndarray:
        first, plane, high, row, column = (
            getattr(op, f"{name}{part}") for part in ("", "_plane", "_high", "_row", "_column")
        )
        return loops(first, row, column, (op.blocks, plane), (taps, column), (2, high))

    operation, groups = RowOp(op.operation), config.lanes // config.columns
    match operation:
        case RowOp.EXPAND:
            stream = np.arange(config.tile_words(op.blocks, grouped=True))
            reads = [
                (loops(op.source, op.source_row, op.source_column)[:, None] + stream).ravel(),
                loops(op.other, op.other_row, op.other_column, (config.plain_parameter_words, 1)),
            ]
        case RowOp.ARGMAX:
            reads = [numbers("source")]
            reads += [] if op.first else [loops(op.other, op.other_row, op.other_column)]
        case RowOp.CONVOLVE:
            reads = [numbers("source", op.span), numbers("other", op.span)]
        case RowOp.QUANTIZE if not op.weighted:
            reads = [numbers("source")]
        case _:
            reads = [numbers("source"), numbers("other")]
    if operation == RowOp.QUANTIZE and op.rotate:
        reads.append(op.table + np.arange(4 * op.rows * op.span))
    target = partial(loops, op.target, op.target_row, op.target_column)
    if operation == RowOp.ARGMAX:
        writes = [target()]
    elif operation not in (RowOp.QUANTIZE, RowOp.SOFTMAX):
        writes = [target((op.blocks, op.target_plane), (2, op.target_high))]
    else:
        values = op.layout == RowLayout.VALUES
        writes = [loops(op.scale, op.scale_row, op.scale_column, (2 if values else 1, 1))]
        if values:
            writes.append(target((op.blocks * groups, op.target_plane)))
        else:
            keys = op.layout == RowLayout.KEYS
            writes.append(target((op.blocks, op.target_plane), (config.columns if keys else 1, 1)))
    return Footprint(np.concatenate(reads) % ADDRESS_SPACE, np.concatenate(writes) % ADDRESS_SPACE)
