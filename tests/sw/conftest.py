"""A small network as a Graph and as a Program, for the tests of the composer."""

import numpy as np
import pytest

from weft.arch.config import load_config
from weft.compiler.pipeline import compile_graph
from weft.sim.functional import FunctionalDevice
from weft.sw.bench import deformable_graph


@pytest.fixture(scope="session")
def config():
    return load_config("test")


@pytest.fixture(scope="session")
def graph():
    return deformable_graph("square", side=8, channels=32)


@pytest.fixture(scope="session")
def program(graph, config):
    return compile_graph(graph, config)


@pytest.fixture(scope="session")
def program_file(program, tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "small.weft"
    program.save(path)
    return path


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(-128, 128, (8, 8, 3))


@pytest.fixture
def functional(program, config):
    device = FunctionalDevice(config, trace=True)
    device.load(program)
    return device
