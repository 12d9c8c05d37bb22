"""What ``test_gpu_kernels.py`` runs, in processes of its own: the kernels for GPUs on a CPU.

Sums of integers small enough are exact in any order: there bits are compared.
"""

import re

import pytest
import torch
from torch_layers import DTYPES

from torch_impl.kernels import cpu, gpu

H100 = ("cuda", 90, 32)
TARGETS = [("cuda", 80, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]


@pytest.mark.parametrize(
    ("dtype", "tokens"), [*((dtype, 257) for dtype in DTYPES), *((torch.bfloat16, n) for n in (1, 16, 256, 600))]
)
def test_interpreted_sums_are_the_cpus(dtype, tokens):
    torch.manual_seed(tokens)
    emb_size = 300 if tokens == 16 else 3  # more columns than one program works on
    for equal in (0.0, 0.6, 1.0):  # a row that goes on through several windows
        keys = torch.where(torch.rand(tokens) < equal, 5, torch.randint(0, 9, (tokens,)))  # 8 is for no row
        upstream = torch.randint(-2, 3, (tokens, emb_size)).to(dtype)  # sums that bfloat16 holds
        assert torch.equal(gpu.scatter_add(upstream, keys, 8), cpu.scatter_add(upstream, keys, 8))


def test_interpreted_equal_ids_do_not_saturate_and_a_foreign_token_may_have_any_gradient():
    sums = gpu.scatter_add(torch.ones(600, 4, dtype=torch.bfloat16), torch.full((600,), 2), 4)
    assert sums[:, 0].tolist() == [0, 0, torch.tensor(600.0).bfloat16(), 0]
    upstream = torch.ones(6, 5)
    upstream[[1, 4]] = float("nan")
    sums = gpu.scatter_add(upstream, torch.tensor([0, 8, 0, 7, 8, 1]), 8)
    assert sums[:, 0].tolist() == [2, 1, 0, 0, 0, 0, 0, 1]
    assert not gpu.scatter_add(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), 3).any()
    assert not gpu.scatter_add(torch.ones(4, 5), torch.full((4,), 3), 3).any()


def test_interpreted_columns_that_are_far_apart():
    """As those of a transposed gradient: further than 32 bits count."""
    memory = torch.empty(9 * 2**28 + 8, dtype=torch.bfloat16)  # of which only some pages are touched
    far = memory.as_strided((8, 10), (1, 2**28))
    far.copy_(torch.arange(80).view(8, 10))
    sums = gpu.scatter_add(far, torch.tensor([0, 1, 1, 2, 3, 3, 3, 3]), 3)
    assert torch.equal(sums, torch.stack([far[0], far[1] + far[2], far[3]]))


def test_interpreted_sums_are_the_same_every_time():
    # The interpreter cuts to bfloat16 where a GPU rounds (test_compiled_for_gpus): float16 it rounds.
    keys, upstream = torch.randint(0, 8, (400,)), torch.randn(400, 5).half()
    first, second = gpu.scatter_add(upstream, keys, 8), gpu.scatter_add(upstream, keys, 8)
    assert torch.equal(first.view(torch.int16), second.view(torch.int16))
    exact = torch.zeros(8, 5, dtype=torch.float64).index_add_(0, keys, upstream.double())
    # In float32, and rounded once: half of float16's last place, and a little for the float32 sums.
    torch.testing.assert_close(first.double(), exact, rtol=2**-11 * 1.01, atol=400 * 4 * 2**-24)


def binary(kernel, target, types_, constants):
    """What Triton's compiler makes of a kernel for a GPU, pointers aligned as PyTorch's are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types_[name] for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    aligned += [i for i, name in enumerate(kernel.arg_names) if name in ("emb_size", "row_stride")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget(*target)).asm


@pytest.mark.parametrize(
    ("target", "dtype"), [*((H100, dtype) for dtype in DTYPES), *((target, torch.bfloat16) for target in TARGETS)]
)
def test_compiled_for_gpus(target, dtype):
    number = {2: "*fp16" if dtype == torch.float16 else "*bf16", 4: "*fp32", 8: "*fp64"}[dtype.itemsize]
    wide = "*fp64" if dtype == torch.float64 else "*fp32"
    names = dict.fromkeys(["num_tokens", "num_rows", "emb_size", "row_stride"], "i32")
    names |= {"order_ptr": "*i64", "keys_ptr": "*i64", "grad_ptr": number, "sums_ptr": number, "pieces_ptr": wide}
    sizes = {"WINDOW": gpu._WINDOW, "BLOCK_E": gpu._BLOCK_COLUMNS}
    sums = binary(gpu._sum_pieces, target, names, {**sizes, "BLOCK_T": gpu._BLOCK_TOKENS, "column_stride": 1})
    join = binary(gpu._join_pieces, target, names, sizes)
    if target[0] == "cuda":
        assert all("cubin" in each for each in (sums, join))
        narrow = {torch.bfloat16: "cvt.rn.bf16", torch.float16: "cvt.rn.f16"}  # to the nearest, ties to even
        assert narrow.get(dtype, "") in sums["ptx"]
        assert narrow.get(dtype, "") in join["ptx"]
        several_numbers_at_once = r"ld\.global(\.\w+)*\.v[24]\.b(16|32|64)|ld\.global\.b64"
        assert re.search(several_numbers_at_once, sums["ptx"])
        assert "atom" not in sums["ptx"] + join["ptx"]  # sums in a fixed order
    else:
        assert all("hsaco" in each for each in (sums, join))
