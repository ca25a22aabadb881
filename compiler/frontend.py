"""The front end in processing order: a model file to the Graph that the back end places and schedules."""

from __future__ import annotations

from pathlib import Path

from weft.arch.errors import ModelError
from weft.compiler.graph import Graph
from weft.compiler.import_qonnx import import_qonnx
from weft.compiler.passes.channels import collapse_channels
from weft.compiler.passes.dead import remove_dead
from weft.compiler.spec import Stage, check

PASSES = (  # each with what its result promises
    (collapse_channels, Stage.COLLAPSED),
    (remove_dead, Stage.LIVE),
)


def load_graph(path: str | Path) -> Graph:
    """The optimized, checked Graph of a QONNX file. Raises ModelError for one that the engine cannot run."""
    graph = import_qonnx(path)
    try:
        check(graph, Stage.IMPORTED)
        for rewrite, stage in PASSES:
            graph = rewrite(graph)
            check(graph, stage)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    return graph
