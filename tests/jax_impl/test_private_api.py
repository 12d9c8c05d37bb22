"""What JAX has no stable public name for is where ``private_api`` says, and nowhere else."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_impl
from jax_impl.private_api import all_gather_invarying, varying_axes


def test_varying_axes(mesh_of):
    mesh, found = mesh_of((2, 2), ("dp", "tp")), []
    split, whole = (jax.device_put(jnp.ones(2), NamedSharding(mesh, spec)) for spec in (P("dp"), P()))

    def on_each_device(split, whole):
        found.extend([varying_axes(split), varying_axes(whole), varying_axes(split + whole)])
        return split

    jax.shard_map(on_each_device, mesh=mesh, in_specs=(P("dp"), P()), out_specs=P("dp"))(split, whole)
    assert found == [{"dp"}, set(), {"dp"}]
    assert varying_axes(jnp.ones(2)) == set()


def test_gathered_rows_do_not_vary(mesh_of):
    mesh, found = mesh_of((4,)), []
    rows = jax.device_put(jnp.arange(8), NamedSharding(mesh, P("tp")))

    def on_each_device(rows):
        found.append(varying_axes(all_gather_invarying(rows, "tp")))
        return all_gather_invarying(rows, "tp")

    gathered = jax.shard_map(on_each_device, mesh=mesh, in_specs=P("tp"), out_specs=P())(rows)
    assert (gathered.tolist(), found) == ([*range(8)], [set()])


@pytest.mark.parametrize("name", ["jax._src", "jax.interpreters", "jax.extend", "manual_axis_type", ".vma", "jaxlib"])
def test_private_names_are_in_one_file(name):
    folder = Path(jax_impl.__file__).parent
    assert [path.name for path in folder.glob("**/*.py") if re.search(re.escape(name) + r"\b", path.read_text())] in (
        [],
        ["private_api.py"],
    )
