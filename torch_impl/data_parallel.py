"""Data parallelism over the ranks that a table is split over, which would mix their rows."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from torch_impl.files import TableInFiles
from torch_impl.private_api import active_data_parallel

__all__ = ["active_data_parallel_problem", "check_further_split"]

_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_further_split(weight: Any, layer: TableInFiles) -> None:
    """Refuse a DTensor that is split over the layer's own ranks, as by ``fully_shard``.

    Args:
        weight: what is to be the layer's table.
        layer: whose table.

    Raises:
        ValueError: the DTensor's mesh has other ranks of the layer: ``fully_shard`` takes their rows for copies of these.
    """
    shared = _ranks_of(layer) & set(weight.device_mesh.mesh.flatten().tolist()) - {dist.get_rank()}
    if shared:
        raise ValueError(
            f"fully_shard must be over ranks that hold the same rows, got a mesh with ranks {sorted(shared)}, which hold "
            f"other rows of this table: pass mesh= the data-parallel dimension, or ignored_params={{emb.weight}}"
        )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # Dynamo runs it once, while it traces
def active_data_parallel_problem() -> str | None:
    """Say what is wrong with the DistributedDataParallel that is running; None if nothing is.

    It must not take other ranks' rows for copies. Each one is looked at once. It overwrote the rows with rank 0's when it
    was built, which nothing public announces.
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
    """The ranks, in the whole world, that hold the table, as far as they are known."""
    if layer.process_group is not None:
        return set(dist.get_process_group_ranks(layer.process_group))
    return set(range(layer.world_size)) if layer.world_size == dist.get_world_size() else set()
