"""The head's functions of each framework as the tests of the contract see them: whole NumPy arrays in and out.

``head(name, partition, arrays, upstream, **options)`` calls the function of that name on every rank of the partition. Ranks
get their parts of ``arrays``. Returned are the results and, by argument, the gradients that come of ``upstream``, which are
those of the first results.
"""

import contextlib

import numpy as np

DIFFERENTIABLE = {"hidden", "weight", "logits"}


def split_axis(argument, seq_dim):
    """The axis along which ranks split an argument, or None if they all have the same."""
    return {"weight": 0, "logits": -1, "hidden": seq_dim}.get(argument)


def result_axis(name):
    """The axis along which results are split over ranks, or None."""
    return -1 if name == "parallel_logits" else None


def on_torch_rank(name, partition, arrays, upstream, options):
    """The results and gradients of one rank, or its error."""
    import torch
    import torch.distributed as dist
    from torch_layers import array_of, tensor_of

    import torch_impl

    group = dist.group.WORLD if partition.world_size > 1 else None
    rank = group.rank() if group else 0

    def own(array, axis):
        return tensor_of(array if axis is None else np.split(array, partition.world_size, axis)[rank])

    given = {argument: own(array, split_axis(argument, options.get("seq_dim"))) for argument, array in arrays.items()}
    for argument in DIFFERENTIABLE & given.keys() if upstream else ():
        given[argument].requires_grad_()
    kept = {argument: array_of(tensor).tobytes() for argument, tensor in given.items()}
    place = {"rank": rank} if name == "parallel_logits" else {"process_group": group}
    try:
        found = getattr(torch_impl, name)(**given, partition=partition, **place, **options)
    except (IndexError, TypeError, ValueError) as error:
        return error
    found = found if isinstance(found, tuple) else (found,)
    if upstream:
        wanted, axis = found[: len(upstream)], result_axis(name)
        pairs = zip(upstream, wanted, strict=True)
        torch.autograd.backward(wanted, [own(grad, axis).to(result.dtype) for grad, result in pairs])
    assert kept == {argument: array_of(tensor).tobytes() for argument, tensor in given.items()}, (
        "an input was written to"
    )
    gradients = {argument: array_of(tensor.grad) for argument, tensor in given.items() if tensor.grad is not None}
    return [array_of(result) for result in found], gradients


@contextlib.contextmanager
def one_thread():
    """As many threads as ranks have, on which the bits of products depend."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TorchHead:
    """Processes in a gloo group, or for one rank this process."""

    integers = np.int64

    def __init__(self, world):
        self.world = world

    def __call__(self, name, partition, arrays, upstream=(), **options):
        arguments = name, partition, arrays, upstream, options
        if partition.world_size == 1:
            with one_thread():
                ranks = [on_torch_rank(*arguments)]
        else:
            ranks = self.world(partition.world_size)(on_torch_rank, *arguments)
        if isinstance(ranks[0], Exception):
            assert {(type(error), str(error)) for error in ranks} == {(type(ranks[0]), str(ranks[0]))}
            raise ranks[0]
        results = [
            self.whole(parts, result_axis(name)) for parts in zip(*(results for results, _ in ranks), strict=True)
        ]
        gradients = {}
        for argument in ranks[0][1]:
            parts = [each[argument] for _, each in ranks]
            if (name, argument) == ("parallel_logits", "hidden"):  # each rank has its part of the sum
                gradients[argument] = np.sum(parts, 0, np.float64)
            else:
                gradients[argument] = self.whole(parts, split_axis(argument, options.get("seq_dim")))
        return results, gradients

    @staticmethod
    def whole(parts, axis):
        if axis is not None:
            return np.concatenate(parts, axis)
        assert len({part.tobytes() for part in parts}) == 1, "ranks disagree"
        return parts[0]


class JaxHead:
    """A shard_map over a mesh of CPU devices; targets are known while it is traced."""

    integers = np.int32

    def __call__(self, name, partition, arrays, upstream=(), **options):
        import jax
        from jax.sharding import PartitionSpec as P
        from meshes import make_mesh

        import jax_impl

        def spec(argument):
            axis = split_axis(argument, options.get("seq_dim"))
            return P() if axis is None else P(*[None] * (axis % arrays[argument].ndim), "tp")

        traced = {argument: array for argument, array in arrays.items() if argument != "targets"}
        fixed = {argument: array for argument, array in arrays.items() if argument == "targets"}
        of_arrays, result = {argument: spec(argument) for argument in traced}, P()
        if result_axis(name) is not None:
            result = P(*[None] * (arrays["hidden"].ndim - 1), "tp")

        def results(traced):
            found = getattr(jax_impl, name)(**traced, **fixed, partition=partition, axis_name="tp", **options)
            found = found if isinstance(found, tuple) else (found,)
            return found[: len(upstream)], found[len(upstream) :]

        def step(traced, upstream):
            if not upstream:
                return results(traced)[1], {}
            found, pull_back, others = jax.vjp(results, traced, has_aux=True)
            (gradients,) = pull_back(tuple(grad.astype(each.dtype) for grad, each in zip(upstream, found, strict=True)))
            return found + others, gradients

        mapped = jax.shard_map(
            step,
            mesh=make_mesh((partition.world_size,)),
            in_specs=(of_arrays, result),
            out_specs=(result, of_arrays if upstream else P()),
        )
        with jax.enable_x64(any(array.dtype == np.float64 for array in traced.values())):
            found, gradients = jax.jit(mapped)(traced, upstream)
        for array in found if result == P() else ():
            assert len({np.asarray(shard.data).tobytes() for shard in array.addressable_shards}) == 1, "ranks disagree"
        return [np.asarray(each) for each in found], {key: np.asarray(each) for key, each in gradients.items()}
