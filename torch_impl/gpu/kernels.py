"""Triton kernels: rows by their number, and the sum of each row's gradients in an order that is always the same.

Shape suffixes: N rows of the rank's table, E columns, T tokens.

Each launch is one pass. Bytes that need not move do not: no row is read for a foreign id, and no gradient for a foreign
token. Which ids are the rank's is data to the kernels, so all ranks run the same binary.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs comes without
    triton = None
    tl = None

__all__ = ["sum_rows_by_key", "take_owned_rows"]

_BLOCK_BYTES = 8192
"""What a program moves at a time: four 16-byte accesses for each of 128 threads."""
_WINDOW = 256
"""So many sorted tokens are added up by one program at most: a row that half the batch asks for occupies many programs."""
_BLOCK_TOKENS = 16


def _kernel(*not_specialized: str) -> Any:
    """``triton.jit``, but for the values of these arguments."""
    return (lambda function: function) if triton is None else triton.jit(do_not_specialize=not_specialized)


@_kernel("num_tokens", "start", "stop", "not_counted", "num_rows")
def _take(
    ids_ptr,
    weight_ptr,
    output_ptr,
    keys_ptr,
    num_tokens,
    emb_size,
    row_stride,
    column_stride,
    start,
    stop,
    not_counted,
    num_rows,
    WITH_KEYS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    within = tokens < num_tokens
    ids = tl.load(ids_ptr + tokens, mask=within, other=0).to(tl.int64)
    owned = within & (ids >= start) & (ids < stop)
    rows = tl.where(owned, ids - start, 0)
    cells = (columns < emb_size)[None, :]
    addresses = weight_ptr + rows[:, None] * row_stride + columns[None, :] * column_stride
    values = tl.load(addresses, mask=owned[:, None] & cells, other=0)
    tl.store(output_ptr + tokens[:, None] * emb_size + columns[None, :], values, mask=within[:, None] & cells)
    if WITH_KEYS:
        keys = tl.where(owned & (ids != not_counted), rows, num_rows)
        tl.store(keys_ptr + tokens, keys.to(keys_ptr.dtype.element_ty), mask=within & (tl.program_id(1) == 0))


@_kernel("num_tokens", "num_rows")
def _sum_pieces(
    keys_ptr,
    order_ptr,
    grad_ptr,
    sums_ptr,
    pieces_ptr,
    num_tokens,
    num_rows,
    emb_size,
    row_stride,
    column_stride,
    WINDOW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """From each place on where a row's tokens begin, or go on in the next window: their sum, as far as the window goes.

    The whole sum of a row is written where it belongs; a part of one to ``pieces``, in which each window has room for two,
    for a row that came from the window before, and for one that goes on in the next.
    """
    first = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    cells = columns < emb_size
    key = tl.load(keys_ptr + first)
    before = tl.load(keys_ptr + first - 1, mask=first > 0, other=-1)
    opens = first % WINDOW == 0
    if (key < num_rows) & (opens | (key != before)):
        stop = tl.minimum((first // WINDOW + 1) * WINDOW, num_tokens)
        total = tl.zeros([BLOCK_E], dtype=pieces_ptr.dtype.element_ty)
        at = first
        while at < stop:
            places = at + tl.arange(0, BLOCK_T)
            mine = (places < stop) & (tl.load(keys_ptr + places, mask=places < stop, other=-1) == key)
            tokens = tl.load(order_ptr + places, mask=mine, other=0)
            addresses = grad_ptr + tokens[:, None] * row_stride + columns[None, :] * column_stride
            values = tl.load(addresses, mask=mine[:, None] & cells[None, :], other=0)
            total += tl.sum(values.to(total.dtype), axis=0)
            found = tl.sum(mine.to(tl.int64), axis=0)
            at = tl.where(found == BLOCK_T, at + BLOCK_T, num_tokens + found)
        goes_on = tl.load(keys_ptr + stop, mask=stop < num_tokens, other=-1) == key
        if goes_on | (opens & (key == before)):
            slot = first // WINDOW * 2 + tl.where(opens, 0, 1)
            tl.store(pieces_ptr + slot * emb_size + columns, total, mask=cells)
        else:
            tl.store(sums_ptr + key.to(tl.int64) * emb_size + columns, total.to(sums_ptr.dtype.element_ty), mask=cells)


@_kernel("num_tokens", "num_rows")
def _join_pieces(
    keys_ptr,
    sums_ptr,
    pieces_ptr,
    num_tokens,
    num_rows,
    emb_size,
    WINDOW: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """For each window that a row begins in and leaves: the row's pieces, in order."""
    window = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    cells = columns < emb_size
    start = window * WINDOW
    following = start + WINDOW
    key = tl.load(keys_ptr + following - 1)
    opens = tl.load(keys_ptr + start) == key
    comes = opens & (tl.load(keys_ptr + start - 1, mask=start > 0, other=-1) == key)
    if (key < num_rows) & (tl.load(keys_ptr + following) == key) & (comes == 0):
        slot = window * 2 + tl.where(opens, 0, 1)
        total = tl.load(pieces_ptr + slot * emb_size + columns, mask=cells, other=0)
        while following < num_tokens:
            piece = following // WINDOW * 2
            total += tl.load(pieces_ptr + piece * emb_size + columns, mask=cells, other=0)
            following += WINDOW
            same = tl.load(keys_ptr + following, mask=following < num_tokens, other=-1) == key
            following = tl.where(same, following, num_tokens)
        tl.store(sums_ptr + key.to(tl.int64) * emb_size + columns, total.to(sums_ptr.dtype.element_ty), mask=cells)


def _block(emb_size: int, itemsize: int) -> int:
    """How many columns a program works on."""
    return min(1 << (emb_size - 1).bit_length(), _BLOCK_BYTES // itemsize)


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def take_owned_rows(
    weight_NE: Tensor, ids: Tensor, start: int, stop: int, padding_idx: int | None, with_keys: bool
) -> tuple[Tensor, Tensor | None]:
    """Row ``id - start`` for each id in ``[start, stop)``, +0.0 for every other, bit for bit, in one kernel.

    Args:
        weight_NE: the table, ``[N, E]``.
        ids: of any shape and any integer dtype.
        start: the id of the table's first row.
        stop: the first id after it that is not the rank's.
        padding_idx: an id without a gradient.
        with_keys: also write what ``sum_rows_by_key`` takes.

    Returns:
        ``[*ids.shape, E]``, and each token's row that its gradient belongs to, ``[T]``: N, where it belongs to none.
    """
    num_rows, emb_size = weight_NE.shape
    output = weight_NE.new_empty(*ids.shape, emb_size)
    num_tokens = ids.numel()
    key_dtype = torch.int32 if num_rows < 2**31 else torch.int64
    keys = torch.empty(num_tokens, dtype=key_dtype, device=ids.device) if with_keys else None
    if output.numel() == 0:
        return output, keys
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight_NE.element_size()]
    block = _block(emb_size, weight_NE.element_size())
    block_tokens = max(1, _BLOCK_BYTES // (block * weight_NE.element_size()))
    grid = (triton.cdiv(num_tokens, block_tokens), triton.cdiv(emb_size, block))
    not_counted = -1 if padding_idx is None else padding_idx
    with _on(weight_NE):
        _take[grid](
            ids.reshape(-1),
            weight_NE.detach().view(words),
            output.view(words),
            keys,
            num_tokens,
            emb_size,
            weight_NE.stride(0),
            weight_NE.stride(1),
            start,
            stop,
            not_counted,
            num_rows,
            WITH_KEYS=with_keys,
            BLOCK_T=block_tokens,
            BLOCK_E=block,
        )
    return output, keys


def sum_rows_by_key(grad_TE: Tensor, keys_T: Tensor, num_rows: int) -> Tensor:
    """For each of ``num_rows`` rows the sum of the gradients whose key it is; a key of ``num_rows`` belongs to none.

    Summed in float32 for 16-bit gradients (in their own dtype otherwise) and rounded once. The same bits every time:
    16 tokens at a time, ascending, then these sums, in windows of 256 of the sorted tokens. The host waits for nothing.

    Returns:
        ``[num_rows, E]`` in the dtype of ``grad_TE``.
    """
    num_tokens, emb_size = grad_TE.shape
    sums = grad_TE.new_zeros(num_rows, emb_size)
    if grad_TE.numel() == 0:
        return sums
    keys, order = keys_T.sort(stable=True)
    windows = triton.cdiv(num_tokens, _WINDOW)
    wide = torch.float32 if grad_TE.element_size() < 4 else grad_TE.dtype
    pieces = torch.empty(2 * windows, emb_size, dtype=wide, device=grad_TE.device)
    block = min(_block(emb_size, 4), 256)
    columns = triton.cdiv(emb_size, block)
    sizes = (num_tokens, num_rows, emb_size)
    with _on(grad_TE):
        _sum_pieces[(num_tokens, columns)](
            keys,
            order,
            grad_TE,
            sums,
            pieces,
            *sizes,
            grad_TE.stride(0),
            grad_TE.stride(1),
            WINDOW=_WINDOW,
            BLOCK_T=_BLOCK_TOKENS,
            BLOCK_E=block,
        )
        if windows > 1:
            _join_pieces[(windows - 1, columns)](keys, sums, pieces, *sizes, WINDOW=_WINDOW, BLOCK_E=block)
    return sums
