"""A whole language model: golden = functional = RTL, every layer and every scratchpad write of every token."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kit.language import random_language, tiny_config
from weft.arch.config import load_config
from weft.arch.program import Segment
from weft.compiler.language import compile_language
from weft.sim.golden_language import GoldenLanguage
from weft.sim.memory import parse_memory
from weft.sim.rtl import RtlDevice
from weft.sw.language import CheckedSession, generate

CONFIG = load_config("test")


@pytest.fixture(scope="module")
def language():
    return random_language(tiny_config(head_size=64, rotary=64))


@pytest.fixture(scope="module")
def program(language):
    return compile_language(language, CONFIG)


@pytest.mark.parametrize("memory", ["fixed:40:6.5", "gate:10:15:19"])
def test_prompt_and_tokens(language, program, memory):
    session = CheckedSession(program, GoldenLanguage(language), RtlDevice(CONFIG, parse_memory(memory)))
    prompt = np.random.default_rng(0).integers(0, language.config.vocab, 5)
    tokens, runs = generate(session, list(prompt), 3)
    assert len(tokens) == 3 and len(runs) == 3
    for run in runs:
        assert run.mismatches == 0, run.first
        assert run.compared > 30 and run.writes > 1000 and run.result.cycles > 0


def test_more_tokens_than_a_group(language, program):
    session = CheckedSession(program, GoldenLanguage(language), RtlDevice(CONFIG))
    run = session.forward(np.random.default_rng(1).integers(0, language.config.vocab, 70))
    assert run.mismatches == 0, run.first


def test_a_difference_is_told_with_layer_and_cycle(language, program):
    """One byte of a weight changed for the RTL only: the report names the layer whose load differs."""
    session = CheckedSession(program, None, RtlDevice(CONFIG))
    damaged = bytearray(program.constants.tobytes())
    damaged[len(damaged) // 2] ^= 1
    session.session.device.write_segment(Segment.CONSTANTS, 0, bytes(damaged))
    run = session.forward([1, 2])
    assert run.mismatches and "RTL" in run.first and "cycle" in run.first
