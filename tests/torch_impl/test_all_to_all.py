"""Each rank its own ids, over real gloo processes: values and gradients of the concatenated batch, bit for bit."""

import itertools

import numpy as np
import torch
import torch.distributed as dist
from torch_layers import DTYPES, equal_bits, set_rows, tensor_of

from shared import VocabPartition
from shared.proof.generate import exact_gradient
from shared.proof.oracle import weight_grad
from torch_impl import ParallelVocabEmbedding, exchange, reduced_lookup

VOCAB, EMB = 21, 6
SHAPES = {
    "equal": [(2, 5)] * 4,
    "unequal": [(7,), (2, 3), (), (1, 1, 4)],
    "some empty": [(0,), (5,), (3, 0), (2,)],
    "all empty": [(0,)] * 4,
}


def all_ids(shapes):
    """Each rank's ids; some are outside the vocabulary, some occur on several ranks."""
    rng = np.random.default_rng(0)
    return [rng.integers(-2, VOCAB + 3, shape) for shape in shapes]


def table_of(dtype):
    table = np.random.default_rng(1).standard_normal((VOCAB, EMB)).astype(DTYPES[dtype])
    table[3], table[9], table[20] = np.nan, -0.0, np.inf
    return table


def layer(exchange="auto", dtype=torch.float32, **options):
    options |= {"process_group": dist.group.WORLD, "reduction": "all_to_all", "padded_vocab_size": "even"}
    return set_rows(ParallelVocabEmbedding(VOCAB, EMB, dtype=dtype, exchange=exchange, **options), table_of(dtype))


def check_batch():
    rank, world_size = dist.get_rank(), dist.get_world_size()
    partition = VocabPartition(VOCAB, world_size, "even")
    for (name, shapes), dtype in itertools.product(SHAPES.items(), (torch.float32, torch.bfloat16)):
        table, everyones, padding_idx = table_of(dtype), all_ids(shapes), 5 if name == "unequal" else None
        batch = np.concatenate([ids.reshape(-1) for ids in everyones])
        upstream = exact_gradient(batch, EMB, DTYPES[dtype], 0)
        first, ids = sum(ids.size for ids in everyones[:rank]), everyones[rank]
        gradient = tensor_of(weight_grad(upstream, batch, partition, rank, padding_idx))
        valid = (ids >= 0) & (ids < VOCAB)
        rows = np.where(valid[..., None], table[np.where(valid, ids, 0)], np.zeros(EMB, table.dtype))
        for how, sparse in itertools.product(("dense", "routed"), (False, True)):
            emb = layer(how, dtype, padding_idx=padding_idx, sparse=sparse)
            output = emb(torch.from_numpy(ids))
            assert equal_bits(output, tensor_of(rows)), (name, dtype, how)
            output.backward(tensor_of(upstream[first : first + ids.size]).view(output.shape))
            assert equal_bits(emb.weight.grad.to_dense(), gradient), (name, dtype, how, sparse)


def test_rows_and_gradients_of_the_concatenated_batch(world):
    world(4)(check_batch)


def check_composition():
    """Compiled, differentiated twice, checked; and a bad id of one rank."""
    rank, shapes = dist.get_rank(), SHAPES["unequal"][:2]
    finite = torch.nan_to_num(layer().weight.detach(), posinf=1.0)
    plain, compiled, checked = layers = [layer("routed"), layer("routed"), layer("dense", check=True)]
    for emb in layers:
        emb.load_state_dict({"weight": finite})
    ids = torch.from_numpy(all_ids(shapes)[rank])
    expected = plain(ids)
    expected.square().sum().backward()
    output = torch.compile(compiled, fullgraph=True, backend="aot_eager")(ids)
    output.square().sum().backward()
    assert equal_bits(output, expected)
    assert equal_bits(compiled.weight.grad, plain.weight.grad)
    assert equal_bits(checked(ids), expected)
    weight = finite.requires_grad_()
    found = reduced_lookup(weight, ids, plain.partition, dist.group.WORLD, reduction="all_to_all")
    (first,) = torch.autograd.grad(found.square().sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    counts = np.zeros(VOCAB + 3)
    np.add.at(counts, np.concatenate([each.reshape(-1) for each in all_ids(shapes)]).clip(-1), 1)
    start, stop = plain.partition.owned_range(rank)
    assert torch.equal(second[: stop - start, 0], torch.from_numpy(2 * counts[start:stop]).float())
    try:
        layer(invalid_ids="error")(torch.tensor([[1, 2], [3, VOCAB if rank == 1 else 4]]))
    except IndexError as error:
        return str(error)


def test_transforms_and_checks_and_one_bad_id_is_told_to_every_rank(world):
    for message in world(2)(check_composition):
        assert "of the ids that rank 1 passed, flattened: ids[3] = 21 is outside" in message


def count_collectives():
    """The collectives of a forward and a backward, and the rows that this rank sends."""
    calls, sent = [], []

    def counting(name, call):
        def counted(*args, **kwargs):
            calls.append(name)
            if name == "all_to_all_single":
                sent.append(args[1].shape[0])
            return call(*args, **kwargs)

        return counted

    gather, all_to_all = exchange.all_gather, dist.all_to_all_single
    exchange.all_gather = counting("all_gather", gather)
    dist.all_to_all_single = counting("all_to_all_single", all_to_all)
    try:
        layer("routed")(torch.tensor([0, 0, 0, 20, 20])).sum().backward()
    finally:
        exchange.all_gather, dist.all_to_all_single = gather, all_to_all
    return calls, sent


def test_each_distinct_row_travels_once(world):
    for rank, (calls, sent) in enumerate(world(2)(count_collectives)):
        assert calls == ["all_gather", "all_gather", "all_to_all_single"] * 2
        # Each rank owns one of the two distinct ids, which both ranks ask for; backward returns one sum to each owner.
        assert sent == [2, 2], rank


def train_with_ddp():
    model = torch.nn.Sequential(layer(), torch.nn.Linear(EMB, 2))
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["0.weight"])
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    before = model[0].weight.detach().clone()
    rank = dist.get_rank()
    parallel(torch.tensor([rank, 20 - rank])).sum().backward()
    assert equal_bits(model[0].weight, before)
    grads = [torch.empty_like(model[1].weight.grad) for _ in range(dist.get_world_size())]
    dist.all_gather(grads, model[1].weight.grad)
    assert torch.equal(*grads)  # averaged by DDP
    return model[0].weight.grad.abs().sum(1).nonzero().flatten().tolist()


def test_ddp_of_the_rest_of_the_model(world):
    assert world(2)(train_with_ddp) == [[0, 1], [8, 9]]
