"""The sdist and the wheel hold every package, and the command runs where only the wheel is installed."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ["shared", "torch_impl", "jax_impl", "parallel_vocab_embedding"]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run(*command, cwd):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, env=CLEAN)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(folder):
    """The wheel, built from the unpacked sdist, which is built from a copy of the sources."""
    source = folder / "source"
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder)
    run(*pip, unpacked, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_its_command_runs(tmp_path):
    wheel = build_wheel(tmp_path)
    sources = {str(path.relative_to(ROOT)) for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    with zipfile.ZipFile(wheel) as opened:
        held = {name for name in opened.namelist() if ".dist-info/" not in name}
    assert held == sources | {f"{room}/py.typed" for room in ROOMS} | {"shared/cli/schema.json"}
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # The dependencies of this environment. Its own .pth files, such as an editable install's, are not read from there.
    (site / "dependencies.pth").write_text(str(Path(np.__file__).parents[1]))
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel, cwd=tmp_path)
    where = f"print(*(__import__(room).__file__ for room in {ROOMS}))"
    assert all(Path(file).is_relative_to(site) for file in run(python, "-c", where, cwd=tmp_path).split())
    sizes = ("--vocab-size", 120, "--emb-size", 16, "--world-size", 2, "--dtype", "bfloat16")
    printed = run(tmp_path / "venv" / "bin" / "pve", "compare", *sizes, cwd=tmp_path)
    assert "EQUAL: " in printed
    assert "torch = jax" in printed
