"""``parallel_vocab_embedding`` is both backends under one name, and a foreign ``shared`` is named."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import parallel_vocab_embedding as pve

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_the_same_objects(name):
    ours, backend = importlib.import_module(f"parallel_vocab_embedding.{name}"), importlib.import_module(f"{name}_impl")
    assert getattr(pve, name) is ours
    assert ours.__all__ == backend.__all__
    for each in backend.__all__:
        assert getattr(ours, each) is getattr(backend, each)


def test_another_name_is_no_attribute():
    with pytest.raises(AttributeError, match="'parallel_vocab_embedding' has no attribute 'numpy'"):
        _ = pve.numpy


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
