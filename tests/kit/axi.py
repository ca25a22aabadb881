"""An AXI4 memory for Amaranth's simulator that checks what it is asked.

    memory = AXIMemory(config, size, seed=1, latency=40, rate=14.5, waits=Waits(3))
    sim.add_testbench(memory.serve(dut.bus), background=True)
    run(sim)
    memory.bytes, memory.bursts
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from tests.kit.streams import NONE, Waits
from weft.arch.config import EngineConfig

SLVERR = 2
CHANNELS = {
    "ar": ("id", "addr", "len", "size", "burst"),
    "aw": ("id", "addr", "len", "size", "burst"),
    "w": ("data", "strb", "last"),
}


class Burst(NamedTuple):
    cycle: int
    channel: str  # "ar" or "aw"
    id: int
    address: int
    beats: int


class AXIMemory:
    """Memory behind an AXI4 port: responses of one ID in order, of several IDs in any order.

    latency: cycles from an accepted read address to its first beat, or from the last beat of a write to its response.
    rate: bytes per cycle of the read channel at most. waits: when a channel pauses. `failing(address)` says which
    bursts are answered with SLVERR. Fails the test when a request changes while it waits, when a burst is longer
    than the configuration allows, crosses 4 KB, is not aligned, INCR and of the full width, or when WLAST is wrong.
    """

    def __init__(self, config: EngineConfig, size: int, seed: int = 1, latency: int = 1, rate: float | None = None,
                 waits: Waits = NONE, failing=lambda address: False) -> None:
        self.config, self.latency, self.rate = config, latency, rate or config.bus_bytes
        self.waits, self.failing = waits, failing
        self.bytes = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
        self.bursts: list[Burst] = []
        self.cycle = 0
        self.beats_read = 0

    def serve(self, bus):
        """Background testbench on a bus as a manager has it."""
        requests = {name: [getattr(bus, name + "valid"), *(getattr(bus, name + part) for part in parts)]
                    for name, parts in CHANNELS.items()}
        lengths = [len(signals) for signals in requests.values()]
        reads: dict[int, deque] = {}  # id: (due, addresses left, error)
        writes: deque[Burst] = deque()
        replies: deque[tuple[int, int, int]] = deque()  # due, id, response
        width = self.config.bus_bytes

        async def bench(ctx) -> None:
            held: dict[str, tuple | None] = dict.fromkeys(requests)
            beat, reply, current, credit, written = None, None, None, 0.0, 0
            while True:
                ready = {name: not self.waits.now() for name in requests}
                ready["w"] &= bool(writes)
                for name in requests:
                    ctx.set(getattr(bus, name + "ready"), ready[name])
                credit = min(credit + self.rate, 2 * width)
                if beat is None and credit >= width and not self.waits.now():
                    due = [key for key, queue in reads.items() if queue and queue[0][0] <= self.cycle]
                    if current not in due:
                        current = self.waits.random.choice(due) if due else None
                    if current is not None:
                        _, addresses, error = reads[current][0]
                        address = addresses.popleft()
                        beat = (current, address, error, not addresses)
                        if not addresses:
                            reads[current].popleft()
                            current = None
                        credit -= width
                ctx.set(bus.rvalid, beat is not None)
                if beat is not None:
                    ctx.set(bus.rid, beat[0])
                    ctx.set(bus.rdata, int.from_bytes(self.bytes[beat[1]:beat[1] + width].tobytes(), "little"))
                    ctx.set(bus.rresp, SLVERR * beat[2])
                    ctx.set(bus.rlast, beat[3])
                if reply is None and replies and replies[0][0] <= self.cycle and not self.waits.now():
                    reply = replies.popleft()
                ctx.set(bus.bvalid, reply is not None)
                if reply is not None:
                    ctx.set(bus.bid, reply[1])
                    ctx.set(bus.bresp, reply[2])

                sampled = await ctx.tick().sample(
                    bus.rready, bus.bready, *(signal for signals in requests.values() for signal in signals))
                rready, bready, rest = sampled[2], sampled[3], list(sampled[4:])
                for name, length in zip(requests, lengths, strict=True):
                    (valid, *payload), rest = rest[:length], rest[length:]
                    assert held[name] is None or (valid and held[name] == payload), f"{name} changed while it waited"
                    held[name] = payload if valid and not ready[name] else None
                    if not (valid and ready[name]):
                        continue
                    if name == "w":
                        burst = writes[0]
                        data, strb, last = payload
                        self._write(burst.address + written * width, data, strb)
                        written += 1
                        assert last == (written == burst.beats), "WLAST"
                        if last:
                            writes.popleft()
                            replies.append((self.cycle + self.latency, burst.id, SLVERR * self.failing(burst.address)))
                            written = 0
                        continue
                    burst = self._burst(name, *payload)
                    if name == "aw":
                        writes.append(burst)
                    else:
                        addresses = deque(burst.address + width * i for i in range(burst.beats))
                        reads.setdefault(burst.id, deque()).append(
                            (self.cycle + self.latency, addresses, self.failing(burst.address)))
                if beat is not None and rready:
                    beat, self.beats_read = None, self.beats_read + 1
                if reply is not None and bready:
                    reply = None
                self.cycle += 1

        return bench

    def _burst(self, channel: str, number: int, address: int, length: int, size: int, kind: int) -> Burst:
        width, burst = self.config.bus_bytes, Burst(self.cycle, channel, number, address, length + 1)
        assert kind == 1 and 1 << size == width, f"{burst}: not INCR or not of the full width"
        assert address % width == 0, f"{burst}: not aligned"
        assert burst.beats <= self.config.burst_beats, f"{burst}: too long"
        assert address // 4096 == (address + burst.beats * width - 1) // 4096, f"{burst}: crosses 4 KB"
        assert address + burst.beats * width <= len(self.bytes), f"{burst}: outside the memory"
        self.bursts.append(burst)
        return burst

    def _write(self, address: int, data: int, strb: int) -> None:
        for byte in range(self.config.bus_bytes):
            if strb >> byte & 1:
                self.bytes[address + byte] = data >> 8 * byte & 0xFF
