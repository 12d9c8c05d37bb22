"""On an accelerator, and with ids and table on two devices. Runs where there is one."""

import pytest
import torch
from torch import nn
from torch_layers import DTYPES

from torch_impl import ParallelVocabEmbedding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

IDS = torch.tensor([[0, 8, 9, 9, 15, 16], [23, 24, -1, 8, 8, 10]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding_idx", [None, 9])
@pytest.mark.parametrize(("table", "ids"), [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_result_is_that_of_the_cpu(dtype, padding_idx, table, ids, compiled):
    emb, grad_output = (
        ParallelVocabEmbedding(24, 5, 1, 3, dtype=dtype, padding_idx=padding_idx),
        torch.arange(60) % 15 - 7,
    )
    results = []
    for where, of_ids in (("cpu", "cpu"), (table, ids)):
        emb = emb.to(where)
        lookup = torch.compile(emb, fullgraph=True) if compiled and results else emb
        output = lookup(IDS.to(of_ids))
        (grad,) = torch.autograd.grad(output, emb.weight, grad_output.view(output.shape).to(output))
        assert (output.device.type, grad.device.type) == (of_ids, where)
        results.append((output.cpu(), grad.cpu()))
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_5000_equal_ids_do_not_saturate():
    emb = ParallelVocabEmbedding(8, 4, 1, 2, dtype=torch.bfloat16, device="cuda")
    emb(torch.full((5000,), 6, device="cuda")).sum().backward()
    assert torch.equal(emb.weight.grad[2].cpu(), torch.full((4,), 5000.0).bfloat16())


def test_table_is_drawn_on_its_device_and_keeps_rng_state():
    before = torch.cuda.get_rng_state()
    emb = ParallelVocabEmbedding(24, 5, 1, 3, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), before)
    torch.manual_seed(43)
    assert torch.equal(emb.weight, nn.init.normal_(torch.empty(8, 5, device="cuda")))


def test_the_host_does_not_wait_for_the_device():
    emb = ParallelVocabEmbedding(24, 5, 1, 3, device="cuda")
    ids = IDS.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        emb(ids).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
