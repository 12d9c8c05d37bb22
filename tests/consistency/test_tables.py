"""Tables in files: both frameworks load just what is there, over any number of ranks, and load what the other wrote."""

import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import save_file

from jax_impl import ParallelVocabEmbedding as JaxEmbedding
from shared import VocabPartition
from shared.bits import DTYPES, STORED_DTYPES, cast, unsigned_view
from shared.tables.find_table import open_table
from shared.tables.table_writer import convert_table
from shared.tables.tensor_file import header_bytes
from torch_impl import ParallelVocabEmbedding as TorchEmbedding

WORLD_SIZES = [8, *(pytest.param(world_size, marks=pytest.mark.slow) for world_size in (1, 2, 3, 7))]


@pytest.fixture(scope="module")
def tables(tmp_path_factory, wordllama):
    """A trained table, 32000 x 256 in float16, and a made-up one of GPT-2's sizes in bfloat16, beside its other tensors."""
    folder = tmp_path_factory.mktemp("gpt2")
    values = np.random.default_rng(0).integers(0, 2**16, (50257, 768), np.uint16).view(ml_dtypes.bfloat16)
    others = {"wpe.weight": np.zeros((1024, 8), np.float32), "ln_f.bias": np.zeros(768, np.float32)}
    save_file({"wte.weight": values, **others}, folder / "model.safetensors")
    trained = wordllama / "weights" / "l2_supercat_256.safetensors"
    return {"trained": trained, "gpt2": folder}


def mesh_of(world_size):
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((world_size,), ("tp",), auto, devices=jax.devices()[:world_size])


def bits(rows):
    if isinstance(rows, torch.Tensor):
        rows = rows.detach().contiguous().view(torch.uint8).numpy()
    return np.ascontiguousarray(rows).reshape(-1).view(np.uint8)


def assert_loaded(path, world_size, expected, **options):
    """Each rank of both frameworks has just the rows it owns, of ``expected``, and zeros after them."""
    partition = VocabPartition(len(expected), world_size, "even")
    layer = JaxEmbedding.from_table(path, mesh=mesh_of(world_size), padded_vocab_size="even", **options)
    assert layer.partition == partition
    by_start = {shard.index[0].start or 0: shard.data for shard in layer.weight.addressable_shards}
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    for rank in range(world_size):
        start, stop = partition.owned_range(rank)
        module = TorchEmbedding.from_table(path, None, rank, world_size, padded_vocab_size="even", **options)
        assert (module.partition, module.rank) == (partition, rank)
        for rows in (module.weight, by_start[rank * partition.rows_per_rank]):
            np.testing.assert_array_equal(bits(rows[: stop - start]), bits(expected[start:stop]))
            assert not bits(rows[stop - start :]).any()


@pytest.mark.parametrize("name", ["trained", "gpt2"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_rank_has_its_rows_of_the_file(tables, name, world_size):
    table = open_table(tables[name])
    assert_loaded(tables[name], world_size, table.rows(0, table.vocab_size))


SIXTY_FOUR = """
import sys
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", 64)
from jax_impl import ParallelVocabEmbedding
from shared.tables.find_table import open_table
mesh = jax.make_mesh((64,), ("tp",))
for path in sys.argv[1:]:
    table = open_table(path)
    emb = ParallelVocabEmbedding.from_table(path, mesh=mesh, padded_vocab_size="even")
    rows = np.asarray(emb.weight).view(np.uint16)
    assert np.array_equal(rows[: table.vocab_size], table.rows(0, table.vocab_size).view(np.uint16))
    assert not rows[table.vocab_size :].any()
    ids = np.random.default_rng(0).integers(-2, table.vocab_size + 2, 256)
    ids[:4] = [0, table.vocab_size - 1, table.vocab_size, emb.padded_vocab_size - 1]
    owned = (ids >= 0) & (ids < table.vocab_size)
    found = np.asarray(emb(ids)).view(np.uint16)
    assert np.array_equal(np.bitwise_or.reduce(found), np.where(owned[:, None], rows[ids * owned], 0))
"""


def test_sixty_four_ranks(tables):
    subprocess.run([sys.executable, "-c", SIXTY_FOUR, *map(str, tables.values())], check=True)
    for path in tables.values():
        table = open_table(path)
        partition = VocabPartition(table.vocab_size, 64, "even")
        for rank in range(64):
            module = TorchEmbedding.from_table(path, None, rank, 64, padded_vocab_size="even")
            start, stop = partition.owned_range(rank)
            np.testing.assert_array_equal(bits(module.weight[: stop - start]), bits(table.rows(start, stop)))
            assert not module.weight[stop - start :].any()


@pytest.mark.parametrize("stored", STORED_DTYPES)
def test_every_stored_dtype_and_cast(tmp_path, rng, stored):
    values = cast(rng.standard_normal((30, 6)), STORED_DTYPES[stored])
    path = tmp_path / "source.safetensors"
    path.write_bytes(header_bytes("wte.weight", stored, values.shape, {}) + values.tobytes())
    with jax.enable_x64(True):
        if stored in DTYPES:
            assert_loaded(path, 4, values)
        else:
            for load in (TorchEmbedding.from_table, lambda path: JaxEmbedding.from_table(path, mesh=mesh_of(1))):
                with pytest.raises(ValueError, match=f"dtype must say what to cast a table of {stored} to"):
                    load(path)
        for dtype in DTYPES:
            assert_loaded(path, 4, cast(values, DTYPES[dtype]), dtype=dtype)


def test_a_table_spread_over_a_checkpoint(tmp_path, rng):
    values = rng.standard_normal((30, 6)).astype(np.float32)
    save_file({"model.layers.0.weight": np.ones((6, 6), np.float32)}, tmp_path / "model-1.safetensors")
    save_file({"model.embed_tokens.weight": values}, tmp_path / "model-2.safetensors")
    weight_map = {"model.layers.0.weight": "model-1.safetensors", "model.embed_tokens.weight": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for path in (tmp_path, tmp_path / "model.safetensors.index.json", str(tmp_path)):
        assert_loaded(path, 4, values)


def test_parts_written_for_other_ranks_load(tmp_path, rng):
    values = rng.standard_normal((30, 6)).astype(np.float32)
    save_file({"emb.weight": values}, tmp_path / "source.safetensors")
    parts = convert_table(open_table(tmp_path / "source.safetensors"), tmp_path / "parts", VocabPartition(30, 4, 40))
    for path, world_size in ((tmp_path / "parts", 1), (tmp_path / "parts", 8), (parts, 3)):
        assert_loaded(path, world_size, values, vocab_size=30)


def test_a_size_that_does_not_divide_needs_padding(tables):
    with pytest.raises(
        ValueError, match='next size that divides is 50264: pass padded_vocab_size=50264 or padded_vocab_size="even"'
    ):
        TorchEmbedding.from_table(tables["gpt2"], rank=0, world_size=8)
    with pytest.raises(ValueError, match="next size that divides is 50264"):
        JaxEmbedding.from_table(tables["gpt2"], mesh=mesh_of(8))


def test_both_refuse_a_damaged_table_and_bad_arguments(tmp_path, rng):
    save_file({"wte.weight": rng.standard_normal((30, 6))}, tmp_path / "t.safetensors")
    data = (tmp_path / "t.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(data[:-1])
    for load in (TorchEmbedding.from_table, lambda *a, **k: JaxEmbedding.from_table(*a, mesh=mesh_of(1), **k)):
        with pytest.raises(ValueError, match="short.safetensors: not a whole safetensors file"):
            load(tmp_path / "short.safetensors")
        with pytest.raises(ValueError, match="no tensor 'lm_head' in it; there are: wte.weight"):
            load(tmp_path / "t.safetensors", "lm_head")
        with pytest.raises(ValueError, match="no such file or folder"):
            load(tmp_path / "nothing")
        with pytest.raises(ValueError, match="vocab_size must be that of the table: asked for 31"):
            load(tmp_path / "t.safetensors", vocab_size=31)
        with pytest.raises(TypeError, match="path must be a path"):
            load(3)
    with pytest.raises(ValueError, match="jax_enable_x64"):
        JaxEmbedding.from_table(tmp_path / "t.safetensors", mesh=mesh_of(1))


def save_from_a_group(folder):
    """On each rank: a table of 30 rows, padded."""
    emb = TorchEmbedding(
        30,
        6,
        process_group=dist.group.WORLD,
        dtype=torch.bfloat16,
        padded_vocab_size=40,
        init="global",
        reduction="all_reduce",
    )
    emb.save_table(f"{folder}/table.safetensors", "wte.weight")
    refusals = []
    for name, tensor in (
        ("table.safetensors", "wte.weight"),
        ("new.safetensors", f"of rank {emb.rank}"),
        ("no/table.safetensors", "wte.weight"),
        ("table", "wte.weight"),
    ):
        try:
            emb.save_table(f"{folder}/{name}", tensor)
        except ValueError as error:
            refusals.append(str(error))
    return refusals


def test_torch_ranks_write_together_and_jax_reads(tmp_path, world):
    expected = TorchEmbedding(30, 6, dtype=torch.bfloat16, init="global").weight
    for refusals in world(2)(save_from_a_group, str(tmp_path)):
        assert "table.safetensors: exists; pass --force (force=True) to replace it" in refusals[0]
        assert "the processes disagree about table: " in refusals[1]
        assert "its folder does not exist" in refusals[2]
        assert "end its name in .safetensors" in refusals[3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.safetensors"]
    expected = expected.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    for world_size in (1, 3, 8):
        assert_loaded(tmp_path / "table.safetensors", world_size, expected)


@pytest.mark.parametrize("shape", [(4,), (2, 3), (8,)])
def test_jax_writes_and_torch_reads(tmp_path, shape):
    names = ("dp", "tp")[-len(shape) :]
    mesh = jax.make_mesh(shape, names, devices=jax.devices()[: int(np.prod(shape))])
    emb = JaxEmbedding(30, 6, mesh, padded_vocab_size="even", padding_idx=3)
    expected = np.asarray(emb.weight)[:30]
    path = tmp_path / "table.safetensors"
    emb.save_table(path)
    with pytest.raises(ValueError, match="exists; pass --force"):
        emb.save_table(path)
    emb.save_table(path, force=True)
    for world_size in (1, 7):
        assert_loaded(path, world_size, expected)
    assert open_table(path).tensor == "embed_tokens.weight"


def test_one_torch_rank_alone_cannot_write_for_all(tmp_path):
    with pytest.raises(ValueError, match="process_group must be given: the layer has 4 ranks"):
        TorchEmbedding(32, 6, 1, 4).save_table(tmp_path / "set.safetensors")


def test_what_has_no_rows_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="the table must have storage to be saved"):
        TorchEmbedding(32, 6, device="meta").save_table(tmp_path / "set.safetensors")
    layer = JaxEmbedding(32, 6, mesh_of(4))
    with pytest.raises(ValueError, match="the table must be an array to be saved, outside jit, got ShapeDtypeStruct"):
        jax.eval_shape(lambda: layer).save_table(tmp_path / "set.safetensors")
    with pytest.raises(ValueError, match="the table must be an array to be saved, outside jit"):
        jax.jit(lambda layer: layer.save_table(tmp_path / "set.safetensors"))(layer)
    assert not (tmp_path / "set.safetensors").exists()


@pytest.mark.parametrize("dtype", DTYPES)
def test_global_numbers_are_the_same_in_both(dtype):
    expected = TorchEmbedding(30, 6, dtype=getattr(torch, dtype), init="global", init_std=0.02, init_mean=0.5).weight
    with jax.enable_x64(True):
        layer = JaxEmbedding(
            30, 6, mesh_of(8), dtype=dtype, init="global", init_std=0.02, init_mean=0.5, padded_vocab_size="even"
        )
        np.testing.assert_array_equal(bits(np.asarray(layer.weight)[:30]), bits(expected))
    ranks = [
        TorchEmbedding(
            30, 6, r, 7, dtype=getattr(torch, dtype), init="global", init_std=0.02, init_mean=0.5, padded_vocab_size=70
        )
        for r in range(7)
    ]
    assert torch.equal(torch.cat([rank.weight for rank in ranks])[:30], expected)
    assert unsigned_view(np.asarray(layer.weight)).any()


PEAK = """
import sys
backend, path = sys.argv[1:3]
if backend == "torch":
    import torch
    from torch_impl import ParallelVocabEmbedding
    load = lambda: ParallelVocabEmbedding.from_table(path, rank=3, world_size=8, dtype=getattr(torch, sys.argv[3]))
else:
    import jax
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = jax.make_mesh((8,), ("tp",))
    from jax_impl import ParallelVocabEmbedding
    load = lambda: ParallelVocabEmbedding.from_table(path, mesh=mesh, dtype=sys.argv[3])
    jax.device_put(1.0).block_until_ready()
    jax.eval_shape(lambda: ParallelVocabEmbedding(8, 2, mesh))
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
def now():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) * 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = now()
emb = load()
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", "float32"), pytest.param("torch", "bfloat16", marks=pytest.mark.slow), ("jax", "float32")],
)
def test_memory_of_loading_is_that_of_the_rows(tmp_path, backend, dtype):
    """A file of 8 ranks' rows: torch reads one rank's, this one JAX process all of its devices' and no more than once."""
    rows, emb_size = 8 * 8192, 1024
    path = tmp_path / "table.safetensors"
    header = header_bytes("wte.weight", "float32", (rows, emb_size), {})
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + rows * emb_size * 4)  # zeros that take no room on the disk
    done = subprocess.run(
        [sys.executable, "-c", PEAK, backend, str(path), dtype], capture_output=True, text=True, check=True
    )
    size = rows * emb_size * np.dtype(DTYPES[dtype]).itemsize // (8 if backend == "torch" else 1)
    assert size <= int(done.stdout) < 1.5 * size
