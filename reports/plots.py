"""Figures of a report, each as a data URI."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import matplotlib

matplotlib.use("agg")  # no display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from weft.arch.isa import Unit
from weft.reports.schema import LayerRow, Span

UNITS = [unit.name.lower() for unit in Unit]
UNIT_COLOURS = {"load": "#4c8dae", "store": "#8a6fb0", "matrix": "#d1495b", "vector": "#edae49", "nobody": "#c9ced6"}
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
        for row, unit in enumerate(reversed(UNITS)):
            mine = [span for span in spans if span.unit == unit]
            axes.broken_barh([(span.start / 1000, (span.end - span.start) / 1000) for span in mine], (row - 0.4, 0.8),
                             facecolors=[colours(0.06 + 0.88 * span.layer / count) for span in mine], linewidth=0)
        axes.set_yticks(range(len(UNITS)), list(reversed(UNITS)))
        axes.set_xlabel("thousand cycles")
        axes.margins(x=0.005)
        return data_uri(figure, "png")  # thousands of bars: smaller as pixels


def cycles_per_layer(layers: Sequence[LayerRow]) -> str:
    """Cycles of each layer, split by the unit that works."""
    with plt.rc_context(STYLE):
        figure, axes = _layer_axes(layers)
        top = [0.0] * len(layers)
        for unit in (*(u for u in ("matrix", "vector", "load", "store") if u in UNITS), "nobody"):
            heights = [layer.working.get(unit, 0) / 1000 for layer in layers]
            axes.bar(range(len(layers)), heights, 0.85, bottom=top, color=UNIT_COLOURS[unit],
                     label="none" if unit == "nobody" else unit)
            top = [below + height for below, height in zip(top, heights, strict=True)]
        axes.set_ylabel("thousand cycles")
        axes.legend(ncols=5, frameon=False, loc="upper right", title="working unit, in this order")
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


def _layer_axes(layers: Sequence[LayerRow]) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(11, 2.6))
    axes.set_xlim(-0.7, len(layers) - 0.3)
    axes.set_xlabel("layer number")
    return figure, axes
