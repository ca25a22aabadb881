"""MatrixUnit against a direct transcription of the Matrix instruction's docstring."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.memory import Memory
from tests.kit.streams import NONE, Waits, count_cycles, put, run, simulator
from weft.arch.config import EngineConfig, load_config
from weft.arch.isa import DESCRIPTOR_FIELDS, SCALE_FIELDS, Matrix
from weft.arch.numerics import INT16, S8, U8, combine_scales, requantize
from weft.hw.layouts import layout_of
from weft.hw.matrix import MatrixUnit

TEST, BASE = load_config("test"), load_config("base")


def signed(data: np.ndarray, kind: str) -> np.ndarray:
    return np.ascontiguousarray(data).view(kind).astype(np.int64)


def scale_pairs(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """mult and shift of the 4-byte scales in `words`, bytes."""
    fields = np.ascontiguousarray(words).view(np.dtype(SCALE_FIELDS))
    return fields["mult"].astype(np.int64), fields["shift"].astype(np.int64)


def tile_weights(config: EngineConfig, pool: np.ndarray, i: Matrix, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights [word, lane, column] of a tile and their group scales [word, column], read as the ISA orders them."""
    C, L = config.columns, config.lanes
    count, size = i.kernel_y * i.kernel_x * i.blocks, config.weight_words(bool(i.wide))
    first = i.weights + tile * config.tile_words(count, bool(i.wide), bool(i.grouped))
    scale, weight = np.ones((count, C), np.int64), np.empty((count, L, C), np.int64)
    for k in range(count):
        if i.grouped:
            group = k % config.scaled_words
            if group == 0:
                scales, first = pool[first], first + 1
            scale[k] = scales[group * C:][:C]
        data, first = pool[first:first + size].reshape(-1, C), first + size  # R/2 of these rows are a step
        if i.wide:
            weight[k] = data.view(np.int8)
        else:
            weight[k, ::2], weight[k, 1::2] = (data << 4).view(np.int8) >> 4, data.view(np.int8) >> 4
    return weight, scale


def execute(config: EngineConfig, pool: np.ndarray, i: Matrix, held: np.ndarray | None = None):
    """The writes of `i`, as (address, mask, bytes of a lane group, tag), and its sums."""
    C, L = config.columns, config.lanes
    parameter_words = config.plain_parameter_words if i.plain else config.tile_parameter_words
    half = config.four_byte_words(C) * L
    pixels = np.array([(oy, ox) for oy in range(i.rows) for ox in range(i.columns)])
    words = np.zeros((i.kernel_y, i.kernel_x, i.blocks, len(pixels), L), np.uint8)
    for index, (oy, ox) in enumerate(pixels):
        for ky, kx in np.ndindex(i.kernel_y, i.kernel_x):
            y = i.window_y + oy * i.stride_y + ky * i.dilation_y
            x = ox * i.stride_x + kx * i.dilation_x - i.pad_x
            if 0 <= y < i.height and 0 <= x < i.width:
                assert i.window_y <= y < i.window_y + i.ring
                slot = i.anchor + (y - i.window_y)
                slot -= i.ring if slot >= i.ring else 0
                places = i.source + np.arange(i.blocks) * i.plane + slot * i.pitch + x
                words[ky, kx, :, index] = pool[places % (1 << 16)]
    source = signed(words, "u1" if i.unsigned else "i1").reshape(-1, len(pixels), L)
    slot = i.target_anchor + pixels[:, 0] * i.target_step_y
    slot -= np.where(slot >= i.target_ring, i.target_ring, 0)
    positions = i.target + slot * i.target_pitch + pixels[:, 1] * i.target_step_x
    log = []
    for tile in range(i.tiles):
        parameters = pool[i.parameters + tile * parameter_words:][:parameter_words].reshape(-1)
        bias = np.zeros(C, np.int64) if i.plain else signed(parameters[:4 * C], "<i4")
        weight, factor = tile_weights(config, pool, i, tile)
        acc = (held if i.resume else bias) + ((source @ weight) * factor[:, None]).sum(0)
        acc = signed(acc.astype(np.int32), "i4")  # wraps
        if i.hold:
            return [], acc
        scale = scale_pairs(parameters[0 if i.plain else half:][:4 * C])
        if i.scaled:
            places = i.scales + pixels[:, 0] * i.scales_pitch + pixels[:, 1]
            scale = combine_scales(*(part[:, None] for part in scale_pairs(pool[places, :4].reshape(-1))), *scale)
        code = requantize(acc, *scale, *(INT16 if i.double else (i.low, i.high)))
        writes = []  # offset, group, mask, right shift of the code
        if i.plain:
            plane, group = divmod(i.group + tile, L // C)
            writes = [(plane * i.target_plane + high * i.target_high, group, (1 << C) - 1, 8 * high)
                      for high in range(1 + i.double)]
        else:
            for d in parameters[2 * half:][:8 * config.max_writes].view(np.dtype(DESCRIPTOR_FIELDS)):
                if int(d["mask"]) & (1 << C) - 1:
                    writes.append((int(d["offset"]), int(d["group"]), int(d["mask"]) & (1 << C) - 1, 0))
        for position, row in zip(positions, code, strict=True):
            for offset, group, mask, shift in writes:
                log.append((int(position + offset) % (1 << 16), mask << group * C,
                            (row >> shift & 255).astype(np.uint8).tobytes(), i.tag))
    return log, acc


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
               tiles=1, wide=0, unsigned=0, spare=0, writes=1, step=1, bounds=S8, plain=0, grouped=0, scaled=0,
               double=0) -> Matrix:
        """An instruction for `rows` output rows from `first_row` of a padded convolution.

        The source is a ring of the rows needed and `spare` more, rotated at random, and so is the target.
        """
        config, rng = self.config, self.rng
        pad = dilation * (kernel - 1) // 2
        rows, columns = rows or -(-height // stride), columns or -(-width // stride)
        ring = (rows - 1) * stride + (kernel - 1) * dilation + 1 + spare
        pitch = width + int(rng.integers(4))
        plane = ring * pitch + int(rng.integers(4))
        target_ring = (rows + int(rng.integers(3))) * step
        target_pitch = columns * step + int(rng.integers(4))
        region = target_ring * target_pitch
        target_plane = region + int(rng.integers(4))
        parameter_words = config.plain_parameter_words if plain else config.tile_parameter_words
        parameters = self.take(tiles * parameter_words)
        scales_pitch = columns + int(rng.integers(4))
        scales = self.take(rows * scales_pitch if scaled else 0)
        self._scales(self.pool[scales:self.next, :4], 13, 18, odd=0.1)  # about 1, and any, to clip
        for first in range(parameters, parameters + tiles * parameter_words, parameter_words):
            words = self.pool[first:][:parameter_words].reshape(-1)
            shift = 20 + 7 * grouped + 4 * wide - 8 * double
            if not plain:
                words[:4 * config.columns] = (
                    rng.integers(-1 << 14, 1 << 14, config.columns) << 7 * grouped).astype("<i4").view(np.uint8)
                self._descriptors(words[(parameter_words - 1) * config.lanes:], writes, region)
                words = words[config.four_byte_words(config.columns) * config.lanes:]
            self._scales(words[:4 * config.columns].reshape(-1, 4), shift, shift + 8)
        return Matrix(
            tag=int(rng.integers(1 << 16)), wide=wide, tiles=tiles, blocks=blocks, unsigned=unsigned, plain=plain,
            grouped=grouped, scaled=scaled, double=double, scales=scales, scales_pitch=scales_pitch,
            source=self.take(blocks * plane), plane=plane, pitch=pitch, ring=ring, anchor=int(rng.integers(ring)),
            window_y=first_row * stride - pad, height=height, width=width, pad_x=pad, rows=rows, columns=columns,
            kernel_y=kernel, kernel_x=kernel, stride_y=stride, stride_x=stride, dilation_y=dilation,
            dilation_x=dilation, low=bounds[0], high=bounds[1], parameters=parameters,
            weights=self.take(tiles * config.tile_words(kernel * kernel * blocks, bool(wide), bool(grouped))),
            target=config.pool_words // 2, target_plane=target_plane,
            target_high=(1 + tiles * config.columns // config.lanes) * target_plane + int(rng.integers(4)),
            group=int(rng.integers(min(32, config.lanes // config.columns))),
            target_pitch=target_pitch, target_ring=target_ring,
            target_anchor=int(rng.integers(target_ring // step)) * step, target_step_y=step, target_step_x=step)

    def chain(self, parts: list[int], **shape) -> list[Matrix]:
        """One sum over the channel blocks of `parts`, an instruction each, of whatever else `shape` says."""
        return [replace(self.matrix(blocks=blocks, **shape), resume=int(index > 0), hold=int(index < len(parts) - 1))
                for index, blocks in enumerate(parts)]

    def _scales(self, words: np.ndarray, low: int, high: int, odd: float = 0.0) -> None:
        """Shifts in low .. high - 1 for scales, 4 bytes each, some of them odd ones. Any mult is right."""
        shifts = self.rng.integers(low, high, len(words))
        any_shift = self.rng.integers(0, 64, len(words))
        words[:, 2] = np.where(self.rng.random(len(words)) < odd, any_shift, shifts)

    def _descriptors(self, words: np.ndarray, writes: int, region: int) -> None:
        config, rng = self.config, self.rng
        for d in range(config.max_writes):
            descriptor = words[8 * d:][:8].view(np.dtype(DESCRIPTOR_FIELDS))
            mask = int(rng.integers(1, 1 << config.columns)) if writes > 1 else (1 << config.columns) - 1
            descriptor["offset"] = rng.integers(config.lanes // config.columns) * region  # whole regions: in the pool
            descriptor["group"] = rng.integers(config.lanes // config.columns)
            descriptor["mask"] = mask if d < writes else 0


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
    """Compares every write of `program`, and their order. Operands are never among the targets."""
    expected, held, written = [], None, []
    for instruction in program:
        log, held = execute(config, layout.pool, instruction, held)
        expected += log
        written.append(len(expected))
    memory, counts, done_at = simulate(config, layout.pool, program, waits)
    for index, (write, (address, mask, codes, tag)) in enumerate(zip(memory.log, expected, strict=False)):
        first = ((mask & -mask).bit_length() - 1) // config.columns * config.columns
        seen = (write.address, write.mask, write.data[first:first + config.columns], write.tag)
        assert seen == (address, mask, codes, tag), f"write {index} of {len(expected)}"
    assert len(memory.log) == len(expected)
    for count, cycle in zip(written, done_at, strict=True):
        assert not count or memory.log[count - 1].cycle < cycle
    return memory, counts, done_at


def ideal(config: EngineConfig, i: Matrix) -> int:
    """Steps of an instruction."""
    groups = -(-i.rows * i.columns // config.pixels)
    return i.tiles * groups * i.kernel_y * i.kernel_x * i.blocks * config.steps_per_word * (1 + i.wide)


LINEAR = {"plain": 1, "grouped": 1, "scaled": 1, "double": 1, "height": 1}  # a linear layer of a language model
KEYS = {"wide": 1, "scaled": 1, "plain": 1, "double": 1}  # scores: products with cached keys
VALUES = {"wide": 1, "scaled": 1, "plain": 1, "unsigned": 1}  # probabilities times cached values

# One instruction each; all of them run back to back in one program, with pauses and without.
CASES = {
    "pointwise on an 8x8 map": {},
    "grouped, a word of scales in part": {"grouped": 1, "height": 3, "width": 3, "blocks": 11},
    "3x3, padded, ring rotated": {"height": 4, "width": 5, "kernel": 3, "spare": 2},
    "3x3 stride 2, two blocks": {"height": 5, "width": 7, "kernel": 3, "stride": 2, "blocks": 2},
    "plain": {"plain": 1, "height": 3, "width": 3, "tiles": 9, "bounds": (-100, 90)},
    "stride 4, last group partial": {"height": 9, "width": 27, "stride": 4, "unsigned": 1, "bounds": U8},
    "linear": {**LINEAR, "width": 7, "blocks": 9, "tiles": 2},
    "3x3 dilated by 2": {"height": 4, "width": 4, "kernel": 3, "dilation": 2},
    "linear, one token": {**LINEAR, "width": 1, "blocks": 5, "tiles": 9},
    "strip in the middle of an image": {"height": 40, "width": 3, "kernel": 3, "rows": 2, "first_row": 17},
    "strip at the end of an image": {"height": 20, "width": 3, "kernel": 3, "rows": 3, "first_row": 17},
    "keys": {**KEYS, "height": 3, "width": 2, "blocks": 2, "tiles": 5},
    "one pixel, many tiles": {"height": 1, "width": 1, "blocks": 2, "tiles": 7},
    "scaled": {"scaled": 1, "height": 3, "width": 3, "tiles": 3, "writes": 2},
    "one column": {"height": 11, "width": 1, "tiles": 2},
    "double": {"plain": 1, "double": 1, "height": 3, "width": 3, "tiles": 2},
    "wide, unsigned sources": {"height": 2, "width": 3, "wide": 1, "blocks": 3, "unsigned": 1, "tiles": 2},
    "values": {**VALUES, "height": 3, "width": 2, "blocks": 3, "tiles": 2},
    "wide 3x3": {"height": 2, "width": 3, "kernel": 3, "wide": 1},
    "four descriptors": {"height": 3, "width": 5, "writes": 4, "tiles": 3},
    "grouped and wide": {"grouped": 1, "wide": 1, "height": 1, "width": 3, "blocks": 9, "tiles": 2},
    "nothing to write": {"height": 3, "width": 3, "writes": 0, "tiles": 2},
    "2x upsampling": {"height": 4, "width": 5, "writes": 3, "step": 2},
    "relu": {"height": 2, "width": 7, "bounds": (0, 90)},
    "grouped 3x3": {"grouped": 1, "height": 2, "width": 3, "kernel": 3, "blocks": 2, "tiles": 2, "unsigned": 1},
}
CHAINS = {  # sums over several instructions
    "token by token": ([5, 9, 1], {**LINEAR, "width": 1}),
    "one after the other": ([1, 1, 1], {"grouped": 1, "scaled": 1, "height": 1, "width": 2}),
    "pixels in rows": ([2, 1], {"height": 2, "width": 2, "writes": 2}),
}


class Stretches(Waits):
    """Pauses in every other stretch of calls."""

    calls = 0

    def now(self) -> bool:
        self.calls += 1
        return self.calls % 1500 < 750 and super().now()


def test_program():
    layout = Layout(TEST, 1)
    program = [layout.matrix(**case) for case in CASES.values()]
    for at, (parts, shape) in enumerate(CHAINS.values()):
        program[8 * at:8 * at] = layout.chain(parts, **shape)
    check(TEST, layout, program, Stretches(7, 0.5))


def test_greatest_sums():
    """Of a word, with every sign, times the greatest group scale."""
    layout = Layout(TEST, 8)
    program = [layout.matrix(height=1, width=2, tiles=1, wide=wide, unsigned=unsigned, grouped=1, plain=1, double=1)
               for wide in (0, 1) for unsigned in (0, 1) for _ in range(2)]
    for index, i in enumerate(program):
        layout.pool[i.source:][:i.columns] = [[255 if i.unsigned else 128], [127]]
        most = [127, 128] if i.wide else [0x77, 0x88]
        layout.pool[i.weights:][:1 + TEST.weight_words(bool(i.wide))] = most[index % 2]
        layout.pool[i.weights] = 255
    check(TEST, layout, program)


FLAGS = {name: st.integers(0, 1) for name in ("wide", "unsigned", "plain", "grouped", "scaled", "double")}
SHAPES = st.fixed_dictionaries({**FLAGS, "writes": st.integers(0, 3)})
SINGLE = st.builds(lambda shape, more: {**shape, **more}, SHAPES, st.fixed_dictionaries({
    "height": st.integers(1, 3), "width": st.integers(1, 3), "blocks": st.integers(1, 3), "tiles": st.integers(1, 3)}))
CHAIN = st.tuples(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.builds(
    lambda shape, size: {**shape, **dict(zip(("height", "width"), size, strict=True))}, SHAPES,
    st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (3, 1)])))


@settings(max_examples=4, deadline=None, database=None)
@given(st.lists(st.one_of(SINGLE, CHAIN), min_size=8, max_size=8), st.integers(0, 1000))
def test_any_mixture(items, seed):
    layout = Layout(TEST, seed)
    program = []
    for item in items:
        parts, shape = item if isinstance(item, tuple) else (None, item)
        shape = {**shape, "double": shape["double"] & shape["plain"]}
        program += layout.chain(parts, **shape) if parts else [layout.matrix(**shape)]
    check(TEST, layout, program, Waits(seed, 0.3))


def test_base():
    layout = Layout(BASE, 2)
    names = ["wide 3x3", "linear", "four descriptors", "keys", "stride 4, last group partial", "values"]
    program = [layout.matrix(**CASES[name]) for name in names] + layout.chain([2, 5], **LINEAR, width=8)
    check(BASE, layout, program, Waits(3, 0.2))


@pytest.mark.parametrize("shape", [
    {"rows": 16, "columns": 2, "pixels": 2},  # P = steps per word: one source word in every cycle
    {"rows": 4, "columns": 16, "pixels": 1},  # a weight word per step, several bias words per tile
    {"rows": 32, "columns": 2, "pixels": 1},  # a step per word
    {"rows": 2, "columns": 32, "pixels": 1, "row_lanes": 2},  # a lane group per word, a word of group scales per word
    {"rows": 4, "columns": 8, "pixels": 8, "lanes": 64, "bank_words": 512},
])
def test_other_shapes(shape):
    config = replace(TEST, **shape)
    layout = Layout(config, 3)
    program = [layout.matrix(height=1, width=1, blocks=2, tiles=3), layout.matrix(**LINEAR, width=3, blocks=3),
               layout.matrix(height=1, width=3, wide=1, unsigned=1), *layout.chain([2, 1], **LINEAR, width=1),
               layout.matrix(height=2, width=2, writes=4, tiles=2), layout.matrix(**KEYS, height=1, width=2)]
    check(config, layout, program, Waits(4, 0.2))


@pytest.mark.parametrize("config", [TEST, BASE], ids=lambda config: config.name)
def test_full_throughput(config):
    """Instructions of all kinds back to back: no gap but the first fill and the last drain."""
    P = config.pixels
    layout = Layout(config, 4)
    program = [layout.matrix(kernel=3, height=4, width=P), layout.matrix(blocks=3, tiles=3, height=3, width=P),
               layout.matrix(**LINEAR, width=P, blocks=6, tiles=3), layout.matrix(**LINEAR, width=1, blocks=6, tiles=3),
               *layout.chain([3, 2, 4], **LINEAR, width=P), layout.matrix(**KEYS, height=2, width=P, blocks=2, tiles=2),
               layout.matrix(height=1, width=P, tiles=2)]
    _, counts, done_at = check(config, layout, program)
    steps = sum(ideal(config, instruction) for instruction in program)
    assert done_at[-1] <= steps + 2 * P + 35
    assert counts["scratchpad"] <= 20 and counts["output"] == 0


@pytest.mark.parametrize("tokens", [1, BASE.pixels])
def test_linear_throughput(tokens):
    """A layer of a language model takes its steps, and as long for one token as for P of them."""
    layout = Layout(BASE, 5)
    i = layout.matrix(**LINEAR, width=tokens, blocks=13, tiles=4)
    memory, counts, done_at = check(BASE, layout, [i])
    assert done_at[0] <= ideal(BASE, i) + 2 * BASE.pixels + 35
    assert counts["scratchpad"] <= 20
    weights = i.tiles * (BASE.tile_words(i.blocks, grouped=True) + BASE.plain_parameter_words)
    assert memory.reads == weights + i.tiles * tokens * (i.blocks + 1)  # of each live pixel, its words and its scale


def test_writes_bind():
    """Four writes for each of P results in P steps: the output takes one per cycle."""
    layout = Layout(BASE, 5)
    i = layout.matrix(writes=4)
    memory, counts, _ = check(BASE, layout, [i])
    assert len(memory.log) == 4 * i.rows * i.columns
    assert memory.log[-1].cycle - memory.log[0].cycle == len(memory.log) - 1
    assert {write.tag for write in memory.log} == {i.tag}
    assert counts["output"] > ideal(BASE, i)


ILLEGAL = [
    *({name: 0} for name in ("rows", "columns", "tiles", "blocks", "kernel_y", "kernel_x", "ring", "target_ring",
                             "target_step_y", "target_step_x")),
    {"target_step_y": 3},
    {"target_step_x": 3},
    {"double": 1},
    {"plain": 1, "group": TEST.lanes // TEST.columns},
    *({name: 1, "rows": rows, "columns": columns, "tiles": tiles} for name in ("hold", "resume")
      for rows, columns, tiles in ((1, 1, 2), (1, 5, 1), (5, 1, 1), (2, 3, 1), (1, 2049, 1), (2050, 2, 1),
                                   (4, 4, 1))),
]


def test_illegal():
    """Illegal instructions are refused without any work; what follows is not disturbed."""
    dut = MatrixUnit(TEST)
    legal = Layout(TEST, 1).matrix()

    async def drive(ctx) -> None:
        for change in ILLEGAL:
            await put(ctx, dut.unit.instruction, bits_of(replace(legal, **change)))
            assert ctx.get(dut.unit.illegal), change
            await ctx.tick()
            assert not ctx.get(dut.unit.illegal)
            for _ in range(8):
                assert not ctx.get(dut.activation.request.valid | dut.weight.request.valid | dut.unit.busy), change
                await ctx.tick()
        await put(ctx, dut.unit.instruction, bits_of(replace(legal, rows=2, columns=2, hold=1)))
        assert not ctx.get(dut.unit.illegal)
        await ctx.tick().until(dut.activation.request.valid)

    sim = simulator(dut)
    sim.add_testbench(drive)
    run(sim)
