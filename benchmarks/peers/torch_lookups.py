"""One rank's lookup in PyTorch as other libraries do it, in our own words."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LOOKUPS", "Lookup"]

Lookup = Callable[[Tensor], Tensor]


def _megatron(weight: Tensor, start: int, deterministic: bool = False) -> Lookup:
    n = len(weight)

    def lookup(ids: Tensor) -> Tensor:
        foreign = (ids < start) | (ids >= start + n)
        local = ids.clone() - start
        local[foreign] = 0
        output = weight[local] if deterministic else F.embedding(local, weight)
        output[foreign, :] = 0.0
        return output

    return lookup


def _vllm(weight: Tensor, start: int) -> Lookup:
    n = len(weight)

    def lookup(ids: Tensor) -> Tensor:
        owned = (ids >= start) & (ids < start + n)
        output = F.embedding(owned * (ids - start), weight)
        return output.masked_fill_(~owned.unsqueeze(-1), 0)

    return lookup


def _null_row(weight: Tensor, start: int) -> Lookup:
    n = len(weight)
    longer = nn.Parameter(torch.cat([weight.detach(), weight.new_zeros(1, weight.shape[1])]))

    def lookup(ids: Tensor) -> Tensor:
        return F.embedding(torch.where((ids < start) | (ids >= start + n), n, ids - start), longer)

    lookup.parameter = longer  # type: ignore[attr-defined]
    return lookup


def _times_mask(weight: Tensor, start: int) -> Lookup:
    n = len(weight)

    def lookup(ids: Tensor) -> Tensor:
        owned = (ids >= start) & (ids < start + n)
        return F.embedding((ids - start) * owned, weight) * owned.unsqueeze(-1)

    return lookup


def _bags(weight: Tensor, start: int) -> Lookup:
    """Adding one row to nothing: it turns -0.0 into 0.0."""
    n = len(weight)

    def lookup(ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        owned = (flat >= start) & (flat < start + n)
        rows = flat[owned] - start
        output = F.embedding_bag(rows, weight, owned.cumsum(0) - owned.long(), mode="sum")
        return output.view(*ids.shape, weight.shape[1])

    return lookup


LOOKUPS: dict[str, Callable[[Tensor, int], Lookup]] = {
    "Megatron's form": _megatron,
    "Megatron's, deterministic": functools.partial(_megatron, deterministic=True),
    "vLLM's form": _vllm,
    "TGI's null row": _null_row,
    "torchtitan's, times the mask": _times_mask,
    "embedding_bag": _bags,
}
"""By name: made from a rank's table and its first row."""
