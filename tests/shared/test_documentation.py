"""Examples run, `__all__` is true, and first lines of docstrings are short."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for room in ("shared", "torch_impl", "jax_impl") for path in (ROOT / room).rglob("*.py"))


def test_documentation(check_documentation):
    check_documentation(
        "shared",
        {
            "shared.partition.VocabPartition",
            "shared.proof.oracle.partial_lookup",
            "shared.proof.oracle.weight_grad",
            "shared.ids.widen",
            "shared.proof.record.Rows.of",
        },
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_first_lines_have_at_most_12_words(path):
    tree = ast.parse(path.read_text())
    texts = [ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    assert [line for line in (text.splitlines()[0] for text in texts if text) if len(line.split()) > 12] == []
