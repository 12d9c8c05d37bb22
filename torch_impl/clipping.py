"""Gradient clipping where each rank holds other rows of a table."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_impl.vocab_emb import ParallelVocabEmbedding

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
) -> Tensor:
    """Clip a model's gradients by their norm over all ranks' rows.

    ``torch.nn.utils.clip_grad_norm_`` would see this rank's rows alone: ranks would clip by different norms, and
    replicated parameters would drift apart. Every rank of the layers' process groups calls this. All other parameters
    must be replicated on the ranks, or DTensors.

    Args:
        model: holds layers built with a ``process_group`` or ``device_mesh``, and any other parameters.
        max_norm: greatest norm after clipping.
        norm_type: p of the p-norm, above 0; ``math.inf`` for the largest absolute value.
        error_if_nonfinite: refuse a norm that is NaN or infinite.

    Returns:
        The norm before clipping, 0-d, float32 or wider; the same on all ranks.

    Raises:
        ValueError: the layer of a table over several ranks has no process group; ``norm_type`` is not positive.
        RuntimeError: the norm is NaN or infinite, and ``error_if_nonfinite`` is True.

    Source: ``get_grad_norm_fp32`` of Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053).

    Example:
        >>> import torch
        >>> from torch_impl import ParallelVocabEmbedding, clip_grad_norm_
        >>> emb = ParallelVocabEmbedding(4, 2)
        >>> emb(torch.tensor([1, 1])).sum().backward()
        >>> clip_grad_norm_(emb, max_norm=1.0)
        tensor(2.8284)
        >>> emb.weight.grad.norm()
        tensor(1.0000)
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type must be above 0, got {norm_type}")
    layers = {id(each.weight): each for each in model.modules() if isinstance(each, ParallelVocabEmbedding)}
    gradients, norms, of_groups = [], [torch.zeros(())], {}  # type: ignore[var-annotated]
    for parameter in model.parameters():
        layer, gradient = layers.get(id(parameter)), parameter.grad
        if layer is not None and layer.device_mesh is not None:  # a DTensor: its norm is that of all ranks' rows
            layer = None
        group = None if layer is None else layer.process_group
        if layer is not None and layer.world_size > 1 and group is None:
            raise ValueError(
                f"process_group must be given to a layer of {layer.world_size} ranks, got one built without: build it with "
                f"the group, over which the gradient's norm is summed"
            )
        if gradient is not None:
            gradients.append(gradient)
        if group is None:
            norms += [] if gradient is None else [_norm(gradient, norm_type)]
        else:  # a rank without a gradient contributes zero
            norm = torch.zeros((), device=parameter.device) if gradient is None else _norm(gradient, norm_type)
            of_groups.setdefault(group, []).append(norm)
    norms += [_over_ranks(held, group, norm_type) for group, held in of_groups.items()]
    device = next((norm.device for norm in norms[1:]), norms[0].device)
    total = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]), norm_type)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(f"the norm of the gradients is {total.item()}: omit error_if_nonfinite to scale by it")
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ does
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.device))
    return total


def _norm(gradient: Tensor, norm_type: float) -> Tensor:
    """Norm of a tensor or a whole DTensor, float32 or wider."""
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    wide = torch.promote_types(values.dtype, torch.float32)
    norm = torch.linalg.vector_norm(values, norm_type, dtype=wide)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _over_ranks(norms: list[Tensor], group: dist.ProcessGroup, norm_type: float) -> Tensor:
    """Norm over all ranks of the group."""
    norm = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    if math.isinf(norm_type):
        dist.all_reduce(norm, dist.ReduceOp.MAX, group=group)
        return norm
    power = norm**norm_type
    dist.all_reduce(power, group=group)
    return power ** (1 / norm_type)
