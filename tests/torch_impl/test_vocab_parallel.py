"""``VocabParallel`` in plans of ``parallelize_module``, against the unsharded model, bit for bit."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, SequenceParallel, parallelize_module
from torch_layers import assert_refused, mesh_of, named, on_ranks, whole

from torch_impl import ParallelVocabEmbedding
from torch_impl.adapters import VocabParallel

VOCAB, EMB = 22, 4
IDS = torch.tensor([[0, 4, 21, 6], [6, 7, 13, 3]])


class ScaledEmbedding(nn.Embedding):
    def forward(self, input):
        return super().forward(input) * 2

    def reset_parameters(self):
        nn.init.constant_(self.weight, 3)


class Model(nn.Module):
    """Of small whole numbers: whatever the order of its sums, they are exact."""

    def __init__(self, embedding=nn.Embedding, vocab_size=VOCAB, **options):
        super().__init__()
        self.tok_embeddings = embedding(vocab_size, EMB, **options)
        self.norm = nn.RMSNorm(EMB)
        self.norm.forward = lambda x: x * self.norm.weight  # not scaled to fractions
        self.output = nn.Linear(EMB, 8, bias=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                if not parameter.is_meta:
                    parameter.copy_(torch.randint(-3, 4, parameter.shape, generator=generator))

    def forward(self, ids):
        # fully_shard warns of a view, as DTensor's output is
        return 1 * self.output(self.norm(self.tok_embeddings(ids)))


def loss_of(logits):
    return (logits * torch.arange(float(logits.numel())).view(logits.shape).remainder(5)).sum()


def check_equal(model, reference):
    for each in (model, reference):
        each.zero_grad()
    logits, expected = model(IDS), reference(IDS)
    assert torch.equal(logits, expected)
    loss_of(logits).backward()
    loss_of(expected).backward()
    for name, parameter in reference.named_parameters():
        assert torch.equal(whole(model.get_parameter(name)), parameter), name
        assert torch.equal(whole(model.get_parameter(name).grad), parameter.grad), name


def plan_of(kind, **options):
    """A plan as torchtitan's are."""
    if kind == "replicate":
        return {"tok_embeddings": VocabParallel(**options)}
    return {
        "tok_embeddings": VocabParallel(output_layouts=Shard(1), **options),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }


@on_ranks(2)
def test_two_ranks_compute_what_the_unsharded_model_does():
    plans = ("replicate", True, 22), ("replicate", False, 23), ("sequence", True, 23), ("sequence", False, 22)
    for kind, use_local_output, vocab_size in plans:
        options = {"vocab_size": vocab_size, "padding_idx": 6}
        reference, model = Model(**options), Model(**options)
        if dist.get_rank() != 0:  # the rows are those of the first rank
            nn.init.zeros_(model.tok_embeddings.weight)
        emb = model.tok_embeddings
        model = parallelize_module(model, mesh_of(2), plan_of(kind, use_local_output=use_local_output))
        assert model.tok_embeddings is emb
        assert isinstance(emb, nn.Embedding)
        assert isinstance(emb, ParallelVocabEmbedding)
        assert (type(emb.weight), emb.weight.shape, emb.weight.placements) == (DTensor, (vocab_size, EMB), (Shard(0),))
        assert list(model.state_dict()) == list(reference.state_dict())
        output = emb(IDS)
        assert isinstance(output, DTensor) != use_local_output
        if not use_local_output:
            assert output.placements == (Replicate() if kind == "replicate" else Shard(1),)
            if kind == "replicate":
                emb.register_forward_hook(lambda _module, _inputs, output: output.to_local())
        with named(kind, use_local_output, vocab_size):
            check_equal(model, reference)
            assert torch.equal(whole(copy.deepcopy(emb)(IDS)), whole(emb(IDS)))


@on_ranks(2)
def test_ids_split_along_the_sequence_and_ids_as_dtensors():
    mesh, reference, chunk = mesh_of(2), Model(), IDS.chunk(2, 1)[dist.get_rank()]
    model = parallelize_module(Model(), mesh, {"tok_embeddings": VocabParallel(input_layouts=Shard(1))})
    for ids in (chunk, DTensor.from_local(chunk, mesh, [Shard(1)]), DTensor.from_local(IDS, mesh, [Replicate()])):
        assert torch.equal(model(ids), reference(IDS))
    assert torch.equal(model.tok_embeddings(input=chunk), reference.tok_embeddings(IDS))


@on_ranks(2)
def test_without_a_source_each_rank_keeps_its_own_rows():
    emb = nn.Embedding(VOCAB, EMB)
    nn.init.constant_(emb.weight, dist.get_rank())
    parallelize_module(emb, mesh_of(2), VocabParallel(), src_data_rank=None)
    assert (emb.weight.to_local() == dist.get_rank()).all()


@on_ranks(2)
def test_a_class_of_the_users_own_keeps_what_it_does():
    model, reference = Model(ScaledEmbedding), Model(ScaledEmbedding)
    parallelize_module(model, mesh_of(2), plan_of("sequence"))
    assert isinstance(model.tok_embeddings, ScaledEmbedding)
    check_equal(model, reference)
    model.tok_embeddings.reset_parameters()
    assert (model.tok_embeddings.weight.to_local() == 3).all()


@on_ranks(2)
def test_what_is_refused():
    mesh, split = mesh_of(2), fully_shard(nn.Embedding(VOCAB, EMB), mesh=mesh_of(2))
    emb = parallelize_module(nn.Embedding(VOCAB, EMB), mesh, VocabParallel())

    def apply(module):
        return parallelize_module(module, mesh, VocabParallel())

    layout = r"output_layouts must be Replicate\(\) or Shard\(d\)"
    assert_refused(
        (ValueError, layout, lambda: VocabParallel(output_layouts=Partial())),
        (ValueError, layout, lambda: VocabParallel(output_layouts=Shard(-1))),
        (TypeError, "must be given an nn.Embedding, got Linear", lambda: apply(nn.Linear(2, 2))),
        (ValueError, "without max_norm", lambda: apply(nn.Embedding(VOCAB, EMB, max_norm=1.0))),
        (ValueError, "sparse must be False", lambda: apply(nn.Embedding(VOCAB, EMB, sparse=True))),
        (TypeError, "is built with device_mesh", lambda: apply(emb)),
        (ValueError, "VocabParallel must come first", lambda: apply(split)),
    )
    printed = "VocabParallel(input_layouts=R, output_layouts=S(1), use_local_output=True)"
    assert repr(VocabParallel(output_layouts=Shard(1))) == printed


@on_ranks(4)
def test_a_model_on_the_meta_device():
    mesh = mesh_of(2, 2)
    with torch.device("meta"):
        model = Model()
    parallelize_module(model, mesh["tp"], plan_of("replicate"))
    assert model.tok_embeddings.weight.is_meta
    fully_shard(model, mesh=mesh["dp"])
    model.to_empty(device="cpu")
    model.tok_embeddings.reset_parameters()
    expected = ParallelVocabEmbedding(VOCAB, EMB, device_mesh=mesh["tp"])
    assert torch.equal(whole(model.tok_embeddings.weight), whole(expected.weight))
