"""Show versions, platform, and the devices that each backend sees.

Add this to a bug report.

examples:
  pve env
  pve env --json

exit status: 0
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import shared
from shared.cli.console import print_json, say
from shared.proof.launch import FRAMEWORKS, is_installed

__all__ = ["add_arguments", "run", "version"]

_PACKAGES = (
    "parallel-vocab-embedding",
    "numpy",
    "ml_dtypes",
    "safetensors",
    "rich",
    "torch",
    "triton",
    "megatron-core",
    "transformers",
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "equinox",
    "optax",
    "orbax-checkpoint",
    "tokenizers",
)
_SECONDS = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``pve env``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "package_folder": str(Path(shared.__file__).parents[1]),
        "packages": {name: version(name) for name in _PACKAGES},
        "backends": {name: _backend(name) for name in FRAMEWORKS},
    }
    if options.json:
        print_json(options.command, found)
        return 0
    lines = {name.replace("_", " "): str(value) for name, value in found.items() if not isinstance(value, dict)}
    lines |= {name: installed or "not installed" for name, installed in found["packages"].items()}
    for name, backend in found["backends"].items():
        lines[f"{name} sees"] = "; ".join(backend["devices"]) or str(backend["error"])
    width = max(map(len, lines))
    for name, value in lines.items():
        say(f"{name:{width}}  {value}")
    return 0


def version(package: str) -> str | None:
    """Version of an installed package; None if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backend(name: str) -> dict[str, Any]:
    """Ask a backend for its devices in another process: drivers can crash."""
    if not is_installed(name):
        return {"devices": [], "error": "not installed"}
    command = [sys.executable, "-m", f"{name}_impl.devices"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # keeps the current folder off sys.path
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return {"devices": [], "error": f"no answer within {_SECONDS} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"devices": [], "error": f"exit status {done.returncode}: {last}"}
    return {"devices": json.loads(done.stdout.strip().splitlines()[-1]), "error": None}
