"""The reference refuses inputs that are not codes of the graph's inputs."""

from __future__ import annotations

import numpy as np
import pytest

from tests.compiler.qonnx_models import two_layers
from weft.arch.errors import ModelError
from weft.compiler.frontend import load_graph
from weft.sw.reference import evaluate


@pytest.mark.parametrize("image", [np.zeros((6, 7, 3), np.int8), np.zeros((6, 7, 4), np.float32),
                                   np.full((6, 7, 4), 128), np.full((6, 7, 4), -129), None])
def test_illegal_inputs(image, tmp_path):
    graph = load_graph(two_layers().save(tmp_path, "result"))
    with pytest.raises(ModelError, match="input 'image'"):
        evaluate(graph, {} if image is None else {"image": image})


def test_results_are_int16_of_the_tensors_shape(tmp_path):
    graph = load_graph(two_layers().save(tmp_path, "result"))
    codes = evaluate(graph, {"image": np.zeros((6, 7, 4), np.int8)})
    assert {name: code.shape for name, code in codes.items()} == {name: t.shape for name, t in graph.tensors.items()}
    assert {code.dtype for code in codes.values()} == {np.dtype(np.int16)}
