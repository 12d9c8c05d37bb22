"""Prove that both backends compute the same (start here).

Each backend reads the table and the ids from files, in its own process, and splits the table over the ranks. It records
each rank's result and gradient, and the whole embedding. An oracle in NumPy does the same. The records are compared bit by
bit: backend against backend, and each backend against the oracle. The sums of the gradient fed in are exact in every
order, so no comparison needs a tolerance.

With --reduction the ranks communicate: torch runs one process per rank in a gloo group, JAX one device per rank.

With --head the output head is compared in place of the embedding: the cross entropy of hidden states against targets, over
the table split by rows. The ids are the targets (--ids); those outside the vocabulary do not count. Sums of products
round, so each array but the argmax has a bound, which follows from the dtype (--json prints the formulas). What all ranks
have must have the same bits on all of them. --tied gets the hidden states by looking the ids up in the same table; the
target of a token is the next id, and the table's gradient is the sum of both uses.

examples:
  pve compare                                        a generated table of 131072 x 1024 in bfloat16, over 8 ranks
  pve compare --world-size 3 --vocab-size 96 --emb-size 16 --dtype float32
  pve compare --weights model.safetensors --tensor model.embed_tokens.weight --world-size 4
  pve compare --reduction reduce_scatter --exchange routed --world-size 4
  pve compare --head --weights model.safetensors --tensor lm_head.weight --world-size 4
  pve compare --tied --weights table.safetensors --tokenizer tokenizer.json --text README.md --world-size 4
  pve compare --weights table.safetensors --tokenizer tokenizer.json --text README.md --json
  pve compare --report compare.html --markdown >> "$GITHUB_STEP_SUMMARY"

exit status: 0 equal, 1 different, 2 bad input
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

from shared.cli.case_arguments import add_case_arguments, case_options
from shared.cli.console import Steps, fail, progress_steps
from shared.cli.results import add_result_arguments, check_result_arguments, show_result
from shared.proof.case import build_case
from shared.proof.diff import compare_records
from shared.proof.head_case import HeadRecord, build_head_case
from shared.proof.head_diff import HeadDiff
from shared.proof.head_expected import Expected
from shared.proof.launch import BACKENDS, FRAMEWORKS, HEAD_BACKENDS, is_installed, run_backend
from shared.proof.record import Record
from shared.proof.report import Report, case_report

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``pve compare``."""
    add_case_arguments(parser)
    other = parser.add_argument_group("comparison")
    other.add_argument("--backends", metavar="A,B", help="torch, jax or both (default: all that are installed)")
    generated = "generated: a table of 32768 x 256, targets 4 x 128"
    other.add_argument("--head", action="store_true", help=f"compare the output head, not the embedding ({generated})")
    other.add_argument("--tied", action="store_true", help="the embedding has the head's table; implies --head")
    add_result_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    check_result_arguments(options)
    if options.backends is None:
        backends = [name for name in FRAMEWORKS if is_installed(name)]
        missing = [name for name in FRAMEWORKS if name not in backends]
        if not backends:
            return fail("neither torch nor jax is installed: pip install 'parallel-vocab-embedding[all]'")
    else:
        backends, missing = _named(options.backends), []
    compare = _compare_heads if options.head or options.tied else _compare_embeddings
    with tempfile.TemporaryDirectory(prefix="pve-") as temporary, progress_steps() as begin:
        report = compare(options, backends, missing, Path(temporary), begin)
    return show_result(report, options)


def _compare_embeddings(
    options: argparse.Namespace, backends: list[str], missing: list[str], folder: Path, begin: Steps
) -> Report:
    started = time.perf_counter()
    case = build_case(case_options(options), folder, begin("case"))
    names = [*backends, "oracle"]
    paths = {name: run_backend(name, BACKENDS[name], folder, folder / f"{name}.record", begin(name)) for name in names}
    records = {name: Record.open(path) for name, path in paths.items()}
    step = begin("compare")
    comparisons = [
        result
        for left, right in itertools.combinations(names, 2)
        for result in compare_records(records[left], records[right], step)
    ]
    versions = {name: record.versions for name, record in records.items()}
    return case_report(case, case.batch_array("ids"), versions, comparisons, missing, time.perf_counter() - started)


def _compare_heads(
    options: argparse.Namespace, backends: list[str], missing: list[str], folder: Path, begin: Steps
) -> Report:
    given = {"reduction": "none", "exchange": "auto", "seq_dim": None, "padding_idx": None}
    for name, default in given.items():
        if getattr(options, name) != default:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} is an option of the embedding, got {getattr(options, name)}: leave it out with --head"
            )
    started = time.perf_counter()
    case = build_head_case(case_options(options), options.tied, folder, begin("case"))
    paths = {name: run_backend(name, HEAD_BACKENDS[name], folder, folder / name, begin(name)) for name in backends}
    diff = HeadDiff(Expected(case, begin("oracle")), {name: HeadRecord(path) for name, path in paths.items()})
    comparisons = diff.compare(begin("compare"))
    return diff.report(comparisons, missing, time.perf_counter() - started)


def _named(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in FRAMEWORKS:
            raise ValueError(f"--backends takes {' and '.join(FRAMEWORKS)}, separated by a comma; got {name!r}")
        if not is_installed(name):
            package = f"parallel-vocab-embedding[{name}]"
            raise ValueError(f"--backends names {name}, which is not installed: pip install '{package}'")
    if len(set(names)) != len(names):
        raise ValueError(f"--backends must name each backend once, got {text}")
    return names
