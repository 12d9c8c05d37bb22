"""Replacement for Megatron-core's layer; Megatron-core is imported on use."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from torch_impl.further_split import rows_here
from torch_impl.vocab_emb import ParallelVocabEmbedding

__all__ = ["VocabParallelEmbedding"]


class VocabParallelEmbedding(ParallelVocabEmbedding):
    """Vocabulary-parallel embedding with Megatron-core's constructor and checkpoints.

    It replaces ``megatron.core.tensor_parallel.VocabParallelEmbedding``. The parameter has the same name, shape,
    device, initial values and attributes. ``sharded_state_dict`` has the same entry, so that either class loads the
    other's checkpoints. Invalid ids give zero rows, also on one rank.

    The gradient reaches ``weight.main_grad`` through the hooks of Megatron's DistributedDataParallel, as with
    Megatron's class: ``config.gradient_accumulation_fusion`` concerns matrix products. Sums have a fixed order,
    whatever ``config.deterministic_mode`` is.

    Args:
        num_embeddings: rows of the whole table, padding included; divisible by the group's size.
        embedding_dim: columns of the table.
        init_method: fills a tensor in place: the rank's rows, under the rank's random state of Megatron. With
            ``config.use_cpu_initialization`` it fills the whole table on the host, of which each rank keeps its rows.
        reduce_scatter_embeddings: return the rank's chunk of the sequence, the sequence first.
        config: Megatron's ModelParallelConfig or TransformerConfig. Its ``params_dtype``, ``use_cpu_initialization``,
            ``perform_initialization`` and ``deterministic_mode`` are read.
        tp_group: the ranks. Default: Megatron's tensor-parallel group.

    Raises:
        ImportError: megatron-core is not installed.
        ValueError: the group's size does not divide ``num_embeddings``.

    Source: Megatron-core 0.16 (Shoeybi et al., 2019, arXiv:1909.08053).

    Example:
        >>> from torch_impl.adapters.megatron import VocabParallelEmbedding
        >>> def build_model(**arguments):
        ...     from megatron.core import tensor_parallel
        ...     from megatron.core.models.gpt import GPTModel
        ...
        ...     tensor_parallel.VocabParallelEmbedding = VocabParallelEmbedding  # models look it up by this name
        ...     return GPTModel(**arguments)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        init_method: Callable[[Tensor], object],
        reduce_scatter_embeddings: bool = False,
        config: Any,
        tp_group: dist.ProcessGroup | None = None,
    ) -> None:
        try:
            from megatron.core.utils import get_tensor_model_parallel_group_if_none
        except ImportError as error:
            raise ImportError(
                "VocabParallelEmbedding needs Megatron-core, which is not installed: pip install megatron-core"
            ) from error
        tp_group = get_tensor_model_parallel_group_if_none(tp_group)
        if tp_group is not None and num_embeddings % tp_group.size():
            raise ValueError(
                f"num_embeddings must be divisible by the {tp_group.size()} ranks of tp_group, got {num_embeddings}; pad "
                f"the vocabulary first, as Megatron's make_vocab_size_divisible_by does"
            )
        super().__init__(
            num_embeddings,
            embedding_dim,
            process_group=tp_group,
            dtype=config.params_dtype,
            device="meta",
            reduction="reduce_scatter" if reduce_scatter_embeddings else "all_reduce",
            seq_dim=0,
        )
        self.num_embeddings_per_partition = self.partition.rows_per_rank
        self.vocab_start_index, self.vocab_end_index = self.partition.owned_range(self.rank)
        self.reduce_scatter_embeddings = reduce_scatter_embeddings
        self.deterministic_mode = config.deterministic_mode
        self._init_method, self._init_whole_table = init_method, config.use_cpu_initialization
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.allocate_table(self.num_embeddings_per_partition, embedding_dim, config.params_dtype, device)
        if config.perform_initialization:
            self.reset_parameters()

    @property
    def tp_group(self) -> dist.ProcessGroup | None:
        """The ranks, under Megatron's name."""
        return self.process_group

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the rank's rows with ``init_method``, except on the meta device."""
        if self.weight.is_meta:
            return
        if self._init_whole_table:
            table = torch.empty(self.vocab_size, self.emb_size, dtype=torch.float32, device="cpu")
            self._init_method(table)
            part, first = rows_here(self.weight)
            first += self.vocab_start_index
            part.copy_(table[first : first + len(part)])
            return
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        with get_cuda_rng_tracker().fork():
            self._init_method(self.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids.

        Args:
            ids: global ids, ``[b, s]``; the same on all ranks.

        Returns:
            The embedding ``[b, s, e]``; with ``reduce_scatter_embeddings`` the rank's chunk, ``[s / w, b, e]``.

        Raises:
            TypeError: ids are not a tensor of integers.
            ValueError: with ``reduce_scatter_embeddings``, the sequence is not divisible by the number of ranks.
        """
        return super().forward(torch.transpose(ids, 0, 1) if self.reduce_scatter_embeddings else ids)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: object = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return ``weight`` as Megatron's ``dist_checkpointing`` saves and loads it.

        Args:
            prefix: prefix of the name.
            sharded_offsets: Megatron's offsets of dimensions before the table's.
            metadata: Megatron's; its ``dp_cp_group`` holds the table's replicas. Default: Megatron's groups.

        Returns:
            A ``ShardedTensor`` of the whole table, which can be loaded with another padding.
        """
        from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
        from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

        key = f"{prefix}weight"
        replicas = ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]
        entry = make_tp_sharded_tensor_for_checkpoint(
            self.weight,
            key,
            allow_shape_mismatch=True,
            prepend_offsets=sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=replicas,
        )
        return {key: entry}

    @classmethod
    def from_table(cls, *arguments: object, **options: object) -> NoReturn:
        """Refused: Megatron-core builds the layer; load its rows afterwards.

        Raises:
            TypeError: always; the message says how.
        """
        raise TypeError(
            "from_table has no argument for Megatron's config: build the layer, then copy the rows of "
            "torch_impl.ParallelVocabEmbedding.from_table(..., process_group=emb.tp_group).weight into emb.weight"
        )

    @classmethod
    def from_embedding(cls, *arguments: object, **options: object) -> NoReturn:
        """Refused: Megatron-core builds the layer; copy its rows afterwards.

        Raises:
            TypeError: always; the message says how.
        """
        raise TypeError(
            "from_embedding has no argument for Megatron's config: build the layer, then copy rows "
            "[emb.vocab_start_index, emb.vocab_end_index) of the table into emb.weight"
        )
