"""The result record: what one network did on one Device. Versioned JSON; everything a report shows is in it."""

from __future__ import annotations

import json
import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from weft.arch.errors import ModelError

VERSION = 1


@dataclass(frozen=True)
class LayerRow:
    """One layer. Cycles of all layers add up to those of the run."""

    number: int
    name: str
    operation: str
    unit: str
    height: int
    width: int
    channels: int
    macs: int
    weight_bits: int
    bytes_read: int
    bytes_written: int
    cycles: int = 0
    array_use: float = 0.0  # useful slots of the matrix unit / all of them, in this layer's cycles
    working: dict[str, int] = field(default_factory=dict)  # unit, or "nobody": its share of the layer's cycles


@dataclass(frozen=True)
class Span:
    """A unit works for one layer from cycle `start` to cycle `end`."""

    unit: str
    layer: int
    start: int
    end: int


@dataclass(frozen=True)
class Box:
    """A detected or true object, corners in pixels of the picture; `score` is 1 for the truth."""

    label: str
    score: float
    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Picture:
    """A test image with what was found in it: by the float model, and by the engine."""

    name: str
    png: str  # base64
    width: int
    height: int
    truth: list[Box] = field(default_factory=list)
    reference: list[Box] = field(default_factory=list)
    engine: list[Box] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """One network on one Device, compared with the integer definition."""

    title: str
    model: str
    engine: dict[str, Any]  # the fields of its EngineConfig
    device: str
    memory: str
    images: int
    layers_compared: int
    mismatches: int
    macs: int
    cycles: int  # of one image
    array_macs: int
    efficiency: float  # useful MACs / (matrix MACs x cycles)
    fps_at_250mhz: float
    simulated_cycles_per_s: float
    wall_s: float
    first_difference: str = ""
    counters: dict[str, int] = field(default_factory=dict)
    layers: list[LayerRow] = field(default_factory=list)
    timeline: list[Span] = field(default_factory=list)
    accuracy: dict[str, float] = field(default_factory=dict)  # AP50 in percent, by arithmetic
    accuracy_images: int = 0
    pictures: list[Picture] = field(default_factory=list)
    version: int = VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str, source: str = "result") -> Result:
        """Inverse of `to_json`. Raises ModelError that says what is wrong with the text."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ModelError(f"{source}: not a JSON file ({error})") from error
        if not isinstance(values, dict) or values.get("version") != VERSION:
            raise ModelError(f"{source}: not a result record of version {VERSION}; make one with: "
                             "weft bench codenet --json FILE")
        try:
            return _build(cls, values)
        except (TypeError, ValueError) as error:
            raise ModelError(f"{source}: malformed result record ({error})") from error


def load(path: str | Path) -> Result:
    """Reads a result record. Raises ModelError."""
    try:
        return Result.from_json(Path(path).read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _build(kind: Any, value: Any) -> Any:
    """`value` as parsed from JSON, checked and turned into the annotated type."""
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise TypeError(f"a {kind.__name__} must be an object, got {value!r:.40}")
        hints = typing.get_type_hints(kind)
        if unknown := sorted(set(value) - {item.name for item in fields(kind)}):
            raise TypeError(f"unknown field {unknown[0]!r}")
        return kind(**{name: _build(hints[name], item) for name, item in value.items()})
    if origin is list and isinstance(value, list):
        return [_build(arguments[0], item) for item in value]
    if origin is dict and isinstance(value, dict):
        return {key: _build(arguments[1], item) for key, item in value.items()}
    accepted = (int, float) if kind is float else kind
    if isinstance(accepted, (type, tuple, types.UnionType)) and isinstance(value, accepted):
        return value
    raise TypeError(f"expected {getattr(kind, '__name__', kind)}, got {value!r:.40}")
