"""FunctionalDevice: a Device that executes Programs exactly and without time."""

from __future__ import annotations

import numpy as np

from weft.arch.config import EngineConfig
from weft.arch.device import Device
from weft.arch.errors import EngineFault
from weft.arch.isa import INSTRUCTION_BYTES, End, Instruction, Load, Store, Unit, decode
from weft.arch.program import Layer, Program
from weft.arch.trace import WRITERS, Trace, WriteLog
from weft.sim.machine import Machine


class FunctionalDevice(Device):
    """Runs a Program instruction by instruction in program order.

    After a run, `layers` maps Layer.output to the codes of every MATRIX and VECTOR layer, int16 [height, width,
    channels] by logical channel, not enlarged where the layer upsamples on writing. In a layer of COLUMNS,
    position (block*taps + tap)*lanes + lane of `channel_of` belongs to that block, tap and lane. Instructions
    of a layer's tag on a unit other than the layer's (packing for a stem) are not part of its result.

    Counters carry the names of the engine's registers: `<unit>_retired`, `bytes_read` (instructions included)
    and `bytes_written` (masked bytes included). With `trace`, the Trace holds the scratchpad writes in program
    order, all at cycle 0, and no start or retire times.
    """

    def __init__(self, config: EngineConfig, trace: bool = False) -> None:
        super().__init__(config)
        self.trace = trace
        self.layers: dict[str, np.ndarray] = {}
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

    def execute(self, program_address: int, length: int, segments: list[int]) -> tuple[dict[str, int], Trace | None]:
        results = LayerResults(self.program) if self.program else None
        machine = Machine(self.config, self._memory, segments, self.trace, results.add if results else None, self._pool)
        counters = {f"{unit.name.lower()}_retired": 0 for unit in Unit} | {"bytes_read": 0, "bytes_written": 0}
        logs: dict[Unit, list[WriteLog]] = {unit: [] for unit in WRITERS}
        for index in range(length):
            raw = self.read_memory(program_address + index * INSTRUCTION_BYTES, INSTRUCTION_BYTES)
            try:
                instruction = decode(raw)
            except ValueError as error:
                raise EngineFault(f"instruction {index}: {error}; compile the Program again") from error
            counters["bytes_read"] += INSTRUCTION_BYTES
            log = machine.step(index, instruction)
            if isinstance(instruction, End):
                break
            counters[f"{instruction.unit.name.lower()}_retired"] += 1
            if isinstance(instruction, Load):  # a Store is a Load with a mask
                moved = instruction.planes * instruction.rows * instruction.run * self.config.word_bytes
                counters["bytes_written" if isinstance(instruction, Store) else "bytes_read"] += moved
            if log is not None:
                logs[instruction.unit].append(log)
        else:
            raise EngineFault(f"the Program's {length} instructions have no END; compile it again")
        self.layers = results.complete() if results else {}
        if not self.trace:
            return counters, None
        return counters, Trace(writes={unit: _joined(part, self.config.lanes) for unit, part in logs.items()})


class LayerResults:
    """Puts the results of instructions, in whatever order they come, together to whole layer outputs."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.codes: dict[str, np.ndarray] = {}
        self.covered: dict[str, np.ndarray] = {}  # bool [height, channels]
        for layer in self._computed():
            shape = (layer.height, layer.width, layer.channels)
            if self.codes.setdefault(layer.output, np.zeros(shape, np.int16)).shape != shape:
                raise EngineFault(f"layers disagree about the shape of '{layer.output}'; compile the Program again")
            self.covered.setdefault(layer.output, np.zeros((layer.height, layer.channels), bool))

    def _computed(self) -> list[Layer]:
        compute = (Unit.MATRIX.name, Unit.VECTOR.name)
        return [layer for layer in self.program.layers if layer.unit.upper() in compute]

    def add(self, index: int, instruction: Instruction, codes: np.ndarray) -> None:
        """Takes the codes of instruction `index`: the `on_result` hook of a Machine."""
        if instruction.tag >= len(self.program.layers):
            raise EngineFault(f"instruction {index} has tag {instruction.tag}, the Program has "
                              f"{len(self.program.layers)} layers; compile it again")
        layer = self.program.layers[instruction.tag]
        if layer.unit.upper() != instruction.unit.name:
            return
        config, row = self.program.config, int(self.program.first_row[index])
        rows, columns = codes.shape[:2]
        part = config.columns if instruction.unit == Unit.MATRIX else config.lanes
        if codes.ndim == 4:  # COLUMNS: [rows, columns, taps, blocks*lanes] to blocks of taps
            taps = codes.shape[2]
            codes = codes.reshape(rows, columns, taps, -1, part).swapaxes(2, 3).reshape(rows, columns, -1)
            part *= taps
        start = int(self.program.first_part[index]) * part
        channel_of = np.array(layer.channel_of[start : start + codes.shape[2]])
        if columns != layer.width or row + rows > layer.height or len(channel_of) < codes.shape[2]:
            raise EngineFault(f"instruction {index} computes rows {row}..{row + rows - 1}, {columns} columns, places "
                              f"{start}..{start + codes.shape[2] - 1}, outside layer '{layer.name}'; compile again")
        kept = channel_of >= 0
        self.codes[layer.output][row : row + rows, :, channel_of[kept]] = codes[:, :, kept]
        self.covered[layer.output][row : row + rows, channel_of[kept]] = True

    def complete(self) -> dict[str, np.ndarray]:
        """The whole outputs. Raises EngineFault for one that the Program has computed only in part."""
        for output, covered in self.covered.items():
            if not covered.all():
                row, channel = np.argwhere(~covered)[0]
                raise EngineFault(f"row {row} of channel {channel} of '{output}' was never computed; compile again")
        return self.codes


def _joined(logs: list[WriteLog], lanes: int) -> WriteLog:
    if not logs:
        return WriteLog(np.zeros(0, np.uint64), np.zeros(0, np.uint16), np.zeros(0, np.uint16),
                        np.zeros((0, lanes), np.uint8), np.zeros((0, lanes), bool))
    return WriteLog(*(np.concatenate([getattr(log, name) for log in logs])
                      for name in ("cycle", "address", "tag", "data", "mask")))
