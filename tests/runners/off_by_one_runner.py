"""A torch backend whose forward pass looks up the row after the one asked for. Its gradients are right."""

import torch

from shared.proof.launch import serve
from torch_impl import runner
from torch_impl.functional import partial_lookup


class Replaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, right, wrong):
        return wrong.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class OffByOne(runner.ParallelVocabEmbedding):
    def forward(self, ids):
        wrong = partial_lookup(self.weight.detach().roll(-1, 0), ids, self.partition, self.rank)
        return Replaced.apply(super().forward(ids), wrong)


runner.ParallelVocabEmbedding = OffByOne
serve("torch", {}, runner.run)
