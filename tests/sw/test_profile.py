"""Where the cycles went: whose they are, layer by layer, in Programs with and without branches."""

import numpy as np
import pytest

from tests.kit.language import random_language, tiny_config
from weft.arch.device import RunResult
from weft.arch.isa import Matrix, Unit
from weft.arch.trace import Trace
from weft.compiler.language import compile_language
from weft.sim.functional import FunctionalDevice
from weft.sim.memory import MemoryModel, parse_memory
from weft.sw.bench import unit_cycles
from weft.sw.language import Session
from weft.sw.profile import (
    NOBODY,
    PRIORITY,
    Executed,
    layer_rows,
    layer_rows_from,
    ownership,
    phase,
    port_bytes_per_cycle,
    run_macs,
    timeline,
)

CLOCK = 250e6


def instructions_of(program, unit):
    return [item for item in program.decoded() if item.unit is unit]


def in_turn(units):
    """A trace in which every instruction takes ten cycles, one after the other, and its cycles."""
    trace, clock = Trace(start={unit: [] for unit in Unit}, retire={unit: [] for unit in Unit}), 5
    for unit in units:
        trace.start[unit].append(clock)
        trace.retire[unit].append(clock + 10)
        clock += 12
    return Trace(*({unit: np.array(times, np.uint64) for unit, times in part.items()}
                   for part in (trace.start, trace.retire))), clock


@pytest.fixture
def timed(program):
    return in_turn(item.unit for item in program.decoded() if item.unit is not None)


def test_every_cycle_belongs_to_one_layer(program, timed):
    trace, cycles = timed
    lengths, layer, worker = ownership(Executed.straight(program, trace), cycles)
    assert lengths.sum() == cycles and layer.min() >= 0 and len(worker) == len(layer)
    rows = layer_rows(program, RunResult({}, {"cycles": cycles}, trace))
    assert sum(row.cycles for row in rows) == cycles
    assert all(sum(row.working.values()) == row.cycles for row in rows)


def test_the_matrix_unit_owns_what_overlaps(program, timed):
    trace, cycles = timed
    trace.start[Unit.LOAD][:], trace.retire[Unit.LOAD][:] = 0, cycles
    lengths, _, worker = ownership(Executed.straight(program, trace), cycles)
    assert lengths[worker == Unit.MATRIX].sum() == 10 * len(instructions_of(program, Unit.MATRIX))
    assert Unit.STORE not in worker  # loads are looked at first


@pytest.mark.parametrize("seed", range(20))
def test_owners_are_those_found_cycle_by_cycle(config, seed):
    rng, cycles, executed, trace = np.random.default_rng(seed), 300, Executed(config), Trace()
    layer, worker = np.full(cycles, -1), np.full(cycles, NOBODY)
    for unit in reversed(PRIORITY):
        count = int(rng.integers(0, 12))
        start = np.sort(rng.integers(0, cycles, count))
        retire = np.maximum.accumulate(np.minimum(start + rng.integers(1, 40, count), cycles))
        executed.tags[unit] = rng.integers(0, 5, count).tolist()
        trace.start[unit], trace.retire[unit] = start.astype(np.uint64), retire.astype(np.uint64)
        for tag, first, last in zip(executed.tags[unit], start, retire, strict=True):
            layer[first:last], worker[first:last] = tag, unit
    waiting = next((tag for tag in layer[::-1] if tag >= 0), 0)
    for cycle in reversed(range(cycles)):
        waiting = layer[cycle] = waiting if layer[cycle] < 0 else layer[cycle]
    executed.observe(trace)
    lengths, found, unit = ownership(executed, cycles)
    assert np.repeat(found, lengths).tolist() == layer.tolist()
    assert np.repeat(unit, lengths).tolist() == worker.tolist()


def test_neighbouring_instructions_of_a_layer_are_one_span(program, timed):
    trace, _ = timed
    spans = timeline(program, trace)
    assert {span.unit for span in spans} <= {unit.name.lower() for unit in Unit}
    assert all(span.start < span.end for span in spans)


def test_unit_cycles_of_a_layer(program, timed):
    trace, _ = timed
    tag = next(i for i, layer in enumerate(program.layers) if layer.name == "operator")
    mine = [item for item in instructions_of(program, Unit.VECTOR) if item.tag == tag]
    assert unit_cycles(program, trace, "operator") == 10 * len(mine)


def test_bytes_agree_with_the_devices_counters(program, functional, image):
    run = functional.run({"image": image})
    rows = layer_rows(program, run)
    assert sum(row.bytes_written for row in rows) == run.counters["bytes_written"]
    assert sum(row.bytes_read for row in rows) == run.counters["bytes_read"] - program.instructions.nbytes


# --- language models ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language(config):
    return compile_language(random_language(tiny_config(head_size=32, rotary=32)), config, 64)


def run(program, *parts):
    """Runs of so many tokens each, one behind the other: (executed, cycles, counters) of the last."""
    session = Session(FunctionalDevice(program.config), program)
    for count in parts:
        executed, units = Executed(program.config), []
        for _, instruction, _ in session.device.steps(session.prepare([1] * count)):
            executed.add(instruction)
            units += [instruction.unit] if instruction.unit is not None else []
        session.lengths[0] += count
    trace, cycles = in_turn(units)
    executed.observe(trace)
    return executed, cycles, dict(session.device.counters)


def test_loops_are_followed(language):
    executed, cycles, _ = run(language, 5)
    assert sum(map(len, executed.tags.values())) > sum(item.unit is not None for item in language.decoded())
    rows = layer_rows_from(language, executed, cycles)
    assert sum(row.cycles for row in rows) == cycles
    units = {row.name: row.unit for row in rows}
    assert units["1.mixer.scores"] == "matrix" and units["1.mixer.probabilities"] == "row"
    assert units["0.mixer.constants"] == "load" and units["1.mixer.key_store"] == "store"


def test_a_trace_in_pieces_is_a_trace(language):
    executed, cycles, _ = run(language, 3)
    whole, pieces = executed.pieces[0], Executed(language.config, executed.tags)
    for first in range(0, cycles, 1000):
        part = [{unit: times[(times >= first) & (times < first + 1000)] for unit, times in side.items()}
                for side in (whole.start, whole.retire)]
        pieces.observe(Trace(*part))
    assert layer_rows_from(language, pieces, cycles) == layer_rows_from(
        language, Executed(language.config, executed.tags, pieces=[whole]), cycles)


def test_useful_products_of_a_run(language):
    executed, *_ = run(language, 7, 3)
    macs = dict(zip((layer.name for layer in language.layers), run_macs(language, executed, 3, 7), strict=True))
    model = tiny_config(head_size=32)
    assert macs["0.feed_forward.gate"] >= 3 * model.width * model.feed_forward  # inputs are filled up to whole words
    assert macs["1.mixer.scores"] == macs["1.mixer.output"] == (8 + 9 + 10) * model.heads * model.head_size
    assert macs["logits"] == next(layer.macs for layer in language.layers if layer.name == "logits")  # of the last
    assert macs["0.mixer.gate"] == 0


def test_the_record_of_a_phase(language):
    executed, cycles, counters = run(language, 7, 3)
    result = RunResult({}, counters | {"cycles": cycles, "simulated_cycles_per_s": 3})
    found = phase(language, executed, result, 3, 7, parse_memory("ddr3"), CLOCK)
    assert (found.tokens, found.position, found.cycles) == (3, 7, cycles)
    assert found.bytes_read == counters["bytes_read"] and found.bytes_written == counters["bytes_written"] > 0
    assert found.bytes_per_token == pytest.approx((found.bytes_read + found.bytes_written) / 3, abs=0.1)
    assert found.tokens_per_s == pytest.approx(3 * CLOCK / cycles, rel=1e-3)
    moved = found.bytes_per_token * 3
    assert found.bandwidth_utilization == pytest.approx(moved / (found.port_bytes_per_cycle * cycles), abs=1e-4)
    wide = {item.tag for item in language.decoded() if isinstance(item, Matrix) and item.wide}
    slots = sum(row.macs * (1 + (row.number in wide)) for row in found.layers)
    assert found.array_efficiency == pytest.approx(slots / (language.config.macs * cycles), abs=1e-4)
    assert found.macs == sum(row.macs for row in found.layers) and "simulated_cycles_per_s" not in found.counters
    assert sum(row.bytes_written for row in found.layers) == found.bytes_written


def test_a_phase_without_time(language):
    executed, _, counters = run(language, 2)
    executed.pieces.clear()
    found = phase(language, executed, RunResult({}, counters), 2, 0, MemoryModel(), CLOCK)
    assert found.cycles == found.tokens_per_s == found.bandwidth_utilization == found.array_efficiency == 0
    assert all(row.cycles == 0 for row in found.layers)


def test_what_the_port_can_move(config):
    bus = config.bus_bytes
    assert port_bytes_per_cycle(config, MemoryModel()) == bus
    assert port_bytes_per_cycle(config, MemoryModel(bytes_per_cycle=bus / 4)) == bus / 4
    assert port_bytes_per_cycle(config, MemoryModel(bytes_per_cycle=4 * bus)) == bus  # no more than the bus is wide
    assert port_bytes_per_cycle(config, MemoryModel(gate_open=3, gate_period=4)) == 0.75 * bus
