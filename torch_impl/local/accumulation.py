"""Gradients that go straight to where a parameter keeps them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_impl.local.memory import PLAIN, zeros

__all__ = ["into_place"]


def into_place(weight: Tensor) -> Tensor:
    """The same table, of which a sparse gradient is added to ``weight.main_grad`` or ``weight.grad`` as soon as it is known.

    That takes as long as the rows it has, not as long as the table; autograd itself is handed nothing.

    ``main_grad`` has the table's shape and device, and its dtype, float32 or a wider one. Where the parameter has
    Megatron's flag ``grad_added_to_main_grad``, it is set.

    Raises:
        TypeError: ``main_grad`` is no tensor.
        ValueError: it is of another shape or device, or of a dtype that would lose bits; somebody waits for the gradient
            that autograd would have handed on.
    """
    from torch.nn.parallel import DistributedDataParallel

    problem = None
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or type(weight) not in PLAIN:
        problem = "it works in eager mode only"
    elif not weight.is_leaf:
        problem = "the table is computed, not a parameter"
    elif weight._backward_hooks or weight._post_accumulate_grad_hooks:
        problem = "the table has gradient hooks, which would not be called"
    elif DistributedDataParallel._get_active_ddp_module() is not None:
        problem = "DistributedDataParallel waits for the gradient: use fully_shard, or all-reduce the buffer yourself"
    if problem is not None:
        raise ValueError(f"gradient_accumulation_fusion must be False here: {problem}")
    _check_main_grad(weight)
    return _IntoPlace.apply(weight)


def _check_main_grad(weight: Tensor) -> None:
    buffer = getattr(weight, "main_grad", None)
    if buffer is None:
        return
    if not isinstance(buffer, Tensor):
        raise TypeError(f"main_grad must be a tensor like the table, got {type(buffer).__name__}")
    fits = buffer.is_floating_point() and buffer.dtype.itemsize >= min(weight.dtype.itemsize, 4)
    if buffer.shape != weight.shape or buffer.device != weight.device or not fits:
        raise ValueError(
            f"main_grad must be {tuple(weight.shape)} on {weight.device}, as the table is, in {weight.dtype}, float32 or "
            f"wider; got {tuple(buffer.shape)} {buffer.dtype} on {buffer.device}: use torch.zeros_like(weight)"
        )


class _IntoPlace(torch.autograd.Function):
    """The identity, whose backward adds rows to where the parameter keeps its gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise ValueError("gradient_accumulation_fusion must be False where gradients are differentiated again")
        weight, grad = ctx.weight, grad_outputs[0]
        rows, values = grad._indices()[0], grad._values()
        buffer = getattr(weight, "main_grad", None)
        if buffer is None:
            if weight.grad is None:
                weight.grad = zeros(tuple(weight.shape), weight)
            buffer = weight.grad
        elif hasattr(weight, "grad_added_to_main_grad"):
            weight.grad_added_to_main_grad = True
        if len(rows):
            buffer.index_copy_(0, rows, buffer.index_select(0, rows).add_(values))
