"""The benchmark graphs, in small, on the functional machine."""

import numpy as np
import pytest

from weft.compiler.pipeline import compile_graph
from weft.sim.functional import FunctionalDevice
from weft.sw.bench import VARIANTS, bench_deformable, deformable_graph
from weft.sw.reference import evaluate
from weft.sw.simulate import run_checked
from weft.sw.terminal import Terminal

SMALL = {"side": 8, "channels": 32}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("depthwise", [True, False])
def test_every_variant_compiles_and_agrees(variant, depthwise, config, image):
    graph = deformable_graph(variant, depthwise, **SMALL)
    program = compile_graph(graph, config)
    device = FunctionalDevice(config, trace=True)
    device.load(program)
    golden = evaluate(graph, {"image": image})
    assert run_checked(device, device, {"image": image}, golden).mismatches == 0
    assert golden["y"].std() > 1  # a result, not a constant
    if "offsets" in golden:
        assert len(np.unique(golden["offsets"])) > 8  # positions really differ


def test_the_table_has_every_variant(config, monkeypatch):
    monkeypatch.setattr("weft.sw.bench.SIDE", 8)
    monkeypatch.setattr("weft.sw.bench.deformable_graph",
                        lambda *arguments, **named: deformable_graph(*arguments, **named, **SMALL))
    result = bench_deformable(Terminal(quiet=True), config, "functional", "ideal")
    assert set(result["variants"]) == {*VARIANTS, "full_plain", "full_square"}
    assert result["mismatches"] == 0
