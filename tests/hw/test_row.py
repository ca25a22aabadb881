"""The row unit against the text of arch/isa.py, written out over arrays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from amaranth.hdl import Cat

from tests.kit.memory import Memory
from tests.kit.streams import NONE, Waits, count_cycles, run, simulator, source
from weft.arch import numerics
from weft.arch.config import EngineConfig, load_config
from weft.arch.isa import Row, RowLayout, RowOp
from weft.hw.row import RowUnit
from weft.hw.row_layouts import FIELDS

CONFIGS = {name: load_config(name) for name in ("test", "base")}
NUMBERS = (RowOp.ADD, RowOp.MULTIPLY, RowOp.SWIGLU, RowOp.CONVOLVE, RowOp.EXPAND)  # results of 16 bits


def as_bits(item: Row):
    return FIELDS.from_bits(int.from_bytes(item.encode(), "little"))


# ---- what the instruction set says -------------------------------------------------------------------------------


def number(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.int64) | high.view(np.int8).astype(np.int64) << 8


def numbers(words: np.ndarray, first: int, plane: int, high: int, blocks: int) -> np.ndarray:
    """The numbers of a row [blocks * lanes]."""
    at = first + np.arange(blocks) * plane
    return number(words[at], words[at + high]).reshape(-1)


def first_products(config: EngineConfig, words: np.ndarray, item: Row, row: int, x, o) -> np.ndarray:
    """v of QUANTIZE."""
    if not item.weighted:
        return x
    if not item.rotate:
        return x * o
    v = numerics.round_shift(x * o, 15).reshape(item.blocks, -1)
    table = words[item.table + row * 4 * item.span:][:4 * item.span].reshape(item.span, 4, -1)
    cosine, sine = number(table[:, 0], table[:, 1]), number(table[:, 2], table[:, 3])
    low, high, rest = np.split(v, (item.span, 2 * item.span))
    low, high = numerics.rotate(low, high, cosine, sine)
    return np.concatenate((low, high, rest << numerics.ROTATION_BITS)).reshape(-1)


def expanded(config: EngineConfig, words: np.ndarray, item: Row, stream: int, parameters: int) -> np.ndarray:
    """Column `length` of a tile of weights, scaled."""
    lanes, columns, column = config.lanes, config.columns, item.length
    entry = words[parameters:parameters + config.plain_parameter_words].reshape(-1)[4 * column:4 * column + 4]
    mult, shift = int(entry[0]) | int(entry[1]) << 8, int(entry[2])
    mult, shift = numerics.combine_scales(np.int64(mult), np.int64(shift), np.int64(item.mult), np.int64(item.shift))
    result = []
    for block in range(item.blocks):
        if block % config.scaled_words == 0:
            factors, stream = words[stream].astype(np.int64), stream + 1
        steps = words[stream:stream + columns // 2].reshape(lanes // config.rows, config.rows // 2, columns)
        stream += columns // 2
        for step in range(lanes // config.rows):
            for i in range(config.rows // 2):
                byte = int(steps[step, i, column])
                for nibble in (byte & 15, byte >> 4):
                    weight = nibble - 16 * (nibble >> 3)
                    result.append(weight * factors[block % config.scaled_words * columns + column])
    return numerics.requantize(np.array(result), mult, shift, *numerics.INT16)


def code_words(config: EngineConfig, item: Row, target: int, codes: np.ndarray):
    """(address, bytes) of the code words of a row."""
    lanes, columns, plane = config.lanes, config.columns, item.target_plane
    lane, tiles = np.arange(lanes), lanes // columns
    for block, code in enumerate((codes & 255).astype(np.uint8).reshape(-1, lanes)):
        if item.layout == RowLayout.PLAIN:
            yield target + block * plane, code
        elif item.layout == RowLayout.KEYS:
            for w in range(columns):
                yield target + block * plane + w, code[w * tiles + lane // columns]
        else:
            for t in range(tiles):
                yield target + (block * tiles + t) * plane, code[t * columns + lane % columns]


def execute(config: EngineConfig, words: np.ndarray, item: Row):
    """(address, bytes) of every write of an instruction, in order; the caller makes them."""
    lanes = config.lanes
    for row in range(item.rows):
        for column in range(item.columns):
            first = item.source + row * item.source_row + column * item.source_column
            other = item.other + row * item.other_row + column * item.other_column
            target = item.target + row * item.target_row + column * item.target_column
            scale = item.scale + row * item.scale_row + column * item.scale_column
            if item.operation == RowOp.EXPAND:
                y = expanded(config, words, item, first, other)
            elif item.operation == RowOp.CONVOLVE:
                products = [numbers(words, first + j * item.source_column, item.source_plane, item.source_high,
                                    item.blocks)
                            * numbers(words, other + j * item.other_column, item.other_plane, item.other_high,
                                      item.blocks) for j in range(item.span)]
                y = numerics.saturate16(numerics.round_shift(sum(products), item.shift))
            else:
                x = numbers(words, first, item.source_plane, item.source_high, item.blocks)
            if item.operation not in (RowOp.EXPAND, RowOp.CONVOLVE, RowOp.ARGMAX) and (
                    item.operation != RowOp.QUANTIZE or item.weighted):
                o = numbers(words, other, item.other_plane, item.other_high, item.blocks)
            if item.operation == RowOp.ADD:
                y = numerics.saturate16(numerics.round_shift(x, item.up) + o)
            elif item.operation == RowOp.MULTIPLY:
                y = numerics.saturate16(numerics.round_shift(x * o, item.shift))
            elif item.operation == RowOp.SWIGLU:
                y = numerics.saturate16(numerics.round_shift(numerics.silu(x, item.up) * o, item.shift))
            if item.operation in NUMBERS:
                for block, part in enumerate(y.reshape(-1, lanes)):
                    yield target + block * item.target_plane, (part & 255).astype(np.uint8)
                    yield target + block * item.target_plane + item.target_high, (part >> 8 & 255).astype(np.uint8)
                continue
            if item.operation == RowOp.ARGMAX:
                index = int(np.argmax(x[:item.length]))
                best, index = int(x[index]), (index + item.constant) % (1 << 32)
                if not item.first:
                    value, before = words[other][:2].view("<i2")[0], words[other][4:8].view("<u4")[0]
                    if value >= best:
                        best, index = int(value), int(before)
                answer = np.zeros(lanes, np.uint8)
                answer[:2] = np.array([best], "<i2").view(np.uint8)
                answer[4:8] = np.array([index], "<u4").view(np.uint8)
                yield target, answer
                continue
            if item.operation == RowOp.QUANTIZE:
                v = first_products(config, words, item, row, x, o if item.weighted else None)
                codes, magnitude = numerics.quantize_row(v, numerics.CODE_PEAK)
                divisor = numerics.normalize(np.int64(1))
                if item.normalize:
                    divisor = numerics.normalized_root(np.int64((x * x).sum() + item.constant))
            else:
                valid = item.length + row * item.length_step
                codes, magnitude, total = numerics.softmax_row(x[:valid], (o & 0xFFFF)[:valid])
                codes, divisor = np.append(codes, np.zeros(len(x) - valid, np.int64)), numerics.normalize(total)
            yield from code_words(config, item, target, codes)
            if item.layout == RowLayout.VALUES:
                yield scale, np.full(lanes, int(magnitude) & 255, np.uint8)
                yield scale + 1, np.full(lanes, int(magnitude) >> 8 & 255, np.uint8)
            else:
                mult, shift = numerics.combine_scales(*numerics.ratio_scale(magnitude, *divisor), item.mult, item.shift)
                entry = np.array([mult | shift << 16], "<u4").view(np.uint8)
                yield scale, np.tile(entry, lanes // 4)


# ---- the unit ----------------------------------------------------------------------------------------------------


class Bench:
    """Runs instructions on the unit, on random memory that `prepare` may change; checks every write, in order.

    The port named `slow` is nearly always busy. `accepted` and `done` are the cycles in which instructions began
    and ended, `cycles` counts those in which the unit was busy or stalled.
    """

    def __init__(self, config: EngineConfig, items: list[Row], waits: Waits = NONE, prepare=None,
                 slow: str = "") -> None:
        self.memory = Memory(config, seed=5)
        if prepare is not None:
            prepare(self.memory.words)
        self.accepted: list[int] = []
        self.done: list[int] = []
        self.cycles: dict[str, int] = {}
        words = self.memory.words.copy()
        self.expected = []
        for item in items:
            writes = []
            for address, data in execute(config, words, item):
                writes.append((address, data.tobytes(), item.tag))
                words[address] = data
            self.expected.append(writes)
        dut = RowUnit(config)
        sim = simulator(dut)
        serve, lazy = self.memory.serve, Waits(1, chance=0.85)
        if slow == "read":
            benches = [serve([dut.read], waits=lazy), serve(writes=[dut.result], waits=waits)]
        elif slow == "result":
            benches = [serve([dut.read], waits=waits), serve(writes=[dut.result], waits=lazy)]
        else:
            benches = [serve([dut.read], [dut.result], waits)]
        for bench in benches:
            sim.add_testbench(bench, background=True)
        sim.add_testbench(source(dut.unit.instruction, [as_bits(item) for item in items], waits))
        states = {name: getattr(dut.unit, name) for name in ("busy", "stall_output", "stall_scratchpad")}
        sim.add_testbench(count_cycles(self.cycles, **states), background=True)
        offered = dut.unit.instruction

        async def watch(ctx):
            written = 0
            while len(self.done) < len(items):
                *_, valid, ready, done, illegal, states_now = await ctx.tick().sample(
                    offered.valid, offered.ready, dut.unit.done, dut.unit.illegal, Cat(*states.values()))
                assert not illegal
                assert states_now.bit_count() <= 1
                if valid and ready:
                    self.accepted.append(self.memory.cycle)
                if done:
                    written += len(self.expected[len(self.done)])
                    self.done.append(self.memory.cycle)
                    assert len(self.memory.log) == written, "done before the last write, or writes too many"
            for _ in range(3):
                *_, busy, done = await ctx.tick().sample(dut.unit.busy, dut.unit.done)
                assert not busy and not done

        sim.add_testbench(watch)
        run(sim, 60_000)
        written = [(write.address, write.data, write.tag) for write in self.memory.log]
        for tag, expected in enumerate(self.expected):
            ours, written = written[:len(expected)], written[len(expected):]
            assert ours == expected, f"instruction {tag}: {items[tag].listing()}"
        assert not written
        assert all(write.mask + 1 == 1 << config.lanes for write in self.memory.log)


PLAIN = Row(source=0, source_plane=2, source_high=1, source_row=200, source_column=20,
            other=1500, other_plane=1, other_high=100, other_row=31, other_column=7,
            target=4000, target_plane=3, target_high=1, target_row=400, target_column=90,
            scale=6000, scale_row=40, scale_column=2, table=3000, mult=40000, shift=20,
            rows=1, columns=1, blocks=2)


def of(operation: RowOp, **fields) -> Row:
    return replace(PLAIN, operation=operation, **fields)


CASES = {
    "add": of(RowOp.ADD, up=3, blocks=3),
    "add_rows": of(RowOp.ADD, up=0, rows=3, columns=2),
    "add_in_place": of(RowOp.ADD, up=15, target=0, target_plane=2, blocks=3),
    "multiply": of(RowOp.MULTIPLY, shift=15, rows=2, columns=2),
    "multiply_whole": of(RowOp.MULTIPLY, shift=0, blocks=1),
    "multiply_none": of(RowOp.MULTIPLY, shift=47, blocks=1),
    "multiply_in_place": of(RowOp.MULTIPLY, shift=16, target=1500, target_plane=1, target_high=100, blocks=4),
    **{f"swiglu_{up}": of(RowOp.SWIGLU, shift=15 - up, up=up, blocks=2) for up in range(4)},
    "convolve": of(RowOp.CONVOLVE, shift=17, span=3, blocks=3, rows=2, source_column=64, other_column=200),
    "convolve_1": of(RowOp.CONVOLVE, shift=14, span=1, blocks=2),
    "convolve_15": of(RowOp.CONVOLVE, shift=18, span=15, blocks=2, source_column=9, other_column=11),
    "quantize": of(RowOp.QUANTIZE, rows=2, columns=2),
    "quantize_normalize": of(RowOp.QUANTIZE, rows=2, normalize=1, constant=12345, blocks=3),
    "quantize_weighted": of(RowOp.QUANTIZE, weighted=1, blocks=3, rows=2),
    "quantize_weighted_normalize": of(RowOp.QUANTIZE, weighted=1, blocks=3, rows=2, normalize=1, constant=1),
    "quantize_rotate": of(RowOp.QUANTIZE, weighted=1, rotate=1, span=1, rows=2, columns=3),
    "quantize_rotate_rest": of(RowOp.QUANTIZE, weighted=1, rotate=1, span=2, blocks=6, rows=2, normalize=1,
                               constant=77),
    "quantize_rotate_only_rest": of(RowOp.QUANTIZE, weighted=1, rotate=1, span=3, blocks=7),
    "quantize_rotate_in_place": of(RowOp.QUANTIZE, weighted=1, rotate=1, span=2, blocks=5, target=0, target_plane=2),
    "quantize_keys": of(RowOp.QUANTIZE, layout=RowLayout.KEYS, target_plane=32, rows=2),
    "quantize_keys_rotate": of(RowOp.QUANTIZE, layout=RowLayout.KEYS, target_plane=32, rows=2, weighted=1, rotate=1,
                               span=2, blocks=5, normalize=1, constant=3),
    "quantize_values": of(RowOp.QUANTIZE, layout=RowLayout.VALUES, rows=2),
    "quantize_values_rotate": of(RowOp.QUANTIZE, layout=RowLayout.VALUES, columns=2, weighted=1, rotate=1, span=1,
                                 blocks=3),
    "quantize_in_place": of(RowOp.QUANTIZE, blocks=4, target=0, target_plane=2),
    "quantize_coarse": of(RowOp.QUANTIZE, shift=62, mult=1),
    "quantize_fine": of(RowOp.QUANTIZE, shift=0, mult=65535, blocks=1),
    "softmax": of(RowOp.SOFTMAX, length=50, rows=3, length_step=1, blocks=2),
    "softmax_1": of(RowOp.SOFTMAX, length=1, rows=2, length_step=1, blocks=1),
    "softmax_short": of(RowOp.SOFTMAX, length=33, blocks=5, columns=2, layout=RowLayout.VALUES),
    "softmax_full": of(RowOp.SOFTMAX, length=63, blocks=2, rows=2, length_step=1, layout=RowLayout.KEYS,
                       target_plane=32),
    "argmax": of(RowOp.ARGMAX, length=64, first=1, constant=1 << 31),
    "argmax_1": of(RowOp.ARGMAX, length=1, first=1, constant=7, blocks=1),
    "argmax_goes_on": of(RowOp.ARGMAX, length=45, length_step=1, constant=(1 << 32) - 10, rows=3, columns=2),
    "expand": of(RowOp.EXPAND, length=2, mult=50000, shift=2, blocks=9),
    "expand_rows": of(RowOp.EXPAND, length=1, mult=65535, shift=0, rows=2, columns=2, blocks=4),
    "expand_nothing": of(RowOp.EXPAND, length=0, shift=62, blocks=1),
}
CASES = {name: replace(item, tag=i) for i, (name, item) in enumerate(CASES.items())}


def varied(words: np.ndarray) -> None:
    """High bytes that make some numbers small, scales that do not make all weights 0."""
    words[1:400:4] = words[1:400:4].view(np.int8) >> 5
    words[1500:1540, 2::4] = 20


@pytest.mark.parametrize("config", CONFIGS)
def test_every_operation(config):
    """The cases in random order, both ports refusing at random; half of them where they take twice as long."""
    items = list(CASES.values())[::2 if config == "test" else 1]
    assert {item.operation for item in items} == set(RowOp)
    items = [items[i] for i in np.random.default_rng(1).permutation(len(items))]
    bench = Bench(CONFIGS[config], items, Waits(3, chance=0.2), varied)
    assert all(bench.cycles.values())


@pytest.mark.parametrize("slow", ["read", "result"])
def test_one_slow_port(slow):
    """Operands that trickle in; a pipeline full of results."""
    names = ("multiply", "convolve_1", "quantize_keys_rotate", "softmax", "argmax_goes_on", "expand")
    Bench(CONFIGS["base"], [replace(CASES[name], rows=1) for name in names], prepare=varied, slow=slow)


LAYOUTS = ("convolve", "quantize_rotate_rest", "quantize_keys", "quantize_values", "softmax", "argmax", "expand")
GEOMETRIES = {
    "whole_words": ({"columns": 2, "row_lanes": 32}, LAYOUTS),
    "one_tile": ({"rows": 2, "columns": 32, "row_lanes": 2}, LAYOUTS),
    "wide_words": ({"lanes": 64, "columns": 16, "row_lanes": 8}, ("quantize_keys", "expand")),
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_other_geometries(geometry):
    fields, names = GEOMETRIES[geometry]
    items = [replace(CASES[name], rows=1, length=1 if name == "expand" else 50) for name in names]
    Bench(replace(CONFIGS["test"], **fields), items, Waits(4, chance=0.1), varied)


# ---- random fields and values ------------------------------------------------------------------------------------

KINDS = 6


def kinds_of_words(seed: int):
    """Fills memory with words of random bytes, of extremes, and of bytes near 0."""

    def prepare(words: np.ndarray) -> None:
        rng = np.random.default_rng(seed)
        kind = rng.integers(0, KINDS, len(words))
        for number, byte in enumerate((0, 255, 128)):
            words[kind == number] = byte
        near = kind == KINDS - 1
        words[near] = words[near].view(np.int8) >> rng.integers(3, 7)

    return prepare


def random_item(rng: np.random.Generator, config: EngineConfig) -> Row:
    """Any legal instruction whose operands and results lie apart, or in the same place."""

    def up_to(most: int) -> int:
        return int(rng.integers(0, most, endpoint=True))

    operation, blocks, rows, columns = RowOp(up_to(max(RowOp))), 1 + up_to(4), 1 + up_to(2), 1 + up_to(1)
    strides = {f"{name}_{part}": up_to(most) for name in ("source", "other", "target")
               for part, most in (("plane", 5), ("high", 200), ("row", 90), ("column", 70))}
    fields = {**strides, "mult": up_to(65535), "layout": RowLayout(up_to(2)), "up": up_to(15), "span": up_to(15),
              "shift": up_to(47) if up_to(1) else up_to(20), "constant": 1 + up_to((1 << 32) - 2),
              "normalize": up_to(1), "weighted": up_to(1), "first": up_to(1), "length_step": up_to(1)}
    match operation:
        case RowOp.SWIGLU:
            fields["up"] = up_to(3)
        case RowOp.CONVOLVE:
            columns, fields["span"] = 1, 1 + up_to(4)
        case RowOp.QUANTIZE if blocks > 1 and up_to(1):
            fields |= {"weighted": 1, "rotate": 1, "span": 1 + up_to(blocks // 2 - 1)}
        case RowOp.SOFTMAX | RowOp.ARGMAX:
            fields["length"] = 1 + up_to(blocks * config.lanes - rows)
        case RowOp.EXPAND:
            fields["length"] = up_to(config.columns - 1)
            fields["shift"] = up_to(62) if up_to(1) else 0
    if operation in NUMBERS and operation != RowOp.EXPAND and not up_to(3):
        fields |= {"source_plane": 2, "source_high": 1, "source_column": 16, "source_row": 40, "target": 0,
                   "target_plane": 2, "target_high": 1, "target_column": 16, "target_row": 40}
    return of(operation, rows=rows, columns=columns, blocks=blocks, **{"target": 4000} | fields)


@pytest.mark.parametrize(("config", "seed"), [("test", 1), ("base", 2)])
def test_random_fields(config, seed):
    rng = np.random.default_rng(seed)
    items = [replace(random_item(rng, CONFIGS[config]), tag=i) for i in range(16)]
    Bench(CONFIGS[config], items, Waits(seed, chance=0.1), kinds_of_words(seed))


EXTREMES = (0, -(1 << 15), (1 << 15) - 1, -1)


def test_extremes():
    """Rows of one number: products, sums, magnitudes and probabilities at the ends of their range."""
    size = 100  # words of each number

    def prepare(words: np.ndarray) -> None:
        for at, number in enumerate(EXTREMES):
            words[size * at:size * (at + 1):2] = number & 255
            words[size * at + 1:size * (at + 1):2] = number >> 8 & 255

    shape = {"rows": 1, "columns": 1, "blocks": 2, "source_high": 1, "other_plane": 2, "other_high": 1}
    names = ("add", "multiply_whole", "swiglu_0", "swiglu_3", "quantize_normalize", "quantize_rotate", "softmax_full")
    items = [replace(CASES[name], **shape, source=size * at, other=size * at, table=size * at)
             for name in names for at in range(len(EXTREMES))]
    sums = replace(CASES["convolve_15"], **shape, source=size, other=size, source_column=2, other_column=2, shift=19)
    Bench(CONFIGS["base"], [*items, sums], prepare=prepare)


# ---- cycles ------------------------------------------------------------------------------------------------------

CYCLES = {  # on `base`, from acceptance to done: rows x blocks
    "add": (RowOp.ADD, {}, {(1, 1): 29, (1, 9): 61, (3, 2): 49}),
    "multiply": (RowOp.MULTIPLY, {}, {(1, 9): 61}),
    "swiglu": (RowOp.SWIGLU, {}, {(1, 9): 61}),
    "convolve": (RowOp.CONVOLVE, {"span": 3}, {(1, 9): 133}),
    "quantize": (RowOp.QUANTIZE, {}, {(1, 1): 67, (3, 9): 320}),
    "normalize": (RowOp.QUANTIZE, {"weighted": 1, "normalize": 1, "constant": 5}, {(1, 1): 84, (3, 9): 322}),
    "rotate": (RowOp.QUANTIZE, {"weighted": 1, "rotate": 1, "span": 1, "normalize": 1, "constant": 5},
               {(1, 2): 104, (5, 2): 340}),
    "keys": (RowOp.QUANTIZE, {"layout": RowLayout.KEYS, "target_plane": 32}, {(1, 1): 67, (1, 9): 161}),
    "values": (RowOp.QUANTIZE, {"layout": RowLayout.VALUES}, {(1, 1): 62, (1, 9): 126}),
    "softmax": (RowOp.SOFTMAX, {"length": 32}, {(1, 1): 89, (3, 1): 193}),
    "softmax_long": (RowOp.SOFTMAX, {"length": 9 * 32}, {(1, 9): 171}),
    "argmax": (RowOp.ARGMAX, {"length": 9 * 32}, {(1, 9): 59}),
    "expand": (RowOp.EXPAND, {}, {(1, 1): 31, (1, 9): 65}),
}


def test_cycles():
    """What the datasheet says, with idle ports; every bound is exact at the time of writing."""
    fixed = {"source_row": 0, "other_row": 0, "other_plane": 2, "other_high": 1, "target_row": 0, "target_plane": 2}
    runs = [(name, size, cycles, of(operation, rows=size[0], blocks=size[1], **fixed | fields))
            for name, (operation, fields, sizes) in CYCLES.items() for size, cycles in sizes.items()]
    bench = Bench(CONFIGS["base"], [replace(item, tag=tag) for tag, (*_, item) in enumerate(runs)])
    taken = [done - accepted for done, accepted in zip(bench.done, bench.accepted, strict=True)]
    for (name, size, cycles, _), measured in zip(runs, taken, strict=True):
        print(f"{name} {size}: {measured} cycles, at most {cycles}")
    assert all(measured <= run[2] for measured, run in zip(taken, runs, strict=True))


# ---- what is refused ---------------------------------------------------------------------------------------------

ROTATE = of(RowOp.QUANTIZE, weighted=1, rotate=1, span=1)
ILLEGAL = {
    **{f"no_{name}": of(RowOp.ADD, **{name: 0}) for name in ("rows", "columns", "blocks")},
    "operation": of(RowOp.EXPAND.value + 1),
    "layout": of(RowOp.QUANTIZE, layout=3),
    "no_taps": of(RowOp.CONVOLVE),
    "convolve_columns": of(RowOp.CONVOLVE, span=2, columns=2),
    "swiglu_up": of(RowOp.SWIGLU, up=4),
    "no_span": replace(ROTATE, span=0),
    "span": replace(ROTATE, span=2, blocks=3),
    "rotate_unweighted": replace(ROTATE, weighted=0),
    "no_constant": of(RowOp.QUANTIZE, normalize=1),
    "softmax_nothing": of(RowOp.SOFTMAX),
    "softmax_too_long": of(RowOp.SOFTMAX, length=63, rows=3, length_step=1),
    "argmax_nothing": of(RowOp.ARGMAX),
    "argmax_too_long": of(RowOp.ARGMAX, length=65),
    "column": of(RowOp.EXPAND, length=4),
    **{f"scale_shift_{op.name}": of(op, shift=63, length=3) for op in (RowOp.QUANTIZE, RowOp.SOFTMAX, RowOp.EXPAND)},
    **{f"shift_{op.name}": of(op, shift=48, span=1) for op in (RowOp.MULTIPLY, RowOp.SWIGLU, RowOp.CONVOLVE)},
}
HARMLESS = of(RowOp.ADD, shift=255, rotate=1, normalize=1, up=9)  # fields of other operations


def test_illegal_instructions():
    """Each is reported once, in the cycle after it was accepted, and leaves no trace; a legal one is executed."""
    dut = RowUnit(CONFIGS["test"])
    memory = Memory(CONFIGS["test"], seed=3)
    sim = simulator(dut)
    reports, offered = [], dut.unit.instruction
    sim.add_testbench(memory.serve([dut.read], [dut.result]), background=True)
    sim.add_testbench(source(offered, [as_bits(item) for item in (*ILLEGAL.values(), HARMLESS)], Waits(1)))

    async def watch(ctx):
        accepted = False
        while "done" not in reports:
            *_, valid, ready, done, illegal = await ctx.tick().sample(
                offered.valid, offered.ready, dut.unit.done, dut.unit.illegal)
            assert accepted or not illegal
            accepted = valid and ready
            reports.extend(["illegal"] * illegal + ["done"] * done)

    sim.add_testbench(watch)
    run(sim)
    assert reports == ["illegal"] * len(ILLEGAL) + ["done"]
    assert len(memory.log) == 2 * HARMLESS.blocks
