"""The backends that the contract is tested on."""

import contextlib

import pytest
from contract.backends import BACKENDS
from contract.heads import JaxHead, TorchHead
from environment import WITHOUT


def need(framework):
    """Skip if it is missing on purpose; give JAX eight devices."""
    if framework in WITHOUT:
        pytest.skip(f"without {framework}, as PVE_TEST_WITHOUT says")
    if framework == "jax":
        import jax

        jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Build the named backend's layer: ``backend(table, world_size, **options)``."""
    framework = request.param.partition(",")[0]
    need(framework)
    with contextlib.ExitStack() as stack:
        if framework == "jax":
            import jax

            stack.enter_context(jax.enable_x64(True))
        yield BACKENDS[request.param]


@pytest.fixture(
    params=[pytest.param("torch", marks=[pytest.mark.multiprocess, pytest.mark.xdist_group("world")]), "jax"]
)
def head(request):
    """Call the head's functions: ``head(name, partition, arrays, upstream, **options)``."""
    need(request.param)
    if request.param == "jax":
        yield JaxHead()
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as ranks have: the bits of products depend on it
    yield TorchHead(request.getfixturevalue("world"))
    torch.set_num_threads(threads)
