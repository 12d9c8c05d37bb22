"""Vocabulary-parallel embedding over a device mesh."""

import copy
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_impl.agreement import check_agreement
from jax_impl.files import TableInFiles
from jax_impl.ids import as_ids, check_ids, check_size_for_int32
from jax_impl.init import draw_table, zero_rows
from jax_impl.over_mesh import Static, lookup_over_mesh
from jax_impl.placement import (
    MeshValues,
    check_own_ids,
    check_sequence,
    describe_mesh,
    find_mesh,
    free_axes,
    known_split,
    resolve_mesh,
)
from shared.agreement import checks_wanted
from shared.checks import table_dtype_error
from shared.config import OPTIONS, EmbeddingConfig
from shared.sequence import resolve_seq_dim

__all__ = ["ParallelVocabEmbedding"]


@jax.tree_util.register_pytree_with_keys_class
class ParallelVocabEmbedding(TableInFiles):
    """An embedding table whose vocabulary is split over a mesh axis.

    Rank r, the r-th position along ``axis_name``, holds rows ``[r * n, (r + 1) * n)``. Here n is ``vocab_size //
    world_size``, or ``padded_vocab_size // world_size`` with padding. The rank looks up the ids that it owns; others get
    zero rows. The sum of all ranks' results is the embedding. What both backends promise: ``docs/contract.md``.

    The layer is a pytree whose only leaf is ``weight``: ``jax.jit``, ``jax.grad`` and optimizers take it as it is.

    Args:
        vocab_size: rows of the whole table, divisible by the size of the axis unless padded.
        emb_size: columns of the table.
        mesh: a ``jax.sharding.Mesh`` with Auto or Explicit axes. None: the one set with ``jax.set_mesh``. Inside ``jit`` or
            ``eval_shape`` pass the mesh: None finds only an AbstractMesh there, which makes another pytree.
        axis_name: the mesh axis that splits the vocabulary. Over further axes the table is replicated, and ids stay split.
        init_mean: mean of the initial normal distribution.
        init_std: its standard deviation.
        init_base_seed: rank r draws from ``jax.random.key(init_base_seed + r)``. Layers with equal seeds begin equal, and
            seed 42 on rank 1 is seed 43 on rank 0: choose seeds further apart than the number of ranks.
        dtype: float16, bfloat16, float32, or float64 in JAX's 64-bit mode.
        reduction: ``"none"``, each rank's incomplete embedding ``Er``, without communication; ``"all_reduce"``, the
            embedding ``E`` on every rank; ``"reduce_scatter"``, ``E`` split along the sequence; ``"all_to_all"``, the
            embedding of each rank's own ids: ``axis_name`` splits the first dimension of ids and result.
        exchange: ``"dense"``, a collective sums incomplete embeddings; ``"routed"``, owners send each distinct row to the
            ranks that need it; ``"auto"``, dense. Values have the same bits; gradients may differ by the order of sums.
            ``"all_reduce"`` and 16-bit gradients are always dense. ``"routed"`` falls back to dense if a rank needs more
            distinct rows of one owner than half its chunk has tokens.
        invalid_ids: result for ids outside ``[0, vocab_size)``, negative ones included: ``"zero"``, a zero row on every
            rank; ``"error"``, an IndexError, or inside ``jit`` an error of ``jax.experimental.checkify``, which the caller
            must apply.
        padding_idx: a global id whose row starts as zero and gets no gradient from lookups.
        padded_vocab_size: rows including padding, divisible by the size of the axis, or ``"even"`` for the least such size
            (``shared.pad_vocab_size`` computes others); at most ``2**31 - 1``, on one rank ``2**31 - 2``. None: no padding.
            Padding rows come last, are zero, belong to no id and are never written to a file. Lookups give them no gradient;
            for a tied head of your own see ``zero_padding_grad``.
        init: ``"per_rank"``, as ``init_base_seed`` describes; ``"global"``, row i is a function of ``init_base_seed`` and i
            alone, computed on the host, with the same bits in both frameworks, on any mesh and with any padding. A callable
            is traced: on each device it receives the global numbers ``[n]`` of the device's rows, int32, and returns the
            rows ``[n, emb_size]``; for padding rows it receives ``vocab_size - 1``. None makes zeros, for loading. Padding
            rows and the row of ``padding_idx`` are always zero.
        seq_dim: the dimension of the ids that ``"reduce_scatter"`` splits: the last one; 0 for ids of ``[s, b]``.
        check: compare in every call what the processes are about to compute. All raise if they disagree. Inside ``jit`` the
            comparison happens while tracing and leaves out values of ids. The environment variable ``PVE_CHECK=1`` does the
            same.
        key: a JAX random key that replaces ``init_base_seed``, as Equinox modules take it: rank r draws from
            ``jax.random.fold_in(key, r)``.

    Attributes:
        weight: ``jax.Array`` of shape ``[padded_vocab_size, emb_size]``, sharded ``PartitionSpec(axis_name, None)``.
        config: the ``shared.EmbeddingConfig``; each of its options is also an attribute of the layer.
        partition: the ``shared.VocabPartition``, which maps ids to owners.
        mesh, axis_name: the mesh, and its axis that splits the rows.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range; ``vocab_size`` is neither divisible by the size of the axis nor padded;
            there is no mesh, or it has no such axis.

    Source: VocabParallelEmbedding of Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from jax_impl import ParallelVocabEmbedding
        >>> w = jax.device_count()
        >>> emb = ParallelVocabEmbedding(12 * w, 4, mesh=jax.make_mesh((w,), ("tp",)))
        >>> ids = jnp.array([[0, 5], [11, 3]])
        >>> partials = emb(ids)
        >>> partials.shape == (w, 2, 2, 4)
        True
        >>> bool((partials.sum(axis=0) == np.asarray(emb.weight)[ids]).all())
        True
    """

    def __init__(
        self,
        vocab_size: int,
        emb_size: int,
        mesh: Mesh | AbstractMesh | None = None,
        axis_name: str = "tp",
        init_mean: float = 0.0,
        init_std: float = 1.0,
        init_base_seed: int = 42,
        dtype: DTypeLike = jnp.float32,
        *,
        reduction: str = "none",
        exchange: str = "auto",
        invalid_ids: str = "zero",
        padding_idx: int | None = None,
        padded_vocab_size: int | str | None = None,
        init: Callable[[jax.Array], ArrayLike] | str | None = "per_rank",
        seq_dim: int = -1,
        check: bool = False,
        key: jax.Array | None = None,
    ) -> None:
        self.mesh = resolve_mesh(mesh, axis_name)
        self.axis_name = axis_name
        self.config = EmbeddingConfig(
            vocab_size,
            emb_size,
            self.mesh.shape[axis_name],
            padded_vocab_size,
            reduction,
            exchange,
            seq_dim,
            invalid_ids,
            padding_idx,
            init_mean=init_mean,
            init_std=init_std,
            init_base_seed=init_base_seed,
            init=init,
            check=checks_wanted(check),
        )
        check_size_for_int32(self.config.partition)
        if key is not None and (init != "per_rank" or init_base_seed != EmbeddingConfig.init_base_seed):
            raise ValueError(
                f"key replaces init_base_seed and needs init='per_rank', got init_base_seed={init_base_seed!r} and "
                f"init={init!r}: leave these two out, or key"
            )
        rows = draw_table(self.config, self.mesh, axis_name, _table_dtype(dtype), key)
        # jit drops axes of size 1 from the result's sharding; put back the documented one.
        self.weight = rows if isinstance(rows, jax.core.Tracer) else jax.device_put(rows, self._sharding)

    @classmethod
    def abstract(
        cls,
        vocab_size: int,
        emb_size: int,
        mesh: Mesh | AbstractMesh | None = None,
        axis_name: str = "tp",
        *arguments: Any,
        **options: Any,
    ) -> Self:
        """Build a layer whose table has shape, dtype and sharding only.

        Nothing is allocated or drawn. Orbax restores into such a layer, ``jax.jit(...).lower`` compiles for it, and
        ``with_weight`` gives it a table.

        Args:
            vocab_size, emb_size, mesh, axis_name: as for the class.
            *arguments, **options: further arguments of the class.

        Returns:
            The layer, with a ``jax.ShapeDtypeStruct`` as ``weight``.

        Raises:
            TypeError, ValueError: as the class does.

        Example:
            >>> import jax, jax.numpy as jnp
            >>> from jax_impl import ParallelVocabEmbedding
            >>> mesh = jax.make_mesh((jax.device_count(),), ("tp",))
            >>> emb = ParallelVocabEmbedding.abstract(2**20 * mesh.size, 8192, mesh, dtype=jnp.bfloat16)
            >>> emb.weight.sharding == jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tp", None))
            True
            >>> program = jax.jit(lambda emb, ids: emb(ids)).lower(emb, jax.ShapeDtypeStruct((4, 128), jnp.int32))
        """
        mesh = resolve_mesh(mesh, axis_name)
        empty = jax.eval_shape(lambda: cls(vocab_size, emb_size, mesh, axis_name, *arguments, **options))
        weight = jax.ShapeDtypeStruct(empty.weight.shape, empty.weight.dtype, sharding=empty._sharding)
        return jax.tree.unflatten(jax.tree.structure(empty), [weight])

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any]], Static]:
        leaf = (jax.tree_util.GetAttrKey("weight"), self.weight)
        return (leaf,), Static(self.config, self.mesh, self.axis_name)

    @classmethod
    def tree_unflatten(cls, static: Static, leaves: tuple[Any]) -> Self:
        self = object.__new__(cls)
        self.config, self.mesh, self.axis_name = static
        (self.weight,) = leaves
        return self

    def __copy__(self) -> Self:
        return jax.tree.map(lambda leaf: leaf, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return jax.tree.map(lambda leaf: copy.deepcopy(leaf, memo), self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle mesh and table as plain values."""
        # Devices cannot be pickled, and a pickled jax.Array loses its sharding.
        held = isinstance(self.weight, jax.Array) and not isinstance(self.weight, jax.core.Tracer)
        if not held or not self.weight.is_fully_addressable or not isinstance(self.mesh, Mesh):
            raise TypeError(
                "only a layer with a table on a mesh of this process's devices can be pickled: keep others with Orbax "
                "(see jax_impl.restore_args) or emb.save_table(path)"
            )
        mesh = describe_mesh(self.mesh)
        return _unpickle, (type(self), self.config, mesh, self.axis_name, np.asarray(self.weight))

    def with_weight(self, weight: jax.Array | np.ndarray) -> Self:
        """Return this layer with another table.

        Args:
            weight: ``[padded_vocab_size, emb_size]`` in the table's dtype, from JAX or NumPy, with any sharding.

        Raises:
            ValueError: ``weight`` has another shape or dtype.
        """
        given, own = (tuple(weight.shape), np.dtype(weight.dtype)), (self.weight.shape, self.weight.dtype)
        if given != own:
            raise ValueError(f"weight must have shape {own[0]} and dtype {own[1]}, got {given[0]} and {given[1]}")
        return jax.tree.unflatten(jax.tree.structure(self), [jax.device_put(weight, self._sharding)])

    def zero_padding_grad(self, grads: Self) -> Self:
        """Set padding rows to zero in gradients of the layer.

        Lookups give padding rows no gradient, but a tied head of your own that computes ``hidden @ emb.weight.T`` does.
        Call this before clipping and the optimizer: padding then stays zero. The row of ``padding_idx`` keeps its gradient.

        Args:
            grads: a pytree like the layer, as ``jax.grad`` returns it; not modified.

        Example:
            >>> import jax, jax.numpy as jnp
            >>> from jax_impl import ParallelVocabEmbedding
            >>> emb = ParallelVocabEmbedding(3, 2, jax.make_mesh((1,), ("tp",)), padded_vocab_size=4)
            >>> grads = jax.grad(lambda emb: (jnp.ones((1, 2)) @ emb.weight.T).sum())(emb)
            >>> emb.zero_padding_grad(grads).weight[:, 0]
            Array([1., 1., 1., 0.], dtype=float32)
        """
        if not self.config.partition.padding_rows:
            return grads
        rows = zero_rows(grads.weight, replace(self.config, padding_idx=None), self.mesh, self.axis_name)
        return jax.tree.unflatten(jax.tree.structure(grads), [rows])

    def __call__(self, ids: ArrayLike, *, key: jax.Array | None = None) -> jax.Array:
        """Look ids up.

        Args:
            ids: global ids, any shape, any integer dtype, from JAX or NumPy; not modified. Every rank needs all of them,
                except for ``"all_to_all"``. Further mesh axes may split them.
            key: ignored. Equinox's containers pass a random key to every layer.

        Returns:
            In the table's dtype, split over further axes as the ids are. ``"none"``: ``[world_size, *ids.shape, emb_size]``,
            sharded ``PartitionSpec(axis_name)``; element r is rank r's incomplete embedding ``Er``. Other reductions: the
            embedding ``[*ids.shape, emb_size]``; ``"all_reduce"`` replicates it over ``axis_name``, ``"reduce_scatter"``
            splits it along ``seq_dim``, ``"all_to_all"`` along the first dimension. Rows are copied bit for bit, except that
            an accelerator's sum may flush a subnormal number to zero and change a NaN's payload.

        Raises:
            TypeError: ids are not an array of integers.
            IndexError: with ``invalid_ids="error"``; names the first invalid id, its position and the legal range.
            ValueError: called inside a shard_map that is manual over ``axis_name``; the table has another shape; table or
                ids lie on other devices than the mesh; a split dimension is not divisible; with ``check``, the processes
                disagree.
        """
        config = self.config
        free_axes(self.mesh, self.axis_name)  # before the shape: in the caller's shard_map the table is one rank's
        if self.weight.shape != (config.padded_vocab_size, config.emb_size):
            raise ValueError(
                f"weight must be [{config.padded_vocab_size}, {config.emb_size}], got {list(self.weight.shape)}: "
                f"emb.with_weight(table) checks a table before it takes it"
            )
        if config.check and jax.process_count() > 1:
            facts = {**config.agreement(), "dtype": self.weight.dtype, "axis_name": self.axis_name}
            check_agreement(ids, {**facts, "mesh": dict(self.mesh.shape)})
        if config.invalid_ids == "error":
            check_ids(ids, config.vocab_size)
        ids = as_ids(ids, config.vocab_size)
        split = known_split(ids, self.mesh)
        if config.reduction == "reduce_scatter":
            check_sequence(ids.shape, config.seq_dim, self.axis_name, split, self.mesh)
        elif config.reduction == "all_to_all":
            check_own_ids(ids.shape, self.axis_name, split, self.mesh)
        if ids.size == 0 and not any(isinstance(each, jax.core.Tracer) for each in (ids, self.weight)):
            return self._empty(ids.shape)
        try:
            return lookup_over_mesh(Static(config, self.mesh, self.axis_name), split, self.weight, ids)
        except ValueError as error:
            if "incompatible devices" not in str(error):  # JAX has no class for this error
                raise
            raise ValueError(
                f"weight and ids must lie on the devices of the layer's mesh, {dict(self.mesh.shape)}: "
                f"emb.with_weight(table) lays a table out over it, jax.device_put(ids, NamedSharding(emb.mesh, "
                f"PartitionSpec())) ids. JAX says: {error}"
            ) from error

    def _empty(self, shape: tuple[int, ...]) -> jax.Array:
        """Return the empty embedding of no ids."""
        # jit would return empty arrays whose shards have the whole shape, which NumPy refuses.
        spec = PartitionSpec()
        if self.config.reduction == "none":
            shape, spec = (self.config.world_size, *shape), PartitionSpec(self.axis_name)
        elif self.config.reduction == "reduce_scatter":
            spec = PartitionSpec(*[None] * resolve_seq_dim(len(shape), self.config.seq_dim), self.axis_name)
        elif self.config.reduction == "all_to_all":
            spec = PartitionSpec(self.axis_name)
        return jax.device_put(
            np.zeros((*shape, self.config.emb_size), self.weight.dtype), NamedSharding(self.mesh, spec)
        )

    def __repr__(self) -> str:
        weight: Any = self.weight  # transformations put any object here
        if hasattr(weight, "shape") and hasattr(weight, "dtype"):
            weight = f"{weight.dtype}{list(weight.shape)}"
        sizes = f"{self.config.vocab_size}, {self.config.emb_size}, axis_name={self.axis_name!r}"
        changes = "".join(f", {name}={value!r}" for name, value in self.config.changes().items())
        return f"{type(self).__name__}({sizes}, world_size={self.config.world_size}{changes}, weight={weight})"


for _name in ("partition", *OPTIONS):
    setattr(ParallelVocabEmbedding, _name, property(attrgetter(f"config.{_name}"), doc=f"``config.{_name}``."))


def _unpickle(
    cls: type[ParallelVocabEmbedding], config: EmbeddingConfig, mesh: MeshValues, axis_name: str, weight: np.ndarray
) -> ParallelVocabEmbedding:
    static = Static(config, find_mesh(mesh), axis_name)
    return cls.tree_unflatten(static, (weight,)).with_weight(weight)


def _table_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        raise table_dtype_error(dtype) from None
    if resolved not in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        raise table_dtype_error(resolved)
    if jax.dtypes.canonicalize_dtype(resolved) != resolved:
        raise ValueError(f"dtype {resolved} needs JAX's 64-bit mode: set jax_enable_x64, or use float32")
    return resolved
