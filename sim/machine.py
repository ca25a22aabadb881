"""Machine: architectural state and the effect of every instruction on it, as the loop nests of `arch.isa` say.

One method per instruction class, each a whole instruction in array operations. Instructions run in program
order; there is no time. Whatever the engine could not execute, or would execute in a way that depends on
its pipelining, is an EngineFault that names the instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NoReturn

import numpy as np

from weft.arch import numerics
from weft.arch.config import EngineConfig
from weft.arch.errors import EngineFault
from weft.arch.isa import DESCRIPTOR_FIELDS, End, Instruction, Load, Matrix, Sampling, Store, Unit, Vector, VectorOp
from weft.arch.trace import WRITERS, WriteLog

ADDRESS_MASK = (1 << 16) - 1  # scratchpad address sums are modulo 2**16
FLOAT32_EXACT = 1 << 24  # float32 holds every integer below this magnitude
REMEDY = "the Program is wrong: compile it again, and report the model if that does not help"

ResultHook = Callable[[int, Instruction, np.ndarray], None]


class Machine:
    """Scratchpad, token counters and memory of one engine.

    `pool` is uint8 [pool_words, lanes], `tokens[a, b]` the counter from unit a to unit b, `memory` uint8 [bytes],
    `segments` the byte addresses in the segment registers. With `trace`, `step` returns the scratchpad writes
    of the instruction in ISA loop order. `on_result(index, instruction, codes)` is called with the codes (int64)
    of each compute instruction before they are written: MATRIX [rows, columns, tiles*C], VECTOR [rows, columns,
    blocks*lanes], its COLUMNS [rows, columns, taps, blocks*lanes].

    All reads of an instruction precede its writes; where that would differ from the loop nest (an instruction
    that reads a word it has written) the instruction is a fault, because the engine's pipeline decides the result.
    """

    def __init__(
        self, config: EngineConfig, memory: np.ndarray | None = None, segments: Sequence[int] = (),
        trace: bool = False, on_result: ResultHook | None = None, pool: np.ndarray | None = None,
    ) -> None:
        self.config = config
        self.memory = np.zeros(0, np.uint8) if memory is None else memory
        self.segments = segments
        self.trace = trace
        self.on_result = on_result
        self.pool = np.zeros((config.pool_words, config.lanes), np.uint8) if pool is None else pool
        self.tokens = np.zeros((len(Unit), len(Unit)), np.int64)
        self._index = 0
        self._instruction: Instruction = End()
        self._reads: list[tuple[np.ndarray, np.ndarray | int]] = []  # words read, and when in the loop nest
        self._writes: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # address, mask, data

    def step(self, index: int, instruction: Instruction) -> WriteLog | None:
        """Executes one instruction. Returns its scratchpad writes when tracing. Raises EngineFault."""
        self._index, self._instruction = index, instruction
        self._reads.clear()
        self._writes.clear()
        self._take_tokens(instruction)
        match instruction:
            case Store():
                self._store(instruction)
            case Load():
                self._load(instruction)
            case Matrix():
                self._matrix(instruction)
            case Vector():
                self._vector(instruction)
        if instruction.unit is not None:
            for other in Unit:
                self.tokens[instruction.unit, other] += instruction.signal >> other & 1
        return self._write_log(instruction.tag) if self.trace and instruction.unit in WRITERS else None

    def matrix_descriptors(self, i: Matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Write descriptors of a MATRIX instruction as the scratchpad holds them now.

        Returns offset [tiles, 4] (words), group [tiles, 4] and mask bool [tiles, 4, C].
        """
        raw = np.ascontiguousarray(self._tile_parameters(i)[:, -1, : 8 * self.config.max_writes])
        entries = raw.view(np.dtype(DESCRIPTOR_FIELDS))
        columns = self.config.columns
        mask = entries["mask"].astype(np.int64)
        self._require(not (mask >> min(columns, 32)).any(), f"a descriptor's mask names a column beyond {columns - 1}")
        used = mask[..., None] >> np.arange(columns) & 1
        return entries["offset"].astype(np.int64), entries["group"].astype(np.int64), used.astype(bool)

    # Faults

    def _fault(self, reason: str, remedy: str = REMEDY) -> NoReturn:
        raise EngineFault(f"instruction {self._index} ({type(self._instruction).__name__.upper()}): {reason}; {remedy}")

    def _require(self, condition: bool | np.bool_, reason: str, remedy: str = REMEDY) -> None:
        if not condition:
            self._fault(reason, remedy)

    def _require_positive(self, *names: str) -> None:
        for name in names:
            self._require(getattr(self._instruction, name) >= 1, f"{name} is 0, must be at least 1")

    def _take_tokens(self, instruction: Instruction) -> None:
        own = instruction.unit
        if own is None:
            self._require(not (instruction.wait or instruction.signal), "END has no unit and no tokens")
            return
        for other in Unit:
            if instruction.wait >> other & 1:
                self._require(
                    self.tokens[other, own] > 0,
                    f"waits for a token from {other.name} that no earlier instruction has given: the engine would hang")
                self.tokens[other, own] -= 1

    # Scratchpad

    def _words(self, address: np.ndarray) -> np.ndarray:
        """Addresses modulo 2**16, all of them inside the pool."""
        address = address & ADDRESS_MASK
        if address.size and (most := int(address.max())) >= self.config.pool_words:
            self._fault(f"scratchpad word {most} is outside the pool of {self.config.pool_words} words")
        return address

    def _read_constants(self, first: int, count: int) -> np.ndarray:
        """`count` words of parameters or weights, uint8 [count, lanes]; they must stay while the instruction runs."""
        self._require(count <= self.config.pool_words, f"reads {count} words of constants, more than the pool holds")
        address = self._words(first + np.arange(count))
        self._reads.append((address, np.iinfo(np.int64).max))
        return self.pool[address]

    def _write(self, address: np.ndarray, mask: np.ndarray, data: np.ndarray) -> None:
        """Logs writes in loop order: address [n], mask bool [n, lanes] or broadcastable, data [n, lanes]."""
        if self.trace:
            self._writes.append((address, np.broadcast_to(mask, data.shape), data))

    def _write_log(self, tag: int) -> WriteLog:
        lanes = self.config.lanes
        empty = (np.zeros(0, np.int64), np.zeros((0, lanes), bool), np.zeros((0, lanes), np.uint8))
        address, mask, data = (np.concatenate(parts) for parts in zip(*(self._writes or [empty]), strict=True))
        cycle, tags = np.zeros(len(address), np.uint64), np.full(len(address), tag, np.uint16)
        return WriteLog(cycle, address.astype(np.uint16), tags, data, mask)

    def _require_reads_first(self, address: np.ndarray, time: np.ndarray) -> None:
        """Requires that no word is read at a later time than it is written. `address`, `time` [n]: the writes."""
        never = np.iinfo(np.int64).max
        first_write = np.full(self.config.pool_words, never)
        np.minimum.at(first_write, address, time)
        for words, when in self._reads:
            late = first_write[words] < when
            if late.any():
                self._fault(f"reads scratchpad word {int(words[late][0])} after it has written it")

    # LOAD and STORE

    def _transfer(self, i: Load) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scratchpad words [n], memory words [n] and the memory as words [m, lanes], in loop order."""
        self._require_positive("run", "rows", "planes")
        size = self.config.word_bytes
        self._require(i.base < len(self.segments), f"segment register {i.base} is not set")
        start = self.segments[i.base]
        for name, value in (("offset", i.offset), ("row_bytes", i.row_bytes), ("plane_bytes", i.plane_bytes),
                            ("segment address", start)):
            self._require(value % size == 0, f"{name} {value} is not a multiple of the word size {size}")
        last = start + i.offset + (i.planes - 1) * i.plane_bytes + (i.rows - 1) * i.row_bytes + i.run * size
        self._require(last <= len(self.memory), f"touches memory up to byte {last}, memory ends at {len(self.memory)}")
        plane, row, word = np.ogrid[: i.planes, : i.rows, : i.run]
        pool = self._words(i.address + plane * i.plane_words + row * i.row_words + word).ravel()
        memory = (start + i.offset + plane * i.plane_bytes + row * i.row_bytes) // size + word
        return pool, memory.ravel(), self.memory[: len(self.memory) // size * size].reshape(-1, size)

    def _load(self, i: Load) -> None:
        pool, source, memory = self._transfer(i)
        data = memory[source]
        self.pool[pool] = data
        self._write(pool, np.ones(1, bool), data)

    def _store(self, i: Store) -> None:
        pool, target, memory = self._transfer(i)
        self._require(not i.mask >> self.config.lanes, f"mask names a lane beyond {self.config.lanes - 1}")
        lanes = np.flatnonzero([i.mask >> lane & 1 for lane in range(self.config.lanes)])
        memory[target[:, None], lanes] = self.pool[pool[:, None], lanes]

    # The source window of MATRIX and VECTOR. Arrays of positions have axes [rows, columns, kernel_y, kernel_x].

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
        oy, ox, ky, kx = np.ogrid[: i.rows, : i.columns, : i.kernel_y, : i.kernel_x]
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
        return _wrap(i.anchor + relative, i.ring), inside & held

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

    def _positions(self, i: Matrix | Vector) -> np.ndarray:
        """Destination word of every output pixel in block 0, not yet reduced modulo 2**16: [rows, columns]."""
        slot = _wrap(i.target_anchor + np.arange(i.rows) * i.target_step_y, i.target_ring)
        self._require((slot + i.target_step_y <= i.target_ring).all(), "output rows do not fit the destination ring")
        return i.target + slot[:, None] * i.target_pitch + np.arange(i.columns) * i.target_step_x

    def _scale(self, words: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bias, mult and shift, int64 [n, count], from parameter words [n, words, lanes]."""
        size = self.config.four_byte_words(count)
        bias = np.ascontiguousarray(words[:, :size]).reshape(len(words), -1).view("<i4")[:, :count]
        scale = np.ascontiguousarray(words[:, size : 2 * size]).reshape(len(words), -1).view("<u4")[:, :count]
        shift = scale >> numerics.MULT_BITS & 255
        self._require((shift <= numerics.MAX_SHIFT).all(), f"a requantize shift is above {numerics.MAX_SHIFT}")
        return bias.astype(np.int64), (scale & (1 << numerics.MULT_BITS) - 1).astype(np.int64), shift.astype(np.int64)

    def _requantize(self, acc: np.ndarray, mult: np.ndarray, shift: np.ndarray, low: int, high: int) -> np.ndarray:
        """Codes of final sums. Partial sums may leave int32 and come back: the engine's wrap undoes itself."""
        least, most = int(acc.min()), int(acc.max())
        if least < numerics.ACC_MIN or most > numerics.ACC_MAX:
            self._fault(f"sums reach {least if least < numerics.ACC_MIN else most}, outside the 32-bit accumulator",
                        "use smaller weights or fewer input channels in this layer")
        return numerics.requantize(acc, mult, shift, low, high)

    # MATRIX

    def _tile_parameters(self, i: Matrix) -> np.ndarray:
        size = self.config.tile_parameter_words
        return self._read_constants(i.parameters, i.tiles * size).reshape(i.tiles, size, -1)

    def _weights(self, i: Matrix) -> np.ndarray:
        """The weight stream as int8 [kernel_y*kernel_x*blocks*lanes, tiles*C]."""
        c = self.config
        words = i.tiles * i.kernel_y * i.kernel_x * i.blocks
        count = words * c.lanes * c.columns // (1 if i.wide else 2)
        raw = self._read_constants(i.weights, -(-count // c.lanes)).reshape(-1)[:count]
        nibbles = np.stack((raw & 15, raw >> 4), axis=-1).reshape(words, -1, c.columns)  # [words, slots, C]
        if i.wide:
            weights = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(np.int8)
        else:
            weights = (nibbles << 4).view(np.int8) >> 4
        return weights.reshape(i.tiles, -1, c.columns).transpose(1, 0, 2).reshape(-1, i.tiles * c.columns)

    def _matrix(self, i: Matrix) -> None:
        self._check_window(i)
        self._check_codes(i)
        self._require_positive("tiles")
        c, pixels = self.config, i.rows * i.columns
        weights = self._weights(i)
        y, x = self._grid(i, i.window_y, i.dilation_y, i.dilation_x)
        samples = self._gather(i, y, x, strict=True).reshape(pixels, -1)
        largest = 255 if i.unsigned else 128
        # Every partial sum is below this bound, so the floating-point products and sums are exact integers.
        # float64 holds any: fewer than 2**28 terms of at most 2**15.
        bound = largest * int(np.abs(weights.astype(np.int16)).sum(axis=0, dtype=np.int64).max())
        kind = np.float32 if bound < FLOAT32_EXACT else np.float64
        sums = (samples.astype(kind) @ weights.astype(kind)).astype(np.int64)
        bias, mult, shift = (part.reshape(-1) for part in self._scale(self._tile_parameters(i), c.columns))
        codes = self._requantize(sums + bias, mult, shift, i.low, i.high)
        if self.on_result:
            self.on_result(self._index, i, codes.reshape(i.rows, i.columns, -1))
        self._write_tiles(i, codes.astype(np.uint8).reshape(pixels, i.tiles, c.columns))

    def _write_tiles(self, i: Matrix, codes: np.ndarray) -> None:
        """Writes codes uint8 [pixels, tiles, C] to where the descriptors say, in the order tile, pixel, descriptor."""
        c, pixels = self.config, len(codes)
        offset, group, mask = self.matrix_descriptors(i)
        used = mask.any(axis=2)
        self._require((group[used] < c.lanes // c.columns).all(), "a descriptor's group is beyond the lanes of a word")
        tile_of, _ = np.nonzero(used)
        address = self._words(self._positions(i).reshape(-1, 1) + offset[used])  # [pixels, used descriptors]
        self._require_reads_first(address.ravel(), (np.arange(pixels)[:, None] + tile_of * pixels).ravel())
        descriptor, column = np.nonzero(mask[used])  # one entry for each byte written per pixel, in order of tiles
        lane = group[used][descriptor] * c.columns + column
        place, code = address[:, descriptor] * c.lanes + lane, codes[:, tile_of[descriptor], column]
        pool = self.pool.reshape(-1)
        bounds = np.searchsorted(tile_of[descriptor], np.arange(i.tiles + 1))
        for first, last in pairwise(bounds):  # tile by tile, in case two of them write the same byte
            pool[place[:, first:last]] = code[:, first:last]
        if self.trace:
            lanes = np.zeros((len(tile_of), c.lanes), bool)
            lanes[descriptor, lane] = True
            data = np.zeros((pixels, *lanes.shape), np.uint8)
            data[:, descriptor, lane] = code
            for tile in range(i.tiles):
                own = tile_of == tile
                words = address[:, own].ravel()
                self._write(words, np.tile(lanes[own], (pixels, 1)), data[:, own].reshape(-1, c.lanes))

    # VECTOR. Samples and results have axes [rows, columns, taps, blocks, lanes].

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
        block, tap = np.ogrid[: i.blocks, :taps]
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
        bias, mult, shift = self._scale(words, self.config.lanes)
        weights = words[:, size:].view(np.int8)
        acc = np.broadcast_to(bias, (i.rows, i.columns, *bias.shape)).copy()
        for tap in range(taps):
            acc += samples[:, :, tap].astype(np.int32) * weights[:, tap]
        return self._requantize(acc, mult, shift, i.low, i.high)[:, :, None]

    def _samples(self, i: Vector) -> np.ndarray:
        """One code per pixel, tap and channel, as `sampling` says."""
        if i.sampling == Sampling.GRID:
            outside = (0 if i.unsigned else -128) if i.operation == VectorOp.MAXIMUM else 0
            y, x = self._grid(i, i.window_y, i.dilation_y, i.dilation_x)
            return self._gather(i, y, x, strict=True, outside=outside, tap_step=i.tap_step)
        ky, kx = np.ogrid[: i.kernel_y, : i.kernel_x]
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
        slot = _wrap(i.offset_anchor + np.arange(i.rows), i.offset_ring)
        self._require((slot < i.offset_ring).all(), "output rows do not fit the ring of offsets")
        address = self._words(i.offsets + slot[:, None] * i.offset_pitch + np.arange(i.columns))
        self._reads.append((address, np.iinfo(np.int64).max))  # every block reads them again
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


def _wrap(slot: np.ndarray, ring: int) -> np.ndarray:
    return np.where(slot >= ring, slot - ring, slot)
