"""Benchmark of a language model: one decoded token, or one chunk of a prompt, on the engine."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from weft.arch.config import EngineConfig
from weft.arch.errors import ModelError
from weft.arch.language import LanguageConfig, LanguageModel
from weft.arch.program import Program
from weft.compiler.language import compile_language
from weft.compiler.language_cache import KeysValues, cache_bytes
from weft.compiler.language_plan import plan_language
from weft.reports.schema import Phase
from weft.sim.golden_language import Cache, GoldenLanguage, KeyValues
from weft.sim.memory import parse_memory
from weft.sw.devices import make_device
from weft.sw.language import CheckedSession, Run
from weft.sw.language_models import SUFFIX, TRAINED, load_language, random_language
from weft.sw.profile import phase, port_bytes_per_cycle
from weft.sw.terminal import Terminal

PHASES = ("decode", "prefill")
CLOCK = 100e6  # Hz, planned for the board that `base` fits


def phase_of(program: Program, run: Run, memory: str, clock: float = CLOCK) -> Phase:
    """The record of a run."""
    return phase(program, run.executed, run.result, run.tokens, run.position, parse_memory(memory), clock)


def packed_cache(program: Program, config: LanguageConfig, cache: Cache) -> bytes:
    """The golden model's cache as the engine keeps it."""
    assert program.language is not None
    plan = plan_language(config, program.config, program.language.context)
    return cache_bytes(plan.cache, [
        KeysValues(item.keys, item.key_mult, item.key_shift, item.values, item.magnitudes)
        if isinstance(item, KeyValues) else item for item in cache.layers])


def bench_language(terminal: Terminal, name: str, engine: EngineConfig, kind: str, device: str, memory: str,
                   tokens: int, context: int, seed: int) -> dict[str, object]:
    """One decoded token behind `context` others, or the first `tokens` of a prompt, every layer and write compared."""
    if kind not in PHASES:
        raise ModelError(f"phase '{kind}' is not known; give one of {', '.join(PHASES)}")
    if min(tokens, context) < 1:
        raise ModelError("--tokens and --context must be at least 1")
    terminal.say(f"model     {name}")
    published = not name.endswith(SUFFIX) and not (TRAINED / name).is_dir()
    model: LanguageModel = random_language(name, seed) if published else load_language(name).model
    config, count, past = model.config, *((1, context) if kind == "decode" else (tokens, 0))
    with terminal.progress("compile", len(model.blocks) + 2, "blocks") as done:
        program = compile_language(model, engine, past + count, lambda part, _: done(part))
    terminal.say(f"program   {len(program.instructions)} instructions, {program.constants.nbytes} bytes of constants")
    golden = GoldenLanguage(model)
    # A guess, good enough for a progress bar: the array is busy, or the port.
    weights = program.constants.nbytes
    expected = max(2 * weights * count / engine.macs, weights / port_bytes_per_cycle(engine, parse_memory(memory)))
    with terminal.progress(f"{kind} on {device}", expected, "cycles") as done:
        rtl = None if device == "functional" else make_device(device, engine, memory, trace=False, progress=done)
        session = CheckedSession(program, golden, rtl)
        prompt = np.random.default_rng(seed).integers(0, config.vocab, past + count)
        if past:
            golden.forward(prompt[:past], session.cache)
            session.fill(packed_cache(program, config, session.cache), past)
        run = session.forward(prompt[past:])
    figures = phase_of(program, run, memory)
    return {
        "model": config.name, "engine": engine.name, "device": device, "memory": memory, "phase": kind,
        "tokens": count, "context": past, "cycles": figures.cycles, "bytes": figures.bytes_read + figures.bytes_written,
        "bandwidth_utilization": figures.bandwidth_utilization, "array_efficiency": figures.array_efficiency,
        "macs": figures.macs, "tokens_per_s": figures.tokens_per_s,
        "port_bytes_per_cycle": figures.port_bytes_per_cycle, "array_macs": engine.macs, "clock_hz": CLOCK,
        "instructions": len(program.instructions), "layers_compared": run.compared, "writes_compared": run.writes,
        "mismatches": run.mismatches, "first_difference": run.first, "wall_s": round(run.wall_s, 1),
        "simulated_cycles_per_s": run.result.counters.get("simulated_cycles_per_s", 0), **asdict(figures),
    }
