"""The vocabulary-parallel embedding in PyTorch. Never imports jax."""

from torch_impl.functional import partial_lookup, reduced_lookup
from torch_impl.vocab_emb import ParallelVocabEmbedding

__all__ = ["ParallelVocabEmbedding", "partial_lookup", "reduced_lookup"]
