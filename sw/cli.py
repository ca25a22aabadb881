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
    """The model zoo: parameters, multiply-accumulates, input, accuracy where known."""
    from weft.models import zoo
    from weft.models.codenet import CoDeNet

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
    terminal.result(rows)


@app.command(epilog=EXIT_CODES)
def train(model: Model = "codenet-nano", out: Out = None, epochs: Annotated[int | None, typer.Option(
        "--epochs", help="Float epochs; quantized fine-tuning takes a quarter as many.")] = None,
          json: Json = None, seed: Seed = 0, quiet: Quiet = False) -> None:
    """Train a digit detector, float then quantized, and write its checkpoint."""
    from weft.models.train import train as run

    terminal, path = Terminal(json, quiet), out or Path(f"build/{model}.safetensors")
    accuracy = run(model, path, epochs, seed, progress=not quiet)
    for name, values in accuracy.items():
        terminal.say(f"{name:10} AP50 {100 * values['ap50']:.2f} %")
    terminal.say(f"checkpoint {path}")
    terminal.result({"checkpoint": str(path), "accuracy": accuracy})


@app.command(epilog=EXIT_CODES)
def quantize(model: Model = "codenet-nano", out: Out = None, json: Json = None, quiet: Quiet = False) -> None:
    """Export a quantized model as QONNX, the file that `weft compile` reads."""
    from weft.models.export import export_qonnx
    from weft.sw.models import load_model

    terminal, path = Terminal(json, quiet), out or Path(f"build/{Path(model).stem}.onnx")
    proto = export_qonnx(load_model(model), path)
    terminal.say(f"{path}: {len(proto.graph.node)} nodes, {path.stat().st_size} bytes")
    terminal.result({"path": str(path), "nodes": len(proto.graph.node)})


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
def compile_(file: ModelFile, engine: Engine = "base", out: Out = None, json: Json = None,
             quiet: Quiet = False) -> None:
    """Compile a QONNX file into one Program for an engine, with the verdict on every node."""
    from weft.sw.compile import compile_file, judge, tally

    terminal, config, path = Terminal(json, quiet), load_config(engine), out or file.with_suffix(".weft")
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
    """Find digits with the engine's RTL, compare every layer, measure accuracy, write a report."""
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
