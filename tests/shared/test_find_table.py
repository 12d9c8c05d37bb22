"""Every way to name a table leads to that table or to an error, and of it only what is asked for is read."""

import os
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from table_files import any_bits, assert_same, save, save_index, save_parts, save_zeros

from shared import VocabPartition
from shared.bits import STORED_DTYPES, cast
from shared.checks import printable
from shared.tables import table_file
from shared.tables.find_table import open_table
from shared.tables.table_writer import convert_table


@pytest.fixture
def values(rng):
    return any_bits(rng, 24, 5, np.float32)


# Paths

RIGHT, WRONG, OTHER = "the table", "another table of its name", "wpe.weight"
FORMS = [
    ("weights.2024", {"weights.2024": RIGHT}),
    ("\udcff.safetensors", {"\udcff.safetensors": RIGHT}),  # a name that is not UTF-8
    ("any.index.json", {"any.index.json": {"a.safetensors": OTHER, "b.safetensors": RIGHT}}),
    ("", {"model.safetensors.index.json": {"one/a.safetensors": OTHER, "two/a.safetensors": RIGHT}}),
    ("", {"model.fp16.safetensors.index.json": {"fp16.safetensors": RIGHT}, "model.safetensors": WRONG}),
    ("", {"old.safetensors.index.json": {"b": WRONG}, "model.safetensors.index.json": {"a": RIGHT}}),
    ("", {"any name.safetensors": RIGHT, "pytorch_model.bin": OTHER, "config.json": OTHER}),
    ("", {"adapter_model.safetensors": WRONG, "model.safetensors": RIGHT}),
]
"""What is opened, and the files that are there, with the files of each index."""


@pytest.fixture(params=FORMS, ids=lambda form: ascii([form[0], *form[1]]))
def form(request, tmp_path, values):
    """The path to open, in a folder of its own."""
    name, files = request.param
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    tables = {RIGHT: {"wte.weight": values}, WRONG: {"wte.weight": values[::-1]}, OTHER: {"wpe.weight": values[::-1]}}
    for file, held in files.items():
        if isinstance(held, dict):
            save_index(folder / file, {each: tables[held[each]] for each in held})
        else:
            save(folder / file, tables[held])
    return folder / name


def test_every_form_of_path_opens_the_table(form, values, monkeypatch):
    monkeypatch.chdir(form.parent)
    for given in (form, str(form), Path(form.name)):
        table = open_table(given)
        assert (table.tensor, table.dtype, table.vocab_size, table.emb_size) == ("wte.weight", "float32", 24, 5)
        assert_same(table.rows(0, 24), values)
    assert_same(open_table(form, "wte.weight", 24).rows(7, 9), values[7:9])
    with pytest.raises(ValueError, match="vocab_size must be that of the table: asked for 25, .* has 24"):
        open_table(form, vocab_size=25)
    for name in ("WTE.weight", ""):
        with pytest.raises(ValueError, match=f"no tensor '{name}' in it; there are: .*wte.weight"):
            open_table(form, name)


def test_a_cache_of_links_opens(form, values, tmp_path):
    """As the Hugging Face hub keeps a checkpoint: links whose names say what they are, to files whose names do not."""
    for number, path in enumerate([each for each in (tmp_path / "checkpoint").rglob("*") if each.is_file()]):
        path.rename(tmp_path / str(number))
        path.symlink_to(tmp_path / str(number))
    assert_same(open_table(form).rows(0, 24), values)


def test_missing_bad_or_ambiguous_path_is_named(tmp_path, values):
    for folder in ("empty", "two"):
        (tmp_path / folder).mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        save(tmp_path / "two" / name, {"wte.weight": values})
    for name, match in {
        "nothing": "no such file or folder",
        "a\0b": "no such file or folder",
        "x" * 300: "",
        "empty": "no safetensors file in it",
        "two": "name the file to use; there are a.safetensors, b.safetensors$",
    }.items():
        with pytest.raises(ValueError, match=f"{re.escape(printable(name))}: {match}"):
            open_table(tmp_path / name)


@pytest.mark.parametrize(
    ("error", "match", "path", "options"),
    [
        (TypeError, "path must be a path or a list of paths, got NoneType", None, {}),
        (TypeError, "path must be a path or a list of paths, got bytes", b"t", {}),
        (TypeError, "int", [3], {"vocab_size": 3}),
        (ValueError, "path must name at least one file, got an empty list", [], {"vocab_size": 3}),
        (TypeError, "tensor_name must be a string or None", "t", {"tensor_name": b"wte.weight"}),
        (TypeError, "vocab_size must be an integer", "t", {"vocab_size": 24.0}),
        (ValueError, "vocab_size must be at least 1", "t", {"vocab_size": 0}),
    ],
)
def test_bad_arguments_are_refused(tmp_path, values, monkeypatch, error, match, path, options):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "t", {"wte.weight": values})
    with pytest.raises(error, match=match):
        open_table(path, **options)


# Tensors

# fmt: off
INPUT_EMBEDDINGS = (
    "model.embed_tokens.weight", "transformer.wte.weight", "bert.embeddings.word_embeddings.weight", "shared.weight",
    "gpt_neox.embed_in.weight", "embedder.input_embedding", "token_embedder.embedding", "tok_embeddings.weight",
    "embedding.weight", "token_embd.weight", "transformer.word_embedding.weight", "params/Embed_0/embedding",
    "text_model.embeddings.token_embedding.weight", "backbone.embeddings.weight",
)
OTHERS = (
    "lm_head.weight", "output_layer.weight", "embed_out.weight", "decoder.logits_dense.kernel", "wpe.weight",
    "cls.predictions.decoder.weight", "bert.embeddings.position_ids", "bert.embeddings.token_type_embeddings.weight",
    "deberta.encoder.rel_embeddings.weight", "model.decoder.embed_positions.weight", "params/Dense_0/kernel",
    "decoder.position_embedder.embedding", "embedding.position_embeddings.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "model.layers.0.self_attn.q_proj.weight",
    "transformer.word_embeddings_layernorm.weight:1", "deberta.embeddings.LayerNorm.weight:1", "h.0.attn.bias:4",
    "cls.predictions.bias:1", "transformer.mask_emb:3", "vision_model.embeddings.class_embedding:1",
    "vision_model.embeddings.patch_embedding.weight:4",
)
# fmt: on


def saved_both_ways(tmp_path, tensors):
    """A file of the tensors, and an index with a file for each."""
    index = save_index(tmp_path / "i.json", {f"{n}.safetensors": {t: tensors[t]} for n, t in enumerate(tensors)})
    return save(tmp_path / "all", tensors), index


@pytest.mark.parametrize("name", INPUT_EMBEDDINGS)
def test_input_embedding_of_known_models_is_found(tmp_path, values, name):
    """Among tensors of all of them; 2-D ones where no number of dimensions is given."""
    sizes = (other.partition(":") for other in OTHERS)
    others = {other: np.ones((2, 3, 4, 5)[: int(ndim or 2)], np.float32) for other, _, ndim in sizes}
    for path in saved_both_ways(tmp_path, {**others, name: values}):
        assert open_table(path).tensor == name
        assert_same(open_table(path).rows(0, 24), values)


def test_several_candidates_are_listed_and_can_be_named(tmp_path, values):
    """BART's three, one of which is meant."""
    three = ["model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"]
    tensors = {name: values + np.float32(n) for n, name in enumerate([*three, "model.encoder.layers.0.fc1.weight"])}
    for path in saved_both_ways(tmp_path, tensors):
        says = f"pass tensor_name; several look like an input embedding: {', '.join(three)}$"
        with pytest.raises(ValueError, match=says):
            open_table(path)
        for name in tensors:
            assert_same(open_table(path, name).rows(0, 24), tensors[name])


def test_the_only_table_is_found_unless_it_is_a_head(tmp_path, values):
    for path in saved_both_ways(tmp_path, {"anything": values}):
        assert open_table(path).tensor == "anything"
    for others in ([], ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"]):
        for path in saved_both_ways(tmp_path, {"lm_head.weight": values, **dict.fromkeys(others, values)}):
            with pytest.raises(ValueError, match="pass tensor_name; none looks like .* in it: .*lm_head.weight"):
                open_table(path)


def test_long_lists_of_candidates_are_cut(tmp_path):
    for path in saved_both_ways(tmp_path, {f"blocks.{n}.embedding": np.ones((2, 2), np.float32) for n in range(30)}):
        for name, says in (("absent", "no tensor"), (None, "several look")):
            with pytest.raises(ValueError, match=rf"{says} .* blocks.0.embedding, .*blocks.19.embedding and 10 more$"):
                open_table(path, name)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((6,), "f4"), ((1, 2, 3), "f4"), ((), "f4"), ((0, 3), "f4"), ((3, 0), "f4"), ((2, 3), "i8")]
)
def test_tensor_that_is_no_table_is_refused(tmp_path, shape, dtype):
    path = save(tmp_path / "t", {"wte.weight": np.ones(shape, dtype)})
    says = r"tensor 'wte.weight' must be a 2-D table of float16, .*, got \w+ "
    with pytest.raises(ValueError, match=says + re.escape(f"{list(shape)}") + "$"):
        open_table(path, "wte.weight")
    with pytest.raises(ValueError, match="none looks like an input embedding. .* in it: none$"):
        open_table(path)


def test_stale_index_is_refused(tmp_path, values):
    path = save_index(tmp_path / "i.json", {"a.safetensors": {"wte.weight": values}})
    save(tmp_path / "a.safetensors", {"wpe.weight": values})
    with pytest.raises(ValueError, match=r"a.safetensors: no tensor 'wte.weight' in it; there are: wpe.weight$"):
        open_table(path)


# Rows


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_every_dtype_bit_for_bit_from_any_byte_on(tmp_path, rng, dtype):
    values = any_bits(rng, 40, 7, STORED_DTYPES[dtype])
    for before in range(9):
        tensors = {"mask": np.ones(before, np.uint8), "wte.weight": values, "wpe.weight": values[::-1].copy()}
        path = save(tmp_path / "t", tensors)
        table = open_table(path)
        assert (table.dtype, table.row_bytes) == (dtype, 7 * values.itemsize)
        assert_same(table.rows(0, 40), values)
        assert_same(open_table(path, "wpe.weight").rows(1, 5), values[::-1][1:5])
        if not dtype.startswith("float8"):  # which safetensors does not hand to NumPy
            assert_same(load_file(path)["wte.weight"], values)


def written(target, values, partition):
    """A table in the files that we write: one, or a part for each rank."""
    source = open_table(save(target.parent / "source", {"wte.weight": values}))
    convert_table(source, target, partition)
    return open_table(target, vocab_size=24)


@pytest.fixture(params=[None, VocabPartition(24, 5, 40)], ids=["file", "parts"])
def table(request, tmp_path, values):
    return written(tmp_path / "t.safetensors", values, request.param)


def test_any_range_of_rows_and_none_outside_the_table(table, values):
    for start in range(25):
        for stop in range(start, 25):
            assert_same(table.rows(start, stop), values[start:stop])
    for start, stop in [(-1, 3), (0, 25), (25, 25), (5, 4), (-(2**70), 0), (0, 2**70)]:
        with pytest.raises(IndexError, match=rf"rows \[{start}, {stop}\) leave the table's \[0, 24\)"):
            table.rows(start, stop)
    out = np.full((4, 5), 7, np.float64)
    with pytest.raises(IndexError, match="leave the table"):
        table.read_rows(22, out)
    assert (out == 7).all()


def test_memory_of_another_shape_or_layout_is_refused(tmp_path, table):
    column = open_table(save(tmp_path / "column", {"wte.weight": np.ones((3, 1), np.float32)}))
    shapes = [(4, 6), (4, 1), (2, 5, 2), (20,), ()]
    for source, shape in [*((table, shape) for shape in shapes), (column, (3, 4))]:  # a column is not repeated
        with pytest.raises(ValueError, match="out must "):
            source.read_rows(0, np.zeros(shape))
    for out in (np.zeros((4, 10))[:, ::2], np.zeros((5, 4)).T):
        with pytest.raises(ValueError, match="out must be C-contiguous"):
            table.read_rows(0, out)


@pytest.mark.parametrize("cast_bytes", [1, 64, 1 << 20])
def test_rows_into_memory_of_every_dtype(table, values, cast_bytes, monkeypatch):
    monkeypatch.setattr(table_file, "_CAST_BYTES", cast_bytes)
    for dtype in [*STORED_DTYPES.values(), np.dtype(">f4")]:
        out = np.zeros((11, 5), dtype)
        table.read_rows(6, out)
        assert_same(out, cast(values, dtype)[6:17])


def test_cast_rounds_once(tmp_path):
    """A hair above the middle of two numbers: rounded to float32 first, it would be the middle, and then go down."""
    for dtype, fraction in ((ml_dtypes.bfloat16, 7), (ml_dtypes.float8_e4m3fn, 3), (ml_dtypes.float8_e5m2, 2)):
        middle = 1 + 2.0 ** -(fraction + 1)
        values = np.array([[middle + 2.0**-40, middle, middle - 2.0**-40, -middle - 2.0**-40]])
        out = np.zeros((1, 4), dtype)
        open_table(save(tmp_path / "t", {"wte.weight": values})).read_rows(0, out)
        above = 1 + 2.0**-fraction
        assert out.astype(np.float64).tolist() == [[above, 1, 1, -above]]
        assert values.astype(dtype)[0, 0] == 1  # or this would test nothing


def test_table_larger_than_memory_opens(tmp_path):
    """Of 256 GiB only the rows asked for are read."""
    rows = 2**24
    path = save_zeros(tmp_path / "t", rows, 4096)
    with open(path, "rb+") as file:
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(3).tobytes())
    table = open_table(path)
    assert table.vocab_size == rows
    assert table.rows(rows - 1, rows)[0, -2:].tolist() == [0, 3]
    assert not table.padded_rows(VocabPartition(rows, 2**20), 12345, np.dtype(np.float32)).any()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_table_loads_under_any_partition(table, values, dtype):
    for world_size, padded in [(1, None), (5, "even"), (7, 70), (64, 128)]:
        partition = VocabPartition(24, world_size, padded)
        whole = np.zeros((partition.padded_vocab_size, 5), dtype)
        whole[:24] = cast(values, np.dtype(dtype))
        for rank in range(world_size):
            rows = table.padded_rows(partition, rank, np.dtype(dtype))
            assert_same(rows, whole[partition.start(rank) : partition.stop(rank)])
            assert rows.ctypes.data % 64 == 0


def test_chunks_do_not_change_the_fingerprint(table, values, monkeypatch):
    digest, hashes = table.fingerprint()
    monkeypatch.setattr(table_file, "_CHUNK_BYTES", 1)
    assert len([*table.chunks()]) == 24
    assert_same(np.concatenate([*table.chunks()]), values)
    assert table.fingerprint()[0] == digest
    np.testing.assert_array_equal(table.fingerprint()[1], hashes)


# Megatron-style parts


@pytest.fixture
def parts(tmp_path, values):
    """Four parts of eight rows, the last of them padding; the folder and the files."""
    padded = np.concatenate([values, np.full((8, 5), 7, np.float32)])
    return tmp_path / "parts", save_parts(tmp_path / "parts", np.split(padded, 4))


def test_parts_are_one_table_without_padding(parts, values):
    folder, files = parts
    for path in (folder, str(folder), files, tuple(map(str, files))):
        for rows in (24, 23, 9, 8, 1):
            table = open_table(path, vocab_size=rows)
            assert (table.tensor, table.vocab_size) == ("word_embeddings.weight", rows)
            assert table.partition == VocabPartition(rows, 4, 32)
            assert_same(table.rows(0, rows), values[:rows])
            with pytest.raises(IndexError):
                table.rows(rows, rows + 1)
    assert (open_table(folder, vocab_size=32).rows(24, 32) == 7).all()
    assert open_table(folder, with_padding=True).vocab_size == 32
    for size, says in (
        (None, "vocab_size must be given for parts that may be padded: these 4 have 32 rows"),
        (33, "vocab_size must be at most the 32 rows .*, got 33"),
    ):
        with pytest.raises(ValueError, match=says):
            open_table(folder, vocab_size=size)


@pytest.mark.parametrize("name", ["mp_rank_{}", "mp_rank_{:02d}", "mp_rank_{:03d}"])
def test_parts_are_ordered_by_number(tmp_path, values, name):
    save_parts(tmp_path / "parts", np.split(values, 12), name)
    (tmp_path / "parts" / "latest_checkpointed_iteration.txt").write_text("7")
    assert_same(open_table(tmp_path / "parts", vocab_size=24).rows(0, 24), values)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: {"word_embeddings.weight": rows[:7]},
        lambda rows: {"word_embeddings.weight": rows[:, :4].copy()},
        lambda rows: {"word_embeddings.weight": rows.astype(np.float64)},
        lambda rows: {"embedding.weight": rows},
    ],
)
def test_part_unlike_the_first_is_named(parts, values, change):
    _, files = parts
    save(files[2], change(values[:8]))
    for path in parts:
        with pytest.raises(
            ValueError, match="mp_rank_02/model.safetensors: the parts must be equal, but this one has "
        ):
            open_table(path, vocab_size=24)


def test_doubled_missing_or_ambiguous_part_is_named(parts):
    folder, files = parts

    def refused(path, says):
        with pytest.raises(ValueError, match=says):
            open_table(path, vocab_size=8)

    shutil.copytree(files[1].parent, folder / "mp_rank_1")
    refused(folder, "parts: the part of rank 4 is missing; there are 5 parts")
    shutil.rmtree(folder / "mp_rank_1")
    files[2].rename(files[2].with_name("model_optim_rng.pt"))
    refused(folder, r"mp_rank_02: no safetensors file in it; pickle files \(model_optim_rng.pt\)")
    save(files[2].with_name("a.safetensors"), {})
    save(files[2].with_name("b.safetensors"), {})
    refused(folder, "mp_rank_02: name the file to use; there are a.safetensors, b.safetensors")
    shutil.rmtree(files[0].parent)
    refused(folder, "parts: the part of rank 0 is missing; there are 3 parts")
    refused(files, "mp_rank_00/model.safetensors: no such file")


def test_tensor_of_parts_can_be_named(tmp_path, values):
    files = save_parts(tmp_path / "parts", np.split(values, 3))
    for file, rows in zip(files, np.split(values, 3), strict=True):
        save(file, {"shared.weight": -rows, "word_embeddings.weight": rows})
    with pytest.raises(ValueError, match="several look like an input embedding: shared.weight, word_embeddings.weight"):
        open_table(tmp_path / "parts", vocab_size=24)
    assert_same(open_table(files, "word_embeddings.weight", 24).rows(0, 24), values)
