"""Logits of one rank's columns, and the block products of the head.

Everything runs inside a shard_map. Products and sums are float32, or float64 for float64 tables; results are rounded once.
Shape suffixes: T tokens, K chunks of C tokens, E hidden columns, N rows of the rank's table, B columns of a block.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_impl.functional import check_rows, check_same_on_ranks
from jax_impl.private_api import all_gather_invarying, varying_axes
from shared.head import ColumnBlocks, check_hidden, check_softcap, logits_dtype_error
from shared.partition import VocabPartition

__all__ = [
    "TOKENS_AT_ONCE",
    "Block",
    "Plan",
    "backward_products",
    "block_edges",
    "block_of",
    "check_products",
    "gather_sequence",
    "logits_block",
    "logits_on_rank",
    "owned_columns",
    "parallel_logits",
    "part_of",
    "rows_of",
    "split_tokens",
    "vary",
    "wide_dtype",
]

TOKENS_AT_ONCE = 1024
"""Most tokens of a chunk: with a block's 1024 columns in float32 it takes 4 MiB."""


class Plan(NamedTuple):
    """Static arguments of a computation.

    Attributes:
        partition: ownership of the columns.
        axis_name: the mesh axis of the ranks.
        softcap: bounds logits to ``softcap * tanh(logits / softcap)``. None: no bound.
        split_dim: the dimension along which hidden states are split over ranks. None: they are the same on all ranks.
    """

    partition: VocabPartition
    axis_name: str
    softcap: float | None = None
    split_dim: int | None = None


class Block(NamedTuple):
    """A block of the rank's columns.

    All blocks are equally wide: a narrower one begins with columns of the previous block. Blocks are written in reverse
    order, so that the previous block overwrites these.

    Attributes:
        at: first column.
        columns_B: column numbers.
        owned_B: False for columns of the previous block, and for padding.
    """

    at: jax.Array
    columns_B: jax.Array
    owned_B: jax.Array


def parallel_logits(
    hidden: jax.Array,
    weight: jax.Array,
    partition: VocabPartition,
    axis_name: str = "tp",
    *,
    softcap: float | None = None,
) -> jax.Array:
    """Compute the logits of the rank's own columns.

    Call it inside a ``jax.shard_map`` that is manual over ``axis_name``. The position along that axis is the rank.

    Args:
        hidden: hidden states, ``[*, emb_size]``, the same on all ranks.
        weight: the rank's rows, ``[partition.rows_per_rank, emb_size]``, in the dtype of ``hidden``.
        partition: ownership of the rows; its ``world_size`` is the size of the axis.
        axis_name: the mesh axis that splits the vocabulary.
        softcap: bounds logits to ``softcap * tanh(logits / softcap)``. None: no bound.

    Returns:
        ``[*, partition.rows_per_rank]``, float32 (float64 for float64 inputs), varying over ``axis_name``. Padding columns
        are -inf.

    Forward has no communication. The gradient of ``hidden`` is summed over the ranks once, in float32; that of ``weight`` is
    local. Products use fixed blocks of columns (``shared.head.ColumnBlocks``), so they do not depend on the number of ranks.
    On accelerators they have the precision of ``jax.default_matmul_precision``. Reverse mode only.

    Raises:
        TypeError: the dtypes are not floating, or differ.
        ValueError: a shape does not fit, the axis does not have ``partition.world_size`` ranks, ``hidden`` varies over it,
            or ``softcap`` is out of range.

    Source: the parallel output layer of Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053); softcap: Gemma 2 (2024,
    arXiv:2408.00118).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jax.sharding import PartitionSpec as P
        >>> from jax_impl import parallel_logits
        >>> from shared import VocabPartition
        >>> mesh = jax.make_mesh((1,), ("tp",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
        >>> partition = VocabPartition(vocab_size=3, world_size=1, padded_vocab_size=4)
        >>> def logits(hidden, weight):
        ...     return parallel_logits(hidden, weight, partition, "tp")
        >>> logits = jax.shard_map(logits, mesh=mesh, in_specs=(P(), P("tp", None)), out_specs=P(None, "tp"))
        >>> jax.jit(logits)(jnp.ones((1, 2)), jnp.arange(8.0).reshape(4, 2))
        Array([[  1.,   5.,   9., -inf]], dtype=float32)
    """
    plan = Plan(partition, axis_name, check_softcap(softcap))
    check_products(hidden, weight, plan)
    return logits_on_rank(hidden, weight, plan)


def check_products(hidden: jax.Array, weight: jax.Array, plan: Plan) -> None:
    """Validate dtypes, shapes and varying axes of hidden states and rows."""
    check_rows(weight, plan.partition, plan.axis_name)
    if hidden.dtype != weight.dtype:
        raise logits_dtype_error("hidden", hidden.dtype, f"of the weight's dtype {weight.dtype}")
    check_hidden(hidden.shape, weight.shape, plan.partition.rows_per_rank)
    if plan.split_dim is None:
        check_same_on_ranks("hidden", hidden, plan.axis_name)


def wide_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """Dtype of products and sums."""
    return jnp.promote_types(dtype, jnp.float32)


def vary(array: jax.Array, *others: jax.Array | str) -> jax.Array:
    """Mark an array as varying over axis names and other arrays' axes."""
    axes = frozenset[str]().union(*[{each} if isinstance(each, str) else varying_axes(each) for each in others])
    missing = tuple(sorted(axes - varying_axes(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def gather_sequence(hidden: jax.Array, plan: Plan) -> jax.Array:
    """Hidden states of all tokens, gathered if they are split."""
    if plan.split_dim is None:
        return hidden
    return jax.lax.all_gather(hidden, plan.axis_name, axis=plan.split_dim, tiled=True)


def split_tokens(array: jax.Array, ndim: int) -> jax.Array:
    """Reshape the first ``ndim`` dimensions to ``[K, C]``, padded with zeros."""
    shape = array.shape[ndim:]
    tokens = int(np.prod(array.shape[:ndim]))
    chunks = max(1, -(-tokens // TOKENS_AT_ONCE))
    size = -(-tokens // chunks)
    array_T = array.reshape(tokens, *shape)
    if more := chunks * size - tokens:
        array_T = jnp.pad(array_T, [(0, more), *[(0, 0)] * len(shape)])
    return array_T.reshape(chunks, size, *shape)


def block_edges(partition: VocabPartition) -> np.ndarray:
    """First column of each block and one past the last: ``[blocks, 2]``."""
    ranges = ColumnBlocks.of(partition).ranges(partition.rows_per_rank)
    return np.array([edges for group in ranges for edges in group], np.int32)


def owned_columns(plan: Plan) -> jax.Array:
    """Number of the rank's columns without padding; may be negative."""
    return plan.partition.vocab_size - plan.partition.start(jax.lax.axis_index(plan.axis_name))


def block_of(edges: jax.Array, plan: Plan) -> Block:
    """Block with these edges, widened to the common width."""
    width = ColumnBlocks.of(plan.partition).columns
    columns_B = edges[1] - width + jax.lax.iota(jnp.int32, width)
    return Block(edges[1] - width, columns_B, (columns_B >= edges[0]) & (columns_B < owned_columns(plan)))


def part_of(array: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Slice a loop-invariant array along its first axis.

    The barrier makes the array seem to depend on the iteration. Without it XLA:CPU, which computes with 16-bit floats as
    float32, widens the whole array before the loop: 512 MiB for a table of 131072 x 1024. The TPU's compiler drops the
    barrier in a late pass. At the default matmul precision it still narrows a float32 table before the loop (jax 0.10.2).
    """
    array, start = jax.lax.optimization_barrier((array, start))
    return jax.lax.dynamic_slice_in_dim(array, start, size)


def rows_of(weight_NE: jax.Array, block: Block) -> jax.Array:
    """Rows of the block; zeros where it does not own them."""
    return jnp.where(block.owned_B[:, None], part_of(weight_NE, block.at, len(block.columns_B)), 0)


def logits_block(hidden_CE: jax.Array, rows_BE: jax.Array, block: Block, softcap: float | None) -> jax.Array:
    """Logits ``[C, B]``; -inf in columns that the block does not own."""
    x_CB = jnp.einsum("ce,be->cb", hidden_CE, rows_BE, preferred_element_type=wide_dtype(hidden_CE.dtype))
    if softcap is not None:
        x_CB = softcap * jnp.tanh(x_CB / softcap)
    return jnp.where(block.owned_B, x_CB, -jnp.inf)


def backward_products(
    hidden: jax.Array,
    whole: jax.Array,
    weight: jax.Array,
    plan: Plan,
    silent_KC: jax.Array,
    gradient: Callable[[jax.Array, jax.Array, Block, jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Gradients of hidden states and rows, from blocks of the logits' gradient.

    Args:
        hidden: hidden states as the caller gave them.
        whole: hidden states of all tokens.
        weight: the rank's rows.
        plan: static arguments.
        silent_KC: True for tokens without a gradient. NaN in their hidden states reaches nothing.
        gradient: called as ``gradient(hidden_CE, rows_BE, block, chunk)``; returns the gradient of the product of the
            first two, in the wide dtype. Columns that the block does not own may hold anything.

    Returns:
        Gradients of ``hidden`` and ``weight``, each summed over the mesh axes over which its primal does not vary, then
        rounded.
    """
    dtype, wide = weight.dtype, wide_dtype(weight.dtype)
    chunks_KCE = split_tokens(whole, whole.ndim - 1)
    everything = whole, weight, silent_KC, plan.axis_name
    if varying_axes(vary(silent_KC, *everything)) - varying_axes(weight):
        dtype = wide  # the sum over data axes precedes rounding

    def add_block(sums: tuple[jax.Array, jax.Array], edges: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        hidden_KCE, weight_NE = sums
        block = block_of(edges, plan)
        rows_BE = rows_of(weight, block)

        def add_chunk(sums: tuple[jax.Array, jax.Array], chunk: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            hidden_KCE, sums_BE = sums
            silent_C1 = silent_KC[chunk][:, None]
            tokens_CE = part_of(chunks_KCE, chunk, 1)[0]
            grad_CB = gradient(tokens_CE, rows_BE, block, chunk)
            grad_CB = jnp.where(block.owned_B & ~silent_C1, grad_CB, 0)
            tokens_CE = jnp.where(silent_C1, 0, tokens_CE).astype(wide)
            sums_BE += jnp.einsum("cb,ce->be", grad_CB, tokens_CE, preferred_element_type=wide)
            of_tokens_CE = jnp.einsum("cb,be->ce", grad_CB, rows_BE.astype(wide), preferred_element_type=wide)
            of_tokens_CE = jnp.where(silent_C1, 0, of_tokens_CE)  # 0 times a NaN row is NaN
            return (hidden_KCE.at[chunk].add(of_tokens_CE), sums_BE), None

        start = hidden_KCE, vary(jnp.zeros(rows_BE.shape, wide), *everything)
        (hidden_KCE, sums_BE), _ = jax.lax.scan(add_chunk, start, jnp.arange(len(chunks_KCE), dtype=jnp.int32))
        weight_NE = jax.lax.dynamic_update_slice_in_dim(weight_NE, sums_BE.astype(dtype), block.at, 0)
        return (hidden_KCE, weight_NE), None

    zeros = jnp.zeros(chunks_KCE.shape, wide), jnp.zeros(weight.shape, dtype)
    start = jax.tree.map(lambda each: vary(each, *everything), zeros)
    (hidden_KCE, weight_grad), _ = jax.lax.scan(
        add_block, start, jnp.asarray(block_edges(plan.partition)), reverse=True
    )
    hidden_grad = _join_tokens(hidden_KCE, whole.shape[:-1])
    if plan.split_dim is not None:
        hidden_grad = jax.lax.psum_scatter(hidden_grad, plan.axis_name, scatter_dimension=plan.split_dim, tiled=True)
    return _sum_as(hidden_grad, hidden), _sum_as(weight_grad, weight)


def _join_tokens(array_KC: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undo ``split_tokens``: drop its padding, restore the dimensions ``shape``."""
    last = array_KC.shape[2:]
    return array_KC.reshape(array_KC.shape[0] * array_KC.shape[1], *last)[: int(np.prod(shape))].reshape(*shape, *last)


def _sum_as(array: jax.Array, primal: jax.Array) -> jax.Array:
    """Sum over axes along which ``primal`` is replicated; round to its dtype."""
    axes = sorted(varying_axes(array) - varying_axes(primal))
    single = [axis for axis in axes if jax.lax.axis_size(axis) == 1]
    several = tuple(axis for axis in axes if axis not in single)
    array = (jax.lax.psum(array, several) if several else array).astype(primal.dtype)
    for axis in single:  # XLA fails to compile psum over one device beside Auto axes (jax 0.10.2 and 0.12.0.1)
        if array.dtype.itemsize == 2:  # XLA:CPU widens 16-bit floats in collectives, and would keep a float32 copy
            array = jax.lax.bitcast_convert_type(array, jnp.uint16)
        array = all_gather_invarying(array, axis)
    return array if array.dtype == primal.dtype else jax.lax.bitcast_convert_type(array, primal.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def logits_on_rank(hidden: jax.Array, weight: jax.Array, plan: Plan) -> jax.Array:
    """Logits of the rank's columns; gathers a split sequence first."""
    return _forward(hidden, weight, plan)[0]


def _forward(hidden: jax.Array, weight: jax.Array, plan: Plan) -> tuple[jax.Array, Any]:
    whole = gather_sequence(hidden, plan)
    chunks_KCE = split_tokens(whole, whole.ndim - 1)

    def of_block(logits_KCN: jax.Array, edges: jax.Array) -> tuple[jax.Array, None]:
        block = block_of(edges, plan)
        rows_BE = rows_of(weight, block)

        def of_chunk(logits_KCN: jax.Array, chunk: jax.Array) -> tuple[jax.Array, None]:
            x_CB = logits_block(part_of(chunks_KCE, chunk, 1)[0], rows_BE, block, plan.softcap)
            place = chunk, jnp.int32(0), block.at
            return jax.lax.dynamic_update_slice(logits_KCN, x_CB[None], place), None

        return jax.lax.scan(of_chunk, logits_KCN, jnp.arange(len(chunks_KCE), dtype=jnp.int32))

    logits_KCN = jnp.zeros((*chunks_KCE.shape[:2], len(weight)), wide_dtype(weight.dtype))
    start = vary(logits_KCN, whole, weight, plan.axis_name)
    logits_KCN, _ = jax.lax.scan(of_block, start, jnp.asarray(block_edges(plan.partition)), reverse=True)
    logits = _join_tokens(logits_KCN, whole.shape[:-1])
    return logits, (hidden, whole, weight, None if plan.softcap is None else logits)


def _backward(plan: Plan, residuals: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden, whole, weight, logits = residuals
    grad_KCN = split_tokens(grad, grad.ndim - 1)
    silent_KC = ((grad_KCN == 0) | (jnp.arange(len(weight)) >= owned_columns(plan))).all(axis=-1)
    logits_KCN = grad_KCN if logits is None else split_tokens(logits, grad.ndim - 1)

    def gradient(hidden_CE: jax.Array, rows_BE: jax.Array, block: Block, chunk: jax.Array) -> jax.Array:
        def part(array_KCN: jax.Array) -> jax.Array:
            size = 1, len(hidden_CE), len(rows_BE)
            return jax.lax.dynamic_slice(array_KCN, (chunk, jnp.zeros_like(chunk), block.at), size)[0]

        grad_CB = part(grad_KCN)
        return grad_CB if plan.softcap is None else grad_CB * (1 - jnp.square(part(logits_KCN) / plan.softcap))

    return backward_products(hidden, whole, weight, plan, silent_KC, gradient)


logits_on_rank.defvjp(_forward, _backward)
