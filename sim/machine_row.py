"""ROW: work on whole rows of 16-bit numbers. Arrays have axes [rows, columns, blocks, lanes]."""

from __future__ import annotations

import numpy as np

from weft.arch import numerics
from weft.arch.isa import SCALE_FIELDS, Row, RowLayout, RowOp
from weft.sim.machine_state import NEVER, MachineState, axes

ANSWER_FIELDS = [("value", "<i2"), ("unused", "<u2"), ("number", "<u4")]  # of the word that ARGMAX writes
MAPS = (RowOp.ADD, RowOp.MULTIPLY, RowOp.CONVOLVE, RowOp.SWIGLU, RowOp.EXPAND)
PRODUCTS = (RowOp.MULTIPLY, RowOp.CONVOLVE, RowOp.SWIGLU)


class RowUnit(MachineState):
    """A step is a block of a row, or the end of a row: what it reads must not be written at any other step."""

    def _row(self, i: Row) -> None:
        self._check_row(i)
        operation = RowOp(i.operation)
        if operation in MAPS:
            values = self._map(i, operation)
            if self.on_result:
                self.on_result(self._index, i, values.reshape(i.rows, i.columns, -1))
            self._put_numbers(i, values)
        elif operation == RowOp.ARGMAX:
            self._argmax(i)
        else:
            self._codes(i, operation)

    def _check_row(self, i: Row) -> None:
        self._require_positive("rows", "columns", "blocks")
        self._require(i.operation in tuple(RowOp), f"operation {i.operation} is not defined")
        self._require(i.layout in tuple(RowLayout), f"layout {i.layout} is not defined")
        elements = i.blocks * self.config.lanes
        match RowOp(i.operation):
            case RowOp.CONVOLVE:
                self._require_positive("span")
                self._require(i.columns == 1, f"CONVOLVE of {i.columns} columns, there must be 1")
            case RowOp.SWIGLU:
                self._require(i.up <= 3, f"up {i.up} is above 3")
            case RowOp.QUANTIZE if i.rotate:
                self._require_positive("span")
                self._require(i.weighted, "rotate asks for weighted")
                self._require(2 * i.span <= i.blocks, f"rotate over {2 * i.span} blocks of {i.blocks}")
            case RowOp.SOFTMAX:
                self._require_positive("length")
                last = i.length + (i.rows - 1) * i.length_step
                self._require(last <= elements, f"length {last} in a row of {elements} elements")
            case RowOp.ARGMAX:
                self._require_positive("length")
                self._require(i.length <= elements, f"length {i.length} in a row of {elements} elements")
            case RowOp.EXPAND:
                self._require(i.length < self.config.columns,
                              f"column {i.length} of tiles of {self.config.columns} columns")
        if i.operation == RowOp.QUANTIZE and i.normalize:
            self._require_positive("constant")
        if i.operation in (RowOp.QUANTIZE, RowOp.SOFTMAX, RowOp.EXPAND):
            self._require(i.shift <= numerics.MAX_COMBINED_SHIFT, f"shift {i.shift} of a scale is above "
                          f"{numerics.MAX_COMBINED_SHIFT}")
        if i.operation in PRODUCTS:
            self._require(i.shift <= numerics.MAX_SHIFT, f"shift {i.shift} is above {numerics.MAX_SHIFT}")

    # Access. Addresses and steps have axes [rows, columns, words].

    def _steps(self, i: Row, block: np.ndarray | int) -> np.ndarray:
        """Number of the step for block `block` (`blocks`: the end) of every row."""
        row, column, _ = axes(i.rows, i.columns, 1)
        return (row * i.columns + column) * (i.blocks + 1) + block

    def _place(self, i: Row, name: str, step: int = 0) -> np.ndarray:
        """Words of every block of an operand or the destination, not yet modulo 2**16; `step` from block to block."""
        row, column, block = axes(i.rows, i.columns, i.blocks)
        first = getattr(i, name) + row * getattr(i, f"{name}_row") + column * getattr(i, f"{name}_column")
        return first + block * (step or getattr(i, f"{name}_plane"))

    def _numbers(self, address: np.ndarray, high: int, steps: np.ndarray | int, signed: bool = True) -> np.ndarray:
        """The numbers int64 [..., lanes] with low bytes in the words at `address`, high ones `high` further on."""
        low_words, high_words = self._words(address), self._words(address + high)
        self._reads += [(words, np.broadcast_to(steps, words.shape)) for words in (low_words, high_words)]
        upper = self.pool.view(np.int8)[high_words] if signed else self.pool[high_words]
        return upper.astype(np.int64) << 8 | self.pool[low_words]

    def _operand(self, i: Row, name: str, tap: int = 0, signed: bool = True) -> np.ndarray:
        address = self._place(i, name) + tap * getattr(i, f"{name}_column")
        return self._numbers(address, getattr(i, f"{name}_high"), self._steps(i, np.arange(i.blocks)), signed)

    def _put(self, address: np.ndarray, data: np.ndarray, steps: np.ndarray) -> None:
        """Writes bytes [rows, columns, words, lanes], in this order."""
        address, steps = self._words(address), np.broadcast_to(steps, address.shape)
        first = np.full(self.config.pool_words, NEVER)
        last = np.full(self.config.pool_words, -1)
        np.minimum.at(first, address, steps)
        np.maximum.at(last, address, steps)
        for words, when in self._reads:
            clash = (last[words] >= 0) & ((first[words] != when) | (last[words] != when))
            if clash.any():
                self._fault(f"reads scratchpad word {int(words[clash][0])}, which another step of it writes")
        address, data = address.ravel(), data.astype(np.uint8).reshape(address.size, -1)
        self.pool[address] = data
        self._write(address, np.ones(1, bool), data)

    def _put_numbers(self, i: Row, values: np.ndarray) -> None:
        address = self._place(i, "target")[..., None] + np.array([0, i.target_high])
        steps = self._steps(i, np.arange(i.blocks))[..., None]
        self._put(address, np.stack([values & 255, values >> 8 & 255], axis=3), steps)

    # Maps

    def _map(self, i: Row, operation: RowOp) -> np.ndarray:
        """Results int64, each from the numbers of its own place."""
        if operation == RowOp.EXPAND:
            return self._expand(i)
        if operation == RowOp.CONVOLVE:
            values = sum((self._operand(i, "source", tap) * self._operand(i, "other", tap) for tap in range(i.span)),
                         np.zeros(1, np.int64))
            self._require_int32(values)
        else:
            x, o = self._operand(i, "source"), self._operand(i, "other")
            if operation == RowOp.ADD:
                return numerics.saturate16(numerics.round_shift(x, i.up) + o)
            values = (numerics.silu(x, i.up) if operation == RowOp.SWIGLU else x) * o
        return numerics.saturate16(numerics.round_shift(values, i.shift))

    def _expand(self, i: Row) -> np.ndarray:
        c = self.config
        own = c.weight_words(False)
        block = np.arange(i.blocks)
        group, member = np.divmod(block, c.scaled_words)
        factor_word = group * (1 + c.scaled_words * own)  # of the stream
        row, column, _ = axes(i.rows, i.columns, 1)
        stream = i.source + row * i.source_row + column * i.source_column
        words = (stream + factor_word + 1 + member * own)[..., None] + np.arange(own)
        raw = self._constant_words(words).reshape(*words.shape[:3], -1, c.columns)[..., i.length]
        weights = np.stack([(raw << 4).view(np.int8) >> 4, raw.view(np.int8) >> 4], axis=-1)
        weights = weights.reshape(*weights.shape[:3], -1).astype(np.int64)
        lane = member * c.columns + i.length
        factors = np.take_along_axis(self._constant_words(stream + factor_word), lane[:, None][None, None], axis=3)
        parameters = i.other + row * i.other_row + column * i.other_column + np.arange(c.plain_parameter_words)
        raw = self._constant_words(parameters).reshape(i.rows * i.columns, -1, c.lanes)
        mult, shift = (part[:, i.length].reshape(i.rows, i.columns, 1, 1)
                       for part in self._scale_fields(raw, c.columns, numerics.MAX_COMBINED_SHIFT))
        scale = numerics.combine_scales(mult, shift, i.mult, i.shift)
        return numerics.requantize(weights * factors, *scale, *numerics.INT16)

    def _constant_words(self, address: np.ndarray) -> np.ndarray:
        """Words that the instruction must not write."""
        address = self._words(address)
        self._reads.append((address, np.full(address.shape, NEVER)))
        return self.pool[address]

    def _require_int32(self, values: np.ndarray) -> None:
        least, most = int(values.min()), int(values.max())
        if least < numerics.ACC_MIN or most > numerics.ACC_MAX:
            self._fault(f"sums reach {least if least < numerics.ACC_MIN else most}, outside 32 bits",
                        "use smaller factors in this layer")

    # Codes and scales

    def _codes(self, i: Row, operation: RowOp) -> None:
        codes, magnitude, divisor = self._softmax(i) if operation == RowOp.SOFTMAX else self._quantize(i)
        if self.on_result:
            self.on_result(self._index, i, codes)
        words, address = self._laid_out(i, codes.reshape(i.rows, i.columns, i.blocks, -1))
        count = words.shape[3]  # of a block
        steps = np.repeat(self._steps(i, np.arange(i.blocks)), count, axis=2)
        scale_words = self._scale_words(i, magnitude, divisor)
        row, column, word = axes(i.rows, i.columns, scale_words.shape[2])
        self._put(
            np.concatenate([address, i.scale + row * i.scale_row + column * i.scale_column + word], axis=2),
            np.concatenate([words.reshape(*address.shape, -1) & 255, scale_words], axis=2),
            np.concatenate([steps, self._steps(i, np.full(scale_words.shape[2], i.blocks))], axis=2))

    def _quantize(self, i: Row) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Codes [rows, columns, blocks*lanes], magnitude and normalized divisor [rows, columns]."""
        x = self._operand(i, "source")
        values = x * self._operand(i, "other") if i.weighted else x
        if i.rotate:
            values = self._rotated(i, numerics.round_shift(values, 15))
        total = np.ones((i.rows, i.columns), np.int64)
        if i.normalize:
            total = (x * x).sum(axis=(2, 3)) + i.constant
            if total.max() >= 1 << 48:
                self._fault(f"the sum of squares reaches {int(total.max())}, beyond 48 bits",
                            "use a larger scale for this layer's input")
        divisor = numerics.normalized_root(total) if i.normalize else numerics.normalize(total)
        codes, magnitude = numerics.quantize_row(values.reshape(i.rows, i.columns, -1), numerics.CODE_PEAK)
        return codes, magnitude, divisor

    def _rotated(self, i: Row, values: np.ndarray) -> np.ndarray:
        """Pairs of the first 2*span blocks rotated, the others in the same unit."""
        block = np.arange(2 * i.span)
        partner = self._steps(i, (block + i.span) % (2 * i.span))
        for name in ("source", "other"):  # a block is read for its partner too
            low = self._place(i, name)[:, :, block]
            self._reads += [(self._words(low + high), partner) for high in (0, getattr(i, f"{name}_high"))]
        row, _, pair = axes(i.rows, 1, i.span)
        table = i.table + 4 * (row * i.span + pair)
        cosine, sine = self._numbers(table, 1, NEVER), self._numbers(table + 2, 1, NEVER)
        turned = numerics.rotate(values[:, :, : i.span], values[:, :, i.span : 2 * i.span], cosine, sine)
        return np.concatenate([*turned, values[:, :, 2 * i.span :] << numerics.ROTATION_BITS], axis=2)

    def _softmax(self, i: Row) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
        shape = (i.rows, i.columns, i.blocks * self.config.lanes)
        scores = self._operand(i, "source").reshape(shape)
        weights = self._operand(i, "other", signed=False).reshape(shape)
        codes = np.zeros(shape, np.int64)
        magnitude, total = (np.zeros(shape[:2], np.int64) for _ in range(2))
        for row in range(i.rows):
            n = i.length + row * i.length_step
            least, most = int(weights[row, :, :n].min()), int(weights[row, :, :n].max())
            self._require(least >= 1 and most <= 1 << 15, f"weights {least}..{most} of SOFTMAX, must be 1..32768")
            part = numerics.softmax_row(scores[row, :, :n], weights[row, :, :n])
            codes[row, :, :n], magnitude[row], total[row] = part
        return codes, magnitude, numerics.normalize(total)

    def _laid_out(self, i: Row, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Words of each block [rows, columns, blocks, words, lanes], and the address of each [rows, columns, words]."""
        c = self.config
        if i.layout == RowLayout.PLAIN:
            return codes[:, :, :, None], self._place(i, "target")
        if i.layout == RowLayout.KEYS:
            words = np.repeat(codes, c.columns, axis=3).reshape(*codes.shape[:3], c.columns, c.lanes)
            address = self._place(i, "target")[..., None] + np.arange(c.columns)
        else:
            tiles = c.lanes // c.columns
            words = np.tile(codes.reshape(*codes.shape[:3], tiles, c.columns), tiles)
            address = self._place(i, "target", tiles * i.target_plane)[..., None] + np.arange(tiles) * i.target_plane
        return words, address.reshape(i.rows, i.columns, -1)

    def _scale_words(self, i: Row, magnitude: np.ndarray, divisor: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """The words of every row's scale [rows, columns, 1 or 2, lanes]."""
        lanes = self.config.lanes
        if i.layout == RowLayout.VALUES:
            if magnitude.max() >= 1 << 16:
                self._fault(f"the magnitude {int(magnitude.max())} does not fit the two bytes of VALUES")
            data = np.stack([magnitude & 255, magnitude >> 8], axis=2).astype(np.uint8)
            return np.broadcast_to(data[..., None], (*data.shape, lanes))
        mult, shift = numerics.combine_scales(*numerics.ratio_scale(magnitude, *divisor), i.mult, i.shift)
        scale = np.zeros((*mult.shape, 1), np.dtype(SCALE_FIELDS))
        scale["mult"], scale["shift"] = mult[..., None], shift[..., None]
        return np.tile(scale.view(np.uint8), lanes // scale.itemsize)[:, :, None]

    # ARGMAX

    def _argmax(self, i: Row) -> None:
        end = self._steps(i, np.array([i.blocks]))
        low = self._place(i, "source")
        x = self._numbers(low, i.source_high, np.broadcast_to(end, low.shape)).reshape(i.rows, i.columns, -1)
        x = x[:, :, : i.length]
        number = x.argmax(axis=2)
        value = np.take_along_axis(x, number[..., None], axis=2)[..., 0]
        number = (number + i.constant) % (1 << 32)
        row, column = axes(i.rows, i.columns)
        if not i.first:
            address = self._words(i.other + row * i.other_row + column * i.other_column)
            self._reads.append((address, end[..., 0]))
            earlier = self.pool[address].view(np.dtype(ANSWER_FIELDS))[..., 0]
            stays = value <= earlier["value"]
            value, number = np.where(stays, earlier["value"], value), np.where(stays, earlier["number"], number)
        if self.on_result:
            self.on_result(self._index, i, np.stack([value, number], axis=2))
        answer = np.zeros((i.rows, i.columns, self.config.lanes), np.uint8)
        fields = answer.view(np.dtype(ANSWER_FIELDS))[..., 0]
        fields["value"], fields["number"] = value, number
        address = i.target + row * i.target_row + column * i.target_column
        self._put(address[..., None], answer[:, :, None], end)
