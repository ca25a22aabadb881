"""Dispatcher with four stub units: order, tokens, END, faults."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import deque

import pytest

from tests.kit.streams import NONE, Waits, run, simulator
from weft.arch.config import load_config
from weft.arch.isa import End, Instruction, Load, Matrix, Store, Unit, Vector
from weft.arch.registers import Status
from weft.hw.dispatch import NO_UNIT, UNIT_CLASSES, Dispatch

CONFIG = dataclasses.replace(load_config("test"), token_bits=6)
NAMES = [unit.name.lower() for unit in Unit]


def word(instruction: Instruction) -> int:
    return int.from_bytes(instruction.encode(), "little")


def named(mask: int) -> list[Unit]:
    return [unit for unit in Unit if mask >> unit & 1]


class Units:
    """Four stub units with random pace; checks that no token is used before it was given."""

    def __init__(self, dut: Dispatch, program: list[Instruction], waits: Waits, in_unit: int = 3) -> None:
        self.ports = [getattr(dut, name) for name in NAMES]
        self.waits, self.in_unit = waits, in_unit
        self.queues = {unit: deque(item for item in program if item.unit == unit) for unit in Unit}
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
                    item = self.queues[unit].popleft()
                    assert sampled[2 * unit + 1].as_bits() == word(item)
                    for producer in named(item.wait):
                        self.tokens[producer, unit] -= 1
                        assert self.tokens[producer, unit] >= 0, f"{item} took a token that nobody gave"
                    self.held[unit].append(item)
                    self.started.append(item)
            for unit in Unit:
                if done[unit]:
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


def bench(program: list[Instruction | int], waits: Waits = NONE, config=CONFIG, length: int | None = None, watchdog=0):
    dut = Dispatch(config)
    sim = simulator(dut)
    units = Units(dut, [item for item in program if isinstance(item, Instruction)], waits)
    words = [item if isinstance(item, int) else word(item) for item in program]

    async def settings(ctx) -> None:
        ctx.set(dut.length, len(program) if length is None else length)
        ctx.set(dut.watchdog, watchdog)

    async def feed(ctx) -> None:
        for item in words:
            await waits(ctx)
            ctx.set(dut.program.payload, item)
            ctx.set(dut.program.valid, 1)
            taken = False
            while not taken:  # END never is, and an asynchronous iterator in a background bench could not be closed
                *_, taken = await ctx.tick().sample(dut.program.ready)
            ctx.set(dut.program.valid, 0)

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
    everybody = [Load, Store, Matrix]
    program = [*(cls(signal=1 << Unit.VECTOR) for cls in everybody), Vector(wait=0b0111), End()]
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
    assert len(units.started) == 4


def test_token_stall_is_seen_while_the_unit_is_idle():
    dut, sim, units = bench([Vector(wait=1 << Unit.MATRIX)])
    levels: list[int] = []

    async def watch(ctx) -> None:
        for _ in range(40):
            *_, level = await ctx.tick().sample(dut.token_stall)
            levels.append(level)

    sim.add_testbench(watch)
    run(sim)
    assert set(levels[:2]) == {0} and set(levels[8:]) == {1 << Unit.VECTOR}
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
    dut = Dispatch(CONFIG)
    sim = simulator(dut)

    async def end(ctx) -> None:
        ctx.set(dut.program.payload, word(End()))
        ctx.set(dut.program.valid, 1)
        await ctx.tick().until(dut.finished)

    sim.add_testbench(end)
    run(sim, cycles=10)
