"""What the README shows is what happens. `python tests/consistency/test_readme.py` writes its outputs anew."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from shared.proof.classify import KINDS

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
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


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.S | re.M)


FILES = {block.split("\n")[0][2:]: block for block in blocks("python") if re.match(r"# \w+\.py\n", block)}


def split_console(block):
    """The commands of a console block, and the output it shows."""
    commands = re.match(r"(?:\$ (?:[^\n]*\\\n)*[^\n]*\n)+", block).group()
    return commands, block.removeprefix(commands)


def run_console(commands):
    """What the commands print, run where the README is; records are made first where they need some."""
    script = re.sub(r"^\$ ", "", commands, flags=re.M)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as folder:
        where = ROOT
        if any(name in script for name in FILES):
            where = Path(folder)
            for name, text in FILES.items():
                (where / name).write_text(text)
        if "pve convert" in script:
            where = Path(folder)
        if ".record" in script:
            where = Path(folder)
            (where / "broken_runner.py").write_text(BROKEN_LAYER)
            environment["PYTHONPATH"] = folder
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
    """The first in the default run, the others among the slow ones."""
    first, *others = blocks("console")
    return [first, *(pytest.param(block, marks=pytest.mark.slow) for block in others)]


@pytest.mark.parametrize("block", console_blocks(), ids=lambda block: block.split("\n")[0][2:50])
def test_commands_print_what_is_shown(block):
    commands, shown = split_console(block)
    assert normal(shown) == normal(run_console(commands))


@pytest.mark.parametrize("block", [block for block in blocks("python") if block not in FILES.values()])
def test_python_examples_run(block):
    subprocess.run([sys.executable, "-c", block], check=True, cwd="/")


def test_the_commands_to_set_up_are_those_that_ci_runs():
    prove, test = blocks("bash")[:2]
    assert prove.strip() == "python -m pip install -c constraints.txt -e '.[all]' && pve compare"
    assert test in (ROOT / ".ci" / "run").read_text()


def test_what_was_measured_is_what_is_shown():
    from benchmarks.readme import with_tables

    assert with_tables(README.read_text()) == README.read_text()


def test_every_kind_of_difference_is_listed():
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", README.read_text().partition("it looks like")[2], re.M)
    listed = dict(rows[: len(KINDS) + 1])
    listed.pop("", None)
    assert {kind: meaning for kind, meaning in listed.items() if kind in KINDS} == KINDS


def write():
    """Run every command of the README and put what it prints where it is shown."""
    for block in blocks("console"):
        commands, _ = split_console(block)
        printed = GLOO.sub("", run_console(commands)).splitlines()
        output = "\n".join(line.rstrip() for line in printed) + "\n"
        README.write_text(README.read_text().replace(f"```console\n{block}```", f"```console\n{commands}{output}```"))


if __name__ == "__main__":
    write()
