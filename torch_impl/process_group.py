"""Who am I: rank, world size and process group of a layer."""

from __future__ import annotations

import torch.distributed as dist

from shared.checks import check_rank, check_size
from shared.partition import VocabPartition
from torch_impl.private_api import group_of_name

__all__ = ["find_group", "resolve_group", "resolve_partition", "resolve_rank"]


def resolve_rank(
    rank: int | None, world_size: int | None, process_group: dist.ProcessGroup | None, source: str = "process_group"
) -> tuple[int, int]:
    """``(rank, world_size)``, taken from ``process_group`` where left out; 0 and 1 without a group.

    Raises:
        TypeError: a number is not an integer, or ``process_group`` is not a ``torch.distributed.ProcessGroup``.
        ValueError: a number is out of range or disagrees with the group; several ranks, and nothing tells which this is.
    """
    if process_group is None:
        size = 1 if world_size is None else check_size("world_size", world_size)
        if rank is None and size > 1:
            raise ValueError(
                f"rank must be given with world_size={size}: without it every process would hold the rows of rank 0; "
                f"pass rank, or a process_group that knows it"
            )
        return check_rank(0 if rank is None else rank, size), size

    if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup that this process is a member of "
            f"(a DeviceMesh gives one with get_group), got {process_group!r}"
        )
    group_rank, group_size = dist.get_rank(process_group), dist.get_world_size(process_group)
    for name, given, actual in (("rank", rank, group_rank), ("world_size", world_size, group_size)):
        if given is not None and given != actual:
            raise ValueError(
                f"{name} must agree with {source}: got {name}={given}, the group says {actual}; "
                f"leave {name} out to take the group's"
            )
    return group_rank, group_size


def resolve_group(process_group: dist.ProcessGroup | None, reduction: str, world_size: int) -> str | None:
    """The group's name: modules are copied and pickled with it, and compiled graphs hold it.

    Raises:
        ValueError: there is no group, and ``reduction`` needs one.
    """
    if process_group is not None:
        return str(process_group.group_name)
    if reduction != "none" and world_size > 1:
        raise ValueError(
            f"process_group must be given for reduction={reduction!r} with world_size={world_size}, got None; pass the "
            f"group that holds the ranks, such as torch.distributed.group.WORLD after init_process_group"
        )
    return None


def resolve_partition(partition: VocabPartition, process_group: dist.ProcessGroup | None) -> tuple[int, str]:
    """This rank and the group's name, which is empty where the partition has one rank.

    Raises:
        TypeError: ``process_group`` is not a ``torch.distributed.ProcessGroup``.
        ValueError: it has another number of ranks than the partition, or is None where there are several.
    """
    if process_group is None and partition.world_size > 1:
        raise ValueError(
            f"process_group must be given for a partition of world_size={partition.world_size}, got None; pass the group "
            f"that holds the ranks, such as torch.distributed.group.WORLD after init_process_group"
        )
    rank, world_size = resolve_rank(None, partition.world_size, process_group)
    return rank, str(process_group.group_name) if process_group is not None and world_size > 1 else ""


def find_group(name: str, rank: int | None, world_size: int) -> dist.ProcessGroup:
    """Find the group of that name and check that it is the one a module was built for.

    Raises:
        RuntimeError: this process has no such group (any more), or it gives another rank or size.
    """
    try:
        group = group_of_name(name)
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"the process group {name!r} of this ParallelVocabEmbedding does not exist in this process; "
            f"build the module after init_process_group, and use it before destroy_process_group"
        ) from error
    if group.size() != world_size or rank not in (None, group.rank()):
        raise RuntimeError(
            f"the process group {name!r} makes this process rank {group.rank()} of {group.size()}, this "
            f"ParallelVocabEmbedding was made as rank {rank} of {world_size}; build it anew with the group at hand"
        )
    return group
