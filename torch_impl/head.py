"""Logits of one rank's columns, and products with blocks of its rows.

Products and sums are float32, or float64 for float64 tables. 16-bit operands are widened block by block, and results
are rounded once.
Shape suffixes: T tokens, C tokens of a chunk, E hidden columns, N rows of the rank's table, B columns of a block.
"""

from __future__ import annotations  # in torch 2.6 schemas of operators take types in text only

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from shared.checks import check_rank
from shared.head import ColumnBlocks, check_hidden, check_softcap, logits_dtype_error
from shared.partition import VocabPartition
from shared.sequence import resolve_seq_dim
from torch_impl.agreement import naming_the_operation
from torch_impl.kernels.cpu import accumulation_dtype
from torch_impl.private_api import all_gather, reduce_scatter
from torch_impl.process_group import find_group

__all__ = [
    "FLOAT_DTYPES",
    "TOKENS_AT_ONCE",
    "backward_products",
    "block_buffer",
    "check_products",
    "chunks",
    "column_slices",
    "first_order",
    "gather_sequence",
    "logits_block",
    "logits_over_group",
    "owned_columns",
    "parallel_logits",
    "reduce_hidden_grad",
]

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

TOKENS_AT_ONCE = 1024
"""Tokens of a chunk: 4 MiB with a block's 1024 columns in float32."""


def parallel_logits(
    hidden: Tensor, weight: Tensor, partition: VocabPartition, rank: int, *, softcap: float | None = None
) -> Tensor:
    """Compute the logits of the rank's own columns.

    Args:
        hidden: hidden states, ``[*, emb_size]``, the same on all ranks.
        weight: the rank's own rows, ``[partition.rows_per_rank, emb_size]``, in the dtype of ``hidden``.
        partition: ownership of the rows.
        rank: the owner of ``weight``.
        softcap: bounds logits to ``softcap * tanh(logits / softcap)``; None: no bound.

    Returns:
        ``[*, partition.rows_per_rank]``, float32 (float64 for float64 inputs). Padding columns are -inf.

    There is no communication. The gradient of ``hidden`` is this rank's part, to be summed over the ranks. Products use
    fixed blocks of columns (``shared.head.ColumnBlocks``), so they do not depend on the number of ranks. Derivatives
    are of first order; torch.compile sees one operator.

    Raises:
        TypeError: the dtypes are not floating, or differ; ``rank`` is not an integer.
        ValueError: a shape does not fit; ``rank`` or ``softcap`` is out of range.

    Source: the parallel output layer of Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053); softcap: Gemma 2 (2024,
    arXiv:2408.00118).

    Example:
        >>> import torch
        >>> from shared import VocabPartition
        >>> from torch_impl import parallel_logits
        >>> table = torch.arange(8.0).reshape(4, 2)  # three ids and a row of padding
        >>> halves = VocabPartition(vocab_size=3, world_size=2, padded_vocab_size=4)
        >>> parallel_logits(torch.ones(1, 2), table[2:], halves, rank=1)
        tensor([[9., -inf]])
    """
    check_rank(rank, partition.world_size)
    return logits_over_group(hidden, weight, partition, rank, check_softcap(softcap), None, "")


def logits_over_group(
    hidden: Tensor,
    weight: Tensor,
    partition: VocabPartition,
    rank: int,
    softcap: float | None,
    seq_dim: int | None,
    group_name: str,
) -> Tensor:
    """``parallel_logits`` whose gradient of ``hidden`` is summed over a group.

    An empty ``group_name`` sums nothing. ``seq_dim`` counts among the dimensions before the last: hidden states split
    along it are gathered first.
    """
    check_products(hidden, weight, partition)
    dim = None if seq_dim is None else resolve_seq_dim(hidden.dim() - 1, seq_dim)
    sizes = [partition.vocab_size, partition.world_size, partition.padded_vocab_size]
    logits, _ = _Logits.apply(hidden, weight, sizes, rank, softcap, dim, group_name)
    return logits


def check_products(hidden: Tensor, weight: Tensor, partition: VocabPartition) -> None:
    """Validate dtypes and shapes of hidden states and rows.

    Raises:
        TypeError: a dtype is not floating, or they differ.
        ValueError: a shape does not fit.
    """
    for name, each in (("hidden", hidden), ("weight", weight)):
        if not isinstance(each, Tensor) or each.dtype not in FLOAT_DTYPES:
            raise logits_dtype_error(name, getattr(each, "dtype", type(each).__name__))
    if hidden.dtype != weight.dtype:
        raise logits_dtype_error("hidden", hidden.dtype, f"of the weight's dtype {weight.dtype}")
    check_hidden(tuple(hidden.shape), tuple(weight.shape), partition.rows_per_rank)


def owned_columns(partition: VocabPartition, rank: int) -> int:
    """Number of the rank's columns without padding."""
    start, stop = partition.owned_range(rank)
    return stop - start


def column_slices(partition: VocabPartition, rank: int) -> Iterator[slice]:
    """Blocks of the rank's columns without padding, in order."""
    for group in ColumnBlocks.of(partition).ranges(owned_columns(partition, rank)):
        yield from (slice(start, stop) for start, stop in group if start < stop)


def chunks(tokens: int) -> Iterator[slice]:
    """Slices of at most ``TOKENS_AT_ONCE`` tokens."""
    for start in range(0, tokens, TOKENS_AT_ONCE):
        yield slice(start, min(start + TOKENS_AT_ONCE, tokens))


def block_buffer(tokens: int, partition: VocabPartition, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for one block of one chunk."""
    return torch.empty(min(tokens, TOKENS_AT_ONCE) * ColumnBlocks.of(partition).columns, dtype=dtype, device=device)


def logits_block(hidden_CE: Tensor, weight_BE: Tensor, softcap: float | None, buffer: Tensor) -> Tensor:
    """Logits ``[C, B]`` of a chunk and a block, written to ``buffer``."""
    c, b = len(hidden_CE), len(weight_BE)
    x_CB = torch.mm(hidden_CE, weight_BE.T, out=buffer[: c * b].view(c, b))
    return x_CB if softcap is None else x_CB.div_(softcap).tanh_().mul_(softcap)


def backward_products(
    hidden_TE: Tensor,
    weight_NE: Tensor,
    partition: VocabPartition,
    rank: int,
    wanted: tuple[bool, bool],
    silent_T: Tensor,
    gradient: Callable[[Tensor, Tensor, slice, slice], Tensor],
) -> tuple[Tensor, Tensor]:
    """Gradients of a rank's hidden states and rows, block by block.

    Args:
        hidden_TE: all tokens.
        weight_NE: the rank's rows.
        partition: ownership of the rows.
        rank: this rank.
        wanted: whether to compute the gradient of the hidden states, and of the rows; one not computed is returned empty.
        silent_T: tokens without a gradient; NaN in their hidden states must not spread.
        gradient: called as ``gradient(hidden_CE, weight_BE, tokens, columns)`` with widened operands; returns the
            gradient of ``hidden_CE @ weight_BE.T``.

    Returns:
        The hidden states' gradient from this rank's columns, ``[T, E]``, in the accumulation dtype. The rows' gradient,
        ``[N, E]``, in the dtype of the table, zero in padding.
    """
    wide = accumulation_dtype(weight_NE.dtype)
    hidden_grad = hidden_TE.new_zeros(hidden_TE.shape if wanted[0] else (0,), dtype=wide)
    weight_grad = weight_NE.new_empty(weight_NE.shape if wanted[1] else (0,))
    weight_grad[owned_columns(partition, rank) :] = 0
    if len(hidden_TE) == 0:
        return hidden_grad, weight_grad.zero_()
    some_silent = bool(silent_T.any())
    for columns in column_slices(partition, rank):
        rows_BE = weight_NE[columns].to(wide)
        sums_BE = weight_grad[columns] if weight_NE.dtype == wide else torch.empty_like(rows_BE)
        for tokens in chunks(len(hidden_TE)):
            hidden_CE = hidden_TE[tokens].to(wide)
            grad_CB = gradient(hidden_CE, rows_BE, tokens, columns)
            if some_silent:
                grad_CB.masked_fill_(silent_T[tokens, None], 0)
                hidden_CE = hidden_CE.masked_fill(silent_T[tokens, None], 0)
            if wanted[0]:
                hidden_grad[tokens].addmm_(grad_CB, rows_BE)
            if wanted[1]:
                sums_BE.addmm_(grad_CB.T, hidden_CE, beta=float(tokens.start > 0))  # beta=0 reads nothing
        if wanted[1] and weight_NE.dtype != wide:
            weight_grad[columns] = sums_BE
    if some_silent and wanted[0]:
        hidden_grad.masked_fill_(silent_T[:, None], 0)
    return hidden_grad, weight_grad


def reduce_hidden_grad(
    grad_TE: Tensor, shape: Sequence[int], dtype: torch.dtype, seq_dim: int | None, group: dist.ProcessGroup | None
) -> Tensor:
    """Sum the hidden states' gradients over the ranks, then round to ``dtype``.

    ``grad_TE`` is this rank's part, of all tokens, and is overwritten. The result has the ``shape`` of this rank's
    hidden states, which ``seq_dim`` splits unless it is None. Without a group nothing is summed.
    """
    if group is None:
        return grad_TE.view(shape).to(dtype)
    if seq_dim is None:
        with naming_the_operation("all_reduce of the gradient of the hidden states", group):
            dist.all_reduce(grad_TE, group=group)
        return grad_TE.view(shape).to(dtype)
    w, (before, after) = group.size(), (shape[:seq_dim], shape[seq_dim:])
    by_rank = grad_TE.view(*before, w, *after).movedim(seq_dim, 0).contiguous()
    mine = grad_TE.new_empty(shape)
    with naming_the_operation("reduce_scatter of the gradient of the hidden states", group):
        reduce_scatter(mine.view(-1), by_rank.view(-1), group=group)
    return mine.to(dtype)


def gather_sequence(hidden: Tensor, seq_dim: int | None, group: dist.ProcessGroup | None) -> Tensor:
    """Gather hidden states split along the sequence; empty if not split."""
    if seq_dim is None or group is None:
        return hidden.new_empty(0)
    w, hidden = group.size(), hidden.contiguous()
    whole = hidden.new_empty(w, *hidden.shape)
    with naming_the_operation("all_gather of the hidden states", group):
        all_gather(whole.view(-1), hidden.view(-1), group=group)
    shape = [*hidden.shape[:seq_dim], w * hidden.shape[seq_dim], *hidden.shape[seq_dim + 1 :]]
    return whole.movedim(0, seq_dim).reshape(shape)


def first_order(operator: Any, *arguments: Any) -> Any:
    """Call an operator that computes a gradient; refuse second derivatives."""
    # Dynamo traces backward without gradients, and takes a forward with *arguments for one with a ctx.
    return operator(*arguments) if torch.compiler.is_compiling() else _FirstOrder.apply(operator, *arguments)


class _FirstOrder(torch.autograd.Function):
    """Operator without a second derivative."""

    @staticmethod
    def forward(operator: Any, *arguments: Any) -> Any:
        return operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(
            "logits and cross entropies over a split vocabulary have first derivatives only, but a gradient was "
            "differentiated again: detach it, or use F.linear and F.cross_entropy on the whole table"
        )


class _Logits(torch.autograd.Function):
    """Logits of a rank from hidden states and its rows."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        sizes: Sequence[int],
        rank: int,
        softcap: float | None,
        seq_dim: int | None,
        group_name: str,
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.pve.head_logits(hidden, weight, sizes, rank, softcap, seq_dim, group_name)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        hidden, weight, *ctx.options = inputs
        ctx.shape, ctx.gathered = list(hidden.shape), output[1].numel() > 0
        logits = () if ctx.options[2] is None else (output[0],)  # they determine the softcap's derivative
        ctx.save_for_backward(output[1] if ctx.gathered else hidden, weight, *logits)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, *logits = ctx.saved_tensors
        arguments = grads[0], logits[0] if logits else None, hidden, weight, ctx.shape, *ctx.options
        hidden_grad, weight_grad = first_order(
            torch.ops.pve.head_logits_backward, *arguments, *ctx.needs_input_grad[:2]
        )
        wanted = ctx.needs_input_grad
        return (hidden_grad if wanted[0] else None, weight_grad if wanted[1] else None, *[None] * 5)


@torch.library.custom_op("pve::head_logits", mutates_args=())
def _head_logits(
    hidden: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    rank: int,
    softcap: float | None,
    seq_dim: int | None,
    group_name: str,
) -> tuple[Tensor, Tensor]:
    partition = VocabPartition(*sizes)
    group = find_group(group_name, rank, partition.world_size) if group_name else None
    gathered = gather_sequence(hidden, seq_dim, group)
    whole = gathered if seq_dim is not None and group is not None else hidden
    hidden_TE, wide = whole.reshape(-1, whole.shape[-1]), accumulation_dtype(weight.dtype)
    logits_TN = hidden.new_empty(len(hidden_TE), len(weight), dtype=wide)
    logits_TN[:, owned_columns(partition, rank) :] = -torch.inf
    buffer = block_buffer(len(hidden_TE), partition, wide, hidden.device)
    for columns in column_slices(partition, rank):
        rows_BE = weight[columns].to(wide)
        for tokens in chunks(len(hidden_TE)):
            logits_TN[tokens, columns] = logits_block(hidden_TE[tokens].to(wide), rows_BE, softcap, buffer)
    return logits_TN.view(*whole.shape[:-1], len(weight)), gathered


@_head_logits.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    rank: int,
    softcap: float | None,
    seq_dim: int | None,
    group_name: str,
) -> tuple[Tensor, Tensor]:
    shape, gathered = list(hidden.shape), hidden.new_empty(0)
    if seq_dim is not None and group_name:
        shape[seq_dim] *= sizes[1]
        gathered = hidden.new_empty(shape)
    return hidden.new_empty(*shape[:-1], weight.shape[0], dtype=accumulation_dtype(weight.dtype)), gathered


@torch.library.custom_op("pve::head_logits_backward", mutates_args=())
def _head_logits_backward(
    grad: Tensor,
    logits: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    sizes: Sequence[int],
    rank: int,
    softcap: float | None,
    seq_dim: int | None,
    group_name: str,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    partition = VocabPartition(*sizes)
    group = find_group(group_name, rank, partition.world_size) if group_name else None
    grad_TN, hidden_TE = grad.reshape(-1, len(weight)), hidden.reshape(-1, hidden.shape[-1])
    buffer = block_buffer(len(hidden_TE), partition, grad.dtype, grad.device)

    def gradient(_hidden_CE: Tensor, _rows_BE: Tensor, tokens: slice, columns: slice) -> Tensor:
        given = grad_TN[tokens, columns]
        grad_CB = buffer[: given.numel()].view(given.shape).copy_(given)
        if logits is None or softcap is None:
            return grad_CB
        return grad_CB.mul_(1 - (logits.view(grad_TN.shape)[tokens, columns] / softcap).square_())

    silent_T = (grad_TN[:, : owned_columns(partition, rank)] == 0).all(1)
    wanted = (wants_hidden, wants_weight)
    hidden_grad, weight_grad = backward_products(hidden_TE, weight, partition, rank, wanted, silent_T, gradient)
    if wants_hidden:
        hidden_grad = reduce_hidden_grad(hidden_grad, shape, hidden.dtype, seq_dim, group)
    return hidden_grad, weight_grad


@_head_logits_backward.register_fake
def _(
    grad: Tensor,
    logits: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    sizes: Sequence[int],
    rank: int,
    softcap: float | None,
    seq_dim: int | None,
    group_name: str,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(shape if wants_hidden else [0]), weight.new_empty(weight.shape if wants_weight else [0])
