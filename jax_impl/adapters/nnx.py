"""Flax NNX: the layer in the place of ``flax.nnx.Embed``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

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

    ``embedding`` is an ``nnx.Param`` that says how it is sharded, so ``nnx.split``, ``nnx.jit``, ``nnx.grad``,
    ``nnx.Optimizer`` and Orbax treat it as any other. Drawn with the same ``rngs``, its rows are those of ``nnx.Embed``,
    bit for bit, and so are the results.

    Args:
        num_embeddings: rows of the whole table; must be divisible by the size of the axis, unless it is padded.
        features: columns of the table.
        dtype: of the result; None: that of the table.
        param_dtype: of the table: float16, bfloat16, float32, or float64 where JAX's 64-bit mode is on.
        embedding_init: an initializer of ``jax.nn.initializers``' kind. It runs under ``jit`` with its result sharded: no
            device holds the whole table. Padding rows and that of ``padding_idx`` become zero.
        promote_dtype: casts the looked-up rows to ``dtype``, or the query and the table in ``attend``.
        rngs: where the key of ``embedding_init`` comes from.
        embedding_metadata: metadata for the ``nnx.Param``. An ``out_sharding`` with logical axes takes the place of
            ``(axis_name, None)``.
        mesh, axis_name: as for ``ParallelVocabEmbedding``.
        reduction: what a call returns: ``"all_reduce"``, the embedding, as ``nnx.Embed`` does; ``"reduce_scatter"`` and
            ``"none"`` as for ``ParallelVocabEmbedding``.
        **options: what else ``ParallelVocabEmbedding`` takes, such as ``padded_vocab_size="even"``, ``padding_idx`` or
            ``invalid_ids``; nothing that draws a table.

    Attributes:
        embedding: the ``nnx.Param`` with the table, ``[padded_vocab_size, features]``.

    Raises:
        ImportError: Flax is not installed (on import of this module).
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range, or an option that draws a table is given.

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
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        embedding_init: Callable[..., Any] = _FLAXS_INIT,
        promote_dtype: Callable[..., Any] = flax_promote_dtype,
        rngs: nnx.Rngs,
        embedding_metadata: Mapping[str, Any] = MappingProxyType({}),
        mesh: Mesh | AbstractMesh | None = None,
        axis_name: str = "tp",
        reduction: str = "all_reduce",
        **options: Any,
    ) -> None:
        if given := sorted(_DRAWN_ELSEWHERE & set(options)):
            raise ValueError(f"embedding_init and param_dtype say how the table is drawn: leave {', '.join(given)} out")
        options |= {"dtype": param_dtype, "reduction": reduction}
        empty = ParallelVocabEmbedding.abstract(num_embeddings, features, mesh, axis_name, **options)
        self.layout = jax.tree.structure(empty)

        def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
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
        """The layer with the present table, for ``save_table`` and what else it has."""
        return jax.tree.unflatten(self.layout, [self.embedding[...]])

    def __call__(self, inputs: Any, out_sharding: Any = None) -> jax.Array:
        """Look ids up; see ``ParallelVocabEmbedding``.

        Args:
            inputs: ids, any shape, any integer dtype.
            out_sharding: a layout of the result over Explicit axes of the mesh; None: as the layer returns it.

        Returns:
            ``[*inputs.shape, features]`` in ``dtype`` (``reduction="none"``: with a leading dimension of ranks).

        Raises:
            TypeError, IndexError, ValueError: as the layer does.
        """
        layer = self.layer
        (rows,) = self.promote_dtype((layer(inputs),), dtype=self.dtype, inexact=False)
        return rows if out_sharding is None else lay_out(rows, layer.mesh, getattr(out_sharding, "spec", out_sharding))

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Compute logits, the products of ``query`` with every row of the table.

        Args:
            query: ``[..., features]``.
            out_sharding: as in ``nnx.Embed.attend``.

        Returns:
            ``[..., num_embeddings]``, split over ``axis_name`` where no padding is cut off. Padding rows get no gradient.

        Raises:
            ValueError: the table is padded and the axis is Explicit: the logits without padding do not divide by it.
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
