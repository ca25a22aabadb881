"""MatrixUnit against a direct transcription of the Matrix instruction's docstring."""

from dataclasses import replace

import numpy as np
import pytest

from tests.kit.memory import Memory
from tests.kit.streams import NONE, Waits, count_cycles, put, run, simulator
from weft.arch.config import EngineConfig, load_config
from weft.arch.isa import Matrix
from weft.arch.numerics import S8, U8, requantize
from weft.hw.layouts import layout_of
from weft.hw.matrix import MatrixUnit

TEST, BASE = load_config("test"), load_config("base")


def execute(config: EngineConfig, pool: np.ndarray, i: Matrix) -> None:
    """What `i` does to `pool`, a row of bytes per word."""
    R, C, L = config.rows, config.columns, config.lanes
    steps = L // R * (2 if i.wide else 1)
    stream = pool.reshape(-1)[i.weights * L:]
    parameters = config.tile_parameter_words
    before = pool.copy()  # sources, weights and parameters are not among the targets
    for tile in range(i.tiles):
        words = before[i.parameters + tile * parameters:][:parameters].reshape(-1)
        half = (parameters - 1) // 2 * L
        bias = words[:4 * C].view("<i4").astype(np.int64)
        mult = words[half:].view("<u2")[0:2 * C:2].astype(np.int64)
        shift = words[half + 2:half + 2 + 4 * C:4].astype(np.int64)
        kernel = i.kernel_y * i.kernel_x * i.blocks
        packed = stream[tile * kernel * steps * R * C // 2:][:kernel * steps * R * C // 2]
        nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(kernel, steps, R, C).astype(np.int64)
        signed = nibbles - (nibbles >> 3 << 4)
        weight = (nibbles[:, :, ::2] + 16 * signed[:, :, 1::2] if i.wide else signed).reshape(kernel, L, C)
        for oy in range(i.rows):
            for ox in range(i.columns):
                acc = bias.copy()
                for k in range(kernel):
                    ky, kx, block = k // i.blocks // i.kernel_x, k // i.blocks % i.kernel_x, k % i.blocks
                    y = i.window_y + oy * i.stride_y + ky * i.dilation_y
                    x = ox * i.stride_x + kx * i.dilation_x - i.pad_x
                    if 0 <= y < i.height and 0 <= x < i.width:
                        assert i.window_y <= y < i.window_y + i.ring
                        slot = i.anchor + (y - i.window_y)
                        slot -= i.ring if slot >= i.ring else 0
                        word = before[(i.source + block * i.plane + slot * i.pitch + x) % (1 << 16)]
                        acc += word.view(np.uint8 if i.unsigned else np.int8).astype(np.int64) @ weight[k]
                code = requantize(acc, mult, shift, i.low, i.high).astype(np.uint8)
                slot = i.target_anchor + oy * i.target_step_y
                slot -= i.target_ring if slot >= i.target_ring else 0
                position = i.target + slot * i.target_pitch + ox * i.target_step_x
                for d in range(config.max_writes):
                    descriptor = words[(parameters - 1) * L + 8 * d:][:8]
                    offset, group = int(descriptor[:2].view("<u2")[0]), int(descriptor[2])
                    mask = int(descriptor[4:].view("<u4")[0])
                    for c in range(C):
                        if mask >> c & 1:
                            pool[(position + offset) % (1 << 16), group * C + c] = code[c]


class Layout:
    """Random scratchpad contents, and instructions with their operands in its first half, targets in the second."""

    def __init__(self, config: EngineConfig, seed: int) -> None:
        self.config, self.next = config, 0
        self.rng = np.random.default_rng(seed)
        self.pool = self.rng.integers(0, 256, (config.pool_words, config.lanes), np.uint8)

    def take(self, words: int) -> int:
        first, self.next = self.next, self.next + words
        assert self.next <= self.config.pool_words // 2
        return first

    def matrix(self, height=8, width=8, kernel=1, stride=1, dilation=1, rows=0, columns=0, first_row=0, blocks=1,
               tiles=1, wide=0, unsigned=0, spare=0, writes=1, step=1, bounds=S8) -> Matrix:
        """An instruction for `rows` output rows from `first_row` of a padded convolution.

        The source is a ring of the rows needed and `spare` more, rotated at random, and so is the target.
        """
        config, rng = self.config, self.rng
        pad = dilation * (kernel - 1) // 2
        rows, columns = rows or -(-height // stride), columns or -(-width // stride)
        ring = (rows - 1) * stride + (kernel - 1) * dilation + 1 + spare
        pitch = width + int(rng.integers(4))
        plane = ring * pitch + int(rng.integers(4))
        weight_bytes = tiles * kernel * kernel * blocks * config.lanes * config.columns // 2 * (2 if wide else 1)
        target_ring = (rows + int(rng.integers(3))) * step
        target_pitch = columns * step + int(rng.integers(4))
        parameters = self.take(tiles * config.tile_parameter_words)
        for tile in range(tiles):
            self._parameters(parameters + tile * config.tile_parameter_words, writes, target_ring * target_pitch)
        return Matrix(
            tag=int(rng.integers(1 << 16)), wide=wide, tiles=tiles, blocks=blocks, unsigned=unsigned,
            source=self.take(blocks * plane), plane=plane, pitch=pitch, ring=ring, anchor=int(rng.integers(ring)),
            window_y=first_row * stride - pad, height=height, width=width, pad_x=pad, rows=rows, columns=columns,
            kernel_y=kernel, kernel_x=kernel, stride_y=stride, stride_x=stride, dilation_y=dilation,
            dilation_x=dilation, low=bounds[0], high=bounds[1], parameters=parameters,
            weights=self.take(weight_bytes // config.lanes), target=config.pool_words // 2,
            target_pitch=target_pitch, target_ring=target_ring,
            target_anchor=int(rng.integers(target_ring // step)) * step, target_step_y=step, target_step_x=step)

    def _parameters(self, first: int, writes: int, region: int) -> None:
        config, rng = self.config, self.rng
        C, L = config.columns, config.lanes
        words = self.pool[first:first + config.tile_parameter_words].reshape(-1)
        half = config.four_byte_words(C) * L
        words[:4 * C] = rng.integers(-1 << 14, 1 << 14, C).astype("<i4").view(np.uint8)
        words[half + 2:half + 2 + 4 * C:4] = rng.integers(20, 28, C)
        groups = L // C
        for d in range(config.max_writes):
            at = 2 * half + 8 * d
            offset = int(rng.integers(groups)) * region  # whole regions: all inside the pool
            used = d < writes
            mask = int(rng.integers(1, 1 << C)) if writes > 1 else (1 << C) - 1
            words[at:at + 2] = np.frombuffer(offset.to_bytes(2, "little"), np.uint8)
            words[at + 2] = rng.integers(groups)
            words[at + 4:at + 8] = np.frombuffer((mask * used).to_bytes(4, "little"), np.uint8)


def bits_of(instruction: Matrix):
    return layout_of(Matrix).from_bits(int.from_bytes(instruction.encode(), "little"))


def simulate(config: EngineConfig, pool: np.ndarray, program: list[Matrix], waits: Waits = NONE, limit: int = 30_000):
    """Runs `program` without pauses between instructions. Returns the pool, the write log and counters."""
    dut = MatrixUnit(config)
    memory = Memory(config)
    memory.words[:] = pool
    counts: dict[str, int] = {}
    unit = dut.unit
    done_at: list[int] = []

    async def drive(ctx) -> None:
        for instruction in program:
            await put(ctx, unit.instruction, bits_of(instruction))

    async def finish(ctx) -> None:
        while len(done_at) < len(program):
            await ctx.tick().until(unit.done)
            done_at.append(memory.cycle)

    sim = simulator(dut)
    sim.add_testbench(memory.serve([dut.activation, dut.weight], [dut.result], waits), background=True)
    sim.add_testbench(count_cycles(
        counts, busy=unit.busy, scratchpad=unit.stall_scratchpad, output=unit.stall_output), background=True)
    sim.add_testbench(drive)
    sim.add_testbench(finish)
    run(sim, limit)
    return memory, counts, done_at


def check(config: EngineConfig, layout: Layout, program: list[Matrix], waits: Waits = NONE):
    expected = layout.pool.copy()
    for instruction in program:
        execute(config, expected, instruction)
    memory, counts, done_at = simulate(config, layout.pool, program, waits)
    wrong = np.argwhere(memory.words != expected)
    assert not len(wrong), f"{len(wrong)} bytes differ, first at (word, lane) {wrong[:4].tolist()}"
    return memory, counts, done_at


def ideal(config: EngineConfig, i: Matrix) -> int:
    """Steps of an instruction."""
    groups = -(-i.rows * i.columns // config.pixels)
    return i.tiles * groups * i.kernel_y * i.kernel_x * i.blocks * config.steps_per_word * (1 + i.wide)


# One instruction each; all of a config run back to back in one program, with pauses and without.
CASES = {
    "pointwise on an 8x8 map": {},
    "3x3, padded, ring rotated": {"height": 5, "width": 6, "kernel": 3, "spare": 2},
    "3x3 stride 2, two blocks": {"height": 7, "width": 9, "kernel": 3, "stride": 2, "blocks": 2},
    "stride 4, last group partial": {"height": 9, "width": 27, "stride": 4, "unsigned": 1, "bounds": U8},
    "3x3 dilated by 2": {"height": 5, "width": 5, "kernel": 3, "dilation": 2},
    "strip in the middle of an image": {"height": 40, "width": 5, "kernel": 3, "rows": 2, "first_row": 17},
    "strip at the end of an image": {"height": 20, "width": 5, "kernel": 3, "rows": 3, "first_row": 17},
    "one pixel, many tiles": {"height": 1, "width": 1, "blocks": 2, "tiles": 7},
    "one column": {"height": 11, "width": 1, "tiles": 2},
    "wide, unsigned sources": {"height": 2, "width": 3, "wide": 1, "blocks": 3, "unsigned": 1, "tiles": 2},
    "wide 3x3": {"height": 4, "width": 4, "kernel": 3, "wide": 1},
    "four descriptors": {"height": 3, "width": 5, "writes": 4, "tiles": 3},
    "nothing to write": {"height": 3, "width": 3, "writes": 0, "tiles": 2},
    "2x upsampling": {"height": 4, "width": 5, "writes": 3, "step": 2},
    "relu": {"height": 2, "width": 7, "bounds": (0, 90)},
}


@pytest.mark.parametrize("chance", [0.0, 0.5])
def test_program(chance):
    layout = Layout(TEST, 1)
    program = [layout.matrix(**case) for case in CASES.values()]
    check(TEST, layout, program, Waits(7, chance))


@pytest.mark.parametrize("name", ["wide 3x3", "four descriptors", "stride 4, last group partial"])
def test_base(name):
    layout = Layout(BASE, 2)
    check(BASE, layout, [layout.matrix(**CASES[name])], Waits(3, 0.2))


@pytest.mark.parametrize("shape", [
    {"rows": 16, "columns": 2, "pixels": 2},  # P = steps per word: one source word in every cycle
    {"rows": 4, "columns": 16, "pixels": 1},  # a weight word per step, several bias words per tile
    {"rows": 32, "columns": 2, "pixels": 1},  # a step per word
    {"rows": 4, "columns": 8, "pixels": 8, "lanes": 64, "bank_words": 512},
])
def test_other_shapes(shape):
    config = replace(TEST, **shape)
    layout = Layout(config, 3)
    program = [layout.matrix(**CASES[name]) for name in
               ("one pixel, many tiles", "wide, unsigned sources", "four descriptors")]
    check(config, layout, program, Waits(4, 0.2))


@pytest.mark.parametrize("config", [TEST, BASE], ids=lambda config: config.name)
def test_full_throughput(config):
    """Two instructions back to back, of several tiles: no gap but the first fill and the last drain."""
    layout = Layout(config, 4)
    program = [layout.matrix(kernel=3, tiles=2, height=4), layout.matrix(blocks=3, tiles=4, height=5)]
    _, counts, done_at = check(config, layout, program)
    steps = sum(ideal(config, instruction) for instruction in program)
    assert done_at[-1] <= 1.03 * steps + 60
    assert counts["scratchpad"] <= 30 and counts["output"] == 0


def test_writes_bind():
    """Four writes for each of P results in P steps: the output takes one per cycle."""
    layout = Layout(BASE, 5)
    i = layout.matrix(writes=4)
    memory, counts, _ = check(BASE, layout, [i])
    assert len(memory.log) == 4 * i.rows * i.columns
    assert memory.log[-1].cycle - memory.log[0].cycle == len(memory.log) - 1
    assert {write.tag for write in memory.log} == {i.tag}
    assert counts["output"] > ideal(BASE, i)


@pytest.mark.parametrize("field", ["rows", "columns", "tiles", "blocks", "kernel_y", "kernel_x", "ring", "target_ring",
                                   "target_step_y", "target_step_x"])
def test_illegal(field):
    dut = MatrixUnit(TEST)
    illegal = replace(Layout(TEST, 1).matrix(), **{field: 0})

    async def drive(ctx) -> None:
        await put(ctx, dut.unit.instruction, bits_of(illegal))
        assert ctx.get(dut.unit.illegal)
        await ctx.tick()
        assert not ctx.get(dut.unit.illegal)
        for _ in range(20):
            assert not ctx.get(dut.activation.request.valid | dut.weight.request.valid | dut.unit.busy)
            await ctx.tick()

    sim = simulator(dut)
    sim.add_testbench(drive)
    run(sim)
