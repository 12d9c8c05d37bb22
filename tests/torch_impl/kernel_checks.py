"""What ``test_gpu_kernels.py`` runs, in processes of its own: the kernels for GPUs on a CPU.

Sums of integers small enough are exact in any order: there bits are compared.
"""

import re

import pytest
import torch
from torch.autograd import forward_ad

from torch_impl import ParallelVocabEmbedding, gpu, rows
from torch_impl.local import sums

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
IDS = torch.tensor([[0, 8, 9, 9, 15, 16], [23, 24, -1, 8, 8, 10]])
TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]


@pytest.fixture
def on_kernels(monkeypatch):
    """The way of a GPU, for tensors on the CPU; notes the kernels that are launched."""
    from torch_impl.gpu import kernels

    launched = []
    for name in ("_take", "_sum_pieces", "_join_pieces"):
        kernel = getattr(kernels, name)

        def noting(grid, name=name, kernel=kernel):
            launched.append(name)
            return kernel[grid]

        monkeypatch.setattr(kernels, name, type("Noting", (), {"__getitem__": lambda _, grid, f=noting: f(grid)})())
    monkeypatch.setattr(gpu, "serves", lambda *tensors: True)
    monkeypatch.setattr(rows, "on_cpu", lambda *tensors: False)
    for module in (rows, sums):
        monkeypatch.setattr(module, "owned_rows_only", lambda *tensors: False)
    return launched


def bits(tensor):
    return tensor.view(WORDS[tensor.element_size()])


def layers(dtype=torch.float32, emb_size=5, **options):
    return [ParallelVocabEmbedding(24, emb_size, rank, 3, dtype=dtype, **options) for rank in range(3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("emb_size", [1, 5, 1000])
def test_interpreted_lookups_are_the_cpus(dtype, emb_size, request):
    for emb in layers(dtype, emb_size):
        with torch.no_grad():
            emb.weight[:2, 0] = torch.tensor([float("nan"), -0.0], dtype=dtype)
            expected = emb(IDS)
            launched = request.getfixturevalue("on_kernels")
            assert torch.equal(bits(emb(IDS)), bits(expected))
    assert set(launched) == {"_take"}


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint64])
def test_interpreted_no_dtype_of_ids_wraps(dtype, on_kernels):
    high = torch.iinfo(dtype).max
    ids = torch.tensor([9, 23, high], dtype=dtype)
    emb = layers()[1]
    found = emb(ids)
    assert torch.equal(found[0], emb.weight[1])
    assert not found[1:].any()


def test_interpreted_ids_of_any_shape_and_stride(on_kernels):
    emb = layers()[1]
    assert emb(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3, 5)
    assert torch.equal(emb(torch.tensor(12)), emb.weight[4])
    assert torch.equal(emb(IDS.T), emb(IDS).transpose(0, 1))
    ids = torch.tensor([2**40 + 9, -(2**63), 2**63 - 1])
    assert not emb(ids).any()


def test_interpreted_columns_of_a_wider_table(on_kernels):
    emb = layers()[1]
    wide = torch.arange(80.0).reshape(8, 10)
    emb.weight = torch.nn.Parameter(wide[:, ::2])
    assert not emb.weight.is_contiguous()
    found = emb(IDS)
    assert torch.equal(found[0, 1], wide[0, ::2])
    found.backward(torch.ones_like(found))
    assert torch.equal(emb.weight.grad[:3, 0], torch.tensor([3.0, 2.0, 1.0]))


@pytest.mark.parametrize("padding_idx", [None, 9])
def test_interpreted_one_launch_forward_and_two_backward(padding_idx, on_kernels):
    emb = layers(padding_idx=padding_idx)[1]
    found = emb(IDS)
    assert on_kernels == ["_take"]
    found.backward(torch.ones_like(found))
    assert on_kernels == ["_take", "_sum_pieces"]  # one window of tokens: nothing to join
    assert emb.weight.grad[:, 0].tolist() == [3, 0 if padding_idx else 2, 1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("dtype", "tokens"),
    [*((dtype, 257) for dtype in DTYPES), *((torch.bfloat16, tokens) for tokens in (15, 16, 255, 256, 1100))],
)
def test_interpreted_gradients_are_the_cpus(dtype, tokens, request):
    torch.manual_seed(tokens)
    for equal in (0.0, 0.6, 1.0):  # part of the tokens that ask for one row: it goes on through several windows
        ids = torch.where(torch.rand(tokens) < equal, 13, torch.randint(-2, 26, (tokens,)))
        upstream = torch.randint(-7, 8, (tokens, 3)).to(dtype)
        emb = layers(dtype, 3)[1]
        with pytest.MonkeyPatch.context() as cpu:
            cpu.setattr(gpu, "serves", lambda *tensors: False)
            (expected,) = torch.autograd.grad(emb(ids), emb.weight, upstream)
        request.getfixturevalue("on_kernels")
        (found,) = torch.autograd.grad(emb(ids), emb.weight, upstream)
        assert torch.equal(found, expected)


def test_interpreted_1600_equal_ids_do_not_saturate(on_kernels):
    emb = ParallelVocabEmbedding(8, 4, 1, 2, dtype=torch.bfloat16)
    emb(torch.full((1600,), 6)).sum().backward()
    assert torch.equal(emb.weight.grad[2], torch.full((4,), 1600.0).bfloat16())
    assert not emb.weight.grad[[0, 1, 3]].any()


def test_interpreted_a_foreign_token_may_have_any_gradient(on_kernels):
    emb = layers()[1]
    upstream = torch.ones(*IDS.shape, 5)
    upstream[(IDS < 8) | (IDS >= 16)] = float("nan")
    emb(IDS).backward(upstream)
    assert emb.weight.grad.isfinite().all()


def test_interpreted_columns_that_are_far_apart():
    """As those of a transposed table or gradient: further than 32 bits count."""
    from torch_impl.gpu.kernels import sum_rows_by_key, take_owned_rows

    memory = torch.empty(9 * 2**28 + 8, dtype=torch.bfloat16)  # of which only some pages are touched
    far = memory.as_strided((8, 10), (1, 2**28))
    far.copy_(torch.arange(80).view(8, 10))
    found, _ = take_owned_rows(far, IDS, 8, 16, None, False)
    assert torch.equal(found[0, 1:3], far[:2])
    sums = sum_rows_by_key(far, torch.tensor([0, 1, 1, 2, 3, 3, 3, 3], dtype=torch.int32), 3)
    assert torch.equal(sums, torch.stack([far[0], far[1] + far[2], far[3]]))


def test_interpreted_gradients_are_the_same_every_time(on_kernels):
    # The interpreter cuts to bfloat16 where a GPU rounds (test_compiled_for_gpus): float16 it rounds.
    emb, ids, upstream = layers(torch.float16)[1], torch.randint(8, 16, (700,)), torch.randn(700, 5).half()
    first, second = (torch.autograd.grad(emb(ids), emb.weight, upstream)[0] for _ in range(2))
    assert torch.equal(bits(first), bits(second))
    exact = torch.zeros(8, 5, dtype=torch.float64).index_add_(0, ids - 8, upstream.double())
    # In float32, and rounded once: half of float16's last place, and a little for the float32 sums.
    torch.testing.assert_close(first.double(), exact, rtol=2**-11 * 1.01, atol=700 * 4 * 2**-24)


def test_interpreted_second_derivatives(on_kernels):
    emb = layers(torch.float64)[1]
    upstream = torch.randn(*IDS.shape, 5, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(emb(IDS), emb.weight, upstream, create_graph=True)
    (back,) = torch.autograd.grad(grad, upstream, emb.weight.detach())
    assert torch.equal(back, emb(IDS))


def test_interpreted_forward_mode_and_transforms_go_the_other_way(on_kernels):
    emb = layers()[1]
    tangent = torch.randn_like(emb.weight)
    with forward_ad.dual_level():
        dual = torch.func.functional_call(emb, {"weight": forward_ad.make_dual(emb.weight.detach(), tangent)}, (IDS,))
        found = forward_ad.unpack_dual(dual).tangent
    assert torch.equal(found[0, 1], tangent[0])


def test_interpreted_compiled_graphs_hold_the_sum_as_an_operator(on_kernels):
    emb = layers(torch.bfloat16)[1]
    out = torch.compile(emb, backend="aot_eager", fullgraph=True)(IDS)
    out.backward(torch.ones_like(out))
    assert "_sum_pieces" in on_kernels
    assert emb.weight.grad[:3, 0].tolist() == [3, 2, 1]


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


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", ["*i32", "*i64"])
def test_compiled_for_gpus(target, dtype, keys):
    from torch_impl.gpu import kernels

    words = f"*i{dtype.itemsize * 8}"
    number = {2: "*fp16" if dtype == torch.float16 else "*bf16", 4: "*fp32", 8: "*fp64"}[dtype.itemsize]
    wide = "*fp64" if dtype == torch.float64 else "*fp32"
    names = dict.fromkeys(["num_tokens", "num_rows", "emb_size", "row_stride", "not_counted"], "i32")
    names |= {"start": "i64", "stop": "i64", "ids_ptr": "*i64", "order_ptr": "*i64", "keys_ptr": keys}
    names |= {"weight_ptr": words, "output_ptr": words, "grad_ptr": number, "sums_ptr": number, "pieces_ptr": wide}
    block = kernels._block(4096, dtype.itemsize)
    take = binary(kernels._take, target, names, {"column_stride": 1, "WITH_KEYS": True, "BLOCK_T": 1, "BLOCK_E": block})
    sizes = {"WINDOW": kernels._WINDOW, "BLOCK_E": 256}
    add_up = {**sizes, "BLOCK_T": kernels._BLOCK_TOKENS, "column_stride": 1}
    sums = binary(kernels._sum_pieces, target, names, add_up)
    join = binary(kernels._join_pieces, target, names, sizes)
    if target[0] == "cuda":
        assert all("cubin" in each for each in (take, sums, join))
        wide_access = r"{}\.global\.v(4\.b32|2\.b64)"  # 16 bytes
        assert re.search(wide_access.format("ld"), take["ptx"])
        assert re.search(wide_access.format("st"), take["ptx"])
        narrow = {torch.bfloat16: "cvt.rn.bf16", torch.float16: "cvt.rn.f16"}  # to the nearest, ties to even
        assert narrow.get(dtype, "") in sums["ptx"]
        assert narrow.get(dtype, "") in join["ptx"]
        assert "atom" not in sums["ptx"] + join["ptx"]  # sums in a fixed order
    else:
        assert all("hsaco" in each for each in (take, sums, join))
        assert "global_load_dwordx4" in take["amdgcn"] or "buffer_load_dwordx4" in take["amdgcn"]
