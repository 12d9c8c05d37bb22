"""`pve` run in this process, and as much of JSON Schema as `shared/cli/schema.json` uses."""

import json
from importlib.resources import files

from shared.cli import main
from shared.cli.console import SCHEMA_VERSION

SCHEMA = json.loads(files("shared.cli").joinpath("schema.json").read_text())
_TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}


def faults(value, schema, where="$"):
    """Where the value is not what the schema says; a property that the schema does not know is a fault too."""
    known = {"type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf", "$ref"}
    unknown = set(schema) - known - {"description", "title", "$schema", "$defs"}
    assert not unknown, f"schema.json uses {unknown}"
    if "$ref" in schema:
        return faults(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], where)
    if "anyOf" in schema:
        tried = [faults(value, choice, where) for choice in schema["anyOf"]]
        return min(tried, key=len)
    if value not in schema.get("enum", [schema.get("const", value)]):
        return [f"{where} is {value!r}"]
    types = schema.get("type", [])
    if types and not any(_is(value, name) for name in ([types] if isinstance(types, str) else types)):
        return [f"{where} is {type(value).__name__}"]
    found = []
    if isinstance(value, dict):
        properties, others = schema.get("properties", {}), schema.get("additionalProperties")
        found += [f"{where}.{name} is missing" for name in schema.get("required", []) if name not in value]
        for name, item in value.items():
            inner = properties.get(name, others)
            found += [f"{where}.{name} is unknown"] if inner is None else faults(item, inner, f"{where}.{name}")
    if isinstance(value, list):
        found += [fault for i, item in enumerate(value) for fault in faults(item, schema["items"], f"{where}[{i}]")]
    return found


def _is(value, name):
    if name == "null":
        return value is None
    return isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


class Pve:
    """Runs commands; of what one prints, nothing is left for the next."""

    def __init__(self, capsys):
        self._capsys = capsys

    def _run(self, arguments):
        self._capsys.readouterr()
        try:
            status = main([*map(str, arguments)])
        except SystemExit as exit:  # argparse
            status = exit.code
        printed = self._capsys.readouterr()
        return status, printed.out, printed.err

    def __call__(self, *arguments, status=0):
        """What a command prints on standard output; nothing goes to standard error."""
        found, output, errors = self._run(arguments)
        assert (found, errors) == (status, ""), (found, errors, output)
        return output

    def json(self, *arguments, status=0):
        """What a command prints with ``--json``, held to the schema."""
        found = json.loads(self(*arguments, "--json", status=status))
        assert not (wrong := faults(found, SCHEMA)), wrong
        assert (found["schema_version"], found["command"]) == (SCHEMA_VERSION, arguments[0])
        return found

    def refused(self, match, *arguments):
        """Exit status 2 and one line of error, after argparse's usage where it is argparse's."""
        status, output, errors = self._run(arguments)
        assert (status, output) == (2, ""), (status, output, errors)
        assert match in errors, errors
        assert [line for line in errors.splitlines() if "error:" in line] == errors.splitlines()[-1:]
        assert "usage:" in errors or errors.splitlines()[-1].startswith("pve: error: ")
