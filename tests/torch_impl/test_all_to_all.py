"""Each rank its own ids, over real gloo processes: values and gradients of the concatenated batch, bit for bit."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.distributed as dist

from shared import VocabPartition
from shared.proof.generate import exact_gradient
from shared.proof.oracle import weight_grad
from torch_impl import ParallelVocabEmbedding, reduced_lookup

VOCAB, EMB = 21, 6
SHAPES = {
    "equal": [(2, 5)] * 4,
    "unequal": [(7,), (2, 3), (), (1, 1, 4)],
    "some empty": [(0,), (5,), (3, 0), (2,)],
    "all empty": [(0,)] * 4,
}
DTYPES = {torch.float32: np.float32, torch.bfloat16: ml_dtypes.bfloat16}


def tensor_of(array):
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array.view(np.uint8)).view(next(t for t, d in DTYPES.items() if d == array.dtype)).clone()


def equal_bits(a, b):
    same = (a.shape, a.dtype) == (b.shape, b.dtype)
    return same and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def all_ids(shapes, seed=0):
    """Each rank's ids; some are outside the vocabulary, some occur on several ranks."""
    rng = np.random.default_rng(seed)
    return [rng.integers(-2, VOCAB + 3, shape) for shape in shapes]


def layer(table, exchange, **options):
    group, dtype = dist.group.WORLD, next(t for t, d in DTYPES.items() if d == table.dtype)
    emb = ParallelVocabEmbedding(
        VOCAB,
        EMB,
        process_group=group,
        dtype=dtype,
        reduction="all_to_all",
        exchange=exchange,
        padded_vocab_size="even",
        **options,
    )
    start, stop = emb.partition.owned_range(emb.rank)
    with torch.no_grad():
        emb.weight[: stop - start] = tensor_of(table[start:stop])
    return emb


def table_of(dtype):
    table = np.random.default_rng(1).standard_normal((VOCAB, EMB)).astype(dtype)
    table[3], table[9], table[20] = np.nan, -0.0, np.inf
    return table


def check(shapes, dtype, padding_idx=None):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    table, everyones = table_of(DTYPES[dtype]), all_ids(shapes[:world_size])
    batch = np.concatenate([ids.reshape(-1) for ids in everyones])
    upstream = exact_gradient(batch, EMB, DTYPES[dtype], 0)
    first = sum(ids.size for ids in everyones[:rank])
    ids, mine = everyones[rank], upstream[first : first + everyones[rank].size]
    partition = VocabPartition(VOCAB, world_size, "even")
    gradient = tensor_of(weight_grad(upstream, batch, partition, rank, padding_idx))
    valid = (ids >= 0) & (ids < VOCAB)
    rows = np.where(valid[..., None], table[np.where(valid, ids, 0)], np.zeros(EMB, table.dtype))
    for exchange, own in itertools.product(("dense", "routed", "auto"), (False, True)):
        emb = layer(table, exchange, padding_idx=padding_idx, sparse=own)
        output = emb(torch.from_numpy(ids))
        assert equal_bits(output.detach(), tensor_of(rows)), exchange
        output.backward(tensor_of(mine).view(output.shape))
        grad = emb.weight.grad.to_dense() if own else emb.weight.grad
        assert equal_bits(grad, gradient), exchange


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_rows_and_gradients_of_the_concatenated_batch(world, world_size, shapes, dtype):
    world(world_size)(check, SHAPES[shapes], dtype, 5 if shapes == "unequal" else None)


def invalid_ids():
    rank = dist.get_rank()
    emb = layer(table_of(np.float32), "auto", invalid_ids="error")
    ids = torch.tensor([[1, 2], [3, VOCAB if rank == 1 else 4]])
    try:
        emb(ids)
    except IndexError as error:
        return str(error)
    return emb(torch.tensor([3])).sum().item()


def test_invalid_id_of_one_rank_raises_on_every_rank(world):
    for message in world(2)(invalid_ids):
        assert "of the ids that rank 1 passed, flattened: " in message
        assert "[3]" in message
        assert "21" in message


def composed():
    """Compiled, checkpointed, differentiated twice, checked, on one of two groups, beside the rest of a DDP model."""
    rank = dist.get_rank()
    table = table_of(np.float32)
    table[~np.isfinite(table)] = 1
    ids = torch.from_numpy(all_ids(SHAPES["unequal"])[rank])
    plain = layer(table, "routed")
    expected = plain(ids)
    expected.square().sum().backward()
    compiled = torch.compile(layer(table, "routed"), fullgraph=True, backend="aot_eager")
    output = compiled(ids)
    output.square().sum().backward()
    assert equal_bits(output.detach(), expected.detach())
    assert equal_bits(compiled.weight.grad, plain.weight.grad)
    checked = layer(table, "dense", check=True)
    assert equal_bits(checked(ids).detach(), expected.detach())
    weight = plain.weight.detach().requires_grad_()
    found = reduced_lookup(weight, ids, plain.partition, dist.group.WORLD, reduction="all_to_all")
    (first,) = torch.autograd.grad(found.square().sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    counts = np.zeros(VOCAB + 3)
    np.add.at(counts, np.concatenate([each.reshape(-1) for each in all_ids(SHAPES["unequal"][:2])]).clip(-1), 1)
    start, stop = plain.partition.owned_range(rank)
    assert torch.equal(second[: stop - start, 0], torch.from_numpy(2 * counts[start:stop]).float())


def test_transforms_and_checks(world):
    world(2)(composed)


def counted():
    """The collectives of a forward and a backward, and the bytes of rows that this rank sends."""
    calls, sent = [], []
    names = ("all_gather_into_tensor", "all_gather_single", "all_to_all_single", "reduce_scatter_tensor")
    originals = {name: getattr(dist, name) for name in names if hasattr(dist, name)}
    from torch_impl import exchange

    def counting(name, call):
        def counted(*args, **kwargs):
            calls.append(name)
            if name == "all_to_all_single":
                sent.append(args[1].shape[0])
            return call(*args, **kwargs)

        return counted

    gather = exchange.all_gather
    exchange.all_gather = counting("all_gather", gather)
    dist.all_to_all_single = counting("all_to_all_single", originals["all_to_all_single"])
    try:
        emb = layer(np.zeros((VOCAB, EMB), np.float32), "routed")
        emb(torch.tensor([0, 0, 0, 20, 20])).sum().backward()
    finally:
        exchange.all_gather, dist.all_to_all_single = gather, originals["all_to_all_single"]
    return calls, sent


def test_each_distinct_row_travels_once(world):
    for rank, (calls, sent) in enumerate(world(2)(counted)):
        assert calls == ["all_gather", "all_gather", "all_to_all_single"] * 2
        # Each rank owns one of the two distinct ids, which both ranks ask for; backward returns one sum to each owner.
        assert sent == [2, 2], rank


def own_group():
    model = torch.nn.Sequential(layer(table_of(np.float32), "auto"), torch.nn.Linear(EMB, 2))
    names = [name for name, _ in model.named_parameters() if name.startswith("0.")]
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    before = model[0].weight.detach().clone()
    rank = dist.get_rank()
    parallel(torch.tensor([rank, 20 - rank])).sum().backward()
    assert equal_bits(model[0].weight.detach(), before)
    grads = [torch.empty_like(model[1].weight.grad) for _ in range(dist.get_world_size())]
    dist.all_gather(grads, model[1].weight.grad)
    assert torch.equal(grads[0], grads[1])  # averaged by DDP
    return model[0].weight.grad.abs().sum(1).nonzero().flatten().tolist()


def test_ddp_of_the_rest_of_the_model(world):
    assert world(2)(own_group) == [[0, 1], [8, 9]]
