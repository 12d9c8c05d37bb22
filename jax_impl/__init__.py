"""The vocabulary-parallel embedding in JAX. Never imports torch."""

from jax_impl.functional import partial_lookup, reduced_lookup
from jax_impl.ids import as_ids
from jax_impl.vocab_emb import ParallelVocabEmbedding

__all__ = ["ParallelVocabEmbedding", "as_ids", "partial_lookup", "reduced_lookup"]
