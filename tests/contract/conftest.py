"""The backends that the contract is tested on."""

import contextlib

import pytest
from contract.backends import BACKENDS
from environment import WITHOUT


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Build the named backend's layer: ``backend(table, world_size, **options)``."""
    framework = request.param.partition(",")[0]
    if framework in WITHOUT:
        pytest.skip(f"without {framework}, as PVE_TEST_WITHOUT says")
    with contextlib.ExitStack() as stack:
        if framework == "jax":
            import jax

            jax.config.update("jax_num_cpu_devices", 8)
            stack.enter_context(jax.enable_x64(True))
        yield BACKENDS[request.param]
