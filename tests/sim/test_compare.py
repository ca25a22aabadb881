"""A small Program on the functional device equals the golden operators; every kind of difference is found and named."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.kit.looped import Looped
from weft.arch.config import load_config
from weft.arch.errors import EngineFault, ModelError
from weft.arch.isa import End, Instruction, Load, Matrix, Row, RowLayout, RowOp, Store, Unit, Vector, VectorOp
from weft.arch.program import InputTensor, Layer, OutputTensor, Program, Segment
from weft.arch.trace import Trace, WriteLog
from weft.sim import golden
from weft.sim.compare import StreamingComparison, _index, compare_layers, first_difference
from weft.sim.functional import FunctionalDevice
from weft.sim.machine import Machine
from weft.sim.results import LayerResults

TEST = load_config("test")
SIZE, CHANNELS = 6, 7  # image and feature size, output channels of both layers
CHANNEL_OF = (3, 0, 6, 1, -1, 5, 2, 4)  # by position in the matrix unit's two tiles
LANES_OF = [8 + CHANNEL_OF.index(c) for c in range(CHANNELS)]  # tiles are written from lane 8 on
IMAGE, PACKED, CONSTANTS, FIRST, SECOND = 0, 100, 200, 300, 400  # scratchpad


@dataclass
class Network:
    """A 3x3 convolution of an image (packed, then 1x1) in two strips, then a depthwise 3x3 in two strips."""

    weights: np.ndarray  # [7, 3, 3, 3]
    bias: np.ndarray
    mult: np.ndarray
    depthwise: np.ndarray  # [7, 3, 3]

    def expected(self, image: np.ndarray) -> dict[str, np.ndarray]:
        first = golden.conv2d(image, self.weights, self.bias, golden.Scale(self.mult, 20, 0, 255), pads=(1, 1, 1, 1))
        second = golden.depthwise_conv2d(first, self.depthwise, self.bias, golden.Scale(self.mult, 20, -128, 127),
                                         pads=(1, 1, 1, 1))
        return {"features": first, "result": second}

    def matrix_constants(self) -> tuple[bytes, bytes]:
        """Weights and parameters of the two tiles."""
        weights = np.zeros((2, TEST.lanes, TEST.columns), np.int64)  # [tile, lane, column]: lane = ky*9 + kx*3 + c
        bias, scale = np.zeros((2, 8), "<i4"), np.zeros((2, 8), "<u4")
        descriptors = np.zeros((2, 32), np.uint8)
        for position, channel in enumerate(CHANNEL_OF):
            tile, column = divmod(position, TEST.columns)
            if channel >= 0:
                weights[tile, :27, column] = self.weights[channel].reshape(-1)
                bias[tile, column], scale[tile, column] = self.bias[channel], self.mult[channel] | 20 << 16
            descriptors[tile, 2], descriptors[tile, 4] = 2 + tile, 15
        weights = weights.astype(np.uint8) & 15
        parameters = b"".join(bias[t].tobytes() + scale[t].tobytes() + descriptors[t].tobytes() for t in range(2))
        return (weights[:, ::2] | weights[:, 1::2] << 4).tobytes(), parameters

    def vector_constants(self) -> bytes:
        bias, scale, weights = np.zeros(32, "<i4"), np.zeros(32, "<u4"), np.zeros((9, 32), np.int8)
        bias[LANES_OF], scale[LANES_OF] = self.bias, self.mult | 20 << 16
        weights[:, LANES_OF] = self.depthwise.reshape(CHANNELS, 9).T
        return bias.tobytes() + scale.tobytes() + weights.tobytes()

    def instructions(self) -> list[tuple[Instruction, int]]:
        """With the first output row of each."""
        both = {"columns": SIZE, "rows": 3, "blocks": 1, "stride_x": 1, "stride_y": 1, "target_step_x": 1,
                "target_step_y": 1, "target_pitch": SIZE, "target_ring": SIZE, "height": SIZE, "width": SIZE}
        load, compute = 1 << Unit.LOAD, 1 << Unit.VECTOR
        pack = Vector(**both | {"rows": SIZE}, tag=0, wait=load, signal=1 << Unit.MATRIX, operation=VectorOp.PACK,
                      source=IMAGE, pitch=1, ring=8, window_y=-1, anchor=7, kernel_y=3, kernel_x=1, dilation_y=1,
                      unsigned=1, target=PACKED, pack_bytes=9, pack_stride=3)
        matrix = [Matrix(**both, tag=0, wait=0 if row else compute, signal=compute if row else 0,
                         source=PACKED + row * SIZE, pitch=SIZE, ring=3, window_y=row, kernel_y=1, kernel_x=1,
                         unsigned=1, low=0, high=255, tiles=2, weights=CONSTANTS, parameters=CONSTANTS + 4,
                         target=FIRST, target_anchor=row)
                  for row in (0, 3)]
        vector = [Vector(**both, tag=1, wait=1 << Unit.MATRIX if row else 0, signal=0 if row else 1 << Unit.STORE,
                         operation=VectorOp.MULTIPLY, source=FIRST, pitch=SIZE, ring=SIZE, window_y=row - 1,
                         anchor=(row - 1) % SIZE, kernel_y=3, kernel_x=3, dilation_y=1, dilation_x=1, pad_x=1,
                         unsigned=1, low=-128, high=127, parameters=CONSTANTS + 10, target=SECOND, target_anchor=row)
                  for row in (3, 0)]
        return [
            (Load(tag=0, base=0, address=CONSTANTS, run=27, rows=1, planes=1), 0),
            (Load(tag=0, signal=compute, base=2, address=IMAGE, run=1, rows=SIZE, planes=1, row_words=1, row_bytes=32),
             0),
            (pack, 0), (matrix[0], 0), (matrix[1], 3), (vector[0], 3), (vector[1], 0),
            (Store(tag=1, wait=compute, base=3, address=SECOND, run=36, rows=1, planes=1, mask=(1 << 32) - 1), 0),
            (End(), 0),
        ]

    def program(self) -> Program:
        code = self.instructions()
        constants = b"".join([*self.matrix_constants(), self.vector_constants()])
        lanes = tuple(CHANNEL_OF[lane - 8] if 8 <= lane < 16 else -1 for lane in range(32))
        return Program(
            config=TEST, fingerprint=TEST.fingerprint, model="small",
            instructions=np.array([np.frombuffer(i.encode(), np.uint8) for i, _ in code]),
            constants=np.frombuffer(constants, np.uint8), first_row=np.array([row for _, row in code], np.int32),
            first_part=np.zeros(len(code), np.int32), segment_bytes=(len(constants), 0, 32 * SIZE, 32 * SIZE * SIZE),
            inputs=(InputTensor("image", 0, SIZE, SIZE, 3, 32, 1, True, 1.0),),
            outputs=(OutputTensor("result", 0, SIZE, SIZE, 32, tuple(LANES_OF), False, 1.0),),
            layers=(Layer("stem", "Conv", "features", "matrix", SIZE, SIZE, CHANNELS, CHANNEL_OF, True),
                    Layer("depth", "Conv", "result", "vector", SIZE, SIZE, CHANNELS, lanes, False)),
        )


@pytest.fixture(scope="module")
def network() -> Network:
    rng = np.random.default_rng(5)
    return Network(rng.integers(-8, 8, (CHANNELS, 3, 3, 3)), rng.integers(-500, 500, CHANNELS),
                   rng.integers(1 << 15, 1 << 16, CHANNELS), rng.integers(-9, 9, (CHANNELS, 3, 3)))


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(6).integers(0, 256, (SIZE, SIZE, 3))


@pytest.fixture(scope="module")
def program(network) -> Program:
    return network.program()


@pytest.fixture(scope="module")
def device(program, image) -> FunctionalDevice:
    device = FunctionalDevice(TEST, trace=True)
    device.load(program)
    return device


@pytest.fixture(scope="module")
def result(device, image):
    return device.run({"image": image})


# The functional device


def test_layers_and_outputs_equal_the_golden_operators(network, image, device, result):
    expected = network.expected(image)
    assert len(np.unique(expected["features"])) > 20 and len(np.unique(expected["result"])) > 20
    assert compare_layers(expected, device.layers) is None
    assert all(codes.dtype == np.int16 for codes in device.layers.values())
    assert np.array_equal(result.outputs["result"], expected["result"])


def test_counters(result):
    assert result.counters == {
        "load_retired": 2, "store_retired": 1, "matrix_retired": 2, "vector_retired": 3, "row_retired": 0,
        "bytes_read": 9 * 64 + (27 + SIZE) * 32, "bytes_written": SIZE * SIZE * 32}
    assert result.cycles == 0


def test_trace_is_there_only_when_asked_for(program, image, result):
    assert [len(result.trace.writes[unit]) for unit in (Unit.LOAD, Unit.MATRIX, Unit.VECTOR)] == [33, 72, 72]
    silent = FunctionalDevice(TEST)
    silent.load(program)
    again = silent.run({"image": image})
    assert again.trace is None and np.array_equal(again.outputs["result"], result.outputs["result"])


def test_runs_are_independent(network, device, image, result):
    other = 255 - image
    assert compare_layers(network.expected(other), device.run({"image": other}) and device.layers) is None
    assert first_difference(result.trace, device.run({"image": image}).trace, device.program) is None


def run(program: Program, image: np.ndarray):
    device = FunctionalDevice(TEST)
    device.load(program)
    return device.run({"image": image})


def test_faulty_programs(program, image):
    code = program.instructions

    def without(index: int) -> Program:
        keep = np.arange(len(code)) != index
        return replace(program, instructions=code[keep], first_row=program.first_row[keep],
                       first_part=program.first_part[keep])

    with pytest.raises(EngineFault, match="no END"):
        run(without(8), image)
    with pytest.raises(EngineFault, match="row 0 of channel 0 of 'result' was never computed"):
        run(replace(program, first_row=np.where(np.arange(9) == 6, 3, program.first_row)), image)
    with pytest.raises(EngineFault, match=r"instruction 1 \(VECTOR\): waits for a token from LOAD"):
        run(without(1), image)
    with pytest.raises(EngineFault, match="instruction 2: unknown opcode 0"):
        run(replace(program, instructions=np.where(np.arange(9)[:, None] == 2, 0, code).astype(np.uint8)), image)
    with pytest.raises(EngineFault, match="tag 1, the Program has 1 layers"):
        run(replace(program, layers=program.layers[:1]), image)
    with pytest.raises(EngineFault, match=r"instruction 4 computes rows 4..6.* outside layer 'stem'"):
        run(replace(program, first_row=program.first_row + (np.arange(9) == 4)), image)
    narrow = replace(program.layers[1], output="features", width=5)
    with pytest.raises(EngineFault, match="disagree about the shape of 'features'"):
        run(replace(program, layers=(program.layers[0], narrow)), image)
    with pytest.raises(ModelError, match="no Program is loaded"):
        FunctionalDevice(TEST).run({})
    with pytest.raises(EngineFault, match="outside the 0 allocated"):
        FunctionalDevice(TEST).read_memory(0, 1)


def test_columns_are_blocks_of_taps(program):
    """Position (block*taps + tap)*lanes + lane, for blocks that come in any order."""
    width, taps, blocks = 2, 4, 3
    channels = blocks * taps * 32
    layer = Layer("columns", "Im2col", "columns", "vector", 1, width, channels, tuple(range(channels)), False)
    program = replace(program, layers=(layer,), first_row=np.zeros(2, int), first_part=np.array([1, 0]))
    samples = np.random.default_rng(0).integers(-128, 128, (1, width, taps, blocks, 32))
    results = LayerResults(program)
    for index, own in ((0, slice(1, 3)), (1, slice(0, 1))):
        codes = samples[:, :, :, own].reshape(1, width, taps, -1)
        results.add(index, Vector(tag=0, operation=VectorOp.COLUMNS), codes)
    assert np.array_equal(results.complete()["columns"], samples.swapaxes(2, 3).reshape(1, width, -1))


# Comparison


def changed(trace: Trace, unit: Unit, **arrays) -> Trace:
    return Trace(writes=trace.writes | {unit: replace(trace.writes[unit], **arrays)})


def flipped(log: WriteLog, name: str, *place: int, bit: int = 1) -> np.ndarray:
    array = getattr(log, name).copy()
    array[place] = ~array[place] if name == "mask" else array[place] ^ bit
    return array


def test_equal_traces(result, program):
    assert first_difference(result.trace, result.trace, program) is None
    log = result.trace.writes[Unit.MATRIX]
    noise = np.where(log.mask, log.data, 77).astype(np.uint8)  # bytes that are not written mean nothing
    assert first_difference(result.trace, changed(result.trace, Unit.MATRIX, data=noise), program) is None


@pytest.mark.parametrize("write, instruction, row, tile", [(0, 3, 0, 0), (35, 3, 0, 1), (36, 4, 3, 0), (71, 4, 3, 1)])
def test_matrix_data(device, result, program, write, instruction, row, tile):
    log = result.trace.writes[Unit.MATRIX]
    lane = 8 + 4 * tile + 2
    data = flipped(log, "data", write, lane)
    got = first_difference(result.trace, changed(result.trace, Unit.MATRIX, data=data), program)
    y, x = divmod(write % 18, SIZE)
    index = (row + y, x, CHANNEL_OF[4 * tile + 2])
    assert (got.layer, got.what, got.unit, got.index, got.lane) == ("stem", "data", Unit.MATRIX, index, lane)
    assert (got.write, got.instruction, got.address) == (write, instruction, FIRST + (row + y) * SIZE + x)
    assert got.expected == device.layers["features"][index] and got.got == got.expected ^ 1
    assert got.describe() == (
        f"layer 'stem', y {index[0]} x {x} channel {index[2]}, MATRIX write {write}, instruction {instruction}, "
        f"address {got.address}, lane {lane}: data expected {got.expected}, got {got.got}, at cycle 0")


def test_vector_data_is_signed(device, result, program):
    log = result.trace.writes[Unit.VECTOR]
    write = 36 + 18 + 8  # after PACK and the strip of rows 3..5: row 1, x 2
    lane = LANES_OF[5]
    got = first_difference(
        result.trace, changed(result.trace, Unit.VECTOR, data=flipped(log, "data", write, lane, bit=128)), program)
    assert (got.layer, got.index, got.instruction) == ("depth", (1, 2, 5), 6)
    want = int(device.layers["result"][1, 2, 5])
    assert (got.expected, got.got) == (want, want - 128 if want >= 0 else want + 128)


def test_data_without_a_logical_place(result, program):
    packed = flipped(result.trace.writes[Unit.VECTOR], "data", 3, 1)
    got = first_difference(result.trace, changed(result.trace, Unit.VECTOR, data=packed), program)
    assert (got.layer, got.index, got.address, got.lane, got.instruction) == ("stem", None, PACKED + 3, 1, 2)
    loaded = flipped(result.trace.writes[Unit.LOAD], "data", 29, 7)
    got = first_difference(result.trace, changed(result.trace, Unit.LOAD, data=loaded), program)
    assert (got.unit, got.index, got.address, got.lane, got.instruction) == (Unit.LOAD, None, IMAGE + 2, 7, 1)
    padding = flipped(result.trace.writes[Unit.MATRIX], "data", 20, 12)  # position 4 is no channel
    assert first_difference(result.trace, changed(result.trace, Unit.MATRIX, data=padding), program).index is None


def test_address_tag_mask_and_count(result, program):
    log = result.trace.writes[Unit.MATRIX]
    for name, place, expected, got in (("address", (9,), FIRST + 9, FIRST + 8), ("tag", (9,), 0, 1),
                                       ("mask", (9, 8), 1, 0), ("mask", (9, 0), 0, 1)):
        other = changed(result.trace, Unit.MATRIX, **{name: flipped(log, name, *place)})
        found = first_difference(result.trace, other, program)
        assert (found.what, found.write, found.expected, found.got) == (name, 9, expected, got)
    short = WriteLog(**{name: getattr(log, name)[:40] for name in ("cycle", "address", "tag", "data", "mask")})
    less = first_difference(result.trace, Trace(writes=result.trace.writes | {Unit.MATRIX: short}), program)
    assert (less.what, less.expected, less.got, less.instruction, less.cycle) == ("count", 72, 40, 4, None)
    more = first_difference(Trace(writes=result.trace.writes | {Unit.MATRIX: short}), result.trace, program)
    assert (more.what, more.expected, more.got, more.cycle) == ("count", 40, 72, 0)
    nothing = first_difference(result.trace, Trace(), program)
    assert (nothing.unit, nothing.what, nothing.got) == (Unit.LOAD, "count", 0)
    assert "count expected 33, got 0" in nothing.describe()


def test_the_earliest_unit_is_reported(result, program):
    trace = Trace(writes={unit: replace(log, cycle=np.arange(len(log), dtype=np.uint64) + start)
                          for (unit, log), start in zip(result.trace.writes.items(), (0, 500, 300, 0), strict=True)})
    trace.writes[Unit.MATRIX].data = flipped(trace.writes[Unit.MATRIX], "data", 0, 8)
    trace.writes[Unit.VECTOR].data = flipped(trace.writes[Unit.VECTOR], "data", 10, 8)
    found = first_difference(result.trace, trace, program)
    assert (found.unit, found.cycle) == (Unit.VECTOR, 310)
    assert found.describe().endswith("at cycle 310")


def test_compare_layers(device):
    layers = device.layers
    assert compare_layers(layers, layers | {"extra": np.zeros((1, 1, 1))}) is None
    wrong = layers["result"].copy()
    wrong[4, 5, 6] += 3
    wrong[5, 0, 0] += 1
    found = compare_layers(layers, layers | {"result": wrong})
    assert (found.layer, found.index, found.got - found.expected) == ("result", (4, 5, 6), 3)
    assert found.describe() == (
        f"layer 'result', y 4 x 5 channel 6: data expected {found.expected}, got {found.expected + 3}")
    assert compare_layers(layers, {}).describe() == "layer 'features': layer expected present, got missing"
    assert compare_layers(layers, layers | {"features": wrong[:2]}).what == "shape"
    rows = np.arange(12).reshape(3, 4)
    found = compare_layers({"rows": rows}, {"rows": np.where(rows == 6, 0, rows)})
    assert found.describe() == "layer 'rows', y 1 x 0 channel 2: data expected 6, got 0"


# Comparison of a run while it goes on


def slices(trace: Trace, lengths: list[int]) -> list[Trace]:
    """The trace in parts of so many writes of each unit; the last part takes the rest."""
    parts, done = [], 0
    for length in [*lengths, 1 << 30]:
        parts.append(Trace(writes={
            unit: WriteLog(**{name: getattr(log, name)[done : done + length]
                              for name in ("cycle", "address", "tag", "data", "mask")})
            for unit, log in trace.writes.items()}))
        done += length
    return parts


def streamed(program: Program, steps, parts: list[Trace]) -> StreamingComparison:
    comparison = StreamingComparison(program, steps)
    for part in parts:
        comparison.consume(part)
    comparison.finish()
    return comparison


def fresh(device: FunctionalDevice, image: np.ndarray):
    """Steps of a device in which nothing has run yet."""
    other = FunctionalDevice(TEST)
    other.load(device.program)
    other.write_segment(Segment.INPUT, 0, device.program.inputs[0].pack(image))
    return other.steps()


@pytest.mark.parametrize("lengths", [[], [1], [1, 0, 7, 30], [3] * 40])
def test_stream_of_equal_runs(device, image, result, program, lengths):
    comparison = streamed(program, fresh(device, image), slices(result.trace, lengths))
    assert comparison.difference is None and comparison.compared == 33 + 72 + 72


def test_stream_runs_only_as_far_as_needed(device, image, result, program):
    taken = []

    def steps():
        for step in fresh(device, image):
            taken.append(step[0])
            yield step

    comparison = StreamingComparison(program, steps())
    comparison.consume(Trace())
    assert not taken
    log = slices(result.trace, [1])[0].writes
    comparison.consume(Trace(writes={Unit.LOAD: log[Unit.LOAD]}))
    assert taken == [0] and comparison.compared == 1
    comparison.consume(Trace(writes={Unit.MATRIX: log[Unit.MATRIX]}))
    assert taken == [0, 1, 2, 3] and comparison.compared == 2
    assert comparison.finish().what == "count" and taken[-1] == 8


@pytest.mark.parametrize("lengths", [[], [2, 9], [5] * 15])
@pytest.mark.parametrize("unit, name, place", [
    (Unit.MATRIX, "data", (0, 10)), (Unit.MATRIX, "data", (71, 14)), (Unit.MATRIX, "mask", (40, 8)),
    (Unit.VECTOR, "data", (62, LANES_OF[5])), (Unit.VECTOR, "data", (3, 1)), (Unit.LOAD, "data", (29, 7)),
    (Unit.LOAD, "address", (30,)), (Unit.VECTOR, "tag", (50,))])
def test_stream_finds_what_the_whole_comparison_finds(device, image, result, program, lengths, unit, name, place):
    log = result.trace.writes[unit]
    trace = changed(result.trace, unit, **{name: flipped(log, name, *place)})
    want = first_difference(result.trace, trace, program)
    comparison = streamed(program, fresh(device, image), slices(trace, lengths))
    assert comparison.difference == want and want is not None
    assert comparison.compared <= 33 + 72 + 72 - 1


def test_stream_misses_writes(device, image, result, program):
    log = result.trace.writes[Unit.MATRIX]
    short = WriteLog(**{name: getattr(log, name)[:40] for name in ("cycle", "address", "tag", "data", "mask")})
    want = first_difference(result.trace, Trace(writes=result.trace.writes | {Unit.MATRIX: short}), program)
    parts = slices(Trace(writes=result.trace.writes | {Unit.MATRIX: short}), [30])
    assert streamed(program, fresh(device, image), parts).difference == want
    nothing = streamed(program, fresh(device, image), [])
    assert (nothing.difference.what, nothing.compared) == ("count", 0)
    # one write too many, known as soon as it comes
    more = WriteLog(**{name: np.concatenate([getattr(log, name), getattr(log, name)[:1]])
                       for name in ("cycle", "address", "tag", "data", "mask")})
    comparison = StreamingComparison(program, fresh(device, image))
    comparison.consume(Trace(writes={Unit.MATRIX: more}))
    found = comparison.difference
    assert (found.what, found.expected, found.got, found.write, found.cycle) == ("count", 72, 73, 72, 0)
    assert comparison.finish() is found


def test_stream_reports_the_earliest_unit(device, image, result, program):
    trace = Trace(writes={unit: replace(log, cycle=np.arange(len(log), dtype=np.uint64) + start)
                          for (unit, log), start in zip(result.trace.writes.items(), (0, 500, 300, 0), strict=True)})
    trace.writes[Unit.MATRIX].data = flipped(trace.writes[Unit.MATRIX], "data", 0, 8)
    trace.writes[Unit.VECTOR].data = flipped(trace.writes[Unit.VECTOR], "data", 10, 8)
    comparison = StreamingComparison(program, fresh(device, image))
    comparison.consume(trace)
    assert (comparison.difference.unit, comparison.difference.cycle) == (Unit.VECTOR, 310)
    found = comparison.difference
    comparison.consume(changed(trace, Unit.LOAD, data=flipped(trace.writes[Unit.LOAD], "data", 0, 0)))
    assert comparison.difference is found and comparison.finish() is found


def test_stream_of_a_program_with_a_loop():
    """Instructions, layers and channels are known in every round of a loop."""
    looped = Looped.random(TEST)
    program = looped.program()

    def loaded(trace: bool = False) -> FunctionalDevice:
        device = FunctionalDevice(TEST, trace)
        device.load(program)
        device.write_segment(Segment.INPUT, 0, np.arange(12).astype("<u4").tobytes()[:20])
        return device

    trace = loaded(True).start((0, 4)).trace
    assert [len(trace.writes[unit]) for unit in (Unit.LOAD, Unit.MATRIX, Unit.ROW)] == [16, 16, 16]
    assert streamed(program, loaded().steps((0, 4)), slices(trace, [1, 5])).compared == 48
    code = {type(i).__name__ + str(getattr(i, "operation", "")): n for n, i in enumerate(program.decoded())}
    # each round: 4 writes of MATRIX (two tiles, low and high bytes), of ROW two of ADD, codes and scale of QUANTIZE
    for unit, write, lane, layer, index, instruction in (
        (Unit.MATRIX, 6, 5, "result", (0, 0, 5), code["Matrix"]),
        (Unit.MATRIX, 12, 1, "result", (0, 0, 1), code["Matrix"]),
        (Unit.ROW, 4, 9, "sum", (0, 0, 9), code["Row0"]), (Unit.ROW, 14, 31, "codes", (0, 0, 31), code["Row4"]),
        (Unit.ROW, 15, 0, "codes", None, code["Row4"]),
    ):
        other = changed(trace, unit, data=flipped(trace.writes[unit], "data", write, lane))
        found = streamed(program, loaded().steps((0, 4)), slices(other, [3])).difference
        assert (found.unit, found.write, found.lane, found.layer) == (unit, write, lane, layer)
        assert (found.index, found.instruction) == (index, instruction)
    assert streamed(program, loaded().steps((0, 5)), [trace]).difference.expected == 18  # LOAD: one round more


def test_places_of_plain_results():
    i = Matrix(kernel_y=1, kernel_x=1, height=1, width=3, ring=1, rows=1, columns=3, stride_x=1, pitch=3, blocks=1,
               tiles=5, plain=1, double=1, group=6, target=500, target_high=20, target_plane=50, target_ring=1,
               target_step_x=1, target_step_y=1, parameters=100, weights=200)
    machine, seen = Machine(TEST, trace=True), []
    machine.pool[:300] = np.random.default_rng(0).integers(0, 256, (300, 32))
    machine.pool[100:105].view("<u4")[:] = 1
    machine.on_result = lambda number, instruction, codes: seen.append(codes)
    log = machine.step(0, i)
    program = replace(Looped.random(TEST).program(), first_part=np.array([2]), first_row=np.array([0]), layers=(
        Layer("x", "matrix", "x", "matrix", 0, 1, 60, (-1,) * 8 + tuple(range(60)), False),))
    for language in (program.language, None):
        for write in range(len(log)):
            for lane in range(TEST.lanes):
                index = _index(replace(program, language=language), 0, i, write, lane)
                assert (index is not None) == log.mask[write, lane]
                if index is not None:
                    code = seen[0].reshape(1, 60)[0, index[2]] if language else seen[0][index]
                    assert code >> 8 * (write % 2) & 255 == log.data[write, lane]


@pytest.mark.parametrize("layout", list(RowLayout))
def test_places_of_codes_in_every_layout(layout):
    """A wrong byte of any layout is traced to the element whose code it is."""
    columns, blocks, tiles = TEST.columns, 2, TEST.lanes // TEST.columns
    i = Row(operation=RowOp.QUANTIZE, rows=2, columns=3, blocks=blocks, layout=layout, source_plane=1, source_row=4,
            source_high=50, source_column=2, target=100, target_plane=8, target_row=300, target_column=80, scale=900,
            scale_row=6, scale_column=2)
    machine = Machine(TEST, trace=True)
    machine.pool[:50] = np.arange(50)[:, None] * 5 + np.arange(32) * 7
    seen = []
    machine.on_result = lambda number, instruction, codes: seen.append(codes)
    log = machine.step(0, i)
    program = replace(Looped.random(TEST).program(), first_part=np.array([1]), first_row=np.array([0]), layers=(
        Layer("x", "quantize", "x", "row", 0, 1, 224, (-1,) * 32 + tuple(range(192)), False),))
    words = {RowLayout.PLAIN: 1, RowLayout.KEYS: columns, RowLayout.VALUES: tiles}[layout]
    per_row = blocks * words + (2 if layout == RowLayout.VALUES else 1)
    assert len(log) == 6 * per_row
    codes = seen[0].reshape(2, 192)
    for write in range(len(log)):
        for lane in (0, 1, 13, 31):
            index = _index(program, 0, i, write, lane)
            if write % per_row >= blocks * words:
                assert index is None
            else:
                assert codes[index[0], index[2]] == log.data[write, lane].view(np.int8)


def test_stream_of_the_rtl(engine):
    """The engine writes what the functional machine writes, in a Program with registers and a loop."""
    program = Looped.random(TEST).program()
    rtl, functional = engine(), FunctionalDevice(TEST)
    for device in (rtl, functional):
        device.load(program)
        device.write_segment(Segment.INPUT, 0, (np.arange(12) % 5).astype("<u4").tobytes())
    for arguments in ((0, 12), (4, 3)):
        comparison = StreamingComparison(program, functional.steps(arguments))
        rtl.observer = comparison.consume
        counters = rtl.start(arguments).counters
        assert comparison.finish() is None and comparison.compared == 8 + 10 * arguments[1]
        for name, value in functional.counters.items():
            assert name == "bytes_read" or counters[name] == value
        size = program.segment_bytes[Segment.OUTPUT]
        assert rtl.read_segment(Segment.OUTPUT, 0, size) == functional.read_segment(Segment.OUTPUT, 0, size)
