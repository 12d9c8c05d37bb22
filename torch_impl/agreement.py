"""Faults between ranks: a collective that fails, and ranks that do not agree on what they compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shared.agreement import describe_ids, disagreement, ids_disagreement
from shared.config import EmbeddingConfig
from torch_impl.process_group import find_group

__all__ = ["agreed_ids", "check_agreement", "gather_objects", "naming_the_operation"]

_COMPARING = "what each rank is about to compute (check=True)"


@contextlib.contextmanager
def naming_the_operation(operation: str, group: dist.ProcessGroup) -> Iterator[None]:
    """Turn the failure of a collective into an error that says which one failed, and where.

    Raises:
        RuntimeError: a rank of the group has ended, does not answer within the group's timeout, or sent another size.
    """
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{operation} failed on rank {group.rank()} of {group.size()}: {error}\n"
            f"A rank has ended, does not answer, or computes something else (check=True, or PVE_CHECK=1 in the "
            f"environment, tells which)."
        ) from error


def check_agreement(ids: Any, facts: dict[str, str], group: dist.ProcessGroup) -> None:
    """Compare what all ranks of the group are about to compute, before any row travels.

    Args:
        ids: this rank's ids; whatever they are, the other ranks are not left waiting.
        facts: what else must be equal on all ranks, by name.
        group: the ranks.

    Raises:
        ValueError: on every rank, naming the first difference and which ranks have what.
    """
    mine = dict(facts)
    if isinstance(ids, Tensor):
        mine |= describe_ids(ids.detach().float().cpu().numpy() if ids.is_floating_point() else ids.cpu().numpy())
        mine["dtype of the ids"] = str(ids.dtype)
    else:
        mine["type of the ids"] = type(ids).__name__
    everyones = gather_objects(mine, group, _COMPARING)
    found = disagreement(everyones)
    if found is None:
        return
    others_equal = disagreement([{name: known[name] for name in known if name != "ids"} for known in everyones]) is None
    if others_equal:
        found = ids_disagreement(gather_objects(ids.cpu().numpy(), group, _COMPARING)) or found
    raise ValueError(found)


def agreed_ids(ids: Any, config: EmbeddingConfig, dtype: torch.dtype, group_name: str) -> Any:
    """The ids, once all ranks are known to look the same ones up in the same way; compiled graphs can hold it.

    Raises:
        ValueError: on every rank, naming the first difference and which ranks have what.
    """
    if isinstance(ids, Tensor):
        return torch.ops.pve.check_agreement(ids, config.text, str(dtype), group_name)
    check_agreement(ids, {"dtype": str(dtype), **config.agreement()}, find_group(group_name, None, config.world_size))
    return ids


@torch.library.custom_op("pve::check_agreement", mutates_args=())
def _check_agreement(ids: Tensor, config: str, dtype: str, group_name: str) -> Tensor:
    known = EmbeddingConfig.from_text(config)
    check_agreement(ids, {"dtype": dtype, **known.agreement()}, find_group(group_name, None, known.world_size))
    return ids.clone()


@_check_agreement.register_fake
def _(ids: Tensor, config: str, dtype: str, group_name: str) -> Tensor:
    return torch.empty_like(ids)


def gather_objects(mine: Any, group: dist.ProcessGroup, what: str) -> list[Any]:
    """What every rank passed, on every rank.

    Raises:
        RuntimeError: a rank does not answer; the message says what was being gathered.
    """
    everyones: list[Any] = [None] * group.size()
    with naming_the_operation(f"all_gather_object of {what}", group):
        dist.all_gather_object(everyones, mine, group=group)
    return everyones
