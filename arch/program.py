"""Program: instructions, constants and buffer table for one EngineConfig; the one artefact handed over.

File format: safetensors (8-byte length, JSON header, raw bytes) with the tensors `instructions`
(uint8 [n, 64]), `constants` (uint8 [bytes]), `first_row` and `first_part` (int32 [n]), and the rest as
JSON in the header's metadata under the key `weft`: {"checksum": SHA-256 over everything, "program": ...}.
"""

from __future__ import annotations

import enum
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from weft.arch.config import EngineConfig
from weft.arch.errors import ModelError, ToolError
from weft.arch.isa import INSTRUCTION_BYTES, Instruction, decode

FORMAT = 2
MAX_PROGRAM_BYTES = 1 << 31  # a larger file is not one of ours


class Segment(enum.IntEnum):
    """Memory segments of a Program; the values are the numbers of the base registers."""

    CONSTANTS = 0
    ARENA = 1  # intermediate tensors that do not stay in the scratchpad
    INPUT = 2
    OUTPUT = 3
    CACHE = 4  # keys, values and convolution state of every resident sequence of a language model


class Argument(enum.IntEnum):
    """Arguments of a language model's Program; the values are the numbers of the argument registers."""

    POSITION = 0  # of the first token of the run in its sequence
    COUNT = 1  # tokens of the run, at least 1
    SEQUENCE = 2  # first byte of the sequence's part of segment CACHE


@dataclass(frozen=True)
class InputTensor:
    """An image as the engine reads it: `height` raw rows of `row_bytes` bytes, channels interleaved.

    Pixel x, channel c of row y is byte `y*row_bytes + (x + border)*channels + c` of the segment part that
    starts at `offset`; the border columns hold code 0. Codes are int8, or uint8 when `unsigned`.
    A real value is code * scale.
    """

    name: str
    offset: int
    height: int
    width: int
    channels: int
    row_bytes: int
    border: int
    unsigned: bool
    scale: float

    @property
    def size(self) -> int:
        return self.height * self.row_bytes

    def pack(self, codes: np.ndarray) -> bytes:
        """Codes [height, width, channels] to bytes. Raises ModelError on another shape or on codes out of range."""
        shape = (self.height, self.width, self.channels)
        if codes.shape != shape:
            raise ModelError(
                f"input '{self.name}' has shape {list(codes.shape)}; the Program wants {list(shape)} (H, W, C)"
            )
        kind = np.uint8 if self.unsigned else np.int8
        limits = np.iinfo(kind)
        if codes.size and not limits.min <= codes.min() <= codes.max() <= limits.max:
            raise ModelError(f"input '{self.name}' has codes outside {limits.min}..{limits.max}")
        rows = np.zeros((self.height, self.row_bytes), np.uint8)
        start = self.border * self.channels
        rows[:, start : start + self.width * self.channels] = codes.astype(kind).view(np.uint8).reshape(self.height, -1)
        return rows.tobytes()


@dataclass(frozen=True)
class OutputTensor:
    """A result in memory: blocks of [height, width] words of `lanes` bytes, starting at `offset`.

    Channel c is lane `lanes_of[c] % lanes` of block `lanes_of[c] // lanes`; several outputs may share blocks.
    """

    name: str
    offset: int
    height: int
    width: int
    lanes: int
    lanes_of: tuple[int, ...]
    unsigned: bool
    scale: float

    @property
    def size(self) -> int:
        return (max(self.lanes_of) // self.lanes + 1) * self.height * self.width * self.lanes

    def unpack(self, raw: bytes) -> np.ndarray:
        """Bytes to codes int16 [height, width, channels]."""
        words = np.frombuffer(raw, np.uint8 if self.unsigned else np.int8)
        blocks = words.reshape(-1, self.height, self.width, self.lanes).transpose(1, 2, 0, 3)
        return blocks.reshape(self.height, self.width, -1)[:, :, list(self.lanes_of)].astype(np.int16)


@dataclass(frozen=True)
class Language:
    """How the host talks to a language model's Program.

    A run takes COUNT tokens, uint32 words at the start of segment INPUT, at POSITION of the sequence whose part of
    segment CACHE starts at byte SEQUENCE; all zero is an empty sequence. It leaves in segment OUTPUT the logits of
    the last token: code of token t = int16 with its low byte at logits + t, its high byte at logits + high + t,
    real value = code * logit_scale; and at `answer` the greatest code (int16), 0 (uint16), its token (uint32).
    """

    vocab: int
    context: int  # positions a sequence may have
    sequence_bytes: int
    logits: int
    high: int
    answer: int
    logit_scale: float
    bos: int
    eos: int


@dataclass(frozen=True)
class Layer:
    """What reports and comparisons know of one layer; its number is the `tag` of its instructions.

    `channel_of[i]` is the logical output channel that the unit computes at position i (tile*C + column in
    the matrix unit, block*lanes + lane in the vector unit), or -1 for padding. `output` is the name of the
    graph tensor it computes, `upsample` the factor by which it is written enlarged. In a language model height is 0
    and width 1: rows are the tokens of a run.
    """

    name: str
    operation: str
    output: str
    unit: str
    height: int
    width: int
    channels: int
    channel_of: tuple[int, ...]
    unsigned: bool
    upsample: int = 1
    macs: int = 0  # useful multiply-accumulates
    weight_bits: int = 0


@dataclass(frozen=True)
class Program:
    """Everything a Device needs to run one network.

    `first_row[i]` and `first_part[i]` (first output row; first tile or block) tell where the result of
    instruction i lies in its layer's output; they serve comparison and reports, not execution. The positions
    of a COLUMNS layer are numbered (block*taps + tap)*lanes + lane.
    """

    config: EngineConfig
    fingerprint: str
    model: str
    instructions: np.ndarray
    constants: np.ndarray
    first_row: np.ndarray
    first_part: np.ndarray
    segment_bytes: tuple[int, ...]
    inputs: tuple[InputTensor, ...]
    outputs: tuple[OutputTensor, ...]
    layers: tuple[Layer, ...]
    language: Language | None = None  # of a language model's Program, which has no inputs and outputs as above

    def decoded(self) -> Iterator[Instruction]:
        """The instructions as objects. Raises ModelError on one that does not decode."""
        for index, row in enumerate(self.instructions):
            try:
                yield decode(row.tobytes())
            except ValueError as error:
                raise ModelError(f"Program '{self.model}', instruction {index}: {error}") from error

    def listing(self) -> str:
        return "\n".join(f"{i:6d}  {instruction.listing()}" for i, instruction in enumerate(self.decoded()))

    def require_config(self, config: EngineConfig) -> None:
        """Raises ModelError unless this Program was compiled for `config`."""
        if self.fingerprint != config.fingerprint:
            raise ModelError(
                f"Program '{self.model}' was compiled for engine '{self.config.name}' (fingerprint "
                f"{self.fingerprint}), "
                f"this engine is '{config.name}' ({config.fingerprint}); compile again with --engine {config.name}"
            )

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            "instructions": np.ascontiguousarray(self.instructions, np.uint8),
            "constants": np.ascontiguousarray(self.constants, np.uint8),
            "first_row": np.ascontiguousarray(self.first_row, np.int32),
            "first_part": np.ascontiguousarray(self.first_part, np.int32),
        }

    def save(self, path: str | Path) -> None:
        """Writes the file whole or not at all, equal bytes for equal Programs. Raises ToolError if the disk refuses."""
        meta = {
            "format": FORMAT,
            "config": asdict(self.config),
            "fingerprint": self.fingerprint,
            "model": self.model,
            "segment_bytes": self.segment_bytes,
            "inputs": [asdict(item) for item in self.inputs],
            "outputs": [asdict(item) for item in self.outputs],
            "layers": [asdict(item) for item in self.layers],
            "language": asdict(self.language) if self.language else None,
        }
        text, arrays = json.dumps(meta, sort_keys=True), self._arrays()
        # One key, because safetensors does not keep the order of several, and equal Programs are equal files.
        header = json.dumps({"checksum": _checksum(text, arrays), "program": text})
        write_atomically(path, save(arrays, {"weft": header}))

    @classmethod
    def load(cls, path: str | Path) -> Program:
        """Reads and checks a file. Raises ModelError that says what is wrong with it."""
        path = Path(path)
        try:
            if path.stat().st_size > MAX_PROGRAM_BYTES:
                raise ModelError(f"{path}: larger than {MAX_PROGRAM_BYTES} bytes, not a Weft Program")
            with safe_open(path, "numpy") as file:
                header = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        except (SafetensorError, ValueError) as error:
            raise ModelError(f"{path}: not a Weft Program, or cut short ({error}); compile it again") from error
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from error
        if "weft" not in header:
            raise ModelError(f"{path}: a safetensors file, but not a Weft Program")
        try:
            outer = json.loads(header["weft"])
            if _checksum(outer["program"], arrays) != outer["checksum"]:
                raise ModelError(f"{path}: corrupted (checksum differs); compile it again")
            return cls._from_parts(json.loads(outer["program"]), arrays)
        except ModelError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path}: malformed Program ({error}); compile it again") from error

    @classmethod
    def _from_parts(cls, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> Program:
        if meta["format"] != FORMAT:
            raise ModelError(f"Program format {meta['format']}, this Weft reads {FORMAT}; compile it again")
        count = len(arrays["first_row"])
        if arrays["instructions"].shape != (count, INSTRUCTION_BYTES) or len(arrays["first_part"]) != count:
            raise ModelError("instruction tables of different lengths")

        def tuples(values: dict[str, Any]) -> dict[str, Any]:
            return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}

        return cls(
            config=EngineConfig(**meta["config"]),
            fingerprint=meta["fingerprint"],
            model=meta["model"],
            **arrays,
            segment_bytes=tuple(meta["segment_bytes"]),
            inputs=tuple(InputTensor(**tuples(item)) for item in meta["inputs"]),
            outputs=tuple(OutputTensor(**tuples(item)) for item in meta["outputs"]),
            layers=tuple(Layer(**tuples(item)) for item in meta["layers"]),
            language=Language(**meta["language"]) if meta["language"] else None,
        )


def _checksum(text: str, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].dtype}{arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Writes a file so that it is either complete or absent. Raises ToolError when the system refuses."""
    path = Path(path)
    raw = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(raw)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise ToolError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another place"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
