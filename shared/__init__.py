"""What both backends share: the sharding arithmetic, the NumPy oracle, the comparison and the command line.

Nothing here imports torch or jax.
"""

from shared.config import EmbeddingConfig
from shared.partition import VocabPartition, pad_vocab_size

__all__ = ["EmbeddingConfig", "VocabPartition", "pad_vocab_size"]
