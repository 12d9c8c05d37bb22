"""One rank's lookup and its transpose, ``scatter_add``.

A *key* is a row number of the rank's table; a foreign id's key is the number of rows. The table has all
``rows_per_rank`` rows, or only those that are not padding, as DTensor splits a table. Only stock operations surround
the operators, so that compilers, transforms and autograd need no other code.
Shape suffixes: N rows of the rank's table, E columns; the ids' own dimensions are flattened to T tokens.
"""

import contextlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.config import EmbeddingConfig
from torch_impl.kernels import cpu
from torch_impl.private_api import function_is_inlined, integers_cannot_be_viewed

__all__ = [
    "check_rows",
    "eager_mode_only",
    "gather",
    "gradient_keys",
    "lookup",
    "row_keys",
    "scatter_add",
    "sparse_gradient",
]


def lookup(
    weight: Tensor,
    ids: Tensor,
    config: EmbeddingConfig,
    rank: int | Tensor,
    zero_padded: Tensor | None = None,
    sparse: bool = False,
) -> Tensor:
    """Look up the ids owned by ``rank``; others get rows of +0.0.

    Args:
        weight: the rank's rows, ``[N, E]``, checked by ``check_rows`` or with ``zero_padded``.
        ids: int64, any shape.
        config: sizes and ``padding_idx``.
        rank: the owner of ``weight``; a compiled graph takes it as a 0-d tensor.
        zero_padded: the memory of ``weight`` with a row of zeros behind it, ``[N + 1, E]``, if there is one.
        sparse: make the gradient a sparse COO tensor.

    Returns:
        ``[*ids.shape, E]`` on the device of the ids.
    """
    num_rows = weight.shape[0]
    if (device := ids.device) != weight.device:
        ids = ids.to(weight.device)
    keys = row_keys(ids, config, rank, num_rows)
    if zero_padded is None or torch.is_grad_enabled():
        grad_keys = None if config.padding_idx is None else gradient_keys(keys, ids, config, num_rows)
        output = _Lookup.apply(weight, keys, grad_keys, zero_padded, num_rows, sparse)
    else:
        output = _take(zero_padded, keys)
    return output if output.device == device else output.to(device)


def row_keys(ids: Tensor, config: EmbeddingConfig, rank: int | Tensor, num_rows: int) -> Tensor:
    """Keys of the ids in a rank's table of ``num_rows`` rows."""
    keys = config.partition.keys(ids, rank)
    return keys if num_rows == config.partition.rows_per_rank else keys.clamp(max=num_rows)


def gradient_keys(keys: Tensor, ids: Tensor, config: EmbeddingConfig, num_rows: int) -> Tensor:
    """Keys of the gradient: the lookup's, without those of ``padding_idx``."""
    if config.padding_idx is None:
        return keys
    return keys.masked_fill(ids == config.padding_idx, num_rows)


def check_rows(weight: Tensor, config: EmbeddingConfig, rank: int | Tensor) -> None:
    """Refuse a table that does not hold exactly the rank's own rows.

    Raises:
        ValueError: the table has neither ``rows_per_rank`` rows nor only those that are not padding.
        TypeError: the table does not hold floating-point numbers.
    """
    n, emb_size, given = config.partition.rows_per_rank, config.emb_size, list(weight.shape)
    if given != [n, emb_size]:
        ranks = range(config.world_size) if isinstance(rank, Tensor) else [rank]  # a compiled graph serves any rank
        bounds = [config.partition.owned_range(each) for each in ranks]
        unpadded = sorted({stop - start for start, stop in bounds} - {n})
        if given not in ([rows, emb_size] for rows in unpadded):
            without = "".join(f" or [{rows}, {emb_size}] without its padding" for rows in unpadded)
            raise ValueError(
                f"weight must hold the rank's own rows, [{n}, {emb_size}]{without}, got {given}; "
                f"build a layer of that size instead"
            )
    if not weight.is_floating_point():
        raise TypeError(f"weight must be of a floating dtype, got {weight.dtype}")


def gather(
    table: Tensor, keys: Tensor, num_rows: int, take: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """Copy the table's row for each key; key ``num_rows`` gives +0.0.

    A table of ``num_rows + 1`` rows ends with the row of zeros. Without it, foreign rows' bits are
    multiplied by zero as integers: a floating-point product would keep NaN. That was the fastest way in eager mode.

    Args:
        table: ``[num_rows, E]`` or ``[num_rows + 1, E]``.
        keys: int64, any shape.
        num_rows: rows of the table, without the row of zeros.
        take: copies rows; operators pass their kernel.
    """
    take = take or _take
    if num_rows == 0 == table.shape[0]:
        table = torch.cat((table, table.new_zeros(1, table.shape[1])))
    if table.shape[0] > num_rows:
        return take(table, keys)
    rows, owned = keys.clamp(max=num_rows - 1), (keys < num_rows).unsqueeze(-1)
    # This form has derivatives and a vmap rule. Inductor may change a NaN's payload here.
    if function_is_inlined() or integers_cannot_be_viewed():
        return torch.where(owned, take(table, rows), 0)
    output = take(table, rows)
    output.view(_INTEGERS[output.element_size()]).mul_(owned)
    return output


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _take(table: Tensor, rows: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():  # a graph serves any size
        large = rows.numel() * table.shape[1] * table.element_size() >= cpu.LARGE_BYTES
        if large and table.device.type == "cpu":
            return torch.ops.pve.gather(table, rows)
    return F.embedding(rows, table)


def scatter_add(grad: Tensor, keys: Tensor, num_rows: int) -> Tensor:
    """Sum the gradients ``[*keys.shape, E]`` by row: ``[num_rows, E]``, differentiable."""
    flat = grad.reshape(-1, grad.shape[-1]), keys.reshape(-1), num_rows
    return _ScatterAdd.apply(*flat) if torch.is_grad_enabled() else torch.ops.pve.scatter_add(*flat)


def sparse_gradient(distinct: Tensor, sums: Tensor, num_rows: int) -> Tensor:
    """Gradient ``[num_rows, E]`` as a sparse COO tensor of distinct rows."""
    size = (num_rows, sums.shape[1])
    return torch.sparse_coo_tensor(distinct.unsqueeze(0), sums, size, is_coalesced=True, check_invariants=False)


@contextlib.contextmanager
def eager_mode_only() -> Iterator[None]:
    """Refuse compilers and vmap: the gradient's size depends on the data."""
    refusal = "sparse=True and gradient_accumulation_fusion=True"
    if torch.compiler.is_compiling():
        raise ValueError(
            f"{refusal} cannot be compiled: use the dense gradient, or keep the embedding out of the graph"
        )
    try:
        yield
    except RuntimeError as error:
        if "vmap" in str(error):
            raise ValueError(f"{refusal} have no gradient under torch.func.vmap: use the dense gradient") from error
        raise


class _Lookup(torch.autograd.Function):
    """``gather``, linear in the table; its transpose is ``scatter_add``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor,
        keys: Tensor,
        grad_keys: Tensor | None,
        zero_padded: Tensor | None,
        num_rows: int,
        sparse: bool,
    ) -> Tensor:
        output = gather(weight if zero_padded is None else zero_padded, keys, num_rows)
        if grad_keys is not None and function_is_inlined():  # backward is dropped and cannot skip padding_idx
            output = torch.where((grad_keys < num_rows).unsqueeze(-1), output, output.detach())
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _weight, keys, grad_keys, _zero_padded, ctx.num_rows, ctx.sparse = inputs
        ctx.save_for_backward(keys if grad_keys is None else grad_keys)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (keys,), num_rows = grad_outputs, ctx.saved_tensors, ctx.num_rows
        if ctx.sparse:
            with eager_mode_only():
                rows = cpu.sum_rows(grad.reshape(-1, grad.shape[-1]), keys.reshape(-1), num_rows)
            return sparse_gradient(*rows, num_rows), None, None, None, None, None
        return scatter_add(grad, keys, num_rows), None, None, None, None, None


class _ScatterAdd(torch.autograd.Function):
    """``scatter_add``, linear in the gradients; its transpose is ``gather``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad_TE: Tensor, keys_T: Tensor, num_rows: int) -> Tensor:
        return torch.ops.pve.scatter_add(grad_TE, keys_T, num_rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _grad, keys, ctx.num_rows = inputs
        ctx.save_for_backward(keys)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (keys,) = ctx.saved_tensors
        grad = grad_outputs[0].to_dense() if grad_outputs[0].is_sparse else grad_outputs[0]
        return _Lookup.apply(grad, keys, None, None, ctx.num_rows, False), None, None


# ``apply`` computes the signature of ``forward`` in each call. A stored one saves 15 us of 30 for one token.
for _function in (_Lookup, _ScatterAdd):
    setattr(_function.forward, "__signature__", inspect.signature(_function.forward))  # noqa: B010


# torch.library.custom_op takes 25 us more a call, a tenth of a small table's forward and backward.
torch.library.define("pve::gather", "(Tensor table, Tensor rows) -> Tensor")
torch.library.define("pve::scatter_add", "(Tensor grad_TE, Tensor keys_T, SymInt num_rows) -> Tensor")


def _scatter_add_on_gpu(grad_TE: Tensor, keys_T: Tensor, num_rows: int) -> Tensor:
    from torch_impl.kernels import gpu

    return gpu.scatter_add(grad_TE, keys_T, num_rows)


def _gather_shape(table: Tensor, rows: Tensor) -> Tensor:
    return table.new_empty(*rows.shape, table.shape[1])


def _scatter_add_shape(grad_TE: Tensor, keys_T: Tensor, num_rows: int) -> Tensor:
    return grad_TE.new_empty(num_rows, grad_TE.shape[1])


def _gather_batch(info: Any, in_dims: tuple[int | None, int | None], table: Tensor, rows: Tensor) -> tuple[Tensor, int]:
    rows = _batch_first(rows, in_dims[1], info.batch_size)
    if in_dims[0] is None:
        return torch.ops.pve.gather(table, rows), 0
    tables = table.movedim(in_dims[0], 0)
    return torch.ops.pve.gather(tables.flatten(0, 1), _in_stacked_table(rows, tables.shape[1])), 0


def _scatter_add_batch(
    info: Any, in_dims: tuple[int | None, int | None, None], grad_TE: Tensor, keys_T: Tensor, num_rows: int
) -> tuple[Tensor, int]:
    grads, keys = (
        _batch_first(each, dim, info.batch_size) for each, dim in zip((grad_TE, keys_T), in_dims[:2], strict=True)
    )
    size = info.batch_size
    # One call: table b has the rows from b * num_rows on. The key of foreign ids moves behind the last table.
    keys = torch.where(keys < num_rows, _in_stacked_table(keys, num_rows), size * num_rows)
    sums = torch.ops.pve.scatter_add(grads.flatten(0, 1), keys.flatten(), size * num_rows)
    return sums.unflatten(0, (size, num_rows)), 0


def _batch_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _in_stacked_table(rows: Tensor, num_rows: int) -> Tensor:
    """Row numbers of a batch of tables within their concatenation."""
    first = torch.arange(len(rows), device=rows.device) * num_rows
    return rows + first.view(-1, *[1] * (rows.dim() - 1))


torch.library.impl("pve::gather", "default", cpu.gather)
torch.library.impl("pve::scatter_add", "default", cpu.scatter_add)
if importlib.util.find_spec("triton") is not None:  # PyTorch for CUDA and ROCm brings it
    torch.library.impl("pve::scatter_add", "cuda", _scatter_add_on_gpu)
torch.library.register_fake("pve::gather", _gather_shape)
torch.library.register_fake("pve::scatter_add", _scatter_add_shape)
torch.library.register_vmap("pve::gather", _gather_batch)
torch.library.register_vmap("pve::scatter_add", _scatter_add_batch)
