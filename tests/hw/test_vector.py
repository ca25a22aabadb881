"""The vector unit against the loop nest of arch/isa.py, written out over arrays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from amaranth.hdl import Cat

from tests.hw.test_gather import CONFIG, DEFORMED, GATHERED, PLAIN, STEM, as_bits, fill_offsets, samples, wrap
from tests.kit.memory import Memory
from tests.kit.streams import NONE, Waits, count_cycles, run, simulator, source
from weft.arch.config import EngineConfig, load_config
from weft.arch.isa import Sampling, Vector, VectorOp
from weft.arch.numerics import requantize
from weft.hw.gather import NEIGHBOURS
from weft.hw.vector import VectorUnit

PARAMETERS, TARGETS = 4000, 5000  # where the tables below keep parameters, and from where they write
U8 = {"low": 0, "high": 255}


def block_parameters(config: EngineConfig, words: np.ndarray, item: Vector, block: int):
    """Bias, mult, shift per lane and weights per tap and lane."""
    taps = item.kernel_y * item.kernel_x
    quarter = config.four_byte_words(config.lanes)
    first = item.parameters + block * (config.block_parameter_words + taps)
    bias = words[first:first + quarter].reshape(-1).view(np.int32).astype(int)
    scale = words[first + quarter:first + 2 * quarter].reshape(-1).view(np.uint32).astype(int)
    weights = words[first + 2 * quarter:][:taps].view(np.int8).astype(int)
    return bias, scale & 0xFFFF, scale >> 16 & 0xFF, weights


def fill_parameters(config: EngineConfig, words: np.ndarray, item: Vector, seed: int = 0) -> None:
    """Parameters that use the whole range of codes, saturation at both ends included."""
    rng = np.random.default_rng(seed)
    lanes, taps = config.lanes, item.kernel_y * item.kernel_x
    quarter = config.four_byte_words(lanes)
    for block in range(item.blocks):
        first = item.parameters + block * (config.block_parameter_words + taps)
        bias = rng.integers(-20000, 20000, lanes).astype(np.int32)
        mult, shift = rng.integers(1 << 14, 1 << 16, lanes), rng.integers(21, 25, lanes)
        shift[:3] = 0, 20, 47
        unused = rng.integers(0, 256, lanes)
        words[first:first + quarter] = bias.view(np.uint8).reshape(quarter, lanes)
        scale = (mult | shift << 16 | unused << 24).astype(np.uint32)
        words[first + quarter:first + 2 * quarter] = scale.view(np.uint8).reshape(quarter, lanes)
        words[first + 2 * quarter:first + 2 * quarter + taps] = rng.integers(0, 256, (taps, lanes), np.uint8)


def execute(config: EngineConfig, words: np.ndarray, item: Vector):
    """(address, bytes) of every write of an instruction, in order."""
    taps = item.kernel_y * item.kernel_x
    value = None
    for block, oy, ox, tap, sample in samples(words, item):
        row = wrap(item.target_anchor + oy * item.target_step_y, item.target_ring)
        position = item.target + block * item.target_plane + row * item.target_pitch + ox * item.target_step_x
        if item.operation == VectorOp.COLUMNS:
            yield position + tap * item.target_tap, (sample & 255).astype(np.uint8).tobytes()
            continue
        if item.operation == VectorOp.MULTIPLY:
            bias, mult, shift, weights = block_parameters(config, words, item, block)
            value = (value if tap else bias) + sample * weights[tap]
        elif item.operation == VectorOp.MAXIMUM:
            value = np.maximum(value, sample) if tap else sample
        else:
            value = value + sample if tap else sample
        if tap == taps - 1:
            if item.operation == VectorOp.MULTIPLY:
                value = requantize(value, mult, shift, item.low, item.high)
            yield position, (value & 255).astype(np.uint8).tobytes()


class Bench:
    """Runs instructions on the unit; the port named `slow` is nearly always busy.

    `log` are the unit's writes, `done` the cycles of its done pulses.
    """

    def __init__(self, config: EngineConfig, items: list[Vector], waits: Waits = NONE, slow: str = "") -> None:
        self.memory = Memory(config, seed=2)
        self.done: list[int] = []
        self.cycles: dict[str, int] = {}  # in which the unit was busy or stalled
        fill_offsets(self.memory.words)
        for i, item in enumerate(items):
            if item.operation == VectorOp.MULTIPLY:
                fill_parameters(config, self.memory.words, item, seed=i)
                assert item.parameters + item.blocks * (config.block_parameter_words + 25) <= TARGETS
        self.expected = [[(*write, item.tag) for write in execute(config, self.memory.words.copy(), item)]
                         for item in items]
        dut = VectorUnit(config)
        sim = simulator(dut)
        ports = {"parameter": dut.parameter, **{f"sample{i}": dut.sample[i] for i in range(NEIGHBOURS)},
                 "result": dut.result}
        for names, pauses in ((ports.keys() - {slow}, waits), ({slow} - {""}, Waits(1, chance=0.9))):
            reads, writes = ([port for name, port in ports.items() if name in names and (name == "result") == written]
                             for written in (False, True))
            if names:
                sim.add_testbench(self.memory.serve(reads, writes, pauses), background=True)
        sim.add_testbench(source(dut.unit.instruction, [as_bits(item) for item in items], waits))
        states = {name: getattr(dut.unit, name) for name in ("busy", "stall_output", "stall_scratchpad")}
        sim.add_testbench(count_cycles(self.cycles, **states), background=True)

        async def watch(ctx):
            written = 0
            while len(self.done) < len(items):
                *_, done, illegal, states_now = await ctx.tick().sample(
                    dut.unit.done, dut.unit.illegal, Cat(*states.values()))
                assert not illegal
                assert states_now.bit_count() <= 1
                if done:
                    written += len(self.expected[len(self.done)])
                    self.done.append(self.memory.cycle)
                    assert len(self.memory.log) >= written, "done before the last write"
            for _ in range(3):
                *_, busy, done = await ctx.tick().sample(dut.unit.busy, dut.unit.done)
                assert not busy and not done

        sim.add_testbench(watch)
        run(sim)
        self.log = self.memory.log

    def check(self) -> None:
        """Every write of every instruction, in order, whole words, with its tag."""
        expected = [write for item in self.expected for write in item]
        assert [(write.address, write.data, write.tag) for write in self.log] == expected
        assert all(write.mask + 1 == 1 << len(write.data) for write in self.log)


MULTIPLY = replace(PLAIN, parameters=PARAMETERS)
COLUMNS = VectorOp.COLUMNS
CASES = {  # few pixels of each sampling: test_gather has seen more
    **{name: replace(item, parameters=PARAMETERS, rows=2, columns=3) for name, item in GATHERED.items()
       if item.operation == VectorOp.MULTIPLY and not name.startswith("offsets_")},
    "relu": replace(MULTIPLY, unsigned=1, rows=2, **U8),
    "target_steps": replace(MULTIPLY, target_step_y=2, target_step_x=2, target_ring=6, target_anchor=4, columns=2),
    "target_ring": replace(MULTIPLY, target_ring=3, target_anchor=2, blocks=2, rows=2, columns=2),
    "maximum": replace(PLAIN, operation=VectorOp.MAXIMUM, stride_y=2, stride_x=2, rows=2, columns=3, blocks=2),
    "maximum_unsigned": replace(PLAIN, operation=VectorOp.MAXIMUM, unsigned=1, rows=1),
    "pack": STEM,
    "pack_stride_2": replace(STEM, pack_stride=6, stride_y=2, target_step_x=2),
    "columns": replace(PLAIN, operation=COLUMNS, rows=1),
    "columns_square": replace(DEFORMED, operation=COLUMNS, sampling=Sampling.SQUARE, rows=1),
    "columns_offsets": replace(DEFORMED, operation=COLUMNS, sampling=Sampling.OFFSETS, fraction=3, rows=1, columns=3,
                               blocks=2),
    "square_blocks": replace(DEFORMED, sampling=Sampling.SQUARE, columns=1, blocks=2, parameters=PARAMETERS),
    "offsets": replace(DEFORMED, sampling=Sampling.OFFSETS, fraction=3, columns=4, parameters=PARAMETERS),
    "offsets_unsigned": replace(DEFORMED, sampling=Sampling.OFFSETS, fraction=3, rows=1, columns=3, blocks=2,
                                unsigned=1, parameters=PARAMETERS, **U8),
}
CASES = {name: replace(item, tag=i, target=TARGETS + 37 * i) for i, (name, item) in enumerate(CASES.items())}


@pytest.mark.parametrize("group", range(2))
def test_writes_under_back_pressure(group):
    """Every case once, one after the other without waiting, all ports refusing at random."""
    items = list(CASES.values())[group::2]
    rng = np.random.default_rng(group)
    items = [items[i] for i in rng.permutation(len(items))]
    # Each has parameters of its own: the unit reads ahead.
    items = [replace(item, parameters=PARAMETERS + 60 * i) for i, item in enumerate(items)]
    bench = Bench(CONFIG, items, Waits(group, chance=0.15))
    bench.check()
    assert all(bench.cycles.values())


@pytest.mark.parametrize("slow", ["parameter", "sample3", "result"])
def test_one_slow_port(slow):
    """Samples ahead of parameters, neighbours far apart, a full write queue; a pixel requantized in one go."""
    names = ("copy", "two_operands", "columns") if slow == "result" else ("blocks", "offsets_unsigned", "maximum")
    items = [replace(CASES[name], parameters=PARAMETERS + 90 * i, rows=1) for i, name in enumerate(names)]
    Bench(replace(CONFIG, post_lanes=32), items, slow=slow).check()


def test_other_geometry():
    """`base` requantizes other groups of lanes; every operation, alternating."""
    names = ("plain", "maximum", "offsets", "copy", "pack", "square", "columns_offsets", "two_operands")
    items = [replace(CASES[name], parameters=PARAMETERS + 100 * i, rows=2) for i, name in enumerate(names)]
    Bench(load_config("base"), items, Waits(9, chance=0.1)).check()


CYCLES_PER_PIXEL = {
    "test": {"plain": 9, "square": 9, "offsets": 9, "copy": 8, "maximum": 9, "pack": 3, "columns": 9,
             "columns_offsets": 9},
    "base": {"plain": 9, "square": 9, "offsets": 9, "two_operands": 4, "copy": 4, "kernel_5x5": 25},
}


@pytest.mark.parametrize("config", CYCLES_PER_PIXEL)
def test_cycles_per_pixel(config):
    """The taps, or the requantizing groups where these are more, and nothing else: deformed or not, from block
    to block and from an instruction to its like."""
    items, ideal = [], []
    for name, cycles in CYCLES_PER_PIXEL[config].items():
        item = replace(CASES[name], rows=2, columns=3, blocks=1 if name == "pack" else 2, tag=len(ideal),
                       parameters=PARAMETERS + 90 * len(ideal))
        items += [item, item]
        pixels = 2 * item.rows * item.columns * item.blocks
        ideal.append(cycles * pixels - (1 if item.operation == COLUMNS else cycles))
    bench = Bench(load_config(config), items)
    bench.check()
    for tag, name in enumerate(CYCLES_PER_PIXEL[config]):
        written = [write.cycle for write in bench.log if write.tag == tag]
        cycles = written[-1] - written[0]
        print(f"{config} {name}: {cycles} cycles, ideal {ideal[tag]}")
        assert cycles <= 1.05 * ideal[tag]


ILLEGAL = {
    **{f"no_{name}": replace(MULTIPLY, **{name: 0}) for name in ("rows", "columns", "blocks", "kernel_y", "kernel_x")},
    "no_ring": replace(MULTIPLY, ring=0),
    "anchor": replace(MULTIPLY, anchor=8),
    "no_target_ring": replace(MULTIPLY, target_ring=0),
    "target_step_0": replace(MULTIPLY, target_step_x=0),
    "target_step_3": replace(MULTIPLY, target_step_y=3),
    "sampling": replace(MULTIPLY, sampling=3),
    "too_many_taps": replace(MULTIPLY, kernel_y=13, kernel_x=2),
    "too_many_offsets": replace(CASES["offsets"], kernel_y=5, kernel_x=4),
    "fraction": replace(CASES["offsets"], fraction=5),
    "no_offset_ring": replace(CASES["offsets"], offset_ring=0, offset_anchor=0),
    "deformed_maximum": replace(CASES["square"], operation=VectorOp.MAXIMUM),
    "deformed_pack": replace(STEM, sampling=Sampling.SQUARE, offset_ring=1),
    "pack_columns": replace(STEM, kernel_x=2),
    "pack_blocks": replace(STEM, blocks=2),
    "pack_too_wide": replace(STEM, pack_bytes=11),
    "pack_nothing": replace(STEM, pack_bytes=0),
}


def test_illegal_instructions():
    """Each is reported once and leaves no trace; a legal one after it is executed."""
    dut = VectorUnit(CONFIG)
    memory = Memory(CONFIG, seed=3)
    sim = simulator(dut)
    reports = []
    legal = CASES["maximum"]
    sim.add_testbench(memory.serve(reads=[dut.parameter, *(dut.sample[i] for i in range(NEIGHBOURS))],
                                   writes=[dut.result]), background=True)
    sim.add_testbench(source(dut.unit.instruction, [as_bits(item) for item in (*ILLEGAL.values(), legal)]))

    async def watch(ctx):
        while True:
            *_, done, illegal = await ctx.tick().sample(dut.unit.done, dut.unit.illegal)
            reports.extend(["illegal"] * illegal + ["done"] * done)
            if done:
                break

    sim.add_testbench(watch)
    run(sim)
    assert reports == ["illegal"] * len(ILLEGAL) + ["done"]
    assert len(memory.log) == legal.rows * legal.columns * legal.blocks
