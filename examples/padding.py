"""Pad a vocabulary that the number of ranks does not divide.

Run: python examples/padding.py
"""

import torch

from shared import VocabPartition, pad_vocab_size
from torch_impl import ParallelVocabEmbedding

vocab_size, world_size = 50257, 8
for name, size in {
    "least": pad_vocab_size(vocab_size, world_size),
    "vLLM's, a multiple of 64": pad_vocab_size(vocab_size, world_size, 64),
    "Megatron-LM's, a multiple of 128 * w": pad_vocab_size(vocab_size, world_size, 128 * world_size),
}.items():
    partition = VocabPartition(vocab_size, world_size, size)
    print(f"{name}: {size} rows, {partition.rows_per_rank} a rank, the last rank owns {partition.owned_range(7)}")

emb = ParallelVocabEmbedding(vocab_size, 16, rank=7, world_size=world_size, padded_vocab_size="even")
out = emb(torch.tensor([vocab_size - 1, vocab_size]))  # the last id, and one in the padding
assert torch.equal(out[0], emb.weight[emb.partition.owned_range(7)[1] - emb.partition.start(7) - 1])
assert not out[1].any()
out.sum().backward()
assert not emb.weight.grad[-7:].any()  # padding rows get no gradient
