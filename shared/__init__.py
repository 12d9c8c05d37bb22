"""Framework-independent core: configuration, sharding arithmetic, ids and dtypes.

Nothing here imports torch or jax.
"""

from shared.config import EmbeddingConfig
from shared.partition import VocabPartition, pad_vocab_size

__all__ = ["EmbeddingConfig", "VocabPartition", "pad_vocab_size"]
