"""Report on heads that computed one case."""

import platform
from collections.abc import Sequence

import numpy as np

from shared.proof.comparison import Comparison
from shared.proof.head_diff import HEAD_KINDS, HeadDiff
from shared.proof.head_expected import BOUNDS, UNIT_ROUNDOFF
from shared.proof.head_record import ARRAYS
from shared.proof.report import Report, sizes

__all__ = ["head_report"]


def head_report(diff: HeadDiff, comparisons: Sequence[Comparison], missing: Sequence[str], seconds: float) -> Report:
    """Report on backends that computed one case of the head, from ``HeadDiff.compare``."""
    case, counted = diff.case, diff.expected.counted_T
    shape = "x".join(map(str, case.ids_shape)) or "one"
    notes = [
        f"{case.source}; {'hidden states looked up in the table' if case.tied else 'normal hidden states'}",
        f"{counted.sum()} of {counted.size} targets count; the others lie outside the vocabulary [0, {case.vocab_size})",
        f"bounds: sums in float32 (u = 2**-24), gradients rounded to {case.dtype}; the bits of all ranks are the same",
    ]
    near_ties = len(diff.near_ties)
    if near_ties:
        notes.append(
            f"argmax of {near_ties} tokens: two logits are within rounding of each other, and either id is right"
        )
    versions = {name: record.versions for name, record in diff.records.items()}
    versions["oracle"] = {"python": platform.python_version(), "numpy": np.__version__}
    return Report(
        title=f"{'tied head' if case.tied else 'head'} of {sizes(case)}, tokens {shape}",
        notes=tuple(notes),
        sides=versions,
        partition=case.partition,
        arrays=dict.fromkeys(ARRAYS, ""),
        comparisons=comparisons,
        facts={
            "case": case.facts,
            "ids_outside": int((~counted).sum()),
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
