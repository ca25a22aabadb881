"""The sampling front end against a plain loop nest over arrays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.kit.memory import Memory
from tests.kit.streams import NONE, Waits, run, simulator, sink, source
from weft.arch.config import EngineConfig, load_config
from weft.arch.isa import Sampling, Vector, VectorOp
from weft.arch.numerics import bilinear, split_position
from weft.hw.gather import FIELDS, NEIGHBOURS, Gather

OFFSETS = 3000  # where the tables below keep offset tensors
CONFIG = load_config("test")


def wrap(slot: int, ring: int) -> int:
    return slot - ring if slot >= ring else slot


def offset_word(words: np.ndarray, item: Vector, oy: int, ox: int) -> np.ndarray:
    """Offset word of an output pixel, as signed codes."""
    row = wrap(item.offset_anchor + oy, item.offset_ring)
    return words[item.offsets + row * item.offset_pitch + ox].view(np.int8).astype(int)


def samples(words: np.ndarray, item: Vector):
    """(block, oy, ox, tap, sample) for every tap of an instruction, in order; `sample` holds codes in int64."""
    kind = np.uint8 if item.unsigned else np.int8
    lanes = words.shape[1]
    maximum, pack = item.operation == VectorOp.MAXIMUM, item.operation == VectorOp.PACK
    outside = np.full(lanes, np.iinfo(kind).min if maximum else 0)

    def row_inside(y):
        return 0 <= y < item.height and item.window_y <= y < item.window_y + item.ring

    def row_at(y):
        return wrap(item.anchor + y - item.window_y, item.ring) * item.pitch

    def pixel(block, y, x, kx):
        if not (row_inside(y) and 0 <= x < item.width):
            return outside
        address = item.source + block * item.plane + row_at(y) + x + item.tap_step * kx
        return words[address % (1 << 16)].view(kind).astype(int)

    for block in range(item.blocks):
        for oy in range(item.rows):
            for ox in range(item.columns):
                for tap in range(item.kernel_y * item.kernel_x):
                    ky, kx = divmod(tap, item.kernel_x)
                    y = item.window_y + oy * item.stride_y + ky * item.dilation_y
                    x = ox * item.stride_x + kx * item.dilation_x - item.pad_x
                    if pack:
                        sample = np.zeros(lanes, int)
                        if row_inside(y):
                            first = (item.source + row_at(y)) * lanes + ox * item.pack_stride
                            at = tap * item.pack_bytes
                            sample[at:at + item.pack_bytes] = words.reshape(-1).view(kind)[first:][:item.pack_bytes]
                    elif item.sampling == Sampling.GRID:
                        sample = pixel(block, y, x, kx)
                    elif item.sampling == Sampling.SQUARE:
                        dilation = offset_word(words, item, oy, ox)[0]
                        y = item.grid_y + item.kernel_y // 2 + oy * item.stride_y + dilation * (ky - item.kernel_y // 2)
                        x = (ox * item.stride_x - item.pad_x + item.kernel_x // 2
                             + dilation * (kx - item.kernel_x // 2))
                        sample = pixel(block, y, x, kx)
                    else:
                        dy, dx = offset_word(words, item, oy, ox)[2 * tap:][:2]
                        y, fy = split_position(y - item.window_y + item.grid_y, dy, item.fraction)
                        x, fx = split_position(x, dx, item.fraction)
                        corners = [pixel(block, y + i, x + j, kx) for i in range(2) for j in range(2)]
                        sample = bilinear(*corners, fy, fx)
                    yield block, oy, ox, tap, sample


def fill_offsets(words: np.ndarray, count: int = 400) -> None:
    """Offset words at OFFSETS: codes of a few pixels for one fraction or another, one in eight anywhere, some zero."""
    rng = np.random.default_rng(0)
    shape = count, words.shape[1]
    reach = 3 << rng.integers(0, 5, (count, 1))
    near, far = rng.integers(-reach, reach + 1, shape), rng.integers(-128, 128, shape)
    codes = np.where(rng.integers(0, 8, shape) == 0, far, near)
    codes[::7] = 0
    words[OFFSETS:OFFSETS + count] = codes.astype(np.int8).view(np.uint8)


def as_bits(item: Vector):
    """The instruction as the payload of a stream."""
    return FIELDS.from_bits(int.from_bytes(item.encode(), "little"))


PLAIN = Vector(
    source=40, plane=130, pitch=10, ring=8, window_y=-1, height=7, width=9, kernel_y=3, kernel_x=3, pad_x=1,
    stride_y=1, stride_x=1, dilation_y=1, dilation_x=1, rows=3, columns=5, blocks=1, low=-128, high=127,
    target=5000, target_pitch=12, target_ring=40, target_step_y=1, target_step_x=1, target_plane=500, target_tap=50,
    tag=1)
DEFORMED = replace(PLAIN, window_y=-3, ring=10, anchor=4, grid_y=-1, height=7, offsets=OFFSETS, offset_pitch=6,
                   offset_ring=4, offset_anchor=2)
STEM = replace(PLAIN, operation=VectorOp.PACK, unsigned=1, pitch=3, kernel_x=1, width=0, pack_bytes=9, pack_stride=12,
               stride_y=4, rows=2, columns=6)

GATHERED = {
    "plain": PLAIN,
    "unsigned": replace(PLAIN, unsigned=1),
    "stride_2": replace(PLAIN, stride_y=2, stride_x=2, columns=4),
    "dilated": replace(PLAIN, dilation_y=2, dilation_x=3, pad_x=3, window_y=-2, ring=8),
    "ring": replace(PLAIN, window_y=2, ring=5, anchor=3, height=30),
    "ring_padded": replace(PLAIN, window_y=-1, ring=5, anchor=4),
    "bottom": replace(PLAIN, window_y=5, ring=5, anchor=2),
    "two_operands": replace(PLAIN, kernel_y=1, kernel_x=2, dilation_x=0, pad_x=0, window_y=0, tap_step=200),
    "copy": replace(PLAIN, kernel_y=1, kernel_x=1, pad_x=0, window_y=0),
    "kernel_5x5": replace(PLAIN, kernel_y=5, kernel_x=5, pad_x=2, window_y=-2, ring=8),
    "blocks": replace(PLAIN, blocks=3, rows=2, columns=2),
    "negative_step": replace(PLAIN, source=400, tap_step=(1 << 16) - 13, plane=(1 << 16) - 100, blocks=2, columns=2),
    "maximum": replace(PLAIN, operation=VectorOp.MAXIMUM, stride_y=2, stride_x=2),
    "maximum_unsigned": replace(PLAIN, operation=VectorOp.MAXIMUM, unsigned=1, columns=2),
    "stem_stride_4": STEM,
    "stem_stride_2": replace(STEM, pack_stride=6, stride_y=2, window_y=3, anchor=2, ring=6, height=20),
    "stem_top": replace(STEM, window_y=-1, ring=8, pack_bytes=10),
    "square": replace(DEFORMED, sampling=Sampling.SQUARE),
    "square_even": replace(DEFORMED, sampling=Sampling.SQUARE, kernel_y=2, kernel_x=4, stride_x=2, columns=3),
    "square_window": replace(DEFORMED, sampling=Sampling.SQUARE, window_y=2, grid_y=4, height=60, ring=7, anchor=5),
    **{f"offsets_{f}": replace(DEFORMED, sampling=Sampling.OFFSETS, fraction=f, unsigned=f & 1) for f in range(5)},
    "offsets_window": replace(DEFORMED, sampling=Sampling.OFFSETS, fraction=2, window_y=5, grid_y=8, height=60, ring=9,
                              anchor=8, stride_y=2, dilation_x=2),
    "offsets_edge": replace(DEFORMED, sampling=Sampling.OFFSETS, fraction=3, window_y=0, grid_y=-1, ring=4, anchor=1,
                            height=4, width=4, columns=4),
    "offsets_blocks": replace(DEFORMED, sampling=Sampling.OFFSETS, fraction=4, blocks=2, columns=2, kernel_x=1),
}


def gather(config: EngineConfig, items: list[Vector], waits: Waits = NONE):
    """Samples from the hardware and from the reference; of the former the cycles and the raw items, too."""
    memory = Memory(config, seed=1)
    fill_offsets(memory.words)
    expected, offsets = [], []
    for item in items:
        for _, oy, ox, tap, sample in samples(memory.words, item):
            expected.append((sample & 255).astype(np.uint8).tobytes())
            if tap == 0 and item.sampling != Sampling.GRID:
                codes = offset_word(memory.words, item, oy, ox).astype(np.int8)
                offsets.append(int.from_bytes(codes.tobytes(), "little"))
    dut = Gather(config)
    sim = simulator(dut)
    sim.add_testbench(memory.serve(reads=[dut.port[i] for i in range(NEIGHBOURS)], waits=waits), background=True)
    sim.add_testbench(source(dut.instruction, [as_bits(item) for item in items], waits))
    sim.add_testbench(source(dut.offset, offsets, waits))
    sim.add_testbench(sink(dut.sample, len(expected), values := [], waits))
    run(sim)
    got = [int(value.data).to_bytes(config.lanes, "little") for value in values]
    return got, expected, memory.cycle, values


@pytest.mark.parametrize("group", range(2))
def test_samples_under_back_pressure(group):
    """Every case once; instructions follow each other, all ports refuse at random."""
    got, expected, *_ = gather(CONFIG, list(GATHERED.values())[group::2], Waits(group, chance=0.2))
    assert got == expected


def test_steps():
    """Weight index, word limits, and the end of block and instruction travel with the sample."""
    items = [replace(PLAIN, blocks=2, rows=1, columns=2, kernel_x=2),
             replace(PLAIN, operation=VectorOp.COLUMNS, rows=1, columns=2, kernel_y=1, kernel_x=2, tag=77)]
    *_, values = gather(CONFIG, items)
    flags = [(s.step.index, s.step.first, s.step.last, s.step.block_end, s.step.final) for s in values]
    last = 2 * 2 * 6
    assert flags[:last] == [(i % 6, i % 6 == 0, i % 6 == 5, i % 12 == 11, i == 23) for i in range(last)]
    assert flags[last:] == [(i % 2, 1, 1, i == 3, i == 3) for i in range(4)]
    assert [s.step.address for s in values[last:]] == [5000, 5050, 5001, 5051]
    assert values[last].step.tag == 77


def test_one_tap_per_cycle():
    """Instructions of all kinds in a row take a cycle per tap, and the length of the pipeline once."""
    cases = [GATHERED[name] for name in ("plain", "square", "offsets_3", "stem_stride_4", "maximum", "copy")]
    got, expected, cycles, _ = gather(CONFIG, cases)
    assert got == expected
    assert cycles <= len(expected) + 20
