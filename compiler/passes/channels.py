"""Chains of splits, concatenations and shuffles become single gathers from the tensors that are really computed."""

from __future__ import annotations

from dataclasses import replace

from weft.compiler.graph import Channels, Graph, Op

Origin = tuple[str, int]  # a computed tensor and one of its channels


def collapse_channels(graph: Graph) -> Graph:
    """Every Channels reads results of other operators or inputs only; those that move nothing are bypassed.

    An operator that reads a bypassed Channels reads its origin instead; a graph output keeps its name, so its
    Channels stays. Operators that became useless are left to `remove_dead`.
    """
    origins: dict[str, list[Origin]] = {}  # Channels output -> where each of its channels comes from
    alias: dict[str, str] = {}
    ops: list[Op] = []
    for op in graph.ops:
        if not isinstance(op, Channels):
            ops.append(replace(op, inputs=tuple(alias.get(name, name) for name in op.inputs)))
            continue
        origin = origins[op.output] = [
            origins[op.inputs[s]][i] if op.inputs[s] in origins else (op.inputs[s], i)
            for s, i in zip(op.source, op.index, strict=True)
        ]
        first = origin[0][0]
        if origin == [(first, i) for i in range(graph.tensors[first].channels)] and op.output not in graph.outputs:
            alias[op.output] = first
        names = tuple(dict.fromkeys(name for name, _ in origin))
        ops.append(Channels(op.name, names, op.output, tuple(names.index(name) for name, _ in origin),
                            tuple(i for _, i in origin)))
    return Graph(graph.name, dict(graph.tensors), ops, list(graph.inputs), list(graph.outputs))
