"""The embedding itself, over real gloo processes: every reduction by every exchange, against the unsharded lookup."""

import copy
import itertools
import pickle
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch_layers import (
    DTYPES,
    MODES,
    assert_compiled_is_the_same,
    assert_refused,
    equal_bits,
    mesh_of,
    on_ranks,
    ranks_of,
    set_rows,
    tensor_of,
    whole_table,
)

from shared import VocabPartition
from shared.proof.generate import exact_gradient, zipf_ids
from shared.proof.oracle import partial_lookup, weight_grad
from torch_impl import ParallelVocabEmbedding, exchange, reduced_lookup

ALL_TO_ALL = [("all_to_all", "dense"), ("all_to_all", "routed")]
OWN_SHAPES = {  # of the ids that each rank has of its own
    "equal": [(2, 5)] * 4,
    "unequal": [(7,), (2, 3), (), (1, 1, 4)],
    "some empty": [(0,), (5,), (3, 0), (2,)],
    "all empty": [(0,)] * 4,
}
LOPSIDED = {
    "one id": np.zeros((2, 8), np.int64),
    "all on the last rank": np.full((8,), 11),
    "some ranks own none": np.arange(3, 6).repeat(8),
    "all invalid": np.full((2, 4), -1),
    "one valid": np.array([[5, 12, -7, 2**40]]),
    "no tokens": np.empty((3, 0), np.int64),
    "no batch": np.empty((0, 8), np.int64),
    "three dimensions of bytes": np.arange(16, dtype=np.uint8).reshape(2, 2, 4),
    "many duplicates": np.arange(64, dtype=np.int32).reshape(8, 8) % 12,
}


def layer(reduction="all_reduce", exchange="auto", group=None, **options):
    sizes = [options.pop(name, default) for name, default in (("vocab_size", 48), ("emb_size", 4))]
    options |= {"reduction": reduction, "exchange": exchange, "process_group": group or dist.group.WORLD}
    return ParallelVocabEmbedding(*sizes, **options)


def own_ids(shapes, vocab_size):
    """Ids for each rank; some are outside the vocabulary, some occur on several ranks."""
    rng = np.random.default_rng(0)
    return [rng.integers(-2, vocab_size + 3, shape) for shape in shapes]


def chunk_of(tensor, emb):
    if emb.reduction != "reduce_scatter":
        return tensor
    return tensor.tensor_split(emb.world_size, dim=emb.seq_dim if emb.seq_dim >= 0 else emb.seq_dim - 1)[emb.rank]


def table_of(vocab_size, emb_size, dtype):
    table = np.random.default_rng(vocab_size).standard_normal((vocab_size, emb_size)).astype(DTYPES[dtype])
    if vocab_size > 4:
        table[1], table[vocab_size // 2], table[-1] = np.nan, -0.0, -np.inf
    return table


def check_case(name, ids, vocab_size=12, emb_size=5, dtype=torch.float32, padded=None, padding_idx=None, **options):
    """Every rank: values and gradients by all reductions and exchanges, in every bit those of the oracle.

    A list holds each rank's own ids.
    """
    rank, table = dist.get_rank(), table_of(vocab_size, emb_size, dtype)
    partition = VocabPartition(vocab_size, dist.get_world_size(), padded)
    start, stop = partition.owned_range(rank)
    everyones = ids if isinstance(ids, list) else [ids]
    batch, ids = np.concatenate([each.reshape(-1) for each in everyones]), everyones[rank % len(everyones)]
    first = sum(each.size for each in everyones[:rank]) if len(everyones) > 1 else 0
    whole = tensor_of(partial_lookup(table, ids, VocabPartition(vocab_size, 1), 0))
    upstream = exact_gradient(batch, emb_size, DTYPES[dtype], 0)
    gradient = tensor_of(weight_grad(upstream, batch, partition, rank, padding_idx))
    upstream = tensor_of(upstream[first : first + ids.size]).view(whole.shape)
    options |= {"dtype": dtype, "padded_vocab_size": padded, "padding_idx": padding_idx}
    for mode in MODES if len(everyones) == 1 else ALL_TO_ALL:
        emb = set_rows(layer(*mode, vocab_size=vocab_size, emb_size=emb_size, **options), table)
        given = torch.from_numpy(ids.copy())
        output = emb(given)
        assert equal_bits(output, chunk_of(whole, emb)), (name, mode)
        output.backward(chunk_of(upstream, emb))
        grad = emb.weight.grad
        assert grad.is_sparse == emb.config.sparse
        assert not grad.is_sparse or grad._nnz() == len({*batch[(batch >= start) & (batch < stop)]} - {padding_idx})
        assert equal_bits(grad.to_dense(), gradient), (name, mode)
        assert np.array_equal(given.numpy(), ids), (name, mode)


@on_ranks(4)
def test_every_exchange_gives_the_bits_of_the_unsharded_lookup():
    ids = zipf_ids((3, 16), VocabPartition(48, dist.get_world_size()), 0)
    for dtype in DTYPES:
        check_case(str(dtype), ids, 48, 6, dtype)
        check_case(f"sparse {dtype}", ids, 48, dtype=dtype, sparse=True)
    check_case("fused", ids, 48, gradient_accumulation_fusion=True)
    for padding_idx in (0, 17, 47):
        check_case(f"padding_idx={padding_idx}", ids, 48, padding_idx=padding_idx)
    ids = zipf_ids((8, 4, 2), VocabPartition(64, 4), 1)
    for seq_dim in (0, 1, -3):
        check_case(f"seq_dim={seq_dim}", ids, 64, seq_dim=seq_dim)
    ids = np.random.default_rng(1).integers(-3, 19, (6, 8))  # of 16 rows the last rank has padding alone
    check_case("padding", ids, 9, padded=16)
    check_case("padding", ids, 9, dtype=torch.bfloat16, padded=16, check=True)
    ids = np.random.default_rng(0).permutation(1100).reshape(4, -1) - 2
    check_case("rows in huge pages", ids[:, :256], 1096, 1100)


@on_ranks(4)
def test_lopsided_ids():
    for name, ids in LOPSIDED.items():
        check_case(name, ids)
        check_case(name, ids, emb_size=3, dtype=torch.bfloat16)
    check_case("one row a rank", np.array([0, 3, 3, 0]), 4)


@on_ranks(4)
def test_each_rank_its_own_ids():
    for (name, shapes), dtype, sparse in itertools.product(OWN_SHAPES.items(), (torch.float32, torch.bfloat16), (0, 1)):
        padding_idx = 5 if name == "unequal" else None
        check_case(name, own_ids(shapes, 21), 21, 6, dtype, "even", padding_idx, sparse=bool(sparse))


@on_ranks(4)
def test_gradients_are_accumulated_in_float32_and_do_not_show_the_exchange():
    torch.manual_seed(0)
    ids = torch.randint(0, 48, (4, 64))
    for reduction, dtype in itertools.product(("all_reduce", "reduce_scatter"), DTYPES):
        upstream, gradients = torch.randn(4, 64, 4).to(dtype), []
        for how in ("dense", "routed"):
            emb = layer(reduction, how, dtype=dtype)
            emb(ids).backward(chunk_of(upstream, emb))
            gradients.append(emb.weight.grad)
        assert equal_bits(*gradients), (reduction, dtype)
    ids = torch.full((2, 2500), 7)  # 5000 gradients of 1, on four chunks
    for mode, dtype in itertools.product(MODES, (torch.bfloat16, torch.float16)):
        emb = layer(*mode, dtype=dtype)
        output = emb(ids)
        output.backward(torch.ones_like(output))
        if emb.partition.owns(7, emb.rank):
            assert (emb.weight.grad[7] == torch.tensor(5000.0).to(dtype)).all(), (mode, dtype)


@on_ranks(4)
def test_rank_and_world_size_come_from_groups_and_device_meshes():
    """Sub-groups of the world, and the group of a DeviceMesh dimension; two groups at work at once."""
    rank, mesh = dist.get_rank(), mesh_of(2, 2)
    pairs, table = [dist.new_group([0, 2]), dist.new_group([1, 3])], whole_table(ranks_of(48, 4, 2))
    for group, member in (
        (pairs[rank % 2], rank // 2),
        (mesh.get_group("tp"), rank % 2),
        (mesh.get_group("dp"), rank // 2),
    ):
        for mode in MODES:
            emb = layer(*mode, group)
            assert (emb.rank, emb.world_size, emb.weight.shape) == (member, 2, (24, 4))
            ids = (torch.arange(16) * 7 + rank // 2 * (group is mesh.get_group("tp"))).view(2, 8) % 48
            assert equal_bits(emb(ids), chunk_of(table[ids], emb)), mode
    assert layer(rank=rank, world_size=4).rank == rank
    assert_refused(
        (TypeError, "member of", lambda: layer(group=pairs[1 - rank % 2])),
        (ValueError, "rank must agree with process_group", lambda: layer(rank=(rank + 1) % 4)),
        (ValueError, "got world_size=2, the group says 4", lambda: layer(world_size=2)),
    )


@on_ranks(2)
def test_second_derivatives():
    ids, double = torch.arange(16).view(2, 8) * 3 % 48, {"dtype": torch.float64}
    for mode in [*MODES, *ALL_TO_ALL]:
        for padding_idx in (None, 3):
            emb = layer(*mode, padding_idx=padding_idx, **double)
            output = emb(ids)
            upstream = torch.ones_like(output, requires_grad=True)
            (gradient,) = torch.autograd.grad(output, emb.weight, upstream, create_graph=True)
            # The gradient is linear in upstream: its derivative along the table is the lookup again.
            (second,) = torch.autograd.grad(gradient, upstream, emb.weight.detach() + 1)
            without = chunk_of(ids.unsqueeze(-1), emb) == (-1 if padding_idx is None else padding_idx)
            assert equal_bits(second, (output + 1).masked_fill(without, 0)), mode
        sparse = layer(*mode, sparse=True, **double)
        with pytest.raises(ValueError, match="sparse must be False where gradients of a reduction"):
            torch.autograd.grad(sparse(ids), sparse.weight, upstream, create_graph=True)
        dist.barrier()


@on_ranks(2)
def test_ids_written_over_one_id_and_the_meta_device():
    """Ids may be written over before backward, as in a static input buffer."""
    table = whole_table(ranks_of(48, 4, 2))
    for mode, seq_dim in itertools.product(MODES, (0, 1)):
        emb, ids = layer(*mode, seq_dim=seq_dim), torch.arange(16).view(2, 8) * 3 % 48
        output = emb(ids).sum()
        (expected,) = torch.autograd.grad(output, emb.weight, retain_graph=True)
        ids.fill_(7)
        output.backward()
        assert equal_bits(emb.weight.grad, expected), ("written over", mode, seq_dim)
    for how, number in itertools.product(("dense", "routed"), (0, 29, 47, 48, -1)):
        expected = table[number] if 0 <= number < 48 else torch.zeros(4)
        assert equal_bits(layer("all_reduce", how)(torch.tensor(number)), expected), ("one id", how, number)
    for reduction in ("all_reduce", "reduce_scatter")[dist.get_rank() :]:  # nothing is sent: rank 1 leaves one out
        emb = layer(reduction, device="meta")
        output = emb(torch.zeros(2, 8, dtype=torch.int64, device="meta"))
        sequence = 8 if reduction == "all_reduce" else 4
        assert (output.shape, output.device.type) == ((2, sequence, 4), "meta")
        output.sum().backward()
        assert emb.weight.grad.shape == emb.weight.shape


@on_ranks(2)
def test_bad_arguments_are_refused_on_every_rank_before_anything_is_sent():
    ids, whole = torch.arange(10).view(2, 5), (torch.zeros(48, 2), torch.arange(10), VocabPartition(48, 1))
    scattered, reduced = partial(layer, "reduce_scatter"), partial(reduced_lookup, reduction="all_reduce")
    uneven = r"ids of shape \(2, 5\) have 5 positions along dimension 1, which leaves 1 over"
    no_dimension = r"seq_dim must name a dimension of the ids, in \[-2, 2\), got seq_dim=2"
    strict, own = layer(invalid_ids="error"), layer("all_to_all", invalid_ids="error")
    bad_on_rank_1 = torch.tensor([[1, 2], [3, 48 if dist.get_rank() == 1 else 4]])
    assert_refused(
        (ValueError, uneven, lambda: scattered()(ids)),
        (ValueError, no_dimension, lambda: scattered(seq_dim=2)(ids)),
        (ValueError, "seq_dim must name a dimension", lambda: scattered()(torch.tensor(3))),
        (IndexError, r"ids\[0, 1\] = 48 is outside the vocabulary", lambda: strict(torch.tensor([[3, 48]]))),
        (IndexError, r"rank 1 passed, flattened: ids\[3\] = 48 is outside", lambda: own(bad_on_rank_1)),
        (TypeError, "integer dtype", lambda: layer()(torch.tensor([1.0]))),
        (ValueError, "world_size must agree with process_group", lambda: reduced(*whole, dist.group.WORLD)),
    )


@on_ranks(2)
def test_copies_and_pickles_find_the_group_by_its_name():
    emb, ids = layer("reduce_scatter", "routed"), torch.arange(16).view(2, 8)
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


@on_ranks(2)
def test_own_ids_compiled():
    ids = own_ids([(7,), (2, 3)], 48)[dist.get_rank()]
    assert_compiled_is_the_same(layer("all_to_all"), torch.from_numpy(ids), backend="aot_eager")


@on_ranks(2)
def test_each_distinct_row_of_own_ids_travels_once():
    """Two ids occur on both ranks, and each rank owns one; backward returns one sum to each owner."""
    with (
        mock.patch.object(exchange, "all_gather", wraps=exchange.all_gather) as gather,
        mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as send,
    ):
        layer("all_to_all", "routed")(torch.tensor([0, 0, 0, 47, 47])).sum().backward()
    assert gather.call_count == 4  # of numbers of ids and of ids, forward and backward
    assert [len(call.args[1]) for call in send.call_args_list] == [2, 2]


@pytest.mark.parametrize("reduction", ["all_reduce", "reduce_scatter"])
def test_one_rank_needs_no_group_and_several_do(reduction):
    emb = ParallelVocabEmbedding(48, 4, reduction=reduction)
    output = emb(torch.tensor([[5, 47, 48], [0, 5, -1]]))
    assert torch.equal(output[0, :2], emb.weight[[5, 47]])
    assert not output[0, 2].any()
    output.sum().backward()
    assert emb.weight.grad[5].tolist() == [2.0] * 4
    build = partial(ParallelVocabEmbedding, 48, 4, reduction=reduction)
    no_group = f"process_group must be given for reduction='{reduction}' with world_size=4"
    choices = "exchange must be 'auto' or 'dense' or 'routed', got 'p2p'"
    assert_refused(
        (ValueError, no_group, lambda: build(rank=0, world_size=4)),
        (ValueError, choices, lambda: build(exchange="p2p")),
        (TypeError, "seq_dim must be an integer", lambda: build(seq_dim=None)),
    )


def test_auto_is_routed_on_cpus_and_dense_on_accelerators():
    choose = exchange.choose_exchange
    assert [choose("auto", device) for device in ("cpu", "cuda", "xpu")] == ["routed", "dense", "dense"]
    assert (choose("routed", "cuda"), choose("dense", "cpu")) == ("routed", "dense")
