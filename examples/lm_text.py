"""Text, initial weights and loss record of both language models."""

import argparse
import json
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

VOCAB, EMB, HEADS, LAYERS = 32000, 128, 4, 2
BATCH, LENGTH, STEPS = 4, 64, 40
EPS = 1e-6  # of the RMS norms
# Adam's; its eps is 1e-8 by default in torch and optax. At a rate of 3e-3 training is unstable: differences of 1e-7
# between the runs grew to 3e-3. With 0.999 for the second beta the frameworks were 2e-6 apart: 1 - beta**step, which optax
# computes in float32, loses digits.
RATE, BETAS = 1e-3, (0.9, 0.95)


def batches() -> np.ndarray:
    """Python's help texts as ids, ``[STEPS, BATCH, LENGTH + 1]``; targets are inputs shifted by one."""
    path = distribution("wordllama").locate_file("wordllama/tokenizers/l2_supercat_tokenizer_config.json")
    ids = Tokenizer.from_file(str(path)).encode("".join(topics.values())[:60_000]).ids
    return np.array(ids[: STEPS * BATCH * (LENGTH + 1)]).reshape(STEPS, BATCH, LENGTH + 1)


def initial_weights() -> dict[str, np.ndarray]:
    """The weights by PyTorch's names, float32; those of linear layers are ``[out, in]``."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(0.02)

    weights = {"emb.weight": normal(VOCAB, EMB), "positions": normal(LENGTH, EMB), "norm.weight": np.ones(EMB, "f4")}
    for layer in range(LAYERS):
        weights |= {
            f"layers.{layer}.norm_1.weight": np.ones(EMB, "f4"),
            f"layers.{layer}.qkv.weight": normal(3 * EMB, EMB),
            f"layers.{layer}.out.weight": normal(EMB, EMB),
            f"layers.{layer}.norm_2.weight": np.ones(EMB, "f4"),
            f"layers.{layer}.up.weight": normal(4 * EMB, EMB),
            f"layers.{layer}.down.weight": normal(EMB, 4 * EMB),
        }
    return weights


def parser_of(description: str) -> argparse.ArgumentParser:
    """Parser with the option that both scripts have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write each step's loss as a line of JSON")
    return parser


def record(framework: str, world_size: int, losses: Iterable[float], path: Path | None) -> None:
    """Show the losses as they are computed; write them to ``path``, a line of JSON each."""
    lines = []
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        task = progress.add_task(f"{framework}, w={world_size}", total=STEPS)
        for step, loss in enumerate(losses):
            lines.append(json.dumps({"framework": framework, "world_size": world_size, "step": step, "loss": loss}))
            progress.update(task, advance=1, description=f"{framework}, w={world_size}: loss {loss:.4f}")
    if path:
        path.write_text("\n".join(lines) + "\n")
