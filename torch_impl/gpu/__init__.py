"""The lookup and its gradient as kernels of their own, for CUDA and ROCm: one pass each over what has to move."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

__all__ = ["serves", "sum_rows_by_key"]

_TRITON = importlib.util.find_spec("triton") is not None
"""PyTorch for CUDA and ROCm brings it; where it is missing, PyTorch's own operations do the work."""


def serves(*tensors: Tensor) -> bool:
    """Whether there are kernels for these: plain tensors on one and the same GPU."""
    first = tensors[0]
    if not first.is_cuda or not _TRITON:
        return False
    return all(type(tensor) in (Tensor, nn.Parameter) and tensor.device == first.device for tensor in tensors)


@torch.library.custom_op("pve::sum_rows_by_key", mutates_args=())
def sum_rows_by_key(grad_TE: Tensor, keys_T: Tensor, num_rows: int) -> Tensor:
    """``kernels.sum_rows_by_key`` as an operator, so that compiled graphs can hold it."""
    from torch_impl.gpu import kernels  # and with it Triton, for those who need it

    return kernels.sum_rows_by_key(grad_TE, keys_T, num_rows)


@sum_rows_by_key.register_fake
def _(grad_TE: Tensor, keys_T: Tensor, num_rows: int) -> Tensor:
    return grad_TE.new_empty(num_rows, grad_TE.shape[1])
