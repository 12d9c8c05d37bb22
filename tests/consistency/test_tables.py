"""Tables in files: both frameworks load just what is there, over any number of ranks, and load what the other wrote."""

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import torch.distributed as dist
from marks import slower
from table_files import bits, memory_growth, save, save_index, save_zeros

from jax_impl import ParallelVocabEmbedding as JaxEmbedding
from shared import VocabPartition
from shared.bits import DTYPES, STORED_DTYPES, cast
from shared.tables.find_table import open_table
from shared.tables.table_writer import convert_table
from torch_impl import ParallelVocabEmbedding as TorchEmbedding


@pytest.fixture
def values(rng):
    return rng.standard_normal((30, 6)).astype(np.float32)


def mesh_of(*sizes):
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, ("dp", "tp")[-len(sizes) :], auto, devices=jax.devices()[: np.prod(sizes)])


LOADS = [
    TorchEmbedding.from_table,
    lambda *arguments, **options: JaxEmbedding.from_table(*arguments, mesh=mesh_of(1), **options),
]


def bits_of(rows):
    """The bytes of an array or a tensor: NumPy has not all dtypes of tensors."""
    return bits(rows.detach().contiguous().view(torch.uint8) if isinstance(rows, torch.Tensor) else rows)


def assert_loaded(path, world_size, expected, **options):
    """Each rank of both frameworks has just the rows it owns, of ``expected``, and zeros after them."""
    partition, of_jax = VocabPartition(len(expected), world_size, "even"), {}
    if world_size <= len(jax.devices()):
        layer = JaxEmbedding.from_table(path, mesh=mesh_of(world_size), padded_vocab_size="even", **options)
        assert layer.partition == partition
        of_jax = {shard.index[0].start or 0: shard.data for shard in layer.weight.addressable_shards}
        assert len(of_jax) == world_size
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    for rank in range(world_size):
        start, stop = partition.owned_range(rank)
        module = TorchEmbedding.from_table(path, None, rank, world_size, padded_vocab_size="even", **options)
        assert (module.partition, module.rank) == (partition, rank)
        for rows in (module.weight, *([of_jax[partition.start(rank)]] if of_jax else [])):
            np.testing.assert_array_equal(bits_of(rows[: stop - start]), bits(expected[start:stop]))
            assert not bits_of(rows[stop - start :]).any()


@pytest.mark.parametrize("stored", STORED_DTYPES)
def test_every_stored_dtype_and_cast(tmp_path, rng, stored):
    values = cast(rng.standard_normal((30, 6)), STORED_DTYPES[stored])
    path = save(tmp_path / "source.safetensors", {"wte.weight": values})
    with jax.enable_x64(True):
        if stored in DTYPES:
            assert_loaded(path, 4, values)
        else:
            for load in LOADS:
                with pytest.raises(ValueError, match=f"dtype must say what to cast a table of {stored} to"):
                    load(path)
        for dtype in DTYPES:
            assert_loaded(path, 4, cast(values, DTYPES[dtype]), dtype=dtype)


def test_checkpoints_and_parts_for_other_ranks_load(tmp_path, values):
    files = {
        "model-1.safetensors": {"model.layers.0.weight": np.ones((6, 6), np.float32)},
        "model-2.safetensors": {"model.embed_tokens.weight": values},
    }
    index = save_index(tmp_path / "model.safetensors.index.json", files)
    for path, world_size in ((tmp_path, 4), (index, 1), (str(tmp_path), 64)):  # 64 in PyTorch only
        assert_loaded(path, world_size, values)
    parts = convert_table(open_table(index), tmp_path / "parts", VocabPartition(30, 4, 40))
    for path, world_size in ((tmp_path / "parts", 1), (tmp_path / "parts", 8), (parts, 3)):
        assert_loaded(path, world_size, values, vocab_size=30)


def test_both_refuse_damaged_tables_and_bad_arguments(tmp_path, values):
    path = save(tmp_path / "t.safetensors", {"wte.weight": values.astype(np.float64)})
    short = tmp_path / "short.safetensors"
    short.write_bytes(path.read_bytes()[:-1])
    for load in LOADS:
        with pytest.raises(ValueError, match="short.safetensors: not a whole safetensors file"):
            load(short)
        with pytest.raises(ValueError, match="no tensor 'lm_head' in it; there are: wte.weight"):
            load(path, "lm_head")
        with pytest.raises(ValueError, match="vocab_size must be that of the table: asked for 31"):
            load(path, vocab_size=31)
        with pytest.raises(TypeError, match="path must be a path"):
            load(3)
    with pytest.raises(ValueError, match="jax_enable_x64"):
        JaxEmbedding.from_table(path, mesh=mesh_of(1))
    padded = 'next size that divides is 32: pass padded_vocab_size=32 or padded_vocab_size="even"'
    with pytest.raises(ValueError, match=padded):
        TorchEmbedding.from_table(path, rank=0, world_size=8)
    with pytest.raises(ValueError, match=padded):
        JaxEmbedding.from_table(path, mesh=mesh_of(8), dtype="float32")


def save_from_a_group(folder):
    """On each rank: a table of 30 rows, padded."""
    options = {"dtype": torch.bfloat16, "padded_vocab_size": 40, "init": "global", "reduction": "all_reduce"}
    emb = TorchEmbedding(30, 6, process_group=dist.group.WORLD, **options)
    emb.save_table(f"{folder}/table.safetensors", "wte.weight")
    for name, tensor, says in (
        ("table", "wte.weight", "exists; pass --force .force=True. to replace it"),
        ("new", f"of rank {emb.rank}", "the processes disagree about table: "),
    ):
        with pytest.raises(ValueError, match=says):
            emb.save_table(f"{folder}/{name}.safetensors", tensor)


def test_torch_ranks_write_together_and_jax_reads(tmp_path, world):
    expected = TorchEmbedding(30, 6, dtype=torch.bfloat16, init="global").weight
    world(2)(save_from_a_group, str(tmp_path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.safetensors"]
    expected = expected.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    for world_size in (1, 3, 8):
        assert_loaded(tmp_path / "table.safetensors", world_size, expected)


@pytest.mark.parametrize("shape", [(8,), (2, 3)])
def test_jax_writes_and_torch_reads(tmp_path, shape):
    emb = JaxEmbedding(30, 6, mesh_of(*shape), padded_vocab_size="even", padding_idx=3)
    path = tmp_path / "table.safetensors"
    emb.save_table(path)
    with pytest.raises(ValueError, match="exists; pass --force"):
        emb.save_table(path)
    emb.save_table(path, force=True)
    for world_size in (1, 7):
        assert_loaded(path, world_size, np.asarray(emb.weight)[:30])
    assert open_table(path).tensor == "embed_tokens.weight"


def test_what_is_not_there_whole_is_not_saved(tmp_path):
    path, layer = tmp_path / "set.safetensors", JaxEmbedding(32, 6, mesh_of(4))
    with pytest.raises(ValueError, match="process_group must be given: the layer has 4 ranks"):
        TorchEmbedding(32, 6, 1, 4).save_table(path)
    with pytest.raises(ValueError, match="the table must have storage to be saved"):
        TorchEmbedding(32, 6, device="meta").save_table(path)
    with pytest.raises(ValueError, match="the table must be an array to be saved, outside jit, got ShapeDtypeStruct"):
        jax.eval_shape(lambda: layer).save_table(path)
    with pytest.raises(ValueError, match="the table must be an array to be saved, outside jit"):
        jax.jit(lambda layer: layer.save_table(path))(layer)
    assert not path.exists()


@pytest.mark.parametrize("dtype", DTYPES)
def test_global_numbers_are_the_same_in_both(dtype):
    init = {"init": "global", "init_std": 0.02, "init_mean": 0.5}
    of_torch = {**init, "dtype": getattr(torch, dtype)}
    expected = TorchEmbedding(30, 6, **of_torch).weight
    assert expected.any()
    with jax.enable_x64(True):
        layer = JaxEmbedding(30, 6, mesh_of(8), dtype=dtype, padded_vocab_size="even", **init)
        np.testing.assert_array_equal(bits(layer.weight[:30]), bits_of(expected))
    ranks = [TorchEmbedding(30, 6, rank, 7, padded_vocab_size=70, **of_torch).weight for rank in range(7)]
    assert torch.equal(torch.cat(ranks)[:30], expected)


LOAD = {
    "torch": """
import torch
from torch_impl import ParallelVocabEmbedding
path, dtype = sys.argv[1:]
growth_of(lambda: ParallelVocabEmbedding.from_table(path, rank=3, world_size=8, dtype=getattr(torch, dtype)))
""",
    "jax": """
import jax
jax.config.update("jax_num_cpu_devices", 8)
mesh = jax.make_mesh((8,), ("tp",))
from jax_impl import ParallelVocabEmbedding
path, dtype = sys.argv[1:]
jax.device_put(1.0).block_until_ready()  # what is set up at first use is there from now on
jax.eval_shape(lambda: ParallelVocabEmbedding(8, 2, mesh))
growth_of(lambda: ParallelVocabEmbedding.from_table(path, mesh=mesh, dtype=dtype))
""",
}


@pytest.mark.parametrize(("backend", "dtype"), [("torch", "float32"), slower("torch", "bfloat16"), ("jax", "float32")])
def test_memory_of_loading_is_that_of_the_rows(tmp_path, backend, dtype):
    """A file of 8 ranks' rows: torch reads one rank's, this one JAX process all of its devices' and no more than once."""
    rows, emb_size = 8 * 8192, 1024
    (growth,) = memory_growth(LOAD[backend], save_zeros(tmp_path / "table.safetensors", rows, emb_size), dtype)
    size = rows * emb_size * np.dtype(DTYPES[dtype]).itemsize // (8 if backend == "torch" else 1)
    assert size <= growth < 1.5 * size
