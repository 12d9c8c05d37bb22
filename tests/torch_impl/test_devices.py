"""On an accelerator, and with ids and table on two devices. Runs where there is one."""

import pytest
import torch
from torch import nn

from torch_impl import ParallelVocabEmbedding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
IDS = torch.tensor([[0, 8, 9, 9, 15, 16], [23, 24, -1, 8, 8, 10]])


def run(emb, ids, grad_output):
    out = emb(ids)
    (grad,) = torch.autograd.grad(out, emb.weight, grad_output.to(out))
    return out, grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding_idx", [None, 9])
@pytest.mark.parametrize(("table", "ids"), [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_result_is_that_of_the_cpu(dtype, padding_idx, table, ids, compiled):
    emb = ParallelVocabEmbedding(24, 5, 1, 3, dtype=dtype, padding_idx=padding_idx)
    grad_output = torch.randint(-7, 8, (*IDS.shape, 5)).to(dtype)
    expected, expected_grad = run(emb, IDS, grad_output)
    emb = emb.to(table)
    out, grad = run(torch.compile(emb, fullgraph=True) if compiled else emb, IDS.to(ids), grad_output)
    assert out.device.type == ids
    assert grad.device.type == table
    assert torch.equal(out.cpu(), expected)
    assert torch.equal(grad.cpu(), expected_grad)


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
