"""A scratchpad that exists in the test only: a NumPy array behind the ports of hw/interfaces.py.

    memory = Memory(config, seed=1)
    memory.words[address] = ...                       # uint8, one row of `lanes` bytes per word
    sim.add_testbench(memory.serve(reads=[dut.activation, dut.weight], writes=[dut.result], waits=Waits(3)),
                      background=True)
    run(sim)
    memory.words, memory.log                          # contents, and every accepted write
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from tests.kit.streams import NONE, Waits
from weft.arch.config import EngineConfig
from weft.hw.interfaces import READ_LATENCY


class Write(NamedTuple):
    """An accepted write; `cycle` counts from the start of the simulation."""

    cycle: int
    address: int
    data: bytes
    mask: int
    tag: int


class Memory:
    """Words of `config`'s scratchpad. `serve` makes the testbench that answers units' read and write ports."""

    def __init__(self, config: EngineConfig, seed: int | None = None) -> None:
        self.config = config
        shape = (config.pool_words, config.lanes)
        self.words = np.zeros(shape, np.uint8)
        if seed is not None:
            self.words[:] = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        self.log: list[Write] = []
        self.reads = 0  # accepted read requests of all ports
        self.cycle = 0

    def serve(self, reads=(), writes=(), waits: Waits = NONE):
        """Background testbench on ports as a unit has them. A port is not ready in the cycles in which it waits.

        As in the real one, data follow READ_LATENCY cycles after the request, in cycles without data the
        lines carry garbage, and a write is seen by the requests of later cycles. An address outside the
        pool or a request withdrawn before it is accepted fails the test.
        """
        requests = [port.request for port in (*reads, *writes)]
        lines = [deque([None] * (READ_LATENCY - 1)) for _ in reads]

        async def bench(ctx) -> None:
            ready = [False] * len(requests)
            offered: list = [None] * len(requests)
            while True:
                for index, request in enumerate(requests):
                    ready[index] = not waits.now()
                    ctx.set(request.ready, ready[index])
                sampled = await ctx.tick().sample(
                    *(signal for request in requests for signal in (request.valid, request.payload)))
                items = list(zip(sampled[2::2], sampled[3::2], strict=True))
                for index, (valid, payload) in enumerate(items):
                    before = offered[index]
                    now = (_plain(payload) if valid else None)
                    assert before is None or before == now, f"port {index} changed a waiting request"
                    offered[index] = None if ready[index] else now
                for port, line, ok, (valid, payload) in zip(reads, lines, ready, items, strict=False):
                    line.append(int(payload) if valid and ok else None)
                    self._answer(ctx, port, line.popleft())
                    self.reads += bool(valid and ok)
                for ok, (valid, payload) in zip(ready[len(reads):], items[len(reads):], strict=True):
                    if valid and ok:
                        self._write(payload)
                self.cycle += 1

        return bench

    def _answer(self, ctx, port, address: int | None) -> None:
        if address is not None:
            assert address < len(self.words), f"read of word {address}, outside the pool"
        ctx.set(port.data_valid, address is not None)
        ctx.set(port.data, int.from_bytes(b"\xa5" * self.config.lanes if address is None
                                          else self.words[address].tobytes(), "little"))

    def _write(self, payload) -> None:
        lanes = self.config.lanes
        item = Write(self.cycle, int(payload.address), int(payload.data).to_bytes(lanes, "little"),
                     int(payload.mask), int(payload.tag))
        assert item.address < len(self.words), f"write of word {item.address}, outside the pool"
        self.log.append(item)
        keep = np.array([item.mask >> lane & 1 for lane in range(lanes)], bool)
        self.words[item.address, keep] = np.frombuffer(item.data, np.uint8)[keep]


def _plain(payload):
    """A payload as a number, to compare it."""
    return payload if isinstance(payload, int) else payload.as_bits()
