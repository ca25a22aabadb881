"""Source window and destination of MATRIX and VECTOR; arrays of positions are [rows, columns, kernel_y, kernel_x]."""

from __future__ import annotations

import numpy as np

from weft.arch import numerics
from weft.arch.isa import Matrix, Vector
from weft.sim.machine_state import NEVER, MachineState, axes


class WindowUnit(MachineState):
    """What the two units have in common."""

    def _check_window(self, i: Matrix | Vector) -> None:
        self._require_positive("ring", "kernel_y", "kernel_x", "rows", "columns", "blocks", "target_ring")
        self._require(i.anchor < i.ring, f"anchor {i.anchor} is not below ring {i.ring}")
        self._require(i.target_anchor < i.target_ring,
                      f"target_anchor {i.target_anchor} is not below target_ring {i.target_ring}")
        self._require(i.target_step_y in (1, 2) and i.target_step_x in (1, 2), "a target step is neither 1 nor 2")

    def _check_codes(self, i: Matrix | Vector) -> None:
        fits = -128 <= i.low <= i.high <= 127 or 0 <= i.low <= i.high <= 255
        self._require(fits, f"output codes {i.low}..{i.high} do not fit a byte")

    def _grid(self, i: Matrix | Vector, row: int, dilation_y: int, dilation_x: int) -> tuple[np.ndarray, np.ndarray]:
        """Image position (y, x) of every tap, from image row `row` for output row 0, kernel row 0; broadcastable."""
        oy, ox, ky, kx = axes(i.rows, i.columns, i.kernel_y, i.kernel_x)
        return row + oy * i.stride_y + ky * dilation_y, ox * i.stride_x + kx * dilation_x - i.pad_x

    def _slots(self, i: Matrix | Vector, y: np.ndarray, strict: bool) -> tuple[np.ndarray, np.ndarray]:
        """Slot of image rows `y`, and whether they can be read.

        Image rows that the window does not hold are a fault when `strict`; deformed positions read them as zero.
        """
        relative = y - i.window_y
        inside = (y >= 0) & (y < i.height)
        held = (relative >= 0) & (relative < i.ring)
        if strict and (missing := inside & ~held).any():
            last = i.window_y + i.ring - 1
            self._fault(f"reads image row {int(y[missing][0])}, the window holds rows {i.window_y}..{last}")
        return wrap(i.anchor + relative, i.ring), inside & held

    def _gather(self, i: Matrix | Vector, y: np.ndarray, x: np.ndarray, *, strict: bool, outside: int = 0,
                tap_step: int = 0) -> np.ndarray:
        """Source codes at positions (y, x): int8 or uint8 [rows, columns, kernel_y, kernel_x, blocks, lanes]."""
        slot, valid = self._slots(i, y, strict)
        valid = (valid & (x >= 0) & (x < i.width))[..., None]
        step = tap_step * np.arange(i.kernel_x)
        address = (i.source + slot * i.pitch + x + step)[..., None] + i.plane * np.arange(i.blocks)
        address = self._words(np.where(valid, address, 0))
        self._reads.append((address, np.where(valid, self._read_times(i), -1)))
        words = np.take(self.pool if i.unsigned else self.pool.view(np.int8), address, axis=0)
        if not valid.all():
            words[np.broadcast_to(~valid, address.shape)] = outside
        return words

    def _read_times(self, i: Matrix | Vector) -> np.ndarray:
        """Time of the last read for each pixel and block, in output pixels done since the instruction began."""
        pixel = np.arange(i.rows * i.columns).reshape(i.rows, i.columns, 1, 1, 1)
        if isinstance(i, Matrix):  # every tile reads every block
            return pixel + (i.tiles - 1) * pixel.size
        return pixel + pixel.size * np.arange(i.blocks)

    def _require_reads_first(self, address: np.ndarray, time: np.ndarray) -> None:
        """Requires that no word is read at a later time than it is written. `address`, `time` [n]: the writes."""
        first_write = np.full(self.config.pool_words, NEVER)
        np.minimum.at(first_write, address, time)
        for words, when in self._reads:
            late = first_write[words] < when
            if late.any():
                self._fault(f"reads scratchpad word {int(words[late][0])} after it has written it")

    def _positions(self, i: Matrix | Vector) -> np.ndarray:
        """Destination word of every output pixel in block 0, not yet reduced modulo 2**16: [rows, columns]."""
        slot = wrap(i.target_anchor + np.arange(i.rows) * i.target_step_y, i.target_ring)
        self._require((slot + i.target_step_y <= i.target_ring).all(), "output rows do not fit the destination ring")
        return i.target + slot[:, None] * i.target_pitch + np.arange(i.columns) * i.target_step_x

    def _biased_scales(self, words: np.ndarray, count: int, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bias, mult and shift, int64 [n, count], from parameter words [n, words, lanes]."""
        size = self.config.four_byte_words(count)
        bias = np.ascontiguousarray(words[:, :size]).reshape(len(words), -1).view("<i4")[:, :count]
        return bias.astype(np.int64), *self._scale_fields(words[:, size : 2 * size], count, most)

    def _require_accumulator(self, acc: np.ndarray) -> None:
        """Final sums must fit; partial sums may leave int32 and come back: the engine's wrap undoes itself."""
        least, most = int(acc.min()), int(acc.max())
        if least < numerics.ACC_MIN or most > numerics.ACC_MAX:
            self._fault(f"sums reach {least if least < numerics.ACC_MIN else most}, outside the 32-bit accumulator",
                        "use smaller weights or fewer input channels in this layer")


def wrap(slot: np.ndarray, ring: int) -> np.ndarray:
    return np.where(slot >= ring, slot - ring, slot)
