"""A Program with registers and a loop: running sums of table rows, each quantized and multiplied by a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from weft.arch import numerics
from weft.arch.config import EngineConfig
from weft.arch.isa import End, Instruction, Load, Matrix, Read, Row, RowOp, ScalarOp, Store
from weft.arch.program import Language, Layer, Program, Segment
from weft.compiler.assembler import Assembler
from weft.compiler.footprint import footprint

ROWS, MOST, OUTPUTS = 5, 12, 8  # rows of the table, steps of a run, columns of the matrix
FIRST, COUNT = 0, 1  # arguments: number of the first step, and of those after it
NEW, SUM, CODES, SCALE, PARAMETERS, RESULT = 10, 20, 30, 40, 50, 80  # scratchpad
HIGH = 1  # from low to high bytes
ITSELF = (1 << 15, 15)  # a scale of 1


@dataclass
class Looped:
    """What the Program computes with."""

    config: EngineConfig
    table: np.ndarray  # int16 [ROWS, lanes]
    weights: np.ndarray  # int [lanes, OUTPUTS], 4 bits

    @classmethod
    def random(cls, config: EngineConfig, seed: int = 0) -> Looped:
        rng = np.random.default_rng(seed)
        return cls(config, rng.integers(-9000, 9000, (ROWS, config.lanes)),
                   rng.integers(-8, 8, (config.lanes, OUTPUTS)))

    def expected(self, choice: np.ndarray) -> dict[str, np.ndarray]:
        """Results of the steps that add the rows `choice` of the table."""
        sums, total = [], np.zeros(self.config.lanes, np.int64)
        for row in choice:
            total = numerics.saturate16(self.table[row] + total)
            sums.append(total)
        codes, magnitude = numerics.quantize_row(np.array(sums), 127)
        one = numerics.normalize(np.ones(len(choice), np.int64))
        mult, shift = numerics.combine_scales(*numerics.ratio_scale(magnitude, *one), *ITSELF)
        scale = numerics.combine_scales(mult, shift, *ITSELF)
        result = numerics.requantize(codes @ self.weights, *(part[:, None] for part in scale), *numerics.INT16)
        return {"sum": np.array(sums), "codes": codes, "result": result}

    def constants(self) -> bytes:
        """The table and a row of zeros, scales, weights."""
        lanes, columns = self.config.lanes, self.config.columns
        rows = np.concatenate([self.table, np.zeros((1, lanes), np.int64)]).astype("<i2")
        words = np.stack([rows & 255, rows >> 8 & 255], axis=1).astype(np.uint8)
        tiles = OUTPUTS // columns
        scales = np.zeros((tiles, self.config.plain_parameter_words * lanes), np.uint8)
        scales.view("<u4")[:, :columns] = ITSELF[0] | ITSELF[1] << 16
        weights = self.weights.reshape(lanes, tiles, columns).transpose(1, 0, 2).astype(np.uint8) & 15
        return words.tobytes() + scales.tobytes() + (weights[:, ::2] | weights[:, 1::2] << 4).tobytes()

    def assembled(self) -> Assembler:
        """Registers: the number of the step, its row of the table, an address, one behind the last step."""
        config, lanes = self.config, self.config.lanes
        tiles, row_bytes = OUTPUTS // config.columns, 2 * lanes
        scale_words = tiles * config.plain_parameter_words
        constant_words = scale_words + tiles * config.tile_words(1)
        a = Assembler(config, {int(Segment.OUTPUT): MOST * 2})
        step, row, address, last = (a.register() for _ in range(4))

        def emit(instruction: Instruction, **registers: int) -> None:
            a.append(instruction.bind(**registers), footprint(instruction, config))

        emit(Load(base=Segment.CONSTANTS, offset=(ROWS + 1) * row_bytes, address=PARAMETERS, run=constant_words, rows=1,
                  planes=1, tag=2))
        emit(Load(base=Segment.CONSTANTS, offset=ROWS * row_bytes, address=SUM, run=2, rows=1, planes=1))
        a.set(step, 0)
        a.compute(step, step, ScalarOp.ADD, FIRST)
        a.compute(last, FIRST, ScalarOp.ADD, COUNT)
        start = a.loop()
        a.compute(address, step, ScalarOp.MULTIPLY, value=4)
        a.append(Read(target=row, first=address, base=Segment.INPUT))
        a.compute(address, row, ScalarOp.MULTIPLY, value=row_bytes)
        emit(Load(base=Segment.CONSTANTS, address=NEW, run=2, rows=1, planes=1), offset=address)
        numbers = {"rows": 1, "columns": 1, "blocks": 1}
        emit(Row(operation=RowOp.ADD, **numbers, source=NEW, source_high=HIGH, other=SUM, other_high=HIGH, target=SUM,
                 target_high=HIGH))
        emit(Row(operation=RowOp.QUANTIZE, **numbers, source=SUM, source_high=HIGH, target=CODES, scale=SCALE,
                 mult=ITSELF[0], shift=ITSELF[1], tag=1))
        emit(Matrix(**numbers, source=CODES, kernel_y=1, kernel_x=1, height=1, width=1, ring=1, pitch=1, target=RESULT,
                    target_ring=1, target_step_y=1, target_step_x=1, target_high=HIGH, plain=1, double=1, scaled=1,
                    scales=SCALE, parameters=PARAMETERS, weights=PARAMETERS + scale_words, tiles=tiles, tag=2))
        a.compute(address, step, ScalarOp.MULTIPLY, value=row_bytes)
        emit(Store(base=Segment.OUTPUT, address=RESULT, run=2, rows=1, planes=1, mask=(1 << OUTPUTS) - 1, tag=2),
             offset=address)
        a.compute(step, step, ScalarOp.ADD, value=1)
        a.again(start, step, last)
        a.append(End())
        return a

    def program(self) -> Program:
        a, constants, lanes = self.assembled(), self.constants(), self.config.lanes
        return Program(
            config=self.config, fingerprint=self.config.fingerprint, model="looped",
            instructions=np.array([np.frombuffer(i.encode(), np.uint8) for i in a.instructions]),
            constants=np.frombuffer(constants, np.uint8), first_row=np.array(a.rows, np.int32),
            first_part=np.array(a.parts, np.int32), segment_bytes=(len(constants), 0, 4 * MOST, 2 * lanes * MOST, 0),
            inputs=(), outputs=(), language=Language(0, MOST, 0, 0, 0, 0, 1.0, 0, 0),
            layers=(Layer("sum", "add", "sum", "row", 0, 1, lanes, tuple(range(lanes)), False),
                    Layer("codes", "quantize", "codes", "row", 0, 1, lanes, tuple(range(lanes)), False),
                    Layer("result", "matrix", "result", "matrix", 0, 1, OUTPUTS, tuple(range(OUTPUTS)), False)),
        )
