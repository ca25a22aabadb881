"""Operators and tensors that no output depends on disappear."""

from __future__ import annotations

from weft.compiler.graph import Graph, Op


def remove_dead(graph: Graph) -> Graph:
    """The graph without what does not reach an output. Inputs stay: they are the model's interface."""
    needed = set(graph.outputs)
    kept: list[Op] = []
    for op in reversed(graph.ops):
        if op.output in needed:
            kept.append(op)
            needed.update(op.inputs)
    needed.update(graph.inputs)
    tensors = {name: tensor for name, tensor in graph.tensors.items() if name in needed}
    return Graph(graph.name, tensors, kept[::-1], list(graph.inputs), list(graph.outputs))
