"""What the layers of a Program computed, put together from the results of its instructions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict

import numpy as np

from weft.arch.errors import EngineFault
from weft.arch.isa import Instruction, Matrix, Row, RowOp, Unit
from weft.arch.program import Layer, Program

COMPUTE = (Unit.MATRIX.name, Unit.VECTOR.name, Unit.ROW.name)


class Results(ABC):
    """Takes the results of instructions in whatever order they come."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def add(self, index: int, instruction: Instruction, codes: np.ndarray) -> None:
        """Takes the codes of instruction `index`: the `on_result` hook of a Machine."""
        if instruction.tag >= len(self.program.layers):
            raise EngineFault(f"instruction {index} has tag {instruction.tag}, the Program has "
                              f"{len(self.program.layers)} layers; compile it again")
        layer = self.program.layers[instruction.tag]
        assert instruction.unit is not None
        if layer.unit.upper() == instruction.unit.name:
            self._add(index, layer, instruction, codes)

    @abstractmethod
    def _add(self, index: int, layer: Layer, instruction: Instruction, codes: np.ndarray) -> None: ...

    @abstractmethod
    def complete(self) -> dict[str, np.ndarray]:
        """The whole outputs. Raises EngineFault for one that the Program has computed only in part."""


def results_of(program: Program) -> Results:
    return LayerResults(program) if program.language is None else TokenResults(program)


class LayerResults(Results):
    """Layers of fixed height: int16 [height, width, channels]."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.codes: dict[str, np.ndarray] = {}
        self.covered: dict[str, np.ndarray] = {}  # bool [height, channels]
        for layer in (layer for layer in program.layers if layer.unit.upper() in COMPUTE):
            shape = (layer.height, layer.width, layer.channels)
            if self.codes.setdefault(layer.output, np.zeros(shape, np.int16)).shape != shape:
                raise EngineFault(f"layers disagree about the shape of '{layer.output}'; compile the Program again")
            self.covered.setdefault(layer.output, np.zeros((layer.height, layer.channels), bool))

    def _add(self, index: int, layer: Layer, instruction: Instruction, codes: np.ndarray) -> None:
        row = int(self.program.first_row[index])
        rows, columns = codes.shape[:2]
        part = _part(self.program, instruction)
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
        for output, covered in self.covered.items():
            if not covered.all():
                row, channel = np.argwhere(~covered)[0]
                raise EngineFault(f"row {row} of channel {channel} of '{output}' was never computed; compile again")
        return self.codes


class TokenResults(Results):
    """Layers of a language model: int32 [rows, channels], a row for every row of an instruction.

    The columns of an instruction are further positions, after those of the columns before. What one part
    (`first_part`) of a layer computes in the course of a run is appended. ARGMAX has two positions, the greatest
    element and its number. Layers that a run did not reach are left out.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.parts: dict[str, dict[tuple[int, ...], list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
        self.channels = {layer.output: layer.channels for layer in program.layers}

    def _add(self, index: int, layer: Layer, instruction: Instruction, codes: np.ndarray) -> None:
        rows = codes.reshape(len(codes), -1)
        start = int(self.program.first_part[index]) * _part(self.program, instruction)
        channel_of = layer.channel_of[start : start + rows.shape[1]]
        if len(channel_of) < rows.shape[1]:
            raise EngineFault(f"instruction {index} computes places {start}..{start + rows.shape[1] - 1}, outside "
                              f"layer '{layer.name}'; compile again")
        self.parts[layer.output][channel_of].append(rows.astype(np.int32))

    def complete(self) -> dict[str, np.ndarray]:
        layers = {}
        for output, parts in self.parts.items():
            pieces = [(np.array(channel_of), rows) for channel_of, found in parts.items() for rows in found]
            heights = np.zeros(self.channels[output], np.int64)
            for channel_of, rows in pieces:
                heights[channel_of[channel_of >= 0]] += len(rows)
            if heights.min() != heights.max():
                channel = int(heights.argmin())
                raise EngineFault(f"channel {channel} of '{output}' was computed for {heights[channel]} rows, others "
                                  f"for {heights.max()}; compile again")
            layer = layers[output] = np.zeros((heights[0], len(heights)), np.int32)
            done = np.zeros_like(heights)
            for channel_of, rows in pieces:
                kept = channel_of >= 0
                own = channel_of[kept]
                layer[done[own] + np.arange(len(rows))[:, None], own] = rows[:, kept]
                done[own] += len(rows)
        return layers


def _part(program: Program, instruction: Instruction) -> int:
    """Positions of a layer in one part of it."""
    config = program.config
    if isinstance(instruction, Row) and instruction.operation == RowOp.ARGMAX:
        return 2
    return config.columns if isinstance(instruction, Matrix) else config.lanes
