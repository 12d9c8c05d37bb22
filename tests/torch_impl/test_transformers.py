"""The layer in a Hugging Face model: the recipe, and what that library does with a rank's rows."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch_layers import assert_refused, mesh_of, on_ranks, rows_of, without_warnings

from torch_impl import ParallelVocabEmbedding, clip_grad_norm_

VOCAB = 21  # over two ranks 11 rows each, one of padding
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
SECTION = (Path(__file__).parents[2] / "docs/libraries.md").read_text().partition("## Hugging Face transformers\n")[2]
SPLIT_TABLE, SPLIT_HEAD, SAVE = re.findall(r"```\{\.python\}\n(.*?)```", SECTION.partition("\n## ")[0], re.DOTALL)


def shard(model, mesh):
    """Split a model's table as the documentation says; return the names that its code has defined."""
    names = {"nn": nn, "F": nn.functional, "DTensor": DTensor, "Replicate": Replicate, "Shard": Shard}
    names |= {"ParallelVocabEmbedding": ParallelVocabEmbedding, "model": model, "mesh": mesh}
    exec(SPLIT_TABLE, names)
    if model.config.tie_word_embeddings:
        exec(SPLIT_HEAD, names)
    return names


def new_model(kind, tied):
    import transformers

    torch.manual_seed(1)
    sizes = {"vocab_size": VOCAB, "tie_word_embeddings": tied, "eos_token_id": None, "bos_token_id": None}
    if kind == "GPT2":
        config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, **sizes)
    else:
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, **sizes
        )
    return getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).eval()


@pytest.mark.slow  # to import the library takes seconds
@pytest.mark.parametrize(("kind", "tied"), [("Llama", False), ("GPT2", True)])
@on_ranks(2)
@without_warnings()
def test_a_model_split_trained_saved_and_loaded(tmp_path, kind, tied):
    mesh = mesh_of(2)
    whole, split = new_model(kind, tied), new_model(kind, tied)
    names = shard(split, mesh)
    whole_emb, emb = whole.get_input_embeddings(), split.get_input_embeddings()
    split.tie_weights()  # as the library does when it likes
    ids = torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(emb(ids), whole_emb(ids))
    outputs = [model(ids, labels=ids) for model in (whole, split)]
    for output in outputs:
        output.loss.backward()
    for name in ("logits", "loss"):
        torch.testing.assert_close(outputs[1][name], outputs[0][name])
    torch.testing.assert_close(*rows_of(emb, emb.weight.grad, whole_emb.weight.grad))
    norms = nn.utils.clip_grad_norm_(whole.parameters(), 0.1), clip_grad_norm_(split, 0.1)
    torch.testing.assert_close(*norms)
    for model in (whole, split):
        torch.optim.SGD(model.parameters(), 1.0).step()
    expected = dict(whole.named_parameters())
    for name, parameter in split.named_parameters():
        pair = rows_of(emb, parameter, expected[name]) if parameter is emb.weight else (parameter, expected[name])
        torch.testing.assert_close(*pair, msg=name)
    assert emb.rank == 0 or not emb.weight[-1].any()  # padding
    tokens = [model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for model in (whole, split)]
    assert torch.equal(*tokens)

    exec(SAVE, {**names, "folder": tmp_path})
    dist.barrier()
    loaded = type(whole).from_pretrained(tmp_path)
    assert torch.equal(*rows_of(emb, emb.weight, loaded.get_input_embeddings().weight))
    torch.testing.assert_close(loaded(ids).logits, split(ids).logits)
    again = shard(loaded, mesh)["emb"]
    from_file = ParallelVocabEmbedding.from_table(tmp_path, process_group=mesh.get_group(), padded_vocab_size="even")
    assert torch.equal(again.weight, emb.weight)
    assert torch.equal(from_file.weight, emb.weight)


@pytest.mark.slow
@without_warnings()
def test_one_rank_needs_no_recipe(tmp_path):
    whole, model = new_model("Llama", True), new_model("Llama", True)
    emb = ParallelVocabEmbedding.from_embedding(model.get_input_embeddings())
    model.set_input_embeddings(emb)
    assert model.lm_head.weight is not emb.weight  # the library leaves the head with the old table
    model.tie_weights()
    assert model.lm_head.weight is emb.weight
    model.save_pretrained(tmp_path)
    state = type(model).from_pretrained(tmp_path).state_dict()
    assert state.keys() == whole.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items())


@pytest.mark.slow
@without_warnings()
def test_without_the_recipe_resizing_loading_and_labels_are_refused(tmp_path):
    """The model's input embedding is replaced by rank 0's rows of two, and nothing else is done."""
    model, ids = new_model("Llama", True), torch.tensor([[1, 2]])
    rows = ParallelVocabEmbedding.from_embedding(model.get_input_embeddings(), 0, 2, padded_vocab_size="even")
    model.set_input_embeddings(rows)
    of_library, resize = r"not an instance of .*Embedding", model.resize_token_embeddings
    own = r"num_embeddings must stay 21, got 11 .*build this layer by from_embedding"
    model.save_pretrained(tmp_path)
    assert_refused(
        (TypeError, of_library, lambda: resize(VOCAB + 4)),
        (ValueError, own, lambda: resize(11)),  # as many as the rank has rows
        (ValueError, own, lambda: resize(pad_to_multiple_of=11)),
        (RuntimeError, "mismatch", lambda: type(model).from_pretrained(tmp_path)),
    )
    assert model.config.vocab_size == VOCAB
    model.tie_weights()
    with pytest.raises((ValueError, RuntimeError), match="shape|size"):
        model(ids, labels=ids)
