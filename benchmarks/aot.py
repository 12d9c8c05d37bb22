"""``python -m benchmarks aot``: what the TPU's and the GPU's own compilers make of the JAX layer, without a chip.

Programs are compiled ahead of time for devices that are not attached. The compiler tells the bytes that a program accesses,
the temporary memory that it takes and, for TPUs, the time that it models.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.peers.jax_lookups import Lookup, flax_embed, one_hot, take
from jax_impl import ParallelVocabEmbedding

__all__ = [
    "CASES",
    "OWN_IDS_CASES",
    "AotCase",
    "Verdict",
    "float32_scatter",
    "forward_and_gradient",
    "is_available",
    "judge",
    "main",
    "mesh_of",
    "ours",
    "take",
    "write_table",
]

_DESCRIPTION = """\
Have the TPU's and the GPU's own compilers judge the JAX layer and its peers, ahead of time and without a chip: modelled
time, bytes and temporary memory of the forward and of the gradient.

The compilers come with extra packages; those that are missing are left out:
  pip install -c constraints.txt -e '.[jax,tpu,bench]'     the TPU's (15 s)
  pip install 'jax[cuda12]'                                the GPU's (5.5 GB)"""

_WIDTH = 230


@dataclass(frozen=True)
class AotCase:
    """One table and one batch of ids over the devices of a topology.

    Attributes:
        topology: as the compiler's plugin names it; ``"h100"`` stands for eight of them in one machine.
        batch, sequence: the ids' shape.
        emb_size, dtype, vocab_size: the table.
    """

    topology: str
    batch: int
    sequence: int
    emb_size: int
    dtype: str = "bfloat16"
    vocab_size: int = 131072

    def __str__(self) -> str:
        return f"{self.topology}, {self.vocab_size} x {self.emb_size} {self.dtype}, {self.batch} x {self.sequence} ids"


CASES = [
    AotCase("v5p:2x2x2", 8, 4096, 4096),
    AotCase("v5p:2x2x2", 8, 4096, 4096, "float32"),
    AotCase("v5e:2x4", 8, 4096, 2048),
    AotCase("v5p:4x4x4", 8, 4096, 4096),
    AotCase("v6e:8x8", 8, 4096, 4096),
    AotCase("v5p:8x8x8", 4, 2048, 1024),
    AotCase("h100", 8, 4096, 4096),
]


OWN_IDS_CASES = [AotCase(topology, 512, 64, 4096) for topology in ("v5p:2x2x2", "v5p:4x4x4", "v5p:8x8x8")]
"""What all_to_all is judged by: as many ids in all over 8, 64 and 512 chips."""


@dataclass(frozen=True)
class Verdict:
    """What a compiler says of a program.

    Attributes:
        milliseconds: modelled; not a number where there is no model.
        accessed: bytes that are read and written.
        temporary: bytes of memory beside arguments and results.
        collectives: how many there are of each kind.
    """

    milliseconds: float
    accessed: float
    temporary: int
    collectives: dict[str, int]


_COLLECTIVES = "all-reduce|reduce-scatter|all-gather|all-to-all|ragged-all-to-all|collective-permute"

# What libtpu asks of its surroundings, answered for a machine that has none of it.
_NO_TPU = {
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def is_available(topology: str) -> bool:
    """Whether this machine has the compiler for it."""
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin") if topology == "h100" else ("libtpu",)
    return any(importlib.util.find_spec(plugin) is not None for plugin in plugins)


def mesh_of(
    topology: str,
    shape: tuple[int, ...] | None = None,
    names: tuple[str, ...] = ("tp",),
    kind: AxisType = AxisType.Auto,
) -> Mesh:
    """A mesh of devices that are not attached, by default all of the topology along one axis."""
    if topology == "h100":
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        described = topologies.get_topology_desc(platform="cuda", target_config=_H100, topology="1x1x8")
    else:
        for name, value in _NO_TPU.items():
            os.environ.setdefault(name, value)
        described = topologies.get_topology_desc(topology, "tpu")
    shape = shape or (len(described.devices),)
    devices = np.array(described.devices[: math.prod(shape)]).reshape(shape)
    return Mesh(devices, names, axis_types=(kind,) * len(names))


def _abstract(mesh: Mesh, shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def judge(function: Any, *arguments: Any) -> Verdict:
    """Compile the function for the devices on which its arguments lie, and ask what it takes.

    Args:
        function: of ``jax.jit``.
        *arguments: pytrees of ``jax.ShapeDtypeStruct`` with a sharding.
    """
    program = function.lower(*arguments).compile()
    cost = program.cost_analysis() or {}
    kinds = re.findall(rf" ({_COLLECTIVES})(?:-start)?\(", program.as_text())
    return Verdict(
        cost.get("optimal_seconds", math.nan) * 1e3,
        cost.get("bytes accessed", math.nan),
        program.memory_analysis().temp_size_in_bytes,
        dict(Counter(kinds)),
    )


def ours(case: AotCase, mesh: Mesh, **options: Any) -> Lookup:
    """This layer as a function of its table and ids."""
    emb = ParallelVocabEmbedding.abstract(case.vocab_size, case.emb_size, mesh, dtype=case.dtype, **options)
    return lambda weight, ids: jax.tree.map(lambda _: weight, emb)(ids)


def float32_scatter(mesh: Mesh, stacked: bool) -> Lookup:
    """The gradient as autodiff has it for a float32 copy of the rows, in a shard_map: what ours is measured against."""

    def on_each_rank(weight: Any, ids: Any) -> Any:
        local = ids - jax.lax.axis_index("tp") * len(weight)
        wide = weight.astype(jnp.float32)
        rows = wide.at[local].get(mode="fill", fill_value=0, wrap_negative_indices=False).astype(weight.dtype)
        return rows[None] if stacked else jax.lax.psum_scatter(rows, "tp", scatter_dimension=1, tiled=True)

    output = P("tp") if stacked else P(None, "tp")
    return jax.shard_map(on_each_rank, mesh=mesh, in_specs=(P("tp", None), P()), out_specs=output)


def _candidates(case: AotCase) -> list[tuple[str, str, Lookup, Mesh, P]]:
    """What is compared: the reduction, the name, the lookup, its mesh, and how its output lies."""
    auto, explicit = mesh_of(case.topology), mesh_of(case.topology, kind=AxisType.Explicit)
    whole, split, stacked = P(), P(None, "tp"), P("tp")
    everywhere = NamedSharding(explicit, P(None, None, None))
    found: list[tuple[str, str, Lookup, Mesh, P]] = [
        ("none", "ours", ours(case, auto), auto, stacked),
        ("none", "float32 scatter", float32_scatter(auto, stacked=True), auto, stacked),
        ("all_reduce", "ours", ours(case, auto, reduction="all_reduce"), auto, whole),
        ("all_reduce", "jnp.take, GSPMD", take, auto, whole),
        ("all_reduce", "Explicit .at[].get", lambda w, i: w.at[i].get(out_sharding=everywhere), explicit, whole),
    ]
    if importlib.util.find_spec("flax") is not None:
        found.append(("all_reduce", "flax.nnx.Embed, GSPMD", flax_embed(case), auto, whole))
    found.append(("all_reduce", "one-hot matmul", one_hot, auto, whole))
    for exchange in ("dense", "routed"):
        lookup = ours(case, auto, reduction="reduce_scatter", exchange=exchange)
        found.append(("reduce_scatter", f"ours, {exchange}", lookup, auto, split))
    found.append(("reduce_scatter", "float32 scatter", float32_scatter(auto, stacked=False), auto, split))
    found.append(("reduce_scatter", "jnp.take, GSPMD", take, auto, split))
    return found


def _own_ids_candidates(case: AotCase) -> list[tuple[str, str, Lookup, Mesh, P, P]]:
    """What is compared where each device has ids of its own; the last is how the ids lie."""
    mesh, split = mesh_of(case.topology), P("tp")
    lookups = {
        f"ours, {exchange}": ours(case, mesh, reduction="all_to_all", exchange=exchange)
        for exchange in ("dense", "routed")
    }
    return [
        ("all_to_all", name, each, mesh, split, split) for name, each in {**lookups, "jnp.take, GSPMD": take}.items()
    ]


def forward_and_gradient(
    case: AotCase, lookup: Lookup, mesh: Mesh, output: P, ids_split: P | None = None
) -> tuple[Verdict, Verdict]:
    """What the compiler says of a lookup and of its gradient, the layouts of all arguments and results pinned."""
    weight = _abstract(mesh, (case.vocab_size, case.emb_size), case.dtype, P("tp", None))
    ids = _abstract(mesh, (case.batch, case.sequence), jnp.int32, ids_split or P())
    shape = (case.batch, case.sequence, case.emb_size)
    upstream = _abstract(
        mesh, (mesh.size, *shape) if output == P("tp") and ids_split is None else shape, case.dtype, output
    )

    def gradient(weight: Any, ids: Any, upstream: Any) -> Any:
        return jax.vjp(lambda weight: lookup(weight, ids), weight)[1](upstream)[0]

    forward = judge(jax.jit(lookup, out_shardings=upstream.sharding), weight, ids)
    return forward, judge(jax.jit(gradient, out_shardings=weight.sharding), weight, ids, upstream)


_HEADER = [
    "reduction",
    "",
    "forward, ms",
    "MB",
    "temporary MB",
    "collectives",
    "gradient, ms",
    "MB",
    "temporary MB",
    "collectives",
]


def _row(reduction: str, name: str, verdicts: tuple[Verdict, Verdict]) -> list[str]:
    row = [reduction, name]
    for verdict in verdicts:
        time = "" if not verdict.milliseconds >= 0 else f"{verdict.milliseconds:.3f}"
        accessed = "" if math.isnan(verdict.accessed) else f"{verdict.accessed / 1e6:.0f}"
        kinds = ", ".join(f"{kind} x {count}" for kind, count in verdict.collectives.items())
        row += [time, accessed, f"{verdict.temporary / 1e6:.1f}", kinds]
    return row


_WHAT_IT_SAYS = """\
Compiled ahead of time for devices that are not attached. *ms* is the time that the compiler models for one device, *MB* what
the program accesses, *temporary MB* its memory beside arguments and results.

- The model knows memory traffic and arithmetic. It knows neither the network between the devices nor what a gather or a
  scatter takes beyond its bytes: a bfloat16 scatter that adds in bfloat16 looks free. Of gradients compare the memory.
- Of a `cond` the model counts the more expensive branch; `ours, routed` contains the dense form too.
- `jnp.take`, `flax.nnx.Embed` and `.at[].get` add the gradients of bfloat16 tables up in bfloat16: 5000 equal ids give 256.
  `float32 scatter` adds in float32, as ours does, as autodiff writes it.
- Where no time is given, there is no model of it (GPUs), or it makes a negative one (a fault of the model's).
"""


def write_table(
    cases: list[AotCase],
    output: Path,
    console: Console,
    candidates_of: Callable[[AotCase], Sequence[tuple[Any, ...]]] = _candidates,
) -> None:
    """Judge all cases, show the tables and write them as Markdown."""
    lines = ["# By the chips' own compilers", "", f"jax {jax.__version__}{_compilers()}", "", _WHAT_IT_SAYS]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for case in cases:
            candidates = candidates_of(case)
            table = Table(*_HEADER, title=str(case))
            lines += [f"## {case}", "", "| " + " | ".join(_HEADER) + " |", "|---|---|" + "--:|" * (len(_HEADER) - 2)]
            task = progress.add_task(str(case), total=len(candidates))
            for reduction, name, *rest in candidates:
                row = _row(reduction, name, forward_and_gradient(case, *rest))
                table.add_row(*row)
                lines.append("| " + " | ".join(row) + " |")
                progress.advance(task)
            lines.append("")
            console.print(table)
    output.write_text("\n".join(lines).rstrip() + "\n")


def _compilers() -> str:
    found = []
    for name in ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f", {name} {importlib.metadata.version(name)}")
    return "".join(found)


def main() -> int:
    """Run as ``python -m benchmarks aot``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks aot", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # else jax looks for a TPU
    cases, own_ids = ([each for each in every if is_available(each.topology)] for every in (CASES, OWN_IDS_CASES))
    console = Console(width=_WIDTH, soft_wrap=True)
    if not cases:
        console.print("no compiler is installed: pip install 'jax[tpu]' brings the TPU's, 'jax[cuda12]' the GPU's")
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    write_table(cases, options.output / "aot.md", console)
    written = ["aot.md"]
    if own_ids:
        write_table(own_ids, options.output / "aot_all_to_all.md", console, _own_ids_candidates)
        written.append("aot_all_to_all.md")
    console.print(f"written to {options.output}: {', '.join(written)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
