"""Eight CPU devices, and meshes over them of both kinds."""

import contextlib

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

jax.config.update("jax_num_cpu_devices", 8)


def make_mesh(kind, shape=(8,), names=("tp",)):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, (getattr(AxisType, kind),) * len(shape), devices=devices)


@pytest.fixture(params=["Auto", "Explicit"])
def kind(request):
    return request.param


@pytest.fixture
def mesh_of(kind):
    """Make a mesh of that kind and set it, as Explicit meshes need for operations on the results."""
    with contextlib.ExitStack() as stack:

        def make(shape=(8,), names=("tp",)):
            mesh = make_mesh(kind, shape, names)
            stack.enter_context(jax.set_mesh(mesh))
            return mesh

        yield make


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
