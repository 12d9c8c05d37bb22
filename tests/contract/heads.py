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


def on_torch_rank(name, partition, arrays, upstream, options):
    """The results and gradients of one rank, or its error."""
    import torch
    import torch.distributed as dist
    from torch_layers import array_of, tensor_of

    import torch_impl

    group = dist.group.WORLD if partition.world_size > 1 else None
    rank, given = group.rank() if group else 0, {}
    for argument, array in arrays.items():
        axis = split_axis(argument, options.get("seq_dim"))
        part = array if axis is None else np.split(array, partition.world_size, axis)[rank]
        given[argument] = tensor_of(part).requires_grad_(upstream is not None and argument in DIFFERENTIABLE)
    kept = {argument: array_of(tensor).tobytes() for argument, tensor in given.items()}
    place = {"rank": rank} if name == "parallel_logits" else {"process_group": group}
    try:
        found = getattr(torch_impl, name)(**given, partition=partition, **place, **options)
    except (IndexError, TypeError, ValueError) as error:
        return error
    found = found if isinstance(found, tuple) else (found,)
    if upstream is not None:
        wanted = found[: len(upstream)]
        pairs = zip(upstream, wanted, strict=True)
        torch.autograd.backward(wanted, [tensor_of(grad).to(result.dtype) for grad, result in pairs])
    assert kept == {argument: array_of(tensor).tobytes() for argument, tensor in given.items()}, "an input was written to"
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

    def __call__(self, name, partition, arrays, upstream=None, **options):
        arguments = name, partition, arrays, upstream, options
        if partition.world_size == 1:
            with one_thread():
                ranks = [on_torch_rank(*arguments)]
        else:
            ranks = self.world(partition.world_size)(on_torch_rank, *arguments)
        if isinstance(ranks[0], Exception):
            assert {(type(error), str(error)) for error in ranks} == {(type(ranks[0]), str(ranks[0]))}
            raise ranks[0]
        axis = -1 if name == "parallel_logits" else None
        results = [self.whole(parts, axis) for parts in zip(*(results for results, _ in ranks), strict=True)]
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

    def __call__(self, name, partition, arrays, upstream=None, **options):
        import jax
        from jax.sharding import PartitionSpec as P
        from meshes import make_mesh

        import jax_impl

        def spec(argument):
            axis = split_axis(argument, options.get("seq_dim"))
            return P() if axis is None else P(*[None] * (axis % arrays[argument].ndim), "tp")

        traced = {argument: array for argument, array in arrays.items() if argument != "targets"}
        fixed = {"targets": arrays["targets"]} if "targets" in arrays else {}
        count = 0 if upstream is None else len(upstream)

        def results(traced):
            found = getattr(jax_impl, name)(**traced, **fixed, partition=partition, axis_name="tp", **options)
            found = found if isinstance(found, tuple) else (found,)
            return found[:count], found[count:]

        def step(traced, upstream):
            if not count:
                return results(traced)[1], {}
            found, pull_back, others = jax.vjp(results, traced, has_aux=True)
            (gradients,) = pull_back(tuple(grad.astype(each.dtype) for grad, each in zip(upstream, found, strict=True)))
            return found + others, gradients

        own = {argument: spec(argument) for argument in traced}
        result = P(*[None] * (traced["hidden"].ndim - 1), "tp") if name == "parallel_logits" else P()
        of_upstream = result if count else P()
        mapped = jax.shard_map(
            step,
            mesh=make_mesh((partition.world_size,)),
            in_specs=(own, of_upstream),
            out_specs=(result, own if count else P()),
        )
        with jax.enable_x64(any(array.dtype == np.float64 for array in traced.values())):
            found, gradients = jax.jit(mapped)(traced, upstream)
        for array in found if result == P() else ():
            assert len({np.asarray(shard.data).tobytes() for shard in array.addressable_shards}) == 1, "ranks disagree"
        return [np.asarray(each) for each in found], {key: np.asarray(each) for key, each in gradients.items()}
