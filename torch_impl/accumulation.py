"""Gradients added straight to the parameter's buffer."""

from typing import Any

import torch
from torch import Tensor, nn

from torch_impl.private_api import gradient_listener

__all__ = ["accumulate_in_place"]


def accumulate_in_place(weight: Tensor) -> Tensor:
    """Wrap the table so that backward adds sparse gradients to its buffer.

    The buffer is ``weight.main_grad``, or ``weight.grad`` without one. Cost is proportional to the gradient's rows, not
    to the table. Autograd receives no gradient. ``main_grad`` has the table's shape and device, and its dtype, float32
    or a wider one. Megatron's flag ``grad_added_to_main_grad`` is set if the parameter has it.

    Raises:
        TypeError: ``main_grad`` is not a tensor.
        ValueError: ``main_grad`` does not fit; hooks or DDP expect a gradient from autograd; the call is not in eager mode.
    """
    if torch.compiler.is_compiling() or type(weight) not in (Tensor, nn.Parameter):
        problem: str | None = "it works in eager mode only"
    elif not weight.is_leaf:
        problem = "the table is computed, not a parameter"
    else:
        problem = gradient_listener(weight)
    if problem is not None:
        raise ValueError(f"gradient_accumulation_fusion must be False here: {problem}")
    _check_main_grad(weight)
    return _AccumulateInPlace.apply(weight)


def _check_main_grad(weight: Tensor) -> None:
    buffer = getattr(weight, "main_grad", None)
    if buffer is None:
        return
    if not isinstance(buffer, Tensor):
        raise TypeError(f"main_grad must be a tensor like the table, got {type(buffer).__name__}")
    fits = buffer.dtype == weight.dtype or (buffer.is_floating_point() and buffer.dtype.itemsize >= 4)
    if buffer.shape != weight.shape or buffer.device != weight.device or not fits:
        raise ValueError(
            f"main_grad must be {tuple(weight.shape)} on {weight.device}, as the table is, in {weight.dtype}, float32 or "
            f"wider; got {tuple(buffer.shape)} {buffer.dtype} on {buffer.device}: use torch.zeros_like(weight)"
        )


class _AccumulateInPlace(torch.autograd.Function):
    """Identity whose backward adds the gradient's rows to the parameter's buffer."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        (ctx.weight,) = inputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:
        if torch.is_grad_enabled():
            raise ValueError("gradient_accumulation_fusion must be False where gradients are differentiated again")
        weight, grad = ctx.weight, grad_outputs[0].coalesce()  # once per graph: autograd sums two uses
        rows, values = grad.indices()[0], grad.values()
        buffer = getattr(weight, "main_grad", None)
        if buffer is None:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            buffer = weight.grad
        elif hasattr(weight, "grad_added_to_main_grad"):
            weight.grad_added_to_main_grad = True
        if len(rows):
            buffer.index_copy_(0, rows, buffer.index_select(0, rows).add_(values))
