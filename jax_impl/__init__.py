"""The vocabulary-parallel embedding in JAX. Never imports torch."""

from jax_impl.checkpoint import restore_args
from jax_impl.dlpack import array_from_dlpack, from_dlpack
from jax_impl.functional import partial_lookup, reduced_lookup
from jax_impl.ids import as_ids
from jax_impl.vocab_emb import ParallelVocabEmbedding

__all__ = [
    "ParallelVocabEmbedding",
    "array_from_dlpack",
    "as_ids",
    "from_dlpack",
    "partial_lookup",
    "reduced_lookup",
    "restore_args",
]
