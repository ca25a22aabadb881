"""Device: anything that runs a Program. Subclasses supply memory access and execution; the rest is common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from weft.arch.config import EngineConfig
from weft.arch.errors import ModelError
from weft.arch.isa import INSTRUCTION_BYTES
from weft.arch.program import Program, Segment
from weft.arch.trace import Trace

ALIGNMENT = 4096  # of every segment: a burst boundary


@dataclass
class RunResult:
    """Outputs (codes, int16 [height, width, channels]), engine counters by register name, and the trace."""

    outputs: dict[str, np.ndarray]
    counters: dict[str, int] = field(default_factory=dict)
    trace: Trace | None = None

    @property
    def cycles(self) -> int:
        """Cycles from start to done; 0 from a Device without time."""
        return self.counters.get("cycles", 0)


class Device(ABC):
    """Runs Programs compiled for `config`. Load once, run many inputs; memory persists between runs."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.program: Program | None = None
        self._segments: list[int] = []
        self._program_address = 0

    @abstractmethod
    def write_memory(self, address: int, data: bytes) -> None:
        """Writes bytes to the memory that the engine sees."""

    @abstractmethod
    def read_memory(self, address: int, size: int) -> bytes:
        """Reads bytes from that memory."""

    @abstractmethod
    def allocate(self, size: int) -> None:
        """Makes memory addresses 0 .. size-1 available, all zero."""

    @abstractmethod
    def execute(
        self, program_address: int, length: int, segments: list[int], arguments: Sequence[int]
    ) -> tuple[dict[str, int], Trace | None]:
        """Runs a program of `length` instructions with its argument registers set. Returns counters and trace.

        Raises EngineFault when the engine stops early.
        """

    def load(self, program: Program, sequences: int = 1) -> None:
        """Puts a Program and its constants into memory, with room for `sequences` of a language model.

        Raises ModelError when it is for another engine.
        """
        program.require_config(self.config)
        self._segments, top = [], 0
        for segment, size in enumerate(program.segment_bytes):
            if segment == Segment.CACHE:
                size *= sequences
            self._segments.append(top)
            top += -(-size // ALIGNMENT) * ALIGNMENT
        self._program_address = top
        self.allocate(top + len(program.instructions) * INSTRUCTION_BYTES)
        self.write_memory(self._segments[Segment.CONSTANTS], program.constants.tobytes())
        self.write_memory(self._program_address, program.instructions.tobytes())
        self.program = program

    def run(self, inputs: dict[str, np.ndarray]) -> RunResult:
        """One inference. `inputs` maps names to codes [height, width, channels]."""
        program = self.program
        if program is None:
            raise ModelError("no Program is loaded; call load() first")
        if set(inputs) != {tensor.name for tensor in program.inputs}:
            raise ModelError(f"inputs given: {sorted(inputs)}; wanted: {sorted(t.name for t in program.inputs)}")
        for tensor in program.inputs:
            self.write_segment(Segment.INPUT, tensor.offset, tensor.pack(inputs[tensor.name]))
        result = self.start()
        result.outputs = {
            tensor.name: tensor.unpack(self.read_segment(Segment.OUTPUT, tensor.offset, tensor.size))
            for tensor in program.outputs
        }
        return result

    def start(self, arguments: Sequence[int] = ()) -> RunResult:
        """Runs the loaded Program on what its segments hold. The result has no outputs."""
        if self.program is None:
            raise ModelError("no Program is loaded; call load() first")
        return RunResult({}, *self.execute(
            self._program_address, len(self.program.instructions), self._segments, arguments))

    def write_segment(self, segment: Segment, offset: int, data: bytes) -> None:
        """Writes bytes into a memory segment of the loaded Program."""
        self.write_memory(self._segments[segment] + offset, data)

    def read_segment(self, segment: Segment, offset: int, size: int) -> bytes:
        """Reads bytes from a memory segment of the loaded Program."""
        return self.read_memory(self._segments[segment] + offset, size)
