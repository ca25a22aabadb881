"""Programs with registers and loops on the functional device, and how results of layers are put together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.kit.looped import COUNT, MOST, OUTPUTS, Looped
from weft.arch.config import load_config
from weft.arch.errors import EngineFault, ModelError
from weft.arch.isa import Branch, Matrix, Read, Row, RowOp, Unit
from weft.arch.program import Layer, Program, Segment
from weft.sim.functional import FunctionalDevice
from weft.sim.results import LayerResults, TokenResults, results_of

TEST = load_config("test")
CHOICE = np.random.default_rng(1).integers(0, 5, MOST)


@pytest.fixture(scope="module")
def looped() -> Looped:
    return Looped.random(TEST)


@pytest.fixture(scope="module")
def program(looped) -> Program:
    return looped.program()


def loaded(program: Program, trace: bool = False) -> FunctionalDevice:
    device = FunctionalDevice(TEST, trace)
    device.load(program)
    device.write_segment(Segment.INPUT, 0, CHOICE.astype("<u4").tobytes())
    return device


@pytest.mark.parametrize("first, count", [(0, 1), (0, MOST), (3, 5)])
def test_a_loop_over_tokens(looped, program, first, count):
    device = loaded(program)
    counters = device.start((first, count)).counters
    expected = looped.expected(CHOICE[first : first + count])
    assert {name: codes.shape for name, codes in device.layers.items()} == {
        "sum": (count, 32), "codes": (count, 32), "result": (count, OUTPUTS)}
    for name, codes in expected.items():
        assert device.layers[name].dtype == np.int32 and np.array_equal(device.layers[name], codes)
    raw = np.frombuffer(device.read_segment(Segment.OUTPUT, 0, 64 * MOST), np.uint8).reshape(MOST, 2, 32)
    stored = raw[:, 0, :OUTPUTS].astype(np.int64) | raw[:, 1, :OUTPUTS].view(np.int8).astype(np.int64) << 8
    assert np.array_equal(stored[first : first + count], expected["result"])
    assert not raw[:first].any() and not raw[first + count :].any()
    around, body = 7, 12  # instructions outside and inside the loop, those of the dispatcher included
    assert around + body == len(program.instructions)
    assert counters == {
        "load_retired": 2 + count, "store_retired": count, "matrix_retired": count, "row_retired": 2 * count,
        "vector_retired": 0, "bytes_written": 64 * count,
        "bytes_read": 64 * (around + body * count) + 4 * count + 32 * (6 + 2 + 2 * count)}


def test_steps_are_the_run_one_instruction_at_a_time(program):
    whole = loaded(program, trace=True)
    trace = whole.start((0, 4)).trace
    device = loaded(program)
    before = device.layers
    steps = device.steps((0, 4))
    index, instruction, log = next(steps)
    assert (index, instruction.unit, len(log)) == (0, Unit.LOAD, 6) and device.layers is before
    written = {unit: [] for unit in trace.writes}
    for index, instruction, log in steps:
        assert not instruction.bindings() and type(instruction) is type(list(program.decoded())[index])
        if log is not None:
            written[instruction.unit].append(log.address)
    assert index == len(program.instructions) - 1
    assert all(np.array_equal(np.concatenate(addresses), trace.writes[unit].address[6 * (unit == Unit.LOAD) :])
               for unit, addresses in written.items() if addresses)
    assert device.counters == whole.counters
    assert all(np.array_equal(codes, whole.layers[name]) for name, codes in device.layers.items())
    with pytest.raises(ModelError, match="no Program is loaded"):
        FunctionalDevice(TEST).steps()


def edited(program: Program, kind: type, **fields) -> Program:
    index, instruction = next((n, i) for n, i in enumerate(program.decoded()) if type(i) is kind)
    rows = program.instructions.copy()
    rows[index] = np.frombuffer(replace(instruction, **fields).encode(), np.uint8)
    return replace(program, instructions=rows)


def test_faults_of_the_dispatcher(program):
    for other, match in ((edited(program, Read, offset=2), "READ of byte 2 of segment 2"),
                         (edited(program, Read, base=9), "READ of byte 0 of segment 9"),
                         (edited(program, Read, offset=1 << 24), "outside the"),
                         (edited(program, Branch, second=30), "register 30 is read before"),
                         (edited(program, Branch, second=COUNT, literal=1, value=99, destination=9999), "no END")):
        with pytest.raises(EngineFault, match=match):
            loaded(other).start((0, 2))


# Results of layers


def layer(unit: str, channel_of: tuple[int, ...], name: str = "x") -> Layer:
    return Layer(name, unit, name, unit, 0, 1, max(channel_of) + 1, channel_of, False)


def results(program: Program, *layers: Layer, parts: tuple[int, ...] = (0,)) -> TokenResults:
    return TokenResults(replace(program, layers=layers, first_part=np.array(parts)))


def test_which_results(program):
    assert isinstance(results_of(program), TokenResults)
    assert isinstance(results_of(replace(program, language=None)), LayerResults)


def test_parts_and_rows_of_token_results(program):
    """Parts in any order, padding left out; columns are further positions; rows of a part are appended."""
    order = (7, 2, -1, 0, 3, 1, 5, 6, 4, 8, -1, 9)
    token = results(program, layer("matrix", order), parts=(0, 1, 2))
    values = np.random.default_rng(0).integers(-999, 999, (5, 12))
    for rows in (slice(0, 2), slice(2, 5)):
        for part in (2, 0, 1):
            token.add(part, Matrix(tag=0, tiles=1), values[rows, None, 4 * part : 4 * part + 4])
    expected = np.stack([values[:, order.index(channel)] for channel in range(10)], axis=1)
    assert np.array_equal(token.complete()["x"], expected)
    together = results(program, layer("matrix", order))
    together.add(0, Matrix(tag=0, tiles=1), values.reshape(5, 3, 4))  # three columns of a tile
    assert np.array_equal(together.complete()["x"], expected)


def test_rows_of_the_row_unit(program):
    token = results(program, layer("row", tuple(range(128))), layer("row", (0, 1), "answer"), parts=(0, 2, 0))
    values = np.random.default_rng(0).integers(-(1 << 15), 1 << 15, (3, 128))
    token.add(1, Row(tag=0, operation=RowOp.QUANTIZE), values[:, 64:].reshape(3, 2, 32))
    token.add(0, Row(tag=0, operation=RowOp.QUANTIZE), values[:, :64].reshape(3, 1, 64))
    for number in range(3):
        token.add(2, Row(tag=1, operation=RowOp.ARGMAX), np.array([[[number - 1, 100 + number]]]))
    token.add(0, Matrix(tag=0), np.zeros((1, 1, 4)))  # not the layer's unit
    assert np.array_equal(token.complete()["x"], values)
    assert token.complete()["answer"].tolist() == [[-1, 100], [0, 101], [1, 102]]


def test_incomplete_token_results(program):
    token = results(program, layer("matrix", tuple(range(8))), parts=(0, 1, 2))
    assert token.complete() == {}  # a layer that the run did not reach
    token.add(0, Matrix(tag=0), np.zeros((2, 1, 4)))
    with pytest.raises(EngineFault, match="channel 4 of 'x' was computed for 0 rows, others for 2"):
        token.complete()
    with pytest.raises(EngineFault, match=r"instruction 2 computes places 8\.\.11, outside layer 'x'"):
        token.add(2, Matrix(tag=0), np.zeros((2, 1, 4)))
    with pytest.raises(EngineFault, match="tag 1, the Program has 1 layers"):
        token.add(0, Matrix(tag=1), np.zeros((2, 1, 4)))
