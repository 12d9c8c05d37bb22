"""Flax NNX: a replacement for ``flax.nnx.Embed``."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_impl.placement import explicit_axes, lay_out
from jax_impl.vocab_emb import ParallelVocabEmbedding

try:
    from flax import nnx
    from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
except ImportError as error:
    raise ImportError("jax_impl.adapters.nnx needs Flax: pip install flax") from error

__all__ = ["Embed"]

_FLAXS_INIT = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
_DRAWN_ELSEWHERE = {"init", "init_mean", "init_std", "init_base_seed", "key", "dtype"}


class Embed(nnx.Embed):
    """``flax.nnx.Embed`` with its vocabulary split over a mesh axis.

    ``embedding`` is an ``nnx.Param`` with its sharding as metadata: ``nnx.split``, ``nnx.jit``, ``nnx.grad``,
    ``nnx.Optimizer`` and Orbax treat it as any other. For equal ``rngs``, rows and results equal those of ``nnx.Embed``
    bit for bit.

    Args:
        num_embeddings: rows of the whole table, divisible by the size of the axis unless padded.
        features: columns of the table.
        dtype: of the result. None: that of the table.
        param_dtype: of the table: float16, bfloat16, float32, or float64 in JAX's 64-bit mode.
        embedding_init: an initializer as in ``jax.nn.initializers``. It runs under ``jit`` with a sharded result: no device
            holds the whole table. Padding rows and the row of ``padding_idx`` become zero.
        promote_dtype: casts the looked-up rows to ``dtype``, or the query and the table in ``attend``.
        rngs: source of the key for ``embedding_init``.
        embedding_metadata: metadata of the ``nnx.Param``. An ``out_sharding`` with logical axes replaces
            ``(axis_name, None)``.
        mesh, axis_name: as for ``ParallelVocabEmbedding``.
        reduction: as for ``ParallelVocabEmbedding``. ``"all_reduce"`` returns what ``nnx.Embed`` does.
        **options: further options of ``ParallelVocabEmbedding``, such as ``padded_vocab_size="even"``, ``padding_idx`` or
            ``invalid_ids``; not ``init``, ``init_*``, ``key`` or ``dtype``.

    Attributes:
        embedding: the ``nnx.Param`` with the table, ``[padded_vocab_size, features]``.

    Raises:
        ImportError: Flax is not installed (on import of this module).
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or an option would draw the table.

    Source: ``flax.nnx.Embed``.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> from jax_impl.adapters.nnx import Embed
        >>> mesh = jax.make_mesh((jax.device_count(),), ("tp",), (jax.sharding.AxisType.Auto,))
        >>> embed = Embed(10, 4, rngs=nnx.Rngs(0), mesh=mesh, padded_vocab_size="even")
        >>> optimizer = nnx.Optimizer(embed, optax.adam(0.1), wrt=nnx.Param)
        >>> @nnx.jit
        ... def train(embed, optimizer, ids):
        ...     loss, gradient = nnx.value_and_grad(lambda embed: (embed(ids) ** 2).sum())(embed)
        ...     optimizer.update(embed, gradient)
        ...     return loss
        >>> ids = jnp.arange(10)
        >>> bool(train(embed, optimizer, ids) > train(embed, optimizer, ids))
        True
        >>> nnx.get_partition_spec(nnx.state(embed))["embedding"].get_value() == jax.sharding.PartitionSpec("tp", None)
        True
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        embedding_init: Callable[..., jax.Array] = _FLAXS_INIT,
        promote_dtype: Callable[..., Any] = flax_promote_dtype,
        rngs: nnx.Rngs,
        embedding_metadata: Mapping[str, Any] = MappingProxyType({}),
        mesh: Mesh | AbstractMesh | None = None,
        axis_name: str = "tp",
        reduction: str = "all_reduce",
        **options: Any,
    ) -> None:
        if given := sorted(_DRAWN_ELSEWHERE & set(options)):
            raise ValueError(
                f"options must not draw the table, got {', '.join(given)}: use embedding_init and param_dtype"
            )
        options |= {"dtype": param_dtype, "reduction": reduction}
        empty = ParallelVocabEmbedding.abstract(num_embeddings, features, mesh, axis_name, **options)
        self.layout = jax.tree.structure(empty)

        def draw(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
            def rows(key: jax.Array) -> jax.Array:
                table = embedding_init(key, shape, dtype)
                if empty.config.padding_idx is not None:
                    table = jnp.where(
                        jnp.arange(shape[0])[:, None] == empty.config.padding_idx, jnp.zeros((), dtype), table
                    )
                return jnp.pad(table, ((0, empty.config.partition.padding_rows), (0, 0)))

            return jax.jit(rows, out_shardings=empty.weight.sharding)(key)

        super().__init__(
            num_embeddings,
            features,
            dtype=dtype,
            param_dtype=param_dtype,
            embedding_init=draw,
            promote_dtype=promote_dtype,
            rngs=rngs,
            embedding_metadata={
                "out_sharding": (axis_name, None),
                "mesh": empty.mesh,
                "vocab_layout": self.layout,  # jax_impl.restore_args finds tables and their moments by it
                **embedding_metadata,
            },
        )

    @property
    def layer(self) -> ParallelVocabEmbedding:
        """The ``ParallelVocabEmbedding`` with the current table, for ``save_table`` for example."""
        return jax.tree.unflatten(self.layout, [self.embedding[...]])

    def __call__(self, inputs: ArrayLike, out_sharding: NamedSharding | PartitionSpec | None = None) -> jax.Array:
        """Look ids up as ``ParallelVocabEmbedding`` does.

        Args:
            inputs: ids, any shape, any integer dtype.
            out_sharding: sharding of the result over Explicit axes of the mesh. None: as the layer returns it.

        Returns:
            ``[*inputs.shape, features]`` in ``dtype`` (``reduction="none"``: with a leading dimension of ranks).

        Raises:
            TypeError, IndexError, ValueError: as ``ParallelVocabEmbedding`` does.
        """
        layer = self.layer
        (rows,) = self.promote_dtype((layer(inputs),), dtype=self.dtype, inexact=False)
        spec = out_sharding.spec if isinstance(out_sharding, NamedSharding) else out_sharding
        return rows if spec is None else lay_out(rows, layer.mesh, spec)

    def attend(self, query: jax.Array, out_sharding: NamedSharding | PartitionSpec | None = None) -> jax.Array:
        """Compute logits, the products of ``query`` with all rows.

        Args:
            query: ``[..., features]``.
            out_sharding: as in ``nnx.Embed.attend``.

        Returns:
            ``[..., num_embeddings]``, split over ``axis_name`` unless the table is padded. Padding rows get no gradient.

        Raises:
            ValueError: the table is padded and the axis is Explicit.
        """
        layer = self.layer
        if not layer.config.partition.padding_rows:
            return super().attend(query, out_sharding)
        if layer.axis_name in explicit_axes(layer.mesh):
            raise ValueError(
                f"num_embeddings must be divisible by {layer.config.world_size}, the size of the Explicit axis "
                f"{layer.axis_name!r}, for attend, got {self.num_embeddings}: use an Auto mesh, or multiply by embedding "
                f"and mask padding"
            )
        return super().attend(query, out_sharding)[..., : self.num_embeddings]
