"""Errors of failed collectives, and checks that ranks agree."""

import contextlib
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from shared.agreement import describe_ids, disagreement, ids_disagreement
from shared.config import EmbeddingConfig
from torch_impl.ids import is_dtensor
from torch_impl.process_group import find_group

__all__ = ["agreed_hidden", "agreed_ids", "check_agreement", "gather_objects", "naming_the_operation"]

T = TypeVar("T")

_COMPARING = "what each rank is about to compute (check=True)"


@contextlib.contextmanager
def naming_the_operation(operation: str, group: dist.ProcessGroup) -> Iterator[None]:
    """Name the operation, rank and group size in a collective's error.

    Raises:
        RuntimeError: a rank has ended, exceeds the group's timeout, or sent data of another size.
    """
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{operation} failed on rank {group.rank()} of {group.size()}: {error}\n"
            f"A rank has ended, does not answer, or runs another operation: pass check=True, or set PVE_CHECK=1 in the "
            f"environment, to learn which."
        ) from error


def check_agreement(ids: Tensor, weight: Tensor, config: EmbeddingConfig, group: dist.ProcessGroup) -> None:
    """Compare what the ranks are about to compute, before any row travels.

    Invalid ids are compared too, so that no rank is left waiting. Eight rows of ``weight`` are compared.

    Raises:
        ValueError: on every rank. It names the first difference and the ranks on each side, or two ranks with equal rows.
    """
    mine, own_ids = {"dtype": str(weight.dtype), **config.agreement()}, config.reduction == "all_to_all"
    if own_ids and isinstance(ids, Tensor):  # their dtype alone must be equal
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
            f"broadcast, loaded from another rank's file, or drawn from one seed; load it again, and exclude it from "
            f"broadcasts of parameters"
        )


def _some_rows(weight: Tensor, config: EmbeddingConfig, rank: int) -> list[bytes | None]:
    """Hashes of eight sampled rows; None for padding and zero rows."""
    n, (start, stop) = config.partition.rows_per_rank, config.partition.owned_range(rank)
    places = sorted({place * (n - 1) // 7 for place in range(8)})
    owned = [place for place in places if place < stop - start]
    rows = weight.detach()[owned].cpu().contiguous()
    raw = rows.view(torch.uint8).numpy()
    hashes = [sha256(each.tobytes()).digest() if row.any() else None for row, each in zip(rows, raw, strict=True)]
    return hashes + [None] * (len(places) - len(owned))


def _ranks_alike(rows: Sequence[list[bytes | None]]) -> tuple[int, int] | None:
    """First two ranks with equal rows, in one pass; or None."""
    seen: dict[tuple[int, bytes | None], int] = {}
    for rank, own in enumerate(rows):
        for place in enumerate(own):
            if (other := seen.setdefault(place, rank)) != rank and _same_rows(rows[other], own):
                return other, rank
    return None


def _same_rows(first: list[bytes | None], second: list[bytes | None]) -> bool:
    """Whether two ranks' sampled rows are equal and not all one row.

    Rows of a constant initialisation, or of unused tokens, are legally equal.
    """
    both = [(one, other) for one, other in zip(first, second, strict=True) if one is not None and other is not None]
    return len({one for one, _ in both}) > 1 and all(one == other for one, other in both)


def agreed_ids(ids: Tensor, weight: Tensor, config: EmbeddingConfig, group_name: str) -> Tensor:
    """Check agreement in a custom operator; return the ids.

    Raises:
        ValueError: as ``check_agreement``.
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


def agreed_hidden(hidden: Tensor, targets: Tensor | None, split: bool, world_size: int, group_name: str) -> Tensor:
    """Compare what ranks give to a head; return the hidden states.

    Hidden states that are split along the sequence must have equal shapes, others equal bits.

    Raises:
        ValueError: on every rank. It names the first difference and the ranks on each side.
    """
    return torch.ops.pve.check_head_agreement(hidden, targets, split, world_size, group_name)


@torch.library.custom_op("pve::check_head_agreement", mutates_args=())
def _check_head_agreement(
    hidden: Tensor, targets: Tensor | None, split: bool, world_size: int, group_name: str
) -> Tensor:
    facts = {"shape of the hidden states": str(tuple(hidden.shape)), "dtype of the hidden states": str(hidden.dtype)}
    if targets is not None:
        described = describe_ids(targets.detach().cpu().numpy())
        facts |= {name.replace("ids", "targets"): value for name, value in described.items()}
    if not split:
        raw = hidden.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        facts["hidden states"] = f"SHA-256 {sha256(raw.tobytes()).hexdigest()[:16]}..."
    found = disagreement(gather_objects(facts, find_group(group_name, None, world_size), _COMPARING))
    if found is not None:
        raise ValueError(
            f"{found}; every rank needs the same targets, and complete hidden states or parts of a sequence"
        )
    return hidden.clone()


@_check_head_agreement.register_fake
def _(hidden: Tensor, targets: Tensor | None, split: bool, world_size: int, group_name: str) -> Tensor:
    return torch.empty_like(hidden)


_check_head_agreement.register_autograd(lambda ctx, grad: (grad, None, None, None, None))


def gather_objects(mine: T, group: dist.ProcessGroup, what: str) -> list[T]:
    """Gather a Python object from every rank.

    Raises:
        RuntimeError: a rank does not answer; the message names ``what``.
    """
    everyones = [mine] * group.size()
    with naming_the_operation(f"all_gather_object of {what}", group):
        dist.all_gather_object(everyones, mine, group=group)
    return everyones
