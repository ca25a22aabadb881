"""cocotb bench of the engine's top, configuration `test`, with cocotbext-axi's models pausing on every channel.

Run by test_engine_cocotb.py.
"""

from __future__ import annotations

import logging
import random

import cocotb
import numpy as np
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, RisingEdge
from cocotbext.axi import AddressSpace, AxiBus, AxiLiteBus, AxiLiteMaster, AxiRam, AxiSlave, MemoryRegion

from weft.arch.config import load_config
from weft.arch.isa import (
    ZERO,
    Barrier,
    Branch,
    End,
    Instruction,
    Load,
    Matrix,
    Read,
    Row,
    Scalar,
    ScalarOp,
    Store,
    Unit,
    Vector,
    VectorOp,
)
from weft.arch.numerics import requantize
from weft.arch.registers import CONTROL_RESET, CONTROL_START, MAGIC, REGISTERS, Status
from weft.hw.dispatch import NO_UNIT

CONFIG = load_config("test")
SIZE = 1 << 16
OUTSIDE = SIZE  # first address without memory
PROGRAM, IMAGE, CONSTANTS, RESULT = 0x1000, 0x4000, 0x8000, 0xC000  # segments 0, 1, 2: from IMAGE on
CHANNELS = {"write_if": ("aw_channel", "w_channel", "b_channel"), "read_if": ("ar_channel", "r_channel")}
WORD, LANES, COLUMNS = CONFIG.word_bytes, CONFIG.lanes, CONFIG.columns
ALL, LAST = (1 << LANES) - 1, End()


def pauses(rng: random.Random, chance: float):
    while True:
        yield rng.random() < chance


class Bench:
    """Engine, memory and host. `errors`: addresses from OUTSIDE on answer with SLVERR."""

    def __init__(self, dut, seed: int, errors: bool = False, chance: float = 0.3) -> None:
        logging.getLogger("cocotb.weft_engine").setLevel(logging.ERROR)  # every access, and the errors we provoke
        self.dut, self.random, rng = dut, np.random.default_rng(seed), random.Random(seed)
        Clock(dut.clk, 10, "ns").start()
        self.host = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axil"), dut.clk, dut.rst)
        bus = AxiBus.from_prefix(dut, "m_axi")
        if errors:
            space = AddressSpace(2 * SIZE)
            self.memory = MemoryRegion(SIZE)
            space.register_region(self.memory, 0)
            port = AxiSlave(bus, dut.clk, dut.rst, target=space)
        else:
            self.memory = port = AxiRam(bus, dut.clk, dut.rst, size=SIZE)
        for end in (self.host, port):
            for side, channels in CHANNELS.items():
                for channel in channels:
                    getattr(getattr(end, side), channel).set_pause_generator(pauses(rng, chance))

    async def put(self, address: int, raw: bytes) -> None:
        await _maybe(self.memory.write(address, raw))

    async def get(self, address: int, size: int) -> bytes:
        return bytes(await _maybe(self.memory.read(address, size)))

    async def reset(self) -> None:
        self.dut.rst.value = 1
        await ClockCycles(self.dut.clk, 4)
        self.dut.rst.value = 0
        await ClockCycles(self.dut.clk, 2)

    async def write(self, name: str, value: int) -> None:
        register = REGISTERS[name]
        await self.host.write(register.offset, value.to_bytes(4 * register.words, "little"))

    async def read(self, name: str) -> int:
        register = REGISTERS[name]
        return int.from_bytes((await self.host.read(register.offset, 4 * register.words)).data, "little")

    async def start(self, program: list[Instruction | bytes], watchdog: int = 5000, arguments=()) -> None:
        raw = [item if isinstance(item, bytes) else item.encode() for item in program]
        await self.put(PROGRAM, b"".join(raw))
        settings = {"program_address": PROGRAM, "program_length": len(raw), "watchdog": watchdog, "segment0": IMAGE,
                    "segment1": CONSTANTS, "segment2": RESULT, "segment3": OUTSIDE}
        settings |= {f"argument{number}": value for number, value in enumerate(arguments)}
        for name, value in settings.items():
            await self.write(name, value)
        await self.write("control", CONTROL_START)

    async def run(self, program: list[Instruction | bytes], watchdog: int = 5000, arguments=()) -> tuple[int, int, int]:
        """Runs a program to its end. Returns status, unit and index."""
        await self.start(program, watchdog, arguments)
        return await self.end()

    async def end(self) -> tuple[int, int, int]:
        await ClockCycles(self.dut.clk, 2)  # irq falls after a start
        if not self.dut.irq.value:
            await RisingEdge(self.dut.irq)
        status = await self.read("status")
        return status & 0xFF, status >> 8, await self.read("fault_index")

    async def works(self) -> None:
        """A short program right after a reset by the host gives the right result."""
        await self.write("control", CONTROL_RESET)
        assert await self.read("status") == Status.IDLE
        image = self.random.integers(0, 256, 12 * WORD, np.uint8).tobytes()
        await self.put(IMAGE, image)
        assert (await self.run(copy_program(12)))[0] == Status.DONE
        assert await self.get(RESULT, len(image)) == image


async def _maybe(result):
    """AxiRam answers at once, MemoryRegion when awaited."""
    return await result if hasattr(result, "__await__") else result


def bit(unit: Unit) -> int:
    return 1 << unit


def copy_program(words: int) -> list[Instruction]:
    return [Load(signal=bit(Unit.STORE), base=0, run=words, rows=1, planes=1),
            Store(wait=bit(Unit.LOAD), base=2, run=words, rows=1, planes=1, mask=ALL), LAST]


def four_bytes(bias, mult, shift) -> bytes:
    """Bias words, then scale words."""
    scale = mult.astype(np.uint32) | shift.astype(np.uint32) << 16
    return b"".join(_fill(item.astype("<u4").tobytes()) for item in (bias.astype(np.int32).view(np.uint32), scale))


def _fill(raw: bytes) -> bytes:
    return raw.ljust(-(-len(raw) // WORD) * WORD, b"\0")


class Layers:
    """A depthwise 1x1 convolution and a full one on top of it: constants, instructions, reference."""

    width, rows = 6, 3  # of a strip
    vector_parameters, matrix_parameters, weights, image, between, result = 1024, 1100, 1200, 0, 256, 512

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.depth_weight = rng.integers(-128, 128, LANES)
        self.full_weight = rng.integers(-8, 8, (LANES, LANES))  # input, output
        self.bias = rng.integers(-3000, 3000, (2, LANES))
        self.mult = rng.integers(1 << 15, 1 << 16, (2, LANES))
        self.shift = rng.integers(19, 24, (2, LANES))

    def constants(self) -> list[tuple[int, bytes]]:
        """(scratchpad word, bytes)."""
        vector = four_bytes(self.bias[0], self.mult[0], self.shift[0]) + self.depth_weight.astype(np.int8).tobytes()
        tiles = weights = b""
        for tile in range(LANES // COLUMNS):
            some = slice(tile * COLUMNS, (tile + 1) * COLUMNS)
            tiles += four_bytes(self.bias[1][some], self.mult[1][some], self.shift[1][some])
            tiles += _fill(bytes([0, 0, tile, 0]) + ((1 << COLUMNS) - 1).to_bytes(4, "little"))  # one descriptor
            nibbles = self.full_weight[:, some].astype(np.uint8) & 15
            weights += (nibbles[::2] | nibbles[1::2] << 4).tobytes()  # two lanes to a byte, columns inside
        return [(self.vector_parameters, vector), (self.matrix_parameters, tiles), (self.weights, weights)]

    def program(self, strips: int) -> tuple[list[Instruction], bytes]:
        program: list[Instruction] = []
        raw = b""
        for address, part in self.constants():
            program.append(Load(base=1, offset=len(raw), address=address, run=len(part) // WORD, rows=1, planes=1))
            raw += part
        words = self.width * self.rows
        common = {"pitch": self.width, "ring": self.rows, "height": self.rows, "width": self.width, "kernel_y": 1,
                  "kernel_x": 1, "stride_y": 1, "stride_x": 1, "dilation_y": 1, "dilation_x": 1, "rows": self.rows,
                  "columns": self.width, "blocks": 1, "low": -128, "high": 127, "target_pitch": self.width,
                  "target_ring": self.rows, "target_step_y": 1, "target_step_x": 1}
        for strip in range(strips):
            place = words * strip
            memory = {"offset": place * WORD, "run": words, "rows": 1, "planes": 1, "tag": strip}
            program += [
                Load(signal=bit(Unit.VECTOR), base=0, address=self.image + place, **memory),
                Vector(wait=bit(Unit.LOAD), signal=bit(Unit.MATRIX), source=self.image + place,
                       target=self.between + place, parameters=self.vector_parameters,
                       operation=VectorOp.MULTIPLY, **common),
                Matrix(wait=bit(Unit.VECTOR), signal=bit(Unit.STORE), source=self.between + place,
                       target=self.result + place, parameters=self.matrix_parameters, weights=self.weights,
                       tiles=LANES // COLUMNS, **common),
                Store(wait=bit(Unit.MATRIX), base=2, address=self.result + place, mask=ALL, **memory),
            ]
        return [*program, LAST], raw

    def reference(self, image: np.ndarray) -> np.ndarray:
        """int8 words x lanes to int8 words x lanes."""
        codes = image.astype(np.int64)
        codes = requantize(codes * self.depth_weight + self.bias[0], self.mult[0], self.shift[0], -128, 127)
        return requantize(codes @ self.full_weight + self.bias[1], self.mult[1], self.shift[1], -128, 127)


@cocotb.test(timeout_time=2, timeout_unit="ms")
@cocotb.parametrize(chance=[0.0, 0.3])
async def every_unit_through_tokens(dut, chance: float) -> None:
    bench, layers, strips = Bench(dut, seed=1, chance=chance), Layers(2), 3
    await bench.reset()
    assert await bench.read("magic") == MAGIC
    assert await bench.read("fingerprint") == int(CONFIG.fingerprint, 16)
    program, constants = layers.program(strips)
    image = np.random.default_rng(3).integers(-128, 128, (strips * layers.rows * layers.width, LANES), np.int8)
    await bench.put(CONSTANTS, constants)
    await bench.put(IMAGE, image.tobytes())
    assert await bench.run(program) == (Status.DONE, 0, len(program) - 1)
    result = np.frombuffer(await bench.get(RESULT, image.nbytes), np.int8).reshape(image.shape)
    wrong = np.argwhere(result != layers.reference(image))
    assert not len(wrong), f"{len(wrong)} wrong codes, first at (pixel, lane) {wrong[:4].tolist()}"
    retired = [await bench.read(f"{unit.name.lower()}_retired") for unit in Unit]
    assert retired == [len(layers.constants()) + strips, strips, strips, strips, 0]
    assert await bench.read("bytes_written") == image.nbytes
    assert await bench.read("bytes_read") >= image.nbytes + len(constants) + 64 * len(program)


def reversing_program(words: int) -> list[Instruction]:
    """Copies as many blocks as argument 0 says, the last one first, by a loop over bound addresses.

    A block is `words` words; the last of them begins with the block's number in the result.
    """
    step, window = words * WORD, {"run": words, "rows": 1, "planes": 1}
    left, source, target, place = range(8, 12)

    def scalar(operation: ScalarOp, target: int, first: int, value: int) -> Scalar:
        return Scalar(operation=operation, target=target, first=first, literal=1, value=value)

    return [
        Scalar(operation=ScalarOp.SUBTRACT, target=left, first=ZERO, second=0),
        scalar(ScalarOp.ADD, left, left, 1),
        Scalar(operation=ScalarOp.SUBTRACT, target=source, first=ZERO, second=left),
        scalar(ScalarOp.MULTIPLY, source, source, step),
        Read(target=target, first=source, base=0, offset=step - WORD),
        scalar(ScalarOp.MULTIPLY, target, target, step),
        scalar(ScalarOp.SHIFT, place, source, WORD.bit_length() - 1),
        Load(signal=bit(Unit.STORE), base=0, **window).bind(offset=source, address=place),
        Store(wait=bit(Unit.LOAD), base=2, mask=ALL, **window).bind(offset=target, address=place),
        Branch(first=left, second=ZERO, destination=1),
        Barrier(),
        LAST,
    ]


@cocotb.test(timeout_time=2, timeout_unit="ms")
@cocotb.parametrize(chance=[0.0, 0.3])
async def loops_over_bound_addresses(dut, chance: float) -> None:
    bench, words = Bench(dut, seed=8, chance=chance), 5
    await bench.reset()
    for count in (7, 3):
        order = bench.random.permutation(count)
        image = bench.random.integers(0, 256, (count, words * WORD), np.uint8)
        image[:, (words - 1) * WORD:][:, :4] = order.astype("<u4").view(np.uint8).reshape(-1, 4)
        await bench.put(IMAGE, image.tobytes())
        program = reversing_program(words)
        assert await bench.run(program, arguments=[count]) == (Status.DONE, 0, len(program) - 1)
        result = np.frombuffer(await bench.get(RESULT, image.nbytes), np.uint8).reshape(image.shape)
        assert (result[order] == image).all()
        assert await bench.read("load_retired") == await bench.read("store_retired") == count


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def illegal_instructions_stop_the_engine(dut) -> None:
    bench = Bench(dut, seed=4)
    await bench.reset()
    first, *rest = copy_program(40)
    for program, unit, index in [
        ([first, bytes(64), LAST], NO_UNIT, 1),  # zeroed memory
        ([first, *rest[:-1]], NO_UNIT, 2),  # no END
        ([first, Load(run=4), LAST], Unit.LOAD, 1),  # no rows
        ([first, first, Store(rows=1, planes=1), LAST], Unit.STORE, 2),
        ([first, Vector(), LAST], Unit.VECTOR, 1),
        ([first, Matrix(), LAST], Unit.MATRIX, 1),
        ([first, Row(), LAST], Unit.ROW, 1),
        ([first, Scalar(target=3), LAST], NO_UNIT, 1),
        ([first, Branch(first=ZERO, literal=1, value=1, destination=3), LAST], NO_UNIT, 1),
    ]:
        assert await bench.run(program) == (Status.ILLEGAL_INSTRUCTION, unit, index)
        await bench.works()


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def bus_errors_stop_the_engine(dut) -> None:
    bench = Bench(dut, seed=5, errors=True)
    await bench.reset()
    good, bad = ({"base": base, "run": 30, "rows": 1, "planes": 1} for base in (0, 3))
    for cls, unit in ((Load, Unit.LOAD), (Store, Unit.STORE)):
        mask = {"mask": ALL} if cls is Store else {}
        program = [cls(**good, **mask), cls(**bad, **mask), LAST]
        assert await bench.run(program) == (Status.BUS_ERROR, unit, 1)
        await bench.works()
    await bench.run([LAST])
    await bench.write("program_address", OUTSIDE)
    await bench.write("control", CONTROL_START)
    assert (await bench.end())[:2] == (Status.BUS_ERROR, NO_UNIT)
    await bench.works()


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def watchdog_and_address_errors_stop_the_engine(dut) -> None:
    bench = Bench(dut, seed=6)
    await bench.reset()
    first, *_ = copy_program(40)
    waiting = Vector(wait=bit(Unit.MATRIX))
    assert await bench.run([first, waiting, LAST], watchdog=600) == (Status.WATCHDOG, Unit.VECTOR, 1)
    assert await bench.read("vector_stall_token") > 400
    await bench.works()
    outside = Load(address=CONFIG.pool_words - 1, run=2, rows=1, planes=1)
    assert (await bench.run([outside, LAST]))[0] == Status.ADDRESS_ERROR
    await bench.works()


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def host_reset_at_any_time(dut) -> None:
    bench = Bench(dut, seed=7)
    await bench.reset()
    program = [item for _ in range(4) for item in copy_program(60)[:2]] + [LAST]
    for moment in range(20, 400, 60):
        await bench.start(program)
        await ClockCycles(dut.clk, moment)
        await bench.works()
