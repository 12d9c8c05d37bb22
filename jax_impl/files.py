"""Reading and writing of sharded tables."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jax_impl.agreement import gather_objects
from jax_impl.placement import first_row
from shared.partition import VocabPartition
from shared.tables.table_file import TableFile
from shared.tables.table_writer import TableSpec
from shared.tables.table_writer import write_table as write_table_file

__all__ = ["array_from_table", "write_table"]


def array_from_table(
    table: TableFile, partition: VocabPartition, sharding: NamedSharding, dtype: np.dtype[Any]
) -> jax.Array:
    """Read a table from files; each process reads its devices' rows.

    Args:
        table: the table in files.
        partition: ownership of the rows.
        sharding: sharding of the result.
        dtype: dtype of the result; rows are cast.

    Returns:
        ``[partition.padded_vocab_size, table.emb_size]``; padding rows are zero.

    Raises:
        ValueError: a file of the table is damaged.
    """
    shape = (partition.padded_vocab_size, table.emb_size)
    holders = {first_row(index): device for device, index in sharding.addressable_devices_indices_map(shape).items()}
    read: dict[int, jax.Array] = {}

    def shard(index: Any) -> jax.Array:
        start = first_row(index)
        if start not in read:  # JAX copies replicas from device to device
            rows = table.padded_rows(partition, start // partition.rows_per_rank, dtype)
            # On a CPU JAX shares this memory. Elsewhere the host frees it before the next shard.
            read[start] = jax.device_put(rows, holders[start], may_alias=True).block_until_ready()
        return read[start]

    return jax.make_array_from_callback(shape, sharding, shard)


def write_table(weight: jax.Array, partition: VocabPartition, path: str | Path, tensor_name: str, force: bool) -> None:
    """Write a sharded table; each process writes its devices' rows.

    Args:
        weight: ``[partition.padded_vocab_size, e]``, rows split over ranks.
        partition: ownership of the rows.
        path, tensor_name, force: as in ``ParallelVocabEmbedding.save_table``.

    Raises:
        ValueError: in every process, if one of them fails.
    """
    n = partition.rows_per_rank
    shards = {first_row(shard.index) // n: shard.data for shard in weight.addressable_shards if shard.replica_id == 0}

    def read(start: int, stop: int) -> np.ndarray:
        rank = start // n
        return np.asarray(shards[rank])[start - rank * n : stop - rank * n]

    write_table_file(
        path,
        TableSpec(tensor_name, weight.dtype.name, partition.vocab_size, weight.shape[1]),
        [partition.owned_range(rank) for rank in shards],
        read,
        force=force,
        process=jax.process_index(),
        exchange=gather_objects if jax.process_count() > 1 else lambda mine: [mine],
    )
