"""The JAX layer: a vocabulary-parallel embedding laid out over a device mesh."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jax_impl.agreement import check_agreement
from jax_impl.exchange import linear_reduced_lookup, reduced_lookup
from jax_impl.files import array_from_table, write_table
from jax_impl.ids import as_ids, check_ids, check_size_for_int32
from jax_impl.init import draw_table, zero_rows
from jax_impl.lookup import linear_lookup, lookup
from jax_impl.placement import (
    axes_of,
    check_own_ids,
    check_sequence,
    describe_mesh,
    explicit_axes,
    find_mesh,
    free_axes,
    known_split,
    lay_out,
    likely_split,
    resolve_mesh,
    restricted,
    split_further,
)
from shared.agreement import checks_wanted
from shared.bits import DTYPES
from shared.checks import table_dtype_error
from shared.config import OPTIONS, EmbeddingConfig
from shared.sequence import resolve_seq_dim
from shared.tables.find_table import Paths, open_table

__all__ = ["ParallelVocabEmbedding"]


class _Static(NamedTuple):
    """A layer without its table: what jit must know when it compiles."""

    config: EmbeddingConfig
    mesh: Mesh | AbstractMesh
    axis_name: str


@jax.tree_util.register_pytree_with_keys_class
class ParallelVocabEmbedding:
    """An embedding table whose vocabulary is split over the ``world_size`` ranks of a mesh axis.

    Rank r, the r-th position along ``axis_name``, keeps rows ``[r * n, (r + 1) * n)``, ``n = vocab_size // world_size``
    (``padded_vocab_size`` in the place of ``vocab_size`` where there is padding), looks up the ids it owns and returns
    all-zero rows for the others. No two ranks' results have a row in common: their sum is the full embedding;
    ``reduction`` says whether the layer computes it.

    The layer is a pytree whose only leaf is ``weight``: ``jax.jit``, ``jax.grad`` and optimisers take it as it is.

    Args:
        vocab_size: rows of the whole table; must be divisible by the size of the axis, unless it is padded.
        emb_size: columns of the table.
        mesh: a ``jax.sharding.Mesh`` with Auto or Explicit axes, or None for the one set with ``jax.set_mesh``. Inside
            ``jit`` or ``eval_shape`` None finds only the shape of that mesh, and the layer made there is another pytree
            than one made outside: pass the mesh.
        axis_name: the mesh axis over which the vocabulary is split. Over further axes the table is replicated and ids
            stay as they are split.
        init_mean: mean of the initial normal distribution.
        init_std: its standard deviation.
        init_base_seed: rank r's rows are drawn from ``jax.random.key(init_base_seed + r)``. Two layers with the same seed
            begin alike, and seed 42 on rank 1 is seed 43 on rank 0: give each layer a seed of its own, further apart than
            there are ranks.
        dtype: float16, bfloat16, float32, or float64 where JAX's 64-bit mode is on.
        reduction: ``"none"``, each rank's own incomplete embedding ``Er`` is returned, without communication;
            ``"all_reduce"``, the embedding ``E`` on every rank; ``"reduce_scatter"``, ``E`` split along the sequence;
            ``"all_to_all"``, the rows of each rank's own ids: the first dimension of the ids is split over ``axis_name``,
            and the result likewise.
        exchange: how rows travel: ``"dense"``, by the collective that adds incomplete embeddings up; ``"routed"``, for
            ``"reduce_scatter"`` each distinct row straight from its owner to who needs it, or dense where a rank needs
            more distinct rows of one owner than half of its chunk has tokens; ``"auto"``, dense. The embeddings are equal
            in every bit; sums in gradients may be added in another order. ``"all_reduce"`` has only the dense form, and
            16-bit gradients travel densely.
        invalid_ids: what ids outside ``[0, vocab_size)``, negative ones included, give: ``"zero"``, a zero row on every
            rank; ``"error"``, an IndexError, or inside ``jit`` an error of ``jax.experimental.checkify``, which the
            caller must then apply.
        padding_idx: a global id whose row starts as zero and gets no gradient from lookups.
        padded_vocab_size: rows with those of padding, which the size of the axis divides, or ``"even"`` for the least such
            size (``shared.pad_vocab_size`` finds others); at most ``2**31 - 1``, and one less on one rank. Padding comes
            last. It is zero, belongs to no id, gets no gradient from lookups and is never written to a file. A tied head of
            the caller's own gives it a gradient: ``zero_padding_grad`` removes that. Left out, there is no padding.
        init: ``"per_rank"``, as described above; ``"global"``, row i of the table is a function of ``init_base_seed`` and
            i alone, the same bits in both frameworks, on any mesh, with any padding; computed on the host. A callable is
            traced, and given the numbers ``[n]`` of the rows that a device holds, int32; it returns those rows,
            ``[n, emb_size]``: there is never a whole table, and each device makes its own part. For rows of padding it is
            asked for the last row once more. None makes zeros, to be replaced by what is loaded. In both cases padding and
            the row of ``padding_idx`` are zero, and ``init_mean``, ``init_std`` and ``init_base_seed`` are not used.
        seq_dim: the dimension of the ids that ``"reduce_scatter"`` splits: the last one; 0 for ids of ``[s, b]``.
        check: where there are several processes, have them compare what they are about to compute, and raise in all of
            them if they disagree: sizes and options whenever something is traced, the ids' values too outside ``jit``.
            The environment variable ``PVE_CHECK=1`` does the same.
        key: a JAX random key in the place of ``init_base_seed``, as Equinox modules take it: rank r's rows are drawn from
            ``jax.random.fold_in(key, r)``.

    Attributes:
        weight: ``jax.Array`` of shape ``[padded_vocab_size, emb_size]``, sharded ``PartitionSpec(axis_name, None)``.
        config: the ``shared.EmbeddingConfig``: all options, each of them an attribute of the layer too.
        partition: the ``shared.VocabPartition``, who owns what.
        mesh, axis_name: where the table lies.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range; ``vocab_size`` is not divisible by the size of the axis and not padded;
            the mesh has no such axis, or there is none.

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

    weight: jax.Array
    config: EmbeddingConfig
    mesh: Mesh | AbstractMesh
    axis_name: str

    def __init__(
        self,
        vocab_size: int,
        emb_size: int,
        mesh: Mesh | AbstractMesh | None = None,
        axis_name: str = "tp",
        init_mean: float = 0.0,
        init_std: float = 1.0,
        init_base_seed: int = 42,
        dtype: Any = jnp.float32,
        *,
        reduction: str = "none",
        exchange: str = "auto",
        invalid_ids: str = "zero",
        padding_idx: int | None = None,
        padded_vocab_size: int | str | None = None,
        init: Callable[[jax.Array], Any] | str | None = "per_rank",
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
                f"key takes the place of init_base_seed and goes with init='per_rank' only, got "
                f"init_base_seed={init_base_seed!r} and init={init!r}: leave these two out, or key"
            )
        rows = draw_table(self.config, self.mesh, axis_name, _table_dtype(dtype), key)
        # Named as the contract has it: jit drops axes of size 1 from the sharding of what it returns.
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
        """Build a layer without a table: its shape, dtype and sharding only.

        Nothing is allocated or drawn. Orbax restores a checkpoint into it, ``jax.jit(...).lower`` compiles for it, and
        ``with_weight`` makes a layer of it.

        Args:
            vocab_size, emb_size, mesh, axis_name: as for the class.
            *arguments, **options: what else the class takes.

        Returns:
            The layer, with a ``jax.ShapeDtypeStruct`` for ``weight``.

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: an argument is out of range.

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

    @classmethod
    def from_table(
        cls,
        path: Paths,
        tensor_name: str | None = None,
        mesh: Mesh | None = None,
        axis_name: str = "tp",
        *,
        vocab_size: int | None = None,
        dtype: Any = None,
        **options: Any,
    ) -> Self:
        """A layer with a table from files, of which each process reads the rows of its own devices and no others.

        Args:
            path: a safetensors file, a Hugging Face ``*.index.json``, a folder that holds one of these, or Megatron-style
                parts (see ``shared.tables.find_table.open_table``).
            tensor_name: the tensor; left out, the one that looks like an input embedding.
            mesh, axis_name: as for the class.
            vocab_size: the rows that are not padding, which only Megatron-style parts do not tell.
            dtype: what to cast the rows to, rounding once; left out, the dtype they are stored in, which must then be one
                that a layer can have (float8 is not).
            **options: what else the class takes by name: ``padded_vocab_size`` where the axis does not divide the
                vocabulary, ``reduction`` and so on.

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: there is no such table, the choice is not clear, a file is damaged, or an argument is out of range.

        A damaged or hostile file is refused; nothing is ever unpickled. Source: the safetensors format.

        Example:
            >>> import tempfile, jax, numpy as np
            >>> from safetensors.numpy import save_file
            >>> from jax_impl import ParallelVocabEmbedding
            >>> folder = tempfile.mkdtemp()
            >>> table = np.arange(20.0, dtype=np.float32).reshape(10, 2)
            >>> save_file({"model.embed_tokens.weight": table}, f"{folder}/model.safetensors")
            >>> mesh = jax.make_mesh((jax.device_count(),), ("tp",))
            >>> emb = ParallelVocabEmbedding.from_table(folder, mesh=mesh, padded_vocab_size="even")
            >>> bool((np.asarray(emb.weight)[:10] == table).all())
            True
        """
        table = open_table(path, tensor_name, vocab_size)
        if dtype is None:
            if table.dtype not in DTYPES:
                raise ValueError(f"dtype must say what to cast a table of {table.dtype} to, such as jnp.bfloat16")
            dtype = DTYPES[table.dtype]
        mesh = resolve_mesh(mesh, axis_name)  # type: ignore[assignment]
        if not isinstance(mesh, Mesh):
            raise ValueError("mesh must be one of devices, to read a table onto; inside jit there is only its shape")
        empty = cls.abstract(table.vocab_size, table.emb_size, mesh, axis_name, dtype=dtype, **options)
        weight = array_from_table(table, empty.config.partition, empty._sharding, empty.weight.dtype)
        return jax.tree.unflatten(jax.tree.structure(empty), [weight])

    @classmethod
    def from_embedding(cls, table: Any, mesh: Mesh | None = None, axis_name: str = "tp", **options: Any) -> Self:
        """Build a layer from a whole table in memory.

        Args:
            table: ``[v, e]``, from JAX or NumPy, of a dtype that a layer can have.
            mesh, axis_name: as for the class.
            **options: what else the class takes by name: ``padded_vocab_size`` where the axis does not divide the
                vocabulary, ``reduction`` and so on.

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: ``table`` is not of two dimensions, or an argument is out of range.

        Example:
            >>> import jax, numpy as np
            >>> from jax_impl import ParallelVocabEmbedding
            >>> table = np.arange(20.0, dtype=np.float32).reshape(10, 2)
            >>> mesh = jax.make_mesh((jax.device_count(),), ("tp",))
            >>> emb = ParallelVocabEmbedding.from_embedding(table, mesh, padded_vocab_size="even")
            >>> bool((np.asarray(emb.weight)[:10] == table).all())
            True
        """
        if not isinstance(table, (jax.Array, np.ndarray)):
            raise TypeError(f"table must be a JAX or NumPy array, got {type(table).__name__}")
        if table.ndim != 2:
            raise ValueError(f"table must be [v, e], got {list(table.shape)}")
        empty = cls.abstract(*table.shape, mesh, axis_name, dtype=table.dtype, **options)
        if rows := empty.config.partition.padding_rows:
            table = (np if isinstance(table, np.ndarray) else jnp).pad(table, ((0, rows), (0, 0)))
        return jax.tree.unflatten(jax.tree.structure(empty), [jax.device_put(table, empty._sharding)])

    def save_table(self, path: str | Path, tensor_name: str = "embed_tokens.weight", *, force: bool = False) -> None:
        """Write the table to one new safetensors file: each process the rows of its devices, without padding.

        All processes call this. Rows are read back after writing. The file appears whole or not at all; an old one stays
        until then. The temporary file of a killed process, ``.NAME.*.tmp``, stays beside it.

        Args:
            path: the file, which ends in ``.safetensors``. All processes must see its folder.
            tensor_name: what to call the tensor.
            force: replace what is there.

        Raises:
            ValueError: in every process: the path exists and ``force`` is not given, or it cannot be written.

        Example:
            >>> import tempfile, jax
            >>> from jax_impl import ParallelVocabEmbedding
            >>> mesh = jax.make_mesh((jax.device_count(),), ("tp",))
            >>> emb = ParallelVocabEmbedding(10, 4, mesh, padded_vocab_size="even")
            >>> path = f"{tempfile.mkdtemp()}/table.safetensors"
            >>> emb.save_table(path)
            >>> again = ParallelVocabEmbedding.from_table(path, mesh=mesh, padded_vocab_size="even")
            >>> bool((again.weight == emb.weight).all())
            True
        """
        if not isinstance(self.weight, jax.Array) or isinstance(self.weight, jax.core.Tracer):
            raise ValueError(f"the table must be an array to be saved, outside jit, got {type(self.weight).__name__}")
        write_table(self.weight, self.config.partition, path, tensor_name, force)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any]], _Static]:
        leaf = (jax.tree_util.GetAttrKey("weight"), self.weight)
        return (leaf,), _Static(self.config, self.mesh, self.axis_name)

    @classmethod
    def tree_unflatten(cls, static: _Static, leaves: tuple[Any]) -> Self:
        self = object.__new__(cls)
        self.config, self.mesh, self.axis_name = static
        (self.weight,) = leaves
        return self

    def __copy__(self) -> Self:
        return jax.tree.map(lambda leaf: leaf, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return jax.tree.map(lambda leaf: copy.deepcopy(leaf, memo), self)

    def __reduce__(self) -> tuple[Any, ...]:
        """How pickle takes a layer apart: it cannot pickle devices, and a pickled ``jax.Array`` forgets its sharding."""
        held = isinstance(self.weight, jax.Array) and not isinstance(self.weight, jax.core.Tracer)
        if not held or not self.weight.is_fully_addressable or not isinstance(self.mesh, Mesh):
            raise TypeError(
                "only a layer with a table on a mesh of this process's devices can be pickled: keep others with Orbax "
                "(see jax_impl.restore_args) or emb.save_table(path)"
            )
        mesh = describe_mesh(self.mesh)
        return _unpickle, (type(self), self.config, mesh, self.axis_name, np.asarray(self.weight))

    @property
    def _sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(self.axis_name, None))

    def with_weight(self, weight: Any) -> ParallelVocabEmbedding:
        """Return this layer with another table.

        Args:
            weight: ``[padded_vocab_size, emb_size]`` in the table's dtype, from JAX or NumPy; laid out as the layer needs
                it.

        Raises:
            ValueError: its shape or dtype is another.
        """
        given, own = (tuple(weight.shape), np.dtype(weight.dtype)), (self.weight.shape, self.weight.dtype)
        if given != own:
            raise ValueError(f"weight must have shape {own[0]} and dtype {own[1]}, got {given[0]} and {given[1]}")
        return jax.tree.unflatten(jax.tree.structure(self), [jax.device_put(weight, self._sharding)])

    def zero_padding_grad(self, grads: ParallelVocabEmbedding) -> ParallelVocabEmbedding:
        """Return gradients of the layer with zeros for padding rows.

        Lookups give padding rows no gradient. Whatever else uses the whole ``weight`` does, such as a tied head that
        computes ``hidden @ emb.weight.T``. Where there is one, pass gradients through this before they are clipped and the
        optimizer sees them: padding then stays zero. The row of ``padding_idx`` keeps what a head gives it.

        Args:
            grads: a pytree like the layer, as ``jax.grad`` returns it; it is not modified.

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

    def __call__(self, ids: Any, *, key: Any = None) -> jax.Array:
        """Look ids up.

        Args:
            ids: global ids, any shape, any integer dtype, from JAX or NumPy; not modified. Every rank of ``axis_name``
                needs all of them; over further mesh axes they may be split.
            key: ignored. Equinox's containers pass a random key to every layer.

        Returns:
            In the table's dtype, split over further axes as the ids are: with ``reduction="none"``
            ``[world_size, *ids.shape, emb_size]`` sharded ``PartitionSpec(axis_name)``, of which element r is rank r's
            incomplete embedding ``Er``; with ``"all_reduce"`` the embedding, ``[*ids.shape, emb_size]``, on every rank;
            with ``"reduce_scatter"`` the same, its dimension ``seq_dim`` split over ``axis_name``; with ``"all_to_all"`` the
            same, its first dimension split. Rows are copied bit
            for bit; only where an accelerator adds for a reduction, a subnormal number may become zero and a NaN another.

        Raises:
            TypeError: ids are not an array of integers.
            IndexError: with ``invalid_ids="error"``, naming the first id outside the vocabulary, its position and the
                legal range.
            ValueError: called inside a shard_map that is manual over ``axis_name``; the table is of another shape, or it
                or the ids lie on other devices than the mesh; with ``"reduce_scatter"``, the sequence is not divisible by
                ``world_size``; with ``check``, the processes disagree.
        """
        config = self.config
        free_axes(self.mesh, self.axis_name)  # in the caller's own shard_map the table is a rank's part: say so first
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
            return _lookup(_Static(config, self.mesh, self.axis_name), split, self.weight, ids)
        except ValueError as error:
            if "incompatible devices" not in str(error):  # JAX has no class of its own for it
                raise
            raise ValueError(
                f"weight and ids must lie on the devices of the layer's mesh, {dict(self.mesh.shape)}: "
                f"emb.with_weight(table) lays a table out over it, jax.device_put(ids, NamedSharding(emb.mesh, "
                f"PartitionSpec())) ids. JAX says: {error}"
            ) from error

    def _empty(self, shape: tuple[int, ...]) -> jax.Array:
        """The result of no ids: jit returns empty arrays whose shards have the whole shape, which NumPy then refuses."""
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
        weight: Any = self.weight  # inside a transformation, anything may stand here
        if hasattr(weight, "shape") and hasattr(weight, "dtype"):
            weight = f"{weight.dtype}{list(weight.shape)}"
        sizes = f"{self.config.vocab_size}, {self.config.emb_size}, axis_name={self.axis_name!r}"
        changes = "".join(f", {name}={value!r}" for name, value in self.config.changes().items())
        return f"{type(self).__name__}({sizes}, world_size={self.config.world_size}{changes}, weight={weight})"


for _name in ("partition", *OPTIONS):
    setattr(ParallelVocabEmbedding, _name, property(attrgetter(f"config.{_name}"), doc=f"``config.{_name}``."))


def _unpickle(
    cls: type[ParallelVocabEmbedding], config: EmbeddingConfig, mesh: Any, axis_name: str, weight: np.ndarray
) -> ParallelVocabEmbedding:
    static = _Static(config, find_mesh(mesh), axis_name)
    return cls.tree_unflatten(static, (weight,)).with_weight(weight)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _lookup(
    static: _Static,
    split: PartitionSpec,
    weight: jax.Array,
    ids: jax.Array,
) -> jax.Array:
    """The layer's lookup; ``split`` is how the ids are known to be split over axes of the mesh."""
    if static.config.reduction in ("reduce_scatter", "all_to_all"):
        split = likely_split(ids, split, static.mesh, static.axis_name, static.config)
    return _hidden_from_checkify(static, split, False, weight, ids)


@_lookup.defjvp
def _(
    static: _Static,
    split: PartitionSpec,
    primals: Any,
    tangents: Any,
) -> tuple[jax.Array, jax.Array]:
    weight, ids = primals
    likely = likely_split(ids, split, static.mesh, static.axis_name, static.config)
    tangent = _hidden_from_checkify(static, likely, True, tangents[0], ids)
    return _lookup(static, split, weight, ids), tangent


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _on_each_rank(
    static: _Static,
    split: PartitionSpec,
    linear: bool,
    weight: jax.Array,
    ids: jax.Array,
) -> jax.Array:
    """The ranks' lookups under one shard_map, or, ``linear``, what JAX transposes."""
    config, mesh, axis_name = static
    free = free_axes(mesh, axis_name)
    manual = free & (explicit_axes(mesh) | axes_of(split)) | {axis_name}
    rows, tokens = PartitionSpec(axis_name, None), restricted(split, manual - {axis_name})
    if config.reduction == "all_to_all":  # each rank's own lie one after the other along the first dimension
        tokens = PartitionSpec(*split_further(tokens, ids.ndim, 0, axis_name)[: ids.ndim])

    def on_each_rank(weight: jax.Array, ids: jax.Array) -> jax.Array:
        if config.reduction == "none":
            return (linear_lookup if linear else lookup)(weight, ids, config, axis_name)[None]
        return (linear_reduced_lookup if linear else reduced_lookup)(weight, ids, config, axis_name)

    if config.reduction == "none":
        output = PartitionSpec(axis_name, *tokens, None)
    elif config.reduction in ("all_reduce", "all_to_all"):
        output = PartitionSpec(*tokens, None)
    else:
        output = split_further(tokens, ids.ndim, config.seq_dim, axis_name)
    mapped = jax.shard_map(
        on_each_rank,
        mesh=mesh if free == set(mesh.axis_names) else None,
        in_specs=(rows, tokens),
        out_specs=output,
        axis_names=manual,
    )
    return mapped(lay_out(weight, mesh, rows), lay_out(ids, mesh, tokens))


def _hidden_from_checkify(
    static: _Static,
    split: PartitionSpec,
    linear: bool,
    weight: jax.Array,
    ids: jax.Array,
) -> jax.Array:
    """``_on_each_rank``, behind an operation that checkify does not open where it may be in use.

    checkify rewrites a shard_map that it finds, even one without checks, and fails to where a mesh is set or has further
    axes (jax 0.10.2). linear_call has derivatives of any order, but no vmap.
    """
    config, run = static.config, functools.partial(_on_each_rank, static, split, linear)
    if config.invalid_ids != "error" or not isinstance(ids, jax.core.Tracer):
        return run(weight, ids)

    def transpose(ids: jax.Array, cotangent: jax.Array) -> jax.Array:
        table = jax.ShapeDtypeStruct((config.padded_vocab_size, config.emb_size), cotangent.dtype)
        return jax.linear_transpose(lambda weight: run(weight, ids), table)(cotangent)[0]

    return jax.custom_derivatives.linear_call(lambda ids, weight: run(weight, ids), transpose, ids, weight)


def _table_dtype(dtype: Any) -> np.dtype[Any]:
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        raise table_dtype_error(dtype) from None
    if resolved not in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        raise table_dtype_error(resolved)
    if jax.dtypes.canonicalize_dtype(resolved) != resolved:
        raise ValueError(f"dtype {resolved} needs JAX's 64-bit mode: set jax_enable_x64, or use float32")
    return resolved
