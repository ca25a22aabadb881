"""EngineConfig: one concrete engine. All widths and geometries of hardware and compiler derive from it."""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

from weft.arch.errors import ModelError

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class EngineConfig:
    """Parameters of one engine. Validated once, here.

    The matrix unit multiplies `rows` input channels by `columns` output channels for `pixels`
    pixels per cycle, each weight shared by all pixels. A scratchpad word holds one byte for each
    of `lanes` channels of one pixel; the vector unit works on a whole word per cycle.
    """

    name: str
    rows: int  # R, input channels per cycle
    columns: int  # C, output channels per cycle
    pixels: int  # P, pixels per cycle
    lanes: int  # channels in a scratchpad word = bytes of a word = vector lanes
    post_lanes: int  # requantizing lanes of the vector unit (the matrix unit has `columns`)
    banks: int  # scratchpad banks, interleaved by the low address bits
    bank_words: int  # words in each bank
    bus_bytes: int  # AXI4 data width
    row_lanes: int = 4  # numbers that the row unit works on per cycle
    address_bits: int = 32  # AXI4 address width
    queue_depth: int = 8  # instructions waiting at each unit
    burst_beats: int = 16  # longest AXI burst
    outstanding: int = 4  # read bursts in flight
    token_bits: int = 6  # width of a token counter

    def __post_init__(self) -> None:
        def require(condition: bool, reason: str) -> None:
            if not condition:
                raise ModelError(f"engine configuration '{self.name}': {reason}")

        for field in fields(self):
            if field.name != "name":
                value = getattr(self, field.name)
                require(isinstance(value, int) and value > 0, f"{field.name} must be a positive integer, got {value!r}")
        for name in (
            "rows", "columns", "pixels", "lanes", "post_lanes", "row_lanes", "banks", "bus_bytes", "burst_beats"
        ):
            require(getattr(self, name).bit_count() == 1, f"{name} must be a power of two, got {getattr(self, name)}")
        require(self.rows >= 2, "rows must be at least 2, because an 8-bit weight occupies two of them")
        require(
            self.lanes >= 32, f"lanes must be at least 32 (a word holds 18 offsets or 27 stem inputs), got {self.lanes}"
        )
        require(self.lanes <= 128, f"lanes must be at most 128, the width of a store mask, got {self.lanes}")
        require(
            self.steps_per_word >= self.pixels,
            f"lanes / rows = {self.steps_per_word} must be at least pixels = {self.pixels}: "
            "one word per cycle is read for each pixel; widen lanes or lower rows or pixels",
        )
        require(self.columns >= 2, "columns must be at least 2, because two share a multiplier")
        require(self.columns <= min(32, self.lanes), "columns must not exceed lanes, nor 32, the width of a write mask")
        require(
            self.weight_step_bytes <= self.lanes, "rows * columns / 2 must not exceed lanes (one weight word per step)"
        )
        require(self.post_lanes <= self.lanes, "post_lanes must not exceed lanes")
        require(
            self.row_lanes * self.columns <= 2 * self.lanes,
            "row_lanes * columns must not exceed 2 * lanes: a word of a tile's 4-bit weights holds 2 * lanes nibbles",
        )
        require(8 * self.max_writes <= self.lanes, "a word must hold the write descriptors of a tile")
        require(self.banks >= 4, "banks must be at least 4, one for each neighbour of a bilinear sample")
        require(self.pool_words <= 1 << 16, f"scratchpad of {self.pool_words} words exceeds 16-bit word addresses")
        require(self.bus_bytes <= self.lanes, "bus_bytes must not exceed lanes")
        require(
            self.burst_beats <= 256 and self.burst_beats * self.bus_bytes <= 4096, "a burst must fit 256 beats and 4 KB"
        )
        require(12 <= self.address_bits <= 64, "address_bits must be between 12 and 64")
        require(self.token_bits >= 2, "token_bits must be at least 2")

    @property
    def macs(self) -> int:
        """Four-bit multiply-accumulates per cycle of the matrix unit."""
        return self.rows * self.columns * self.pixels

    @property
    def word_bytes(self) -> int:
        return self.lanes

    @property
    def pool_words(self) -> int:
        return self.banks * self.bank_words

    @property
    def steps_per_word(self) -> int:
        """Cycles in which the matrix unit consumes one activation word with 4-bit weights (twice that with 8-bit)."""
        return self.lanes // self.rows

    @property
    def weight_step_bytes(self) -> int:
        """Bytes of weights that the matrix unit consumes per cycle: rows * columns nibbles."""
        return self.rows * self.columns // 2

    @property
    def max_writes(self) -> int:
        """Destinations that one output tile of the matrix unit can be written to."""
        return 4

    @property
    def tile_parameter_words(self) -> int:
        """Scratchpad words of parameters per matrix output tile: bias, scale, write descriptors."""
        return 2 * self.four_byte_words(self.columns) + 1

    @property
    def block_parameter_words(self) -> int:
        """Scratchpad words of bias and scale per vector channel block (tap weights follow)."""
        return 2 * self.four_byte_words(self.lanes)

    @property
    def group(self) -> int:
        """Input channels that share a scale in a grouped weight stream: those of a word."""
        return self.lanes

    @property
    def scaled_words(self) -> int:
        """Words of weights behind each word of group scales."""
        return self.lanes // self.columns

    @property
    def plain_parameter_words(self) -> int:
        """Scratchpad words of parameters per plain tile: scales only."""
        return self.four_byte_words(self.columns)

    def weight_words(self, wide: bool) -> int:
        """Words of weights of one tile for one word of activations."""
        return self.columns if wide else self.columns // 2

    def tile_words(self, blocks: int, wide: bool = False, grouped: bool = False) -> int:
        """Words of the weight stream of one tile over `blocks` words of activations."""
        return blocks * self.weight_words(wide) + (-(-blocks // self.scaled_words) if grouped else 0)

    def four_byte_words(self, count: int) -> int:
        """Words that hold `count` 32-bit values."""
        return -(-4 * count // self.lanes)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything a Program depends on: this configuration, the ISA and the parameter formats."""
        from weft.arch.isa import isa_description  # the ISA does not depend on a configuration

        text = json.dumps({"config": asdict(self), "isa": isa_description()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_config(name_or_path: str) -> EngineConfig:
    """A preset by name, or any TOML file with the fields of EngineConfig."""
    path = PRESETS / f"{name_or_path}.toml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        known = ", ".join(preset_names())
        raise ModelError(f"engine configuration '{name_or_path}' not found: give one of {known} or a TOML file")
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not a valid TOML file ({error})") from error
    known_fields = {field.name for field in fields(EngineConfig)}
    if unknown := sorted(set(values) - known_fields):
        raise ModelError(f"{path}: unknown field {unknown[0]!r}; known are {', '.join(sorted(known_fields))}")
    values.setdefault("name", path.stem)
    try:
        return EngineConfig(**values)
    except TypeError as error:
        raise ModelError(f"{path}: {str(error).removeprefix('EngineConfig.__init__() ')}") from error


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))
