"""README, docs and examples show what happens. `python tests/consistency/test_docs.py` writes the outputs anew."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from shared.proof.classify import KINDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Printed piece by piece, by several processes at once.
GLOO = re.compile(
    r"^(\[Gloo\] Rank |\d+| is connected to | peer ranks\. |Expected number of connected peer ranks is : )+\n", re.M
)
BROKEN_LAYER = """
import torch

from shared.proof.harness import serve
from torch_impl import runner
from torch_impl.functional import partial_lookup


class Replaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, right, wrong):
        return wrong.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class OffByOne(runner.ParallelVocabEmbedding):
    def forward(self, ids):
        wrong = partial_lookup(self.weight.detach().roll(-1, 0), ids, self.partition, self.rank)
        return Replaced.apply(super().forward(ids), wrong)


runner.ParallelVocabEmbedding = OffByOne
serve("torch", {}, runner.run)
"""
RECORDS = """
from shared.cli import main
from shared.proof.launch import BACKENDS

small = ["--vocab-size", "120", "--emb-size", "16", "--world-size", "2", "--dtype", "float32"]
main(["record", "--backend", "jax", "-o", "jax.record", *small])
BACKENDS["torch"] = "broken_runner"
main(["record", "--backend", "torch", "-o", "broken.record", *small])
"""


def blocks(language, pages=PAGES):
    return [
        block for page in pages for block in re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.S | re.M)
    ]


def split_console(block):
    """The commands of a console block, and the output it shows."""
    commands = re.match(r"(?:\$ (?:[^\n]*\\\n)*[^\n]*\n)+", block).group()
    return commands, block.removeprefix(commands)


def run_console(commands):
    """What the commands print, run in the repository; records are made first where they need some."""
    script = re.sub(r"^\$ ", "", commands, flags=re.M)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as folder:
        where = ROOT
        if "pve convert" in script:
            where = Path(folder)
        if ".record" in script:
            where = Path(folder)
            (where / "broken_runner.py").write_text(BROKEN_LAYER)
            environment["PYTHONPATH"] = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
            subprocess.run(
                [sys.executable, "-c", RECORDS], check=True, cwd=where, env=environment, stdout=subprocess.DEVNULL
            )
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=where, env=environment)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def normal(output):
    """Without what changes from run to run: times, versions, and trailing spaces."""
    output = re.sub(r"\(\d+\.\d s\)", "(T s)", output)
    output = GLOO.sub("", output)
    output = re.sub(r"^  (\S+): .*python \d.*$", r"  \1: versions", output, flags=re.M)
    return "\n".join(line.rstrip() for line in output.splitlines())


def console_blocks():
    """The README's and those of a second in the default run, the others among the slow ones."""
    quick = ("pve plan", "pve convert")
    first, *others = blocks("console")
    return [
        first,
        *(pytest.param(each, marks=[] if any(name in each for name in quick) else pytest.mark.slow) for each in others),
    ]


@pytest.mark.parametrize("block", console_blocks(), ids=lambda block: block.split("\n")[0][2:50])
def test_commands_print_what_is_shown(block):
    commands, shown = split_console(block)
    assert normal(shown) == normal(run_console(commands))


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.split("\n")[0])
def test_python_examples_run(block):
    subprocess.run([sys.executable, "-c", block], check=True, cwd="/")


@pytest.mark.parametrize("name", ["move_table", "load_huggingface", "padding"])
def test_examples_run(name):
    subprocess.run([sys.executable, ROOT / "examples" / f"{name}.py"], check=True, stdout=subprocess.DEVNULL)


def test_the_commands_to_set_up_are_those_that_ci_runs():
    prove, test = blocks("bash", PAGES[:1])
    assert prove.strip() == "python -m pip install -c constraints.txt -e '.[all]' && pve compare"
    assert test in (ROOT / ".ci" / "run").read_text()


def test_what_was_measured_is_what_is_shown():
    from benchmarks.readme import PAGES as MEASURED
    from benchmarks.readme import with_tables

    for page in MEASURED:
        assert with_tables(page.read_text()) == page.read_text()


def test_every_kind_of_difference_is_listed():
    rows = re.findall(
        r"^\| (.+?) \| (.+?) \|$", (ROOT / "docs" / "proof.md").read_text().partition("it looks like")[2], re.M
    )
    listed = dict(rows[: len(KINDS) + 1])
    listed.pop("", None)
    assert {kind: meaning for kind, meaning in listed.items() if kind in KINDS} == KINDS


def test_readme_is_short():
    assert len(PAGES[0].read_text().splitlines()) <= 200


def write():
    """Run every command of the pages and put what it prints where it is shown."""
    for page in PAGES:
        for block in blocks("console", [page]):
            commands, _ = split_console(block)
            printed = GLOO.sub("", run_console(commands)).splitlines()
            output = "\n".join(line.rstrip() for line in printed) + "\n"
            page.write_text(page.read_text().replace(f"```console\n{block}```", f"```console\n{commands}{output}```"))


if __name__ == "__main__":
    write()
