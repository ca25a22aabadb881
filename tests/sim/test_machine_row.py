"""ROW against the text of arch.isa, written out here one number at a time."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sim.test_machine import MOD, SETTINGS, TEST, random_pool, signed
from weft.arch import numerics
from weft.arch.config import EngineConfig
from weft.arch.errors import EngineFault
from weft.arch.isa import Row, RowLayout, RowOp
from weft.sim.machine import Machine

CONFIGS = [replace(TEST, name=str(c), rows=2, columns=c, row_lanes=2, bank_words=8192) for c in (4, 2, 32)]
SOURCE, OTHER, TARGET, SCALE, TABLE = 1000, 11000, 30000, 50000, 60000
OPERATIONS = list(RowOp)


def half_even(x: int, shift: int) -> int:
    return round(Fraction(x, 1 << shift))


def saturate(x: int) -> int:
    return max(-(1 << 15), min((1 << 15) - 1, x))


class Literal:
    """Executes a ROW instruction as its docstring reads."""

    def __init__(self, config: EngineConfig, pool: np.ndarray) -> None:
        self.config, self.pool = config, pool.copy()
        self.writes: list[tuple[int, list[int]]] = []
        self.results: list[list[int]] = []

    def write(self, address: int, word: list[int]) -> None:
        assert len(word) == self.config.lanes
        self.pool[address % MOD] = [byte & 255 for byte in word]
        self.writes.append((address % MOD, [byte & 255 for byte in word]))

    def byte(self, address: int, lane: int) -> int:
        return int(self.pool[address % MOD][lane])

    def number(self, address: int, high: int, lane: int) -> int:
        return self.byte(address, lane) + 256 * signed(self.byte(address + high, lane))

    def row(self, i: Row) -> None:
        before = self.pool.copy()
        for row in range(i.rows):
            for column in range(i.columns):
                now, self.pool = self.pool, before  # no instruction of these tests reads what it has written
                source, other, target, scale = (
                    getattr(i, name) + row * getattr(i, f"{name}_row") + column * getattr(i, f"{name}_column")
                    for name in ("source", "other", "target", "scale"))

                def x(b: int, lane: int, j: int = 0, source: int = source) -> int:
                    return self.number(source + b * i.source_plane + j * i.source_column, i.source_high, lane)

                def o(b: int, lane: int, j: int = 0, other: int = other) -> int:
                    return self.number(other + b * i.other_plane + j * i.other_column, i.other_high, lane)

                places = [(b, lane) for b in range(i.blocks) for lane in range(self.config.lanes)]
                match RowOp(i.operation):
                    case RowOp.ADD:
                        values = [saturate(half_even(x(*p), i.up) + o(*p)) for p in places]
                    case RowOp.MULTIPLY:
                        values = [saturate(half_even(x(*p) * o(*p), i.shift)) for p in places]
                    case RowOp.SWIGLU:
                        gates = numerics.silu(np.array([x(*p) for p in places]), i.up).tolist()
                        values = [saturate(half_even(g * o(*p), i.shift)) for g, p in zip(gates, places, strict=True)]
                    case RowOp.CONVOLVE:
                        values = [saturate(half_even(sum(x(*p, j) * o(*p, j) for j in range(i.span)), i.shift))
                                  for p in places]
                    case RowOp.EXPAND:
                        values = self.expand(i, source, other)
                    case RowOp.ARGMAX:
                        answer = self.argmax(i, [x(*p) for p in places], other)
                        self.pool = now
                        self.results.append(list(answer))
                        self.write(target, [*(answer[0] % MOD).to_bytes(2, "little"), 0, 0,
                                            *answer[1].to_bytes(4, "little"), *[0] * (self.config.lanes - 8)])
                        continue
                    case RowOp.QUANTIZE:
                        codes, magnitude, divisor = self.quantize(i, row, {p: x(*p) for p in places},
                                                                  {p: o(*p) for p in places})
                        self.pool = now
                        self.finish(i, target, scale, codes, magnitude, divisor)
                        continue
                    case RowOp.SOFTMAX:
                        n = i.length + row * i.length_step
                        parts = numerics.softmax_row(np.array([x(*p) for p in places[:n]]),
                                                     np.array([o(*p) % MOD for p in places[:n]]))
                        codes = parts[0].tolist() + [0] * (len(places) - n)
                        self.pool = now
                        self.finish(i, target, scale, codes, int(parts[1]), numerics.normalize(parts[2]))
                        continue
                self.pool = now
                self.results.append(values)
                for b in range(i.blocks):
                    block = values[b * self.config.lanes : (b + 1) * self.config.lanes]
                    self.write(target + b * i.target_plane, block)
                    self.write(target + b * i.target_plane + i.target_high, [value >> 8 for value in block])

    def quantize(self, i: Row, row: int, x: dict, o: dict) -> tuple:
        values = {p: x[p] * o[p] if i.weighted else x[p] for p in x}
        if i.rotate:
            halved = {p: half_even(value, 15) for p, value in values.items()}
            values = {p: value << 14 for p, value in halved.items()}
            for b in range(i.span):
                words = i.table + 4 * (row * i.span + b)
                for lane in range(self.config.lanes):
                    cosine, sine = (self.number(words + k, 1, lane) for k in (0, 2))
                    low, high = halved[b, lane], halved[b + i.span, lane]
                    values[b, lane] = low * cosine - high * sine
                    values[b + i.span, lane] = high * cosine + low * sine
        codes, magnitude = numerics.quantize_row(np.array(list(values.values())), 127)
        divisor = numerics.normalize(np.int64(1))
        if i.normalize:
            divisor = numerics.normalized_root(np.int64(sum(v * v for v in x.values()) + i.constant))
        return codes.tolist(), int(magnitude), divisor

    def finish(self, i: Row, target: int, scale: int, codes: list[int], magnitude: int, divisor: tuple) -> None:
        lanes, columns = self.config.lanes, self.config.columns
        self.results.append(codes)
        for b in range(i.blocks):
            code = codes[b * lanes : (b + 1) * lanes]
            match RowLayout(i.layout):
                case RowLayout.PLAIN:
                    self.write(target + b * i.target_plane, code)
                case RowLayout.KEYS:
                    for w in range(columns):
                        self.write(target + b * i.target_plane + w,
                                   [code[w * (lanes // columns) + lane // columns] for lane in range(lanes)])
                case RowLayout.VALUES:
                    for t in range(lanes // columns):
                        self.write(target + (b * (lanes // columns) + t) * i.target_plane,
                                   [code[t * columns + lane % columns] for lane in range(lanes)])
        if i.layout == RowLayout.VALUES:
            self.write(scale, [magnitude & 255] * lanes)
            self.write(scale + 1, [magnitude >> 8] * lanes)
        else:
            mult, shift = map(int, numerics.combine_scales(
                *numerics.ratio_scale(np.int64(magnitude), *divisor), i.mult, i.shift))
            self.write(scale, [mult & 255, mult >> 8, shift, 0] * (lanes // 4))

    def expand(self, i: Row, stream: int, parameters: int) -> list[int]:
        lanes, columns = self.config.lanes, self.config.columns
        raw = [self.byte(parameters + (4 * i.length + k) // lanes, (4 * i.length + k) % lanes) for k in range(3)]
        mult, shift = numerics.combine_scales(*map(np.int64, (raw[0] | raw[1] << 8, raw[2], i.mult, i.shift)))
        values = []
        for b in range(i.blocks):
            if b % (lanes // columns) == 0:
                factors, stream = stream, stream + 1
            factor = self.byte(factors, b % (lanes // columns) * columns + i.length)
            for lane in range(lanes):
                at = lane // 2 * columns + i.length
                nibble = self.byte(stream + at // lanes, at % lanes) >> 4 * (lane % 2) & 15
                weight = nibble - 16 * (nibble >> 3)
                values.append(saturate(half_even(weight * factor * int(mult), int(shift))))
            stream += columns // 2
        return values

    def argmax(self, i: Row, x: list[int], other: int) -> tuple[int, int]:
        best = max(x[: i.length])
        number = (x.index(best) + i.constant) % (1 << 32)
        if not i.first:
            word = bytes(self.pool[other % MOD])
            earlier = int.from_bytes(word[:2], "little", signed=True), int.from_bytes(word[4:8], "little")
            if earlier[0] >= best:
                return earlier
        return best, number


def check(config: EngineConfig, pool: np.ndarray, i: Row) -> Machine:
    """Machine and literal loops leave the same scratchpad, log the same writes, report the same results."""
    literal = Literal(config, pool)
    literal.row(i)
    seen = []
    for trace in (True, False):
        machine = Machine(config, trace=trace, on_result=lambda *result: seen.append(result))
        machine.pool[:] = pool
        log = machine.step(7, i)
        assert np.array_equal(machine.pool, literal.pool)
        if log is not None:
            assert log.mask.all() and (log.tag == i.tag).all()
            assert [(int(a), d.tolist()) for a, d in zip(log.address, log.data, strict=True)] == literal.writes
    index, instruction, codes = seen[0]
    assert (index, instruction) == (7, i)
    assert np.array_equal(codes, np.array(literal.results).reshape(i.rows, i.columns, -1))
    return machine


@st.composite
def rows(draw, operation: RowOp) -> dict[str, int]:
    """A legal instruction, its operands anywhere apart from what it writes."""
    blocks, number = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    columns = 1 if operation == RowOp.CONVOLVE else draw(st.integers(1, 2))
    fields = {
        "operation": int(operation), "blocks": blocks, "rows": number, "columns": columns,
        "source": draw(st.sampled_from([SOURCE, MOD - 3])), "other": OTHER, "target": TARGET, "scale": SCALE,
        "source_plane": draw(st.integers(0, 9)), "source_high": draw(st.sampled_from([1, 200])),
        "source_row": draw(st.integers(0, 40)), "source_column": draw(st.sampled_from([3, 50])),
        "other_plane": draw(st.integers(0, 9)), "other_high": draw(st.sampled_from([1, 200, MOD - 200])),
        "other_row": draw(st.integers(0, 40)), "other_column": draw(st.sampled_from([3, 50])),
        "target_plane": draw(st.sampled_from([32, 200])), "target_high": draw(st.sampled_from([5000, 1])),
        "target_row": draw(st.sampled_from([2000, 2001])), "target_column": 6500,
        "scale_row": 7, "scale_column": draw(st.sampled_from([2, 60])), "tag": draw(st.integers(0, MOD - 1)),
        "table": TABLE, "mult": draw(st.integers(0, MOD - 1)), "shift": draw(st.integers(0, 30)),
        "layout": draw(st.sampled_from(list(RowLayout))), "up": draw(st.integers(0, 3)),
        "span": draw(st.integers(1, 2 if operation == RowOp.QUANTIZE else 15)),
        "constant": draw(st.sampled_from([1, 77, (1 << 32) - 9])), "first": draw(st.integers(0, 1)),
        "length": draw(st.integers(1, 3)), "length_step": draw(st.integers(0, 1)),
        "weighted": 0, "normalize": 0, "rotate": 0,
    }
    if operation == RowOp.SOFTMAX:
        fields["length"] = draw(st.integers(1, blocks * 32 - number))
        fields["layout"] = draw(st.sampled_from([RowLayout.PLAIN, RowLayout.KEYS]))
    elif operation == RowOp.ARGMAX:
        fields["length"] = draw(st.integers(1, blocks * 32))
    elif operation == RowOp.QUANTIZE:
        fields["weighted"], fields["normalize"] = draw(st.integers(0, 1)), draw(st.integers(0, 1))
        if fields["weighted"]:
            fields["layout"] = draw(st.sampled_from([RowLayout.PLAIN, RowLayout.KEYS]))
            fields["rotate"] = int(2 * fields["span"] <= blocks and draw(st.booleans()))
    return fields


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
@settings(SETTINGS, max_examples=40)
@given(data=st.data(), config=st.sampled_from(CONFIGS), spread=st.sampled_from([8, 2000, 1 << 15]),
       seed=st.integers(0, 2**32 - 1))
def test_row_equals_the_text(operation, data, config, spread, seed):
    fields, rng = data.draw(rows(operation)), np.random.default_rng(seed)
    pool = random_pool(config, rng)
    if operation == RowOp.EXPAND:
        fields["length"] = data.draw(st.integers(0, config.columns - 1))
        pool[:, 2::4] %= 40  # where scales are read: their shifts
    elif operation == RowOp.SOFTMAX:
        pool[OTHER - 500 : OTHER + 500] = np.maximum(1, pool[OTHER - 500 : OTHER + 500] % 127)
    elif spread < 1 << 15:  # high bytes that make small numbers
        limit = max(1, spread >> 8)
        pool[:] = rng.integers(-limit, limit, pool.shape).astype(np.int8).view(np.uint8)
    if operation == RowOp.CONVOLVE:
        high = (OTHER + fields["other_high"]) % MOD
        pool[high : high + 1500] %= 8
    check(config, pool, Row(**fields))


def words_of(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    raw = np.asarray(numbers, "<i2").reshape(-1, 32)
    return (raw & 255).astype(np.uint8), (raw >> 8 & 255).astype(np.uint8)


def place(pool: np.ndarray, address: int, high: int, numbers: np.ndarray) -> None:
    low, upper = words_of(numbers)
    pool[address : address + len(low)], pool[address + high : address + high + len(low)] = low, upper


def plain(operation: RowOp, **fields) -> Row:
    """A legal instruction on one block, with some fields replaced."""
    base = {"rows": 1, "columns": 1, "blocks": 1, "source": 10, "source_plane": 1, "source_high": 100, "other": 20,
            "other_plane": 1, "other_high": 100, "target": 300, "target_plane": 40, "target_high": 100, "scale": 600,
            "span": 1, "length": 1, "constant": 1, "table": 700}
    return Row(operation=operation, **base | fields)


def test_in_place():
    """A row may be replaced by its result, block by block; the codes of a row may take the place of its low bytes."""
    pool = random_pool(CONFIGS[0], np.random.default_rng(1))
    apart = {"rows": 2, "blocks": 3, "source_row": 3, "other_row": 3, "target_row": 3, "target_plane": 1}
    for target in (10, 20):
        check(CONFIGS[0], pool, plain(RowOp.ADD, **apart, target=target))
    check(CONFIGS[0], pool, plain(RowOp.QUANTIZE, **apart, target=10, scale_row=1))
    place(pool, 10, 100, np.full(32, -30000))
    pool[300, :2] = words_of(np.full(32, -30000))[0][0, 0], words_of(np.full(32, -30000))[1][0, 0]
    check(CONFIGS[0], pool, plain(RowOp.ARGMAX, other=300, target=300, length=32))


OVERLAPS = [
    plain(RowOp.ADD, blocks=2, target=11, target_plane=1),  # the next block's place
    plain(RowOp.ADD, blocks=2, target=9, target_plane=1),  # the last block's place
    plain(RowOp.ADD, rows=2, source_row=1, target=11, target_row=5),  # row 1 reads what row 0 has written
    plain(RowOp.ADD, rows=2, target=10, target_row=0, source_row=0, other_row=50),
    plain(RowOp.CONVOLVE, span=3, rows=2, source_row=1, source_column=1, target=12, target_row=1),
    plain(RowOp.QUANTIZE, scale=10), plain(RowOp.QUANTIZE, scale=110),
    plain(RowOp.QUANTIZE, blocks=2, weighted=1, rotate=1, target=10, target_plane=1),
    plain(RowOp.QUANTIZE, blocks=2, weighted=1, rotate=1, target=703, target_plane=1),
    plain(RowOp.QUANTIZE, layout=RowLayout.VALUES, scale=9),
    plain(RowOp.QUANTIZE, layout=RowLayout.KEYS, target=8, blocks=2, target_plane=2),
    plain(RowOp.EXPAND, target=10), plain(RowOp.EXPAND, target=20),
    plain(RowOp.ARGMAX, rows=2, other=300, target=300),
]


@pytest.mark.parametrize("instruction", OVERLAPS, ids=lambda i: i.listing())
def test_other_overlaps_are_faults(instruction):
    machine = Machine(TEST)
    machine.pool[20:30] = 1
    with pytest.raises(EngineFault, match="which another step of it writes"):
        machine.step(0, instruction)


ILLEGAL = [
    (plain(RowOp.ADD, rows=0), "rows"), (plain(RowOp.ADD, columns=0), "columns"),
    (plain(RowOp.ADD, blocks=0), "blocks"),
    (plain(8), "operation 8"), (plain(15), "operation 15"), (plain(RowOp.QUANTIZE, layout=3), "layout 3"),
    (plain(RowOp.CONVOLVE, span=0), "span"), (plain(RowOp.CONVOLVE, columns=2), "CONVOLVE of 2 columns"),
    (plain(RowOp.QUANTIZE, rotate=1, weighted=1, blocks=2, span=0), "span"),
    (plain(RowOp.QUANTIZE, rotate=1, blocks=2), "asks for weighted"),
    (plain(RowOp.QUANTIZE, rotate=1, weighted=1, blocks=3, span=2), "4 blocks of 3"),
    (plain(RowOp.SWIGLU, up=4), "up 4"),
    (plain(RowOp.SOFTMAX, length=0), "length"), (plain(RowOp.ARGMAX, length=0), "length"),
    (plain(RowOp.SOFTMAX, length=31, rows=3, length_step=1), "length 33"),
    (plain(RowOp.ARGMAX, length=33), "length 33"),
    (plain(RowOp.EXPAND, length=4), "column 4"),
    (plain(RowOp.QUANTIZE, normalize=1, constant=0), "constant"),
    *((plain(operation, shift=63), "shift 63") for operation in (RowOp.QUANTIZE, RowOp.SOFTMAX, RowOp.EXPAND)),
    *((plain(operation, shift=48), "shift 48") for operation in (RowOp.MULTIPLY, RowOp.SWIGLU, RowOp.CONVOLVE)),
    (plain(RowOp.ADD, source=8192), "word 8192"), (plain(RowOp.ADD, other_high=8192), "word 8212"),
    (plain(RowOp.ADD, target=8091, blocks=2, target_plane=1), "word 8192"),
    (plain(RowOp.QUANTIZE, scale=8191, layout=RowLayout.VALUES), "word 8192"),
    (plain(RowOp.QUANTIZE, weighted=1, rotate=1, blocks=2, table=8190), "word 819"),
    (plain(RowOp.EXPAND, source=8191), "word 819"),
    (plain(RowOp.SOFTMAX, other=30), "weights 0..0 of SOFTMAX"),
]


@pytest.mark.parametrize("instruction, part", ILLEGAL, ids=lambda value: value if isinstance(value, str) else "")
def test_illegal_instructions_are_faults(instruction, part):
    machine = Machine(TEST)
    machine.pool[20:30] = 1
    with pytest.raises(EngineFault) as fault:
        machine.step(3, instruction)
    assert part in str(fault.value) and str(fault.value).startswith("instruction 3 (ROW): ")


def test_limits_that_are_legal():
    machine = Machine(TEST)
    machine.pool[20:30] = 1
    for instruction in (plain(RowOp.QUANTIZE, shift=62, rotate=0, span=0), plain(RowOp.MULTIPLY, shift=47),
                        plain(RowOp.ADD, up=15, length=0, shift=63), plain(RowOp.SOFTMAX, length=32),
                        plain(RowOp.EXPAND, length=3), plain(RowOp.SWIGLU, up=3), plain(RowOp.ARGMAX, length=32)):
        machine.step(0, instruction)


def test_sums_that_do_not_fit():
    most, least = (1 << 15) - 1, -(1 << 15)
    machine = Machine(TEST)
    place(machine.pool, 10, 100, np.full(64, least))
    place(machine.pool, 20, 100, np.full(64, least))
    convolve = plain(RowOp.CONVOLVE, span=2)  # of the same words twice: 2 * 2**30
    with pytest.raises(EngineFault, match="sums reach 2147483648, outside 32 bits"):
        machine.step(0, convolve)
    machine.pool[10, 0] = 1  # one less in magnitude
    for lane in range(1, 32):
        machine.pool[[10, 110], lane] = 0
    machine.step(0, convolve)
    place(machine.pool, 10, 100, np.full(64, least))
    for number in (700, 702):  # both cosine and sine: the greatest rotation there is, -2**31
        place(machine.pool, number, 1, np.full(32, least))
    check(TEST, machine.pool, plain(RowOp.QUANTIZE, weighted=1, rotate=1, blocks=2))
    many = plain(RowOp.QUANTIZE, normalize=1, blocks=4095, source_plane=0, target_plane=0)  # 4095 * 32 * 2**30
    machine.step(0, many)
    wide = Machine(replace(TEST, lanes=128, rows=4))
    wide.pool[110] = 128
    with pytest.raises(EngineFault, match="the sum of squares reaches 5628"):
        wide.step(0, many)
    place(machine.pool, 20, 100, np.full(64, most))
    with pytest.raises(EngineFault, match=r"magnitude 1073\d* does not fit the two bytes of VALUES"):
        Machine(TEST, pool=machine.pool).step(0, plain(RowOp.QUANTIZE, weighted=1, layout=RowLayout.VALUES))


def test_weights_of_softmax():
    machine = Machine(TEST)
    place(machine.pool, 20, 100, np.full(32, -(1 << 15)))  # unsigned: 2**15
    machine.step(0, plain(RowOp.SOFTMAX, length=9))
    machine.pool[20, 9] = 1  # behind the end of the row
    machine.step(0, plain(RowOp.SOFTMAX, length=9))
    with pytest.raises(EngineFault, match=r"weights 32768\.\.32769 of SOFTMAX"):
        machine.step(0, plain(RowOp.SOFTMAX, length=10))


def test_argmax_over_several_instructions():
    """Of equal elements the first stays, over the borders of instructions too."""
    machine, seen = Machine(TEST), []
    machine.on_result = lambda index, instruction, codes: seen.append(codes.reshape(-1).tolist())
    numbers = np.array([[5, 9, 9, -3], [9, 1, 2, 3], [0, 0, 10, 10], [10, 0, 11, 99]])
    for part, row in enumerate(numbers):
        place(machine.pool, 10, 100, np.pad(row, (0, 28), constant_values=12345))
        machine.step(part, plain(RowOp.ARGMAX, length=3, constant=1000 * part, first=int(part == 0), other=300))
    assert seen == [[9, 1], [9, 1], [10, 2002], [11, 3002]]
    assert machine.pool[300].tolist() == [11, 0, 0, 0, *(3002).to_bytes(4, "little"), *[0] * 24]


def test_softmax_is_a_distribution():
    """Codes, magnitude and scale stand for weighted probabilities within their stated error."""
    rng = np.random.default_rng(3)
    machine = Machine(TEST)
    scores, weights = rng.integers(-3000, 3000, 64), rng.integers(1, 1 << 15, 64)
    place(machine.pool, 10, 100, scores)
    place(machine.pool, 20, 100, weights)
    machine.step(0, plain(RowOp.SOFTMAX, blocks=2, length=50, mult=1 << 15, shift=15))
    powers = np.exp2(scores[:50] / 256)
    expected = powers / powers.sum() * weights[:50]
    mult, shift = machine.pool[600, :2].view("<u2")[0], machine.pool[600, 2]
    unit = float(mult) / 2.0 ** float(shift) * 2**16 / 255
    codes = np.concatenate([machine.pool[300], machine.pool[340]]).astype(float)
    assert np.abs(codes[:50] * unit - expected).max() < expected.max() * (1 / 255 + 1e-3) and not codes[50:].any()
