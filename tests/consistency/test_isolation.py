"""What each room imports, the name for both backends, and a foreign package called `shared`."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import parallel_vocab_embedding

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
{program}
print(*sorted(sys.modules))
"""


def run_without(hidden, program):
    """Run a program that cannot import some modules: exit status, and what was looked for and imported."""
    command = [sys.executable, "-c", WITHOUT.format(hidden=hidden, program=program)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    return done.returncode, done.stdout


def files_of(room):
    """The modules of a package, by name."""
    paths = {path.relative_to(ROOT).with_suffix(""): path for path in (ROOT / room).rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in paths.items()}


def imports_of(path):
    """The modules that a file names, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module


@pytest.mark.parametrize("room", MAY_NOT)
def test_room_imports_and_needs_no_other(room):
    status, printed = run_without(MAY_NOT[room], f"import {', '.join(files_of(room))}")
    assert status == 0
    assert "looked for" not in printed
    loaded = {name.partition(".")[0] for name in printed.split()}
    assert {room, *({room.removesuffix("_impl")} - {"shared"})} <= loaded


def test_hidden_module_is_noticed():
    assert run_without(("json",), "import json") == (1, "looked for json\n")


@pytest.mark.parametrize(
    ("hidden", "module", "loaded"),
    [
        (("torch", "jax", "torch_impl", "jax_impl"), "parallel_vocab_embedding", "parallel_vocab_embedding"),
        (("jax",), "parallel_vocab_embedding.torch", "torch_impl"),
        (("torch",), "parallel_vocab_embedding.jax", "jax_impl"),
    ],
)
def test_the_umbrella_imports_a_backend_on_use_and_needs_one(hidden, module, loaded):
    status, printed = run_without(hidden, f"import {module}")
    assert status == 0
    assert loaded in printed.split()


@pytest.mark.parametrize("room", MAY_NOT)
def test_imports_stay_in_the_room_and_run_in_no_circle(room):
    files = files_of(room)
    imported = {module: set(imports_of(path)) - {module} for module, path in files.items()}
    for module, names in imported.items():
        assert not {name.partition(".")[0] for name in names} & set(MAY_NOT[room]), module
    named = {module: names & set(files) for module, names in imported.items()}
    assert any(named.values())
    while named:
        leaves = {module for module, names in named.items() if not names & set(named)}
        assert leaves, f"imports in a circle among {sorted(named)}"
        named = {module: names for module, names in named.items() if module not in leaves}


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


def test_backends_have_the_same_files():
    torch_only = {"accumulation", "clipping", "data_parallel", "further_split", "host_rows", "mesh"}
    torch_only |= {"process_group", "table_rows", "zero_row"}
    jax_only = {"over_mesh", "placement"}  # one program over a mesh in the place of a group
    torch, jax = ({path.stem for path in (ROOT / room).glob("*.py")} for room in ("torch_impl", "jax_impl"))
    assert (torch - jax, jax - torch) == (torch_only, jax_only)


# One name for both backends, and a foreign `shared`


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_the_same_objects(name):
    ours, backend = importlib.import_module(f"parallel_vocab_embedding.{name}"), importlib.import_module(f"{name}_impl")
    assert getattr(parallel_vocab_embedding, name) is ours
    assert ours.__all__ == backend.__all__
    for each in backend.__all__:
        assert getattr(ours, each) is getattr(backend, each)


def test_another_name_is_no_attribute():
    with pytest.raises(AttributeError, match="'parallel_vocab_embedding' has no attribute 'numpy'"):
        _ = parallel_vocab_embedding.numpy


def test_documentation(check_documentation):
    check_documentation("parallel_vocab_embedding", {"parallel_vocab_embedding"})


@pytest.mark.parametrize("room", ["torch_impl", "jax_impl"])
@pytest.mark.parametrize("where", ["shared/__init__.py", "shared.py", "shared/no_package.py"])
def test_another_package_called_shared_is_named(room, where, tmp_path):
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).write_text("")
    (tmp_path / room).symlink_to(ROOT / room)
    command = [sys.executable, "-S", "-c", f"import {room}"]  # without site-packages, where ours may be
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={})
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: {room} needs the package `shared` of parallel-vocab-embedding")
    assert str(tmp_path / where.removesuffix("/no_package.py")) in last
    assert "pip uninstall shared" in last
