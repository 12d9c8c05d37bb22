"""Train the language model four times, in PyTorch and JAX, on 1 rank and over 4, and compare the losses of every step.

Run: python examples/lm_compare.py --figure losses.png
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
RUNS = {
    "PyTorch w=1": [HERE / "lm_torch.py"],
    "PyTorch w=4": [*TORCHRUN, HERE / "lm_torch.py"],
    "JAX w=1": [HERE / "lm_jax.py"],
    "JAX w=4": [HERE / "lm_jax.py", "--devices", "4"],
}
UNIT = 2.0**-23  # float32's spacing at 1
# All runs compute the same formulas, but sum in different orders; each operation rounds by at most 2**-24. The largest
# difference measured is 2.7 units. The bound leaves room for other processors.
BOUND = 16


def train(folder: Path) -> dict[str, np.ndarray]:
    """Run each script and return its losses, read from a file in the folder."""
    losses = {}
    for name, command in RUNS.items():
        path = folder / f"{name}.jsonl"
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # per process: the ranks share the processor
        subprocess.run([sys.executable, *command, "--json", path], check=True, env=one_thread)
        losses[name] = np.array([json.loads(line)["loss"] for line in path.read_text().splitlines()])
    return losses


def difference(losses: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The relative difference of each step, in units of float32."""
    return np.abs(losses - others) / others / UNIT


def draw(losses: dict[str, np.ndarray], path: Path) -> None:
    """Draw the four curves, which nearly coincide, and their differences below."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(3, 2))
    styles = zip((9, 6, 3, 1), ("0.8", "tab:blue", "tab:orange", "k"), strict=True)  # each shows behind the next
    first = next(iter(losses))
    for (name, values), (width, colour) in zip(losses.items(), styles, strict=True):
        above.plot(values, linewidth=width, color=colour, label=name)
        if name != first:
            below.plot(difference(values, losses[first]), "o", markersize=width + 1, color=colour, label=name)
    below.axhline(BOUND, color="tab:red", linestyle="--", label="bound")
    above.set_title(
        "One small transformer, trained four times from the same weights in float32:\n"
        "with the whole table (w=1), and with the table split over 4 ranks (w=4)"
    )
    above.set_ylabel("loss (mean cross entropy of 256 tokens)")
    below.set_ylabel(f"relative difference from\n{first}, in units of $2^{{-23}}$")
    below.set(xlabel="step", ylim=(-0.5, BOUND + 1))
    for axis in (above, below):
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to keep the runs' losses, as lines of JSON")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the losses, with matplotlib")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        losses = train(folder)
    table = Table("losses of", "and of", "largest relative difference", "equal bits")
    found = []
    for (name, values), (other, others) in itertools.combinations(losses.items(), 2):
        apart = difference(values, others)
        found.append(apart.max())
        units = f"{found[-1] * UNIT:.1e}, {found[-1]:.1f} units"
        table.add_row(name, other, units, f"{(apart == 0).sum()} of {len(apart)} steps")
    largest = np.max(found)  # NaN if one is
    console = Console()
    console.print(table)
    console.print(f"largest: {largest:.1f} units of 2**-23; bound: {BOUND}")
    if options.figure:
        draw(losses, options.figure)
    return 0 if largest <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
