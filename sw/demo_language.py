"""The language half of the demonstration: text from lfm2-nano on the engine's RTL, every layer of every token compared,
and what each step from floats to integers costs."""

from __future__ import annotations

import time
from dataclasses import asdict

import numpy as np

from weft.arch.config import EngineConfig
from weft.compiler.language import compile_language
from weft.reports.schema import LanguageResult
from weft.sim.golden_language import GoldenLanguage
from weft.sw.bench_language import CLOCK, phase_of
from weft.sw.devices import make_device
from weft.sw.language import CheckedSession, generate
from weft.sw.language_models import NANO, Loaded, folder

PROMPT = "The import statement "
TOKENS = 64
CONTEXT = 512
HELD_OUT = 16384  # bytes of held-out text, for perplexity
WINDOW = 256


def demonstrate(config: EngineConfig, memory: str, device: str = "rtl", tokens: int = TOKENS,
                held_out: int = HELD_OUT) -> LanguageResult:
    """Quantizes, compiles, generates, compares; the perplexity is of the integer model that the engine equals."""
    from weft.models.huggingface import load_model
    from weft.models.perplexity import ladder, rows
    from weft.models.quantize_language import Options, calibration, integer_model, quantized
    from weft.models.text import corpus
    from weft.models.train_language import tokens as text_tokens

    reference, tokenizer = load_model(folder(NANO))
    options = Options(calibration=corpus("train"))
    fake = quantized(reference.config, reference.state_dict())
    model = integer_model(fake, calibration(reference.config, options), options.headroom)
    loaded = Loaded(model, tokenizer)
    golden = GoldenLanguage(model)

    program = compile_language(model, config, CONTEXT)
    rtl = None if device == "functional" else make_device(device, config, memory, trace=False)
    session = CheckedSession(program, golden, rtl)
    prompt = loaded.encode(PROMPT)
    began = time.perf_counter()
    produced, runs = generate(session, prompt, tokens)
    wall = time.perf_counter() - began

    def logits(piece: np.ndarray) -> np.ndarray:
        return golden.forward(piece, golden.new_cache(), all_logits=True) * model.logit_scale

    steps = ladder(reference, fake, rows(logits), text_tokens("test")[:held_out], WINDOW)
    names = dict(zip(steps, ("float", "weights", "activations", "cache", "integer"), strict=True))
    last = list(steps.values())[-1]
    cycles = sum(run.result.cycles for run in runs)
    return LanguageResult(
        title="Text, generated bit for bit", model=NANO, engine=asdict(config), device=device, memory=memory,
        prompt=PROMPT, text=loaded.decode(produced), prompt_tokens=len(prompt), tokens=len(produced),
        layers_compared=sum(run.compared for run in runs), mismatches=sum(run.mismatches for run in runs),
        clock_hz=CLOCK, first_difference=next((run.first for run in runs if run.first), ""),
        prefill=phase_of(program, runs[0], memory), decode=phase_of(program, runs[-1], memory),
        perplexity={names[name]: round(step.perplexity, 4) for name, step in steps.items()},
        agreement={"cosine": round(last.cosine, 5), "top1": round(last.top1, 5)}, held_out_bytes=held_out,
        simulated_cycles_per_s=round(cycles / wall) if wall else 0.0, wall_s=round(wall, 2))
