"""Eight CPU devices, and a trained table."""

import importlib.util
from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def wordllama():
    spec = importlib.util.find_spec("wordllama")
    assert spec is not None, "the package wordllama is missing: pip install -e '.[all,test]'"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])
