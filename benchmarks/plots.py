"""The figures of the results."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.local import Result

__all__ = ["draw_exchange", "draw_local"]


Found = dict[str, dict[str, float]]


def draw_local(results: Sequence[Result], path: Path, title: str) -> bool:
    """Bars of the large cases and lines over the number of tokens, into a PNG; False where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    plt = _pyplot()
    large = [r for r in results if r.case.batch * r.case.sequence == 8192 and r.case.dtype == "float32"]
    panels = [(r, kind) for r in large for kind in ("forward", "forward_backward") if r.case.emb_size == 1024]
    panels = panels[:8]
    figure, axes = plt.subplots(
        -(-len(panels) // 2) + 1, 2, figsize=(13, 3.2 * (-(-len(panels) // 2) + 1)), squeeze=False
    )
    flat = list(axes.flat)
    for axis, (result, kind) in zip(flat, panels, strict=False):
        _bars(axis, result.found, kind, f"{result.framework}, {kind.replace('_', ' + ')}, {result.case.ids} ids")
    few = [r for r in results if r.framework == "torch" and r.case == Case("none", 8, "uniform", 1, r.case.sequence)]
    few.sort(key=lambda r: r.case.sequence)
    for axis, kind in zip(flat[-2:], ("forward", "forward_backward"), strict=True):
        for name in few[0].found if few else ():
            width = 2.5 if name == "ours" else 1
            tokens = [r.case.sequence for r in few]
            axis.loglog(tokens, [r.found[name][kind] * 1e6 for r in few], marker=".", lw=width, label=name)
        axis.set_xlabel("tokens, uniform ids")
        axis.set_ylabel("us a call")
        axis.set_title(f"torch, {kind.replace('_', ' + ')}", fontsize=9)
    if few:
        flat[-2].legend(fontsize=6)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return True


def draw_exchange(results: Sequence[tuple[str, Found]], path: Path, title: str) -> bool:
    """Bars of each case's candidates, forward and with backward, into a PNG; False where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    plt = _pyplot()
    figure, axes = plt.subplots(len(results), 2, figsize=(13, 1.8 * len(results) + 1), squeeze=False)
    for row, (case, found) in zip(axes, results, strict=True):
        for axis, kind in zip(row, ("forward", "forward_backward"), strict=True):
            _bars(axis, found, kind, f"{case}, {kind.replace('_', ' + ')}")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return True


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _bars(axis: Any, found: Found, kind: str, title: str) -> None:
    """One bar a candidate: ours blue, the floor green."""
    names = [name for name in found if kind in found[name]]
    colours = ["tab:blue" if name.startswith("ours") else "tab:grey" for name in names]
    colours = ["tab:green" if name == "floor" else colour for name, colour in zip(names, colours, strict=True)]
    axis.barh(names, [found[name][kind] * 1e3 for name in names], color=colours)
    axis.invert_yaxis()
    axis.set_xlabel("ms", fontsize=7)
    axis.set_title(title, fontsize=8)
    axis.tick_params(labelsize=7)
