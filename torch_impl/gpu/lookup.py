"""The lookup as a part of autograd that goes by these kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_impl.gpu import kernels
from torch_impl.rows import differentiable, row_sum

__all__ = ["fused_lookup"]


def fused_lookup(weight: Tensor, ids: Tensor, start: int, stop: int, padding_idx: int | None) -> Tensor:
    """Row ``id - start`` of ``weight`` for each id in ``[start, stop)``, +0.0 for every other: one kernel.

    Args:
        weight: the rank's rows, ``[N, E]``.
        ids: of any shape and any integer dtype, on the same GPU.
        start: the id of the table's first row.
        stop: the first id after it that is not the rank's.
        padding_idx: an id whose row gets no gradient.

    Returns:
        ``[*ids.shape, E]``. Second derivatives are defined; forward mode and the transforms of torch.func are not.
    """
    if not differentiable(weight):
        return kernels.take_owned_rows(weight, ids, start, stop, None, False)[0]
    return _FusedLookup.apply(weight, ids, start, stop, padding_idx)


class _FusedLookup(torch.autograd.Function):
    """Keeps each token's row for the gradient, not the ids, which the caller may write over."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, start: int, stop: int, padding_idx: int | None) -> Tensor:
        output, keys = kernels.take_owned_rows(weight, ids, start, stop, padding_idx, True)
        ctx.save_for_backward(keys)
        ctx.num_rows = len(weight)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (keys,), grad_output = ctx.saved_tensors, grad_outputs[0]
        if differentiable(grad_output):
            rows = keys.view(grad_output.shape[:-1]).long()
            grad = row_sum(
                grad_output, rows.clamp(max=ctx.num_rows - 1), rows < ctx.num_rows, ctx.num_rows, rows.device, False
            )
        else:
            grad = kernels.sum_rows_by_key(grad_output.reshape(-1, grad_output.shape[-1]), keys, ctx.num_rows)
        return grad, None, None, None, None
