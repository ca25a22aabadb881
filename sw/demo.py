"""The demonstration: digits found and text written by the engine's RTL, every layer compared, a report."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from weft.arch.config import EngineConfig
from weft.arch.errors import MismatchError
from weft.arch.program import Program, write_atomically
from weft.compiler.frontend import load_graph
from weft.compiler.graph import Graph
from weft.reports.html import render
from weft.reports.schema import LanguageResult, Result
from weft.sim.functional import FunctionalDevice
from weft.sw.compile import compile_file
from weft.sw.demo_language import demonstrate
from weft.sw.detector import HEADS, detections, picture
from weft.sw.devices import make_device
from weft.sw.images import to_codes
from weft.sw.reference import evaluate
from weft.sw.simulate import Checked, run_checked, to_result
from weft.sw.terminal import Terminal

TEST_IMAGES = 500  # scenes of the test split
PICTURES = 8  # in the report
WORKERS = 2
BATCH = 10  # images of a worker's job


def demo(terminal: Terminal, config: EngineConfig, folder: Path, model: str = "codenet-nano", memory: str = "ddr3",
         images: int = 16, test_images: int = TEST_IMAGES) -> dict[str, Any]:
    """Writes result.json, report.html and summary.json into `folder`; returns the summary.

    Raises MismatchError, once everything is written, when any layer of any image differs anywhere.
    """
    began = time.perf_counter()
    # spawn: torch's threads do not survive a fork
    pool = ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn"), _clean_termination)
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for this process
        simulator = pool.submit(_build_simulator, config)  # while this process exports and compiles
        pool.submit(_clean_termination)  # the second worker starts now, too
        signal.signal(signal.SIGINT, before)
        return _demo(terminal, pool, simulator, began, config, folder, model, memory, images, test_images)
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _demo(terminal: Terminal, pool: Executor, simulator: Future[None], began: float, config: EngineConfig,
          folder: Path, model: str, memory: str, images: int, test_images: int) -> dict[str, Any]:
    from weft.models.accuracy import average_precision
    from weft.models.codenet import to_input  # noqa: F401, loads torch before the clock matters
    from weft.models.data import DigitScenes
    from weft.models.export import export_qonnx
    from weft.models.train import predict
    from weft.sw.models import fake_quantized, load_model

    terminal.say(f"model     {model}: export to {folder / 'model.onnx'}")
    quantized = load_model(model)
    export_qonnx(quantized, folder / "model.onnx")
    graph, program = compile_file(folder / "model.onnx", config)
    program.save(folder / "model.weft")
    terminal.say(f"program   {len(program.instructions)} instructions, {program.constants.nbytes} bytes of constants, "
                 f"{len(program.layers)} layers, engine '{config.name}'")
    scenes = DigitScenes("test", quantized.config.size, max(test_images, images))
    samples = [scenes[index] for index in range(images)]
    codes = [to_codes(sample.image, program.inputs[0]) for sample in samples]

    simulator.result()
    job = (folder / "model.onnx", folder / "model.weft", memory)
    checked = [pool.submit(_infer, job, codes[0]).result()]
    first_s = time.perf_counter() - began
    terminal.say(f"first     RTL inference verified after {first_s:.1f} s: {checked[0].run.cycles} cycles, "
                 f"{checked[0].layers_compared} layers, {checked[0].mismatches} differ")
    language = pool.submit(demonstrate, config, memory)  # by one worker, while the other sees to the images
    rest = [pool.submit(_infer, job, image) for image in codes[1:]]
    checked += _collect(terminal, "RTL inference", rest, "images")

    samples += [scenes[index] for index in range(images, test_images)]
    pixels = np.stack([sample.image for sample in samples[:test_images]])
    batches = [pool.submit(_integer, folder / "model.onnx", [to_codes(image, program.inputs[0]) for image in part])
               for part in np.array_split(pixels, -(-len(pixels) // BATCH))]
    integer_parts = _collect(terminal, "integer accuracy", batches, "batches")
    scales = {name: graph.tensors[name].scale for name in HEADS}
    terminal.say("accuracy  float and fake-quantized models")
    float_found = predict(load_model(model, quantized=False), pixels)
    with fake_quantized(quantized):
        fake_found = predict(quantized, pixels)
    found = {"float": float_found, "fake-quantized": fake_found,
             "integer": [detections(heads, scales) for part in integer_parts for heads in part]}
    accuracy = {name: round(100 * average_precision(boxes, samples[:test_images], quantized.config.classes)["ap50"], 2)
                for name, boxes in found.items()}

    pictures = [picture(f"scene {index}", samples[index], scenes.classes, float_found[index],
                        detections(checked[index].run.outputs, scales))
                for index in range(min(PICTURES, images, test_images))]
    result = replace(to_result("Digits, found bit for bit", program, "rtl", memory, checked), model=model,
                     accuracy=accuracy, accuracy_images=len(pixels), pictures=pictures)
    [text] = _collect(terminal, "text on the RTL", [language], "models")
    return _finish(terminal, folder, result, text, first_s, time.perf_counter() - began)


def _finish(terminal: Terminal, folder: Path, result: Result, text: LanguageResult, first_s: float,
            total_s: float) -> dict[str, Any]:
    summary = {
        "detector": {
            "images": result.images, "layers_compared": result.layers_compared, "mismatches": result.mismatches,
            "ap50_float": result.accuracy["float"], "ap50_quant": result.accuracy["fake-quantized"],
            "ap50_integer": result.accuracy["integer"], "ap50_images": result.accuracy_images,
            "rtl_cycles": result.cycles, "efficiency": result.efficiency,
            "simulated_cycles_per_s": result.simulated_cycles_per_s,
        },
        "llm": {
            "tokens": text.tokens, "layers_compared": text.layers_compared, "mismatches": text.mismatches,
            "ppl_float": text.perplexity["float"], "ppl_integer": text.perplexity["integer"],
            "ppl_bytes": text.held_out_bytes, "cosine": text.agreement["cosine"], "top1": text.agreement["top1"],
            "decode_cycles_per_token": text.decode.cycles if text.decode else 0,
            "prefill_cycles": text.prefill.cycles if text.prefill else 0, "prompt": text.prompt, "text": text.text,
            "simulated_cycles_per_s": text.simulated_cycles_per_s,
        },
        "setup_to_first_inference_s": round(first_s, 1),
        "wall_s": round(total_s, 1),
    }  # fmt: skip
    write_atomically(folder / "result.json", result.to_json())
    write_atomically(folder / "language.json", text.to_json())
    write_atomically(folder / "report.html", render(result, text))
    write_atomically(folder / "summary.json", Terminal.to_json(summary))
    detector = summary["detector"]
    terminal.say(f"compared  {result.layers_compared} layer outputs of {result.images} images, "
                 f"golden = functional = RTL: {result.mismatches} differ")
    terminal.say(f"AP50      float {detector['ap50_float']}, fake-quantized {detector['ap50_quant']}, "
                 f"integer {detector['ap50_integer']} (%, {result.accuracy_images} images)")
    terminal.say(f"speed     {result.cycles} cycles per image, {100 * result.efficiency:.1f} % of the array")
    llm = summary["llm"]
    terminal.say(f"text      {text.prompt}{text.text}".replace("\n", " "))
    terminal.say(f"compared  {text.layers_compared} layer outputs of {text.tokens} tokens, golden = functional = "
                 f"RTL: {text.mismatches} differ")
    terminal.say(f"perplexity float {llm['ppl_float']}, integer {llm['ppl_integer']} ({text.held_out_bytes} bytes of "
                 f"held-out text); {llm['decode_cycles_per_token']} cycles per token")
    terminal.say(f"report    {folder / 'report.html'} ({total_s:.0f} s in all)")
    if result.mismatches or text.mismatches:
        raise MismatchError(f"{result.mismatches + text.mismatches} layer outputs differ; the first: "
                            f"{result.first_difference or text.first_difference}")
    return summary


def _collect(terminal: Terminal, what: str, futures: Sequence[Future], unit: str) -> list[Any]:
    with terminal.progress(what, len(futures), unit) as done:
        for count, future in enumerate(as_completed(futures), 1):
            future.result()  # a failure ends the demonstration now
            done(count)
    return [future.result() for future in futures]


# --- what the worker processes do --------------------------------------------------------------------------------


def _clean_termination() -> None:
    """A worker that is told to stop ends its own children, such as a compiler, and its files."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())


def _build_simulator(config: EngineConfig) -> None:
    make_device("rtl", config)


@lru_cache(maxsize=1)
def _graph(onnx: Path) -> Graph:
    return load_graph(onnx)


@lru_cache(maxsize=1)
def _devices(weft: Path, memory: str) -> tuple[Any, FunctionalDevice]:
    program = Program.load(weft)
    pair = make_device("rtl", program.config, memory), FunctionalDevice(program.config, trace=True)
    for device in pair:
        device.load(program)
    return pair


def _infer(job: tuple[Path, Path, str], codes: np.ndarray) -> Checked:
    """One image on golden operators, functional machine and RTL."""
    onnx, weft, memory = job
    rtl, functional = _devices(weft, memory)
    name = functional.program.inputs[0].name
    checked = run_checked(rtl, functional, {name: codes}, evaluate(_graph(onnx), {name: codes}))
    checked.layers = {}
    if checked.run.trace is not None:
        checked.run.trace.writes = {}  # compared; not worth sending
    return checked


def _integer(onnx: Path, images: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Heads of the integer definition, which `_infer` shows to be what the engine computes."""
    graph = _graph(onnx)
    results = (evaluate(graph, {graph.inputs[0]: codes}) for codes in images)
    return [{name: result[name] for name in HEADS} for result in results]
