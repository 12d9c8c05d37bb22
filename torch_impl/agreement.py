"""Faults between ranks: a collective that fails, and ranks that do not agree on what they compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shared.agreement import describe_ids, disagreement, ids_disagreement
from shared.config import EmbeddingConfig
from torch_impl.ids import is_dtensor
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


def check_agreement(ids: Any, weight: Tensor, config: EmbeddingConfig, group: dist.ProcessGroup) -> None:
    """Compare what all ranks of the group are about to compute, before any row travels.

    Args:
        ids: this rank's ids; whatever they are, the other ranks are not left waiting.
        weight: this rank's rows, of which a few are compared too.
        config: what else must be equal on all ranks.
        group: the ranks.

    Raises:
        ValueError: on every rank, naming the first difference and which ranks have what, or the ranks that hold the same
            rows.
    """
    mine, own_ids = {"dtype": str(weight.dtype), **config.agreement()}, config.reduction == "all_to_all"
    if own_ids and isinstance(ids, Tensor):  # only their dtype is the same
        mine["dtype of the ids"] = str(ids.dtype)
    elif isinstance(ids, Tensor) and not is_dtensor(ids):
        mine |= describe_ids(ids.detach().float().cpu().numpy() if ids.is_floating_point() else ids.cpu().numpy())
        mine["dtype of the ids"] = str(ids.dtype)
    else:
        mine["type of the ids"] = type(ids).__name__
    facts, rows = zip(*gather_objects((mine, _some_rows(weight, config, group.rank())), group, _COMPARING), strict=True)
    found = disagreement(facts)
    if found is not None:
        of_ids = disagreement([{name: known[name] for name in known if name != "ids"} for known in facts]) is None
        if of_ids and not own_ids:
            found = ids_disagreement(gather_objects(ids.cpu().numpy(), group, _COMPARING)) or found
        raise ValueError(found)
    if alike := _ranks_alike(rows):
        raise ValueError(
            f"ranks {alike[0]} and {alike[1]} hold the same rows, where each rank must hold its own: the table was "
            f"broadcast, loaded from another rank's file, or drawn from one seed; load it again, and keep it out of what "
            f"copies parameters from rank to rank"
        )


def _some_rows(weight: Tensor, config: EmbeddingConfig, rank: int) -> list[bytes | None]:
    """Hashes of 8 rows at the same places on every rank; None for rows that are padding or zero."""
    n, (start, stop) = config.partition.rows_per_rank, config.partition.owned_range(rank)
    places = sorted({place * (n - 1) // 7 for place in range(8)})
    owned = [place for place in places if place < stop - start]
    rows = weight.detach()[owned].cpu().contiguous()
    raw = rows.view(torch.uint8).numpy()
    hashes = [sha256(each.tobytes()).digest() if row.any() else None for row, each in zip(rows, raw, strict=True)]
    return hashes + [None] * (len(places) - len(owned))


def _ranks_alike(rows: Sequence[list[bytes | None]]) -> tuple[int, int] | None:
    """The first two ranks with the same rows, by one look at each row."""
    seen: dict[Any, int] = {}
    for rank, own in enumerate(rows):
        for place in enumerate(own):
            if (other := seen.setdefault(place, rank)) != rank and _same_rows(rows[other], own):
                return other, rank
    return None


def _same_rows(first: list[bytes | None], second: list[bytes | None]) -> bool:
    """Whether two ranks' rows are equal; those of one repeated row say nothing, as of a constant or of unused tokens."""
    both = [(one, other) for one, other in zip(first, second, strict=True) if one is not None and other is not None]
    return len({one for one, _ in both}) > 1 and all(one == other for one, other in both)


def agreed_ids(ids: Any, weight: Tensor, config: EmbeddingConfig, group_name: str) -> Any:
    """The ids, once all ranks are known to look the same ones up in the same way; compiled graphs can hold it.

    Raises:
        ValueError: on every rank, naming the first difference and which ranks have what.
    """
    if isinstance(ids, Tensor) and not is_dtensor(ids):
        return torch.ops.pve.check_agreement(ids, weight.detach(), config.text, group_name)
    check_agreement(ids, weight, config, find_group(group_name, None, config.world_size))
    return ids


@torch.library.custom_op("pve::check_agreement", mutates_args=())
def _check_agreement(ids: Tensor, weight: Tensor, config: str, group_name: str) -> Tensor:
    known = EmbeddingConfig.from_text(config)
    check_agreement(ids, weight, known, find_group(group_name, None, known.world_size))
    return ids.clone()


@_check_agreement.register_fake
def _(ids: Tensor, weight: Tensor, config: str, group_name: str) -> Tensor:
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
