"""The vocabulary-parallel embedding in PyTorch. Never imports jax."""

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
    "parallel_argmax",
    "parallel_cross_entropy",
    "parallel_logits",
    "parallel_sample",
    "parallel_top_k",
    "partial_lookup",
    "reduced_lookup",
    "shards_from_dlpack",
]
