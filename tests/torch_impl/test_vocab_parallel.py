"""``VocabParallel`` in plans of ``parallelize_module``, against the unsharded model, bit for bit."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, SequenceParallel, parallelize_module

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

    def __init__(self, embedding=nn.Embedding, vocab_size=VOCAB, seed=0, **options):
        super().__init__()
        self.tok_embeddings = embedding(vocab_size, EMB, **options)
        self.norm = nn.RMSNorm(EMB)
        self.norm.forward = lambda x: x * self.norm.weight  # not scaled to fractions
        self.output = nn.Linear(EMB, 8, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if not parameter.is_meta:
                    parameter.copy_(torch.randint(-3, 4, parameter.shape, generator=generator))

    def forward(self, ids):
        return 1 * self.output(
            self.norm(self.tok_embeddings(ids))
        )  # fully_shard warns of a view, as DTensor's output is


def mesh_of(*sizes):
    return dist.init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "tp")[-len(sizes) :])


def loss_of(logits):
    return (logits * torch.arange(float(logits.numel())).view(logits.shape).remainder(5)).sum()


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def check_equal(model, reference, ids=IDS):
    for each in (model, reference):
        each.zero_grad()
    logits, expected = model(ids), reference(ids)
    assert torch.equal(logits, expected)
    loss, expected_loss = loss_of(logits), loss_of(expected)
    assert torch.equal(loss, expected_loss)
    loss.backward()
    expected_loss.backward()
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


def check_plan(kind, use_local_output, vocab_size):
    mesh, options = mesh_of(2), {"vocab_size": vocab_size, "padding_idx": 6}
    reference, model = Model(**options), Model(**options)
    if dist.get_rank() != 0:  # the rows are those of the first rank
        nn.init.zeros_(model.tok_embeddings.weight)
    before = model.tok_embeddings
    model = parallelize_module(model, mesh["tp"], plan_of(kind, use_local_output=use_local_output))
    emb = model.tok_embeddings
    assert emb is before
    assert isinstance(emb, nn.Embedding)
    assert isinstance(emb, ParallelVocabEmbedding)
    assert (type(emb.weight), emb.weight.shape, emb.weight.placements) == (DTensor, (vocab_size, EMB), (Shard(0),))
    assert list(model.state_dict()) == list(reference.state_dict())
    output = emb(IDS)
    assert isinstance(output, DTensor) != use_local_output
    if kind == "replicate":
        assert use_local_output or output.placements == (Replicate(),)
        if not use_local_output:
            emb.register_forward_hook(lambda _module, _inputs, output: output.to_local())
    else:
        assert use_local_output or output.placements == (Shard(1),)
    check_equal(model, reference)
    assert torch.equal(whole(copy.deepcopy(emb)(IDS)), whole(emb(IDS)))


@pytest.mark.parametrize("kind", ["replicate", "sequence"])
@pytest.mark.parametrize("use_local_output", [True, False])
def test_loss_and_gradients_are_those_of_the_unsharded_model(world, kind, use_local_output):
    for vocab_size in (22, 23):
        world(2)(check_plan, kind, use_local_output, vocab_size)


def check_inputs():
    mesh, reference, chunk = mesh_of(2), Model(), IDS.chunk(2, 1)[dist.get_rank()]
    model = parallelize_module(Model(), mesh, {"tok_embeddings": VocabParallel(input_layouts=Shard(1))})
    assert torch.equal(model(chunk), reference(IDS))
    for ids in (DTensor.from_local(chunk, mesh, [Shard(1)]), DTensor.from_local(IDS, mesh, [Replicate()])):
        assert torch.equal(model(ids), reference(IDS))
    assert torch.equal(model.tok_embeddings(input=chunk), reference.tok_embeddings(IDS))


def test_ids_split_along_the_sequence_and_ids_as_dtensors(world):
    world(2)(check_inputs)


def check_own_rows():
    mesh, rank = mesh_of(2), dist.get_rank()
    emb = nn.Embedding(VOCAB, EMB)
    nn.init.constant_(emb.weight, rank)
    parallelize_module(emb, mesh, VocabParallel(), src_data_rank=None)
    assert (emb.weight.to_local() == rank).all()


def test_without_a_source_each_rank_keeps_its_own_rows(world):
    world(2)(check_own_rows)


def check_subclass():
    model, reference = Model(ScaledEmbedding), Model(ScaledEmbedding)
    parallelize_module(model, mesh_of(2), plan_of("sequence"))
    assert isinstance(model.tok_embeddings, ScaledEmbedding)
    check_equal(model, reference)
    model.tok_embeddings.reset_parameters()
    assert (model.tok_embeddings.weight.to_local() == 3).all()


def test_a_class_of_the_users_own_keeps_what_it_does(world):
    world(2)(check_subclass)


def check_meta():
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


def test_a_model_on_the_meta_device(world):
    world(4)(check_meta)


def trained(split):
    model = Model(seed=int(split))
    mesh = mesh_of(2, 2) if split else mesh_of(dist.get_world_size())
    parallelize_module(model, mesh["tp"] if split else mesh, plan_of("sequence"))
    if split:
        fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model(IDS)).backward()
    optimizer.step()
    return model, optimizer


def check_save(folder):
    model, optimizer = trained(split=True)
    states = get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=folder)
    tensors = [model.tok_embeddings.weight, optimizer.state[model.tok_embeddings.weight]["exp_avg"]]
    return [whole(each.detach()) for each in tensors]


def check_load(folder, expected):
    model, optimizer = trained(split=False)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert torch.equal(whole(model.tok_embeddings.weight), expected[0])
    assert torch.equal(whole(optimizer.state[model.tok_embeddings.weight]["exp_avg"]), expected[1])


def test_a_checkpoint_loads_over_another_number_of_ranks(world, tmp_path):
    expected = world(4)(check_save, str(tmp_path))[0]
    world(2)(check_load, str(tmp_path), expected)
    dcp.load(state := {"model": Model(seed=5).state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(state["model"]["tok_embeddings.weight"], expected[0])  # into the plain nn.Embedding


def check_refusals():
    mesh = mesh_of(2)
    for layout in (Partial(), Shard(-1)):
        with pytest.raises(ValueError, match=r"output_layouts must be Replicate\(\) or Shard\(d\)"):
            VocabParallel(output_layouts=layout)
    with pytest.raises(TypeError, match="must be given an nn.Embedding, got Linear"):
        parallelize_module(nn.Linear(2, 2), mesh, VocabParallel())
    for options, match in (({"max_norm": 1.0}, "without max_norm"), ({"sparse": True}, "sparse must be False")):
        with pytest.raises(ValueError, match=match):
            parallelize_module(nn.Embedding(VOCAB, EMB, **options), mesh, VocabParallel())
    emb = parallelize_module(nn.Embedding(VOCAB, EMB), mesh, VocabParallel())
    with pytest.raises(TypeError, match="is built with device_mesh"):
        parallelize_module(emb, mesh, VocabParallel())
    split = nn.Embedding(VOCAB, EMB)
    fully_shard(split, mesh=mesh)
    with pytest.raises(ValueError, match="VocabParallel must come first"):
        parallelize_module(split, mesh, VocabParallel())


def test_what_is_refused(world):
    world(2)(check_refusals)
    assert repr(VocabParallel(output_layouts=Shard(1))) == (
        "VocabParallel(input_layouts=R, output_layouts=S(1), use_local_output=True)"
    )
