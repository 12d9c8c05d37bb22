"""The layer in the place of flax.nnx.Embed, beside that class: table, results, training, checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from marks import slower
from meshes import make_mesh

from jax_impl import ParallelVocabEmbedding, restore_args
from jax_impl.adapters.nnx import Embed

IDS = np.array([[0, 9, 9, 3], [4, 0, 7, 2]])
ADAM = optax.adam(0.1)


class Model(nnx.Module):
    def __init__(self, embed_class=nnx.Embed, **options):
        rngs = nnx.Rngs(0)
        self.embed = embed_class(10, 4, rngs=rngs, **options)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, ids):
        return self.head(jnp.sin(self.embed(ids)))


@nnx.jit
def train(model, optimizer, ids):
    loss, gradient = nnx.value_and_grad(lambda model: (model(ids) ** 2).sum())(model)
    optimizer.update(model, gradient)
    return loss


def table_of(model):
    return np.asarray(model.embed.embedding[...])[:10]


@pytest.mark.parametrize(("dtype", "param_dtype"), [(jnp.bfloat16, jnp.float32), slower(None, jnp.bfloat16)])
def test_table_and_result_are_flaxs_own(mesh_of, dtype, param_dtype):
    mesh, options = mesh_of((4,)), {"dtype": dtype, "param_dtype": param_dtype}
    theirs = nnx.Embed(10, 4, rngs=nnx.Rngs(0), **options)
    ours = Embed(10, 4, rngs=nnx.Rngs(0), mesh=mesh, padded_vocab_size="even", **options)
    assert isinstance(ours, nnx.Embed)
    assert ours.embedding.sharding == NamedSharding(mesh, P("tp", None))
    assert not np.asarray(ours.embedding[...])[10:].any()
    np.testing.assert_array_equal(np.asarray(ours.embedding[...])[:10], theirs.embedding[...])
    expected = jnp.take(theirs.embedding[...], IDS, axis=0).astype(theirs.dtype)
    assert ours(IDS).dtype == theirs.dtype
    np.testing.assert_array_equal(ours(IDS), expected)
    np.testing.assert_array_equal(nnx.jit(lambda embed, ids: embed(ids))(ours, IDS), expected)


def test_logical_axes():
    mesh = make_mesh((2, 4), ("dp", "model"))
    metadata = {"out_sharding": ("vocab", "embed"), "sharding_rules": (("vocab", "model"), ("embed", None))}
    embed = Embed(12, 4, rngs=nnx.Rngs(0), mesh=mesh, axis_name="model", embedding_metadata=metadata)
    assert nnx.get_partition_spec(nnx.state(embed))["embedding"].get_value() == P("model", None)
    np.testing.assert_array_equal(embed(IDS), nnx.Embed(12, 4, rngs=nnx.Rngs(0))(IDS))


def test_the_table_is_trained_as_flaxs_own_is(mesh_of):
    mesh = mesh_of((4,))
    model, reference = Model(Embed, mesh=mesh, padded_vocab_size="even"), Model()
    before = table_of(model)
    optimizers = [nnx.Optimizer(each, ADAM, wrt=nnx.Param) for each in (model, reference)]
    for _ in range(5):
        losses = [float(train(*pair, IDS)) for pair in zip((model, reference), optimizers, strict=True)]
        np.testing.assert_allclose(*losses, rtol=1e-5)  # float32 sums in another order
    np.testing.assert_allclose(table_of(model), table_of(reference), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal((table_of(model) != before).any(1), np.isin(np.arange(10), IDS))
    assert model.embed.embedding.shape == (12, 4)
    assert not np.asarray(model.embed.embedding[...])[10:].any()
    moments = nnx.state(optimizers[0])["opt_state"][0]["mu"]["embed"]["embedding"]
    assert moments.sharding.is_equivalent_to(NamedSharding(mesh, P("tp", None)), 2)


def test_a_training_state_is_restored_onto_another_mesh(tmp_path):
    def make(world_size):
        model = Model(Embed, mesh=make_mesh((world_size,)), padded_vocab_size="even")
        return model, nnx.Optimizer(model, ADAM, wrt=nnx.Param)

    model, optimizer = make(4)
    train(model, optimizer, IDS)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", nnx.state((model, optimizer)))
    train(model, optimizer, IDS)
    graphdef, state = nnx.get_abstract_model(lambda: make(8), make_mesh((8,)))
    with ocp.PyTreeCheckpointer() as checkpointer:
        how = ocp.args.PyTreeRestore(state, restore_args(state))
        restored, optimizer = nnx.merge(graphdef, checkpointer.restore(tmp_path / "checkpoint", how))
    assert restored.embed.embedding.shape == (16, 4)
    assert restored.embed.embedding.sharding.spec == P("tp", None)
    train(restored, optimizer, IDS)
    np.testing.assert_array_equal(table_of(restored), table_of(model))
    assert not np.asarray(restored.embed.embedding[...])[10:].any()


@pytest.mark.slow
@pytest.mark.parametrize("padded", [None, "even"])
def test_attend(kind, padded):
    mesh = make_mesh((2,) if padded is None else (4,), kind=kind)
    embed = Embed(10, 4, rngs=nnx.Rngs(0), mesh=mesh, padded_vocab_size=padded)
    query = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    with jax.set_mesh(mesh):
        if kind == "Explicit" and padded:
            with pytest.raises(ValueError, match="num_embeddings must be divisible by 4, .* got 10: use an Auto mesh"):
                embed.attend(query)
            return
        logits = nnx.jit(lambda embed, query: embed.attend(query))(embed, query)
        expected = nnx.Embed(10, 4, rngs=nnx.Rngs(0)).attend(query)
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
        if padded is None:
            assert logits.sharding.spec == P(None, None, "tp")
        gradient = nnx.grad(lambda embed: jnp.sin(embed.attend(query)).sum())(embed)["embedding"][...]
        assert np.asarray(gradient)[:10].any(1).all()
        assert not np.asarray(gradient)[10:].any()


def test_the_layers_own_options(tmp_path):
    mesh = make_mesh(kind="Explicit")
    embed = Embed(12, 4, rngs=nnx.Rngs(0), mesh=mesh, reduction="reduce_scatter", padding_idx=3)
    assert embed(IDS).sharding.spec == P(None, "tp", None)
    assert not np.asarray(embed(IDS))[0, 3].any()
    with jax.set_mesh(mesh):
        assert nnx.jit(lambda embed, ids: embed(ids, P()))(embed, IDS).sharding.is_fully_replicated
    embed.layer.save_table(tmp_path / "table.safetensors")
    read = ParallelVocabEmbedding.from_table(tmp_path / "table.safetensors", mesh=mesh)
    np.testing.assert_array_equal(read.weight, embed.embedding[...])
    assert Embed(12, 4, rngs=nnx.Rngs(0), mesh=mesh, reduction="none")(IDS).shape == (4, 2, 4, 4)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"init": "global"}, ValueError, "options must not draw the table, got init: use embedding_init"),
        ({"paddingidx": 3}, TypeError, "paddingidx"),
        ({"param_dtype": jnp.int32}, TypeError, "dtype must be float16"),
        ({"padded_vocab_size": None}, ValueError, "divisible"),
    ],
)
def test_bad_arguments_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        Embed(10, 4, **{"rngs": nnx.Rngs(0), "mesh": make_mesh(), "padded_vocab_size": "even", **options})
