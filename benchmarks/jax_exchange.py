"""The JAX measurement: our exchanges, a plain psum or psum_scatter, and the compiler's own partitioning, in turn."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.cases import FIRST, Case, make_ids, shuffled, timing, warm_pages
from benchmarks.peers.jax_lookups import fill, take
from jax_impl import ParallelVocabEmbedding

__all__ = ["main"]

Pair = tuple[Callable[..., Any], Callable[..., Any]]


def _layout(case: Case) -> PartitionSpec:
    if case.reduction == "all_to_all":
        return PartitionSpec("tp")
    return PartitionSpec(None, "tp", None) if case.reduction == "reduce_scatter" else PartitionSpec()


def _jitted(case: Case, mesh: Mesh, lookup: Callable[[Any, Any], Any]) -> Pair:
    """``lookup(weight, ids)`` alone, and with its gradient, all results pinned to where they belong."""
    rows, output = NamedSharding(mesh, PartitionSpec("tp", None)), NamedSharding(mesh, _layout(case))

    def both(weight: Any, ids: Any, upstream: Any) -> Any:
        embedded, back = jax.vjp(lambda weight: lookup(weight, ids), weight)
        return embedded, back(upstream)[0]

    return jax.jit(lookup, out_shardings=output), jax.jit(both, out_shardings=(output, rows))


def _ours(case: Case, mesh: Mesh, exchange: str) -> Pair:
    emb = jax.eval_shape(
        lambda: ParallelVocabEmbedding(
            case.vocab_size, case.emb_size, mesh, dtype=case.dtype, reduction=case.reduction, exchange=exchange
        )
    )
    return _jitted(case, mesh, lambda weight, ids: jax.tree.map(lambda _: weight, emb)(ids))


def _collective(case: Case, mesh: Mesh) -> Pair:
    """A masked lookup in a shard_map, and the collective that adds up."""

    def on_each_rank(weight: Any, ids: Any) -> Any:
        partial = fill(weight, ids)
        if case.reduction == "all_reduce":
            return jax.lax.psum(partial, "tp")
        return jax.lax.psum_scatter(partial, "tp", scatter_dimension=1, tiled=True)

    specs = (PartitionSpec("tp", None), PartitionSpec())
    return _jitted(case, mesh, jax.shard_map(on_each_rank, mesh=mesh, in_specs=specs, out_specs=_layout(case)))


def _compiler(case: Case, mesh: Mesh) -> Pair:
    """``jnp.take`` on the sharded table, left to the compiler, with the layout of every argument and result pinned."""
    output = NamedSharding(mesh, _layout(case))
    return _jitted(case, mesh, lambda weight, ids: jax.lax.with_sharding_constraint(take(weight, ids), output))


def _measure(case: Case, wanted: list[str], rounds: int) -> dict[str, Any]:
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((case.world_size,), ("tp",), auto, devices=jax.devices()[: case.world_size])
    makers: dict[str, Callable[[], Pair]] = {
        "ours, auto": lambda: _ours(case, mesh, "auto"),
        "ours, routed": lambda: _ours(case, mesh, "routed"),
        "ours, dense": lambda: _ours(case, mesh, "dense"),
        "psum": lambda: _collective(case, mesh),
        "GSPMD": lambda: _compiler(case, mesh),
    }
    programs = {name: makers[name]() for name in wanted}
    rows = NamedSharding(mesh, PartitionSpec("tp", None))
    draw = jax.jit(lambda key: jax.random.normal(key, (case.vocab_size, case.emb_size), case.dtype), out_shardings=rows)
    weight = draw(jax.random.key(0))
    split = PartitionSpec("tp") if case.reduction == "all_to_all" else PartitionSpec()
    ids = jax.device_put(make_ids(case).astype(np.int32), NamedSharding(mesh, split))
    output = NamedSharding(mesh, _layout(case))
    upstream = jax.device_put(np.ones((*ids.shape, case.emb_size), case.dtype), output)
    times = np.zeros((rounds, len(programs), 2))
    for turn in range(-1, rounds):  # the first compiles, and is not counted
        for place in shuffled(len(programs), turn + 1):
            forward, both = programs[wanted[place]]
            warm_pages()
            start = time.perf_counter()
            jax.block_until_ready(forward(weight, ids))
            forward_time = time.perf_counter() - start
            warm_pages()
            start = time.perf_counter()
            jax.block_until_ready(both(weight, ids, upstream))
            if turn >= 0:
                times[turn, place] = forward_time, time.perf_counter() - start
        print(json.dumps({"done": turn + 1, "of": rounds}), flush=True)
    return {
        name: timing("forward", times[:, i, 0]) | timing("forward_backward", times[:, i, 1])
        for i, name in enumerate(programs)
    }


def main() -> None:
    """Run as ``python -m benchmarks.jax_exchange CASES RESULT``."""
    cases, result = json.loads(sys.argv[1]), Path(sys.argv[2])
    warm_pages(FIRST)
    jax.config.update("jax_num_cpu_devices", max(fields["world_size"] for fields in cases["cases"]))
    found = [_measure(Case(**fields), cases["candidates"], cases["rounds"]) for fields in cases["cases"]]
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
