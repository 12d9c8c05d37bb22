"""Importing one room does not import the framework of another, and each room imports only what it may."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_NOT = {
    "shared": ("torch", "jax", "torch_impl", "jax_impl"),
    "torch_impl": ("jax", "jax_impl"),
    "jax_impl": ("torch", "torch_impl"),
}


def modules_after(statement):
    program = f"import sys\n{statement}\nprint(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/")
    return {name.partition(".")[0] for name in done.stdout.split()}


def all_modules(room):
    names = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / room).rglob("*.py")]
    return [".".join(name.parts).removesuffix(".__init__") for name in names]


@pytest.mark.parametrize("room", MAY_NOT)
def test_importing_a_room_leaves_the_others_out(room):
    loaded = modules_after("import " + ", ".join(all_modules(room)))
    assert room in loaded
    assert not loaded & set(MAY_NOT[room])


def test_this_test_can_fail():
    assert {"torch", "jax"} <= modules_after("import torch_impl, jax_impl")


@pytest.mark.parametrize("room", MAY_NOT)
def test_no_import_statement_names_what_the_room_may_not_import(room):
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = []
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                named = [node.module or ""]
            assert not {name.partition(".")[0] for name in named} & set(MAY_NOT[room]), path


UMBRELLA = "parallel_vocab_embedding"


def test_the_umbrella_imports_a_backend_on_use():
    assert not modules_after(f"import {UMBRELLA}") & {"torch", "jax", "torch_impl", "jax_impl"}


@pytest.mark.parametrize(
    ("room", "framework"),
    [("torch_impl", "jax"), ("jax_impl", "torch"), (f"{UMBRELLA}.torch", "jax"), (f"{UMBRELLA}.jax", "torch")],
)
def test_a_room_works_where_the_other_framework_is_not_installed(room, framework):
    block = f"import sys\nsys.modules[{framework!r}] = None\n"
    module = "ParallelVocabEmbedding" if room.startswith(UMBRELLA) else "runner"
    assert room.partition(".")[0] in modules_after(block + f"import {room}\nfrom {room} import {module}")


def test_the_backends_mirror_each_other_file_for_file():
    torch_only = {"accumulation", "clipping", "further_split", "host_rows", "process_group", "zero_row"}
    jax_only = {"placement"}  # a mesh axis in the place of a group
    names = [{path.stem for path in (ROOT / room).glob("*.py")} for room in ("torch_impl", "jax_impl")]
    assert (names[0] - names[1], names[1] - names[0]) == (torch_only, jax_only)
