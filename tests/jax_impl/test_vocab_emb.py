"""Building the layer: what it holds, how it is drawn and padded, what it refuses."""

import copy
import inspect
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import assert_is_right, make_mesh

from jax_impl import ParallelVocabEmbedding
from shared import VocabPartition

IDS = np.array([[0, 9, 10, 11], [2, 3, 3, -1], [12, 5, 9, 8], [8, 8, 0, 1]])  # of 10 rows; 12 is past any padding


def test_the_signature_is_the_promised_one():
    signature = inspect.signature(ParallelVocabEmbedding)
    assert " ".join(str(each.replace(annotation=each.empty)) for each in signature.parameters.values()) == (
        "vocab_size emb_size mesh=None axis_name='tp' init_mean=0.0 init_std=1.0 init_base_seed=42 "
        f"dtype={jnp.float32} reduction='none' exchange='auto' invalid_ids='zero' padding_idx=None "
        "padded_vocab_size=None init='per_rank' seq_dim=-1 check=False key=None"
    )
    keywords = [name for name, each in signature.parameters.items() if each.kind is each.KEYWORD_ONLY]
    assert (keywords[0], len(keywords)) == ("reduction", 9)


@pytest.mark.parametrize(
    ("dtype", "mean", "shape"),
    [(jnp.float16, 0.0, (1,)), (jnp.float32, 0.5, (3,)), (jnp.float64, 0.5, (2,)), (jnp.bfloat16, 0.5, (2, 4))],
)
def test_each_rank_draws_from_its_own_key(mesh_of, dtype, mean, shape):
    mesh = mesh_of(shape, ("dp", "tp")[-len(shape) :])
    with jax.enable_x64(dtype == jnp.float64):
        emb = ParallelVocabEmbedding(8 * shape[-1], 5, mesh, "tp", mean, 0.02, 7, dtype, padding_idx=3)
        keys = [jax.random.key(7 + rank) for rank in range(shape[-1])]
        expected = np.concatenate([mean + 0.02 * jax.random.normal(key, (8, 5), dtype) for key in keys])
    expected[3] = 0
    assert emb.weight.dtype == dtype
    np.testing.assert_array_equal(emb.weight, expected)
    assert emb.weight.sharding == NamedSharding(mesh, P("tp", None))
    assert {shard.data.shape for shard in emb.weight.addressable_shards} == {(8, 5)}


def test_a_random_key_takes_the_place_of_the_seed(mesh_of):
    key = jax.random.key(5)
    emb = ParallelVocabEmbedding(24, 5, mesh_of((3,)), init_std=0.5, key=key)
    expected = [0.5 * jax.random.normal(jax.random.fold_in(key, rank), (8, 5)) for rank in range(3)]
    np.testing.assert_array_equal(emb.weight, np.concatenate(expected))
    np.testing.assert_array_equal(emb(np.arange(3), key=key), emb(np.arange(3)))


def test_it_is_a_pytree_whose_only_leaf_is_the_table(mesh_of, rng):
    emb = ParallelVocabEmbedding(24, 5, mesh_of(), padding_idx=3)
    assert emb.partition == VocabPartition(24, 8)
    assert (emb.vocab_size, emb.emb_size, emb.world_size, emb.axis_name) == (24, 5, 8, "tp")
    assert repr(emb).endswith("(24, 5, axis_name='tp', world_size=8, padding_idx=3, weight=float32[24, 5])")
    assert "weight=None" in repr(jax.tree.map(lambda _: None, emb))
    (((path, leaf),), structure) = jax.tree.flatten_with_path(emb)
    assert leaf is emb.weight
    assert jax.tree_util.keystr(path) == ".weight"
    table = rng.standard_normal((24, 5)).astype(np.float32)
    for other in (jax.tree.map(lambda _: jnp.asarray(table), emb), emb.with_weight(table)):
        assert isinstance(other, ParallelVocabEmbedding)
        assert jax.tree.structure(other) == structure
        assert (other.padding_idx, other.partition) == (3, emb.partition)
        np.testing.assert_array_equal(other.weight, table)
    assert other.weight.sharding == emb.weight.sharding
    for bad in (table[:-1], table.astype(np.float16)):
        with pytest.raises(ValueError, match=r"weight must have shape \(24, 5\) and dtype float32, got"):
            emb.with_weight(bad)


def test_how_a_table_began_is_no_part_of_the_structure(mesh_of, tmp_path):
    """The optimizer's state of a layer drawn from a seed fits one that was read from a file."""
    mesh = mesh_of((2,))
    drawn = ParallelVocabEmbedding(12, 4, mesh, init_mean=1.0, init_std=0.02, init_base_seed=7, init="global")
    drawn.save_table(tmp_path / "table.safetensors")
    read = ParallelVocabEmbedding.from_table(tmp_path / "table.safetensors", mesh=mesh)
    assert jax.tree.structure(drawn) == jax.tree.structure(read)
    assert jax.tree.structure(drawn) != jax.tree.structure(ParallelVocabEmbedding(12, 4, mesh, padding_idx=3))
    moved = jax.tree.map(lambda moment, rows: moment - rows, drawn, read)
    assert not np.asarray(moved.weight).any()
    assert moved.init_base_seed == 7


def test_the_mesh_in_force_is_taken(mesh_of):
    with pytest.raises(ValueError, match="mesh is missing: pass mesh="):
        ParallelVocabEmbedding(24, 5)
    mesh = mesh_of((2, 4), ("dp", "tp"))
    emb = ParallelVocabEmbedding(24, 5)
    assert emb.mesh == mesh
    made_in_jit = jax.jit(lambda: ParallelVocabEmbedding(24, 5))()
    np.testing.assert_array_equal(made_in_jit.weight, emb.weight)
    np.testing.assert_array_equal(made_in_jit(np.arange(24)), emb(np.arange(24)))


def test_an_abstract_layer_has_all_but_the_table(mesh_of):
    mesh = mesh_of((4,))
    arguments = (10, 5, mesh, "tp", 0.0, 0.02, 7, jnp.bfloat16)
    emb = ParallelVocabEmbedding.abstract(*arguments, padded_vocab_size="even", reduction="all_reduce", init="global")
    real = ParallelVocabEmbedding(*arguments, padded_vocab_size="even", reduction="all_reduce", init="global")
    assert emb.weight == jax.ShapeDtypeStruct((12, 5), jnp.bfloat16, sharding=real.weight.sharding)
    assert jax.tree.structure(emb) == jax.tree.structure(real)
    assert emb.config.as_dict() == real.config.as_dict()
    program = jax.jit(lambda emb, ids: emb(ids)).lower(emb, jax.ShapeDtypeStruct((3,), jnp.int32)).compile()
    np.testing.assert_array_equal(program(real, np.arange(3, dtype=np.int32)), np.asarray(real.weight)[:3])
    np.testing.assert_array_equal(emb.with_weight(real.weight)(np.arange(10)), np.asarray(real.weight)[:10])
    assert ParallelVocabEmbedding.abstract(12, 5).mesh == mesh  # the one that is set


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda emb: pickle.loads(pickle.dumps(emb))])
def test_copies(mesh_of, again):
    emb = ParallelVocabEmbedding(10, 5, mesh_of((2, 4), ("dp", "tp")), dtype=jnp.bfloat16, padded_vocab_size="even")
    other = again(emb)
    assert jax.tree.structure(other) == jax.tree.structure(emb)
    assert other.weight.sharding == emb.weight.sharding
    np.testing.assert_array_equal(other.weight, emb.weight)
    np.testing.assert_array_equal(other(np.arange(10)), emb(np.arange(10)))


def test_what_cannot_be_pickled(tmp_path):
    mesh = make_mesh()
    emb = ParallelVocabEmbedding(12, 5, mesh)
    for other in (ParallelVocabEmbedding.abstract(12, 5, mesh), jax.tree.map(lambda _: None, emb)):
        with pytest.raises(TypeError, match=r"keep others with Orbax .* or emb.save_table\(path\)"):
            pickle.dumps(other)
    (tmp_path / "emb.pickle").write_bytes(pickle.dumps(emb))
    program = f"import pickle; pickle.load(open({str(tmp_path / 'emb.pickle')!r}, 'rb'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)  # it has one device
    assert "ValueError: this process must have the 4 cpu devices" in done.stderr
    assert "lacks those with ids [1, 2, 3]" in done.stderr


@pytest.mark.parametrize(
    "transform", [lambda emb, ids: emb(ids), jax.grad(lambda emb, ids: emb(ids).sum())], ids=["forward", "gradient"]
)
def test_misplaced_table_names_with_weight(mesh_of, transform):
    emb = ParallelVocabEmbedding(12, 5, mesh_of((4,)))
    structure, ids = jax.tree.structure(emb), np.arange(12)
    misplaced = jax.tree.unflatten(structure, [jax.device_put(np.asarray(emb.weight), jax.devices()[0])])
    with pytest.raises(ValueError, match=r"must lie on the devices of the layer's mesh, {'tp': 4}: emb.with_weight"):
        transform(misplaced, ids)
    np.testing.assert_array_equal(emb.with_weight(misplaced.weight)(ids), emb(ids))
    short = jax.tree.unflatten(structure, [jnp.asarray(np.asarray(emb.weight)[:8])])
    with pytest.raises(ValueError, match=r"weight must be \[12, 5\], got \[8, 5\]: emb.with_weight"):
        transform(short, ids)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"vocab_size": 50257}, ValueError, "50257 over world_size=8 .* is 50264"),
        ({"vocab_size": 2**31}, ValueError, "vocab_size must fit JAX's int32 indices"),
        ({"padded_vocab_size": 2**31}, ValueError, r"below 2\*\*31, got 2147483648"),
        ({"mesh": "tp"}, TypeError, "mesh must be a jax.sharding.Mesh"),
        ({"axis_name": "model"}, ValueError, r"one of \('tp',\), got 'model'"),
        ({"axis_name": ("tp",)}, TypeError, "axis_name must be a string"),
        ({"dtype": jnp.int32}, TypeError, "dtype must be float16, bfloat16, float32 or float64, got int32"),
        ({"dtype": jnp.float8_e4m3fn}, TypeError, "dtype must be"),
        ({"dtype": "nonsense"}, TypeError, "dtype must be"),
        ({"dtype": jnp.float64}, ValueError, "float64 needs JAX's 64-bit mode"),
        ({"reduction": "sum"}, ValueError, "reduction must be 'none' or 'all_reduce' or .* got 'sum'"),
        ({"key": jax.random.key(0), "init": "global"}, ValueError, "key replaces init_base_seed"),
        ({"key": jax.random.key(0), "init_base_seed": 7}, ValueError, "got init_base_seed=7 .*: leave these two out"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        ParallelVocabEmbedding(**{"vocab_size": 24, "emb_size": 4, "mesh": make_mesh((8,)), **arguments})


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_from_a_table_in_memory(mesh_of, rng, make):
    mesh, table = mesh_of((4,)), rng.standard_normal((10, 3)).astype(np.float32)
    emb = ParallelVocabEmbedding.from_embedding(make(table), mesh, padded_vocab_size="even", padding_idx=7)
    assert emb.weight.sharding.is_equivalent_to(NamedSharding(mesh, P("tp", None)), 2)
    np.testing.assert_array_equal(emb.weight, np.pad(table, ((0, 2), (0, 0))))
    assert emb.padding_idx == 7
    for error, match, given in (
        (TypeError, "table must be a JAX or NumPy array, got list", [[1.0]]),
        (ValueError, r"table must be \[v, e\], got \[4\]", make(np.ones(4, np.float32))),
        (ValueError, "divisible", make(table)),
    ):
        with pytest.raises(error, match=match):
            ParallelVocabEmbedding.from_embedding(given, mesh)


def test_a_callable_is_asked_for_each_devices_rows(mesh_of):
    asked = []

    def init(rows):
        asked.append(rows.shape)
        return jnp.stack([rows, 10 * rows], 1)

    mesh = mesh_of((2, 4), ("dp", "tp"))
    emb = ParallelVocabEmbedding(10, 2, mesh, init=init, padding_idx=7, padded_vocab_size="even")
    assert set(asked) == {(emb.partition.rows_per_rank,)}
    expected = np.zeros((emb.padded_vocab_size, 2), np.float32)
    expected[:10] = np.stack([np.arange(10), 10 * np.arange(10)], 1)
    expected[7] = 0
    np.testing.assert_array_equal(emb.weight, expected)
    assert emb.weight.sharding == NamedSharding(mesh, P("tp", None))
    plain = ParallelVocabEmbedding(10, 2, mesh, padding_idx=7, padded_vocab_size="even")
    assert jax.tree.structure(emb) == jax.tree.structure(plain)
    other = jax.jit(lambda: type(emb)(10, 2, mesh, init=lambda rows: -init(rows), padded_vocab_size="even"))()
    np.testing.assert_array_equal(np.asarray(other.weight)[:7], -expected[:7])  # equal configurations, another callable


def test_initial_values_without_numbers_of_rows():
    mesh = make_mesh()
    zero = ParallelVocabEmbedding(10, 2, mesh, init=None, init_mean=3.0, padded_vocab_size="even")
    np.testing.assert_array_equal(zero.weight, np.zeros((12, 2)))
    emb = ParallelVocabEmbedding(8, 2, mesh, dtype=jnp.bfloat16, init=lambda rows: np.full((2, 2), 0.5))
    np.testing.assert_array_equal(emb.weight, np.full((8, 2), 0.5))
    with pytest.raises(ValueError, match=r"a row for each of the row numbers that it is given, \[2, 2\], got \[2\]"):
        ParallelVocabEmbedding(8, 2, mesh, init=lambda rows: rows)


@pytest.mark.parametrize(
    ("reduction", "exchange"), [("all_reduce", "dense"), ("reduce_scatter", "routed"), ("all_to_all", "dense")]
)
def test_every_reduction_with_padding(reduction, exchange):
    """On 4 ranks, of which the last has padding only, and whatever the padding's rows hold."""
    options = {"padded_vocab_size": 16, "reduction": reduction, "exchange": exchange}
    emb = ParallelVocabEmbedding(10, 3, make_mesh(), **options)
    assert np.asarray(emb.weight)[:10].all()
    assert not np.asarray(emb.weight)[10:].any()
    assert_is_right(emb.with_weight(emb.weight.at[10:].set(jnp.nan)), IDS)


def test_global_numbers_do_not_depend_on_the_layout(mesh_of):
    options = {"init": "global", "init_std": 0.02, "padding_idx": 4}
    plain = np.asarray(ParallelVocabEmbedding(10, 3, mesh_of((1,)), **options).weight)
    assert (plain.any(1) == (np.arange(10) != 4)).all()
    mesh = mesh_of((2, 4), ("dp", "tp"))
    for padded in ("even", 32):
        make = lambda padded=padded: ParallelVocabEmbedding(10, 3, mesh, padded_vocab_size=padded, **options)  # noqa: E731
        for table in (make().weight, jax.jit(make)().weight):
            np.testing.assert_array_equal(table, np.pad(plain, ((0, len(table) - 10), (0, 0))))


def test_a_head_of_the_callers_own():
    """It trains padding rows, and no others that it should not, unless their gradient is removed."""
    emb = ParallelVocabEmbedding(10, 3, make_mesh(), padded_vocab_size=16, padding_idx=9)

    @jax.jit
    def gradients(emb):
        grads = jax.grad(lambda emb: (emb(IDS) ** 2).sum() + jax.nn.logsumexp(jnp.ones(3) @ emb.weight.T))(emb)
        return grads, emb.zero_padding_grad(grads)

    given, kept = gradients(emb)
    assert np.asarray(given.weight)[9:].all()
    for found in (kept, emb.zero_padding_grad(given)):
        np.testing.assert_array_equal(found.weight, np.asarray(given.weight) * (np.arange(16) < 10)[:, None])
