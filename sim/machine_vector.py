"""VECTOR: depthwise work. Samples and results have axes [rows, columns, taps, blocks, lanes]."""

from __future__ import annotations

import numpy as np

from weft.arch import numerics
from weft.arch.isa import Sampling, Vector, VectorOp
from weft.sim.machine_state import NEVER, axes
from weft.sim.machine_window import WindowUnit, wrap


class VectorUnit(WindowUnit):
    """Every lane on its own."""

    def _vector(self, i: Vector) -> None:
        self._check_window(i)
        self._require(i.sampling in tuple(Sampling), f"sampling {i.sampling} is not defined")
        self._require(i.sampling == Sampling.GRID or i.operation in (VectorOp.MULTIPLY, VectorOp.COLUMNS),
                      "only MULTIPLY and COLUMNS may deform")
        c = self.config
        if i.operation == VectorOp.PACK:
            codes = self._pack(i)
        else:
            samples = self._samples(i).reshape(i.rows, i.columns, -1, i.blocks, c.lanes)
            match VectorOp(i.operation):
                case VectorOp.MULTIPLY:
                    codes = self._multiply(i, samples)
                case VectorOp.MAXIMUM:
                    codes = samples.max(axis=2, keepdims=True)
                case VectorOp.COLUMNS:
                    codes = samples
        taps = codes.shape[2]
        if self.on_result:
            shape = (i.rows, i.columns, *([taps] if i.operation == VectorOp.COLUMNS else []), i.blocks * c.lanes)
            self.on_result(self._index, i, codes.astype(np.int64).reshape(shape))
        block, tap = axes(i.blocks, taps)
        offset = (block * i.target_plane + tap * i.target_tap)[:, None]  # [blocks, 1, taps]
        address = self._words(self._positions(i).reshape(-1, 1) + offset).ravel()
        self._require_reads_first(address, np.repeat(np.arange(i.blocks * i.rows * i.columns), taps))
        data = codes.astype(np.uint8).transpose(3, 0, 1, 2, 4).reshape(-1, c.lanes)
        self.pool[address] = data
        self._write(address, np.ones(1, bool), data)

    def _multiply(self, i: Vector, samples: np.ndarray) -> np.ndarray:
        self._check_codes(i)
        size, taps = self.config.block_parameter_words, samples.shape[2]
        words = self._read_constants(i.parameters, i.blocks * (size + taps)).reshape(i.blocks, size + taps, -1)
        bias, mult, shift = self._biased_scales(words, self.config.lanes, numerics.MAX_SHIFT)
        weights = words[:, size:].view(np.int8)
        acc = np.broadcast_to(bias, (i.rows, i.columns, *bias.shape)).copy()
        for tap in range(taps):
            acc += samples[:, :, tap].astype(np.int32) * weights[:, tap]
        self._require_accumulator(acc)
        return numerics.requantize(acc, mult, shift, i.low, i.high)[:, :, None]

    def _samples(self, i: Vector) -> np.ndarray:
        """One code per pixel, tap and channel, as `sampling` says."""
        if i.sampling == Sampling.GRID:
            outside = (0 if i.unsigned else -128) if i.operation == VectorOp.MAXIMUM else 0
            y, x = self._grid(i, i.window_y, i.dilation_y, i.dilation_x)
            return self._gather(i, y, x, strict=True, outside=outside, tap_step=i.tap_step)
        ky, kx = axes(i.kernel_y, i.kernel_x)
        codes = self._offset_words(i)
        if i.sampling == Sampling.SQUARE:
            dilation = codes[:, :, :1, None]
            y, x = self._grid(i, i.grid_y + i.kernel_y // 2, 0, 0)
            x = x + i.kernel_x // 2
            y, x = y + dilation * (ky - i.kernel_y // 2), x + dilation * (kx - i.kernel_x // 2)
            return self._gather(i, y, x, strict=False, tap_step=i.tap_step)
        taps = i.kernel_y * i.kernel_x
        self._require(2 * taps <= self.config.lanes, f"{taps} taps have more offsets than a word has lanes")
        self._require(i.fraction <= numerics.FRACTION_BITS, f"fraction {i.fraction} is above {numerics.FRACTION_BITS}")
        offset = codes[:, :, : 2 * taps].reshape(i.rows, i.columns, i.kernel_y, i.kernel_x, 2)
        y, x = self._grid(i, i.grid_y, i.dilation_y, i.dilation_x)
        y, fine_y = numerics.split_position(y, offset[..., 0], i.fraction)
        x, fine_x = numerics.split_position(x, offset[..., 1], i.fraction)
        neighbours = [
            self._gather(i, y + down, x + right, strict=False, tap_step=i.tap_step).astype(np.int32)
            for down in (0, 1) for right in (0, 1)
        ]
        fractions = (fine[..., None, None].astype(np.int32) for fine in (fine_y, fine_x))
        return numerics.bilinear(*neighbours, *fractions)

    def _offset_words(self, i: Vector) -> np.ndarray:
        """Signed offset codes int64 [rows, columns, lanes]."""
        self._require_positive("offset_ring")
        self._require(i.offset_anchor < i.offset_ring,
                      f"offset_anchor {i.offset_anchor} is not below offset_ring {i.offset_ring}")
        slot = wrap(i.offset_anchor + np.arange(i.rows), i.offset_ring)
        self._require((slot < i.offset_ring).all(), "output rows do not fit the ring of offsets")
        address = self._words(i.offsets + slot[:, None] * i.offset_pitch + np.arange(i.columns))
        self._reads.append((address, NEVER))  # every block reads them again
        return self.pool[address].view(np.int8).astype(np.int64)

    def _pack(self, i: Vector) -> np.ndarray:
        """Words of raw image bytes, [rows, columns, 1, 1, lanes]."""
        lanes, used = self.config.lanes, i.kernel_y * i.pack_bytes
        self._require(i.kernel_x == 1 and i.blocks == 1, "PACK needs kernel_x = blocks = 1")
        self._require(used <= lanes, f"PACK collects {used} bytes, a word has {lanes}")
        last = (i.columns - 1) * i.pack_stride + i.pack_bytes
        self._require(last <= i.pitch * lanes, f"PACK takes {last} bytes of rows that hold {i.pitch * lanes}")
        y, _ = self._grid(i, i.window_y, i.dilation_y, 0)
        slot, valid = self._slots(i, y, strict=True)
        byte = np.arange(i.columns).reshape(1, -1, 1, 1) * i.pack_stride + np.arange(i.pack_bytes)
        address = self._words(np.where(valid, i.source + slot * i.pitch + byte // lanes, 0))
        self._reads.append((address, np.where(valid, self._read_times(i)[..., 0], -1)))
        codes = np.where(valid, (self.pool if i.unsigned else self.pool.view(np.int8))[address, byte % lanes], 0)
        words = np.zeros((i.rows, i.columns, 1, 1, lanes), codes.dtype)
        words[..., :used] = codes.reshape(i.rows, i.columns, 1, 1, used)
        return words
