"""Refusal of data parallelism over the ranks of one table."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from torch_impl.files import TableInFiles
from torch_impl.private_api import active_data_parallel

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["active_data_parallel_problem", "check_further_split"]

_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_further_split(weight: DTensor, layer: TableInFiles) -> None:
    """Refuse ``fully_shard`` of a table over the layer's own ranks.

    Raises:
        ValueError: the DTensor's mesh holds other ranks of the layer, whose rows ``fully_shard`` would take for copies.
    """
    shared = _ranks_of(layer) & set(weight.device_mesh.mesh.flatten().tolist()) - {dist.get_rank()}
    if shared:
        raise ValueError(
            f"fully_shard must be over ranks that hold the same rows, got a mesh with ranks {sorted(shared)}, which hold "
            f"other rows of this table: pass mesh= the data-parallel dimension, or ignored_params={{emb.weight}}"
        )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # dynamo runs it once, while tracing
def active_data_parallel_problem() -> str | None:
    """Describe how a running DistributedDataParallel mixes ranks' rows; else None.

    When it is built, DistributedDataParallel overwrites the rows with those of its first rank; no public API reports
    that. Each instance is checked once.
    """
    wrapper: Any = active_data_parallel()
    if wrapper is None or wrapper in _checked:
        return None
    own = set(dist.get_process_group_ranks(wrapper.process_group)) - {dist.get_rank()}
    parameters = wrapper.module.named_parameters()
    names = {id(each): name for name, each in parameters if name not in wrapper.parameters_to_ignore}
    for layer in wrapper.module.modules():
        if isinstance(layer, TableInFiles) and id(layer.weight) in names and (shared := _ranks_of(layer) & own):
            name = names[id(layer.weight)]
            return (
                f"DistributedDataParallel must be over ranks that hold the same rows: it gave {name} the rows of its first "
                f"rank, and {name} has other rows on ranks {sorted(shared)}. Build the model again; pass process_group= the "
                f"data-parallel group, or before wrapping call DistributedDataParallel."
                f"_set_params_and_buffers_to_ignore_for_model(model, [{name!r}])"
            )
    _checked.add(wrapper)
    return None


def _ranks_of(layer: TableInFiles) -> set[int]:
    """Global ranks that hold the table; empty if unknown."""
    if layer.process_group is not None:
        return set(dist.get_process_group_ranks(layer.process_group))
    return set(range(layer.world_size)) if layer.world_size == dist.get_world_size() else set()
