"""Language models compiled: golden = functional machine in every layer, whatever the shape, chunk and position."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.kit.language import random_language, tiny_config
from weft.arch.config import load_config
from weft.arch.errors import ModelError
from weft.arch.program import Program, Segment
from weft.compiler.language import compile_language
from weft.compiler.language_pack import pack
from weft.compiler.language_plan import plan_language
from weft.sim.functional import FunctionalDevice
from weft.sim.golden_language import GoldenLanguage
from weft.sw.bench_language import packed_cache
from weft.sw.language import CheckedSession, Session

BASE, TEST = load_config("base"), load_config("test")
SHAPES = {
    "plain": {},
    "no groups of heads": {"heads": 2, "kv_heads": 2},
    "wide groups, half rotated": {"heads": 8, "kv_heads": 1, "head_size": 128, "rotary": 64},
    "narrow heads": {"heads": 4, "kv_heads": 2, "head_size": 32, "rotary": 32},
    "no history": {"kernel": 1},
    "long kernel": {"kernel": 7, "layers": ("conv",)},
    "attention only": {"layers": ("attention", "attention")},
    "odd widths": {"width": 70, "feed_forward": 100, "vocab": 77},
}


def model(**changes):
    return random_language(tiny_config(**({"head_size": 64, "rotary": 64} | changes)))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("engine", [BASE, TEST], ids=lambda engine: engine.name)
def test_every_layer_equals_the_golden_model(name, engine):
    language = model(**SHAPES[name])
    session = CheckedSession(compile_language(language, engine), GoldenLanguage(language))
    rng = np.random.default_rng(0)
    for count in (3, 1, 70, 1):  # more than a group of tokens, too
        run = session.forward(rng.integers(0, language.config.vocab, count))
        assert run.mismatches == 0, run.first
        assert run.compared >= 11 * len(language.blocks)


def test_long_contexts_are_cut_without_changing_a_bit():
    language = model(context=2000, layers=("attention",))
    prompt = np.random.default_rng(1).integers(0, language.config.vocab, 130)
    short = CheckedSession(compile_language(language, TEST, 160), GoldenLanguage(language))
    long = CheckedSession(compile_language(language, TEST, 2000), GoldenLanguage(language))
    for session in (short, long):
        assert session.forward(prompt).mismatches == 0
    assert np.array_equal(short.session.logits, long.session.logits)


def test_chunks_leave_identical_caches_and_logits():
    language = model()
    program = compile_language(language, TEST)
    prompt = np.random.default_rng(2).integers(0, language.config.vocab, 130)
    golden = GoldenLanguage(language)
    cache = golden.new_cache()
    logits = golden.forward(prompt, cache)
    want = packed_cache(program, language.config, cache)
    for chunk in (1, 7, 64, 128, 130):
        session = Session(FunctionalDevice(TEST), program)
        for first in range(0, len(prompt), chunk):
            session.forward(prompt[first : first + chunk])
        assert np.array_equal(session.logits, logits), chunk
        assert session.answer == golden.answer(logits)
        assert session.device.read_segment(Segment.CACHE, 0, len(want)) == want, chunk


def test_sequences_do_not_disturb_each_other():
    language = model()
    session = Session(FunctionalDevice(TEST), compile_language(language, TEST), sequences=3)
    golden = GoldenLanguage(language)
    caches = [golden.new_cache() for _ in range(3)]
    rng = np.random.default_rng(3)
    for sequence in (0, 1, 0, 2, 1, 0):
        tokens = rng.integers(0, language.config.vocab, rng.integers(1, 9))
        session.forward(tokens, sequence)
        assert np.array_equal(session.logits, golden.forward(tokens, caches[sequence])), sequence
    session.clear(1)
    session.forward(tokens, 1)
    assert np.array_equal(session.logits, golden.forward(tokens, golden.new_cache()))


def test_the_same_model_gives_the_same_bytes(tmp_path):
    language = model()
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        compile_language(language, TEST).save(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert Program.load(paths[0]).language == compile_language(language, TEST).language


def test_packed_weights_are_those_of_the_layer():
    linear = model().blocks[0].mixer.in_projection
    packed = pack(linear, BASE, 1.0, 1.0)
    together, lanes, columns = BASE.scaled_words, BASE.lanes, BASE.columns
    words = 1 + together * BASE.weight_words(False)
    for position, row in enumerate(packed.channels):
        tile, column = divmod(position, columns)
        for block in range(packed.blocks):
            run = packed.stream[tile, block // together * words :][:words]
            factor = int(run[0, block % together * columns + column])
            raw = run[1 + block % together * BASE.weight_words(False) :][: BASE.weight_words(False)]
            pairs = raw.reshape(lanes // 2, columns)[:, column]
            codes = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1).astype(np.int8)
            codes = (codes ^ 8) - 8
            if row < 0:
                assert not codes.any()
            else:
                assert np.array_equal(codes, linear.codes[row, block * lanes :][:lanes])
                assert factor == linear.factors[row, block]


@pytest.mark.parametrize(("changes", "context", "said"), [
    ({}, 0, "1..200 positions"),
    ({}, 201, "a context of 201"),
    ({"head_size": 48, "rotary": 48}, None, "multiple of 32"),
    ({"width": 40000}, 10, "enlarge bank_words"),
])
def test_what_does_not_fit_is_refused(changes, context, said):
    config = tiny_config(**({"head_size": 64, "rotary": 64} | changes))
    with pytest.raises(ModelError, match=said):
        if config.width > 1000:
            plan_language(config, TEST, 10)
        else:
            compile_language(random_language(config), TEST, context)


def test_words_of_another_size_are_refused():
    with pytest.raises(ModelError, match="choose lanes = 32"):
        compile_language(model(), replace(TEST, lanes=64))


def test_scales_of_keys_must_fit_a_word():
    with pytest.raises(ModelError, match="at most 8 columns"):
        compile_language(model(), replace(TEST, columns=16))


@pytest.mark.parametrize(("tokens", "said"), [
    ([], "at least one token"), ([50], "outside the vocabulary"),
    ([-1], "outside the vocabulary"), ([0] * 101, "exceed the context of 100"),
])
def test_a_session_refuses_tokens_it_cannot_take(tokens, said):
    session = Session(FunctionalDevice(TEST), compile_language(model(), TEST, 100))
    with pytest.raises(ModelError, match=said):
        session.forward(tokens)
    assert session.lengths == [0]
