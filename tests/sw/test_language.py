"""`weft generate`, `quantize`, `compile` and `bench llm`: text, figures, and one message for every bad input."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from tests.kit.language import random_language, tiny_config
from tests.sw.test_cli import fails, weft
from weft.models.huggingface import byte_tokenizer
from weft.sw.language import choose


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random byte-level model as `weft quantize` leaves it."""
    folder = tmp_path_factory.mktemp("language")
    config = tiny_config(head_size=64, rotary=64, vocab=256, context=300)
    random_language(config).save(folder / "small.lm")
    (folder / "small.tokenizer.json").write_text(byte_tokenizer().to_str())
    return folder / "small.lm"


def test_generated_text_is_checked_and_repeatable(small):
    results = []
    for chunk in (0, 1, 3):
        done = weft("generate", "-m", small, "-p", "hello", "-n", 5, "-e", "test", "--chunk", chunk, "--json", "-")
        assert done.exit_code == 0, done.output
        results.append(json.loads(done.stdout))
    assert all(result["token_ids"] == results[0]["token_ids"] for result in results)
    assert results[0]["tokens"] == 5 and results[0]["mismatches"] == 0 and results[0]["layers_compared"] > 100
    assert results[0]["prompt_tokens"] == 6


def test_sampling_follows_the_seed(small):
    def ids(seed):
        done = weft("generate", "-m", small, "-n", 8, "-e", "test", "--temperature", 2, "--top-k", 20, "--seed", seed,
                    "--json", "-")
        return json.loads(done.stdout)["token_ids"]

    assert ids(1) == ids(1) != ids(2)


def test_choose_prefers_the_likely_and_keeps_to_the_top():
    rng = np.random.default_rng(0)
    logits = np.array([0.0, 3.0, 1.0, -2.0])
    drawn = [choose(logits, 1.0, 2, rng) for _ in range(300)]
    assert set(drawn) == {1, 2} and drawn.count(1) > 2 * drawn.count(2)


def test_bench_on_the_functional_machine(small):
    for phase, tokens in (("decode", 1), ("prefill", 9)):
        done = weft("bench", "llm", "-m", small, "--phase", phase, "--tokens", 9, "--context", 12, "-d", "functional",
                    "-e", "test", "--json", "-")
        assert done.exit_code == 0, done.output
        result = json.loads(done.stdout)
        assert result["mismatches"] == 0 and result["tokens"] == tokens and result["bytes"] > 0


def test_compiled_file_is_a_language_program(small, tmp_path):
    done = weft("compile", small, "-e", "test", "--context", 64, "-o", tmp_path / "a.weft", "--json", "-")
    assert done.exit_code == 0 and json.loads(done.stdout)["context"] == 64


@pytest.mark.parametrize(("arguments", "said"), [
    (["-m", "nowhere"], "no language model 'nowhere'"),
    (["-m", "lfm2-350m"], "no language model 'lfm2-350m' here"),
    (["-e", "test", "-p", "x" * 400], "exceed the context of 300"),
    (["-e", "test", "--context", 1000], "a context of 1000"),
    (["-e", "nothing"], "engine configuration 'nothing' not found"),
    (["-e", "test", "-d", "board"], "no device named 'board'"),
])
def test_bad_input_of_generate(small, arguments, said):
    given = arguments if "-m" in arguments else ["-m", small, *arguments]
    assert said in fails(2, "generate", *given)


def test_a_model_without_tokenizer_says_so(small, tmp_path):
    shutil.copy(small, tmp_path / "alone.lm")
    assert "tokenizer.json" in fails(2, "generate", "-m", tmp_path / "alone.lm", "-e", "test")


def test_a_tokenizer_of_another_model_is_refused(small, tmp_path):
    random_language(tiny_config(head_size=64, rotary=64, vocab=50)).save(tmp_path / "other.lm")
    shutil.copy(small.with_suffix(".tokenizer.json"), tmp_path / "other.tokenizer.json")
    assert "vocabulary of 50" in fails(2, "generate", "-m", tmp_path / "other.lm", "-e", "test")


def test_a_damaged_file_is_refused(small, tmp_path):
    (tmp_path / "cut.lm").write_bytes(small.read_bytes()[:1000])
    assert "quantize again" in fails(2, "generate", "-m", tmp_path / "cut.lm")
    assert "quantize again" in fails(2, "compile", tmp_path / "cut.lm")


def test_a_phase_that_is_none(small):
    assert "phase 'sleep'" in fails(2, "bench", "llm", "-m", small, "--phase", "sleep", "-d", "functional")


def test_folders_without_a_model_are_refused(tmp_path):
    assert "config.json" in fails(2, "quantize", "-m", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "gpt2" in fails(2, "quantize", "-m", tmp_path)
    assert "--gptq" in fails(2, "quantize", "-m", "codenet-nano", "--gptq")
