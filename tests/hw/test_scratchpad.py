"""Scratchpad: data and order against a NumPy array, arbitration, throughput, faults."""

from dataclasses import replace

import numpy as np
import pytest

from tests.kit.streams import run, simulator
from weft.arch.config import load_config
from weft.hw.interfaces import READ_LATENCY
from weft.hw.scratchpad import Scratchpad

CONFIG = replace(load_config("test"), bank_words=6)  # not a power of two: a hole in the address space


def word(data: int) -> np.ndarray:
    return np.frombuffer(int(data).to_bytes(CONFIG.lanes, "little"), np.uint8)


def traffic(dut: Scratchpad, cycles: int, request_chance: float, addresses: int, seed: int, log: list):
    """Testbench: random requests on all ports, held until accepted; `log` gets what each cycle showed."""
    rng = np.random.default_rng(seed)

    async def bench(ctx) -> None:
        ports = [*dut.read, *dut.write]
        waiting = [False] * len(ports)
        for _ in range(cycles):
            for index, port in enumerate(ports):
                if not waiting[index]:
                    waiting[index] = rng.random() < request_chance
                    ctx.set(port.request.valid, waiting[index])
                    address = int(rng.integers(addresses))
                    if index < len(dut.read):
                        ctx.set(port.request.payload, address)
                    else:
                        ctx.set(port.request.payload, {
                            "address": address, "tag": 0, "mask": int(rng.integers(1 << CONFIG.lanes)),
                            "data": int.from_bytes(rng.bytes(CONFIG.lanes), "little")})
            accepted = [bool(ctx.get(port.request.valid & port.request.ready)) for port in ports]
            log.append({
                "read": [(accepted[i], ctx.get(port.request.payload)) for i, port in enumerate(dut.read)],
                "write": [(accepted[len(dut.read) + i], ctx.get(port.request.payload))
                          for i, port in enumerate(dut.write)],
                "data": [(ctx.get(port.data_valid), ctx.get(port.data)) for port in dut.read],
                "fault": ctx.get(dut.fault),
            })
            waiting = [wait and not ok for wait, ok in zip(waiting, accepted, strict=True)]
            await ctx.tick()

    return bench


@pytest.mark.parametrize(("request_chance", "addresses"), [(0.9, 48), (0.4, 16), (0.7, 64)])
def test_random_traffic(request_chance, addresses):
    dut = Scratchpad(CONFIG, readers=3, writers=2)
    log: list = []
    sim = simulator(dut)
    sim.add_testbench(traffic(dut, 400, request_chance, addresses, 5, log))
    run(sim)

    pool = np.zeros((CONFIG.pool_words, CONFIG.lanes), np.uint8)
    expected: list[dict] = [{} for _ in range(len(log) + READ_LATENCY)]  # per cycle: reader -> word
    for cycle, entry in enumerate(log):
        fault = False
        written = [int(item.address) for ok, item in entry["write"] if ok]
        for kind, addresses_of in (("read", lambda item: item), ("write", lambda item: int(item.address))):
            banks = [addresses_of(item) % CONFIG.banks for ok, item in entry[kind] if ok]
            assert len(set(banks)) == len(banks), "two accesses of one bank in a cycle"
        for reader, (ok, address) in enumerate(entry["read"]):
            if ok:
                fault |= address >= len(pool)
                known = address < len(pool) and address not in written
                expected[cycle + READ_LATENCY][reader] = pool[address].copy() if known else None
        for ok, item in entry["write"]:
            fault |= ok and int(item.address) >= len(pool)
            if ok and int(item.address) < len(pool):
                keep = np.array([int(item.mask) >> lane & 1 for lane in range(CONFIG.lanes)], bool)
                pool[int(item.address), keep] = word(item.data)[keep]
        if cycle + 1 < len(log):
            assert log[cycle + 1]["fault"] == fault
    for entry, answers in zip(log, expected, strict=False):
        for reader, (valid, data) in enumerate(entry["data"]):
            assert valid == (reader in answers)
            if answers.get(reader) is not None:
                assert (word(data) == answers[reader]).all()


def test_priority_and_full_throughput():
    """Disjoint banks are served at once; in one bank the least index wins until it leaves."""
    dut = Scratchpad(CONFIG, readers=3, writers=1)
    order = []

    async def bench(ctx):
        for cycle in range(32):
            for index, port in enumerate(dut.read):
                ctx.set(port.request.valid, 1)
                ctx.set(port.request.payload, (cycle + index) % CONFIG.pool_words)
            assert all(ctx.get(port.request.ready) for port in dut.read)
            await ctx.tick()
        for port in dut.read:
            ctx.set(port.request.payload, CONFIG.banks)
        for _ in dut.read:
            first = next(i for i, port in enumerate(dut.read) if ctx.get(port.request.valid & port.request.ready))
            order.append(first)
            await ctx.tick()
            ctx.set(dut.read[first].request.valid, 0)

    sim = simulator(dut)
    sim.add_testbench(bench)
    run(sim)
    assert order == [0, 1, 2]
