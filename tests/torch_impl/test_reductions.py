"""The embedding itself, over real gloo processes: every reduction by every exchange, against the unsharded lookup."""

import copy
import itertools
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.distributed as dist

from shared import VocabPartition
from shared.proof.generate import exact_gradient, zipf_ids
from shared.proof.oracle import partial_lookup, weight_grad
from torch_impl import ParallelVocabEmbedding, reduced_lookup
from torch_impl.exchange import choose_exchange

REDUCTIONS, EXCHANGES = ["all_reduce", "reduce_scatter"], ["dense", "routed", "auto"]
DTYPES = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
}


def tensor_of(array):
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array.view(np.uint8)).view(next(t for t, d in DTYPES.items() if d == array.dtype)).clone()


def equal_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and bytes_of(a) == bytes_of(b)


def bytes_of(tensor):
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def chunk_of(tensor, reduction, seq_dim, rank, world_size):
    if reduction == "all_reduce":
        return tensor
    return tensor.tensor_split(world_size, dim=seq_dim if seq_dim >= 0 else seq_dim - 1)[rank]


def table_of(vocab_size, emb_size, dtype):
    rng = np.random.default_rng(vocab_size)
    table = rng.standard_normal((vocab_size, emb_size)).astype(DTYPES[dtype])
    if vocab_size > 4:
        table[1], table[vocab_size // 2], table[-1] = np.nan, -0.0, -np.inf
    return table


def check_case(ids, vocab_size, emb_size, dtype, seq_dim=-1, padding_idx=None):
    """Every rank: values and gradients by all reductions and exchanges, in every bit those of the oracle."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    partition, table = VocabPartition(vocab_size, world_size), table_of(vocab_size, emb_size, dtype)
    whole = tensor_of(partial_lookup(table, ids, VocabPartition(vocab_size, 1), 0))
    upstream = exact_gradient(ids, emb_size, DTYPES[dtype], 0)
    gradient = tensor_of(weight_grad(upstream, ids, partition, rank, padding_idx))
    untouched = ids.copy()
    for reduction, exchange in itertools.product(REDUCTIONS, EXCHANGES):
        emb = ParallelVocabEmbedding(
            vocab_size,
            emb_size,
            process_group=dist.group.WORLD,
            dtype=dtype,
            reduction=reduction,
            exchange=exchange,
            seq_dim=seq_dim,
            padding_idx=padding_idx,
        )
        emb.load_state_dict({"weight": tensor_of(np.split(table, world_size)[rank])})
        given = torch.from_numpy(ids)
        output = emb(given)
        expected = chunk_of(whole, reduction, seq_dim, rank, world_size)
        assert equal_bits(output, expected), (reduction, exchange)
        output.backward(chunk_of(tensor_of(upstream), reduction, seq_dim, rank, world_size))
        assert equal_bits(emb.weight.grad, gradient), (reduction, exchange)
        assert np.array_equal(given.numpy(), untouched)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_exchange_gives_the_bits_of_the_unsharded_lookup(world, world_size, dtype):
    ids = zipf_ids((3, 16), VocabPartition(48, world_size), 0)
    world(world_size)(check_case, ids, 48, 6, dtype)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    ("ids", "vocab_size"),
    [
        (np.zeros((2, 8), np.int64), 12),
        (np.full((8,), 11), 12),
        (np.arange(8).reshape(1, 8) % 3, 12),
        (np.arange(3, 6).repeat(8), 12),
        (np.full((2, 4), -1), 12),
        (np.array([[5, 12, -7, 2**40]]), 12),
        (np.array([0, 3, 3, 0]), 4),
        (np.empty((3, 0), np.int64), 12),
        (np.empty((0, 8), np.int64), 12),
        (np.arange(16, dtype=np.uint8).reshape(2, 2, 4), 12),
        (np.arange(64, dtype=np.int32).reshape(8, 8) % 12, 12),
    ],
    ids=[
        "one id",
        "all on the last rank",
        "all on the first ranks",
        "some ranks own none",
        "all invalid",
        "one valid",
        "one row a rank",
        "no tokens",
        "no batch",
        "three dimensions of bytes",
        "many duplicates",
    ],
)
def test_lopsided_ids(world, world_size, ids, vocab_size):
    world(world_size)(check_case, ids, vocab_size, 5, torch.float32)
    world(world_size)(check_case, ids, vocab_size, 3, torch.bfloat16)


def test_the_sequence_may_be_any_dimension(world):
    ids = zipf_ids((8, 4, 2), VocabPartition(64, 4), 1)
    world(4)(check_case, ids, 64, 4, torch.float32, 0)
    world(4)(check_case, ids, 64, 4, torch.float32, 1)
    world(4)(check_case, ids, 64, 4, torch.float32, -3)


@pytest.mark.parametrize("padding_idx", [0, 17, 47])
def test_padding_idx_gets_no_gradient(world, padding_idx):
    ids = zipf_ids((4, 32), VocabPartition(48, 4), 2)
    world(4)(check_case, ids, 48, 4, torch.float32, -1, padding_idx)


def layer(reduction="all_reduce", exchange="auto", group=None, **options):
    return ParallelVocabEmbedding(
        options.pop("vocab_size", 48),
        options.pop("emb_size", 4),
        process_group=group or dist.group.WORLD,
        reduction=reduction,
        exchange=exchange,
        **options,
    )


def check_rounding(dtype):
    """Inexact sums: the exchanges agree in every bit, and with the exact sum within what the dtype's rounding allows."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    ids = torch.randint(0, 48, (4, 64))
    upstream = torch.randn(4, 64, 4).to(dtype)
    exact = torch.zeros(48, 4, dtype=torch.float64).index_add_(0, ids.flatten(), upstream.double().view(-1, 4))
    exact = exact.chunk(world_size)[rank]
    for reduction in REDUCTIONS:
        gradients = []
        for exchange in ("dense", "routed"):
            emb = layer(reduction, exchange, dtype=dtype)
            emb(ids).backward(chunk_of(upstream, reduction, -1, rank, world_size))
            gradients.append(emb.weight.grad)
        assert equal_bits(*gradients)
        # n summands are off by at most n roundings of the accumulator, and one of the table's dtype.
        accumulator = torch.float32 if dtype.itemsize < 4 else dtype
        most = int(ids.flatten().bincount().max())
        bound = most * torch.finfo(accumulator).eps * upstream.abs().double().sum() / 10
        bound = bound + exact.abs() * torch.finfo(dtype).eps
        assert ((gradients[0].double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_exchange_does_not_show_in_rounding(world, dtype):
    world(4)(check_rounding, dtype)


def check_accumulation(dtype):
    """5000 equal ids of gradient 1, on four chunks: counted in float32, rounded once."""
    ids = torch.full((2, 2500), 7)
    for reduction, exchange in itertools.product(REDUCTIONS, ("dense", "routed")):
        emb = layer(reduction, exchange, dtype=dtype)
        output = emb(ids)
        output.backward(torch.ones_like(output))
        if emb.partition.owns(7, emb.rank):
            assert (emb.weight.grad[7] == torch.tensor(5000.0).to(dtype)).all()


def test_16_bit_gradients_do_not_saturate(world):
    world(4)(check_accumulation, torch.bfloat16)
    world(4)(check_accumulation, torch.float16)


def check_groups():
    """Sub-groups of the world, and the group of a DeviceMesh dimension; two groups at work at once."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for group in (pairs[rank % 2], mesh.get_group("tp"), mesh.get_group("dp")):
        for reduction, exchange in itertools.product(REDUCTIONS, EXCHANGES):
            emb = layer(reduction, exchange, group)
            table = torch.cat([ParallelVocabEmbedding(48, 4, r, 2).weight.detach() for r in range(2)])
            ids = (torch.arange(16) * 7 + rank // 2 * (group is mesh.get_group("tp"))).view(2, 8) % 48
            ids = ids if group is not mesh.get_group("dp") else torch.arange(16).view(2, 8)
            expected = table[ids]
            assert equal_bits(emb(ids), chunk_of(expected, reduction, -1, emb.rank, 2))


def test_sub_groups_and_device_meshes(world):
    world(4)(check_groups)


def check_derivatives():
    """Second derivatives go through the exchange too."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ids = torch.arange(16).view(2, 8) * 3 % 48
    for reduction, exchange in itertools.product(REDUCTIONS, ("dense", "routed")):
        emb = layer(reduction, exchange, dtype=torch.float64)
        output = emb(ids)
        upstream = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        if reduction == "all_reduce":
            dist.broadcast(upstream, 0)
        upstream.requires_grad_()
        (gradient,) = torch.autograd.grad(output, emb.weight, upstream, create_graph=True)
        # The gradient is linear in upstream: its derivative along the table is the lookup again.
        (second,) = torch.autograd.grad(gradient, upstream, emb.weight.detach())
        assert equal_bits(second, output)
        plain = layer(reduction, exchange, dtype=torch.float64, padding_idx=3)
        (gradient,) = torch.autograd.grad(plain(ids), plain.weight, upstream, create_graph=True)
        (second,) = torch.autograd.grad(gradient, upstream, plain.weight.detach() + 1)
        mine = ids if reduction == "all_reduce" else ids.chunk(world_size, 1)[rank]
        assert not second[mine == 3].any()
        assert second[mine != 3].all()
        sparse = layer(reduction, exchange, dtype=torch.float64, sparse=True)
        with pytest.raises(ValueError, match="sparse must be False where gradients of a reduction"):
            torch.autograd.grad(sparse(ids), sparse.weight, upstream, create_graph=True)
        dist.barrier()
        assert output.shape[1] == (8 if reduction == "all_reduce" else 8 // world_size)


def test_second_derivatives(world):
    world(2)(check_derivatives)


def check_sparse(dtype):
    ids = torch.tensor([[3, 3, 40, 3, 5, 47, 0, 3]])
    for reduction, exchange in itertools.product(REDUCTIONS, ("dense", "routed")):
        dense, sparse = layer(reduction, exchange, dtype=dtype), layer(reduction, exchange, dtype=dtype, sparse=True)
        for emb in (dense, sparse):
            output = emb(ids)
            output.backward(torch.ones_like(output))
        assert sparse.weight.grad.is_sparse
        assert sparse.weight.grad._nnz() == int((dense.weight.grad != 0).any(1).sum())
        assert equal_bits(sparse.weight.grad.to_dense(), dense.weight.grad)


def test_sparse_gradients(world):
    world(4)(check_sparse, torch.float32)
    world(4)(check_sparse, torch.bfloat16)


def check_reused_buffer():
    """Ids that are written over before backward, as in loops with a static input buffer, do not change the gradient."""
    for reduction, exchange, seq_dim in itertools.product(REDUCTIONS, ("dense", "routed"), (0, 1)):
        gradients = []
        for overwrite in (False, True):
            emb = layer(reduction, exchange, seq_dim=seq_dim)
            ids = torch.arange(16).view(2, 8) * 3 % 48
            output = emb(ids)
            if overwrite:
                ids.fill_(7)
            output.backward(torch.ones_like(output))
            gradients.append(emb.weight.grad)
        assert equal_bits(*gradients), (reduction, exchange)


def test_ids_that_are_written_over(world):
    world(2)(check_reused_buffer)


def check_one_id():
    """A single id without dimensions."""
    for exchange in EXCHANGES:
        emb = layer("all_reduce", exchange, emb_size=3)
        table = torch.cat(
            [ParallelVocabEmbedding(48, 3, r, emb.world_size).weight.detach() for r in range(emb.world_size)]
        )
        for number in (0, 29, 47, 48, -1):
            output = emb(torch.tensor(number))
            assert equal_bits(output, table[number] if 0 <= number < 48 else torch.zeros(3))


def test_one_id(world):
    world(2)(check_one_id)


def check_errors():
    """What is refused, is refused on every rank, before anything is sent."""
    world_size = dist.get_world_size()
    ids = torch.arange(10).view(2, 5)
    with pytest.raises(
        ValueError, match=r"ids of shape \(2, 5\) have 5 positions along dimension 1, which leaves 1 over"
    ):
        layer("reduce_scatter")(ids)
    with pytest.raises(ValueError, match=r"seq_dim must name a dimension of the ids, in \[-2, 2\), got seq_dim=2"):
        layer("reduce_scatter", seq_dim=2)(ids)
    with pytest.raises(ValueError, match="seq_dim must name a dimension"):
        layer("reduce_scatter")(torch.tensor(3))
    with pytest.raises(IndexError, match=r"ids\[0, 1\] = 48 is outside the vocabulary"):
        layer("all_reduce", invalid_ids="error")(torch.tensor([[3, 48]]))
    with pytest.raises(TypeError, match="integer dtype"):
        layer("all_reduce")(torch.tensor([1.0]))
    with pytest.raises(ValueError, match="world_size must agree with process_group"):
        layer("all_reduce", world_size=world_size + 2)
    with pytest.raises(ValueError, match="rank must agree with process_group"):
        layer("all_reduce", rank=(dist.get_rank() + 1) % world_size)
    with pytest.raises(ValueError, match="world_size must agree with process_group"):
        reduced_lookup(torch.zeros(48, 2), ids, VocabPartition(48, 1), dist.group.WORLD, reduction="all_reduce")


def test_bad_arguments(world):
    world(2)(check_errors)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_reduction_needs_a_group(reduction):
    with pytest.raises(ValueError, match=f"process_group must be given for reduction='{reduction}' with world_size=4"):
        ParallelVocabEmbedding(48, 4, 0, 4, reduction=reduction)
    with pytest.raises(ValueError, match="exchange must be 'auto' or 'dense' or 'routed', got 'p2p'"):
        ParallelVocabEmbedding(48, 4, reduction=reduction, exchange="p2p")
    with pytest.raises(TypeError, match="seq_dim must be an integer"):
        ParallelVocabEmbedding(48, 4, reduction=reduction, seq_dim=None)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_one_rank_needs_no_group(reduction, exchange):
    emb = ParallelVocabEmbedding(48, 4, reduction=reduction, exchange=exchange)
    ids = torch.tensor([[5, 47, 48], [0, 5, -1]])
    output = emb(ids)
    assert torch.equal(output[0, :2], emb.weight[[5, 47]])
    assert not output[0, 2].any()
    output.sum().backward()
    assert emb.weight.grad[5].tolist() == [2.0] * 4
    assert pickle.loads(pickle.dumps(emb)).reduction == reduction


def check_copies():
    """Modules with a group can be copied and pickled; a copy finds the group by its name."""
    emb = layer("reduce_scatter", "routed")
    ids = torch.arange(16).view(2, 8)
    expected = emb(ids)
    for other in (copy.deepcopy(emb), pickle.loads(pickle.dumps(emb))):
        assert equal_bits(other(ids), expected)
    group = dist.new_group(list(range(dist.get_world_size())))
    emb = layer("all_reduce", "dense", group)
    dist.barrier(group)
    dist.barrier()
    dist.destroy_process_group(group)
    with pytest.raises(RuntimeError, match="does not exist in this process"):
        emb(ids)


def test_copies_and_pickles(world):
    world(2)(check_copies)


def check_meta():
    """Shapes alone, without storage and without communication."""
    for reduction, rank_0_only in itertools.product(REDUCTIONS, (True, False)):
        if rank_0_only and dist.get_rank():
            continue
        emb = layer(reduction, device="meta")
        output = emb(torch.zeros(2, 8, dtype=torch.int64, device="meta"))
        sequence = 8 if reduction == "all_reduce" else 8 // dist.get_world_size()
        assert (output.shape, output.device.type) == ((2, sequence, 4), "meta")
        output.sum().backward()
        assert emb.weight.grad.shape == emb.weight.shape


def test_on_the_meta_device(world):
    world(2)(check_meta)


def test_auto_is_routed_on_cpus_and_dense_on_accelerators():
    assert choose_exchange("auto", "cpu") == "routed"
    assert choose_exchange("auto", "cuda") == choose_exchange("auto", "xpu") == "dense"
    assert choose_exchange("routed", "cuda") == "routed"
    assert choose_exchange("dense", "cpu") == "dense"


@pytest.mark.slow
@pytest.mark.parametrize("repeated", [1, 2])
def test_auto_on_a_large_batch(world, repeated):
    ids = np.random.default_rng(0).permutation(4100)[: 2048 // repeated] - 2
    world(2)(check_case, np.tile(ids, repeated).reshape(4, 512), 4096, 4096, torch.float32)


def test_auto_on_a_batch_of_some_size(world):
    ids = np.random.default_rng(0).integers(-2, 4098, (4, 256))
    world(4)(check_case, ids, 4096, 512, torch.float32)
