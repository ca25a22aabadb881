"""`weft generate`: a text continued on a Device, compared in everything, with what it cost."""

from __future__ import annotations

import time
from typing import Any

from weft.arch.config import EngineConfig
from weft.compiler.language import compile_language
from weft.sim.golden_language import GoldenLanguage
from weft.sw.bench_language import CLOCK, phase_of
from weft.sw.devices import make_device
from weft.sw.language import CheckedSession, Run, generate
from weft.sw.language_models import Loaded, load_language
from weft.sw.terminal import Terminal


def generate_text(terminal: Terminal, name: str, prompt: str, tokens: int, device: str, engine: EngineConfig,
                  memory: str, context: int | None, temperature: float, top: int, chunk: int, seed: int
                  ) -> dict[str, Any]:
    """Streams the text to the terminal; returns it with its figures."""
    loaded = load_language(name)
    with terminal.progress("compile", len(loaded.model.blocks) + 2, "blocks") as done:
        program = compile_language(loaded.model, engine, context, lambda part, _: done(part))
    rtl = None if device == "functional" else make_device(device, engine, memory, trace=False)
    session = CheckedSession(program, GoldenLanguage(loaded.model), rtl)
    start = loaded.encode(prompt)
    began = time.perf_counter()
    shown = Shown(terminal, loaded, prompt)
    produced, runs = generate(session, start, tokens, temperature, top, seed, chunk, loaded.model.config.eos, shown)
    terminal.write("\n")
    wall = time.perf_counter() - began
    return summary(loaded, program, device, memory, prompt, produced, runs, wall, terminal, len(start))


def summary(loaded: Loaded, program: Any, device: str, memory: str, prompt: str, produced: list[int], runs: list[Run],
            wall: float, terminal: Terminal, prompt_tokens: int) -> dict[str, Any]:
    decode = [run for run in runs if run.position >= prompt_tokens]
    cycles = [run.result.cycles for run in decode]
    per_token = round(sum(cycles) / len(cycles)) if cycles else 0
    last = phase_of(program, decode[-1], memory) if decode else None
    wrong = [run.first for run in runs if run.mismatches]
    result = {
        "model": loaded.model.config.name, "engine": program.config.name, "device": device, "memory": memory,
        "prompt": prompt, "text": loaded.decode(produced), "prompt_tokens": prompt_tokens, "tokens": len(produced),
        "token_ids": produced, "layers_compared": sum(run.compared for run in runs),
        "writes_compared": sum(run.writes for run in runs), "mismatches": sum(run.mismatches for run in runs),
        "first_difference": next(iter(wrong), ""),
        "prefill_cycles": sum(run.result.cycles for run in runs if run.position < prompt_tokens),
        "decode_cycles_per_token": per_token, "decode_bytes_per_token": last.bytes_per_token if last else 0,
        "bandwidth_utilization": last.bandwidth_utilization if last else 0.0, "clock_hz": CLOCK,
        "tokens_per_s_simulated": round(CLOCK / per_token, 2) if per_token else 0.0, "wall_s": round(wall, 2),
        "tokens_per_wall_s": round(len(produced) / wall, 2),
    }
    cost = (f"{per_token:,} cycles per token ({result['tokens_per_s_simulated']} tokens/s at {CLOCK / 1e6:.0f} MHz, "
            f"simulated), " if per_token else "")
    terminal.say(f"{len(produced)} tokens, {cost}{result['tokens_per_wall_s']} tokens/s here; "
                 f"{result['layers_compared']} layer outputs and {result['writes_compared']:,} writes compared, "
                 f"{result['mismatches']} differ")
    return result


class Shown:
    """Writes the text as it grows; a character of several tokens appears with its last."""

    def __init__(self, terminal: Terminal, loaded: Loaded, prompt: str) -> None:
        self.terminal, self.loaded = terminal, loaded
        self.tokens: list[int] = []
        self.length = 0
        terminal.write(prompt)

    def __call__(self, token: int, run: Run) -> None:
        self.tokens.append(token)
        text = self.loaded.decode(self.tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.terminal.write(text[self.length :])
            self.length = len(text)
