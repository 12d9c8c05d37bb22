"""Private PyTorch APIs, and differences between its versions from 2.6 on.

``dist.reduce_scatter_single`` and ``dist.all_gather_single`` are torch 2.13's names for ``reduce_scatter_tensor`` and
``all_gather_into_tensor``.

Each has its reason below, and what would remove the need. Tests of what needs it fail when a release moves it.

- ``_resolve_process_group``: compiled graphs, copies and pickles hold a group by name. Not needed once operators take a
  ProcessGroup (pytorch/pytorch#129942, open; tried in #172795).
- ``Tensor._make_wrapper_subclass``: torch.distributed.checkpoint takes chunks of a tensor only from a subclass of Tensor.
  Not needed once it takes any object that describes its chunks (pytorch/pytorch#189492, in review).
- ``_StridedShard``: placement of a dimension that ``fully_shard`` splits after another mesh dimension. Not needed once the
  order of splits is public.
- ``Module._apply``: the one method behind ``to``, ``half`` and ``to_empty``; ``nn.RNN`` overrides it for the same purpose.
  There is no public hook; none is proposed.
- ``torch.fx.experimental.proxy_tensor.get_proxy_mode``: whether make_fx is tracing, where memory other than the weight's
  would be a constant. It has no leading underscore, but "experimental" promises nothing.
- ``torch._C._are_functorch_transforms_active``: under torch.compile, dynamo inlines the forward of an autograd.Function
  inside torch.func's grad or vmap and drops its backward. Not needed once dynamo keeps both.
- ``Tensor._backward_hooks``, ``Tensor._post_accumulate_grad_hooks``, ``DistributedDataParallel._get_active_ddp_module``:
  whether hooks or DDP expect a gradient from autograd, and which ranks DDP keeps equal. There is no public query; none is
  proposed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "ModuleThatMoves",
    "active_data_parallel",
    "all_gather",
    "being_traced",
    "distribute_rows",
    "function_is_inlined",
    "gradient_listener",
    "group_of_name",
    "integers_cannot_be_viewed",
    "is_split_last",
    "reduce_scatter",
    "tensor_without_storage",
]

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ParallelStyle

T = TypeVar("T", bound=Tensor)

reduce_scatter: Callable[..., dist.Work | None] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)
all_gather: Callable[..., dist.Work | None] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def distribute_rows(weight: Tensor, mesh: DeviceMesh, style: ParallelStyle) -> DTensor:
    """Split rows over a mesh, from the rank that ``style`` names.

    The styles of torch 2.6 name none: the first rank's rows are taken.
    """
    from torch.distributed.tensor import Shard, distribute_tensor

    source = {"src_data_rank": style.src_data_rank} if hasattr(style, "src_data_rank") else {}
    return distribute_tensor(weight, mesh, [Shard(0)], **source)


def active_data_parallel() -> nn.Module | None:
    """DistributedDataParallel whose forward is running; else None."""
    return DistributedDataParallel._get_active_ddp_module()


def group_of_name(name: str) -> dist.ProcessGroup:
    """Find a process group by name.

    Raises:
        RuntimeError, ValueError: this process has none of that name.
    """
    from torch._C._distributed_c10d import _resolve_process_group  # absent where torch is built without distributed

    return _resolve_process_group(name)  # type: ignore[arg-type]


def being_traced() -> bool:
    """Return True while tracing: the graph will run with other weights."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    proxy_tensor = sys.modules.get("torch.fx.experimental.proxy_tensor")  # make_fx is in it
    return proxy_tensor is not None and proxy_tensor.get_proxy_mode() is not None


def function_is_inlined() -> bool:
    """Whether dynamo inlines an autograd.Function's forward and drops its backward."""
    return torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def integers_cannot_be_viewed() -> bool:
    """Whether torch.func transforms ``view`` of another dtype without a rule."""
    return _NO_RULE_FOR_VIEWS and torch._C._are_functorch_transforms_active()


# aten::view.dtype has a batching rule from torch 2.13 on (pytorch/pytorch#180728).
_NO_RULE_FOR_VIEWS = torch.__version__ < "2.13"


def is_split_last(placement: object) -> bool:
    """Whether a placement splits what other mesh dimensions have split."""
    return type(placement).__name__ == "_StridedShard"


def tensor_without_storage(cls: type[T], size: torch.Size, like: Tensor) -> T:
    """Make a subclass tensor without storage, with dtype and device of ``like``."""
    return torch.Tensor._make_wrapper_subclass(cls, size, dtype=like.dtype, device=like.device)


def gradient_listener(weight: Tensor) -> str | None:
    """Describe the hooks or DDP that expect the gradient; else None."""
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return "the table has gradient hooks, which would not be called"
    if active_data_parallel() is not None:
        return "DistributedDataParallel waits for the gradient: use fully_shard, or all-reduce the buffer yourself"
    return None


class ModuleThatMoves(nn.Module):
    """Module notified when its parameters may have moved to other memory."""

    def parameters_moved(self) -> None:
        """Called after ``to``, ``half``, ``to_empty``, ``share_memory`` and similar methods."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        result = super()._apply(fn, recurse)
        self.parameters_moved()
        return result
