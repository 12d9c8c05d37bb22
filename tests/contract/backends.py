"""Each backend as the tests of the contract see it: one table, split over some ranks, NumPy arrays in and out."""

import ml_dtypes
import numpy as np

from shared import VocabPartition
from shared.checks import ids_type_error
from shared.ids import check_ids_valid, widen
from shared.proof.oracle import partial_lookup, weight_grad

DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("float16", "bfloat16", "float32", "float64")}


class Oracle:
    """The layer in plain NumPy."""

    def __init__(self, table, world_size, padded_vocab_size=None, padding_idx=None, invalid_ids="zero"):
        self.partition = VocabPartition(len(table), world_size, padded_vocab_size)
        self.padding_idx, self.invalid_ids = padding_idx, invalid_ids
        self.padded = np.zeros((self.partition.padded_vocab_size, table.shape[1]), table.dtype)
        self.padded[: len(table)] = table

    def rows(self, rank):
        return self.padded[self.partition.start(rank) : self.partition.stop(rank)]

    def lookup(self, ids):
        """Each rank's incomplete embedding."""
        if not isinstance(ids, np.ndarray):
            raise ids_type_error(type(ids).__name__, "an array")
        if self.invalid_ids == "error":
            check_ids_valid(ids if ids.dtype == np.uint64 else widen(ids), self.partition.vocab_size)
        ranks = range(self.partition.world_size)
        return [partial_lookup(self.rows(rank), ids, self.partition, rank) for rank in ranks]

    def gradients(self, ids, upstream):
        """The gradient of each rank's rows, where ``upstream`` is that of every incomplete embedding."""
        ranks = range(self.partition.world_size)
        return [weight_grad(upstream, ids, self.partition, rank, self.padding_idx) for rank in ranks]


class Torch:
    """One module a rank; ``moved`` puts their tables into memory that somebody else allocated."""

    moved = False

    def __init__(self, table, world_size, **options):
        import torch
        import torch_layers

        self.torch_layers = torch_layers
        options["dtype"] = getattr(torch, table.dtype.name)
        self.modules = torch_layers.ranks_of(*table.shape, world_size, **options)
        for module in self.modules:
            if self.moved:
                module.weight.data = module.weight.data.clone()
            torch_layers.set_rows(module, table)

    def lookup(self, ids):
        given = self.torch_layers.tensor_of(ids) if isinstance(ids, np.ndarray) else ids
        outputs = [self.torch_layers.array_of(module(given)) for module in self.modules]
        if isinstance(ids, np.ndarray):
            np.testing.assert_array_equal(given.numpy(), ids)  # ids are never modified
        return outputs

    def gradients(self, ids, upstream):
        ids, upstream = map(self.torch_layers.tensor_of, (ids, upstream))
        for module in self.modules:
            module.weight.grad = None
            module(ids).backward(upstream)
        return [self.torch_layers.array_of(module.weight.grad) for module in self.modules]


class TorchMoved(Torch):
    moved = True


class Jax:
    """One layer over a mesh of CPU devices."""

    def __init__(self, table, world_size, **options):
        import jax

        from jax_impl import ParallelVocabEmbedding

        devices = jax.devices()[:world_size]
        mesh = jax.make_mesh((world_size,), ("tp",), (jax.sharding.AxisType.Auto,), devices=devices)
        self.layer = ParallelVocabEmbedding(*table.shape, mesh, dtype=table.dtype, **options)
        padded = np.zeros(self.layer.weight.shape, table.dtype)
        padded[: len(table)] = table
        self.layer = self.layer.with_weight(padded)

    def lookup(self, ids):
        return list(np.asarray(self.layer(ids)))

    def gradients(self, ids, upstream):
        import jax

        output, pull_back = jax.vjp(lambda layer: layer(ids), self.layer)
        (grad,) = pull_back(jax.numpy.broadcast_to(upstream, output.shape))
        return np.split(np.asarray(grad.weight), self.layer.world_size)


BACKENDS = {"torch": Torch, "torch, moved table": TorchMoved, "jax": Jax, "oracle": Oracle}
