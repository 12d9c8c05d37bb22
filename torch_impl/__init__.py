"""The vocabulary-parallel embedding in PyTorch. Never imports jax."""

import shared

if not hasattr(shared, "EmbeddingConfig"):
    raise ImportError(
        f"torch_impl needs the package `shared` of parallel-vocab-embedding and found another in "
        f"{shared.__file__ or [*shared.__path__]}: uninstall that one (`pip uninstall shared`), or put the folder of "
        "parallel-vocab-embedding before it on sys.path"
    )

from torch_impl.checkpoint import local_state_dict, sharded_state_dict
from torch_impl.clipping import clip_grad_norm_
from torch_impl.cross_entropy import linear_cross_entropy, parallel_cross_entropy
from torch_impl.decode import parallel_argmax, parallel_sample, parallel_top_k
from torch_impl.dlpack import from_dlpack, shards_from_dlpack
from torch_impl.functional import partial_lookup, reduced_lookup
from torch_impl.head import parallel_logits
from torch_impl.lm_head import ParallelLMHead
from torch_impl.vocab_emb import ParallelVocabEmbedding

__all__ = [
    "ParallelLMHead",
    "ParallelVocabEmbedding",
    "clip_grad_norm_",
    "from_dlpack",
    "linear_cross_entropy",
    "local_state_dict",
    "parallel_argmax",
    "parallel_cross_entropy",
    "parallel_logits",
    "parallel_sample",
    "parallel_top_k",
    "partial_lookup",
    "reduced_lookup",
    "sharded_state_dict",
    "shards_from_dlpack",
]
