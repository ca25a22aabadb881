"""The memory behind the simulated engine keeps the rates and latencies that it is given."""

import numpy as np
import pytest

from tests.sim.standin import NO_READ, NO_WRITE, STROBES
from weft.arch.errors import EngineFault, ModelError
from weft.sim.memory import PRESETS, MemoryModel, parse_memory

SIZE = 1 << 16  # bytes copied
TARGET = 1 << 17
OVERHEAD = 8  # cycles that the stand-in itself needs


@pytest.fixture
def copy(copier):
    """Cycles of a copy of `size` bytes in `mode`, checked."""
    def run(memory: MemoryModel, mode: int = 0, size: int = SIZE, source: int = 0) -> int:
        device = copier(memory=memory)
        device.allocate(TARGET + SIZE)
        content = np.random.default_rng(1).integers(0, 256, SIZE, np.uint8).tobytes()
        device.write_memory(0, content)
        counters, _ = device.execute(0, size // 64, [0, 0, source, TARGET, mode, 0])
        if mode == 0:
            assert device.read_memory(TARGET, size) == content[source : source + size]
        return counters["cycles"]

    return run


def test_ideal_moves_a_beat_per_channel_and_cycle(copy, config):
    beats = SIZE // config.bus_bytes
    for mode in (0, NO_READ, NO_WRITE):
        assert beats <= copy(MemoryModel(), mode) <= beats + config.burst_beats + OVERHEAD


@pytest.mark.parametrize("latency, rate", [(40, 6.5), (1, 7.9), (7, 2.5), (200, 8)])
def test_fixed_rate_and_latency(copy, latency, rate):
    memory = MemoryModel(latency=latency, bytes_per_cycle=rate)
    for mode in (NO_READ, NO_WRITE):
        assert abs(copy(memory, mode) - SIZE / rate - latency) <= OVERHEAD


def test_latency_is_exact(copy, config):
    size = config.bus_bytes * config.burst_beats
    for mode in (NO_READ, NO_WRITE):
        short, long = (copy(MemoryModel(latency=latency), mode, size) for latency in (1, 40))
        assert long - short == 39


def test_channels_share_the_rate_unless_told_otherwise(copy):
    rate, latency = 5, 10
    assert abs(copy(MemoryModel(latency, rate)) - 2 * SIZE / rate - 2 * latency) <= 32
    assert abs(copy(MemoryModel(latency, rate, shared=False)) - SIZE / rate - 2 * latency) <= 32
    assert abs(copy(MemoryModel(latency, 16)) - SIZE / 8 - 2 * latency) <= 32  # the bus is the limit


def test_gate(copy, config):
    beats, memory = SIZE // config.bus_bytes, parse_memory("gate:10:15:19")
    for mode in (0, NO_READ, NO_WRITE):
        assert abs(copy(memory, mode) - beats * 19 / 15) <= 19 + 2 * 10 + config.burst_beats


def test_equal_runs_take_equal_cycles(copier):
    device = copier(memory=parse_memory("gate:10:15:19"))
    device.allocate(TARGET + SIZE)
    cycles = {device.execute(0, 100, [0, 0, 0, TARGET, 0, 0])[0]["cycles"] for _ in range(4)}
    assert len(cycles) == 1


def test_write_strobes(copier, config):
    device = copier()
    device.allocate(TARGET + SIZE)
    before = np.random.default_rng(2).integers(1, 256, 4096, np.uint8)
    device.write_memory(TARGET, before.tobytes())
    device.execute(0, len(before) // 64, [0, 0, 0, TARGET, NO_READ | STROBES, 0])
    after = np.frombuffer(device.read_memory(TARGET, len(before)), np.uint8).reshape(-1, config.bus_bytes)
    strobes = np.arange(len(after))[:, None] >> np.arange(config.bus_bytes) & 1
    np.testing.assert_array_equal(after, np.where(strobes, 0, before.reshape(after.shape)))


@pytest.mark.parametrize("error, mode, unit", [
    ((4096, 4104), NO_WRITE, "load"),
    ((TARGET, TARGET + 8), NO_READ, "store"),
])
def test_injected_error(copy, error, mode, unit):
    with pytest.raises(EngineFault, match=f"memory bus error; {unit} unit"):
        copy(MemoryModel(error=error), mode)


def test_outside_the_memory(copier):
    device = copier()
    device.allocate(4096)
    with pytest.raises(EngineFault, match="memory bus error"):
        device.execute(0, 64 + 1, [0, 0, 0, 0, NO_WRITE, 0])


@pytest.mark.parametrize("source, message", [(4096 - 64 + 8, "crosses a 4 KB boundary"), (4, "starts inside a beat")])
def test_protocol_violations(copy, source, message):
    with pytest.raises(EngineFault, match=f"AXI protocol.*read burst {message}"):
        copy(MemoryModel(), NO_WRITE, 4096, source)


@pytest.mark.parametrize("text, expected", [
    ("ideal", MemoryModel()),
    ("ddr3", PRESETS["ddr3"]),
    ("fixed:40:14.5", MemoryModel(latency=40, bytes_per_cycle=14.5)),
    ("gate:10:15:19", PRESETS["nngen"]),
])
def test_parse(text, expected):
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", [
    "", "fast", "fixed", "fixed:40", "fixed:a:1", "fixed:40:-1", "fixed:40:nan", "fixed:0:8", "fixed:1:inf",
    "gate:10:20:19", "gate:10:0:19", "gate:1:1.5:2", "ideal:1",
])
def test_nonsense_is_refused(text):
    with pytest.raises(ModelError, match="memory model"):
        parse_memory(text)
