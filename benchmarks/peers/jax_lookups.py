"""Lookups as JAX and its other libraries do them, each a function of a table and ids."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["Lookup", "fill", "flax_embed", "one_hot", "take"]

Lookup = Callable[[Any, Any], Any]


def flax_embed(case: Any) -> Lookup:
    """``flax.nnx.Embed`` of the case's size and dtype."""
    from flax import nnx

    empty = nnx.eval_shape(
        lambda: nnx.Embed(case.vocab_size, case.emb_size, dtype=case.dtype, param_dtype=case.dtype, rngs=nnx.Rngs(0))
    )
    definition, state = nnx.split(empty)
    return lambda weight, ids: nnx.merge(definition, jax.tree.map(lambda _: weight, state))(ids)


def one_hot(weight: Any, ids: Any) -> Any:
    """A product of one-hot rows with the table, as in MaxText."""
    return jax.nn.one_hot(ids, len(weight), dtype=weight.dtype) @ weight


def take(weight: Any, ids: Any) -> Any:
    """``jnp.take``, which the compiler splits as the table is split."""
    return jnp.take(weight, ids, axis=0)


def fill(weight: Any, ids: Any) -> Any:
    """A gather of a rank's rows that masks foreign ids itself."""
    local = ids - jax.lax.axis_index("tp") * len(weight)
    return weight.at[local].get(mode="fill", fill_value=0, wrap_negative_indices=False)
