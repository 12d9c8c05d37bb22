"""The figures of the results: this layer in blue, its peers in grey, a reference as a dashed line."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.local import Result

__all__ = ["draw_exchange", "draw_local"]

Found = dict[str, dict[str, float]]

_OURS, _PEERS, _REFERENCE = "tab:blue", "0.6", "tab:green"
_KINDS = {"forward": "forward", "forward_backward": "forward + backward"}
_REFERENCES = {
    ("torch", "forward"): "cloning the output",
    ("torch", "forward_backward"): "allocating output and gradient",
    ("jax", "forward"): "a gather without a mask",
    ("jax", "forward_backward"): "a gather without a mask",
}
"""What the result called ``floor`` is; this layer can be faster, for it leaves memory untouched."""


def draw_local(results: Sequence[Result], path: Path, title: str) -> bool:
    """Draw bars of the large cases, and lines over the number of tokens, to a PNG; False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    plt = _pyplot()
    large = [r for r in results if r.case.batch * r.case.sequence == 8192 and r.case.emb_size == 1024]
    large = [r for r in large if r.case.dtype in ("float32", "bfloat16") and r.case.reduction == "none"]
    few = [r for r in results if r.framework == "torch" and r.case == Case("none", 8, "uniform", 1, r.case.sequence)]
    few.sort(key=lambda r: r.case.sequence)
    rows = len(large) + 1
    figure, axes = plt.subplots(rows, 2, figsize=(13, 2.7 * rows + 1.2), squeeze=False)
    for row, result in zip(axes, large, strict=False):
        for axis, kind in zip(row, _KINDS, strict=True):
            _bars(axis, result.found, kind, _heading(result.framework, result.case, kind), result.framework)
    for axis, kind in zip(axes[-1], _KINDS, strict=True):
        _lines(axis, few, kind)
    return _save(figure, path, f"One rank's lookup beside its peers\n{title}")


def draw_exchange(results: Sequence[tuple[str, Found]], path: Path, title: str) -> bool:
    """Draw bars of each case's candidates, forward and with backward, to a PNG; False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    plt = _pyplot()
    figure, axes = plt.subplots(len(results), 2, figsize=(13, 1.9 * len(results) + 1.2), squeeze=False)
    for row, (case, found) in zip(axes, results, strict=True):
        for axis, (kind, words) in zip(row, _KINDS.items(), strict=True):
            _bars(axis, found, kind, f"{case}: {words}", "")
    return _save(figure, path, f"The embedding from all ranks, beside its peers\n{title}")


def _heading(framework: str, case: Case, kind: str) -> str:
    table = f"{case.vocab_size} x {case.emb_size} {case.dtype}"
    return f"{framework}, {_KINDS[kind]}: {table}, {case.batch} x {case.sequence} {case.ids} ids"


def _bars(axis: Any, found: Found, kind: str, title: str, framework: str) -> None:
    """One bar a candidate, with half the distance of the quartiles as its error."""
    names = [name for name in found if kind in found[name] and name not in ("floor", "zeros")]
    times = [found[name][kind] * 1e3 for name in names]
    spread = [found[name].get(f"{kind}_spread", 0) * time for name, time in zip(names, times, strict=True)]
    colours = [_OURS if name.startswith("ours") else _PEERS for name in names]
    axis.barh(names, times, color=colours, xerr=spread, error_kw={"lw": 0.8, "capsize": 2})
    if kind in found.get("floor", {}):
        label = _REFERENCES[framework, kind]
        axis.axvline(found["floor"][kind] * 1e3, color=_REFERENCE, ls="--", lw=1.2, label=label)
        axis.legend(fontsize=6, loc="lower right")
    axis.set_xlim(left=0)
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds", fontsize=7)
    axis.set_title(title, fontsize=8)
    axis.tick_params(labelsize=7)


def _lines(axis: Any, few: Sequence[Result], kind: str) -> None:
    """Time a call over the number of tokens; peers differ by their markers."""
    tokens = [result.case.sequence for result in few]
    markers = iter("osv^<>DPX*")
    for name in few[0].found if few else ():
        style: dict[str, Any] = {"color": _PEERS, "lw": 0.8}
        if name.startswith("ours"):
            style = {"color": _OURS, "lw": 2.5 if name == "ours" else 1.2}
        elif name in ("floor", "zeros"):
            style = {"color": _REFERENCE, "lw": 1.2, "ls": "--" if name == "floor" else ":"}
        else:
            style |= {"marker": next(markers), "ms": 4}
        label = {"floor": _REFERENCES["torch", kind], "zeros": "torch.zeros of the output"}.get(name, name)
        axis.loglog(tokens, [result.found[name][kind] * 1e6 for result in few], label=label, **style)
    axis.legend(fontsize=5.5, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set_xlabel("tokens", fontsize=7)
    axis.set_ylabel("microseconds a call", fontsize=7)
    if few:
        case = few[0].case
        table = f"{case.vocab_size} x {case.emb_size} {case.dtype}, {case.ids} ids"
        axis.set_title(f"torch, {_KINDS[kind]}: {table}", fontsize=8)
    axis.tick_params(labelsize=7)


def _save(figure: Any, path: Path, title: str) -> bool:
    from matplotlib.patches import Patch

    legend = [Patch(color=_OURS, label="this layer"), Patch(color=_PEERS, label="peers")]
    legend.append(Patch(color=_REFERENCE, label="reference"))
    figure.suptitle(title, fontsize=10)
    figure.legend(handles=legend, loc="upper right", fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(path, dpi=80)
    _pyplot().close(figure)
    return True


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt
