"""Examples run, `__all__` is true, and first lines of docstrings are short."""

import ast
from pathlib import Path

import pytest

JAX_IMPL = Path(__file__).parents[2] / "jax_impl"


def test_documentation(check_documentation):
    check_documentation(
        "jax_impl",
        {
            "jax_impl.vocab_emb.ParallelVocabEmbedding",
            "jax_impl.cross_entropy.linear_cross_entropy",
            "jax_impl.decode.parallel_sample",
            "jax_impl.functional.partial_lookup",
            "jax_impl.lm_head.ParallelLMHead",
            "jax_impl.ids.as_ids",
        },
    )


@pytest.mark.parametrize("path", sorted(JAX_IMPL.rglob("*.py")), ids=lambda path: str(path.relative_to(JAX_IMPL)))
def test_first_lines_have_at_most_12_words(path):
    tree = ast.parse(path.read_text())
    texts = [ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    assert [line for line in (text.splitlines()[0] for text in texts if text) if len(line.split()) > 12] == []
