"""Report on heads that computed one case."""

from __future__ import annotations

import platform
from collections.abc import Sequence

import numpy as np

from shared.proof.comparison import Comparison
from shared.proof.head_diff import HEAD_KINDS
from shared.proof.head_expected import BOUNDS, Expected
from shared.proof.head_record import ARRAYS
from shared.proof.oracle import accumulation_dtype
from shared.proof.report import Report, Versions

__all__ = ["head_report"]


def head_report(
    expected: Expected,
    versions: Versions,
    comparisons: Sequence[Comparison],
    near_ties: int,
    missing: Sequence[str] = (),
    seconds: float | None = None,
) -> Report:
    """Report on backends that computed one case of the head.

    Args:
        expected: the oracle's result.
        versions: facts of each backend, by its name.
        comparisons: of ``HeadDiff.compare``.
        near_ties: tokens for which several ids are right.
        missing: backends that are not installed.
        seconds: time taken.
    """
    case, u = expected.case, expected.unit_roundoff
    tokens, counted = len(expected.counted_T), int(expected.counted_T.sum())
    shape = "x".join(map(str, case.ids_shape)) or "one"
    padded = f" (padded to {case.padded_vocab_size})" if case.partition.padding_rows else ""
    head = "tied head" if case.tied else "head"
    wide = accumulation_dtype(case.dtype)
    notes = [
        f"{case.source}; {'hidden states looked up in the table' if case.tied else 'normal hidden states'}",
        f"{counted} of {tokens} targets count; the others lie outside the vocabulary [0, {case.vocab_size})",
        f"bounds: sums in {wide} (u = {u:.3g}), gradients rounded to {case.dtype}; loss identical on all ranks in every bit",
    ]
    if near_ties:
        notes.append(f"argmax of {near_ties} tokens: two logits are within rounding of each other, and either id is right")
    versions = {**versions, "oracle": {"python": platform.python_version(), "numpy": np.__version__}}
    return Report(
        title=f"{head} of {case.vocab_size} x {case.emb_size} {case.dtype} over {case.world_size} ranks{padded}, tokens {shape}",
        notes=tuple(notes),
        sides=versions,
        partition=case.partition,
        arrays=dict.fromkeys(ARRAYS, ""),
        comparisons=comparisons,
        facts={
            "case": case.facts,
            "ids_outside": tokens - counted,
            "backends": versions,
            "missing": list(missing),
            "unit_roundoff": u,
            "bounds": BOUNDS,
            "near_ties": near_ties,
        },
        missing=missing,
        kinds=HEAD_KINDS,
        seconds=seconds,
    )
