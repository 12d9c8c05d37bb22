"""Tables in files and in memory, split over a mesh."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jax_impl.agreement import gather_objects
from jax_impl.placement import first_row, resolve_mesh
from shared.bits import DTYPES
from shared.config import EmbeddingConfig
from shared.partition import VocabPartition
from shared.tables.find_table import Paths, open_table
from shared.tables.table_file import TableFile, TableSpec
from shared.tables.table_writer import write_table

__all__ = ["TableInFiles"]


class TableInFiles:
    """Layer that reads and writes its table."""

    weight: jax.Array
    config: EmbeddingConfig
    mesh: Mesh | AbstractMesh
    axis_name: str

    if TYPE_CHECKING:  # vocab_emb.py defines it

        @classmethod
        def abstract(cls, *arguments: Any, **options: Any) -> Self: ...

    @property
    def _sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(self.axis_name, None))

    @classmethod
    def from_table(
        cls,
        path: Paths,
        tensor_name: str | None = None,
        mesh: Mesh | None = None,
        axis_name: str = "tp",
        *,
        vocab_size: int | None = None,
        dtype: DTypeLike | None = None,
        **options: Any,
    ) -> Self:
        """Build a layer from a table in files.

        Each process reads the rows of its own devices only.

        Args:
            path: a safetensors file, a Hugging Face ``*.index.json``, a folder that holds one of these, or Megatron-style
                parts (see ``shared.tables.find_table.open_table``).
            tensor_name: name of the tensor. None: the tensor named like an input embedding, or the only table.
            mesh, axis_name: as for the class.
            vocab_size: rows without padding; needed for Megatron-style parts, which do not record it.
            dtype: dtype of the table; rows are cast and rounded once. None: the stored dtype, which must be legal for a
                layer (float8 is not).
            **options: further options of the class, such as ``padded_vocab_size`` if the axis does not divide the
                vocabulary, or ``reduction``.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: there is no such table, the choice is ambiguous, a file is damaged or hostile, or an argument is out
                of range. Nothing is ever unpickled.

        Source: the safetensors format.

        Example:
            >>> import tempfile, jax, numpy as np
            >>> from safetensors.numpy import save_file
            >>> from jax_impl import ParallelVocabEmbedding
            >>> folder = tempfile.mkdtemp()
            >>> table = np.arange(20.0, dtype=np.float32).reshape(10, 2)
            >>> save_file({"model.embed_tokens.weight": table}, f"{folder}/model.safetensors")
            >>> mesh = jax.make_mesh((jax.device_count(),), ("tp",))
            >>> emb = ParallelVocabEmbedding.from_table(folder, mesh=mesh, padded_vocab_size="even")
            >>> bool((np.asarray(emb.weight)[:10] == table).all())
            True
        """
        table = open_table(path, tensor_name, vocab_size)
        if dtype is None:
            if table.dtype not in DTYPES:
                raise ValueError(f"dtype must say what to cast a table of {table.dtype} to, such as jnp.bfloat16")
            dtype = DTYPES[table.dtype]
        mesh = resolve_mesh(mesh, axis_name)  # type: ignore[assignment]
        if not isinstance(mesh, Mesh):
            raise ValueError(f"mesh must be a Mesh of devices, got {type(mesh).__name__}; inside jit pass mesh=")
        empty = cls.abstract(table.vocab_size, table.emb_size, mesh, axis_name, dtype=dtype, **options)
        weight = _array_from_table(table, empty.config.partition, empty._sharding, empty.weight.dtype)
        return jax.tree.unflatten(jax.tree.structure(empty), [weight])

    @classmethod
    def from_embedding(
        cls, table: jax.Array | np.ndarray, mesh: Mesh | None = None, axis_name: str = "tp", **options: Any
    ) -> Self:
        """Build a layer from a whole table in memory.

        Args:
            table: ``[v, e]``, from JAX or NumPy, in a dtype that is legal for a layer.
            mesh, axis_name, **options: as for ``from_table``.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: ``table`` does not have two dimensions, or an argument is out of range.

        Example:
            >>> import jax, numpy as np
            >>> from jax_impl import ParallelVocabEmbedding
            >>> table = np.arange(20.0, dtype=np.float32).reshape(10, 2)
            >>> mesh = jax.make_mesh((jax.device_count(),), ("tp",))
            >>> emb = ParallelVocabEmbedding.from_embedding(table, mesh, padded_vocab_size="even")
            >>> bool((np.asarray(emb.weight)[:10] == table).all())
            True
        """
        if not isinstance(table, (jax.Array, np.ndarray)):
            raise TypeError(f"table must be a JAX or NumPy array, got {type(table).__name__}")
        if table.ndim != 2:
            raise ValueError(f"table must be [v, e], got {list(table.shape)}")
        empty = cls.abstract(*table.shape, mesh, axis_name, dtype=table.dtype, **options)
        if rows := empty.config.partition.padding_rows:
            table = (np if isinstance(table, np.ndarray) else jnp).pad(table, ((0, rows), (0, 0)))
        return jax.tree.unflatten(jax.tree.structure(empty), [jax.device_put(table, empty._sharding)])

    def save_table(self, path: str | Path, tensor_name: str = "embed_tokens.weight", *, force: bool = False) -> None:
        """Write the table without padding to one new safetensors file.

        All processes call this; each writes the rows of its devices and reads them back. The file replaces an old one
        atomically. A killed process leaves its temporary file ``.NAME.*.tmp`` beside it.

        Args:
            path: the file, named ``*.safetensors``, in a folder that all processes see.
            tensor_name: name of the tensor.
            force: replace an existing file.

        Raises:
            ValueError: in every process: the file exists and ``force`` is False, or it cannot be written.

        Example:
            >>> import tempfile, jax
            >>> from jax_impl import ParallelVocabEmbedding
            >>> mesh = jax.make_mesh((jax.device_count(),), ("tp",))
            >>> emb = ParallelVocabEmbedding(10, 4, mesh, padded_vocab_size="even")
            >>> path = f"{tempfile.mkdtemp()}/table.safetensors"
            >>> emb.save_table(path)
            >>> again = ParallelVocabEmbedding.from_table(path, mesh=mesh, padded_vocab_size="even")
            >>> bool((again.weight == emb.weight).all())
            True
        """
        if not isinstance(self.weight, jax.Array) or isinstance(self.weight, jax.core.Tracer):
            raise ValueError(f"the table must be an array to be saved, outside jit, got {type(self.weight).__name__}")
        n = self.config.partition.rows_per_rank
        shards = {
            first_row(each.index) // n: each.data for each in self.weight.addressable_shards if each.replica_id == 0
        }

        def rows(start: int, stop: int) -> np.ndarray:
            rank = start // n
            return np.asarray(shards[rank])[start - rank * n : stop - rank * n]

        write_table(
            path,
            TableSpec(tensor_name, self.weight.dtype.name, self.config.vocab_size, self.config.emb_size),
            [self.config.partition.owned_range(rank) for rank in shards],
            rows,
            force=force,
            process=jax.process_index(),
            exchange=gather_objects if jax.process_count() > 1 else lambda mine: [mine],
        )


def _array_from_table(
    table: TableFile, partition: VocabPartition, sharding: NamedSharding, dtype: np.dtype[Any]
) -> jax.Array:
    """Read the rows of this process's devices; padding rows are zero."""
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
