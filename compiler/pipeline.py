"""The compiler in one screen: Graph in, verified Program out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from weft.arch.config import EngineConfig
from weft.arch.program import OutputTensor, Program
from weft.compiler.constants import constant_words, words_per_tile
from weft.compiler.emit import Emitter
from weft.compiler.graph import Graph
from weft.compiler.lower import Lowered, MatrixTask, lower
from weft.compiler.memory_plan import MemoryPlan, chunked, plan_memory
from weft.compiler.spec import check
from weft.compiler.verify import verify


def compile_graph(graph: Graph, config: EngineConfig) -> Program:
    """One Program for one engine; the same bytes for the same arguments. Raises ModelError when it cannot be."""
    check(graph)
    lowered = lower(graph, config)  # operators -> tasks, channels -> lanes
    tile_words = {task: words_per_tile(task, config) for task in lowered.tasks if isinstance(task, MatrixTask)}
    lowered = chunked(lowered, config, tile_words)  # large tasks -> pieces that fit
    plan = plan_memory(lowered, config, {task: constant_words(task, config) for task in lowered.tasks})
    emitter = Emitter(lowered, plan, config)  # strips -> instructions and tokens
    emitter.run()
    program = _program(graph, config, lowered, plan, emitter)
    verify(program)
    return program


def _program(graph: Graph, config: EngineConfig, lowered: Lowered, plan: MemoryPlan, emitter: Emitter) -> Program:
    assembler = emitter.assembler
    encoded = b"".join(instruction.encode() for instruction in assembler.instructions)
    outputs = []
    for name, (buffer, lanes_of) in lowered.outputs.items():
        tensor = graph.tensors[name]
        outputs.append(
            OutputTensor(
                name,
                plan.memory[buffer][1],
                tensor.height,
                tensor.width,
                config.lanes,
                lanes_of,
                tensor.unsigned,
                tensor.scale,
            )
        )
    image = lowered.image
    assert image is not None and image.image is not None
    inputs = (replace(image.image, name=graph.inputs[0]),)
    return Program(
        config=config,
        fingerprint=config.fingerprint,
        model=graph.name,
        instructions=np.frombuffer(encoded, np.uint8).reshape(len(assembler.instructions), -1),
        constants=np.frombuffer(bytes(emitter.constants), np.uint8),
        first_row=np.array(assembler.rows, np.int32),
        first_part=np.array(assembler.parts, np.int32),
        segment_bytes=(len(emitter.constants), plan.arena_bytes, inputs[0].size, plan.output_bytes),
        inputs=inputs,
        outputs=tuple(outputs),
        layers=tuple(lowered.layers),
    )
