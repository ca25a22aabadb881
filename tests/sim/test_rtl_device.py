"""RtlDevice: registers, faults, traces, waves, interruption with the stand-in; then data movement by the engine."""

import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from tests.sim.standin import ENDLESS, NO_WRITE, standin
from weft.arch.errors import EngineFault, MismatchError, ModelError, ToolError
from weft.arch.isa import ZERO, Barrier, Branch, End, Load, Read, Scalar, ScalarOp, Store, Unit
from weft.arch.registers import MAGIC, Status
from weft.sim.memory import PRESETS
from weft.sim.rtl import RtlDevice, Waves

BLOCKS = 32  # of 64 bytes
TARGET = 1 << 12
COPY = [0, 0, 0, TARGET, 0, 0]


def loaded(device):
    device.allocate(2 * TARGET)
    device.write_memory(0, np.random.default_rng(3).integers(0, 256, 64 * BLOCKS, np.uint8).tobytes())
    return device


def test_copies_and_counts(copier):
    device = loaded(copier())
    counters, trace = device.execute(0, BLOCKS, COPY)
    assert device.read_memory(TARGET, 64 * BLOCKS) == device.read_memory(0, 64 * BLOCKS)
    assert counters["bytes_read"] == counters["bytes_written"] == 64 * BLOCKS
    assert counters["simulated_cycles_per_s"] > 0 and trace is None
    assert not set(counters) & {"magic", "status", "control", "segment0"}


def test_registers(copier, config):
    device = copier()
    assert device.read_register("magic") == MAGIC
    assert device.read_register("fingerprint") == int(config.fingerprint, 16)


def test_trace(copier, config):
    device = loaded(copier(trace=True))
    for _ in range(2):  # the second run's trace holds the second run only
        counters, trace = device.execute(0, BLOCKS, COPY)
        beats = 64 * BLOCKS // config.bus_bytes
        log = trace.writes[Unit.LOAD]
        assert len(log) == beats and len(trace.writes[Unit.VECTOR]) == 0
        np.testing.assert_array_equal(log.cycle, np.arange(beats) + log.cycle[0])
        np.testing.assert_array_equal(log.address, np.arange(beats))
        np.testing.assert_array_equal(log.mask, np.arange(beats)[:, None] >> np.arange(config.lanes) & 1)
        assert (log.tag == 7).all() and log.mask.dtype == bool
        assert log.data[:, : config.bus_bytes].tobytes() == device.read_memory(0, 64 * BLOCKS)
        assert list(trace.retire[Unit.STORE]) == [counters["cycles"] - 1] and len(trace.start[Unit.MATRIX]) == 0


def test_observer_sees_every_slice_once(copier, config):
    seen = []
    device = loaded(copier(observer=seen.append, trace=True))
    for _ in range(2):
        seen.clear()
        blocks = BLOCKS * 40
        device.allocate(64 * blocks * 2)
        counters, trace = device.execute(0, blocks, [0, 0, 0, 64 * blocks, 0, 0])
        beats = 64 * blocks // config.bus_bytes
        assert trace is None and len(seen) > 1
        logs = [part.writes[Unit.LOAD] for part in seen]
        np.testing.assert_array_equal(np.concatenate([log.address for log in logs]), np.arange(beats) % (1 << 16))
        cycles = np.concatenate([log.cycle for log in logs])
        assert (np.diff(cycles.astype(np.int64)) > 0).all() and cycles[-1] < counters["cycles"]
        assert [list(part.retire[Unit.STORE]) for part in seen if len(part.retire[Unit.STORE])] == [
            [counters["cycles"] - 1]]


def test_what_the_observer_raises_ends_the_run(copier):
    def observer(part):
        raise MismatchError("enough")

    device = loaded(copier(observer=observer))
    with pytest.raises(MismatchError, match="enough"):
        device.execute(0, BLOCKS, [0, 0, 0, TARGET, ENDLESS | NO_WRITE, 0])
    device.observer = None
    device.execute(0, BLOCKS, COPY)


def test_devices_are_independent(copier):
    first, second = loaded(copier()), copier()
    second.allocate(2 * TARGET)
    second.execute(0, BLOCKS, COPY)
    first.execute(0, BLOCKS, COPY)
    assert not any(second.read_memory(0, 2 * TARGET)) and any(first.read_memory(TARGET, 64))


@pytest.mark.parametrize("status, message", [
    (Status.ILLEGAL_INSTRUCTION | Unit.VECTOR << 8, "illegal instruction; vector unit"),
    (Status.WATCHDOG | 0xFF << 8, "watchdog time-out.*; dispatcher"),
    (Status.ADDRESS_ERROR | Unit.LOAD << 8, "scratchpad address outside the pool; load unit"),
])
def test_faults_are_explained(copier, status, message):
    device = loaded(copier())
    device.write_memory(TARGET, Load().encode() + Load(tag=9, run=1).encode())
    with pytest.raises(EngineFault, match=f"cycle [0-9]+: {message}, instruction 1: load tag=9 run=1") as caught:
        device.execute(TARGET, 2, [*COPY[:5], status])
    assert caught.value.exit_code == 4
    device.execute(0, BLOCKS, COPY)  # and the device goes on


def test_fault_at_no_instruction(copier):
    device = loaded(copier())
    with pytest.raises(EngineFault, match="unknown opcode 0"):
        device.execute(TARGET, 2, [*COPY[:5], Status.ILLEGAL_INSTRUCTION])
    with pytest.raises(EngineFault, match="behind the last"):
        device.execute(TARGET, 1, [*COPY[:5], Status.ILLEGAL_INSTRUCTION])


def test_another_engine_is_refused(config):
    other = replace(config, name="other")
    with pytest.raises(ToolError, match="not engine 'other'"):
        RtlDevice(other, verilog=standin(config))


def test_memory_bounds(copier):
    device = loaded(copier())
    for address, size in ((2 * TARGET - 1, 2), (-1, 1)):
        with pytest.raises(ModelError, match="outside"):
            device.read_memory(address, size)
        with pytest.raises(ModelError, match="outside"):
            device.write_memory(address, bytes(size))


def test_waves(copier, tmp_path):
    path = tmp_path / "copy.vcd"
    device = loaded(copier(waves=Waves(path, 10, 20)))
    for _ in range(2):
        device.execute(0, BLOCKS, COPY)
        text = path.read_text()
        assert "m_axi_araddr" in text
        assert sum(line.startswith("#") for line in text.splitlines()) == 2 * 10
    device.waves = Waves(tmp_path / "missing" / "copy.vcd")
    with pytest.raises(ToolError, match="cannot write waves"):
        device.execute(0, BLOCKS, COPY)


def test_interruption_in_process(copier):
    """Progress is told, an interruption passes through, and the device can be used again."""
    told = []

    def progress(cycles):
        told.append(cycles)
        if len(told) == 3:
            raise KeyboardInterrupt

    device = loaded(copier(progress=progress))
    with pytest.raises(KeyboardInterrupt):
        device.execute(0, BLOCKS, [0, 0, 0, TARGET, ENDLESS | NO_WRITE, 0])
    assert told == sorted(told) and len(told) == 3
    device.execute(0, BLOCKS, COPY)
    assert device.read_memory(TARGET, 64 * BLOCKS) == device.read_memory(0, 64 * BLOCKS)


def test_ctrl_c_stops_a_run_promptly():
    script = ("from weft.arch.config import load_config\n"
              "from weft.sim.rtl import RtlDevice\n"
              "from tests.sim.standin import standin, ENDLESS\n"
              "config = load_config('test')\n"
              "device = RtlDevice(config, verilog=standin(config))\n"
              "device.allocate(4096)\n"
              "print('runs', flush=True)\n"
              "try:\n    device.execute(0, 2, [0, 0, 0, 2048, ENDLESS, 0])\n"
              "except KeyboardInterrupt:\n    print('stopped')\n")
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", script], stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "runs\n"
    time.sleep(1)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10) == ("stopped\n", "")
    assert time.monotonic() - began < 2


ROWS, RUN = 6, 5  # of words


def moves(config, rows=ROWS):
    """A program that brings rows of words from segment 2 and stores the odd lanes of each to segment 3."""
    window = {"run": RUN, "rows": rows, "planes": 1, "address": 100, "row_words": RUN, "row_bytes": RUN * config.lanes}
    odd = sum(2 << lane for lane in range(0, config.lanes, 2))
    return (Load(base=2, signal=1 << Unit.STORE, tag=3, **window),
            Store(base=3, wait=1 << Unit.LOAD, mask=odd, **window), End())


def run_on(device, program, content, arguments=()):
    device.allocate(1 << 16)
    device.write_memory(0, b"".join(instruction.encode() for instruction in program))
    device.write_memory(0x4000, content.tobytes())
    return device.execute(0, len(program), [0, 0, 0x4000, 0x8000, 0, 0, 0, 0], arguments)


@pytest.mark.parametrize("memory", PRESETS)
def test_engine_moves_data(engine, config, memory):
    content = np.random.default_rng(4).integers(1, 256, (ROWS * RUN, config.lanes), np.uint8)
    device = engine(trace=True, memory=PRESETS[memory])
    for _ in range(2):
        counters, trace = run_on(device, moves(config), content)
        stored = np.frombuffer(device.read_memory(0x8000, content.nbytes), np.uint8).reshape(content.shape)
        np.testing.assert_array_equal(stored, np.where(np.arange(config.lanes) % 2, content, 0))
        log = trace.writes[Unit.LOAD]
        np.testing.assert_array_equal(log.data, content)
        np.testing.assert_array_equal(log.address, 100 + np.arange(ROWS * RUN))
        assert log.mask.all() and (log.tag == 3).all()
        (load_starts,), (load_ends,) = trace.start[Unit.LOAD], trace.retire[Unit.LOAD]
        (store_starts,), (store_ends,) = trace.start[Unit.STORE], trace.retire[Unit.STORE]
        assert 0 < load_starts < log.cycle[0] <= log.cycle[-1] <= load_ends < store_starts < store_ends
        assert store_ends < counters["cycles"]
        assert counters["load_retired"] == counters["store_retired"] == 1
        assert counters["bytes_written"] == content.nbytes


def test_engine_faults_and_recovers(engine, config):
    content = np.ones((ROWS * RUN, config.lanes), np.uint8)
    device = engine(watchdog=2000)
    load, store, end = moves(config)
    for program, message in [
        ((replace(load, run=0), store, end), "illegal instruction; load unit, instruction 0: load signal=2 tag=3"),
        ((load, replace(store, base=3, offset=1 << 20), end), "memory bus error; store unit, instruction 1: store"),
        ((replace(load, address=config.pool_words - 1), store, end), "outside the pool; load unit, instruction 0"),
        ((replace(load, signal=0), store, end), "watchdog time-out.*store unit, instruction 1: store"),
        ((load, store), "dispatcher, instruction 2: "),
    ]:
        with pytest.raises(EngineFault, match=message):
            run_on(device, program, content)
    counters, _ = run_on(device, (load, store, end), content)
    assert counters["load_retired"] == 1


def gathers(config):
    """A program that moves rows, in the order of their numbers behind the image, by a loop over as many as argument 0.

    Argument 1 is the word of the scratchpad where the first goes.
    """
    row = RUN * config.lanes
    window = {"run": RUN, "rows": 1, "planes": 1}
    number, source, target, place, bytes_of_number = range(8, 13)

    def scalar(operation, target, first, value):
        return Scalar(operation=operation, target=target, first=first, literal=1, value=value)

    return (
        scalar(ScalarOp.ADD, number, ZERO, 0),
        scalar(ScalarOp.MULTIPLY, bytes_of_number, number, 4),
        Read(target=source, base=2, offset=ROWS * row, first=bytes_of_number),
        scalar(ScalarOp.MULTIPLY, source, source, row),
        scalar(ScalarOp.MULTIPLY, target, number, row),
        scalar(ScalarOp.MULTIPLY, place, number, RUN),
        Scalar(operation=ScalarOp.ADD, target=place, first=place, second=1),
        Load(base=2, signal=1 << Unit.STORE, **window).bind(offset=source, address=place),
        Store(base=3, wait=1 << Unit.LOAD, mask=(1 << config.lanes) - 1, **window).bind(offset=target, address=place),
        scalar(ScalarOp.ADD, number, number, 1),
        Branch(first=number, second=0, destination=1),
        Barrier(),
        End(),
    )


@pytest.mark.parametrize("memory", PRESETS)
def test_engine_loops_over_bound_addresses(engine, config, memory):
    rng = np.random.default_rng(5)
    order = rng.integers(0, ROWS, 9)
    content = np.concatenate([
        rng.integers(0, 256, ROWS * RUN * config.lanes, np.uint8), order.astype("<u4").view(np.uint8)])
    device = engine(trace=True, memory=PRESETS[memory])
    for count in (9, 4):
        counters, trace = run_on(device, gathers(config), content, [count, 300])
        rows = content[:ROWS * RUN * config.lanes].reshape(ROWS, -1)
        stored = np.frombuffer(device.read_memory(0x8000, 10 * rows.shape[1]), np.uint8).reshape(10, -1)
        np.testing.assert_array_equal(stored[:count], rows[order[:count]])
        assert not stored[count:].any()
        assert counters["load_retired"] == counters["store_retired"] == count
        np.testing.assert_array_equal(trace.writes[Unit.LOAD].address, 300 + np.arange(count * RUN))


def test_engine_names_the_instruction_of_a_loop_that_faults(engine, config):
    content = np.zeros((ROWS * RUN + 1, config.lanes), np.uint8)
    device = engine(watchdog=2000)
    with pytest.raises(EngineFault, match=r"outside the pool; load unit, instruction 7: load .*offset.*address.*r"):
        run_on(device, gathers(config), content, [9, config.pool_words - RUN])
    with pytest.raises(EngineFault, match="illegal instruction; dispatcher, instruction 0: scalar"):
        run_on(device, (Scalar(target=3), End()), content)
    with pytest.raises(EngineFault, match=r"watchdog time-out.*dispatcher, instruction 0: branch"):
        run_on(device, (Branch(first=ZERO, literal=1, value=1), End()), content)
