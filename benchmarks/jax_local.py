"""One rank's lookup in JAX, and the embedding on every rank: ours, the peers, and what a plain gather takes, in turn."""

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.cases import FIRST, Case, make_ids, shuffled, timing, warm_pages
from benchmarks.peers.jax_lookups import Lookup, fill, flax_embed, one_hot, take
from jax_impl import ParallelVocabEmbedding

__all__ = ["main"]

_ROWS, _STACKED, _WHOLE = PartitionSpec("tp", None), PartitionSpec("tp"), PartitionSpec()
_LARGEST_ONE_HOT = 1 << 28


def _ours(case: Case, mesh: Mesh, reduction: str) -> Lookup:
    emb = jax.eval_shape(
        lambda: ParallelVocabEmbedding(case.vocab_size, case.emb_size, mesh, dtype=case.dtype, reduction=reduction)
    )
    return lambda weight, ids: jax.tree.map(lambda _: weight, emb)(ids)


def _on_each_rank(mesh: Mesh, lookup: Callable[[Any, Any], Any]) -> Lookup:
    return jax.shard_map(
        lambda weight, ids: lookup(weight, ids)[None], mesh=mesh, in_specs=(_ROWS, _WHOLE), out_specs=_STACKED
    )


def _take(weight: Any, ids: Any) -> Any:
    """No lookup of a part: every id names a row."""
    return jnp.take(weight, ids % len(weight), axis=0, mode="clip")


def _candidates(case: Case) -> dict[str, tuple[Lookup, Any, PartitionSpec]]:
    """By name: the lookup, its mesh, and how its output lies."""
    devices, shape = jax.devices()[: case.world_size], (case.world_size,)
    auto, explicit = (
        jax.make_mesh(shape, ("tp",), (kind,), devices=devices) for kind in (AxisType.Auto, AxisType.Explicit)
    )
    everywhere = NamedSharding(explicit, PartitionSpec(None, None, None))
    found: dict[str, tuple[Lookup, Any, PartitionSpec]] = {
        "ours": (_ours(case, auto, "none"), auto, _STACKED),
        "floor": (_on_each_rank(auto, _take), auto, _STACKED),
        "masked gather": (_on_each_rank(auto, fill), auto, _STACKED),
        "ours, all_reduce": (_ours(case, auto, "all_reduce"), auto, _WHOLE),
        "jnp.take, GSPMD": (take, auto, _WHOLE),
        "Explicit .at[].get": (lambda w, ids: w.at[ids].get(out_sharding=everywhere), explicit, _WHOLE),
    }
    if importlib.util.find_spec("flax") is not None:
        found["flax.nnx.Embed, GSPMD"] = (flax_embed(case), auto, _WHOLE)
    if case.batch * case.sequence * case.vocab_size * case.itemsize <= _LARGEST_ONE_HOT:
        found["one-hot matmul"] = (one_hot, auto, _WHOLE)
    return found


def _measure(case: Case, rounds: int, advance: Callable[[], None]) -> dict[str, dict[str, Any]]:
    candidates, found, programs = _candidates(case), {}, {}  # type: ignore[var-annotated]
    ids_host = make_ids(case).astype(np.int32)
    arguments: dict[Any, tuple[Any, Any]] = {}
    expected = None
    for name, (lookup, mesh, layout) in candidates.items():
        rows, whole, output = (NamedSharding(mesh, spec) for spec in (_ROWS, _WHOLE, layout))
        if mesh not in arguments:
            draw = jax.jit(
                lambda key: jax.random.normal(key, (case.vocab_size, case.emb_size), case.dtype), out_shardings=rows
            )
            arguments[mesh] = draw(jax.random.key(0)), jax.device_put(ids_host, whole)
        weight, ids = arguments[mesh]

        def both(weight: Any, ids: Any, upstream: Any, lookup: Lookup = lookup) -> Any:
            embedded, back = jax.vjp(lambda weight: lookup(weight, ids), weight)
            return embedded, back(upstream)[0]

        forward = jax.jit(lookup, out_shardings=output)
        embedded = forward(weight, ids)
        upstream = jax.device_put(np.ones(embedded.shape, case.dtype), output)
        if layout == _WHOLE:
            expected = np.asarray(embedded) if expected is None else expected
            np.testing.assert_array_equal(np.asarray(embedded), expected, err_msg=name)
        programs[name] = forward, jax.jit(both, out_shardings=(output, rows)), weight, ids, upstream
        found[name] = {"peak_extra_bytes": forward.lower(weight, ids).compile().memory_analysis().temp_size_in_bytes}
    names, times = list(programs), np.zeros((rounds, len(programs), 2))
    repeats = np.ones((len(programs), 2), int)  # of short calls, for five milliseconds or so
    for turn in range(-1, rounds):  # the first compiles, and is not counted
        for place in shuffled(len(names), turn + 1):
            forward, both, weight, ids, upstream = programs[names[place]]
            for kind, run in enumerate((lambda: forward(weight, ids), lambda: both(weight, ids, upstream))):  # noqa: B023
                if repeats[place, kind] == 1:
                    warm_pages()
                if turn < 0:
                    jax.block_until_ready(run())
                begin = time.perf_counter()
                for _ in range(repeats[place, kind]):
                    jax.block_until_ready(run())
                spent = (time.perf_counter() - begin) / repeats[place, kind]
                if turn < 0:
                    repeats[place, kind] = max(1, min(20, int(5e-3 / spent)))
                else:
                    times[turn, place, kind] = spent
        advance()
    for place, name in enumerate(names):
        found[name] |= timing("forward", times[:, place, 0]) | timing("forward_backward", times[:, place, 1])
    return found


def main() -> None:
    """Run as ``python -m benchmarks.jax_local CASES RESULT``."""
    cases, result = json.loads(sys.argv[1]), Path(sys.argv[2])
    warm_pages(FIRST)
    jax.config.update("jax_num_cpu_devices", max(fields["world_size"] for fields in cases["cases"]))

    def advance() -> None:
        print(json.dumps({"done": 1}), flush=True)

    found = [_measure(Case(**fields), cases["rounds"], advance) for fields in cases["cases"]]
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
