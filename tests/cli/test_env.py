"""`pve env` says what is there, and works where something is not."""

import importlib.metadata
import json
import re
import subprocess
import sys

import pytest
from cli.schema import SCHEMA, faults

from shared.cli import env, main


def test_env_knows_versions_and_devices(capsys):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert faults(found, SCHEMA) == []
    for package in ("torch", "jax", "numpy", "parallel-vocab-embedding"):
        assert found["packages"][package] == importlib.metadata.version(package)
    assert found["backends"]["torch"]["devices"][0].startswith("cpu, ")
    assert found["backends"]["jax"]["devices"][0].startswith("cpu:0, ")


def test_env_without_a_framework(capsys, monkeypatch):
    monkeypatch.setattr(env, "is_installed", lambda name: False)
    monkeypatch.setattr(env, "_PACKAGES", ("numpy", "no-such-package"))
    assert main(["env"]) == 0
    lines = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    assert ["python", ".".join(map(str, sys.version_info[:3]))] in lines
    for name in ("torch sees", "jax sees", "no-such-package"):
        assert [name, "not installed"] in lines


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("import sys; sys.exit('no driver')", "exit status 1: no driver"),
        ("import time; time.sleep(9)", "no answer within 0.1 s"),
    ],
)
def test_a_backend_that_fails_is_an_answer(capsys, monkeypatch, program, error):
    run = subprocess.run
    monkeypatch.setattr(env, "_SECONDS", 0.1 if "sleep" in program else 60)
    monkeypatch.setattr(env.subprocess, "run", lambda command, **more: run([command[0], "-c", program], **more))
    assert main(["env"]) == 0
    assert capsys.readouterr().out.count(error) == 2
