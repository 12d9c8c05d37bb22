"""What was measured on."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

__all__ = ["NO_GPU", "describe", "machine_facts"]

NO_GPU = (
    "No GPU: of the GPU path only results have been checked, by running its kernels in Triton's interpreter and compiling "
    "them; nothing of its speed."
)


def machine_facts() -> dict[str, str]:
    """The machine and the versions, for the head of a results file."""
    cpus = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "jax", "numpy")]
    facts = {
        "cpu": f"{len(os.sched_getaffinity(0))} x {cpus[0] if cpus else platform.machine()}",
        "memory": f"{int(memory[0]) / 2**20:.0f} GiB" if memory else "unknown",
        "system": platform.platform(),
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "date": datetime.date.today().isoformat(),
    }
    return {**facts, "gpu": _gpu()}


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else NO_GPU


def describe(facts: dict[str, str]) -> str:
    """The same as a paragraph."""
    return "; ".join(facts[name] for name in ("cpu", "memory", "system", "versions", "date")) + f". {facts['gpu']}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
