"""README, docs and examples show what happens. `python tests/consistency/test_docs.py` writes the outputs anew."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from shared.proof.classify import KINDS
from shared.proof.head_diff import HEAD_KINDS
from shared.proof.head_expected import BOUNDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Gloo's messages: printed piece by piece by several processes at once, so that a line may hold any of them, or none.
GLOO = re.compile(
    r"^(\[Gloo\] Rank |\d+| is connected to | peer ranks\. |Expected number of connected peer ranks is : )*\n", re.M
)
RUNNERS = ROOT / "tests" / "runners"
RECORDS = """
from shared.cli import main
from shared.proof.launch import BACKENDS

small = ["--vocab-size", "120", "--emb-size", "16", "--world-size", "2", "--dtype", "float32"]
main(["record", "--backend", "jax", "-o", "jax.record", *small])
BACKENDS["torch"] = "off_by_one_runner"
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
            environment["PYTHONPATH"] = f"{RUNNERS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
            subprocess.run(
                [sys.executable, "-c", RECORDS], check=True, cwd=where, env=environment, stdout=subprocess.DEVNULL
            )
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=where, env=environment)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def normal(output):
    """Output without what changes from run to run: times, errors, versions, messages of Gloo and spacing."""
    output = re.sub(r"\(\d+\.\d s\)", "(T s)", output)
    output = re.sub(r"at most \d\.\d\d of their bounds", "at most S of their bounds", output)
    output = GLOO.sub("", output)
    output = re.sub(r"^  (\S+): .*python \d.*$", r"  \1: versions", output, flags=re.M)
    return "\n".join(line.rstrip() for line in output.splitlines())


def console_blocks():
    """Those of a second by default; those that start frameworks are slow."""
    quick = ("pve plan", "pve convert")
    for block in blocks("console"):
        yield pytest.param(block, marks=[] if any(name in block for name in quick) else pytest.mark.slow)


@pytest.mark.parametrize("block", [*console_blocks()], ids=lambda block: block.split("\n")[0][2:50])
def test_commands_print_what_is_shown(block):
    commands, shown = split_console(block)
    assert normal(shown) == normal(run_console(commands))


# Each in a process of its own, forked from one that has imported the frameworks, which takes seconds.
FORKED = """
import os, runpy, sys
import jax_impl, torch_impl
for path in sys.argv[1:]:
    if not (child := os.fork()):
        sys.argv = [path]
        runpy.run_path(path, run_name="__main__")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, path
"""


def test_python_examples_run(tmp_path):
    scripts = [ROOT / "examples" / f"{name}.py" for name in ("move_table", "load_huggingface", "padding")]
    for number, block in enumerate(blocks("python")):
        scripts.append(tmp_path / f"block_{number}.py")
        scripts[-1].write_text(block)
    assert len(scripts) > 6
    subprocess.run([sys.executable, "-c", FORKED, *scripts], check=True, cwd="/", stdout=subprocess.DEVNULL)


def test_set_up_commands_are_those_of_ci():
    prove, test = blocks("bash", PAGES[:1])
    assert prove.strip() == "python -m pip install -c constraints.txt -e '.[all]' && pve compare"
    assert test in (ROOT / ".ci" / "run").read_text()


def test_tables_show_what_was_measured():
    from benchmarks.readme import PAGES as MEASURED
    from benchmarks.readme import with_tables

    for page in MEASURED:
        assert with_tables(page.read_text()) == page.read_text()


@pytest.mark.parametrize(("number", "kinds"), [(1, KINDS), (2, HEAD_KINDS)])
def test_every_kind_of_difference_is_listed(number, kinds):
    table = (ROOT / "docs" / "proof.md").read_text().split("| kind | meaning |\n|---|---|\n")[number]
    assert dict(re.findall(r"^\| (.+?) \| (.+?) \|$", table.partition("\n\n")[0], re.M)) == kinds


def test_bounds_of_the_head_are_listed():
    page = (ROOT / "docs" / "proof.md").read_text().replace("\\|", "|")
    for what, bound in BOUNDS.items():
        assert f"| {what} | {bound} |\n" in page


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
