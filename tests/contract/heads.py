"""The head's functions of each framework as the tests of the contract see them: whole NumPy arrays in and out.

``head(name, partition, arrays, upstream, **options)`` calls the function of that name on every rank, with its parts of
``arrays``. Returned are the results and, by argument, the gradients that follow from ``upstream``, which are those of the
first results.
"""

import numpy as np

SPLIT = {"weight": 0, "logits": -1, "parallel_logits": -1}  # the axis of an argument, and of what a function returns
DIFFERENTIABLE = {"hidden", "weight", "logits"}


def axis_of(what, options):
    """The axis along which ranks split it, or None if all have the same."""
    return options.get("seq_dim") if what == "hidden" else SPLIT.get(what)


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

    given = {argument: own(array, axis_of(argument, options)) for argument, array in arrays.items()}
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
        grads = [own(grad, axis_of(name, options)) for grad in upstream]
        torch.autograd.backward(found[: len(grads)], [grad.to(found[0].dtype) for grad in grads])
    assert kept == {argument: array_of(tensor).tobytes() for argument, tensor in given.items()}, (
        "an input was written to"
    )
    gradients = {argument: array_of(tensor.grad) for argument, tensor in given.items() if tensor.grad is not None}
    return [array_of(result) for result in found], gradients


class TorchHead:
    """Processes in a gloo group, or for one rank this process."""

    integers = np.int64

    def __init__(self, world):
        self.world = world

    def __call__(self, name, partition, arrays, upstream=(), **options):
        arguments = name, partition, arrays, upstream, options
        w = partition.world_size
        ranks = [on_torch_rank(*arguments)] if w == 1 else self.world(w)(on_torch_rank, *arguments)
        if isinstance(ranks[0], Exception):
            assert {(type(error), str(error)) for error in ranks} == {(type(ranks[0]), str(ranks[0]))}
            raise ranks[0]
        every_result, every_gradient = zip(*ranks, strict=True)
        gradients = {}
        for argument in every_gradient[0]:
            parts = [each[argument] for each in every_gradient]
            if (name, argument) == ("parallel_logits", "hidden"):  # each rank has its part of the sum
                gradients[argument] = np.sum(parts, 0, np.float64)
            else:
                gradients[argument] = self.whole(parts, axis_of(argument, options))
        return [self.whole(parts, axis_of(name, options)) for parts in zip(*every_result, strict=True)], gradients

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

        def spec(what, ndim):
            axis = axis_of(what, options)
            return P() if axis is None else P(*[None] * (axis % ndim), "tp")

        fixed = {argument: array for argument, array in arrays.items() if argument == "targets"}
        traced = {argument: array for argument, array in arrays.items() if argument != "targets"}
        of_arrays = {argument: spec(argument, array.ndim) for argument, array in traced.items()}
        of_results = spec(name, next(iter(arrays.values())).ndim)

        def results(traced):
            found = getattr(jax_impl, name)(**traced, **fixed, partition=partition, axis_name="tp", **options)
            found = found if isinstance(found, tuple) else (found,)
            return found[: len(upstream)], found[len(upstream) :]

        def step(traced, upstream):
            if not upstream:
                return results(traced)[1], {}
            found, pull_back, others = jax.vjp(results, traced, has_aux=True)
            (gradients,) = pull_back(tuple(grad.astype(found[0].dtype) for grad in upstream))
            return found + others, gradients

        mapped = jax.shard_map(
            step,
            mesh=make_mesh((partition.world_size,)),
            in_specs=(of_arrays, of_results),
            out_specs=(of_results, of_arrays if upstream else P()),
        )
        with jax.enable_x64(any(array.dtype == np.float64 for array in traced.values())):
            found, gradients = jax.jit(mapped)(traced, upstream)
        for array in found if of_results == P() else ():
            assert len({np.asarray(shard.data).tobytes() for shard in array.addressable_shards}) == 1, "ranks disagree"
        return [np.asarray(each) for each in found], {key: np.asarray(each) for key, each in gradients.items()}
