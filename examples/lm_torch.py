"""Train a small language model whose embedding and output head share one table, split over all ranks.

Run: python examples/lm_torch.py, or over 4 ranks: torchrun --standalone --nproc-per-node 4 examples/lm_torch.py
"""

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lm_text import BETAS, EMB, EPS, HEADS, LAYERS, LENGTH, RATE, VOCAB, batches, initial_weights, parser_of, record
from torch import nn

from torch_impl import ParallelLMHead, ParallelVocabEmbedding


class Layer(nn.Module):
    """Attention to earlier tokens, then a perceptron; every rank computes the same."""

    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(EMB, eps=EPS), nn.RMSNorm(EMB, eps=EPS)
        self.qkv = nn.Linear(EMB, 3 * EMB, bias=False)
        self.out = nn.Linear(EMB, EMB, bias=False)
        self.up = nn.Linear(EMB, 4 * EMB, bias=False)
        self.down = nn.Linear(4 * EMB, EMB, bias=False)

    def forward(self, x):
        b, s, e = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(b, s, 3, HEADS, e // HEADS).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, s, e))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class LanguageModel(nn.Module):
    def __init__(self, process_group):
        super().__init__()
        # The head needs the hidden states of all tokens on every rank, hence all_reduce.
        self.emb = ParallelVocabEmbedding(VOCAB, EMB, process_group=process_group, reduction="all_reduce", init=None)
        self.positions = nn.Parameter(torch.empty(LENGTH, EMB))
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm = nn.RMSNorm(EMB, eps=EPS)
        self.head = ParallelLMHead(self.emb, tied=True)  # without parameters: it multiplies by the table of self.emb

    def forward(self, ids, targets):
        x = self.layers(self.emb(ids) + self.positions)
        return self.head(self.norm(x), targets)  # the cross entropy: no rank ever holds all logits


def train(process_group) -> Iterator[float]:
    model = LanguageModel(process_group)
    weights = {name: torch.from_numpy(array) for name, array in initial_weights().items()}
    weights["emb.weight"] = weights["emb.weight"].chunk(model.emb.world_size)[model.emb.rank]
    model.load_state_dict(weights)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, betas=BETAS)
    for ids in torch.from_numpy(batches()):
        loss = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()  # complete on every rank: nothing is left to reduce
        optimizer.step()
        yield loss.item()


options = parser_of(__doc__).parse_args()
if "RANK" in os.environ:  # torchrun's
    dist.init_process_group("gloo")
group = dist.group.WORLD if dist.is_initialized() else None
losses = train(group)
if group is None or group.rank() == 0:
    record("torch", 1 if group is None else group.size(), losses, options.json)
else:
    for _ in losses:
        pass
if group is not None:
    dist.barrier()
    dist.destroy_process_group()
