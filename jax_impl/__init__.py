"""The vocabulary-parallel embedding in JAX. Never imports torch."""

from jax_impl.functional import partial_lookup
from jax_impl.vocab_emb import ParallelVocabEmbedding

__all__ = ["ParallelVocabEmbedding", "partial_lookup"]
