"""MATRIX: convolutions and linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from weft.arch import numerics
from weft.arch.isa import DESCRIPTOR_FIELDS, Matrix
from weft.sim.machine_state import axes
from weft.sim.machine_window import WindowUnit

FLOAT32_EXACT = 1 << 24  # float32 holds every integer up to this magnitude
UNPACKED = 1 << 17  # weights held as floats at a time: a cache holds them
PARTIAL = 1 << 22  # partial sums at a time


class MatrixUnit(WindowUnit):
    """Sums are of exact integers in floating point; see `_sums`."""

    def _matrix(self, i: Matrix) -> None:
        self._check_window(i)
        self._require_positive("tiles")
        self._require(i.plain or not i.double, "double asks for plain")
        groups = self.config.lanes // self.config.columns
        self._require(not i.plain or i.group < groups, f"group {i.group} is not one of the {groups} of a word")
        if not i.double:
            self._check_codes(i)
        pixels = i.rows * i.columns
        self._check_held(i, pixels)
        c = self.config
        y, x = self._grid(i, i.window_y, i.dilation_y, i.dilation_x)
        samples = self._gather(i, y, x, strict=True).reshape(pixels, -1, c.lanes)
        acc = self._sums(i, samples)
        if i.resume:
            assert self.held is not None
            acc += self.held
            self.held = None
        elif not i.plain:
            acc += self._biased_scales(self._tile_parameters(i), c.columns, 255)[0].reshape(-1)
        if i.hold:
            self.held = acc
            return
        self._require_accumulator(acc)
        low, high = numerics.INT16 if i.double else (i.low, i.high)
        codes = numerics.requantize(acc, *self._scales(i), low, high)
        if self.on_result:
            self.on_result(self._index, i, codes.reshape(i.rows, i.columns, -1))
        parts = codes.reshape(pixels, i.tiles, c.columns)
        if i.plain:
            self._write_plain(i, parts)
        else:
            self._write_tiles(i, parts.astype(np.uint8))

    def _check_held(self, i: Matrix, pixels: int) -> None:
        if i.hold or i.resume:
            self._require(i.tiles == 1 and pixels <= self.config.pixels,
                          f"hold and resume ask for one tile and at most {self.config.pixels} pixels, "
                          f"not {i.tiles} and {pixels}")
        if not i.resume:
            self._require(self.held is None, "sums are held, which only an instruction with resume may take")
        else:
            self._require(self.held is not None and len(self.held) == pixels,
                          f"resume of {pixels} pixels, the unit holds {0 if self.held is None else len(self.held)}")

    # Sums

    def _sums(self, i: Matrix, samples: np.ndarray) -> np.ndarray:
        """Sums int64 [pixels, tiles*C] over samples [pixels, words, lanes], without bias.

        The words are cut into sections so short that float32 holds every partial sum; float64 adds the sections up.
        Narrow weights come 16 times too large, which the samples make good: a power of two changes no digit.
        """
        c = self.config
        pixels, words, lanes = samples.shape
        width = i.tiles * c.columns
        weights, factors = self._weights(i, words)
        largest = max(1, int(samples.max()), -int(samples.min())) * (128 if i.wide else 8)
        if factors is not None:
            largest *= max(1, int(factors.max()))
        section = max(1, FLOAT32_EXACT // (largest * lanes))
        kind = np.float32 if largest * lanes <= FLOAT32_EXACT else np.float64
        values = samples.astype(kind)
        if not i.wide:
            values /= 16
        sections = max(1, min(UNPACKED // (section * lanes * width), PARTIAL // (pixels * width)))
        acc = np.zeros((pixels, width))
        for first, last in _chunks(words, section, sections):
            unpacked = _unpacked(weights[:, first:last], bool(i.wide), kind)
            if factors is not None:
                unpacked *= factors[first:last, None]
            count = max(1, (last - first) // section)
            left = values[:, first:last].reshape(pixels, count, -1).transpose(1, 0, 2)
            acc += (left @ unpacked.reshape(count, -1, width)).sum(axis=0, dtype=np.float64)
        return acc.astype(np.int64)

    def _weights(self, i: Matrix, words: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The weight stream as bytes [tiles, words, bytes of a column, C], and factors [words, tiles*C] if grouped."""
        c = self.config
        size, own = c.tile_words(words, bool(i.wide), bool(i.grouped)), c.weight_words(bool(i.wide))
        stream = self._read_constants(i.weights, i.tiles * size).reshape(i.tiles, size, c.lanes)
        factors = None
        if i.grouped:
            period = 1 + c.scaled_words * own
            factors = stream[:, ::period].reshape(i.tiles, -1, c.columns)[:, :words]
            factors = factors.transpose(1, 0, 2).reshape(words, -1).astype(np.float32)
            stream = stream[:, np.arange(size) % period > 0]
        return stream.reshape(i.tiles, words, -1, c.columns), factors

    # Parameters

    def _tile_parameters(self, i: Matrix) -> np.ndarray:
        size = self.config.plain_parameter_words if i.plain else self.config.tile_parameter_words
        return self._read_constants(i.parameters, i.tiles * size).reshape(i.tiles, size, -1)

    def _scales(self, i: Matrix) -> tuple[np.ndarray, np.ndarray]:
        """Mult and shift of every result, broadcastable to [pixels, tiles*C]."""
        c, words = self.config, self._tile_parameters(i)
        most = numerics.MAX_COMBINED_SHIFT if i.scaled else numerics.MAX_SHIFT
        if i.plain:
            mult, shift = self._scale_fields(words, c.columns, most)
        else:
            _, mult, shift = self._biased_scales(words, c.columns, most)
        mult, shift = mult.reshape(-1), shift.reshape(-1)
        if not i.scaled:
            return mult, shift
        address = self._words(i.scales + np.arange(i.rows)[:, None] * i.scales_pitch + np.arange(i.columns))
        self._reads.append((address, self._read_times(i)[..., 0, 0, 0]))
        own, own_shift = self._scale_fields(self.pool[address.reshape(-1, 1)], 1, numerics.MAX_COMBINED_SHIFT)
        return numerics.combine_scales(own, own_shift, mult, shift)

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

    # Results

    def _write_plain(self, i: Matrix, codes: np.ndarray) -> None:
        """Writes codes [pixels, tiles, C] in the order tile, pixel, low bytes, high bytes."""
        c, pixels = self.config, len(codes)
        groups, parts = c.lanes // c.columns, 1 + i.double
        tile, pixel, part = axes(i.tiles, pixels, parts)
        position = self._positions(i).reshape(1, -1, 1)
        address = self._words(position + (i.group + tile) // groups * i.target_plane + part * i.target_high)
        self._require_reads_first(address.ravel(), np.repeat(pixel + tile * pixels, parts))
        data = codes.transpose(1, 0, 2).astype("<i2").view(np.uint8).reshape(i.tiles, pixels, c.columns, 2)
        data = data[..., :parts].swapaxes(2, 3)
        self.pool.reshape(-1, groups, c.columns)[address, (i.group + tile) % groups] = data
        if self.trace:
            words = np.zeros((i.tiles, pixels, parts, groups, c.columns), np.uint8)
            mask = np.zeros(words.shape, bool)
            for one in range(i.tiles):
                words[one, :, :, (i.group + one) % groups] = data[one]
                mask[one, :, :, (i.group + one) % groups] = True
            self._write(address.ravel(), mask.reshape(-1, c.lanes), words.reshape(-1, c.lanes))

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


def _chunks(words: int, section: int, sections: int) -> Iterator[tuple[int, int]]:
    """Ranges of words: up to `sections` whole sections each, and what is left of a section."""
    first = 0
    while first < words:
        left = words - first
        last = first + (min(left // section, sections) * section or left)
        yield first, last
        first = last


def _unpacked(stream: np.ndarray, wide: bool, kind: type) -> np.ndarray:
    """Bytes [tiles, words, bytes, C] as weights [words, lanes, tiles*C]; those of four bits 16 times too large."""
    tiles, words, size, columns = stream.shape
    raw = np.ascontiguousarray(stream.transpose(1, 2, 0, 3)).reshape(words, size, tiles * columns)
    if wide:
        return raw.view(np.int8).astype(kind)
    weights = np.empty((words, size, 2, tiles * columns), kind)
    weights[:, :, 0] = (raw << 4).view(np.int8)
    weights[:, :, 1] = (raw & 240).view(np.int8)
    return weights.reshape(words, 2 * size, -1)
