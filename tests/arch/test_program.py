"""Programs survive a file, damaged files are refused, tensors survive packing."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from weft.arch import program as module
from weft.arch.config import load_config
from weft.arch.errors import ModelError, ToolError
from weft.arch.isa import End, Load
from weft.arch.program import InputTensor, Layer, OutputTensor, Program, write_atomically

TEST = load_config("test")


@pytest.fixture
def program() -> Program:
    instructions = [Load(run=2, rows=1, planes=1, tag=0), End()]
    return Program(
        config=TEST, fingerprint=TEST.fingerprint, model="tiny",
        instructions=np.array([np.frombuffer(i.encode(), np.uint8) for i in instructions]),
        constants=np.arange(64, dtype=np.uint8), first_row=np.array([0, -1], np.int32),
        first_part=np.array([3, 0], np.int32), segment_bytes=(64, 0, 96, 32),
        inputs=(InputTensor("image", 0, 2, 3, 3, 32, 1, True, 0.5),),
        outputs=(OutputTensor("heat", 0, 1, 1, 32, (4, 2), False, 0.25),),
        layers=(Layer("conv", "Conv", "heat", "matrix", 1, 1, 2, (1, -1, 0), False, macs=12, weight_bits=4),),
    )


@pytest.fixture
def path(program, tmp_path):
    path = tmp_path / "folder" / "tiny.weft"
    program.save(path)
    return path


def assert_same(a: Program, b: Program) -> None:
    arrays = ("instructions", "constants", "first_row", "first_part")
    for name in arrays:
        ours, theirs = getattr(a, name), getattr(b, name)
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    nothing = dict.fromkeys(arrays)
    assert replace(a, **nothing) == replace(b, **nothing)


def test_round_trip(program, path):
    loaded = Program.load(path)
    assert_same(program, loaded)
    assert [i.listing() for i in loaded.decoded()] == ["load run=2 rows=1 planes=1", "end"]
    assert loaded.listing().splitlines()[1] == "     1  end"


def test_truncated_files_are_refused(path):
    raw = path.read_bytes()
    for size in {0, 1, 7, 8, 100, len(raw) // 2, len(raw) - 1}:
        path.write_bytes(raw[:size])
        with pytest.raises(ModelError, match=r"tiny\.weft"):
            Program.load(path)


def test_flipped_bits_are_refused(program, path):
    raw = path.read_bytes()
    for position in np.random.default_rng(0).integers(0, 8 * len(raw), 150).tolist():
        damaged = bytearray(raw)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            loaded = Program.load(path)
        except ModelError:
            continue
        assert_same(program, loaded)  # only a bit without meaning, in the spaces after the header, may pass


def test_foreign_files_are_refused(path, tmp_path):
    path.write_bytes(b"#!/bin/sh\necho not a program\n" * 10)
    with pytest.raises(ModelError, match="not a Weft Program"):
        Program.load(path)
    save_file({"weights": np.zeros(3)}, path)
    with pytest.raises(ModelError, match="a safetensors file, but not a Weft Program"):
        Program.load(path)
    for missing in (tmp_path / "nothing.weft", tmp_path):
        with pytest.raises(ModelError, match=r"cannot be read|not a Weft Program"):
            Program.load(missing)


def test_large_files_are_refused(path, monkeypatch):
    monkeypatch.setattr(module, "MAX_PROGRAM_BYTES", 100)
    with pytest.raises(ModelError, match="larger than 100 bytes"):
        Program.load(path)


def rewrite(program: Program, path, change) -> None:
    """Saves a Program whose metadata has been changed by someone who knows how to make a checksum."""
    program.save(path)
    with module.safe_open(path, "numpy") as file:
        meta = json.loads(json.loads(file.metadata()["weft"])["program"])
    arrays = program._arrays()
    change(meta, arrays)
    text = json.dumps(meta)
    save_file(arrays, path, {"weft": json.dumps({"checksum": module._checksum(text, arrays), "program": text})})


@pytest.mark.parametrize("change, message", [
    (lambda meta, arrays: meta.update(format=99), "format 99"),
    (lambda meta, arrays: meta.pop("model"), "malformed Program"),
    (lambda meta, arrays: meta["config"].update(rows=3), "rows must be a power of two"),
    (lambda meta, arrays: meta["config"].update(colour=3), "malformed Program"),
    (lambda meta, arrays: meta["inputs"][0].pop("border"), "malformed Program"),
    (lambda meta, arrays: meta.update(segment_bytes=7), "malformed Program"),
    (lambda meta, arrays: arrays.pop("first_row"), "malformed Program"),
    (lambda meta, arrays: arrays.update(first_part=np.zeros(3, np.int32)), "different lengths"),
    (lambda meta, arrays: arrays.update(instructions=np.zeros((2, 63), np.uint8)), "different lengths"),
])
def test_malformed_programs_are_refused(program, path, change, message):
    rewrite(program, path, change)
    with pytest.raises(ModelError, match=message):
        Program.load(path)


def test_undecodable_instruction_is_named(program):
    broken = replace(program, instructions=np.zeros((2, 64), np.uint8))
    with pytest.raises(ModelError, match="Program 'tiny', instruction 0: unknown opcode 0"):
        list(broken.decoded())


def test_another_engine_is_refused(program):
    program.require_config(TEST)
    with pytest.raises(ModelError, match=r"compiled for engine 'test' .* this engine is 'base' .*--engine base"):
        program.require_config(load_config("base"))
    with pytest.raises(ModelError, match="compile again"):
        replace(program, fingerprint="0" * 16).require_config(TEST)


@pytest.mark.parametrize("unsigned", [True, False])
def test_input_packing(unsigned):
    tensor = InputTensor("image", 0, 2, 3, 3, 32, 1, unsigned, 0.5)
    low = 0 if unsigned else -128
    codes = np.random.default_rng(1).integers(low, low + 256, (2, 3, 3))
    raw = np.frombuffer(tensor.pack(codes), np.uint8 if unsigned else np.int8)
    assert raw.size == tensor.size == 64
    for y in range(2):
        for x in range(3):
            for c in range(3):
                assert raw[y * 32 + (x + 1) * 3 + c] == codes[y, x, c]
    border = np.ones((2, 32), bool)
    border[:, 3:12] = False
    assert not raw.reshape(2, 32)[border].any()
    with pytest.raises(ModelError, match=r"shape \[3, 2, 3\]; the Program wants \[2, 3, 3\]"):
        tensor.pack(codes.transpose(1, 0, 2))
    for value in (low - 1, low + 256):
        with pytest.raises(ModelError, match="codes outside"):
            tensor.pack(np.full((2, 3, 3), value))


@pytest.mark.parametrize("unsigned", [True, False])
def test_output_unpacking(unsigned):
    tensor = OutputTensor("heat", 0, 2, 3, 32, (40, 0, 31, 63), unsigned, 0.25)
    assert tensor.size == 2 * 2 * 3 * 32
    raw = np.random.default_rng(2).integers(0, 256, (2, 2, 3, 32), np.uint8)
    codes = tensor.unpack(raw.tobytes())
    assert codes.dtype == np.int16 and codes.shape == (2, 3, 4)
    words = raw if unsigned else raw.view(np.int8)
    for k, place in enumerate(tensor.lanes_of):
        assert np.array_equal(codes[:, :, k], words[place // 32, :, :, place % 32])


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", refuse)
    with pytest.raises(ToolError, match=r"cannot write .*No space left on device"):
        write_atomically(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"
    with pytest.raises(ToolError):
        write_atomically(tmp_path / "fresh", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_writing_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ToolError, match="cannot write"):
        write_atomically(tmp_path / "file" / "below", b"")
