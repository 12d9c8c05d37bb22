"""The adapter in the place of Megatron-core's own class: both in real models, on CPUs, over gloo."""

import contextlib
import functools
import importlib.util
import itertools
import os
import sys
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from marks import slower
from torch import nn
from torch.overrides import TorchFunctionMode
from torch_layers import assert_refused, equal_bits, on_ranks

from torch_impl.adapters.megatron import VocabParallelEmbedding

VOCAB, EMB, SEQUENCE = 24, 16, 8
needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"
)


class CpuForCuda(TorchFunctionMode):
    """Megatron-core asks for "cuda" by name: have it work on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        return result.replace("torch.", "torch.cuda.") if func is torch.Tensor.type and len(args) == 1 else result


class RandomStates:
    """Megatron's tracker of CUDA random states: here the CPU's, another one on each rank."""

    @contextlib.contextmanager
    def fork(self, name=None):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(100 + dist.get_rank())
            yield


@contextlib.contextmanager
def megatron_on_cpu():
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # of what is not installed, of names in torch
        from megatron.core import tensor_parallel

        stack.enter_context(CpuForCuda())
        for name, result in (("current_device", "cpu"), ("synchronize", None)):
            stack.enter_context(mock.patch.object(torch.cuda, name, mock.Mock(return_value=result)))
        for module in (tensor_parallel, tensor_parallel.layers):
            stack.enter_context(mock.patch.object(module, "get_cuda_rng_tracker", RandomStates))
        yield


@functools.cache
def groups(tp):
    """The tensor-parallel group of ``tp`` of two ranks, and the group of those that have the same rows."""
    alone = dist.new_subgroups(1)[0]
    return (alone, dist.group.WORLD) if tp == 1 else (dist.group.WORLD, alone)


class Norm(nn.LayerNorm):
    """Megatron's own norms run on GPUs alone where the sequence is split."""

    def __init__(self, config, hidden_size, eps):
        super().__init__(hidden_size, eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


def gpt(config, tied, position):
    """A model of one layer under Megatron's DistributedDataParallel."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    torch.manual_seed(1)
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    model = GPTModel(
        config,
        TransformerBlockSubmodules([layer], layer_norm=Norm),
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        share_embeddings_and_output_weights=tied,
        position_embedding_type=position,
    )
    for parameter in model.parameters():  # as Megatron's training does
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True)
    return DistributedDataParallel(config, ddp_config, model)


def transformer_config(sequence_parallel=False, **options):
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=EMB,
        num_attention_heads=2,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        **options,
    )


def train(model):
    """Two steps of Megatron's optimizer; losses, global norms, and the gradients of the second."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=0.01, clip_grad=0.05), [model])
    ids = torch.randint(VOCAB, (2, SEQUENCE), generator=torch.Generator().manual_seed(0))
    positions, mask = torch.arange(SEQUENCE).expand(2, -1), torch.ones(1, 1, SEQUENCE, SEQUENCE).tril() < 0.5
    told = []
    for _step in range(2):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = model(ids, positions, mask, labels=ids.roll(-1, 1)).mean()
        loss.backward()
        finalize_model_grads([model])
        gradients = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
        _done, norm, _zeros = optimizer.step()
        told.append((loss.item(), float(norm)))
    return told, gradients


@needs_megatron  # to import it takes seconds: one of its tests is not slow
@pytest.mark.parametrize(
    ("sequence_parallel", "tied", "position", "on_host"),
    [(True, True, "rope", False), slower(False, False, "learned_absolute", True)],
)
@on_ranks(2)
@megatron_on_cpu()
def test_a_model_trains_as_with_megatrons_own_class(sequence_parallel, tied, position, on_host):
    from megatron.core import parallel_state, tensor_parallel

    if not parallel_state.is_initialized():  # to end its many groups takes seconds: they stay
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    config = transformer_config(sequence_parallel, use_cpu_initialization=on_host)
    theirs = gpt(config, tied, position)
    with mock.patch.object(tensor_parallel, "VocabParallelEmbedding", VocabParallelEmbedding):
        ours = gpt(config, tied, position)
    assert type(ours.module.embedding.word_embeddings) is VocabParallelEmbedding
    first = [{name: p.detach().clone() for name, p in model.named_parameters()} for model in (theirs, ours)]
    (told, gradients), (told_ours, gradients_ours) = (train(model) for model in (theirs, ours))
    assert told == told_ours
    last = [dict(model.named_parameters()) for model in (theirs, ours)]
    for expected, found in (first, (gradients, gradients_ours), last):
        assert list(expected) == list(found)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    weights = [model.module.embedding.word_embeddings.weight for model in (theirs, ours)]
    assert vars(weights[0]).keys() == vars(weights[1]).keys()
    entries = [model.module.sharded_state_dict("model.") for model in (theirs, ours)]
    assert list(entries[0]) == list(entries[1])
    name = "model.embedding.word_embeddings.weight"
    assert entries[0][name].without_data() == entries[1][name].without_data()
    assert entries[1][name].data is weights[1]
    assert list(ours.module.embedding.word_embeddings.sharded_state_dict()) == ["weight"]
    norms = torch.tensor([norm for _loss, norm in told])
    assert norms.min() > 0.05  # each step was clipped
    of_table = gradients["module.embedding.word_embeddings.weight"]
    for mine, alike in ((norms, True), (of_table, False)):
        everyones = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(everyones, mine)
        assert torch.equal(*everyones) == alike


def build(kind, tp, vocab_size=VOCAB, reduce_scatter=False, init_method=nn.init.normal_, **options):
    torch.manual_seed(1)
    of_megatron = {"config": transformer_config(**options), "tp_group": groups(tp)[0]}
    return kind(vocab_size, EMB, init_method=init_method, reduce_scatter_embeddings=reduce_scatter, **of_megatron)


@needs_megatron
@pytest.mark.slow
@on_ranks(2)
@megatron_on_cpu()
def test_layers():
    """Numbers, attributes and layouts are those of Megatron's own class; initialisation is left out or put off."""
    from megatron.core import tensor_parallel

    ids = torch.randint(VOCAB, (3, SEQUENCE), generator=torch.Generator().manual_seed(0))
    kinds = itertools.product((1, 2), (False, True), ((True, torch.bfloat16), (False, torch.float32)))
    for tp, reduce_scatter, (on_host, dtype) in kinds:
        options = {"params_dtype": dtype, "use_cpu_initialization": on_host}
        theirs, ours = (
            build(kind, tp, reduce_scatter=reduce_scatter, **options)
            for kind in (tensor_parallel.VocabParallelEmbedding, VocabParallelEmbedding)
        )
        assert torch.equal(theirs.weight, ours.weight)
        assert vars(theirs.weight) == vars(ours.weight)
        assert list(theirs.state_dict()) == list(ours.state_dict())
        expected, found = theirs(ids), ours(ids)
        assert equal_bits(found, expected), (tp, reduce_scatter, on_host, dtype)
        assert found.is_contiguous()
        grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(dist.get_rank() * reduce_scatter))
        for output in (expected, found):
            output.backward(grad.to(dtype))
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
        for name, value in vars(theirs).items():
            assert name.startswith("_") or getattr(ours, name) == value, name
    layer = build(VocabParallelEmbedding, 2, init_method=pytest.fail, perform_initialization=False)
    assert layer.weight.tensor_model_parallel  # else Megatron counts the rows of rank 0 alone in its norm
    with torch.device("meta"):
        layer = build(VocabParallelEmbedding, 2, use_cpu_initialization=True)
    assert layer.weight.is_meta
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.equal(layer.weight, build(VocabParallelEmbedding, 2, use_cpu_initialization=True).weight)


@needs_megatron
@pytest.mark.slow
@on_ranks(2)
@megatron_on_cpu()
def test_checkpoints_both_ways_across_sizes_and_paddings(tmp_path):
    from megatron.core import dist_checkpointing, tensor_parallel

    kinds = [tensor_parallel.VocabParallelEmbedding, VocabParallelEmbedding]
    for tp, other_tp, padded in ((2, 1, VOCAB + 1), (1, 2, VOCAB + 6)):
        metadata = {"dp_cp_group": groups(tp)[1]}
        layers = [build(kind, tp, use_cpu_initialization=True) for kind in kinds]
        in_front = [layer.sharded_state_dict("emb.", [(0, 1, 3)], metadata) for layer in layers]
        assert in_front[0]["emb.weight"].without_data() == in_front[1]["emb.weight"].without_data()
        whole = build(kinds[1], 1, use_cpu_initialization=True).weight
        table = nn.functional.pad(whole, (0, 0, 0, padded - VOCAB))
        for saved, loads in zip(layers, (kinds[1:], kinds), strict=True):
            path = f"{tmp_path}/{type(saved).__module__}{tp}{other_tp}"
            if dist.get_rank() == 0:
                os.mkdir(path)
            dist.barrier()
            dist_checkpointing.save(saved.sharded_state_dict("emb.", (), metadata), path)
            for kind in loads:
                layer = build(kind, other_tp, padded, init_method=nn.init.zeros_, use_cpu_initialization=True)
                state = layer.sharded_state_dict("emb.", metadata={"dp_cp_group": groups(other_tp)[1]})
                layer.load_state_dict({"weight": dist_checkpointing.load(state, path)["emb.weight"]})
                assert torch.equal(layer.weight, table[layer.vocab_start_index : layer.vocab_end_index])


def test_without_megatron_core_and_what_megatron_does_itself(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron", None)
    build, options = VocabParallelEmbedding, {"init_method": nn.init.normal_, "config": None}
    assert_refused(
        (TypeError, r"copy the rows of .*ParallelVocabEmbedding\.from_table", lambda: build.from_table("folder")),
        (TypeError, "copy rows .* of the table into emb.weight", lambda: build.from_embedding(torch.zeros(VOCAB, EMB))),
        (ImportError, "pip install megatron-core", lambda: build(VOCAB, EMB, **options)),
    )
