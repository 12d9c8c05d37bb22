"""Report on heads that computed one case."""

from __future__ import annotations

import platform
from collections.abc import Sequence

import numpy as np

from shared.proof.comparison import Comparison
from shared.proof.head_diff import HEAD_KINDS
from shared.proof.head_expected import BOUNDS, UNIT_ROUNDOFF, Expected
from shared.proof.head_record import ARRAYS
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
    case = expected.case
    tokens, counted = len(expected.counted_T), int(expected.counted_T.sum())
    shape = "x".join(map(str, case.ids_shape)) or "one"
    padded = f" (padded to {case.padded_vocab_size})" if case.partition.padding_rows else ""
    head = "tied head" if case.tied else "head"
    sizes = f"{case.vocab_size} x {case.emb_size} {case.dtype}"
    notes = [
        f"{case.source}; {'hidden states looked up in the table' if case.tied else 'normal hidden states'}",
        f"{counted} of {tokens} targets count; the others lie outside the vocabulary [0, {case.vocab_size})",
        f"bounds: sums in float32 (u = 2**-24), gradients rounded to {case.dtype}; the bits of all ranks are the same",
    ]
    if near_ties:
        notes.append(
            f"argmax of {near_ties} tokens: two logits are within rounding of each other, and either id is right"
        )
    versions = {**versions, "oracle": {"python": platform.python_version(), "numpy": np.__version__}}
    return Report(
        title=f"{head} of {sizes} over {case.world_size} ranks{padded}, tokens {shape}",
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
            "unit_roundoff": UNIT_ROUNDOFF,
            "bounds": BOUNDS,
            "near_ties": near_ties,
        },
        missing=missing,
        kinds=HEAD_KINDS,
        seconds=seconds,
    )
