"""``scatter_add`` as Triton kernels, for CUDA and ROCm.

Tokens are sorted by row, then each row's gradients are summed in that order. The host does not wait, and gradients of
foreign tokens are not read. The rank's range is an argument, so all ranks run the same binary.
Shape suffixes: N rows of the rank's table, E columns, T tokens.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs does not bring it
    triton = None
    tl = None

__all__ = ["scatter_add"]

_WINDOW = 256
"""Most sorted tokens that one program sums: a frequent row occupies many programs."""

_BLOCK_TOKENS = 16
"""Tokens that a program reads at once."""

_BLOCK_COLUMNS = 256
"""Most columns of a program: 16-byte accesses by 64 threads for float32."""


def _kernel(*not_specialized: str) -> Any:
    """``triton.jit`` without recompilation for other values of these arguments."""
    return (lambda function: function) if triton is None else triton.jit(do_not_specialize=not_specialized)


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
    """Sum a row's tokens within one window of the sorted tokens.

    The sum of a row within one window goes to ``sums``. A row that crosses a border leaves a part in ``pieces``. Each
    window has two slots there: for a row continued from the previous window, and for a row continued in the next one.
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
    """Add the pieces of a row that leaves its window, in order."""
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


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Select the tensor's device: Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def scatter_add(grad_TE: Tensor, keys_T: Tensor, num_rows: int) -> Tensor:
    """Sum the tokens' gradients by row, as ``kernels.cpu.scatter_add``.

    16-bit gradients are summed in float32 and rounded once. The order is fixed: 16 sorted tokens at a time, ascending,
    then these sums within windows of 256 tokens, then the windows.
    """
    num_tokens, emb_size = grad_TE.shape
    sums = grad_TE.new_zeros(num_rows, emb_size)
    if grad_TE.numel() == 0:
        return sums
    keys, order = keys_T.sort(stable=True)
    windows = triton.cdiv(num_tokens, _WINDOW)
    wide = torch.float32 if grad_TE.element_size() < 4 else grad_TE.dtype
    pieces = torch.empty(2 * windows, emb_size, dtype=wide, device=grad_TE.device)
    block = min(1 << (emb_size - 1).bit_length(), _BLOCK_COLUMNS)
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
