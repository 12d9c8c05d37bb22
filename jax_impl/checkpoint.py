"""A sharded table as Orbax restores it: onto another mesh, with other padding."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

__all__ = ["restore_args"]


def restore_args(emb: Any) -> Any:
    """How Orbax is to restore a layer that was saved from any mesh with any padding: ``restore_args`` of PyTreeRestore.

    A layer is a pytree, which Orbax saves as it is, and restores onto any mesh whose padded size is the same. With these
    arguments the size may be another: rows of padding, which are zero, are left out or added.

    Args:
        emb: the layer to restore into; of its weight, only shape and dtype are used: ``jax.eval_shape`` of one will do.

    Returns:
        A pytree like ``emb``, with ``orbax.checkpoint.ArrayRestoreArgs`` for its leaf.

    Raises:
        ImportError: orbax-checkpoint is not installed.

    Source: Orbax, ``ArrayRestoreArgs(strict=False)``.

    Example:
        >>> import tempfile, jax, numpy as np, orbax.checkpoint as ocp
        >>> from jax_impl import ParallelVocabEmbedding, restore_args
        >>> mesh = jax.make_mesh((jax.device_count(),), ("tp",))
        >>> emb = ParallelVocabEmbedding(10, 4, mesh, padded_vocab_size="even")
        >>> path = tempfile.mkdtemp() + "/checkpoint"
        >>> with ocp.StandardCheckpointer() as checkpointer:
        ...     checkpointer.save(path, {"emb": emb})
        >>> wider = 5 * emb.padded_vocab_size
        >>> target = {"emb": jax.eval_shape(lambda: ParallelVocabEmbedding(10, 4, mesh, padded_vocab_size=wider))}
        >>> with ocp.PyTreeCheckpointer() as checkpointer:
        ...     how = ocp.args.PyTreeRestore(target, {"emb": restore_args(target["emb"])})
        ...     restored = checkpointer.restore(path, how)["emb"]
        >>> table, first = np.asarray(restored.weight), np.asarray(emb.weight)
        >>> len(table) == wider, bool((table[:10] == first[:10]).all()), bool(table[10:].any())
        (True, True, False)
    """
    try:
        import orbax.checkpoint as ocp  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("restore_args needs Orbax: pip install orbax-checkpoint") from error
    sharding = NamedSharding(emb.mesh, PartitionSpec(emb.axis_name, None))
    return jax.tree.map(
        lambda weight: ocp.ArrayRestoreArgs(
            sharding=sharding, global_shape=weight.shape, dtype=weight.dtype, strict=False
        ),
        emb,
    )
