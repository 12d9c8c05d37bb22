"""Output head as a module: logits or loss from an embedding's table."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from shared.checks import check_flag
from shared.head import LossOptions
from shared.partition import VocabPartition
from torch_impl.agreement import agreed_hidden
from torch_impl.cross_entropy import linear_loss
from torch_impl.decode import parallel_argmax, parallel_sample, parallel_top_k
from torch_impl.head import logits_over_group
from torch_impl.ids import is_dtensor
from torch_impl.vocab_emb import ParallelVocabEmbedding

__all__ = ["ParallelLMHead"]


class ParallelLMHead(nn.Module):
    """Output head over the table of a ``ParallelVocabEmbedding``.

    Args:
        embedding: the layer that provides the table and the process group. With several ranks it must have a
            ``process_group`` or ``device_mesh``. Its ``check`` also compares the ranks' hidden states and targets.
        tied: True: the model owns the embedding. The head has no parameter and no entry of ``state_dict``; the gradients of
            lookup and head add up in the table. False: the embedding becomes the head's submodule ``table``.
        ignore_index, label_smoothing, z_loss, reduction, invalid_targets, softcap, seq_dim: as in ``linear_cross_entropy``.

    Attributes:
        embedding: the layer, read in every call: its table may be moved, replaced or sharded further.
        options: the ``shared.head.LossOptions``.

    With FSDP2 a tied head and its embedding go into one group, ``fully_shard([model.embedding, model.head])``: the
    table is then gathered while either is used.

    Raises:
        TypeError: ``embedding`` is not a ``ParallelVocabEmbedding``, or an option has the wrong type.
        ValueError: an option is out of range; the embedding has several ranks and no process group; a tied embedding
            has ``gradient_accumulation_fusion``, which accumulates the lookup's gradient alone, or
            ``reduction="all_to_all"`` where the head has no ``seq_dim``.

    Source: tied embeddings: Press and Wolf (2017, arXiv:1608.05859).

    Example:
        >>> import torch
        >>> from torch_impl import ParallelLMHead, ParallelVocabEmbedding
        >>> embedding = ParallelVocabEmbedding(12, 4)
        >>> head = ParallelLMHead(embedding, tied=True)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> head(embedding(ids)).shape, head(embedding(ids), targets=ids).shape, list(head.state_dict())
        (torch.Size([1, 3, 12]), torch.Size([]), [])
    """

    embedding: ParallelVocabEmbedding

    def __init__(
        self,
        embedding: ParallelVocabEmbedding,
        *,
        tied: bool,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        reduction: str = "mean",
        invalid_targets: str = "error",
        softcap: float | None = None,
        seq_dim: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(embedding, ParallelVocabEmbedding):
            raise TypeError(f"embedding must be a ParallelVocabEmbedding, got {type(embedding).__name__}")
        self.options = LossOptions(ignore_index, label_smoothing, z_loss, reduction, invalid_targets, softcap, seq_dim)
        if embedding.partition.world_size > 1 and embedding.group_name is None:
            raise ValueError(
                f"the embedding of a head over {embedding.partition.world_size} ranks must have a process_group or "
                f"device_mesh, got one built without; pass it to ParallelVocabEmbedding"
            )
        self.tied = check_flag("tied", tied)
        if tied and embedding.config.reduction == "all_to_all" and seq_dim is None:
            raise ValueError(
                "a tied embedding must not have reduction='all_to_all' without seq_dim, got both: the head needs the same "
                "hidden states on every rank, or parts of a sequence; pass seq_dim and the targets of all ranks"
            )
        if tied and embedding.config.gradient_accumulation_fusion:
            raise ValueError(
                "gradient_accumulation_fusion must be False for a tied embedding: the head's gradient goes to weight.grad; "
                "build the embedding without it"
            )
        if not tied:
            self.table = embedding
        object.__setattr__(self, "embedding", embedding)  # nn.Module would register it twice

    @property
    def partition(self) -> VocabPartition:
        """The table's ``shared.VocabPartition``."""
        return self.embedding.partition

    def forward(self, hidden: Tensor, targets: Tensor | None = None, *, returns: Sequence[str] = ()) -> Any:
        """Compute the loss, or this rank's logits if there are no targets.

        Args:
            hidden: ``[*, emb_size]``, in the table's dtype, complete and the same on all ranks; with ``seq_dim`` this
                rank's part.
            targets: ids of all tokens, ``[*]``, the same on all ranks.
            returns: further results, as in ``linear_cross_entropy``.

        Returns:
            The result of ``linear_cross_entropy``, or of ``parallel_logits`` for all tokens. The gradient of ``hidden``
            is summed over the ranks.

        Raises:
            TypeError, ValueError, IndexError, RuntimeError: as ``linear_cross_entropy``. Also ValueErrors: ``returns``
                without targets; a table that ``fully_shard`` has split further and not gathered; with ``check``, ranks
                that disagree.
        """
        embedding, options = self.embedding, self.options
        partition = embedding.config.partition  # dynamo does not trace the property
        weight = embedding.rank_weight()
        if is_dtensor(weight):
            raise ValueError(
                "the table is split further by fully_shard and has not been gathered: put the embedding and its head into "
                "one group, fully_shard([model.embedding, model.head])"
            )
        if missing := partition.rows_per_rank - len(weight):  # DTensor leaves them out
            weight = F.pad(weight, (0, 0, 0, missing))
        group_name = (embedding.group_name or "") if partition.world_size > 1 else ""
        if embedding.config.check and group_name:
            hidden = agreed_hidden(hidden, targets, options.seq_dim is not None, partition.world_size, group_name)
        if targets is not None:
            asked = replace(options, returns=returns) if returns else options
            return linear_loss(hidden, weight, targets, partition, asked, embedding.rank, group_name)
        if returns:
            raise ValueError(f"returns must be empty without targets, got {tuple(returns)}")
        return logits_over_group(
            hidden, weight, partition, embedding.rank, options.softcap, options.seq_dim, group_name
        )

    def argmax(self, logits: Tensor) -> Tensor:
        """Apply ``parallel_argmax`` to this rank's logits, ``[*, rows_per_rank]``."""
        return parallel_argmax(logits, self.partition, self.embedding.process_group)

    def top_k(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Apply ``parallel_top_k`` to this rank's logits, ``[*, rows_per_rank]``."""
        return parallel_top_k(logits, k, self.partition, self.embedding.process_group)

    def sample(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Apply ``parallel_sample`` to this rank's logits, ``[*, rows_per_rank]``, and ``uniform`` ``[*]``."""
        return parallel_sample(logits, self.partition, self.embedding.process_group, uniform=uniform)

    def extra_repr(self) -> str:
        values = [(each.name, getattr(self.options, each.name), each.default) for each in fields(self.options)]
        return ", ".join(
            [f"tied={self.tied}", *(f"{name}={value!r}" for name, value, default in values if value != default)]
        )
