"""The HTML report: one self-contained file made from a Result."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from weft.arch.isa import Unit
from weft.arch.registers import Stall
from weft.reports import plots
from weft.reports.schema import LayerRow, Result


def render(result: Result) -> str:
    """The report as HTML text. It loads nothing from anywhere."""
    environment = Environment(loader=PackageLoader("weft.reports"), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(count=_count, short=_short, percent=lambda share: f"{100 * share:.1f} %")
    timed = any(layer.cycles for layer in result.layers)
    return environment.get_template("report.html").render(
        result=result,
        timed=timed,
        timeline=plots.timeline(result.timeline, result.layers) if result.timeline else "",
        cycles_plot=plots.cycles_per_layer(result.layers) if timed else "",
        array_plot=plots.array_use(result.layers) if timed else "",
        slowest=max((layer.cycles for layer in result.layers), default=0),
        waits=[waits(layer) for layer in result.layers],
        units=unit_table(result),
        causes=[stall.name.lower() for stall in Stall],
    )


def waits(layer: LayerRow) -> dict[str, int]:
    """Cycles in which the layer's own unit did not work, by what happened instead."""
    names = {"load": "reading memory", "store": "writing memory", "nobody": "fetch, tokens"}
    most_first = sorted(layer.working.items(), key=lambda item: -item[1])
    return {names.get(unit, f"{unit} unit"): cycles for unit, cycles in most_first if unit != layer.unit and cycles}


def unit_table(result: Result) -> list[dict[str, Any]]:
    """Per unit: instructions, busy cycles, stall cycles by cause, from the engine's counters."""
    table = []
    for unit in (unit.name.lower() for unit in Unit):
        if f"{unit}_retired" not in result.counters:
            continue
        table.append({"name": unit, "retired": result.counters[f"{unit}_retired"],
                      "busy": result.counters.get(f"{unit}_busy", 0)}
                     | {stall.name.lower(): result.counters.get(f"{unit}_stall_{stall.name.lower()}", 0)
                        for stall in Stall})
    return table


def _count(value: int) -> str:
    """Thousands separated by thin spaces."""
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _short(value: float) -> str:
    """Three significant digits with a unit prefix."""
    for limit, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g} "
