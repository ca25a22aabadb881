"""From a user's QONNX file to a verdict on every node, and to a Program."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from weft.arch.config import EngineConfig
from weft.arch.program import Program
from weft.compiler.frontend import load_graph
from weft.compiler.graph import Graph
from weft.compiler.import_qonnx import verdicts
from weft.compiler.onnx_model import load_model
from weft.compiler.pipeline import compile_graph
from weft.compiler.verdict import Place, Verdict


def judge(path: str | Path) -> list[Verdict]:
    """The verdict on every node of a QONNX file. Raises ModelError for a file that is none."""
    return verdicts(load_model(path))


def possible(judged: list[Verdict]) -> bool:
    return all(verdict.place is not Place.IMPOSSIBLE for verdict in judged)


def tally(judged: list[Verdict]) -> dict[str, int]:
    """Number of nodes by verdict, every verdict present."""
    counts = Counter(verdict.place for verdict in judged)
    return {place.value: counts[place] for place in Place}


def compile_file(path: str | Path, config: EngineConfig) -> tuple[Graph, Program]:
    """The Graph of a QONNX file and its Program for an engine. Raises ModelError."""
    graph = load_graph(path)
    return graph, compile_graph(graph, config)
