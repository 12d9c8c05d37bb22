"""Eight CPU devices, and meshes over them of both kinds."""

import contextlib

import jax
import pytest
from meshes import make_mesh

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(params=["Auto", pytest.param("Explicit", marks=pytest.mark.slow)])
def kind(request):
    """Tests for which the kind matters parametrize it themselves, and run both by default."""
    return request.param


@pytest.fixture
def mesh_of(kind):
    """Make a mesh of that kind and set it, as Explicit meshes need for operations on the results."""
    with contextlib.ExitStack() as stack:

        def make(shape=(8,), names=("tp",)):
            mesh = make_mesh(shape, names, kind)
            stack.enter_context(jax.set_mesh(mesh))
            return mesh

        yield make
