"""The HTML report: one self-contained file made from result records."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from weft.arch.isa import Unit
from weft.arch.registers import Stall
from weft.reports import plots
from weft.reports.schema import LADDER, UNIT_ORDER, LanguageResult, LayerRow, Phase, Result

BLOCK = re.compile(r"(\d+)\.(\w+)\.(.+)")  # of a layer in a language model: block, part of it, operation
PARTS = {"mixer": "mixer", "feed_forward": "feed-forward"}
UNPRINTABLE = re.compile(r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(result: Result | LanguageResult, language: LanguageResult | None = None) -> str:
    """The report on one record, or on a detector and a language model, as HTML text. It loads nothing from anywhere."""
    detector = result if isinstance(result, Result) else None
    language = result if isinstance(result, LanguageResult) else language
    environment = Environment(loader=PackageLoader("weft.reports"), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(count=_count, short=_short, percent=lambda share: f"{100 * share:.1f} %", rate=_rate,
                               visible=visible)
    common = {"order": UNIT_ORDER, "causes": [stall.name.lower() for stall in Stall]}
    parts = []
    if detector is not None:
        parts.append(environment.get_template("detector.html").render(common | _detector(detector)))
    if language is not None:
        parts.append(environment.get_template("language.html").render(common | _language(language)))
    return environment.get_template("report.html").render(
        title=result.title, version=result.version, colours=plots.UNIT_COLOURS, parts=[Markup(part) for part in parts])


def _detector(result: Result) -> dict[str, Any]:
    timed = any(layer.cycles for layer in result.layers)
    return {
        "result": result, "timed": timed,
        "timeline": plots.timeline(result.timeline, result.layers) if result.timeline else "",
        "cycles_plot": plots.cycles_per_layer(result.layers) if timed else "",
        "array_plot": plots.array_use(result.layers) if timed else "",
        "slowest": max((layer.cycles for layer in result.layers), default=0),
        "waits": [waits(layer) for layer in result.layers], "units": unit_table(result.counters),
    }


def _language(result: LanguageResult) -> dict[str, Any]:
    phases = {name: phase for name, phase in (("prefill", result.prefill), ("decode", result.decode))
              if phase is not None and phase.cycles}
    return {
        "result": result, "steps": ladder(result.perplexity), "array_macs": _array_macs(result.engine),
        "losses_plot": plots.losses(dict(losses(result.perplexity))) if len(result.perplexity) > 1 else "",
        "time_plot": plots.token_time(phases, result.clock_hz) if phases else "",
        "phases": [_phase(name, phase) for name, phase in phases.items()],
    }


def _phase(name: str, phase: Phase) -> dict[str, Any]:
    timed = [layer for layer in phase.layers if layer.cycles]
    operations = sorted(grouped(timed, operation_of), key=lambda row: (-row.cycles, row.name))
    return {
        "name": name, "phase": phase, "units": unit_table(phase.counters), "operations": operations,
        "cycles_plot": plots.cycles_per_layer(grouped(timed, part_of), names=True) if timed else "",
        "slowest": max((row.cycles for row in operations), default=0), "waits": [waits(row) for row in operations],
    }


def waits(layer: LayerRow) -> dict[str, int]:
    """Cycles in which the layer's own unit did not work, by what happened instead."""
    names = {"load": "reading memory", "store": "writing memory", "nobody": "fetch, tokens"}
    most_first = sorted(layer.working.items(), key=lambda item: -item[1])
    return {names.get(unit, f"{unit} unit"): cycles for unit, cycles in most_first if unit != layer.unit and cycles}


def unit_table(counters: dict[str, int]) -> list[dict[str, Any]]:
    """Per unit that did anything: instructions, busy cycles, stall cycles by cause, from the engine's counters."""
    table = []
    for unit in (unit.name.lower() for unit in Unit):
        if not counters.get(f"{unit}_retired"):
            continue
        table.append({"name": unit, "retired": counters[f"{unit}_retired"], "busy": counters.get(f"{unit}_busy", 0)}
                     | {stall.name.lower(): counters.get(f"{unit}_stall_{stall.name.lower()}", 0) for stall in Stall})
    return table


# --- language models ------------------------------------------------------------------------------------------------


def part_of(name: str) -> str:
    """The part of a language model that a layer belongs to: "3 mixer", "3 feed-forward", or its own name."""
    found = BLOCK.fullmatch(name)
    return f"{found[1]} {PARTS.get(found[2], found[2])}" if found else name.split(".")[0]


def operation_of(name: str) -> str:
    """What a layer does, whichever block of the model it stands in."""
    found = BLOCK.fullmatch(name)
    return f"{PARTS.get(found[2], found[2])} {found[3]}" if found else name


def grouped(layers: Iterable[LayerRow], key: Callable[[str], str]) -> list[LayerRow]:
    """Layers whose names have the same key as one, in the order of the first of each: sums, and array use weighted."""
    groups: dict[str, list[LayerRow]] = {}
    for layer in layers:
        groups.setdefault(key(layer.name), []).append(layer)
    rows = []
    for number, (name, members) in enumerate(groups.items()):
        working: Counter[str] = Counter()
        for member in members:
            working.update(member.working)
        cycles = sum(member.cycles for member in members)
        rows.append(replace(
            members[0], number=number, name=name, macs=sum(member.macs for member in members),
            bytes_read=sum(member.bytes_read for member in members),
            bytes_written=sum(member.bytes_written for member in members), cycles=cycles, working=dict(working),
            array_use=sum(member.array_use * member.cycles for member in members) / cycles if cycles else 0.0))
    return rows


def losses(perplexity: dict[str, float]) -> list[tuple[str, float]]:
    """How much each step adds to the perplexity of the one before it, relative to that of the first."""
    steps = list(perplexity.items())
    return [(LADDER.get(name, name), (after - before) / steps[0][1]) for (_, before), (name, after) in pairwise(steps)]


def ladder(perplexity: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of the table: what is added, the perplexity with it, its own loss."""
    added = [None, *(loss for _, loss in losses(perplexity))]
    return [{"name": LADDER.get(name, name), "perplexity": value, "loss": loss}
            for (name, value), loss in zip(perplexity.items(), added, strict=False)]


def visible(text: str) -> str:
    """`text` with a sign in the place of every character that a page cannot show."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def _array_macs(engine: dict[str, Any]) -> int:
    product = 1
    for name in ("rows", "columns", "pixels"):
        product *= engine.get(name, 1)
    return product


def _count(value: int) -> str:
    """Thousands separated by thin spaces."""
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _rate(value: float) -> str:
    """Three significant digits, more where they stand before the point."""
    return _count(round(value)) if value >= 100 else f"{value:.3g}"


def _short(value: float) -> str:
    """Three significant digits with a unit prefix."""
    for limit, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g} "
