"""What a lookup costs, counted: operations and bytes allocated."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch_layers import allocated

from torch_impl import ParallelVocabEmbedding

IDS = torch.arange(24).view(2, 12)  # of which rank 1 of 2 owns the later half
LOCATE = {"sub": 1, "clamp": 1, "remainder": 1}


class Operations(TorchDispatchMode):
    """Counts what reaches a kernel; views are free."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("detach", "scalar_tensor"):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def operations(emb, ids):
    with Operations() as mode:
        emb(ids)
    return mode.found


def layer(vocab_size=24, emb_size=8, rank=1, world_size=2, **options):
    return ParallelVocabEmbedding(vocab_size, emb_size, rank, world_size, **options)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("ids", [IDS[:1], IDS[1:], IDS.repeat(4, 1)])
def test_a_forward_is_one_pass_without_a_mask(ids, grad):
    with torch.set_grad_enabled(grad):
        assert operations(layer(), ids) == {**LOCATE, "embedding": 1}


def test_a_forward_without_a_row_of_zeros_is_one_pass_more_and_a_large_one_is_one_operator():
    emb = layer()
    emb.weight.data = emb.weight.data.clone()
    assert operations(emb, IDS) == {**LOCATE, "clamp": 2, "embedding": 1, "lt": 1, "mul_": 1}
    assert operations(layer(64, 1024), torch.arange(8192)) == {**LOCATE, "gather": 1}


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "emb_size"), [(torch.float32, 64), (torch.bfloat16, 1024)])
def test_a_forward_allocates_its_output_and_some_bytes_an_id(dtype, emb_size):
    emb, ids = layer(1024, emb_size, dtype=dtype), torch.arange(1024).repeat(2)
    output = ids.numel() * emb_size * dtype.itemsize
    assert output <= allocated(emb, ids) <= output + 48 * ids.numel()


@pytest.mark.parametrize("sparse", [True, False])
def test_a_dense_gradient_is_allocated_once_and_a_sparse_one_is_small(sparse):
    taken = []
    for vocab_size in (100_000, 300_000):
        emb = layer(vocab_size, rank=0, sparse=sparse)
        output = emb(torch.arange(64))
        upstream = torch.ones_like(output)
        output.backward(upstream, retain_graph=True)
        emb.weight.grad = None
        taken.append(allocated(output.backward, upstream))
    assert taken[1] - taken[0] == (0 if sparse else (300_000 - 100_000) // 2 * 8 * 4)
