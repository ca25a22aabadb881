"""The `weft` command: one thin function per verb, the work is in the modules beside this one.

Heavy modules (torch, the compiler, Amaranth) are imported where they are used, so that `weft --help` and
`weft doctor` are quick and work without them.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from weft import __version__
from weft.arch.config import load_config
from weft.arch.errors import MismatchError, ModelError, ToolError
from weft.sw.devices import DEFAULT_MEMORY
from weft.sw.terminal import Terminal, reported

EXIT_CODES = """
Exit codes: 0 ok, 2 model or argument error, 3 the machine or a tool, 4 results differ, 130 interrupted.
WEFT_DEBUG=1 shows the traceback of a failure; WEFT_CACHE names the folder of built simulators.
"""


class Commands(TyperGroup):
    """The one place where failures become messages."""

    def invoke(self, ctx: Any) -> Any:
        with reported():
            return super().invoke(ctx)


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
                  help="From a quantized PyTorch model to an FPGA engine, bit for bit.", epilog=EXIT_CODES,
                  context_settings={"help_option_names": ["-h", "--help"]})

# The same flags everywhere.
Model = Annotated[str, typer.Option("--model", "-m", help="Member of the zoo (see `weft models`) or a checkpoint.")]
Engine = Annotated[str, typer.Option("--engine", "-e", help="Engine preset, or a TOML file with its parameters.")]
DeviceName = Annotated[str, typer.Option("--device", "-d", help="functional (exact, no time) or rtl (cycle by cycle).")]
Memory = Annotated[str, typer.Option("--memory", help="Memory of the RTL: ideal, sdr, ddr3, ultra96, kv260, "
                                                      "nngen, fixed:LATENCY:BYTES, gate:LATENCY:OPEN:PERIOD.")]
Json = Annotated[str | None, typer.Option("--json", metavar="PATH", help="Write the result as JSON; - is stdout.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="File or folder to write.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No tables, no progress.")]
Context = Annotated[int | None, typer.Option("--context", help="Language models: positions a sequence may have; "
                                                               "default: the model's, at most 2048.")]
ModelFile = Annotated[Path, typer.Argument(metavar="FILE", help="QONNX file.")]


@app.callback(invoke_without_command=True)
def weft(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"weft {__version__}")
        raise typer.Exit


@app.command(epilog=EXIT_CODES)
def doctor(json: Json = None, quiet: Quiet = False) -> None:
    """Every needed tool: version found, range accepted, and the line that mends it."""
    from weft.sw.doctor import examine, healthy

    terminal, findings = Terminal(json, quiet), examine()
    terminal.table("", ["", "tool", "found", "accepted", "needed for", "mend it with"], [
        ("ok" if item.ok else "MISSING" if item.required else "absent", item.name, item.found or "-", item.accepted,
         item.needed_for, "" if item.ok else item.mend) for item in findings])
    terminal.result({"ok": healthy(findings), "findings": [asdict(item) for item in findings]})
    if not healthy(findings):
        names = ", ".join(item.name for item in findings if item.required and not item.ok)
        raise ToolError(f"missing or unfit: {names}; the table names the line that mends each")


@app.command(epilog=EXIT_CODES)
def models(json: Json = None, quiet: Quiet = False) -> None:
    """The detectors: parameters, multiply-accumulates, input, accuracy where known; and the language models."""
    from weft.models import zoo
    from weft.models.codenet import CoDeNet
    from weft.sw.language_models import language_rows

    terminal, rows = Terminal(json, quiet), []
    for name, entry in zoo.ENTRIES.items():
        layers, parameters, macs = CoDeNet(entry.config).fold().complexity()
        trained = entry.checkpoint is not None and entry.checkpoint.is_file()
        accuracy = entry.accuracy() if trained else {}
        rows.append({"name": name, "input": entry.config.size, "layers": layers, "parameters": parameters,
                     "macs": macs, "deform": entry.config.deform, "accuracy": accuracy, "origin": entry.origin,
                     "data": entry.data})
    columns = ["name", ">input", ">layers", ">parameters", ">GMAC", "deformable", "AP50 float / quantized, %"]
    terminal.table("", columns, [
        (row["name"], f"{row['input']}x{row['input']}", row["layers"], f"{row['parameters'] / 1e6:.2f} M",
         f"{row['macs'] / 1e9:.3f}", row["deform"],
         " / ".join(f"{100 * values['ap50']:.1f}" for values in row["accuracy"].values()) or "-") for row in rows])
    languages = language_rows()
    terminal.table("", ["name", ">width", ">layers", ">attention", ">heads", ">vocabulary", ">parameters"], [
        (row["name"], row["width"], row["layers"], row["attention"], f"{row['heads']}/{row['kv_heads']}", row["vocab"],
         f"{row['parameters'] / 1e6:.2f} M") for row in languages])
    terminal.result({"detectors": rows, "languages": languages})


@app.command(epilog=EXIT_CODES)
def train(model: Model = "codenet-nano", out: Out = None, epochs: Annotated[int | None, typer.Option(
        "--epochs", help="Float epochs; quantized fine-tuning takes a quarter as many (lfm2-nano: steps).")] = None,
          json: Json = None, seed: Seed = 0, quiet: Quiet = False) -> None:
    """Train a digit detector (float, then quantized) or lfm2-nano (float), and write the checkpoint."""
    from weft.models.train import train as run
    from weft.sw.language_models import NANO

    if model == NANO:
        return _train_language(Terminal(json, quiet), out or Path(f"build/{model}"), epochs, seed, quiet)
    terminal, path = Terminal(json, quiet), out or Path(f"build/{model}.safetensors")
    accuracy = run(model, path, epochs, seed, progress=not quiet)
    for name, values in accuracy.items():
        terminal.say(f"{name:10} AP50 {100 * values['ap50']:.2f} %")
    terminal.say(f"checkpoint {path}")
    terminal.result({"checkpoint": str(path), "accuracy": accuracy})


@app.command(epilog=EXIT_CODES)
def quantize(model: Model = "codenet-nano", out: Out = None, gptq: Annotated[bool, typer.Option(
        "--gptq", help="Language models: correct rounding errors, column by column.")] = False,
             calibration: Annotated[str | None, typer.Option(
                 "--calibration", help="Language models: a text to find scales with.")] = None,
             json: Json = None, quiet: Quiet = False) -> None:
    """Quantize a model into the file that `weft compile` reads: QONNX of a detector, .lm of a language model.

    A language model is lfm2-nano, or a Hugging Face folder with config.json, safetensors and tokenizer.json.
    """
    from weft.sw.language_models import is_language

    if is_language(model):
        return _quantize_language(Terminal(json, quiet), model, out, gptq, calibration)
    if gptq or calibration:
        raise ModelError("--gptq and --calibration are for language models; detectors are trained quantized")
    from weft.models.export import export_qonnx
    from weft.sw.models import load_model

    terminal, path = Terminal(json, quiet), out or Path(f"build/{Path(model).stem}.onnx")
    proto = export_qonnx(load_model(model), path)
    terminal.say(f"{path}: {len(proto.graph.node)} nodes, {path.stat().st_size} bytes")
    terminal.result({"path": str(path), "nodes": len(proto.graph.node)})


def _train_language(terminal: Terminal, folder: Path, steps: int | None, seed: int, quiet: bool) -> None:
    from weft.models.train_language import train_language
    from weft.sw.language_models import NANO

    result = train_language(NANO, folder, steps, seed, progress=not quiet)
    terminal.say(f"{folder}: perplexity {result['float']['perplexity']:.3f} per byte of held-out text")
    terminal.result({"checkpoint": str(folder), "accuracy": result})


def _quantize_language(terminal: Terminal, name: str, out: Path | None, gptq: bool, calibration: str | None) -> None:
    from weft.arch.program import write_atomically
    from weft.sw.language_models import SUFFIX, load_language

    path = out or Path(f"build/{Path(name).name}").with_suffix(SUFFIX)
    if path.suffix != SUFFIX:
        raise ModelError(f"{path}: a quantized language model ends in {SUFFIX}")
    terminal.say(f"quantize  {name}")
    loaded = load_language(name, gptq, calibration)
    loaded.model.save(path)
    if loaded.tokenizer is not None:
        write_atomically(path.with_suffix(".tokenizer.json"), loaded.tokenizer.to_str(pretty=True) + "\n")
    terminal.say(f"{path}: {path.stat().st_size} bytes")
    terminal.result({"path": str(path), "bytes": path.stat().st_size, "blocks": len(loaded.model.blocks)})


def _print_verdicts(terminal: Terminal, judged: list) -> None:
    terminal.table("", ["node", "operation", "verdict", "why", "instead"],
                   [(item.node, item.operation, item.place.value, item.detail, item.rewrite) for item in judged])


@app.command(epilog=EXIT_CODES)
def check(file: ModelFile, json: Json = None, quiet: Quiet = False) -> None:
    """Say of every node whether it runs on the engine, is folded away, runs on the host, or cannot run and why."""
    from weft.sw.compile import judge, possible, tally

    terminal, judged = Terminal(json, quiet), judge(file)
    _print_verdicts(terminal, judged)
    terminal.say(", ".join(f"{count} {place}" for place, count in tally(judged).items()))
    terminal.result([asdict(item) | {"place": item.place.value} for item in judged])
    if not possible(judged):
        raise ModelError(f"{file}: {tally(judged)['impossible']} nodes cannot run on the engine; the table says why")


@app.command("compile", epilog=EXIT_CODES)
def compile_(file: Annotated[Path, typer.Argument(metavar="FILE", help="QONNX file, or .lm of `weft quantize`.")],
             engine: Engine = "base", out: Out = None, context: Context = None, json: Json = None,
             quiet: Quiet = False) -> None:
    """Compile a model into one Program for an engine; of a QONNX file, with the verdict on every node."""
    from weft.sw.compile import compile_file, judge, tally
    from weft.sw.language_models import SUFFIX

    terminal, config, path = Terminal(json, quiet), load_config(engine), out or file.with_suffix(".weft")
    if file.suffix == SUFFIX:
        return _compile_language(terminal, file, config, path, context)
    if context is not None:
        raise ModelError("--context is for language models; a detector has none")
    judged = judge(file)
    _print_verdicts(terminal, judged)
    _, program = compile_file(file, config)
    program.save(path)
    terminal.say(f"{', '.join(f'{count} {place}' for place, count in tally(judged).items())}\n"
                 f"{path}: {len(program.instructions)} instructions, {program.constants.nbytes} bytes of constants, "
                 f"engine '{config.name}' {config.fingerprint}")
    terminal.result({"path": str(path), "engine": config.name, "fingerprint": config.fingerprint,
                     "instructions": len(program.instructions), "constant_bytes": int(program.constants.nbytes),
                     "segment_bytes": [int(size) for size in program.segment_bytes], "verdicts": tally(judged)})


def _compile_language(terminal: Terminal, file: Path, config: Any, path: Path, context: int | None) -> None:
    from weft.arch.language import LanguageModel
    from weft.compiler.language import compile_language

    model = LanguageModel.load(file)
    with terminal.progress("compile", len(model.blocks) + 2, "blocks") as done:
        program = compile_language(model, config, context, lambda part, _: done(part))
    program.save(path)
    layout = program.language
    assert layout is not None
    terminal.say(f"{path}: {len(program.instructions)} instructions, {program.constants.nbytes} bytes of constants, "
                 f"context {layout.context}, {layout.sequence_bytes} bytes for each sequence, engine '{config.name}' "
                 f"{config.fingerprint}")
    terminal.result({"path": str(path), "engine": config.name, "fingerprint": config.fingerprint,
                     "instructions": len(program.instructions), "constant_bytes": int(program.constants.nbytes),
                     "context": layout.context, "sequence_bytes": layout.sequence_bytes})


@app.command(epilog=EXIT_CODES)
def generate(model: Annotated[str, typer.Option("--model", "-m", help="lfm2-nano, a Hugging Face folder, or a file "
                                                                      "of `weft quantize`.")] = "lfm2-nano",
             prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to go on from.")] = "The ",
             tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Tokens at most.")] = 64,
             device: DeviceName = "functional", engine: Engine = "base", memory: Memory = DEFAULT_MEMORY,
             context: Context = None, temperature: Annotated[float, typer.Option(
                 "--temperature", min=0.0, help="0: the engine's own choice; above: drawn on the host.")] = 0.0,
             top: Annotated[int, typer.Option("--top-k", min=0, help="Draw from so many; 0: from all.")] = 0,
             chunk: Annotated[int, typer.Option("--chunk", min=0, help="Prompt tokens per run; 0: all.")] = 0,
             json: Json = None, seed: Seed = 0, quiet: Quiet = False) -> None:
    """Continue a text on a Device; everything computed is compared with the golden model, token by token."""
    from weft.sw.generate import generate_text

    terminal = Terminal(json, quiet)
    result = generate_text(terminal, model, prompt, tokens, device, load_config(engine), memory, context, temperature,
                           top, chunk, seed)
    terminal.result(result)
    _require_equal(result["mismatches"], result["first_difference"])


@app.command(epilog=EXIT_CODES)
def simulate(program: Annotated[Path, typer.Argument(metavar="PROGRAM", help="Program from `weft compile`.")],
             device: DeviceName = "rtl", engine: Annotated[str | None, typer.Option(
                 "--engine", "-e", help="Refuse a Program that is not for this engine.")] = None,
             memory: Memory = DEFAULT_MEMORY, images: Annotated[str, typer.Option(
                 "--images", help="Image file, folder, digits or random.")] = "random",
             count: Annotated[int, typer.Option("--count", "-n", help="Images at most.")] = 1,
             waves: Annotated[Path | None, typer.Option("--waves", help="Write a VCD file (rtl, last image).")] = None,
             out: Out = None, json: Json = None, seed: Seed = 0, quiet: Quiet = False) -> None:
    """Run a Program on images; what the RTL writes is compared with the functional machine, write by write."""
    from weft.sw.simulate import simulate_file

    terminal = Terminal(json, quiet)
    config = load_config(engine) if engine else None
    result = simulate_file(terminal, program, config, device, memory, images, count, seed, waves, out)
    terminal.result(asdict(result))
    _require_equal(result.mismatches, result.first_difference)


bench = typer.Typer(help="Measure cycles on whole networks and on single operators.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command("codenet", epilog=EXIT_CODES)
def bench_codenet(config: Annotated[str, typer.Option("--config", "-c", help="Member: a, b, c, d, e or nano.")] = "a",
                  device: DeviceName = "rtl", engine: Engine = "base", memory: Memory = DEFAULT_MEMORY,
                  out: Out = None, json: Json = None, seed: Seed = 0, quiet: Quiet = False) -> None:
    """One image through a network of the published table, random weights, every layer compared."""
    from weft.sw.bench import bench_codenet as run

    terminal = Terminal(json, quiet)
    result = run(terminal, config, load_config(engine), device, memory, out or Path("build/bench"), seed)
    _print_run(terminal, result)
    terminal.result(asdict(result))
    _require_equal(result.mismatches, result.first_difference)


@bench.command("deformable", epilog=EXIT_CODES)
def bench_deformable(device: DeviceName = "rtl", engine: Engine = "base", memory: Memory = DEFAULT_MEMORY,
                     json: Json = None, seed: Seed = 0, quiet: Quiet = False) -> None:
    """Deformable convolution in all variants against the plain one, 64 x 64, 256 channels."""
    from weft.sw.bench import bench_deformable as run

    terminal = Terminal(json, quiet)
    result = run(terminal, load_config(engine), device, memory, seed)
    terminal.table("", ["variant", ">cycles", ">of plain", ">whole run", ">MACs", ">differ"], [
        (name, f"{row['cycles']:,}", f"{row['ratio_to_plain']:.3f}", f"{row['run_cycles']:,}", f"{row['macs']:,}",
         row["mismatches"]) for name, row in result["variants"].items()])
    terminal.result(result)
    _require_equal(result["mismatches"], next((row["first_difference"] for row in result["variants"].values()
                                               if row["mismatches"]), ""))


@bench.command("llm", epilog=EXIT_CODES)
def bench_llm(model: Annotated[str, typer.Option("--model", "-m", help="lfm2-350m, -700m, -1.2b or -2.6b (random "
                                                                       "weights), lfm2-nano, or an .lm file.")]
              = "lfm2-nano",
              phase: Annotated[str, typer.Option("--phase", help="decode: one token; prefill: a prompt.")] = "decode",
              tokens: Annotated[int, typer.Option("--tokens", "-n", help="prefill: tokens of the prompt.")] = 128,
              context: Annotated[int, typer.Option("--context", help="decode: tokens before.")] = 256,
              device: DeviceName = "rtl", engine: Engine = "base", memory: Memory = DEFAULT_MEMORY,
              json: Json = None, seed: Seed = 0, quiet: Quiet = False) -> None:
    """A language model's cycles, bytes and use of port and array, every layer and every write compared."""
    from weft.sw.bench_language import bench_language as run

    terminal = Terminal(json, quiet)
    result = run(terminal, model, load_config(engine), phase, device, memory, tokens, context, seed)
    names = ("cycles", "bytes", "bandwidth_utilization", "array_efficiency", "tokens_per_s", "mismatches",
             "layers_compared", "writes_compared", "wall_s", "simulated_cycles_per_s")
    terminal.table("", ["figure", ">value"], [(name, f"{result[name]:,}") for name in names])
    terminal.result(result)
    _require_equal(result["mismatches"], result["first_difference"])


@app.command(epilog=EXIT_CODES)
def report(file: Annotated[Path, typer.Argument(
        metavar="RESULT", help="JSON from `simulate`, `bench codenet` or `demo`.")],
           out: Out = None, quiet: Quiet = False) -> None:
    """A self-contained HTML page from a result record."""
    from weft.arch.program import write_atomically
    from weft.reports.html import render
    from weft.reports.schema import load

    path = out or file.with_suffix(".html")
    write_atomically(path, render(load(file)))
    Terminal(quiet=quiet).say(f"{path}")


@app.command(epilog=EXIT_CODES)
def demo(model: Model = "codenet-nano", engine: Engine = "base", memory: Memory = DEFAULT_MEMORY,
         out: Out = None,
         images: Annotated[int, typer.Option("--images", "-n", min=1, help="Test images on the RTL.")] = 16,
         test_images: Annotated[int, typer.Option("--test-images", min=1, help="Test images for accuracy.")] = 500,
         json: Json = None, quiet: Quiet = False) -> None:
    """Find digits and write text with the engine's RTL, compare every layer, measure accuracy, write a report."""
    from weft.sw.demo import demo as run

    terminal, config = Terminal(json, quiet), load_config(engine)
    terminal.result(run(terminal, config, out or Path("build/demo"), model, memory, images, test_images))


def _print_run(terminal: Terminal, result: Any) -> None:
    if result.cycles:
        terminal.table("", ["layer", "operation", ">MACs", ">cycles", ">array use", ">read", ">written"], [
            (row.name, row.operation, f"{row.macs:,}", f"{row.cycles:,}", f"{100 * row.array_use:.1f} %",
             f"{row.bytes_read:,}", f"{row.bytes_written:,}") for row in result.layers])
    terminal.say(f"{result.model} on {result.device}: {result.cycles:,} cycles per image "
                 f"({result.fps_at_250mhz} images/s at 250 MHz), {100 * result.efficiency:.1f} % of the array, "
                 f"{result.simulated_cycles_per_s:,} simulated cycles/s\n"
                 f"{result.layers_compared} layer outputs of {result.images} images compared, "
                 f"{result.mismatches} differ")


def _require_equal(mismatches: int, first: str) -> None:
    if mismatches:
        raise MismatchError(f"{mismatches} layer outputs differ; the first: {first}")


def main() -> None:
    """Entry point of the `weft` script."""
    warnings.filterwarnings("ignore", module="brevitas")  # of optional kernels that it does not find
    with reported():
        app()
