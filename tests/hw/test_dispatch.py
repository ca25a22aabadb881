"""Dispatcher with stub units: order, tokens, END, faults; registers, jumps and bindings against arch/control.py."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import deque

import pytest
from amaranth.hdl import Module
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from tests.kit.axi import AXIMemory
from tests.kit.streams import NONE, Waits, run, simulator
from weft.arch.config import load_config
from weft.arch.control import dispatched
from weft.arch.isa import (
    ARGUMENTS,
    BINDING_LOW,
    BINDINGS,
    INSTRUCTION_BYTES,
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
    decode,
)
from weft.arch.registers import SEGMENTS, Status
from weft.hw.axi import AXI4
from weft.hw.dispatch import NO_UNIT, UNIT_CLASSES, Dispatch
from weft.hw.dma import MemoryPort
from weft.hw.fetch import Fetch
from weft.hw.interfaces import UnitPort

CONFIG = dataclasses.replace(load_config("test"), token_bits=6)
NAMES = [unit.name.lower() for unit in Unit]


def word(instruction: Instruction) -> int:
    return int.from_bytes(instruction.encode(), "little")


def declared(cls: type[Instruction]) -> int:
    """The bits of the instruction word that mean something to a unit."""
    return sum((1 << item.metadata["width"]) - 1 << item.metadata["low"]
               for item in dataclasses.fields(cls) if not item.name.startswith("bind"))


def named(mask: int) -> list[Unit]:
    return [unit for unit in Unit if mask >> unit & 1]


class Units:
    """Stub units with random pace; checks that no token is used before it was given, nor a BARRIER ignored."""

    def __init__(self, dut: Dispatch, program: list[Instruction], waits: Waits, in_unit: int = 3) -> None:
        self.ports = [getattr(dut, name) for name in NAMES]
        self.waits, self.in_unit = waits, in_unit
        self.queues: dict[Unit, deque[tuple[int, Instruction]]] = {unit: deque() for unit in Unit}
        count = fence = 0  # instructions for units so far, and up to the last BARRIER
        for item in program:
            if item.unit is not None:
                self.queues[item.unit].append((fence, item))
                count += 1
            elif isinstance(item, Barrier):
                fence = count
        self.done = 0
        self.tokens = dict.fromkeys(itertools.product(Unit, Unit), 0)
        self.held: dict[Unit, deque[Instruction]] = {unit: deque() for unit in Unit}
        self.started: list[Instruction] = []
        self.paused: set[Unit] = set()  # units that accept nothing

    async def serve(self, ctx) -> None:
        signals = [signal for port in self.ports for signal in (port.instruction.valid, port.instruction.payload)]
        while True:
            ready, done = {}, {}
            for unit, port in zip(Unit, self.ports, strict=True):
                ready[unit] = unit not in self.paused and len(self.held[unit]) < self.in_unit and not self.waits.now()
                done[unit] = bool(self.held[unit]) and not self.waits.now()
                ctx.set(port.instruction.ready, ready[unit])
                ctx.set(port.done, done[unit])
                ctx.set(port.busy, bool(self.held[unit]))
            sampled = (await ctx.tick().sample(*signals))[2:]
            for unit in Unit:
                if sampled[2 * unit] and ready[unit]:
                    fence, item = self.queues[unit].popleft()
                    assert (sampled[2 * unit + 1].as_bits() ^ word(item)) & declared(type(item)) == 0
                    assert self.done >= fence, f"{item} did not wait for a BARRIER"
                    for producer in named(item.wait):
                        self.tokens[producer, unit] -= 1
                        assert self.tokens[producer, unit] >= 0, f"{item} took a token that nobody gave"
                    self.held[unit].append(item)
                    self.started.append(item)
            for unit in Unit:
                if done[unit]:
                    self.done += 1
                    for consumer in named(self.held[unit].popleft().signal):
                        self.tokens[unit, consumer] += 1


def random_program(seed: int, length: int) -> list[Instruction]:
    """Instructions that take tokens, of other units and their own, only from instructions before them."""
    rng, tokens, program = random.Random(seed), dict.fromkeys(itertools.product(Unit, Unit), 0), []
    for tag in range(length):
        unit = rng.choice(list(Unit))
        wait = sum(1 << producer for producer in Unit if tokens[producer, unit] and rng.random() < 0.7)
        signal = rng.getrandbits(len(Unit))
        for producer in named(wait):
            tokens[producer, unit] -= 1
        for consumer in named(signal):
            tokens[unit, consumer] += 1
        program.append(UNIT_CLASSES[unit](wait=wait, signal=signal, tag=tag))
    return program


def bench(program: list[Instruction | int], waits: Waits = NONE, config=CONFIG, length: int | None = None, watchdog=0,
          expected: list[Instruction] | None = None):
    """Dispatcher, units, and a program; `expected` is what is dispatched, if not the program as it stands."""
    dut = Dispatch(config)
    sim = simulator(dut)
    units = Units(dut, expected or [item for item in program if isinstance(item, Instruction)], waits)
    words = [item if isinstance(item, int) else word(item) for item in program]

    async def settings(ctx) -> None:
        ctx.set(dut.length, len(program) if length is None else length)
        ctx.set(dut.watchdog, watchdog)

    async def feed(ctx) -> None:  # no asynchronous iterator in a background bench: it could not be closed
        place = 0
        while True:
            await waits(ctx)
            ctx.set(dut.program.valid, place < len(words))
            if place < len(words):
                ctx.set(dut.program.payload, words[place])
            *_, jump, destination, taken = await ctx.tick().sample(dut.jump, dut.destination, dut.program.ready)
            while not jump and not (taken and place < len(words)):
                *_, jump, destination, taken = await ctx.tick().sample(dut.jump, dut.destination, dut.program.ready)
            ctx.set(dut.program.valid, 0)
            place = destination if jump else place + 1

    sim.add_testbench(settings)
    sim.add_testbench(units.serve, background=True)
    sim.add_testbench(feed, background=True)
    return dut, sim, units


def until_fault(sim, dut) -> list:
    seen: list = []

    async def watch(ctx) -> None:
        *_, fault = await ctx.tick().sample(dut.fault).until(dut.fault_valid)
        seen.extend((fault.status, fault.unit, fault.index))

    sim.add_testbench(watch)
    return seen


@pytest.mark.parametrize("seed", range(4))
def test_random_programs_run_to_their_end(seed):
    program = random_program(seed, 60)
    dut, sim, units = bench([*program, End()], Waits(seed, (0.0, 0.2, 0.5, 0.8)[seed]))

    async def finish(ctx) -> None:
        fault, index = await ctx.tick().sample(dut.fault_valid, dut.index).until(dut.finished)
        assert not fault and index == len(program)
        assert len(units.started) == len(program) and not any(units.held.values())

    sim.add_testbench(finish)
    run(sim)


def test_token_lets_its_consumer_start_in_the_next_cycle():
    dut, sim, units = bench([Load(signal=1 << Unit.VECTOR), Vector(wait=1 << Unit.LOAD)])

    async def watch(ctx) -> None:
        await ctx.tick().until(dut.load.done)
        assert ctx.get(dut.vector.instruction.valid)

    sim.add_testbench(watch)
    run(sim)
    assert units.started


def test_full_counter_delays_tokens_and_loses_none():
    count, most = 10, 3
    program = [*(Load(signal=1 << Unit.VECTOR | 1 << Unit.STORE) for _ in range(count)),
               *(Store(wait=1 << Unit.LOAD) for _ in range(count - most)),
               *(Vector(wait=1 << Unit.LOAD) for _ in range(count))]
    config = dataclasses.replace(CONFIG, token_bits=2, queue_depth=16)
    dut, sim, units = bench([*program, End()], config=config)
    units.paused |= {Unit.VECTOR, Unit.STORE}

    async def watch(ctx) -> None:
        await ctx.tick().repeat(100)
        assert not ctx.get(dut.finished)
        retired = count - len(units.queues[Unit.LOAD])
        assert most < retired < count  # the counter is full, and instructions behind it wait
        units.paused.remove(Unit.STORE)
        await ctx.tick().repeat(50)
        # the instruction whose token for VECTOR is held back has given the one for STORE
        assert len(units.queues[Unit.STORE]) == count - most - (most + 1)
        units.paused.remove(Unit.VECTOR)
        await ctx.tick().until(dut.finished)

    sim.add_testbench(watch)
    run(sim)


def test_several_units_done_in_one_cycle():
    everybody = [Load, Store, Matrix, Row]
    program = [*(cls(signal=1 << Unit.VECTOR) for cls in everybody), Vector(wait=0b10111), End()]
    dut, sim, units = bench(program)
    units.in_unit = 0

    async def watch(ctx) -> None:
        await ctx.tick().repeat(30)
        for cls in everybody:
            assert ctx.get(getattr(dut, cls.__name__.lower()).instruction.valid)
        units.in_unit = 1
        await ctx.tick().until(dut.finished)

    sim.add_testbench(watch)
    run(sim)
    assert len(units.started) == 5


def test_token_stall_is_seen_while_the_unit_is_idle():
    dut, sim, units = bench([Vector(wait=1 << Unit.MATRIX)])
    levels: list[int] = []

    async def watch(ctx) -> None:
        for _ in range(40):
            *_, level = await ctx.tick().sample(dut.token_stall)
            levels.append(level)

    sim.add_testbench(watch)
    run(sim)
    assert set(levels[:2]) == {0} and set(levels[20:]) == {1 << Unit.VECTOR}
    assert not units.started


@pytest.mark.parametrize("program, length, expected", [
    ([Load(), Load(), 0], 4, (Status.ILLEGAL_INSTRUCTION, NO_UNIT, 2)),
    ([15], 1, (Status.ILLEGAL_INSTRUCTION, NO_UNIT, 0)),
    ([Load(), Store()], 2, (Status.ILLEGAL_INSTRUCTION, NO_UNIT, 2)),  # no END
    ([], 0, (Status.ILLEGAL_INSTRUCTION, NO_UNIT, 0)),
])
def test_illegal_programs(program, length, expected):
    dut, sim, _ = bench(program, length=length)
    seen = until_fault(sim, dut)
    run(sim)
    assert tuple(seen) == expected


def test_refused_instruction_is_the_one_accepted_last():
    dut, sim, units = bench([Load(), Vector(), Vector(), Load(), Vector(), Vector()], length=9)
    units.in_unit, units.waits = 2, Waits(chance=0.0)
    seen = until_fault(sim, dut)

    async def refuse(ctx) -> None:
        while len(units.started) < 6:
            await ctx.tick()
        ctx.set(dut.vector.illegal, 1)
        await ctx.tick()

    sim.add_testbench(refuse)
    run(sim)
    assert seen == [Status.ILLEGAL_INSTRUCTION, Unit.VECTOR, 5]


@pytest.mark.parametrize("line, status, unit, index", [
    ("fetch_error", Status.BUS_ERROR, NO_UNIT, 4),
    ("load_error", Status.BUS_ERROR, Unit.LOAD, 2),
    ("store_error", Status.BUS_ERROR, Unit.STORE, 1),
    ("address_error", Status.ADDRESS_ERROR, Unit.STORE, 1),
    (None, Status.WATCHDOG, Unit.STORE, 1),
])
def test_faults_name_the_oldest_unfinished_instruction(line, status, unit, index):
    program = [Load(), Store(wait=1 << Unit.MATRIX), Load(wait=1 << Unit.MATRIX), Vector(wait=1 << Unit.STORE)]
    dut, sim, _ = bench(program, length=9, watchdog=60 if line is None else 0)
    seen = until_fault(sim, dut)

    async def cause(ctx) -> None:
        await ctx.tick().repeat(40)
        if line is not None:
            ctx.set(getattr(dut, line), 1)
            await ctx.tick()

    sim.add_testbench(cause)
    run(sim)
    assert seen == [status, unit, index]


def test_watchdog_counts_from_the_last_instruction_finished():
    dut, sim, units = bench([Load() for _ in range(12)], length=99, watchdog=60, waits=Waits(1, 0.5))
    seen = until_fault(sim, dut)
    run(sim)
    assert seen == [Status.WATCHDOG, NO_UNIT, 12] and len(units.started) == 12


def test_instruction_is_held_until_its_queue_has_room():
    dut, sim, units = bench([Load() for _ in range(40)], length=99)
    units.paused.add(Unit.LOAD)

    async def watch(ctx) -> None:
        await ctx.tick().repeat(80)
        assert CONFIG.queue_depth <= ctx.get(dut.index) <= CONFIG.queue_depth + 1
        units.paused.clear()
        while units.queues[Unit.LOAD]:
            await ctx.tick()

    sim.add_testbench(watch)
    run(sim)


def test_end_alone_finishes_at_once():
    dut, sim, _ = bench([End()])

    async def end(ctx) -> None:
        await ctx.tick().until(dut.finished)

    sim.add_testbench(end)
    run(sim, cycles=16)


def set_register(number: int, value: int) -> Scalar:
    return Scalar(operation=ScalarOp.ADD, target=number, first=ZERO, literal=1, value=value)


def test_the_oldest_instruction_is_told_by_its_order_not_by_its_place():
    program = [
        set_register(8, 0),
        Branch(first=8, literal=1, value=1, destination=3),
        Store(wait=1 << Unit.MATRIX),  # in the second round only
        Load(wait=1 << Unit.MATRIX),
        Scalar(operation=ScalarOp.ADD, target=8, first=8, literal=1, value=1),
        Branch(first=8, literal=1, value=2, destination=1),
        End(),
    ]
    dut, sim, _ = bench(program, watchdog=100)
    seen = until_fault(sim, dut)
    run(sim)
    assert seen == [Status.WATCHDOG, Unit.LOAD, 3]


FORBIDDEN = [
    *(Scalar(operation=ScalarOp.ADD, target=target, first=ZERO, second=ZERO) for target in (0, ARGUMENTS - 1, ZERO)),
    *(Scalar(operation=operation, target=9, first=ZERO, second=ZERO) for operation in (len(ScalarOp), 15)),
    Read(target=ARGUMENTS - 1, first=ZERO),
    Read(target=ZERO, first=ZERO),
    Read(target=9, first=ZERO, base=SEGMENTS),
    Read(target=9, first=ZERO, offset=6),
    Branch(first=ZERO, literal=1, value=1, destination=3),
    Branch(first=ZERO, literal=1, value=1, destination=(1 << 32) - 1),
]


@pytest.mark.parametrize("instruction", FORBIDDEN, ids=lambda item: item.listing().replace(" ", ","))
def test_forbidden_instructions_of_the_dispatcher(instruction):
    dut, sim, _ = bench([Load(), instruction, End()])
    seen = until_fault(sim, dut)
    run(sim)
    assert seen == [Status.ILLEGAL_INSTRUCTION, NO_UNIT, 1]


def test_a_branch_not_taken_may_name_any_destination():
    dut, sim, _ = bench([Branch(first=ZERO, literal=1, value=0, destination=99), End()])

    async def finish(ctx) -> None:
        fault, index = await ctx.tick().sample(dut.fault_valid, dut.index).until(dut.finished)
        assert not fault and index == 1

    sim.add_testbench(finish)
    run(sim)


@pytest.mark.parametrize("body", [[], [Scalar(operation=ScalarOp.MULTIPLY, target=8, first=ZERO, literal=1, value=3)]])
def test_the_watchdog_ends_a_loop_without_work(body):
    forever = Branch(first=ZERO, literal=1, value=1, destination=1)
    dut, sim, _ = bench([Load(), *body, forever, End()][: 3 + len(body)], watchdog=200)
    seen = until_fault(sim, dut)
    run(sim)
    assert seen[:2] == [Status.WATCHDOG, NO_UNIT] and 1 <= seen[2] <= 1 + len(body)


def shown(registers: range) -> list[Load]:
    """Instructions that bring the registers to a unit, three at a time."""
    return [Load().bind(**dict(zip(("offset", "row_bytes", "plane_bytes"), registers[start:start + 3], strict=False)))
            for start in range(0, len(registers), 3)]


EDGES = [0, 1, -1, 31, 32, 65_535, 65_536, 0x1234_5678, -0x1234_5678, (1 << 31) - 1, -1 << 31]


@pytest.mark.parametrize("operation", ScalarOp)
def test_every_scalar_operation(operation):
    program = [set_register(8 + number, value) for number, value in enumerate(EDGES)]
    for first, literal in itertools.product(range(8, 8 + len(EDGES)), (0, 1)):
        for target, (second, value) in enumerate(enumerate(EDGES, 8), 19):
            program.append(Scalar(operation=operation, target=target, first=first, second=second, literal=literal,
                                  value=value if literal else 7))
        program += shown(range(19, 30))
    program.append(End())
    expected = [item for _, item in dispatched(program.__getitem__, len(program), [], lambda *_: 0)]
    dut, sim, units = bench(program, expected=expected)

    async def finish(ctx) -> None:
        await ctx.tick().until(dut.finished)

    sim.add_testbench(finish)
    run(sim)
    assert len(units.started) == len(expected) - 1


def test_barrier_waits_for_all_that_was_dispatched():
    dut, sim, units = bench([Load(), Row(), Barrier(), Vector(), End()])
    units.in_unit = 0

    async def watch(ctx) -> None:
        for count, unit in enumerate((Unit.LOAD, Unit.ROW)):
            await ctx.tick().repeat(40)
            assert ctx.get(dut.index) == 2 and units.done == count
            assert not ctx.get(dut.vector.instruction.valid)
            units.paused = set(Unit) - {unit}
            units.in_unit = 1
        await ctx.tick().repeat(5)
        units.paused = set()
        await ctx.tick().until(dut.finished)

    sim.add_testbench(watch)
    run(sim)
    assert len(units.started) == 3


@pytest.mark.parametrize("instruction, cycles", [
    (Load(), 1),
    (Load().bind(address=3), 3),
    (Load().bind(address=3, offset=4, run=5, rows=6), 6),
    (set_register(9, 5), 2),
    (Scalar(operation=ScalarOp.MULTIPLY, target=9, first=1, second=2), 3),
    (Branch(first=ZERO, literal=1, value=0), 2),
])
def test_cycles_of_an_instruction(instruction, cycles):
    count = 6
    dut, sim, _ = bench([instruction] * count, length=99)
    moments: list[int] = []

    async def watch(ctx) -> None:
        for cycle in range(60):
            *_, index = await ctx.tick().sample(dut.index)
            if index == len(moments) + 1:
                moments.append(cycle)

    sim.add_testbench(watch)
    run(sim)
    assert [after - before for before, after in itertools.pairwise(moments)] == [cycles] * (count - 1)


class Machine(wiring.Component):
    """Dispatcher, fetch and memory port, without a soft reset."""

    def __init__(self, config, segments: list[int]) -> None:
        self._config, self._segments = config, segments
        super().__init__({
            **{unit.name.lower(): Out(UnitPort(cls)) for unit, cls in UNIT_CLASSES.items()},
            "address": In(config.address_bits),
            "length": In(32),
            "arguments": In(data.ArrayLayout(32, ARGUMENTS)),
            "finished": Out(1),
            "fault_valid": Out(1),
            "index": Out(32),
            "bus": Out(AXI4(config.bus_bytes, config.address_bits)),
        })

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.fetch = fetch = Fetch(self._config)
        m.submodules.dispatch = dispatch = Dispatch(self._config)
        m.submodules.memory = memory = MemoryPort(self._config)
        connect(m, fetch.memory, memory.fetch)
        connect(m, fetch.instruction, dispatch.program)
        connect(m, dispatch.read, fetch.read)
        connect(m, fetch.answer, dispatch.answer)
        connect(m, memory.bus, flipped(self.bus))
        for name in NAMES:
            connect(m, getattr(dispatch, name), flipped(getattr(self, name)))
        m.d.comb += [
            fetch.jump.eq(dispatch.jump),
            fetch.destination.eq(dispatch.destination),
            fetch.address.eq(self.address),
            fetch.length.eq(self.length),
            dispatch.length.eq(self.length),
            dispatch.arguments.eq(self.arguments),
            dispatch.fetch_error.eq(fetch.error),
            self.finished.eq(dispatch.finished),
            self.fault_valid.eq(dispatch.fault_valid),
            self.index.eq(dispatch.index),
            *(fetch.segments[number].eq(address) for number, address in enumerate(self._segments)),
        ]
        return m


SEGMENT_BYTES, PROGRAM = 256, 4096 - 3 * INSTRUCTION_BYTES


class Programs:
    """Random programs that end: nested loops, branches forward, everything bound to registers of any value."""

    counters = (28, 29, 30)  # registers of loops, by depth
    general = range(ARGUMENTS, 28)

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.program: list[Instruction] = []

    def make(self) -> list[Instruction]:
        self.program = [set_register(number, self.value()) for number in self.general]
        self.block(0)
        self.loop(0)
        self.program += shown(self.general)
        self.program.append(End())
        return self.program

    def value(self) -> int:
        rng = self.random
        return rng.choice([rng.randrange(-1 << 31, 1 << 31), rng.randrange(-40, 40), -1 << 31, (1 << 31) - 1])

    def block(self, depth: int) -> None:
        for _ in range(self.random.randint(3, 6)):
            kind = self.random.choices(
                [self.unit, self.pair, self.scalar, self.read, self.barrier, self.skip, self.loop],
                [8, 2, 5, 2, 2, 2, 2 if depth < len(self.counters) else 0])[0]
            kind(depth)

    def operands(self) -> dict[str, int]:
        rng = self.random
        return {"first": self.any(), "second": self.any(), "literal": rng.getrandbits(1), "value": self.value()}

    def any(self) -> int:
        """A register that may be read."""
        return self.random.choice([*range(ARGUMENTS), *self.general, ZERO])

    def unit(self, depth: int) -> None:
        """Any bits, but for tokens and bindings, under up to four bindings at any places behind the header."""
        rng = self.random
        cls = UNIT_CLASSES[rng.choice(list(Unit))]
        fields = decode((rng.getrandbits(BINDING_LOW) & ~15 | cls.opcode).to_bytes(INSTRUCTION_BYTES, "little"))
        places = range(2, BINDING_LOW // 16)
        binds = {f"bind{slot}": 1 << 11 | rng.getrandbits(1) << 10 | rng.choice(places) << 5 | self.any()
                 for slot in rng.sample(range(BINDINGS), rng.choice([0, 0, 1, 2, 3, 4]))}
        self.program.append(dataclasses.replace(fields, wait=0, signal=0, **binds))

    def pair(self, depth: int) -> None:
        first, second = self.random.choices(list(Unit), k=2)
        self.program += [UNIT_CLASSES[first](signal=1 << second), UNIT_CLASSES[second](wait=1 << first, tag=7)]

    def scalar(self, depth: int) -> None:
        for _ in range(self.random.randint(1, 4)):
            self.program.append(Scalar(operation=self.random.choice(list(ScalarOp)), **self.operands(),
                                       target=self.random.choice(self.general)))

    def read(self, depth: int) -> None:
        """At an address made of a register of any value."""
        rng, target, result = self.random, *self.random.sample(self.general, 2)
        limit = {"target": target, "first": target, "literal": 1}
        self.program += [
            Scalar(operation=ScalarOp.MAXIMUM, value=0, **limit),
            Scalar(operation=ScalarOp.MINIMUM, value=SEGMENT_BYTES // 4 - 3, **limit),
            Scalar(operation=ScalarOp.MULTIPLY, value=4, **limit),
            Read(target=result, first=target, base=rng.randrange(SEGMENTS), offset=rng.choice([0, 8])),
        ]

    def barrier(self, depth: int) -> None:
        self.program.append(Barrier())

    def skip(self, depth: int) -> None:
        place = len(self.program)
        self.program.append(End())  # its place
        for _ in range(self.random.randint(1, 4)):
            self.random.choice([self.unit, self.scalar])(depth)
        self.program[place] = Branch(**self.operands(), destination=len(self.program))

    def loop(self, depth: int) -> None:
        counter, start = self.counters[depth], len(self.program) + 1
        self.program.append(set_register(counter, 0))
        self.block(depth + 1)
        self.program += [Scalar(operation=ScalarOp.ADD, target=counter, first=counter, literal=1, value=1),
                         Branch(first=counter, literal=1, value=self.random.randint(1, 3), destination=start)]


@pytest.mark.parametrize("seed", range(8))
def test_random_loops_dispatch_what_the_reference_does(seed):
    chance, latency = ((0.0, 1), (0.0, 40), (0.3, 5), (0.6, 20))[seed % 4]
    config = dataclasses.replace(CONFIG, bus_bytes=(8, 32)[seed % 2])
    rng = random.Random(seed)
    program = Programs(seed).make()
    arguments = [rng.getrandbits(32) for _ in range(ARGUMENTS)]
    memory = AXIMemory(config, 1 << 15, seed=seed, latency=latency, waits=Waits(seed, chance))
    segments = [(1 << 14) + 1024 * number + 4 * number for number in range(SEGMENTS)]
    raw = b"".join(item.encode() for item in program)
    memory.bytes[PROGRAM:PROGRAM + len(raw)] = list(raw)

    def read(segment: int, offset: int) -> int:
        return int.from_bytes(memory.bytes[segments[segment] + offset:][:4].tobytes(), "little")

    expected = list(dispatched(program.__getitem__, len(program), arguments, read))
    dut = Machine(config, segments)
    sim, units = simulator(dut), Units(dut, [item for _, item in expected], Waits(seed + 1, chance))

    async def settings(ctx) -> None:
        ctx.set(dut.address, PROGRAM)
        ctx.set(dut.length, len(program))
        for number, value in enumerate(arguments):
            ctx.set(dut.arguments[number], value)
        fault, index = await ctx.tick().sample(dut.fault_valid, dut.index).until(dut.finished)
        assert not fault and index == len(program) - 1
        assert not any(units.queues.values()) and not any(units.held.values())

    sim.add_testbench(settings)
    sim.add_testbench(units.serve, background=True)
    sim.add_testbench(memory.serve(dut.bus), background=True)
    run(sim, cycles=100_000)
    assert units.started
    assert all(burst.id == 0 for burst in memory.bursts)
