"""The example language model: both frameworks, the table whole and split, give the same losses at every step."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_language_model_trains_alike(tmp_path):
    command = [sys.executable, EXAMPLES / "lm_compare.py", "--folder", tmp_path]
    if importlib.util.find_spec("matplotlib"):  # of the extra bench
        command += ["--figure", tmp_path / "losses.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (
        done.stdout + done.stderr
    )  # 1 where the losses of a step are further apart than rounding
    assert "--figure" not in command or (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")

    runs = [*tmp_path.glob("*.jsonl")]
    assert len(runs) == 4
    for run in runs:
        losses = [json.loads(line)["loss"] for line in run.read_text().splitlines()]
        assert abs(losses[0] - np.log(32000)) < 0.1, "small initial weights: about even odds"
        assert min(losses[-5:]) < losses[0] - 3, "the model learns something"
