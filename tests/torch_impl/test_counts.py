"""What a lookup costs, counted: operations and bytes allocated."""

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

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
        if not func.is_view:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def operations(emb, ids):
    with Operations() as mode:
        emb(ids)
    return {name: count for name, count in mode.found.items() if name not in ("detach", "scalar_tensor")}


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


def allocated(function):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    return sum(max(0, event.self_cpu_memory_usage) for event in recorded.key_averages())


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "emb_size"), [(torch.float32, 64), (torch.bfloat16, 1024)])
def test_a_forward_allocates_its_output_and_some_bytes_an_id(dtype, emb_size):
    emb, ids = layer(1024, emb_size, dtype=dtype), torch.arange(1024).repeat(2)
    output = ids.numel() * emb_size * dtype.itemsize
    taken = allocated(lambda: emb(ids))
    assert output <= taken <= output + 48 * ids.numel()


def backward_bytes(vocab_size, **options):
    emb = layer(vocab_size, **options)
    output = emb(torch.arange(64))
    upstream = torch.ones_like(output)

    def backward():
        emb.weight.grad = None
        output.backward(upstream, retain_graph=True)

    backward()
    return allocated(backward)


def test_a_sparse_gradient_does_not_grow_with_the_vocabulary():
    assert backward_bytes(1000, rank=0, sparse=True) == backward_bytes(100_000, rank=0, sparse=True)


def test_a_dense_gradient_is_allocated_once():
    small, large = backward_bytes(100_000, rank=0), backward_bytes(300_000, rank=0)
    assert large - small == (300_000 - 100_000) // 2 * 8 * 4
