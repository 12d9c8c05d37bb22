"""Restoring of training states with Orbax."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jax_impl.vocab_emb import ParallelVocabEmbedding

__all__ = ["restore_args"]


def restore_args(tree: Any) -> Any:
    """Build Orbax's restore arguments for another mesh or other padding.

    Pass the result as ``restore_args`` of ``orbax.checkpoint.args.PyTreeRestore``. Zero padding rows are dropped or added,
    in the table and in an optimizer's moments of it. Orbax truncates and extends arrays without an error: vocabulary and
    columns must be those that were saved.

    Args:
        tree: the target: a layer, or any pytree with layers in it, such as a model with its optimizer's state. Layers in
            that state hold moments instead of the table. Only shape, dtype and sharding of arrays are used:
            ``ParallelVocabEmbedding.abstract`` and ``jax.eval_shape`` of an optimizer's ``init`` suffice. Tables of
            ``jax_impl.adapters.nnx.Embed`` in a ``flax.nnx.State`` count as layers.

    Returns:
        A pytree like ``tree`` with ``orbax.checkpoint.RestoreArgs`` as leaves. An array without a ``NamedSharding``, such
        as a step count, is replicated over the mesh of the first layer.

    Raises:
        ImportError: orbax-checkpoint is not installed.
        ValueError: ``tree`` holds no layer.

    Source: Orbax, ``ArrayRestoreArgs(strict=False)``.

    Example:
        >>> import tempfile, jax, numpy as np, optax, orbax.checkpoint as ocp
        >>> from jax_impl import ParallelVocabEmbedding, restore_args
        >>> mesh, optimizer = jax.make_mesh((jax.device_count(),), ("tp",)), optax.adam(0.1)
        >>> emb = ParallelVocabEmbedding(10, 4, mesh, padded_vocab_size="even")
        >>> path = tempfile.mkdtemp() + "/checkpoint"
        >>> with ocp.StandardCheckpointer() as checkpointer:
        ...     checkpointer.save(path, {"emb": emb, "moments": optimizer.init(emb)})
        >>> wider = 5 * emb.padded_vocab_size
        >>> target = ParallelVocabEmbedding.abstract(10, 4, mesh, padded_vocab_size=wider)
        >>> target = {"emb": target, "moments": jax.eval_shape(optimizer.init, target)}
        >>> with ocp.PyTreeCheckpointer() as checkpointer:
        ...     restored = checkpointer.restore(path, ocp.args.PyTreeRestore(target, restore_args(target)))
        >>> table, first = np.asarray(restored["emb"].weight), np.asarray(emb.weight)
        >>> len(table) == wider, bool((table[:10] == first[:10]).all()), bool(table[10:].any())
        (True, True, False)
    """
    try:
        import orbax.checkpoint as ocp  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("restore_args needs Orbax: pip install orbax-checkpoint") from error
    layers = [layer for node in jax.tree.leaves(tree, is_leaf=_is_layer) if (layer := _layer_of(node)) is not None]
    if not layers:
        raise ValueError("tree must hold a ParallelVocabEmbedding, got none: Orbax restores other trees as they are")

    def args_of(leaf: Any, sharding: Sharding | None = None, strict: bool = True) -> Any:
        if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) and sharding is None:
            # An array on one device could not enter a jit together with the table.
            named = isinstance(leaf.sharding, NamedSharding)
            sharding = leaf.sharding if named else NamedSharding(layers[0].mesh, PartitionSpec())
        return ocp.checkpoint_utils.construct_restore_args(leaf, sharding, strict=strict)

    def args_of_node(node: Any) -> Any:
        layer = _layer_of(node)
        if layer is None:
            return args_of(node)

        def of_table(leaf: jax.Array | jax.ShapeDtypeStruct) -> Any:
            # Factored moments have other shapes than the table.
            has_rows = leaf.shape[:1] == (layer.config.padded_vocab_size,)
            spec = PartitionSpec(layer.axis_name, *[None] * (leaf.ndim - 1)) if has_rows else PartitionSpec()
            return args_of(leaf, NamedSharding(layer.mesh, spec), strict=False)

        return jax.tree.map(of_table, node)

    return jax.tree.map(args_of_node, tree, is_leaf=_is_layer)


def _layer_of(node: Any) -> ParallelVocabEmbedding | None:
    """Layer at a node, or None; without a table for Flax NNX."""
    if isinstance(node, ParallelVocabEmbedding):
        return node
    layout = node.get_metadata().get("vocab_layout") if hasattr(node, "get_metadata") else None
    return None if layout is None else jax.tree.unflatten(layout, [None])


def _is_layer(node: Any) -> bool:
    return _layer_of(node) is not None
