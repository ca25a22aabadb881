"""Figures of a report, each as a data URI."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("agg")  # no display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from weft.arch.isa import Unit
from weft.reports.schema import UNIT_ORDER, LayerRow, Phase, Span

UNITS = [unit.name.lower() for unit in Unit]
UNIT_COLOURS = {"load": "#4c8dae", "store": "#8a6fb0", "matrix": "#d1495b", "vector": "#edae49", "row": "#5aa469",
                "nobody": "#c9ced6"}
INK = "#3b4252"
STYLE = {
    "font.family": "sans-serif", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#8b93a1", "axes.labelcolor": "#3b4252", "xtick.color": "#5b6475", "ytick.color": "#3b4252",
    "svg.fonttype": "none", "svg.hashsalt": "weft",
}  # fmt: skip


def data_uri(figure: Figure, kind: str = "svg") -> str:
    """The figure as data URI; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, dpi=170, bbox_inches="tight", transparent=True, metadata=metadata)
    plt.close(figure)
    mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def timeline(spans: Sequence[Span], layers: Sequence[LayerRow]) -> str:
    """What each unit did when, coloured by layer."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(11, 2.4))
        colours = plt.get_cmap("turbo")
        count = max(1, len(layers) - 1)
        units = [unit for unit in reversed(UNITS) if any(span.unit == unit for span in spans)]
        for row, unit in enumerate(units):
            mine = [span for span in spans if span.unit == unit]
            axes.broken_barh([(span.start / 1000, (span.end - span.start) / 1000) for span in mine], (row - 0.4, 0.8),
                             facecolors=[colours(0.06 + 0.88 * span.layer / count) for span in mine], linewidth=0)
        axes.set_yticks(range(len(units)), units)
        axes.set_xlabel("thousand cycles")
        axes.margins(x=0.005)
        return data_uri(figure, "png")  # thousands of bars: smaller as pixels


def cycles_per_layer(layers: Sequence[LayerRow], names: bool = False) -> str:
    """Cycles of each layer, split by the unit that works; with `names` these stand below the bars, not numbers."""
    with plt.rc_context(STYLE):
        figure, axes = _layer_axes(layers)
        top = [0.0] * len(layers)
        for unit in (*UNIT_ORDER, "nobody"):
            heights = [layer.working.get(unit, 0) / 1000 for layer in layers]
            if not any(heights):
                continue
            axes.bar(range(len(layers)), heights, 0.85, bottom=top, color=UNIT_COLOURS[unit],
                     label="none" if unit == "nobody" else unit)
            top = [below + height for below, height in zip(top, heights, strict=True)]
        if names:
            axes.set_xlabel("")
            axes.set_xticks(range(len(layers)), [layer.name for layer in layers], rotation=60, ha="right",
                            rotation_mode="anchor", fontsize=7)
        axes.set_ylabel("thousand cycles")
        axes.legend(ncols=6, frameon=False, loc="lower right", bbox_to_anchor=(1, 1),
                    title="working unit, in this order")
        return data_uri(figure)


def array_use(layers: Sequence[LayerRow]) -> str:
    """Share of the matrix unit's slots that did useful work, layer by layer."""
    with plt.rc_context(STYLE):
        figure, axes = _layer_axes(layers)
        axes.bar(range(len(layers)), [100 * layer.array_use for layer in layers], 0.85, color=UNIT_COLOURS["matrix"])
        axes.set_ylim(0, 100)
        axes.set_ylabel("% of matrix slots")
        axes.grid(axis="y", color="#e3e6eb", linewidth=0.6)
        axes.set_axisbelow(True)
        return data_uri(figure)


def losses(steps: Mapping[str, float]) -> str:
    """What each part of quantization adds to the perplexity, relative to that of the float model."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 0.3 * len(steps) + 0.7))
        values = [100 * loss for loss in reversed(list(steps.values()))]
        bars = axes.barh(list(reversed(steps)), values, 0.7, color=UNIT_COLOURS["load"])
        axes.bar_label(bars, [f"{value:+.2f} %" for value in values], padding=4, color=INK)
        axes.axvline(0, color="#8b93a1", linewidth=0.8)
        axes.margins(x=0.18)
        axes.set_xlabel("added to the float model's perplexity, %")
        return data_uri(figure)


def token_time(phases: Mapping[str, Phase], clock_hz: float) -> str:
    """Time per token: that of its bytes at the port's rate, that of its products on a full array, and the simulated."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 1.1 * len(phases) + 0.6))
        places, names = [], []
        for number, (name, phase) in enumerate(phases.items()):
            moved = phase.bytes_per_token * phase.tokens
            cycles = {
                f"{name}: its bytes at the port's rate": (moved / phase.port_bytes_per_cycle, UNIT_COLOURS["load"]),
                f"{name}: its products, array full": (phase.array_efficiency * phase.cycles, UNIT_COLOURS["matrix"]),
                f"{name}: simulated": (phase.cycles, INK),
            }
            for row, (label, (count, colour)) in enumerate(cycles.items()):
                place = -(4 * number + row)
                time = 1e6 * count / phase.tokens / clock_hz
                text = f"{time:,.0f}" if time >= 100 else f"{time:.3g}"
                axes.bar_label(axes.barh([place], [time], 0.8, color=colour), [text], padding=4, color=INK)
                places.append(place)
                names.append(label)
        axes.set_yticks(places, names)
        axes.margins(x=0.1)
        axes.set_xlabel(f"microseconds per token at {clock_hz / 1e6:g} MHz")
        return data_uri(figure)


def _layer_axes(layers: Sequence[LayerRow]) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(11, 2.6))
    axes.set_xlim(-0.7, len(layers) - 0.3)
    axes.set_xlabel("layer number")
    return figure, axes
