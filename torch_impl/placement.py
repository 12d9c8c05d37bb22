"""Which rank a module is, of how many."""

from __future__ import annotations

import torch.distributed as dist

from shared.checks import check_rank, check_size

__all__ = ["resolve_rank"]


def resolve_rank(rank: int | None, world_size: int | None, process_group: dist.ProcessGroup | None) -> tuple[int, int]:
    """``(rank, world_size)``, taken from ``process_group`` where left out; 0 and 1 without a group.

    Raises:
        TypeError: a number is not an integer, or ``process_group`` is not a ``torch.distributed.ProcessGroup``.
        ValueError: a number is out of range or disagrees with the group, or this process is not in the group.
    """
    if process_group is None:
        size = 1 if world_size is None else check_size("world_size", world_size)
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
                f"{name} must agree with process_group: got {name}={given}, the group says {actual}; "
                f"leave {name} out to take the group's"
            )
    return group_rank, group_size
