"""What PyTorch has no stable public name for, and what differs between its versions: torch 2.6 and newer.

``dist.reduce_scatter_single`` and ``dist.all_gather_single`` are torch 2.13's names; before that, and for a while after,
``reduce_scatter_tensor`` and ``all_gather_into_tensor`` do the same.

Every private API that the package uses follows: why, and what would remove the need. A test uses each of them, so that a
release that moves one fails loudly.

- ``_resolve_process_group``: compiled graphs, copies and pickles hold a group by its name. Not needed once operators take
  a ProcessGroup (pytorch/pytorch#129942, open; tried in #172795).
- ``Tensor._make_wrapper_subclass``: torch.distributed.checkpoint takes pieces of a tensor from a subclass of Tensor alone.
  Not needed once it takes any object that tells its pieces (pytorch/pytorch#189492, in review).
- ``_StridedShard``: where ``fully_shard`` splits what another dimension of the mesh has split already, that is the name of
  its placement. Not needed once it names the order of splits in public.
- ``Module._apply``: the one method that ``to``, ``half`` and ``to_empty`` all pass through; ``nn.RNN`` overrides it for the
  same purpose. There is no public hook; none is proposed.
- ``torch.fx.experimental.proxy_tensor.get_proxy_mode``: whether make_fx is writing a graph down, in which other memory than
  the weight's would be a constant. It has no leading underscore, but "experimental" promises nothing.
- ``torch._C._are_functorch_transforms_active``: under torch.compile, dynamo inlines the forward of an autograd.Function that
  lies inside torch.func's grad or vmap and drops its backward. Not needed once it keeps both.
- ``Tensor._backward_hooks``, ``Tensor._post_accumulate_grad_hooks``, ``DistributedDataParallel._get_active_ddp_module``:
  whether somebody waits for a gradient that is not handed on, and whose ranks DistributedDataParallel keeps equal. There is
  no public question; none is proposed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "ModuleThatMoves",
    "active_data_parallel",
    "all_gather",
    "being_traced",
    "function_is_inlined",
    "group_of_name",
    "integers_cannot_be_viewed",
    "is_split_last",
    "reduce_scatter",
    "tensor_without_storage",
    "who_waits_for_the_gradient",
]

reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def active_data_parallel() -> nn.Module | None:
    """The DistributedDataParallel whose forward is running."""
    return DistributedDataParallel._get_active_ddp_module()


def group_of_name(name: str) -> dist.ProcessGroup:
    """The process group of that name.

    Raises:
        RuntimeError, ValueError: this process has none.
    """
    from torch._C._distributed_c10d import _resolve_process_group  # absent where torch is built without distributed

    return _resolve_process_group(name)  # type: ignore[arg-type]


def being_traced() -> bool:
    """Return True while a graph is written down, to be run again with other weights."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    proxy_tensor = sys.modules.get("torch.fx.experimental.proxy_tensor")  # make_fx is in it
    return proxy_tensor is not None and proxy_tensor.get_proxy_mode() is not None


def function_is_inlined() -> bool:
    """Return True where dynamo takes the forward of an autograd.Function as it is, without its backward."""
    return torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def integers_cannot_be_viewed() -> bool:
    """Return True where torch.func maps over a ``view`` of another dtype and its version has no rule for that."""
    return _NO_RULE_FOR_VIEWS and torch._C._are_functorch_transforms_active()


# aten::view.dtype has a batching rule from torch 2.13 on (pytorch/pytorch#180728).
_NO_RULE_FOR_VIEWS = torch.__version__ < "2.13"


def is_split_last(placement: Any) -> bool:
    """Return True for a DTensor's placement whose dimension of the mesh splits what all others have split."""
    return type(placement).__name__ == "_StridedShard"


def tensor_without_storage(cls: type[Tensor], size: torch.Size, like: Tensor) -> Any:
    """A tensor of a subclass, of the dtype and on the device of ``like``, that has no memory."""
    return torch.Tensor._make_wrapper_subclass(cls, size, dtype=like.dtype, device=like.device)


def who_waits_for_the_gradient(weight: Tensor) -> str | None:
    """Who expects autograd to hand the parameter's gradient on; None: nobody."""
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return "the table has gradient hooks, which would not be called"
    if active_data_parallel() is not None:
        return "DistributedDataParallel waits for the gradient: use fully_shard, or all-reduce the buffer yourself"
    return None


class ModuleThatMoves(nn.Module):
    """A module that is told when its parameters may have moved to other memory."""

    def parameters_moved(self) -> None:
        """Called after ``to``, ``half``, ``to_empty``, ``share_memory`` and their like."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self.parameters_moved()
        return result
