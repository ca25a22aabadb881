"""Every instruction against the loop nests of arch.isa, written out here one scalar at a time."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.arch import numerics
from weft.arch.config import EngineConfig, load_config
from weft.arch.errors import EngineFault
from weft.arch.isa import Barrier, End, Load, Matrix, Sampling, Store, Unit, Vector, VectorOp
from weft.sim.machine import Machine

TEST = load_config("test")
# 65536 words: address sums may pass 2**16 and stay legal.
CONFIGS = [replace(TEST, name=f"{r}x{c}", rows=r, columns=c, row_lanes=n, bank_words=8192)
           for r, c, n in ((4, 4, 4), (2, 2, 4), (2, 32, 2))]
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
MOD = 1 << 16


# The literal machine


def wrap(slot: int, ring: int) -> int:
    return slot - ring if slot >= ring else slot


def signed(byte: int) -> int:
    return int(byte) - 256 if byte >= 128 else int(byte)


def int32(raw) -> int:
    return int.from_bytes(bytes(raw), "little", signed=True)


class Literal:
    """Executes an instruction exactly as its docstring reads. `writes` lists (address, {lane: byte})."""

    def __init__(self, config: EngineConfig, pool: np.ndarray, memory: np.ndarray, segments: list[int]) -> None:
        self.config, self.pool, self.memory, self.segments = config, pool.copy(), memory.copy(), segments
        self.writes: list[tuple[int, dict[int, int]]] = []
        self.results: list[list[int]] = []  # codes in loop order

    def write(self, address: int, lanes: dict[int, int]) -> None:
        address %= MOD
        for lane, code in lanes.items():
            self.pool[address][lane] = code & 255
        self.writes.append((address, {lane: code & 255 for lane, code in lanes.items()}))

    def stream(self, first: int, byte: int) -> int:
        size = self.config.lanes
        return int(self.pool[(first + byte // size) % MOD][byte % size])

    def stream_bytes(self, first: int, byte: int, count: int) -> list[int]:
        return [self.stream(first, byte + k) for k in range(count)]

    def scale(self, first: int, count: int, c: int) -> tuple[int, int, int]:
        """Bias, mult, shift of channel c in parameters that start at word `first`."""
        words = -(-4 * count // self.config.lanes)
        bias = int32(self.stream_bytes(first, 4 * c, 4))
        low, high, shift, _ = self.stream_bytes(first + words, 4 * c, 4)
        return bias, low | high << 8, shift

    def source(self, i, block: int, y: int, x: int, step: int = 0, outside: int = 0) -> list[int]:
        held = i.window_y <= y < i.window_y + i.ring
        if not (0 <= y < i.height and 0 <= x < i.width and held):
            return [outside] * self.config.lanes
        slot = wrap(i.anchor + (y - i.window_y), i.ring)
        word = self.pool[(i.source + block * i.plane + slot * i.pitch + x + step) % MOD]
        return [int(v) if i.unsigned else signed(v) for v in word]

    def load(self, i: Load) -> None:
        size = self.config.lanes
        for p in range(i.planes):
            for r in range(i.rows):
                for w in range(i.run):
                    start = self.segments[i.base] + i.offset + p * i.plane_bytes + r * i.row_bytes + w * size
                    word = {lane: int(self.memory[start + lane]) for lane in range(size)}
                    self.write(i.address + p * i.plane_words + r * i.row_words + w, word)

    def store(self, i: Store) -> None:
        size = self.config.lanes
        for p in range(i.planes):
            for r in range(i.rows):
                for w in range(i.run):
                    start = self.segments[i.base] + i.offset + p * i.plane_bytes + r * i.row_bytes + w * size
                    word = self.pool[(i.address + p * i.plane_words + r * i.row_words + w) % MOD]
                    for lane in range(size):
                        if i.mask >> (lane - i.rotate) % size & 1:
                            self.memory[start + lane] = word[lane]

    def weight(self, i: Matrix, tile: int, word: int, lane: int, c: int) -> int:
        """Weight of input lane `lane` in the `word`-th word of a tile and output column c, times its factor."""
        config = self.config
        rows, columns, size = config.rows, config.columns, config.rows * config.columns // 2
        per_step = rows // 2 if i.wide else rows
        own, together = columns if i.wide else columns // 2, config.lanes // columns
        words = i.kernel_y * i.kernel_x * i.blocks
        first = i.weights + tile * (words * own + i.grouped * -(-words // together))
        group, member = divmod(word, together)
        factor = self.stream(first + group * (1 + together * own), member * columns + c) if i.grouped else 1
        first += word * own + i.grouped * (group + 1)
        step, within = divmod(lane, per_step)
        if i.wide:
            return factor * signed(self.stream(first, step * size + within * columns + c))
        value = self.stream(first, step * size + within // 2 * columns + c) >> 4 * (within % 2) & 15
        return factor * (value - 16 * (value >> 3))

    def matrix(self, i: Matrix) -> None:
        config = self.config
        weights: dict[tuple[int, int], list[int]] = {}
        for tile in range(i.tiles):
            first = i.parameters + tile * (config.plain_parameter_words if i.plain else config.tile_parameter_words)
            for oy in range(i.rows):
                for ox in range(i.columns):
                    codes = []
                    for c in range(config.columns):
                        if i.plain:
                            low, high, shift, _ = self.stream_bytes(first, 4 * c, 4)
                            acc, mult = 0, low | high << 8
                        else:
                            acc, mult, shift = self.scale(first, config.columns, c)
                        if i.scaled:
                            low, high, own, _ = self.stream_bytes(i.scales + oy * i.scales_pitch + ox, 0, 4)
                            mult, shift = map(int, numerics.combine_scales(
                                *map(np.int64, (low | high << 8, own, mult, shift))))
                        for ky in range(i.kernel_y):
                            for kx in range(i.kernel_x):
                                for block in range(i.blocks):
                                    y = i.window_y + oy * i.stride_y + ky * i.dilation_y
                                    x = ox * i.stride_x + kx * i.dilation_x - i.pad_x
                                    word = (ky * i.kernel_x + kx) * i.blocks + block
                                    key = tile * i.kernel_y * i.kernel_x * i.blocks + word, c
                                    if key not in weights:
                                        weights[key] = [self.weight(i, tile, word, k, c) for k in range(config.lanes)]
                                    acc += sum(a * w for a, w in
                                               zip(self.source(i, block, y, x), weights[key], strict=True))
                        least, most = (-(1 << 15), (1 << 15) - 1) if i.double else (i.low, i.high)
                        codes.append(max(least, min(most, round(Fraction(acc * mult, 1 << shift)))))
                    self.results.append(codes)
                    position = i.target + wrap(i.target_anchor + oy * i.target_step_y, i.target_ring) * i.target_pitch
                    position += ox * i.target_step_x
                    if i.plain:
                        self.write_plain(i, position, tile, codes)
                    else:
                        self.write_described(position, first + config.tile_parameter_words - 1, codes)

    def write_plain(self, i: Matrix, position: int, tile: int, codes: list[int]) -> None:
        word, group = divmod(i.group + tile, self.config.lanes // self.config.columns)
        for part in range(1 + i.double):
            self.write(position + word * i.target_plane + part * i.target_high,
                       {group * self.config.columns + c: code >> 8 * part for c, code in enumerate(codes)})

    def write_described(self, position: int, descriptors: int, codes: list[int]) -> None:
        for d in range(4):
            raw = self.stream_bytes(descriptors, 8 * d, 8)
            offset, group, mask = raw[0] | raw[1] << 8, raw[2], int.from_bytes(bytes(raw[4:]), "little")
            if mask:
                self.write(position + offset, {group * self.config.columns + c: code
                                               for c, code in enumerate(codes) if mask >> c & 1})

    def sample(self, i: Vector, block: int, oy: int, ox: int, ky: int, kx: int) -> list[int]:
        step, tap = i.tap_step * kx, ky * i.kernel_x + kx
        outside = (0 if i.unsigned else -128) if i.operation == VectorOp.MAXIMUM else 0
        x = ox * i.stride_x + kx * i.dilation_x - i.pad_x
        if i.sampling == Sampling.GRID:
            return self.source(i, block, i.window_y + oy * i.stride_y + ky * i.dilation_y, x, step, outside)
        offset_slot = wrap(i.offset_anchor + oy, i.offset_ring)
        offsets = [signed(v) for v in self.pool[(i.offsets + offset_slot * i.offset_pitch + ox) % MOD]]
        if i.sampling == Sampling.SQUARE:
            s, centre_y = offsets[0], i.grid_y + i.kernel_y // 2
            y = centre_y + oy * i.stride_y + s * (ky - i.kernel_y // 2)
            x = ox * i.stride_x - i.pad_x + i.kernel_x // 2 + s * (kx - i.kernel_x // 2)
            return self.source(i, block, y, x, step)
        y_exact = i.grid_y + oy * i.stride_y + ky * i.dilation_y + Fraction(offsets[2 * tap], 1 << i.fraction)
        x_exact = x + Fraction(offsets[2 * tap + 1], 1 << i.fraction)
        y0, x0 = y_exact.numerator // y_exact.denominator, x_exact.numerator // x_exact.denominator
        total = [Fraction(0)] * self.config.lanes
        for yy, weight_y in ((y0, 1 - (y_exact - y0)), (y0 + 1, y_exact - y0)):
            for xx, weight_x in ((x0, 1 - (x_exact - x0)), (x0 + 1, x_exact - x0)):
                codes = self.source(i, block, yy, xx, step)
                total = [t + weight_y * weight_x * v for t, v in zip(total, codes, strict=True)]
        return [round(t) for t in total]

    def vector(self, i: Vector) -> None:
        config = self.config
        lanes, taps = config.lanes, i.kernel_y * i.kernel_x
        for block in range(i.blocks):
            first = i.parameters + block * (config.block_parameter_words + taps)
            for oy in range(i.rows):
                for ox in range(i.columns):
                    position = i.target + block * i.target_plane + ox * i.target_step_x
                    position += wrap(i.target_anchor + oy * i.target_step_y, i.target_ring) * i.target_pitch
                    if i.operation == VectorOp.PACK:
                        self.finish(position, self.packed(i, oy, ox))
                        continue
                    samples = [self.sample(i, block, oy, ox, ky, kx) for ky in range(i.kernel_y)
                               for kx in range(i.kernel_x)]
                    if i.operation == VectorOp.COLUMNS:
                        for tap, sample in enumerate(samples):
                            self.finish(position + tap * i.target_tap, sample)
                    elif i.operation == VectorOp.MAXIMUM:
                        self.finish(position, [max(column) for column in zip(*samples, strict=True)])
                    else:
                        codes = []
                        for lane in range(lanes):
                            acc, mult, shift = self.scale(first, lanes, lane)
                            for tap, sample in enumerate(samples):
                                word = first + config.block_parameter_words + tap
                                acc += sample[lane] * signed(self.stream(word, lane))
                            codes.append(max(i.low, min(i.high, round(Fraction(acc * mult, 1 << shift)))))
                        self.finish(position, codes)

    def packed(self, i: Vector, oy: int, ox: int) -> list[int]:
        word = [0] * self.config.lanes
        for tap in range(i.kernel_y):
            y = i.window_y + oy * i.stride_y + tap * i.dilation_y
            for k in range(i.pack_bytes):
                if 0 <= y < i.height:
                    row = i.source + wrap(i.anchor + (y - i.window_y), i.ring) * i.pitch
                    byte = self.stream(row, ox * i.pack_stride + k)
                    word[tap * i.pack_bytes + k] = byte if i.unsigned else signed(byte)
        return word

    def finish(self, position: int, codes: list[int]) -> None:
        self.results.append(codes)
        self.write(position, dict(enumerate(codes)))


# Comparison


def check(config: EngineConfig, pool: np.ndarray, i, memory=None, segments=()) -> None:
    """Machine and literal loops leave the same scratchpad and memory, log the same writes, report the same codes."""
    memory = np.zeros(0, np.uint8) if memory is None else memory
    literal = Literal(config, pool, memory, list(segments))
    {Load: literal.load, Store: literal.store, Matrix: literal.matrix, Vector: literal.vector}[type(i)](i)
    seen = []
    for trace in (True, False):
        machine = Machine(config, memory.copy(), segments, trace, lambda *result: seen.append(result))
        machine.pool[:] = pool
        log = machine.step(7, i)
        assert np.array_equal(machine.pool, literal.pool)
        assert np.array_equal(machine.memory, literal.memory)
        assert (log is not None) == (trace and not isinstance(i, Store))
        if log is not None:
            assert log.address.dtype == np.uint16 and log.tag.dtype == np.uint16 and log.data.dtype == np.uint8
            assert log.mask.dtype == bool and log.cycle.dtype == np.uint64 and (log.tag == i.tag).all()
            got = [(int(a), {int(k): int(d[k]) for k in np.flatnonzero(m)})
                   for a, m, d in zip(log.address, log.mask, log.data, strict=True)]
            assert got == literal.writes
    if isinstance(i, Matrix | Vector):
        index, instruction, codes = seen[0]
        assert (index, instruction) == (7, i)
        want = np.array(literal.results)
        if isinstance(i, Matrix):
            want = want.reshape(i.tiles, i.rows, i.columns, -1).transpose(1, 2, 0, 3).reshape(i.rows, i.columns, -1)
        else:
            want = want.reshape(i.blocks, i.rows, i.columns, -1, config.lanes).transpose(1, 2, 3, 0, 4)
            taps = () if i.operation != VectorOp.COLUMNS else (i.kernel_y * i.kernel_x,)
            want = want.reshape(i.rows, i.columns, *taps, -1)
        assert np.array_equal(codes, want)


def random_pool(config: EngineConfig, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (config.pool_words, config.lanes), np.uint8)


def put(pool: np.ndarray, address: int, raw: bytes) -> None:
    """Writes bytes from word `address` on, modulo 2**16, zero filled to whole words."""
    lanes = pool.shape[1]
    words = np.frombuffer(raw + bytes(-len(raw) % lanes), np.uint8).reshape(-1, lanes)
    pool[(address + np.arange(len(words))) % MOD] = words


def scale_bytes(config: EngineConfig, rng: np.random.Generator, count: int, shift: int) -> bytes:
    """Bias and scale words of `count` channels; results spread over the code range for sums of about 2**shift/2**8."""
    size = config.four_byte_words(count) * config.lanes
    bias = rng.integers(-2000, 2000, count, np.int32).tobytes()
    scale = rng.integers(0, 1 << 16, count, np.uint32) | (shift + rng.integers(0, 3, count, np.uint32)) << 16
    scale |= rng.integers(0, 256, count, np.uint32) << 24  # the unused byte
    return bias.ljust(size, b"\0") + scale.astype("<u4").tobytes().ljust(size, b"\0")


small = st.integers(1, 3)


@st.composite
def windows(draw) -> dict[str, int]:
    """Legal window and target fields of a small compute instruction, at any place of the 16-bit address space."""
    kernel_y, kernel_x, rows, columns = draw(small), draw(small), draw(small), draw(small)
    stride_y, stride_x = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    dilation_y, dilation_x = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    ring = (rows - 1) * stride_y + (kernel_y - 1) * dilation_y + 1 + draw(st.integers(0, 3))
    step_y, step_x = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    target_ring = step_y * (rows + draw(st.integers(0, 2)))
    unsigned, wide_range = draw(st.integers(0, 1)), draw(st.booleans())
    low, high = draw(st.sampled_from([(0, 255), (-128, 127), (0, 100), (-7, 8)])) if wide_range else (-128, 127)
    return {
        "source": draw(st.sampled_from([0, 1000, MOD - 5])), "plane": draw(st.integers(0, 200)),
        "pitch": draw(st.integers(0, 12)), "ring": ring, "anchor": draw(st.integers(0, ring - 1)),
        "window_y": draw(st.integers(-4, 4)), "height": draw(st.integers(1, 9)), "width": draw(st.integers(1, 9)),
        "kernel_y": kernel_y, "kernel_x": kernel_x, "stride_y": stride_y, "stride_x": stride_x,
        "dilation_y": dilation_y, "dilation_x": dilation_x, "pad_x": draw(st.integers(0, 3)),
        "rows": rows, "columns": columns, "blocks": draw(st.integers(1, 2)), "unsigned": unsigned,
        "low": low, "high": high, "parameters": 20000, "target": draw(st.sampled_from([40000, 50001])),
        "target_pitch": draw(st.sampled_from([6, 9])), "target_ring": target_ring,
        "target_anchor": draw(st.integers(0, target_ring // step_y - 1)) * step_y,
        "target_step_y": step_y, "target_step_x": step_x, "tag": draw(st.integers(0, MOD - 1)),
    }


@SETTINGS
@given(windows(), st.sampled_from(CONFIGS), st.integers(1, 2), st.integers(0, 1), st.integers(0, 2**32 - 1))
def test_matrix_equals_the_loop_nest(window, config, tiles, wide, seed):
    rng = np.random.default_rng(seed)
    if config.columns == 32:
        window |= {"rows": 1, "columns": 2, "target_ring": 2, "target_anchor": 0}  # the slow loops have many channels
    pool = random_pool(config, rng)
    parts = []
    for _ in range(tiles):
        descriptors = b"".join(
            int(rng.choice([0, 100, 777, MOD - 300])).to_bytes(2, "little")
            + bytes([rng.integers(config.lanes // config.columns), rng.integers(256)])
            + int(rng.integers(1 << config.columns) * rng.integers(2)).to_bytes(4, "little")
            for _ in range(4))
        parts.append(scale_bytes(config, rng, config.columns, 26).ljust((config.tile_parameter_words - 1) * 32, b"\0")
                     + descriptors.ljust(32, b"\0"))
    put(pool, window["parameters"], b"".join(parts))
    check(config, pool, Matrix(**window, weights=30000, tiles=tiles, wide=wide))


@SETTINGS
@given(windows(), st.sampled_from(CONFIGS), st.integers(1, 5), *[st.integers(0, 1)] * 4, st.integers(0, 2**32 - 1))
def test_matrix_modes_equal_the_loop_nest(window, config, tiles, plain, wide, grouped, scaled, seed):
    """Factors of words, scales of pixels, results to successive lanes, also of 16 bits."""
    rng = np.random.default_rng(seed)
    tiles = tiles if config.columns == 2 else min(tiles, 2)
    if config.columns == 32:
        window |= {"rows": 1, "columns": 2, "target_ring": 2, "target_anchor": 0}
    pool, double, shift = random_pool(config, rng), int(plain and rng.integers(2)), 26 + 6 * grouped + 4 * wide
    parts, words = [], config.four_byte_words(config.columns)
    for _ in range(tiles):
        raw = scale_bytes(config, rng, config.columns, shift - 8 * double)
        descriptors = b"".join(bytes([rng.integers(256), 0, group, 0, 1, 0, 0, 0])
                               for group in rng.integers(0, config.lanes // config.columns, 3))
        parts.append(raw[words * 32 :] if plain else raw + descriptors.ljust(32, b"\0"))
    put(pool, window["parameters"], b"".join(parts))
    scales = rng.integers(1 << 14, 1 << 16, 64, np.uint32) | rng.integers(13, 18, 64, np.uint32) << 16
    for number, scale in enumerate(scales):
        put(pool, 10000 + number, scale.astype("<u4").tobytes() + bytes(rng.integers(0, 256, 28, np.uint8)))
    check(config, pool, Matrix(
        **window, weights=30000, tiles=tiles, wide=wide, plain=plain, grouped=grouped, scaled=scaled, double=double,
        scales=10000, scales_pitch=int(rng.integers(12)), target_plane=int(rng.choice([300, MOD - 400])),
        target_high=1000, group=int(rng.integers(config.lanes // config.columns))))


@pytest.mark.parametrize("plain", [0, 1])
def test_held_sums_go_on_where_they_stopped(plain):
    """A sum cut into three equals the uncut one, also where a partial sum leaves 32 bits."""
    config, rng = CONFIGS[0], np.random.default_rng(plain)
    pool = random_pool(config, rng)
    shared = {"kernel_y": 1, "kernel_x": 1, "rows": 2, "columns": 2, "stride_x": 1, "stride_y": 1, "width": 2,
              "height": 2, "pitch": 2, "ring": 2, "plane": 4, "target": 5000, "target_pitch": 2, "target_ring": 2,
              "target_step_y": 1, "target_step_x": 1, "tiles": 1, "parameters": 300, "low": -128, "high": 127,
              "plain": plain, "double": plain, "target_high": 10, "grouped": 1, "scaled": 1, "scales": 400,
              "scales_pitch": 2}
    raw = scale_bytes(config, rng, config.columns, 27)
    put(pool, 300, raw[32:] if plain else raw + bytes([7, 0, 1, 0, 15, 0, 0, 0]))
    put(pool, 400, b"".join((40000 | 16 << 16).to_bytes(4, "little").ljust(32) for _ in range(4)))
    whole = Matrix(**shared, blocks=24, weights=1000, source=0)
    check(config, pool, whole)
    expected, machine, seen = Machine(config, trace=True), Machine(config, trace=True), []
    expected.pool[:] = machine.pool[:] = pool
    log = expected.step(0, whole)
    machine.on_result = lambda *result: seen.append(result)
    own = 8 * (config.columns // 2) + 1  # words of weights of eight blocks
    for part in range(3):
        got = machine.step(part, Matrix(**shared, blocks=8, weights=1000 + own * part, source=32 * part,
                                        hold=int(part < 2), resume=int(part > 0)))
        assert len(got) == (0 if part < 2 else len(log)) and len(seen) == (part == 2)
    assert np.array_equal(machine.pool, expected.pool) and np.array_equal(got.data, log.data)


def test_held_sums_may_leave_32_bits_and_come_back():
    config = replace(TEST, bank_words=8192)
    machine = Machine(config)
    machine.pool[:1023] = 255
    machine.pool[4000 : 4000 + 128 * 17] = 0x77
    machine.pool[4000 : 4000 + 128 * 17 : 17] = 30  # factors
    i = plain(Matrix, source=0, blocks=1023, plane=1, unsigned=1, plain=1, grouped=1, parameters=3000, weights=4000)
    machine.pool[3000].view("<u4")[:4] = 1 | 25 << 16
    for _ in range(2):
        machine.step(0, replace(i, hold=1, resume=int(machine.held is not None)))
    half = 7 * 30 * 255 * 32 * 1023
    assert machine.held.max() == 2 * half > 1 << 31
    machine.pool[4000 : 4000 + 128 * 17] = 0x99  # weights of -7
    machine.pool[4000 : 4000 + 128 * 17 : 17] = 30
    machine.step(1, replace(i, resume=1))
    assert machine.held is None and (machine.pool[200].view(np.int8)[:4] == round(Fraction(half, 1 << 25))).all()


SAMPLINGS = [(op, s) for op in VectorOp for s in Sampling
             if s == Sampling.GRID or op in (VectorOp.MULTIPLY, VectorOp.COLUMNS)]


@pytest.mark.parametrize("operation, sampling", SAMPLINGS)
@settings(SETTINGS, max_examples=25)
@given(window=windows(), data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_vector_equals_the_loop_nest(operation, sampling, window, data, seed):
    config, rng = CONFIGS[0], np.random.default_rng(seed)
    pool = random_pool(config, rng)
    rows, ring = window["rows"], window["rows"] + data.draw(st.integers(0, 2))
    extra = {
        "tap_step": data.draw(st.sampled_from([0, 0, 300, MOD - 100])),
        "target_plane": 500, "target_tap": data.draw(st.sampled_from([60, 1000])),
        "offsets": data.draw(st.sampled_from([10000, MOD - 2])), "offset_pitch": 7, "offset_ring": ring,
        "offset_anchor": data.draw(st.integers(0, ring - 1)), "fraction": data.draw(st.integers(0, 4)),
        "grid_y": window["window_y"] + data.draw(st.integers(-1, 3)),
    }
    if operation == VectorOp.PACK:
        window |= {"kernel_x": 1, "blocks": 1, "pitch": 3}
        extra |= {"pack_bytes": data.draw(st.integers(1, 10)), "pack_stride": data.draw(st.integers(1, 40))}
    if sampling != Sampling.GRID:
        # Small codes keep the samples near the image, and the far ones outside it.
        reach = data.draw(st.sampled_from([3, 128]))
        for r in range(rows + 3):
            put(pool, extra["offsets"] + r * 7, rng.integers(-reach, reach, 7 * config.lanes).astype(np.int8).tobytes())
    taps = window["kernel_y"] * window["kernel_x"]
    put(pool, window["parameters"], b"".join(
        scale_bytes(config, rng, config.lanes, 24) + rng.integers(0, 256, taps * config.lanes, np.uint8).tobytes()
        for _ in range(window["blocks"])))
    i = Vector(**window, **extra, operation=operation, sampling=sampling)
    check(config, pool, i)


TRANSFERS = [
    {"run": 1, "rows": 1, "planes": 1},
    {"run": 5, "rows": 3, "planes": 2, "row_words": 7, "plane_words": 40, "row_bytes": 256, "plane_bytes": 1024},
    {"run": 2, "rows": 3, "planes": 2, "row_words": MOD - 4, "plane_words": 11, "row_bytes": 0, "plane_bytes": 32},
    {"run": 4, "rows": 4, "planes": 1, "row_words": 2, "row_bytes": 64},  # runs overlap: the last write stays
]


@pytest.mark.parametrize("shape", TRANSFERS)
@pytest.mark.parametrize("address", [0, 300, MOD - 3])
def test_load_and_store_equal_the_loop_nest(shape, address):
    config, rng = CONFIGS[0], np.random.default_rng(address)
    pool, memory = random_pool(config, rng), rng.integers(0, 256, 8192 + 5, np.uint8)
    fields = {"address": address, "base": 1, "offset": 96, "tag": 5} | shape
    check(config, pool, Load(**fields), memory, [0, 1024])
    for mask, rotate in (((1 << 32) - 1, 0), (0, 3), (0x80F0_1234, 0), (0x80F0_1234, 1), (0xF, 31)):
        check(config, pool, Store(**fields, mask=mask, rotate=rotate), memory, [0, 1024])


def plain(cls=Vector, **fields):
    """A legal 1x1 instruction that copies one word, with some fields replaced."""
    base = {"ring": 1, "height": 1, "width": 1, "pitch": 1, "kernel_y": 1, "kernel_x": 1, "rows": 1, "columns": 1,
            "blocks": 1, "parameters": 100, "source": 10, "target": 200, "target_ring": 1, "target_step_y": 1,
            "target_step_x": 1, "low": -128, "high": 127}
    special = {"operation": VectorOp.MAXIMUM} if cls is Vector else {"tiles": 1, "weights": 500}
    return cls(**(base | special | fields))


def test_addition_in_place_reads_before_it_writes():
    config = CONFIGS[0]
    pool = random_pool(config, np.random.default_rng(1))
    put(pool, 100, scale_bytes(config, np.random.default_rng(2), 32, 18) + bytes([3] * 32) + bytes([253] * 32))
    for target in (10, 30):
        check(config, pool, plain(operation=VectorOp.MULTIPLY, kernel_x=2, tap_step=20, target=target, columns=4,
                                  width=4, stride_x=1))


def test_padding_never_wins_a_maximum():
    machine = Machine(TEST)
    machine.pool[10] = 200  # -56
    machine.step(0, plain(kernel_x=3, dilation_x=1, pad_x=1, unsigned=0))
    assert (machine.pool[200] == 200).all()
    machine.step(0, plain(pad_x=1))
    assert (machine.pool[200] == 128).all()
    machine.step(0, plain(pad_x=1, unsigned=1))
    assert (machine.pool[200] == 0).all()


def test_upsampling_steps_and_descriptors_write_four_copies():
    machine = Machine(TEST)
    machine.pool[10:12] = np.arange(64).reshape(2, 32)
    parameters = np.zeros((3, 32), np.uint8)
    parameters[1].view("<u4")[:4] = 1  # mult 1, shift 0
    parameters[2] = np.frombuffer(b"".join(
        offset.to_bytes(2, "little") + b"\2\0\x0f\0\0\0" for offset in (0, 1, 8, 9)), np.uint8)
    machine.pool[100:103] = parameters
    # Identity weights for four columns: lanes 2j and 2j + 1 of column c in byte j*C + c.
    machine.pool[500:508] = 0
    for c in range(4):
        machine.pool[500, c // 2 * 4 + c] = 1 << 4 * (c % 2)
    machine.step(0, plain(Matrix, columns=2, width=2, stride_x=1, pitch=2, target_pitch=8, target_ring=2,
                          target_step_y=2, target_step_x=2))
    for y in range(2):
        for x in range(4):
            assert machine.pool[200 + 8 * y + x, 8:12].tolist() == [32 * (x // 2) + c for c in range(4)]


# Faults

ILLEGAL = [
    (plain(**{name: 0}), name) for name in ("ring", "kernel_y", "kernel_x", "rows", "columns", "blocks", "target_ring")
] + [
    (plain(Matrix, tiles=0), "tiles"),
    (Load(run=0, rows=1, planes=1), "run"), (Load(run=1, rows=0, planes=1), "rows"),
    (Store(run=1, rows=1, planes=0), "planes"),
    (Store(run=1, rows=1, planes=1, mask=1 << 32), "beyond 31"),
    (Store(run=1, rows=1, planes=1, mask=1, rotate=32), "rotate 32"),
    (Load(run=1, rows=1, planes=1, base=2), "segment register 2"),
    (Load(run=1, rows=1, planes=1, base=1), "segment address 8"),
    (Load(run=1, rows=1, planes=1, offset=5), "offset 5"),
    (Load(run=1, rows=2, planes=1, row_bytes=33), "row_bytes 33"),
    (Load(run=1, rows=1, planes=2, plane_bytes=31), "plane_bytes 31"),
    (Load(run=33, rows=1, planes=1), "memory up to byte 1056"),
    (Store(run=1, rows=2, planes=1, row_bytes=1024), "memory up to byte 1056"),
    (Load(run=2, rows=1, planes=1, address=8191), "word 8192"),
    (Store(run=1, rows=1, planes=1, address=9000), "word 9000"),
    (plain(anchor=1), "anchor 1"), (plain(target_anchor=1), "target_anchor 1"),
    (plain(target_step_y=0), "target step"), (plain(target_step_x=3), "target step"),
    (plain(target_step_y=2), "destination ring"),
    (plain(rows=5, stride_y=0, target_ring=2), "destination ring"),
    (plain(rows=2, stride_y=1, height=2, target_ring=2), "image row 1"),
    (plain(source=8192), "word 8192"), (plain(target=8192), "word 8192"),
    (plain(sampling=3), "sampling 3"), (plain(sampling=Sampling.SQUARE), "may deform"),
    (plain(operation=VectorOp.PACK, sampling=Sampling.OFFSETS), "may deform"),
    (plain(operation=VectorOp.PACK, kernel_x=2), "kernel_x = blocks = 1"),
    (plain(operation=VectorOp.PACK, kernel_y=2, pack_bytes=17), "34 bytes"),
    (plain(operation=VectorOp.PACK, columns=2, pack_bytes=3, pack_stride=30), "33 bytes"),
    (plain(operation=VectorOp.COLUMNS, sampling=Sampling.SQUARE), "offset_ring"),
    (plain(operation=VectorOp.COLUMNS, sampling=Sampling.SQUARE, offset_ring=1, offset_anchor=1), "offset_anchor 1"),
    (plain(operation=VectorOp.COLUMNS, sampling=Sampling.SQUARE, offset_ring=1, rows=3, target_ring=3), "offsets"),
    (plain(operation=VectorOp.COLUMNS, sampling=Sampling.SQUARE, offset_ring=1, offsets=8192), "word 8192"),
    (plain(operation=VectorOp.COLUMNS, sampling=Sampling.OFFSETS, offset_ring=1, fraction=5), "fraction 5"),
    (plain(operation=VectorOp.COLUMNS, sampling=Sampling.OFFSETS, offset_ring=1, kernel_y=5, kernel_x=5), "25 taps"),
    (plain(operation=VectorOp.MULTIPLY, low=5, high=4), "5..4"),
    (plain(operation=VectorOp.MULTIPLY, low=-1, high=128), "-1..128"),
    (plain(Matrix, low=-200, high=0), "-200..0"),
    (plain(Matrix, parameters=8190), "word 8192"), (plain(Matrix, weights=8191), "word 8192"),
    (plain(operation=VectorOp.MULTIPLY, parameters=8188), "outside the pool"),
    (plain(Matrix, tiles=1000, kernel_y=15, kernel_x=15), "more than the pool holds"),
    (plain(columns=2, width=2, stride_x=1, target=11), "after it has written"),
    (plain(Matrix, double=1), "double asks for plain"),
    (plain(Matrix, plain=1, group=8), "group 8 is not one of the 8"),
    (plain(Matrix, plain=1, hold=1, group=9), "group 9 is not one of the 8"),
    (plain(Matrix, resume=1), "the unit holds 0"),
    (plain(Matrix, hold=1, tiles=2), "not 2 and 1"),
    (plain(Matrix, hold=1, columns=5), "not 1 and 5"),
    (plain(Matrix, resume=1, rows=5, target_ring=5), "not 1 and 5"),
    (plain(Matrix, plain=1, scaled=1, scales=8192), "word 8192"),
    (plain(Matrix, plain=1, target_plane=1 << 13, tiles=9), "word 8392"),
    (plain(Matrix, plain=1, double=1, target_high=1 << 13), "word 8392"),
    (End(wait=1), "no unit"), (Barrier(signal=1), "BARRIER has no unit"),
]


@pytest.mark.parametrize("instruction, part", ILLEGAL, ids=lambda value: value if isinstance(value, str) else "")
def test_illegal_instructions_are_faults(instruction, part):
    machine = Machine(TEST, np.zeros(1055, np.uint8), (0, 8))
    with pytest.raises(EngineFault) as fault:
        machine.step(3, instruction)
    assert part in str(fault.value) and str(fault.value).startswith("instruction 3 (") and "; " in str(fault.value)


def matrix_with(descriptor: bytes = bytes(8), bias: int = 0, shift: int = 0, **fields) -> tuple[Machine, Matrix]:
    machine = Machine(TEST)
    machine.pool[100].view("<i4")[:4] = bias
    machine.pool[101].view("<u4")[:4] = 1 | shift << 16
    machine.pool[102, :8] = np.frombuffer(descriptor, np.uint8)
    return machine, plain(Matrix, **fields)


def test_faults_in_parameters():
    for machine, i in (matrix_with(b"\0\0\0\0\x10\0\0\0"), matrix_with(b"\0\0\x08\0\1\0\0\0"), matrix_with(shift=48),
                       matrix_with(b"\xff\x7f\0\0\1\0\0\0")):
        with pytest.raises(EngineFault, match="instruction 0"):
            machine.step(0, i)


def test_faults_in_scales_of_pixels_and_columns():
    for pixel, column, scaled in ((63, 0, 1), (0, 63, 1), (0, 48, 0)):
        machine = Machine(TEST)
        machine.pool[300, 2], machine.pool[100, 2] = pixel, column
        with pytest.raises(EngineFault, match="the shift of a scale is above"):
            machine.step(0, plain(Matrix, plain=1, scaled=scaled, scales=300))
    machine.pool[100, 2] = 47
    machine.step(1, plain(Matrix, plain=1, scales=300))


def test_held_sums_are_taken_by_the_next_instruction():
    machine = Machine(TEST)
    machine.step(0, plain(Matrix, plain=1, hold=1))
    with pytest.raises(EngineFault, match="only an instruction with resume may take"):
        machine.step(1, plain(Matrix, plain=1))
    with pytest.raises(EngineFault, match="resume of 2 pixels, the unit holds 1"):
        machine.step(1, plain(Matrix, plain=1, resume=1, columns=2, width=2, stride_x=1))


def test_write_into_own_scales_is_a_fault():
    machine = Machine(TEST)
    machine.step(0, plain(Matrix, plain=1, scaled=1, scales=200))  # read before
    with pytest.raises(EngineFault, match="after it has written"):
        machine.step(0, plain(Matrix, plain=1, scaled=1, scales=200, tiles=2))
    with pytest.raises(EngineFault, match="after it has written"):
        machine.step(0, plain(Matrix, plain=1, target=100))


def test_write_into_own_parameters_is_a_fault():
    machine, i = matrix_with(b"\0\0\0\0\1\0\0\0", target=102)
    with pytest.raises(EngineFault, match="after it has written"):
        machine.step(0, i)


def test_accumulator_overflow_is_a_fault_and_its_edge_is_not():
    most = (1 << 31) - 1
    machine, i = matrix_with(bias=most - 7)
    machine.pool[500] = 1  # low nibbles: even lanes
    machine.pool[10] = 0
    machine.pool[10, 0] = 7
    machine.step(0, i)
    machine.pool[10, 0] = 8
    with pytest.raises(EngineFault, match="2147483648"):
        machine.step(0, i)
    vector = plain(operation=VectorOp.MULTIPLY)
    machine.pool[100:104].reshape(-1).view("<i4")[:] = -most
    machine.pool[104:108] = 0
    machine.pool[108] = 255
    machine.pool[10] = 2
    with pytest.raises(EngineFault, match="-2147483649"):
        machine.step(0, vector)


def test_float64_sums_are_exact_beyond_float32():
    config = replace(TEST, bank_words=8192)
    machine = Machine(config)
    machine.pool[:2048] = 255
    machine.pool[:2048, 0] = 254
    i = plain(Matrix, source=0, blocks=1023, plane=1, unsigned=1, wide=1, parameters=3000, weights=4000)
    machine.pool[4000 : 4000 + 1023 * 4] = 0x77  # low nibble 7, high nibble 7: 119
    machine.pool[3001].view("<u4")[:4] = 1 | 23 << 16
    seen = []
    machine.on_result = lambda index, instruction, codes: seen.append(codes)
    machine.step(0, i)
    acc = 119 * 1023 * (255 * 32 - 1)
    assert acc > 1 << 24 and (seen[0] == min(127, round(Fraction(acc, 1 << 23)))).all()


def test_tokens():
    machine = Machine(TEST)
    give = plain(signal=1 << Unit.MATRIX | 1 << Unit.VECTOR)
    take = plain(Matrix, wait=1 << Unit.VECTOR)
    with pytest.raises(EngineFault, match="token from VECTOR"):
        machine.step(0, take)
    machine.step(1, give)
    machine.step(2, give)
    assert machine.tokens[Unit.VECTOR, Unit.MATRIX] == machine.tokens[Unit.VECTOR, Unit.VECTOR] == 2
    machine.step(3, take)
    machine.step(4, take)
    with pytest.raises(EngineFault, match="instruction 5"):
        machine.step(5, take)
    machine.step(6, plain(wait=1 << Unit.VECTOR))
    assert machine.tokens.sum() == 1
    with pytest.raises(EngineFault, match="token from VECTOR"):  # its own signal comes too late
        Machine(TEST).step(0, plain(wait=1 << Unit.VECTOR, signal=1 << Unit.VECTOR))
    machine.step(7, End())
