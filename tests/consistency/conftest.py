"""Eight CPU devices, and the two layers side by side with one and the same table."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch

from jax_impl import ParallelVocabEmbedding as JaxEmbedding
from shared.bits import canonical_nan, unsigned_view
from shared.proof.oracle import partial_lookup, sum_partials, weight_grad
from torch_impl import ParallelVocabEmbedding as TorchEmbedding

jax.config.update("jax_num_cpu_devices", 8)


def to_torch(array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def to_numpy(tensor):
    tensor = tensor.detach()
    return (
        tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    )


@dataclass
class Result:
    """What one framework computed: every rank's partial and gradient, and the sum of the partials."""

    partials: np.ndarray
    total: np.ndarray
    gradient: np.ndarray


class Pair:
    """Both layers (and the oracle) with the same table, over the same number of ranks."""

    def __init__(self, table, world_size, padding_idx=None):
        self.table, self.world_size, self.padding_idx = table, world_size, padding_idx
        v, e = table.shape
        dtype = to_torch(table).dtype
        self.modules = [
            TorchEmbedding(v, e, r, world_size, dtype=dtype, padding_idx=padding_idx) for r in range(world_size)
        ]
        for module, rows in zip(self.modules, np.split(table, world_size), strict=True):
            module.load_state_dict({"weight": to_torch(rows)})
        mesh = jax.make_mesh((world_size,), ("tp",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:world_size])
        layer = JaxEmbedding(v, e, mesh, dtype=table.dtype, padding_idx=padding_idx)
        self.layer = layer.with_weight(table)

    def torch(self, ids, grad_output):
        partials = [module(torch.from_numpy(ids)) for module in self.modules]
        gradients = [
            torch.autograd.grad(partial, module.weight, to_torch(grad_output))[0]
            for module, partial in zip(self.modules, partials, strict=True)
        ]
        total = partials[0]
        for partial in partials[1:]:
            total = total + partial
        return Result(
            np.stack([*map(to_numpy, partials)]), to_numpy(total), np.concatenate([*map(to_numpy, gradients)])
        )

    def jax(self, ids, grad_output):
        partials, back = jax.vjp(lambda layer: layer(ids), self.layer)
        (gradient,) = back(jax.device_put(np.stack([grad_output] * self.world_size), partials.sharding))
        total = jax.jit(lambda partials: partials.sum(0))(partials)
        return Result(np.asarray(partials), np.asarray(total), np.asarray(gradient.weight))

    def oracle(self, ids, grad_output):
        partition = self.modules[0].partition
        shards = np.split(self.table, self.world_size)
        partials = [partial_lookup(rows, ids, partition, rank) for rank, rows in enumerate(shards)]
        gradients = [weight_grad(grad_output, ids, partition, r, self.padding_idx) for r in range(self.world_size)]
        return Result(np.stack(partials), sum_partials(partials), np.concatenate(gradients))

    def assert_equal(self, ids, grad_output):
        """All three agree in every bit of every array; where something is added, any NaN is as good as another."""
        expected = self.oracle(ids, grad_output)
        for found in (self.torch(ids, grad_output), self.jax(ids, grad_output)):
            for name in ("partials", "total", "gradient"):
                mine, oracles = getattr(found, name), getattr(expected, name)
                assert mine.dtype == oracles.dtype
                assert mine.shape == oracles.shape
                if name != "partials":
                    mine, oracles = canonical_nan(mine), canonical_nan(oracles)
                np.testing.assert_array_equal(unsigned_view(mine), unsigned_view(oracles), err_msg=name)


@pytest.fixture
def pair():
    return Pair


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
