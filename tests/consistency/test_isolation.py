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
# What each part of `shared` may import besides the standard library.
WINGS = {
    "shared": {"numpy", "ml_dtypes", "shared"},
    "shared.tables": {"numpy", "safetensors", "shared", "shared.tables"},
    "shared.proof": {"numpy", "ml_dtypes", "safetensors", "tokenizers", "shared", "shared.tables", "shared.proof"},
    "shared.cli": {"rich", "shtab", "shared", "shared.tables", "shared.proof", "shared.cli"},
}


# Prints what was looked for although it is not installed, and what was imported.
WITHOUT = """
import sys
def find_spec(name, *_):
    if name in {hidden!r}:
        print("looked for", name)
        raise ModuleNotFoundError(name)
sys.meta_path.insert(0, type("Hidden", (), {{"find_spec": staticmethod(find_spec)}}))
import {names}
print(*sorted(sys.modules))
"""


def all_modules(room):
    names = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / room).rglob("*.py")]
    return [".".join(name.parts).removesuffix(".__init__") for name in names]


@pytest.mark.parametrize("room", MAY_NOT)
def test_room_imports_and_needs_no_other(room):
    program = WITHOUT.format(hidden=MAY_NOT[room], names=", ".join(all_modules(room)))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/")
    assert "looked for" not in done.stdout
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert {room, *({room.removesuffix("_impl")} - {"shared"})} <= loaded


def test_hidden_module_is_noticed():
    program = WITHOUT.format(hidden=("json",), names="json")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stdout) == (1, "looked for json\n")


@pytest.mark.parametrize("room", MAY_NOT)
def test_import_statements_stay_in_the_room(room):
    for path in (ROOT / room).rglob("*.py"):
        assert not {name.partition(".")[0] for name in imports_of(path)} & set(MAY_NOT[room]), path


def imports_of(path):
    """The modules that a file names, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module


def wing_of(module):
    """`shared.tables` for `shared.tables.find_table`; the top-level package for other modules."""
    parts = module.split(".")
    return ".".join(parts[:2]) if ".".join(parts[:2]) in WINGS else parts[0]


@pytest.mark.parametrize("wing", WINGS)
def test_no_import_runs_upward(wing):
    paths = list((ROOT / wing.replace(".", "/")).glob("*.py"))
    assert paths
    for path in paths:
        assert {wing_of(name) for name in imports_of(path)} - set(sys.stdlib_module_names) <= WINGS[wing], path


@pytest.mark.parametrize("room", MAY_NOT)
def test_no_imports_run_in_a_circle(room):
    named = {module: set() for module in all_modules(room)}
    for path in (ROOT / room).rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        named[module] = set(imports_of(path)) & set(named) - {module}
    assert any(named.values())
    while named:
        leaves = {module for module, imported in named.items() if not imported & set(named)}
        assert leaves, f"imports in a circle among {sorted(named)}"
        named = {module: imported for module, imported in named.items() if module not in leaves}


UMBRELLA = "parallel_vocab_embedding"


def modules_after(program):
    """The top-level modules that a program has loaded at its end."""
    program += "\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/")
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_the_umbrella_imports_a_backend_on_use():
    assert not modules_after(f"import {UMBRELLA}") & {"torch", "jax", "torch_impl", "jax_impl"}


@pytest.mark.parametrize(("backend", "framework"), [("torch", "jax"), ("jax", "torch")])
def test_the_umbrella_needs_one_framework(backend, framework):
    block = f"import sys\nsys.modules[{framework!r}] = None\n"
    assert f"{backend}_impl" in modules_after(f"{block}from {UMBRELLA}.{backend} import ParallelVocabEmbedding")


def test_backends_have_the_same_files():
    torch_only = {
        "accumulation",
        "clipping",
        "data_parallel",
        "further_split",
        "host_rows",
        "mesh",
        "process_group",
        "table_rows",
        "zero_row",
    }
    jax_only = {"placement"}  # a mesh axis in the place of a group
    names = [{path.stem for path in (ROOT / room).glob("*.py")} for room in ("torch_impl", "jax_impl")]
    assert (names[0] - names[1], names[1] - names[0]) == (torch_only, jax_only)
