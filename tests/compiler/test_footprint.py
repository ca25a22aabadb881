"""Footprints against what the functional machine reads and writes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sim.test_machine import CONFIGS, SETTINGS, Machine, random_pool, windows
from tests.sim.test_machine_row import CONFIGS as ROW_CONFIGS
from tests.sim.test_machine_row import rows
from weft.arch.config import EngineConfig
from weft.arch.isa import Instruction, Load, Matrix, Row, RowOp, Store
from weft.compiler.footprint import footprint


def touched(config: EngineConfig, pool: np.ndarray, instruction: Instruction) -> tuple[set[int], set[int]]:
    """Words that the machine reads and writes."""
    machine = Machine(config, np.zeros(4096, np.uint8), (0,), trace=True)
    machine.pool[:] = pool
    log = machine.step(0, instruction)
    reads = set()
    for words, when in machine._reads:
        reads |= set(words[np.broadcast_to(when, words.shape) >= 0].tolist())
    return reads, set(log.address.tolist()) if log is not None else set()


def check(config: EngineConfig, pool: np.ndarray, instruction: Instruction, exact: bool = True) -> None:
    reads, writes = touched(config, pool, instruction)
    found = footprint(instruction, config)
    assert set(found.writes.tolist()) == writes
    assert set(found.reads.tolist()) == reads if exact else set(found.reads.tolist()) >= reads


@pytest.mark.parametrize("operation", list(RowOp), ids=lambda operation: operation.name)
@settings(SETTINGS, max_examples=25)
@given(data=st.data(), config=st.sampled_from(ROW_CONFIGS))
def test_row(operation, data, config):
    fields = data.draw(rows(operation))
    if operation == RowOp.EXPAND:
        fields["length"] %= config.columns
    check(config, np.ones((config.pool_words, 32), np.uint8), Row(**fields))


@SETTINGS
@given(windows(), st.sampled_from(CONFIGS), st.integers(1, 20), *[st.integers(0, 1)] * 4, st.booleans())
def test_plain_matrix(window, config, tiles, wide, grouped, scaled, double, dense):
    """Exact where the window has no gaps; between its first and last row and column otherwise."""
    if dense:
        window |= {"stride_y": 1, "stride_x": 1, "dilation_y": 1, "dilation_x": 1, "pad_x": 0, "window_y": 0,
                   "width": 5, "height": 5, "ring": 5, "anchor": window["anchor"] % 5}
    pool = random_pool(config, np.random.default_rng(0))
    for first in (10000, 20000):
        pool[first : first + 300] = 8
    check(config, pool, Matrix(
        **window, weights=25000, tiles=tiles, wide=wide, plain=1, grouped=grouped, scaled=scaled, double=double,
        scales=10000, scales_pitch=7, target_plane=900, target_high=300,
        group=tiles % (config.lanes // config.columns)), exact=dense)


def test_held_sums_are_not_written():
    i = Matrix(kernel_y=1, kernel_x=1, height=1, width=1, ring=1, rows=1, columns=1, blocks=1, tiles=1, plain=1, hold=1,
               target_ring=1, target_step_x=1, target_step_y=1, scaled=1, scales=500, parameters=700, weights=800)
    found = footprint(i, CONFIGS[0])
    assert not found.writes.size and 500 not in found.reads and 700 in found.reads


def test_transfers_wrap_with_the_addresses():
    fields = {"address": 65534, "run": 3, "rows": 2, "planes": 1, "row_words": 10, "row_bytes": 64, "offset": 32}
    for kind in (Load, Store):
        found = footprint(kind(**fields, **({"mask": 1} if kind is Store else {})), CONFIGS[0])
        words = found.reads if kind is Store else found.writes
        assert words.tolist() == [65534, 65535, 0, 8, 9, 10]
        assert (found.memory_writes if kind is Store else found.memory_reads)[1].tolist() == [1, 2, 3, 3, 4, 5]
