"""The example language model: both frameworks, the table whole and split, give the same losses at every step."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
EPS = np.finfo(np.float32).eps


@pytest.mark.slow
@pytest.mark.multiprocess
def test_language_model_trains_alike(tmp_path):
    command = [sys.executable, EXAMPLES / "lm_compare.py", "--folder", tmp_path]
    if importlib.util.find_spec("matplotlib"):  # of the extra bench
        command += ["--figure", tmp_path / "losses.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--figure" not in command or (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")

    lines = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    runs = {
        (framework, world_size): [
            line["loss"] for line in lines if (line["framework"], line["world_size"]) == (framework, world_size)
        ]
        for framework in ("torch", "jax")
        for world_size in (1, 4)
    }
    reference = runs["torch", 1]
    assert len(reference) == 40
    assert len(lines) == 4 * 40
    assert abs(reference[0] - np.log(32000)) < 0.1, "small initial weights: about even odds"
    assert min(reference[-5:]) < reference[0] - 3, "the model learns something"
    for run, losses in runs.items():
        # Sums in another order, in float32: at most 2.7 eps were measured over the 40 steps.
        np.testing.assert_allclose(losses, reference, rtol=16 * EPS, err_msg=str(run))
    for framework in ("torch", "jax"):  # the first forward does not depend on the number of ranks
        assert runs[framework, 4][0] == runs[framework, 1][0], framework
