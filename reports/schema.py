"""Result records: what one network, or one language model, did on one Device. Versioned JSON; everything that a report
shows is in it."""

from __future__ import annotations

import json
import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from weft.arch.errors import ModelError

VERSION = 1
UNIT_ORDER = ("matrix", "vector", "row", "load", "store")  # a cycle belongs to the layer of the first that works
LADDER = {  # steps of a language model's perplexity: what each adds to those before it
    "float": "float", "weights": "int4 weights", "activations": "int8 activations",
    "cache": "int8 keys and values", "integer": "integer functions",
}  # fmt: skip


@dataclass(frozen=True)
class LayerRow:
    """One layer. Cycles of all layers add up to those of the run.

    In a language model MACs and bytes are those of the run, height is 0 and width 1.
    """

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


class Record:
    """What both kinds of records share: JSON, whose key `kind` tells them apart."""

    KIND: ClassVar[str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str, source: str = "result") -> Self:
        """Inverse of `to_json`. Raises ModelError that says what is wrong with the text."""
        return cls._from_values(_parsed(text, source), source)

    @classmethod
    def _from_values(cls, values: dict[str, Any], source: str) -> Self:
        if values.get("kind", Result.KIND) != cls.KIND:
            raise ModelError(f"{source}: a record of kind {values['kind']!r:.40}, wanted {cls.KIND!r}")
        try:
            return _build(cls, values)
        except (TypeError, ValueError) as error:
            raise ModelError(f"{source}: malformed result record ({error})") from error


@dataclass(frozen=True)
class Result(Record):
    """One network on one Device, compared with the integer definition."""

    KIND: ClassVar[str] = "detector"

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
    kind: str = KIND


@dataclass(frozen=True)
class Phase:
    """One run of a language model: the prompt (prefill), or one token behind it (decode). All cycles are simulated."""

    tokens: int  # of the run
    position: int  # in the sequence, of the first of them
    cycles: int
    bytes_read: int  # instructions included
    bytes_written: int
    bytes_per_token: float  # read and written
    bandwidth_utilization: float  # bytes moved / bytes that the port could move in these cycles
    port_bytes_per_cycle: float  # that the memory port can move
    macs: int  # useful ones
    array_efficiency: float  # useful slots of the matrix unit, an 8-bit MAC counting two / (matrix MACs x cycles)
    tokens_per_s: float  # at the record's clock
    counters: dict[str, int] = field(default_factory=dict)
    layers: list[LayerRow] = field(default_factory=list)


@dataclass(frozen=True)
class LanguageResult(Record):
    """One language model on one Device, compared with the integer definition."""

    KIND: ClassVar[str] = "language"

    title: str
    model: str
    engine: dict[str, Any]  # the fields of its EngineConfig
    device: str
    memory: str
    prompt: str
    text: str  # generated behind the prompt
    prompt_tokens: int
    tokens: int  # generated
    layers_compared: int
    mismatches: int
    clock_hz: float  # assumed, for rates
    first_difference: str = ""
    prefill: Phase | None = None
    decode: Phase | None = None
    perplexity: dict[str, float] = field(default_factory=dict)  # by step, in the order of LADDER
    agreement: dict[str, float] = field(default_factory=dict)  # of integer with float logits: cosine, top1
    held_out_bytes: int = 0  # of text, for perplexity and agreement
    simulated_cycles_per_s: float = 0.0
    wall_s: float = 0.0
    version: int = VERSION
    kind: str = KIND


def load(path: str | Path) -> Result | LanguageResult:
    """Reads a result record of either kind. Raises ModelError."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    values = _parsed(text, str(path))
    kind = LanguageResult if values.get("kind") == LanguageResult.KIND else Result
    return kind._from_values(values, str(path))


def _parsed(text: str, source: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{source}: not a JSON file ({error})") from error
    if not isinstance(values, dict) or values.get("version") != VERSION:
        raise ModelError(f"{source}: not a result record of version {VERSION}; make one with: "
                         "weft bench codenet --json FILE")
    return values


def _build(kind: Any, value: Any) -> Any:
    """`value` as parsed from JSON, checked and turned into the annotated type."""
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # of a type and None
        return None if value is None else _build(arguments[0], value)
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
    if isinstance(accepted, (type, tuple)) and isinstance(value, accepted):
        return value
    raise TypeError(f"expected {getattr(kind, '__name__', kind)}, got {value!r:.40}")
