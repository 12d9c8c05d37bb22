"""The vocabulary-parallel embedding in JAX. Never imports torch."""

import shared

if not hasattr(shared, "EmbeddingConfig"):
    raise ImportError(
        f"jax_impl needs the package `shared` of parallel-vocab-embedding and found another in "
        f"{shared.__file__ or [*shared.__path__]}: uninstall that one (`pip uninstall shared`), or put the folder of "
        "parallel-vocab-embedding before it on sys.path"
    )

from jax_impl.checkpoint import restore_args
from jax_impl.cross_entropy import linear_cross_entropy, parallel_cross_entropy
from jax_impl.decode import parallel_argmax, parallel_sample, parallel_top_k
from jax_impl.dlpack import array_from_dlpack, from_dlpack
from jax_impl.functional import partial_lookup, reduced_lookup
from jax_impl.head import parallel_logits
from jax_impl.ids import as_ids
from jax_impl.lm_head import ParallelLMHead
from jax_impl.vocab_emb import ParallelVocabEmbedding

__all__ = [
    "ParallelLMHead",
    "ParallelVocabEmbedding",
    "array_from_dlpack",
    "as_ids",
    "from_dlpack",
    "linear_cross_entropy",
    "parallel_argmax",
    "parallel_cross_entropy",
    "parallel_logits",
    "parallel_sample",
    "parallel_top_k",
    "partial_lookup",
    "reduced_lookup",
    "restore_args",
]
