"""FunctionalDevice: a Device that executes Programs exactly and without time."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from weft.arch.config import EngineConfig
from weft.arch.control import dispatched
from weft.arch.device import Device
from weft.arch.errors import EngineFault, ModelError
from weft.arch.isa import INSTRUCTION_BYTES, Instruction, Load, Store, Unit, decode
from weft.arch.trace import WRITERS, Trace, WriteLog
from weft.sim.machine import Machine
from weft.sim.results import results_of

READ_BYTES = 4  # of a READ instruction
_decode = functools.lru_cache(1 << 14)(decode)  # loops, and runs, repeat their instructions
Step = tuple[int, Instruction, WriteLog | None]


class FunctionalDevice(Device):
    """Runs a Program instruction by instruction in the order of dispatch.

    After a run, `layers` maps Layer.output to the results of every MATRIX, VECTOR and ROW layer by logical channel:
    int16 [height, width, channels], not enlarged where the layer upsamples on writing, or in a language model int32
    [rows, channels] as TokenResults says. In a layer of COLUMNS, position (block*taps + tap)*lanes + lane of
    `channel_of` belongs to that block, tap and lane. Instructions of a layer's tag on a unit other than the layer's
    (packing for a stem) are not part of its result.

    Counters carry the names of the engine's registers: `<unit>_retired`, `bytes_read` (with every instruction
    executed, those of the dispatcher too, and four bytes for each READ) and `bytes_written` (masked bytes included).
    With `trace`, the Trace holds the scratchpad writes in program order, all at cycle 0, and no start or retire times.
    """

    def __init__(self, config: EngineConfig, trace: bool = False) -> None:
        super().__init__(config)
        self.trace = trace
        self.layers: dict[str, np.ndarray] = {}
        self.counters: dict[str, int] = {}
        # Kept from run to run, as on the engine: lanes that nobody writes hold what was there before.
        self._pool = np.zeros((config.pool_words, config.lanes), np.uint8)
        self._memory = np.zeros(0, np.uint8)

    def allocate(self, size: int) -> None:
        self._memory = np.zeros(size, np.uint8)

    def write_memory(self, address: int, data: bytes) -> None:
        self._span(address, len(data))[:] = np.frombuffer(data, np.uint8)

    def read_memory(self, address: int, size: int) -> bytes:
        return self._span(address, size).tobytes()

    def _span(self, address: int, size: int) -> np.ndarray:
        if not 0 <= address <= address + size <= len(self._memory):
            raise EngineFault(f"memory bytes {address}..{address + size - 1} are outside the {len(self._memory)} "
                              "allocated; load the Program before using its memory")
        return self._memory[address : address + size]

    def execute(
        self, program_address: int, length: int, segments: list[int], arguments: Sequence[int] = ()
    ) -> tuple[dict[str, int], Trace | None]:
        logs: dict[Unit, list[WriteLog]] = {unit: [] for unit in WRITERS}
        for _, instruction, log in self._steps(program_address, length, segments, arguments, self.trace):
            if log is not None and instruction.unit is not None:
                logs[instruction.unit].append(log)
        if not self.trace:
            return self.counters, None
        return self.counters, Trace(writes={unit: _joined(part, self.config.lanes) for unit, part in logs.items()})

    def steps(self, arguments: Sequence[int] = ()) -> Iterator[Step]:
        """Runs the loaded Program one instruction for each item taken: its number, itself as its unit gets it, and
        its scratchpad writes. `layers` and `counters` are those of the run once the last item was taken."""
        if self.program is None:
            raise ModelError("no Program is loaded; call load() first")
        return self._steps(self._program_address, len(self.program.instructions), self._segments, arguments, True)

    def _steps(self, program_address: int, length: int, segments: list[int], arguments: Sequence[int],
               trace: bool) -> Iterator[Step]:
        results = results_of(self.program) if self.program else None
        machine = Machine(self.config, self._memory, segments, trace, results.add if results else None, self._pool)
        counters = {f"{unit.name.lower()}_retired": 0 for unit in Unit} | {"bytes_read": 0, "bytes_written": 0}
        def fetch(index: int) -> Instruction:
            counters["bytes_read"] += INSTRUCTION_BYTES
            raw = self.read_memory(program_address + index * INSTRUCTION_BYTES, INSTRUCTION_BYTES)
            try:
                return _decode(raw)
            except ValueError as error:
                raise EngineFault(f"instruction {index}: {error}; compile the Program again") from error

        def read(segment: int, offset: int) -> int:
            if segment >= len(segments) or offset % READ_BYTES:
                raise EngineFault(f"READ of byte {offset} of segment {segment}, which is not set or not a multiple of "
                                  f"{READ_BYTES}; compile the Program again")
            counters["bytes_read"] += READ_BYTES
            return int.from_bytes(self.read_memory(segments[segment] + offset, READ_BYTES), "little")

        for index, instruction in dispatched(fetch, length, arguments, read):
            log = machine.step(index, instruction)
            if instruction.unit is not None:
                counters[f"{instruction.unit.name.lower()}_retired"] += 1
            if isinstance(instruction, Load):  # a Store is a Load with a mask
                moved = instruction.planes * instruction.rows * instruction.run * self.config.word_bytes
                counters["bytes_written" if isinstance(instruction, Store) else "bytes_read"] += moved
            yield index, instruction, log
        self.counters = counters
        self.layers = results.complete() if results else {}


def _joined(logs: list[WriteLog], lanes: int) -> WriteLog:
    if not logs:
        return WriteLog(np.zeros(0, np.uint64), np.zeros(0, np.uint16), np.zeros(0, np.uint16),
                        np.zeros((0, lanes), np.uint8), np.zeros((0, lanes), bool))
    return WriteLog(*(np.concatenate([getattr(log, name) for log in logs])
                      for name in ("cycle", "address", "tag", "data", "mask")))
