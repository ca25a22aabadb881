"""Devices around the stand-in engine."""

from functools import partial

import pytest

from tests.sim.standin import standin
from weft.arch.config import load_config
from weft.sim.rtl import RtlDevice


@pytest.fixture(scope="session")
def config():
    return load_config("test")


@pytest.fixture(scope="session")
def copier(config):
    """RtlDevice of the stand-in; takes RtlDevice's other arguments."""
    return partial(RtlDevice, config, verilog=standin(config))


@pytest.fixture(scope="session")
def engine(config):
    """RtlDevice of the engine itself; takes RtlDevice's other arguments."""
    return partial(RtlDevice, config)
