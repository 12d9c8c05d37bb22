"""`pve env` says what is there, and works where something is not."""

import importlib.metadata
import re
import subprocess
import sys

import pytest

from shared.cli import env


def test_env_knows_versions_and_devices(pve):
    found = pve.json("env")
    for package in ("torch", "jax", "numpy", "parallel-vocab-embedding"):
        assert found["packages"][package] == importlib.metadata.version(package)
    assert found["backends"]["torch"]["devices"][0].startswith("cpu, ")
    assert found["backends"]["jax"]["devices"][0].startswith("cpu:0, ")


def test_env_without_a_framework(pve, monkeypatch):
    monkeypatch.setattr(env, "is_installed", lambda name: False)
    monkeypatch.setattr(env, "_PACKAGES", ("numpy", "no-such-package"))
    lines = [re.split("  +", line) for line in pve("env").splitlines()]
    assert ["python", ".".join(map(str, sys.version_info[:3]))] in lines
    for name in ("torch sees", "jax sees", "no-such-package"):
        assert [name, "not installed"] in lines


@pytest.mark.parametrize(
    ("program", "seconds", "error"),
    [
        ("import sys; sys.exit('no driver')", 60, "exit status 1: no driver"),
        ("import time; time.sleep(9)", 0.1, "no answer within 0.1 s"),
    ],
)
def test_a_backend_that_fails_is_an_answer(pve, monkeypatch, program, seconds, error):
    run = subprocess.run
    monkeypatch.setattr(env, "_SECONDS", seconds)
    monkeypatch.setattr(env.subprocess, "run", lambda command, **more: run([command[0], "-c", program], **more))
    assert pve("env").count(error) == 2
