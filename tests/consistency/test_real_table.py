"""A trained table: 32000 x 256 in float16, for the Llama 2 tokenizer, from the package wordllama, on this README as text."""

import json
from pathlib import Path

import numpy as np

from shared.cli import main
from shared.tables.find_table import open_table

README = Path(__file__).parents[2] / "README.md"


def test_a_trained_table_on_real_text(capsys, wordllama):
    weights = wordllama / "weights" / "l2_supercat_256.safetensors"
    tokenizer = wordllama / "tokenizers" / "l2_supercat_tokenizer_config.json"
    arguments = ["--weights", weights, "--tokenizer", tokenizer, "--text", README, "--world-size", 4]
    assert main(["compare", *map(str, arguments), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    case = result["case"]
    assert (case["vocab_size"], case["emb_size"], case["dtype"]) == (32000, 256, "float16")
    assert result["equal"] is True
    looked_up = {c["rank"]: c["nonzero"] for c in result["comparisons"] if c["what"] == "forward"}
    assert looked_up.pop(None) == sum(looked_up.values()) == np.prod(case["ids_shape"])
    assert np.prod(case["ids_shape"]) > 1000
    assert open_table(weights).tensor == "embedding.weight"
