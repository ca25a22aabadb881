"""The command line: exit codes, one clear message for every bad input, nothing half-written."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

from weft.arch.errors import EngineFault
from weft.sw.cli import app

WEFT = [sys.executable, "-c", "from weft.sw.cli import main; main()"]


def weft(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fails(code: int, *arguments: object) -> str:
    """Runs a command that must fail with `code` and one message; returns it."""
    result = weft(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert len(re.findall(r"^weft: ", result.stderr, re.MULTILINE)) == 1
    return result.stderr


@pytest.fixture
def unsupported(tmp_path):
    """An ONNX file with a Sigmoid."""
    model = helper.make_model(helper.make_graph(
        [helper.make_node("Sigmoid", ["x"], ["y"], name="squash")], "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 8, 8])]),
        opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    onnx.save(model, tmp_path / "sigmoid.onnx")
    return tmp_path / "sigmoid.onnx"


def test_help_names_every_command_and_every_exit_code():
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", weft("--help").output).split())
    for verb in ("doctor", "models", "train", "quantize", "compile", "check", "simulate", "bench", "report", "demo"):
        assert verb in text
    assert "0 ok" in text and "2 model" in text and "3 the machine" in text and "4 results differ" in text


def test_an_unknown_flag_is_an_argument_error():
    assert weft("check", "--nonsense").exit_code == 2


def test_simulate_writes_json(program_file, tmp_path):
    result = weft("simulate", program_file, "--device", "functional", "--json", "-", "--count", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["images"], record["mismatches"], record["device"]) == (2, 0, "functional")
    assert len(list(tmp_path.glob("*.npz"))) == 2


def test_report_from_a_result(program_file, tmp_path):
    path = tmp_path / "result.json"
    assert weft("simulate", program_file, "-d", "functional", "--json", path, "-q").exit_code == 0
    assert weft("report", path).exit_code == 0
    assert "<html" in (tmp_path / "result.html").read_text()


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["compile"], ["check"], ["simulate"], ["report"]])
def test_missing_file(command, tmp_path):
    assert "none.file" in fails(2, *command, tmp_path / "none.file")


def test_file_that_is_no_onnx(tmp_path):
    (tmp_path / "junk.onnx").write_bytes(b"\x08\x07junk" * 50)
    assert "junk.onnx" in fails(2, "compile", tmp_path / "junk.onnx")
    assert not (tmp_path / "junk.weft").exists()


def test_unsupported_node(unsupported):
    for verb in ("check", "compile"):
        result = weft(verb, unsupported)
        assert result.exit_code == 2
        assert "squash" in result.output and "host" in result.output  # the node, and the way out
    assert not unsupported.with_suffix(".weft").exists()


def test_unknown_engine(unsupported):
    assert "base, test" in fails(2, "compile", unsupported, "--engine", "nonsense")


def test_engine_file_with_a_bad_value(unsupported, tmp_path):
    (tmp_path / "odd.toml").write_text("rows = 3\n")
    assert "odd.toml" in fails(2, "compile", unsupported, "--engine", tmp_path / "odd.toml")


def test_program_for_another_engine(program_file):
    message = fails(2, "simulate", program_file, "--engine", "base")
    assert "fingerprint" in message and "compile again" in message


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_corrupted_program(program_file, tmp_path, damage):
    raw = bytearray(program_file.read_bytes())
    raw[-100] ^= 1
    path = tmp_path / "bad.weft"
    path.write_bytes({"cut": raw[: len(raw) // 2], "flipped": raw, "empty": b""}[damage])
    assert "bad.weft" in fails(2, "simulate", path)


def test_unknown_device_memory_and_images(program_file):
    assert "functional, rtl" in fails(2, "simulate", program_file, "--device", "fpga")
    assert "ideal" in fails(2, "simulate", program_file, "--memory", "fast")
    assert "digits or random" in fails(2, "simulate", program_file, "--images", "nowhere.png")
    assert "at least 1" in fails(2, "simulate", program_file, "--count", 0)


def test_unreadable_image(program_file, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    assert "broken.png" in fails(2, "simulate", program_file, "--images", tmp_path / "broken.png")


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 99}', '{"version": 1, "title": 3}'])
def test_malformed_result(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    assert "result.json" in fails(2, "report", tmp_path / "result.json")


def test_unknown_model():
    pytest.importorskip("torch")
    assert "codenet-nano" in fails(2, "quantize", "--model", "resnet")


# --- the machine ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_tools(monkeypatch, tmp_path):
    """An empty PATH and an empty cache of simulators."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))


def test_missing_compiler(program_file, no_tools, monkeypatch):
    from weft.sim import rtl

    monkeypatch.setattr(rtl, "engine_verilog", lambda config: f"module {rtl.ENGINE}();\nendmodule\n")
    assert "apt-get install g++" in fails(3, "simulate", program_file)


def test_doctor(no_tools):
    result = weft("doctor", "--json", "-")
    assert result.exit_code == 3
    findings = {item["name"]: item for item in json.loads(result.stdout)["findings"]}
    assert not findings["c++"]["ok"] and findings["c++"]["mend"] == "sudo apt-get install g++"
    assert findings["python"]["ok"] and findings["numpy"]["ok"] and findings["verilator"]["found"]


def test_doctor_is_content_here():
    assert weft("doctor").exit_code == 0


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "weft.models.zoo", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "weft.models.codenet", raising=False)
    assert "weft[models]" in fails(3, "train")


def test_full_disk(program_file, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    message = fails(3, "simulate", program_file, "-d", "functional", "--json", tmp_path / "result.json")
    assert "No space left" in message and "free some space" in message
    assert not list(tmp_path.iterdir())


def test_full_disk_behind_stdout(program_file):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*WEFT, "simulate", program_file, "-d", "functional", "--json", "-"], stdout=full,
                              stderr=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == 3, done.stderr
    assert "No space left" in done.stderr and "Traceback" not in done.stderr


def test_differing_results_exit_with_4(program_file, monkeypatch):
    def fault(*_):
        raise EngineFault("the engine stopped in cycle 7: illegal instruction")

    monkeypatch.setattr("weft.sw.simulate.run_checked", fault)
    assert "cycle 7" in fails(4, "simulate", program_file, "-d", "functional")


def test_interrupt_inside_a_command(program_file, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("weft.sw.simulate.run_checked", interrupt)
    path = tmp_path / "result.json"
    assert "interrupted" in fails(130, "simulate", program_file, "-d", "functional", "--json", path)
    assert not path.exists()


def test_control_c(program_file, tmp_path):
    """A real signal during a long simulation."""
    process = subprocess.Popen([*WEFT, "simulate", program_file, "-d", "functional", "--count", "100000", "--json",
                                tmp_path / "result.json"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130, message
    assert "interrupted" in message and "Traceback" not in message
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(program_file, monkeypatch):
    monkeypatch.setenv("WEFT_DEBUG", "1")
    result = weft("simulate", program_file, "--engine", "base")
    assert type(result.exception).__name__ == "ModelError"
