"""Output head as a pytree: logits, loss and decoding."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import ArrayLike

from jax_impl.cross_entropy import linear_statistics, loss_of
from jax_impl.decode import parallel_argmax, parallel_sample, parallel_top_k
from jax_impl.head import Plan, check_products, logits_on_rank, vary
from jax_impl.ids import as_targets, check_targets
from jax_impl.placement import (
    axes_of,
    explicit_axes,
    free_axes,
    guess_split,
    known_split,
    lay_out,
    restricted,
    split_further,
    without,
)
from jax_impl.vocab_emb import ParallelVocabEmbedding
from shared.head import LossOptions, check_targets_shape, check_top_k
from shared.partition import VocabPartition
from shared.sequence import resolve_seq_dim

__all__ = ["ParallelLMHead"]


class _Static(NamedTuple):
    """Static part of a head: everything but its table."""

    partition: VocabPartition
    options: LossOptions
    mesh: Mesh | AbstractMesh
    axis_name: str


@jax.tree_util.register_pytree_with_keys_class
class ParallelLMHead:
    """Output head over the table of a ``ParallelVocabEmbedding``.

    The head is a pytree whose only leaf is the table. Build an untied head once, around an embedding of its own, as part of
    the model. Build a tied head around the model's embedding in each call: the gradients of lookup and head then add up in
    the one table.

    Args:
        embedding: the layer that provides table and mesh; its ``reduction`` is ignored.
        ignore_index, label_smoothing, z_loss, reduction, softcap, seq_dim: as in ``linear_cross_entropy``. Means and sums
            include the tokens of data axes.
        invalid_targets: result for targets outside ``[0, vocab_size)``: ``"error"``, an IndexError; inside ``jit`` a loss of
            NaN without a gradient, and an error under ``jax.experimental.checkify``; ``"ignore"``, no loss.

    Attributes:
        embedding: the layer.
        options: the ``shared.head.LossOptions``.

    Tokens stay split over further mesh axes. Inside ``jit`` the batch is assumed to be split over all further Auto axes.

    Raises:
        TypeError: ``embedding`` is not a ``ParallelVocabEmbedding``, or an option has the wrong type.
        ValueError: an option is out of range.

    Source: tied embeddings: Press and Wolf (2017, arXiv:1608.05859).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jax_impl import ParallelLMHead, ParallelVocabEmbedding
        >>> mesh = jax.make_mesh((jax.device_count(),), ("tp",), (jax.sharding.AxisType.Auto,))
        >>> emb = ParallelVocabEmbedding(12 * jax.device_count(), 4, mesh, reduction="all_reduce")
        >>> ids = jnp.array([[1, 2, 3]])
        >>> def loss(emb):
        ...     return ParallelLMHead(emb)(emb(ids), ids)
        >>> jax.grad(loss)(emb).weight.shape == emb.weight.shape
        True
    """

    embedding: ParallelVocabEmbedding
    options: LossOptions

    def __init__(
        self,
        embedding: ParallelVocabEmbedding,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        reduction: str = "mean",
        invalid_targets: str = "error",
        softcap: float | None = None,
        seq_dim: int | None = None,
    ) -> None:
        if not isinstance(embedding, ParallelVocabEmbedding):
            raise TypeError(f"embedding must be a ParallelVocabEmbedding, got {type(embedding).__name__}")
        self.embedding = embedding
        self.options = LossOptions(ignore_index, label_smoothing, z_loss, reduction, invalid_targets, softcap, seq_dim)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any]], LossOptions]:
        return ((jax.tree_util.GetAttrKey("embedding"), self.embedding),), self.options

    @classmethod
    def tree_unflatten(cls, options: LossOptions, children: tuple[Any]) -> Self:
        self = object.__new__(cls)
        self.options, (self.embedding,) = options, children
        return self

    @property
    def partition(self) -> VocabPartition:
        """Ownership of the table's rows, a ``shared.VocabPartition``."""
        return self.embedding.config.partition

    def __call__(
        self, hidden: jax.Array | np.ndarray, targets: ArrayLike | None = None, *, returns: Sequence[str] = ()
    ) -> Any:
        """Compute the loss against ``targets``, or the logits without them.

        Args:
            hidden: ``[*, emb_size]``, in the table's dtype. With ``seq_dim``, best split along it over ``axis_name``.
            targets: ids, ``[*]``, any integer dtype, from JAX or NumPy.
            returns: further results, as in ``linear_cross_entropy``.

        Returns:
            With targets as ``linear_cross_entropy``. Without: logits ``[*, padded_vocab_size]``, float32 (float64 for a
            float64 table), last dimension split over ``axis_name``, -inf in padding.

        Raises:
            TypeError: a dtype is not legal.
            IndexError: with ``invalid_targets="error"``; names the first invalid target, its position and the legal range.
            ValueError: a shape does not fit; ``returns`` without targets; called inside a shard_map that is manual over
                ``axis_name``.
        """
        embedding, options = self.embedding, self.options
        ndim = max(hidden.ndim - 1, 0)
        dim = None if options.seq_dim is None else resolve_seq_dim(ndim, options.seq_dim)
        tokens = self._split(hidden, ndim, dim)
        split = PartitionSpec(*tokens, None) if dim is None else split_further(tokens, ndim, dim, embedding.axis_name)
        given = [(hidden, split), (embedding.weight, PartitionSpec(embedding.axis_name, None))]
        if targets is None:
            if returns:
                raise ValueError(f"returns must be empty without targets, got {tuple(returns)}")
            return self._run(_logits, dim, given, PartitionSpec(*tokens, embedding.axis_name), options)
        if options.invalid_targets == "error":
            check_targets(targets, self.partition.vocab_size, options.ignore_index)
        known = as_targets(targets, self.partition.vocab_size, options.ignore_index)
        check_targets_shape(known.shape, hidden.shape[:-1], "hidden")
        options = replace(options, returns=returns)
        loss = tokens if options.reduction == "none" else PartitionSpec()
        specs = {"lse": tokens, "logprobs": tokens, "count": PartitionSpec()}
        output = (loss, *[specs[name] for name in options.returns]) if returns else loss
        return self._run(_loss, axes_of(tokens), [*given, (known, tokens)], output, options)

    def argmax(self, logits: jax.Array | np.ndarray) -> jax.Array:
        """Apply ``parallel_argmax`` to logits ``[*, padded_vocab_size]``."""
        tokens = self._split(logits, logits.ndim - 1)
        split = PartitionSpec(*tokens, self.embedding.axis_name)
        return self._run(_argmax, None, [(logits, split)], tokens, self.options)

    def top_k(self, logits: jax.Array | np.ndarray, k: int) -> tuple[jax.Array, jax.Array]:
        """Apply ``parallel_top_k`` to logits ``[*, padded_vocab_size]``."""
        tokens, k = self._split(logits, logits.ndim - 1), check_top_k(k, self.partition.vocab_size)
        split = PartitionSpec(*tokens, self.embedding.axis_name)
        return self._run(_top_k, k, [(logits, split)], PartitionSpec(*tokens, None), self.options)

    def sample(self, logits: jax.Array | np.ndarray, uniform: jax.Array | np.ndarray) -> jax.Array:
        """Apply ``parallel_sample`` to logits ``[*, padded_vocab_size]`` and ``uniform`` ``[*]``."""
        tokens = self._split(logits, logits.ndim - 1)
        check_targets_shape(uniform.shape, logits.shape[:-1], "logits", "uniform")
        given = [(logits, PartitionSpec(*tokens, self.embedding.axis_name)), (uniform, tokens)]
        return self._run(_sample, None, given, tokens, self.options)

    def _split(self, array: jax.Array | np.ndarray, ndim: int, dim: int | None = None) -> PartitionSpec:
        """Split of the first ``ndim`` dimensions, the tokens, over further axes."""
        mesh, axis_name = self.embedding.mesh, self.embedding.axis_name
        known = known_split(array, mesh)
        tokens = without(PartitionSpec(*[*known, *[None] * ndim][:ndim]), axis_name)
        if not isinstance(array, jax.core.Tracer):
            return tokens
        sequence = dim if dim is not None or ndim < 2 else ndim - 1
        return guess_split(array.shape[:ndim], tokens, mesh, axis_name, sequence)

    def _run(
        self,
        function: Callable[..., Any],
        argument: Any,
        given: list[tuple[jax.Array | np.ndarray, PartitionSpec]],
        output: Any,
        options: LossOptions,
    ) -> Any:
        embedding = self.embedding
        static = _Static(self.partition, options, embedding.mesh, embedding.axis_name)
        arrays, specs = zip(*given, strict=True)
        return _on_each_rank(function, argument, static, specs, output, *arrays)

    def __repr__(self) -> str:
        values = [(each.name, getattr(self.options, each.name), each.default) for each in fields(self.options)]
        changes = "".join(f", {name}={value!r}" for name, value, default in values if value != default)
        return f"{type(self).__name__}({self.embedding!r}{changes})"


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _on_each_rank(
    function: Callable[..., Any],
    argument: Any,
    static: _Static,
    specs: tuple[PartitionSpec, ...],
    output: Any,
    *arrays: jax.Array | np.ndarray,
) -> Any:
    """Run ``function(static, argument, *arrays)`` under one shard_map."""
    mesh, axis_name = static.mesh, static.axis_name
    free = free_axes(mesh, axis_name)
    named = frozenset[str]().union(*[axes_of(spec) for spec in specs])
    manual = free & (explicit_axes(mesh) | named) | {axis_name}
    specs = tuple(restricted(spec, manual) for spec in specs)
    mapped = jax.shard_map(
        functools.partial(function, static, argument),
        mesh=mesh if free == set(mesh.axis_names) else None,
        in_specs=specs,
        out_specs=jax.tree.map(lambda spec: restricted(spec, manual), output),
        axis_names=manual,
    )
    return mapped(*[lay_out(jnp.asarray(array), mesh, spec) for array, spec in zip(arrays, specs, strict=True)])


def _loss(static: _Static, data_axes: frozenset[str], hidden: jax.Array, weight: jax.Array, targets: jax.Array) -> Any:
    partition, options = static.partition, static.options
    statistics = linear_statistics(hidden, weight, targets, partition, static.axis_name, options)
    return loss_of(statistics, targets, options, partition, tuple(sorted(data_axes)))


def _logits(static: _Static, dim: int | None, hidden: jax.Array, weight: jax.Array) -> jax.Array:
    plan = Plan(static.partition, static.axis_name, static.options.softcap, dim)
    hidden = hidden if dim is None else vary(hidden, static.axis_name)
    check_products(hidden, weight, plan)
    return logits_on_rank(hidden, weight, plan)


def _argmax(static: _Static, _: None, logits: jax.Array) -> jax.Array:
    return parallel_argmax(logits, static.partition, static.axis_name)


def _top_k(static: _Static, k: int, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    return parallel_top_k(logits, k, static.partition, static.axis_name)


def _sample(static: _Static, _: None, logits: jax.Array, uniform: jax.Array) -> jax.Array:
    return parallel_sample(logits, static.partition, static.axis_name, uniform=uniform)
