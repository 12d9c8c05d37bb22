"""What JAX has no stable public name for is where ``private_api`` says, and nowhere else."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import on

import jax_impl
from jax_impl.private_api import all_gather_invarying, varying_axes


def test_axes_over_which_an_array_varies(mesh_of):
    mesh, found = mesh_of((2, 2), ("dp", "tp")), []

    def on_each_device(rows, whole):
        gathered = all_gather_invarying(rows, "tp")
        found.extend(map(varying_axes, (rows, whole, rows + whole, gathered)))
        return gathered

    mapped = jax.shard_map(on_each_device, mesh=mesh, in_specs=(P("tp"), P()), out_specs=P())
    assert mapped(on(mesh, np.arange(8), "tp"), on(mesh, np.ones(4, int))).tolist() == [*range(8)]
    assert found == [{"tp"}, set(), {"tp"}, set()]
    assert varying_axes(np.ones(2)) == set()


@pytest.mark.parametrize("name", ["jax._src", "jax.interpreters", "jax.extend", "manual_axis_type", ".vma", "jaxlib"])
def test_private_names_are_in_one_file(name):
    users = [
        path.name
        for path in Path(jax_impl.__file__).parent.rglob("*.py")
        if re.search(rf"{re.escape(name)}\b", path.read_text())
    ]
    assert users in ([], ["private_api.py"])
