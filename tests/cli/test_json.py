"""What commands print with `--json` is of the schema that is written down."""

import json

import numpy as np
import pytest
from cli.schema import SCHEMA, faults
from safetensors.numpy import save_file

from shared.cli import main
from shared.cli.console import SCHEMA_VERSION

SMALL = ["--vocab-size", "96", "--emb-size", "16", "--world-size", "3"]
COMMANDS = {
    "diff of records": ["diff", "a.record", "a.record"],
    "diff of tables": ["diff", "a.safetensors", "b.safetensors"],
    "plan": ["plan", "--vocab-size", "96", "--world-size", "3", "--emb-size", "4"],
    "plan that does not divide": ["plan", "--vocab-size", "97", "--world-size", "3", "--emb-size", "4"],
    "record": ["record", "--backend", "oracle", "-o", "b.record", *SMALL, "--padding-idx", "3"],
}


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """Run a command with ``--json`` beside a record and two tables that differ, and read what it prints."""
    monkeypatch.chdir(tmp_path)
    save_file({"wte.weight": np.ones((4, 2), np.float32)}, "a.safetensors")
    save_file({"wte.weight": np.full((4, 2), np.nan, np.float32)}, "b.safetensors")

    def run(name):
        if "a.record" in COMMANDS[name]:
            main(["record", "--backend", "oracle", "-o", "a.record", *SMALL])
            capsys.readouterr()
        assert main([*COMMANDS[name], "--json"]) == ("tables" in name)
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_json_is_of_its_schema(printed, name):
    found = printed(name)
    assert faults(found, SCHEMA) == []
    assert (found["schema_version"], found["command"]) == (SCHEMA_VERSION, COMMANDS[name][0])


def test_the_check_can_fail(printed):
    found = printed("diff of tables")
    for key in found:
        assert faults({other: value for other, value in found.items() if other != key}, SCHEMA)
        assert faults({**found, key: object()}, SCHEMA)
    assert faults({**found, "more": 1}, SCHEMA)
    assert faults({**found, "comparisons": [{**found["comparisons"][0], "rank": 1.5}]}, SCHEMA)
