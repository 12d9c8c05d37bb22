"""Rank, world size and process group of a layer."""

import torch.distributed as dist

from shared.checks import check_rank, check_size
from shared.partition import VocabPartition
from torch_impl.private_api import group_of_name

__all__ = ["find_group", "resolve_group", "resolve_partition", "resolve_rank"]


def resolve_rank(
    rank: int | None, world_size: int | None, process_group: dist.ProcessGroup | None, source: str = "process_group"
) -> tuple[int, int]:
    """Resolve ``(rank, world_size)`` from ``process_group``; 0 and 1 without a group.

    Raises:
        TypeError: a number is not an integer, or ``process_group`` is not a ``torch.distributed.ProcessGroup``.
        ValueError: a number is out of range or disagrees with the group; with several ranks, ``rank`` is not given.
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
    """Name of the group, which graphs, copies and pickles can hold.

    Raises:
        ValueError: ``reduction`` needs a group and there is none.
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
    """This rank and the group's name, empty for a single rank.

    Raises:
        TypeError: ``process_group`` is not a ``torch.distributed.ProcessGroup``.
        ValueError: its size differs from the partition's, or it is None with several ranks.
    """
    if process_group is None and partition.world_size > 1:
        raise ValueError(
            f"process_group must be given for a partition of world_size={partition.world_size}, got None; pass the group "
            f"that holds the ranks, such as torch.distributed.group.WORLD after init_process_group"
        )
    rank, world_size = resolve_rank(None, partition.world_size, process_group)
    return rank, str(process_group.group_name) if process_group is not None and world_size > 1 else ""


def find_group(name: str, rank: int | None, world_size: int) -> dist.ProcessGroup:
    """Find a module's group by name, and check its rank and size.

    Raises:
        RuntimeError: this process does not have the group, or its rank or size differs.
    """
    try:
        group = group_of_name(name)
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"the process group {name!r} of this ParallelVocabEmbedding does not exist in this process: "
            f"build the module after init_process_group, and use it before destroy_process_group"
        ) from error
    if group.size() != world_size or rank not in (None, group.rank()):
        raise RuntimeError(
            f"the process group {name!r} makes this process rank {group.rank()} of {group.size()}, but this "
            f"ParallelVocabEmbedding was built as rank {rank} of {world_size}: build it again with this group"
        )
    return group
