"""The head as a module: tied or with its own table, moved, copied, compiled, under FSDP2."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch_layers import assert_refused, mesh_of, named

from torch_impl import (
    ParallelLMHead,
    ParallelVocabEmbedding,
    parallel_argmax,
    parallel_cross_entropy,
    parallel_sample,
)

VOCAB, EMB = 21, 8
IDS = torch.randint(0, VOCAB, (4, 8), generator=torch.Generator().manual_seed(0))
LOSS = {"label_smoothing": 0.1, "z_loss": 0.01}


class Model(nn.Module):
    """A lookup, a layer and a head: the least in which the table is used at both ends."""

    def __init__(self, group=None, tied=True, seq_dim=None, **options):
        super().__init__()
        options = {"reduction": "all_reduce" if seq_dim is None else "reduce_scatter"} | options
        options |= {"process_group": group, "padded_vocab_size": "even", "init": "global"}
        self.embedding = ParallelVocabEmbedding(VOCAB, EMB, seq_dim=1, **options)
        other = self.embedding if tied else ParallelVocabEmbedding(VOCAB, EMB, **options)
        self.middle = nn.Linear(EMB, EMB)
        with torch.no_grad():
            self.middle.weight.copy_(torch.eye(EMB).roll(1, 0))
            self.middle.bias.zero_()
        self.head = ParallelLMHead(other, tied=tied, seq_dim=seq_dim, **LOSS)

    def forward(self, ids, targets=None):
        return self.head(self.middle(self.embedding(ids)), targets)


def gradients(model, ids=IDS):
    """The loss, and the gradients of the lookup's table, the head's and the layer."""
    loss = model(ids, ids)
    loss.backward()
    return loss.detach(), *(each.weight.grad for each in (model.embedding, model.head.embedding, model.middle))


@pytest.mark.parametrize("tied", [True, False])
def test_one_rank(tied):
    """As PyTorch's own operations; a tied table gets the sum of both gradients."""
    model = Model(tied=tied)
    found, table, apart = gradients(model), model.embedding.weight.detach(), Model(tied=False)
    tables = [table.clone().requires_grad_() for _ in range(2)]
    logits = F.linear(apart.middle(F.embedding(IDS, tables[0])), tables[1]).flatten(0, 1)
    loss = F.cross_entropy(logits, IDS.flatten(), label_smoothing=0.1) + 0.01 * logits.logsumexp(-1).square().mean()
    loss.backward()
    of_tables = [tables[0].grad + tables[1].grad] * 2 if tied else [each.grad for each in tables]
    torch.testing.assert_close(found, (loss.detach(), *of_tables, apart.middle.weight.grad))
    names = ["embedding.weight"] if tied else ["embedding.weight", "head.table.weight"]
    assert sorted(name for name in model.state_dict() if "middle" not in name) == names
    assert len(list(model.parameters())) == len(names) + 2
    assert model.head(torch.zeros(2, EMB)).shape == (2, VOCAB)


def check_ranks():
    for tied in (True, False):
        loss, *tables, middle = gradients(Model(tied=tied))
        for seq_dim in (None, 1):
            with named(tied, seq_dim):
                model = Model(dist.group.WORLD, tied, seq_dim)
                own_loss, *own_tables, own_middle = gradients(model)
                torch.testing.assert_close(own_loss, loss)
                start, stop = model.embedding.partition.owned_range(model.embedding.rank)
                for own, whole in zip(own_tables, tables, strict=True):
                    torch.testing.assert_close(own, F.pad(whole[start:stop], (0, 0, 0, len(own) - stop + start)))
                if seq_dim is not None:
                    dist.all_reduce(own_middle)
                torch.testing.assert_close(own_middle, middle)
    model = Model(dist.group.WORLD)
    parallel_cross_entropy(model(IDS), IDS, model.head.partition, dist.group.WORLD, **LOSS).backward()
    torch.testing.assert_close(model.middle.weight.grad, gradients(Model())[3])  # that of all ranks here too


def assign(model):
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    return model


def cast(model):
    return model.double().float()


def to_empty(model):
    return model.to_empty(device="cpu")


@pytest.mark.parametrize(
    "move", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), assign, cast, to_empty]
)
def test_a_tied_head_follows_its_table(move):
    model = move(Model())
    with torch.no_grad():
        model.embedding.weight.fill_(0.5)
        model.middle.weight.copy_(torch.eye(EMB))
        model.middle.bias.zero_()  # to_empty left nothing of it
    assert model.head.embedding is model.embedding
    assert torch.equal(model(IDS), torch.full((*IDS.shape, VOCAB), EMB / 4))
    assert sum(p.numel() for p in model.parameters()) == VOCAB * EMB + EMB * EMB + EMB


@pytest.mark.slow
def test_compile():
    model = Model()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(IDS, IDS), model(IDS, IDS))


def check_fsdp():
    """Lookup and head in one group, over the other dimension of a mesh; two data ranks with batches of their own."""
    from torch.distributed.fsdp import fully_shard

    mesh, batches = mesh_of(2, 2), IDS.chunk(2)
    expected = [gradients(Model(), ids) for ids in batches]
    model = Model(mesh.get_group("tp"))
    fully_shard([model.embedding, model.head], mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    loss, own, *_ = gradients(model, batches[mesh.get_local_rank("dp")])
    torch.testing.assert_close(loss, expected[mesh.get_local_rank("dp")][0])
    start, stop = model.embedding.partition.owned_range(mesh.get_local_rank("tp"))
    mean = (expected[0][1] + expected[1][1]) / 2
    torch.testing.assert_close(own.full_tensor()[: stop - start], mean[start:stop])


def check_disagreement_is_named():
    """With check=True every rank learns that hidden states or targets differ."""
    group, ids = dist.group.WORLD, IDS
    options = {"process_group": group, "check": True, "padded_vocab_size": "even"}
    layers = {name: ParallelVocabEmbedding(VOCAB, EMB, reduction=name, **options) for name in ("none", "all_reduce")}
    heads = {name: ParallelLMHead(emb, tied=True) for name, emb in layers.items()}
    own_targets = ids.clone()
    own_targets[0, 0] = group.rank()
    good = layers["all_reduce"](ids)
    assert torch.equal(heads["all_reduce"](good, ids), ParallelLMHead(layers["none"], tied=True)(good, ids))
    assert_refused(
        (ValueError, "the ranks disagree about hidden states", lambda: heads["none"](layers["none"](ids), ids)),
        (ValueError, "the ranks disagree about targets", lambda: heads["all_reduce"](good, own_targets)),
        (ValueError, "without seq_dim, got both", lambda: Model(group, reduction="all_to_all")),
        (ValueError, "pass seq_dim", lambda: heads["all_reduce"](good[:, :4], ids)),
    )


def check_decoding():
    model = Model(dist.group.WORLD)
    head, group, logits = model.head, dist.group.WORLD, model(IDS).detach()
    uniform = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head.argmax(logits), parallel_argmax(logits, head.partition, group))
    assert torch.equal(head.top_k(logits, 3)[1][..., 0], head.argmax(logits))
    assert torch.equal(head.sample(logits, uniform), parallel_sample(logits, head.partition, group, uniform=uniform))


@pytest.mark.parametrize("check", [check_ranks, check_fsdp, check_disagreement_is_named, check_decoding])
def test_four_ranks(world, check):
    world(4)(check)


def test_what_is_refused():
    embedding, several = ParallelVocabEmbedding(VOCAB, EMB), ParallelVocabEmbedding(24, EMB, rank=1, world_size=2)
    head = ParallelLMHead(embedding, tied=True, softcap=30.0)
    fused = ParallelVocabEmbedding(VOCAB, EMB, gradient_accumulation_fusion=True)
    assert_refused(
        (TypeError, "embedding must be .*, got Linear", lambda: ParallelLMHead(nn.Linear(3, 4), tied=True)),
        (TypeError, "tied must be True or False", lambda: ParallelLMHead(embedding, tied=1)),
        (ValueError, "must have a process_group", lambda: ParallelLMHead(several, tied=True)),
        (ValueError, "gradient_accumulation_fusion must be False", lambda: ParallelLMHead(fused, tied=True)),
        (ValueError, "returns must be empty", lambda: head(torch.zeros(1, EMB), returns=("lse",))),
    )
    assert repr(head) == "ParallelLMHead(tied=True, softcap=30.0)"
