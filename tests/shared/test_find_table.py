"""Every way to name a table leads to that table or to an error, and of it only what is asked for is read."""

import json
import os
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from table_files import any_bits, assert_same, save, save_index, save_parts

from shared import VocabPartition
from shared.bits import STORED_DTYPES, cast
from shared.checks import printable
from shared.tables import table_file
from shared.tables.find_table import open_table
from shared.tables.table_writer import convert_table


@pytest.fixture
def values(rng):
    return any_bits(rng, 24, 5, np.float32)


@pytest.fixture
def another(rng):
    """A table that is not the one to find."""
    return any_bits(rng, 24, 5, np.float32)


@pytest.fixture
def reads(monkeypatch):
    """What is read of rows: each time the file, the first byte and the one past the last."""
    done, preadv = [], os.preadv

    def noted(descriptor, buffers, offset):
        count = preadv(descriptor, buffers, offset)
        done.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, offset, offset + count))
        return count

    monkeypatch.setattr(os, "preadv", noted)
    return done


def written(target, values, partition=None):
    """The files that we write of a table: one, or a part for each rank."""
    source = open_table(save(target.parent / "source", {"wte.weight": values}))
    return convert_table(source, target, partition)


# Paths


def a_file(folder, values, another):
    return save(folder / "table.safetensors", {"wte.weight": values})


def a_file_of_any_name(folder, values, another):
    return save(folder / "weights.2024", {"wte.weight": values})


def an_index(folder, values, another):
    files = {"a.safetensors": {"wpe.weight": another}, "b.safetensors": {"x": another, "wte.weight": values}}
    return save_index(folder / "any.index.json", files)


def an_index_over_folders(folder, values, another):
    files = {"one/a.safetensors": {"wpe.weight": another}, "two/a.safetensors": {"wte.weight": values}}
    return save_index(folder / "model.safetensors.index.json", files)


def a_folder_with_an_index(folder, values, another):
    return an_index_over_folders(folder, values, another).parent


def a_folder_with_an_index_of_another_name(folder, values, another):
    save_index(folder / "model.fp16.safetensors.index.json", {"model.fp16.safetensors": {"wte.weight": values}})
    save(folder / "model.safetensors", {"wte.weight": another})
    return folder


def a_folder_with_the_usual_index_among_others(folder, values, another):
    save_index(folder / "old.safetensors.index.json", {"old.safetensors": {"wte.weight": another}})
    return a_folder_with_an_index(folder, values, another)


def a_folder_with_one_file(folder, values, another):
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    (folder / "config.json").write_text("{}")
    return save(folder / "any name.safetensors", {"wte.weight": values}).parent


def a_folder_with_model_among_others(folder, values, another):
    save(folder / "adapter_model.safetensors", {"wte.weight": another})
    return save(folder / "model.safetensors", {"wte.weight": values}).parent


def a_file_of_ours(folder, values, another):
    return written(folder / "merged.safetensors", values)[0]


def a_cache_of_links(folder, values, another):
    """As the Hugging Face hub keeps a checkpoint: links whose names say what they are, to files whose names do not."""
    index = an_index(folder, values, another)
    (folder / "blobs").mkdir()
    (folder / "snapshot").mkdir()
    for number, name in enumerate(("model.safetensors.index.json", "a.safetensors", "b.safetensors")):
        (index if number == 0 else folder / name).rename(folder / "blobs" / str(number))
        (folder / "snapshot" / name).symlink_to(f"../blobs/{number}")
    return folder / "snapshot"


FORMS = [
    a_file,
    a_file_of_any_name,
    an_index,
    an_index_over_folders,
    a_folder_with_an_index,
    a_folder_with_an_index_of_another_name,
    a_folder_with_the_usual_index_among_others,
    a_folder_with_one_file,
    a_folder_with_model_among_others,
    a_file_of_ours,
    a_cache_of_links,
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_of_path_opens_the_table(tmp_path, values, another, form, monkeypatch):
    path = form(tmp_path, values, another)
    monkeypatch.chdir(path.parent)
    for given in (path, str(path), Path(path.name), f"./{path.name}", os.path.relpath(path, "/usr")):
        monkeypatch.chdir("/usr" if str(given).startswith("..") else path.parent)
        table = open_table(given)
        assert (table.tensor, table.dtype, table.vocab_size, table.emb_size) == ("wte.weight", "float32", 24, 5)
        assert table.row_bytes == 20
        assert_same(table.rows(0, 24), values)
        assert_same(open_table(given, "wte.weight", 24).rows(7, 9), values[7:9])
    for size in (1, 23, 25, 40, 2**62):
        with pytest.raises(ValueError, match=f"vocab_size must be that of the table: asked for {size}, .* has 24"):
            open_table(path, vocab_size=size)
    for name in ("wte", "wte.weight ", "WTE.weight", ""):
        with pytest.raises(ValueError, match=f"no tensor '{name}' in it; there (is|are): .*wte.weight"):
            open_table(path, name)


def test_a_name_that_is_not_utf8(tmp_path, values):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors"))
    assert_same(open_table(save(path, {"wte.weight": values})).rows(0, 24), values)


def test_missing_or_bad_path_is_named(tmp_path, values):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("a text that is no table at all")
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "config.json").write_text("{}")
    for name, match in {
        "nothing": "no such file or folder",
        "text/below": "no such file or folder",
        "broken": "no such file or folder",
        "a\0b": "no such file or folder",
        "x" * 300: "",
        "empty": "no safetensors file in it",
        "text": "not a whole safetensors file",
        "config.json": "not an index of a checkpoint, it has no weight_map",
    }.items():
        with pytest.raises(ValueError, match=f"{re.escape(printable(name))}: {match}"):
            open_table(tmp_path / name)


def test_ambiguous_folder_lists_its_files(tmp_path, values):
    for name in ("a.safetensors", "b.safetensors"):
        save(tmp_path / name, {"wte.weight": values})
    with pytest.raises(ValueError, match=r": name the file to use; there are a.safetensors, b.safetensors$"):
        open_table(tmp_path)


@pytest.mark.parametrize("path", [None, 3, 3.0, b"table", {"path": 1}, {"a"}, True])
def test_path_of_another_type_is_a_type_error(path):
    with pytest.raises(TypeError, match="path must be a path or a list of paths, got "):
        open_table(path)


def test_names_and_sizes_of_another_type_are_refused(tmp_path, values):
    path = save(tmp_path / "t", {"wte.weight": values})
    for name in (3, b"wte.weight", ["wte.weight"]):
        with pytest.raises(TypeError, match="tensor_name must be a string or None"):
            open_table(path, name)
    for size in (24.0, "24", True, [24]):
        with pytest.raises(TypeError, match="vocab_size must be an integer"):
            open_table(path, vocab_size=size)
    for size in (0, -24):
        with pytest.raises(ValueError, match="vocab_size must be at least 1"):
            open_table(path, vocab_size=size)
    assert open_table(path, vocab_size=np.int32(24)).vocab_size == 24


# Pickles


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_pickle_is_refused_by_name(tmp_path, values, suffix):
    """That none is loaded is another file's test."""
    pickled = tmp_path / f"model{suffix}"
    save(pickled, {"wte.weight": values})  # even if it were none
    for path in (pickled, [pickled]):
        with pytest.raises(ValueError, match=f"model{suffix}: a pickle file, which is never loaded; save"):
            open_table(path, vocab_size=24)
    with pytest.raises(
        ValueError, match=rf"no safetensors file in it; pickle files \(model{suffix}\) are never loaded"
    ):
        open_table(tmp_path)
    index = tmp_path / f"model{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": {"wte.weight": pickled.name}}))
    with pytest.raises(ValueError, match=f"model{suffix}: a pickle file, which is never loaded"):
        open_table(index)


# Tensors

CHECKPOINTS = (
    """
model.embed_tokens.weight | model.layers.0.self_attn.q_proj.weight:2 model.layers.0.input_layernorm.weight:1
    model.norm.weight:1 lm_head.weight:2
wte.weight | wpe.weight:2 h.0.attn.c_attn.weight:2 h.0.attn.bias:4 ln_f.weight:1
transformer.wte.weight | transformer.wpe.weight:2 transformer.h.0.mlp.c_fc.weight:2 lm_head.weight:2
bert.embeddings.word_embeddings.weight | bert.embeddings.position_embeddings.weight:2
    bert.embeddings.token_type_embeddings.weight:2 bert.embeddings.LayerNorm.weight:1 bert.embeddings.position_ids:2
    bert.pooler.dense.weight:2 cls.predictions.decoder.weight:2 cls.predictions.bias:1
shared.weight | encoder.block.0.layer.0.SelfAttention.q.weight:2
    encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight:2 lm_head.weight:2
gpt_neox.embed_in.weight | gpt_neox.layers.0.attention.dense.weight:2 embed_out.weight:2
embedder.input_embedding | layer_0.attn.q_einsum.w:3 layer_0.mlp.linear:2 final_norm.scale:1
token_embedder.embedding | decoder.logits_dense.kernel:2 decoder.position_embedder.embedding:2
tok_embeddings.weight | layers.0.attention.wq.weight:2 norm.weight:1 output.weight:2
embedding.weight |
model.decoder.embed_tokens.weight | model.decoder.embed_positions.weight:2 model.decoder.fc.weight:2
transformer.word_embeddings.weight | transformer.word_embeddings_layernorm.weight:1 lm_head.weight:2
transformer.word_embedding.weight | transformer.mask_emb:3 transformer.layer.0.rel_attn.q:3
embedding.word_embeddings.weight | embedding.position_embeddings.weight:2 output_layer.weight:2
text_model.embeddings.token_embedding.weight | text_model.embeddings.position_embedding.weight:2
    text_model.final_layer_norm.weight:1
backbone.embeddings.weight | backbone.layers.0.mixer.in_proj.weight:2 lm_head.weight:2
token_embd.weight | blk.0.attn_q.weight:2 output.weight:2 output_norm.weight:1
language_model.model.embed_tokens.weight | vision_tower.vision_model.embeddings.patch_embedding.weight:4
    vision_tower.vision_model.embeddings.position_embedding.weight:2
    vision_tower.vision_model.embeddings.class_embedding:1 multi_modal_projector.linear_1.weight:2
    language_model.lm_head.weight:2
deberta.embeddings.word_embeddings.weight | deberta.encoder.rel_embeddings.weight:2
    deberta.embeddings.LayerNorm.weight:1 mask_predictions.dense.weight:2
params/Embed_0/embedding | params/Dense_0/kernel:2 params/Dense_0/bias:1
""".replace("\n    ", " ")
    .strip()
    .splitlines()
)
"""The input embedding of well-known checkpoints | other tensors in it:their number of dimensions."""


def saved_both_ways(tmp_path, tensors):
    index = save_index(tmp_path / "i.json", {f"{n}.safetensors": {t: tensors[t]} for n, t in enumerate(tensors)})
    return save(tmp_path / "all", tensors), index


@pytest.mark.parametrize("before", [True, False], ids=["others first", "others last"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda checkpoint: checkpoint.split()[0])
def test_input_embedding_of_known_models_is_found(tmp_path, values, checkpoint, before):
    name, _, *others = checkpoint.split()
    sizes = (other.split(":") for other in others)
    others = {other: np.ones((2, 3, 4, 5)[: int(ndim)], np.float32) for other, ndim in sizes}
    for path in saved_both_ways(tmp_path, {**others, name: values} if before else {name: values, **others}):
        table = open_table(path)
        assert table.tensor == name
        assert_same(table.rows(0, 24), values)


def test_several_candidates_are_listed_and_can_be_named(tmp_path, values):
    """BART's three, one of which is meant."""
    three = ["model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"]
    others = ["model.encoder.embed_positions.weight", "model.encoder.layers.0.fc1.weight"]
    tensors = {name: values + np.float32(number) for number, name in enumerate([*three, *others])}
    for path in saved_both_ways(tmp_path, tensors):
        with pytest.raises(ValueError, match="pass tensor_name; several look like an input embedding: ") as caught:
            open_table(path)
        assert str(caught.value).endswith(": " + ", ".join(three))
        for name in tensors:
            assert open_table(path, name).tensor == name
            assert_same(open_table(path, name).rows(0, 24), tensors[name])


@pytest.mark.parametrize("others", [[], ["lm_head.bias"], ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"]])
def test_without_a_candidate_the_tables_are_listed(tmp_path, values, others):
    """An output head is a table of the same shape, and the wrong one."""
    tensors = {"lm_head.weight": values, **dict.fromkeys(others, values)}
    for path in saved_both_ways(tmp_path, tensors):
        with pytest.raises(ValueError, match="pass tensor_name; none looks like an input embedding") as caught:
            open_table(path)
        assert "lm_head.weight" in str(caught.value).split("in it: ")[1]
        assert_same(open_table(path, "lm_head.weight").rows(0, 24), values)


def test_long_lists_of_candidates_are_cut(tmp_path):
    for path in saved_both_ways(tmp_path, {f"embedding_{n}": np.ones((2, 2), np.float32) for n in range(30)}):
        with pytest.raises(ValueError, match=r"embedding_0, .*embedding_19 and 10 more$"):
            open_table(path, "absent")
    everything = {f"blocks.{n}.embedding": np.ones((2, 2), np.float32) for n in range(30)}
    for path in saved_both_ways(tmp_path, everything):
        with pytest.raises(ValueError, match=r"several look .* blocks.0.embedding, .*blocks.19.embedding and 10 more$"):
            open_table(path)


def test_tensor_that_is_no_table_is_refused(tmp_path):
    wrong = {
        "1-D": np.ones(6, np.float32),
        "3-D": np.ones((1, 2, 3), np.float32),
        "scalar": np.float32(1).reshape(()),
        "integers": np.ones((2, 3), np.int64),
        "bytes": np.ones((2, 3), np.uint8),
        "no rows": np.ones((0, 3), np.float32),
        "no columns": np.ones((3, 0), np.float32),
    }
    for path in saved_both_ways(tmp_path, wrong):
        for name, tensor in wrong.items():
            with pytest.raises(
                ValueError, match=rf"tensor '{name}' must be a 2-D table of float16, .*, got \w+ \["
            ) as it:
                open_table(path, name)
            assert str(it.value).endswith(f"{list(tensor.shape)}")
    for tensor in wrong.values():
        with pytest.raises(ValueError, match="none looks like an input embedding. .* in it: none$"):
            open_table(save(tmp_path / "one", {"wte.weight": tensor}))


def test_tensors_of_an_index_come_from_their_own_files(tmp_path, values):
    files = {f"{n}.safetensors": {f"t{n}": values + np.float32(n), "copy": values} for n in range(3)}
    path = save_index(tmp_path / "i.json", files)
    for number in range(3):
        table = open_table(path, f"t{number}")
        assert table.files == [tmp_path / f"{number}.safetensors"]
        assert_same(table.rows(0, 24), values + np.float32(number))


def test_file_that_lacks_its_indexs_tensor_is_named(tmp_path, values):
    path = save_index(tmp_path / "i.json", {"a.safetensors": {"wte.weight": values}})
    save(tmp_path / "a.safetensors", {"wpe.weight": values})
    with pytest.raises(ValueError, match=r"a.safetensors: no tensor 'wte.weight' in it; there are: wpe.weight$"):
        open_table(path)
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(ValueError, match="a.safetensors: no such file"):
        open_table(path)


# Rows


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_every_dtype_bit_for_bit(tmp_path, rng, dtype):
    values = any_bits(rng, 40, 7, STORED_DTYPES[dtype])
    if values.itemsize < 4:  # every number that there is
        every = np.arange(256**values.itemsize, dtype=f"u{values.itemsize}").view(values.dtype)
        values = np.concatenate([values, np.resize(every, (-(-len(every) // 7), 7))])
    path = save(tmp_path / "t", {"first": np.ones(1, np.uint8), "wte.weight": values})
    table = open_table(path)
    assert table.dtype == dtype
    assert_same(table.rows(0, len(values)), values)
    out = np.zeros_like(values)
    table.read_rows(0, out)
    assert_same(out, values)
    if not dtype.startswith("float8"):  # which safetensors does not hand to NumPy
        assert_same(load_file(path)["wte.weight"], values)


@pytest.mark.parametrize("before", range(9))
def test_table_may_begin_at_any_byte(tmp_path, rng, before):
    for dtype in STORED_DTYPES.values():
        values = any_bits(rng, 6, 3, dtype)
        tensors = {"mask": np.ones(before, np.uint8), "wte.weight": values, "wpe.weight": values[::-1].copy()}
        table = open_table(save(tmp_path / "t", tensors))
        assert_same(table.rows(1, 5), values[1:5])
        assert_same(open_table(tmp_path / "t", "wpe.weight").rows(0, 6), values[::-1])
        out = np.zeros((6, 3), np.float64)
        table.read_rows(0, out)
        assert_same(out, cast(values, np.dtype(np.float64)))


@pytest.fixture(params=[None, VocabPartition(24, 5, 40)], ids=["file", "parts"])
def table(request, tmp_path, values):
    return open_table(written(tmp_path / "t.safetensors", values, request.param), vocab_size=24)


def test_any_range_of_rows(table, values):
    for start in range(25):
        for stop in range(start, 25):
            assert_same(table.rows(start, stop), values[start:stop])


def test_range_outside_the_table_is_an_index_error(table, monkeypatch):
    monkeypatch.setattr(table_file, "_CAST_BYTES", 64)
    for start, stop in [(-1, 3), (-1, -1), (0, 25), (24, 25), (25, 25), (5, 4), (40, 41), (-(2**70), 0), (0, 2**70)]:
        with pytest.raises(IndexError, match=rf"rows \[{start}, {stop}\) leave the table's \[0, 24\)"):
            table.rows(start, stop)
        if 0 <= stop - start < 100:
            for dtype in ("float32", "float64"):
                out = np.full((stop - start, 5), 7, STORED_DTYPES[dtype])
                with pytest.raises(IndexError, match="leave the table"):
                    table.read_rows(start, out)
                assert (out == 7).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_memory_of_another_shape_or_layout_is_refused(tmp_path, table, dtype):
    for shape in [(4, 6), (4, 4), (4, 1), (4, 10), (2, 5, 2), (20,), (4, 5, 1), ()]:
        out = np.full(shape, 7, STORED_DTYPES[dtype])
        with pytest.raises(ValueError, match="out must "):
            table.read_rows(3, out)
        assert (out == 7).all()
    out, column = np.full((3, 4), 7, np.float64), save(tmp_path / "column", {"wte.weight": np.ones((3, 1), np.float32)})
    with pytest.raises(ValueError, match="out must "):  # and not filled by repeating the column
        open_table(column).read_rows(0, out)
    assert (out == 7).all()
    for out in (np.zeros((4, 10), dtype)[:, ::2], np.zeros((5, 4), dtype).T, np.zeros((8, 5), dtype)[::2]):
        with pytest.raises(ValueError, match="out must be C-contiguous"):
            table.read_rows(0, out)


@pytest.mark.parametrize("cast_bytes", [1, 64, 1 << 20])
def test_rows_into_memory_of_every_dtype(table, values, cast_bytes, monkeypatch):
    monkeypatch.setattr(table_file, "_CAST_BYTES", cast_bytes)
    for dtype in [*STORED_DTYPES.values(), np.dtype(">f4")]:
        out = np.zeros((11, 5), dtype)
        table.read_rows(6, out)
        assert_same(out, cast(values, dtype)[6:17])


def test_cast_rounds_once(tmp_path, rng):
    """A hair above the middle of two numbers: rounded to float32 first, it would be the middle, and then go down."""
    for dtype, fraction in ((ml_dtypes.bfloat16, 7), (ml_dtypes.float8_e4m3fn, 3), (ml_dtypes.float8_e5m2, 2)):
        middle = 1 + 2.0 ** -(fraction + 1)
        values = np.array([[middle + 2.0**-40, middle, middle - 2.0**-40, -middle - 2.0**-40]])
        out = np.zeros((1, 4), dtype)
        open_table(save(tmp_path / "t", {"wte.weight": values})).read_rows(0, out)
        above = 1 + 2.0**-fraction
        assert out.astype(np.float64).tolist() == [[above, 1, 1, -above]]
        assert values.astype(dtype)[0, 0] == 1  # or this would test nothing


def test_only_the_rows_asked_for_are_read(tmp_path, values, reads):
    path = save(tmp_path / "t", {"x": np.ones(3, np.uint8), "wte.weight": values, "wpe.weight": values})
    table = open_table(path)
    assert reads == []
    begin = path.stat().st_size - 2 * values.nbytes
    for start, stop in ((0, 1), (5, 9), (23, 24), (0, 24)):
        table.rows(start, stop)
        assert reads == [("t", begin + start * 20, begin + stop * 20)]
        reads.clear()
    table.rows(24, 24)
    table.read_rows(3, np.zeros((0, 5), np.float32))
    assert reads == []
    table.read_rows(3, np.zeros((2, 5)))
    assert reads == [("t", begin + 3 * 20, begin + 5 * 20)]


def test_table_larger_than_memory_opens(tmp_path):
    rows, row_bytes = 2**24, 2**14  # 256 GiB, of which none takes room on the disk
    header = {"wte.weight": {"dtype": "F32", "shape": [rows, 4096], "data_offsets": [0, rows * row_bytes]}}
    text = json.dumps(header).encode()
    with open(tmp_path / "t", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + rows * row_bytes)
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(3).tobytes())
    table = open_table(tmp_path / "t")
    assert table.vocab_size == rows
    assert table.rows(rows - 1, rows)[0, -2:].tolist() == [0, 3]
    assert not table.padded_rows(VocabPartition(rows, 2**20), 12345, np.dtype(np.float32)).any()


# Under other partitions


@pytest.mark.parametrize("parts", [None, VocabPartition(24, 5, 40), VocabPartition(24, 64, "even")])
def test_table_loads_under_any_partition(tmp_path, values, parts):
    table = open_table(written(tmp_path / "t.safetensors", values, parts), vocab_size=24)
    loaded = [(1, None), (2, None), (3, 48), (5, "even"), (7, 70), (8, None), (24, 24), (25, "even"), (64, 128)]
    for world_size, padded in loaded:
        partition = VocabPartition(24, world_size, padded)
        for dtype in (np.float32, ml_dtypes.bfloat16):
            whole = np.zeros((partition.padded_vocab_size, 5), dtype)
            whole[:24] = cast(values, np.dtype(dtype))
            for rank in range(world_size):
                rows = table.padded_rows(partition, rank, np.dtype(dtype))
                assert_same(rows, whole[partition.start(rank) : partition.stop(rank)])
                assert rows.ctypes.data % 64 == 0


def test_chunks_do_not_change_rows_or_fingerprint(table, values, monkeypatch):
    assert_same(np.concatenate(list(table.chunks(megabytes=0))), values)
    (whole,) = table.chunks()
    assert_same(whole, values)
    digest, hashes = table.fingerprint()
    monkeypatch.setattr(type(table), "chunks", lambda self: iter([values[:5], values[5:]]))
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
    for path in (folder, str(folder), files, tuple(files), [str(file) for file in files]):
        for rows in (24, 23, 9, 8, 1):
            table = open_table(path, vocab_size=rows)
            assert (table.tensor, table.vocab_size) == ("word_embeddings.weight", rows)
            assert table.partition == VocabPartition(rows, 4, 32)
            assert_same(table.rows(0, rows), values[:rows])
            with pytest.raises(IndexError):
                table.rows(rows, rows + 1)
    assert (open_table(folder, vocab_size=32).rows(24, 32) == 7).all()


def test_vocab_size_of_parts_must_be_given_and_fit(parts):
    for path in parts:
        with pytest.raises(
            ValueError, match="vocab_size must be given for parts that may be padded: these 4 have 32 rows"
        ):
            open_table(path)
        for size in (33, 2**62):
            with pytest.raises(ValueError, match=f"vocab_size must be at most the 32 rows .*, got {size}"):
                open_table(path, vocab_size=size)
        with pytest.raises(ValueError, match="vocab_size must be at least 1"):
            open_table(path, vocab_size=0)


@pytest.mark.parametrize("rank", range(1, 4))
def test_part_unlike_the_first_is_named(parts, values, rank):
    _, files = parts
    for tensors in (
        {"word_embeddings.weight": values[:7]},
        {"word_embeddings.weight": values[:8, :4]},
        {"word_embeddings.weight": values[:8].astype(np.float64)},
        {"word_embeddings.weight": values[:8].view(np.uint8)[:, ::4].copy()},
        {"embedding.weight": values[:8]},
        {"word_embeddings.weight": values[:8], "shared.weight": values[:8]},
    ):
        save(files[rank], tensors)
        for path in parts:
            with pytest.raises(
                ValueError, match=rf"mp_rank_0{rank}/model.safetensors: (the parts must|pass tensor_name)"
            ):
                open_table(path, vocab_size=24)


@pytest.mark.parametrize("rank", range(3))
def test_missing_part_is_named(parts, rank):
    folder, files = parts
    shutil.rmtree(files[rank].parent)
    with pytest.raises(ValueError, match=f"parts: the part of rank {rank} is missing; there are 3 parts"):
        open_table(folder, vocab_size=8)
    with pytest.raises(ValueError, match=f"mp_rank_0{rank}/model.safetensors: no such file"):
        open_table(files, vocab_size=8)


def test_rank_that_is_there_twice_is_refused(parts):
    folder, files = parts
    shutil.copytree(files[1].parent, folder / "mp_rank_1")
    with pytest.raises(ValueError, match="parts: "):
        open_table(folder, vocab_size=24)


@pytest.mark.parametrize("name", ["mp_rank_{}", "mp_rank_{:02d}", "mp_rank_{:03d}"])
def test_parts_are_ordered_by_number(tmp_path, values, name):
    save_parts(tmp_path / "parts", np.split(values, 12), name)
    (tmp_path / "parts" / "latest_checkpointed_iteration.txt").write_text("7")
    assert_same(open_table(tmp_path / "parts", vocab_size=24).rows(0, 24), values)


def test_part_without_a_safetensors_file_is_named(parts):
    folder, files = parts
    files[2].rename(files[2].with_name("model_optim_rng.pt"))
    with pytest.raises(ValueError, match=r"mp_rank_02: no safetensors file in it; pickle files \(model_optim_rng.pt\)"):
        open_table(folder, vocab_size=24)
    save(files[2].with_name("a.safetensors"), {})
    save(files[2].with_name("b.safetensors"), {})
    with pytest.raises(ValueError, match="mp_rank_02: name the file to use; there are a.safetensors, b.safetensors"):
        open_table(folder, vocab_size=24)


def test_tensor_of_parts_can_be_named(tmp_path, values, another):
    files = save_parts(tmp_path / "parts", np.split(values, 3))
    for number, file in enumerate(files):
        save(file, {"shared.weight": another[:8], "word_embeddings.weight": values[number * 8 : number * 8 + 8]})
    with pytest.raises(ValueError, match="several look like an input embedding: shared.weight, word_embeddings.weight"):
        open_table(tmp_path / "parts", vocab_size=24)
    assert_same(open_table(files, "word_embeddings.weight", 24).rows(0, 24), values)


def test_empty_list_and_other_types_are_refused():
    with pytest.raises(ValueError, match="path must name at least one file, got an empty list"):
        open_table([], vocab_size=3)
    for wrong in ([3], [None], [b"x"], [["x"]]):
        with pytest.raises(TypeError):
            open_table(wrong, vocab_size=3)
