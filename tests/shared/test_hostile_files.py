"""What is damaged, cut short, exchanged or made up is refused in one line that names the file, and never takes effect.

Of a mutated file, either all rows come back as they were, or a ValueError: no other error, no other rows, no waiting.
"""

import builtins
import contextlib
import errno
import io
import json
import os
import pickle
import re
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from table_files import safetensors

from shared import VocabPartition
from shared.tables.find_table import open_table
from shared.tables.table_writer import convert_table

VALUES = np.random.default_rng(7).standard_normal((24, 5)).astype(np.float32)
PARTITION = VocabPartition(24, 3, 36)
"""Twelve rows, twelve, and none."""
FORMS = {"merged.safetensors": None, "parts": PARTITION}


def entry(values, first=0):
    return {"dtype": "F32", "shape": list(values.shape), "data_offsets": [first, first + values.nbytes]}


FOREIGN = safetensors(
    {"__metadata__": {"format": "pt"}, "wpe.weight": entry(VALUES[:7]), "wte.weight": entry(VALUES, VALUES[:7].nbytes)},
    VALUES[:7].tobytes() + VALUES.tobytes(),
)
"""A file of someone else's, with another table before the one to find."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The files of one table: someone else's, one written by us, and Megatron-style parts."""
    folder = tmp_path_factory.mktemp("originals")
    (folder / "source").write_bytes(FOREIGN)
    for name, partition in FORMS.items():
        convert_table(open_table(folder / "source"), folder / name, partition)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def put(tmp_path, originals):
    """Writes some of the originals to a folder; returns the path."""

    def to_folder(name):
        for file, data in originals.items():
            if file == name or file.startswith(f"{name}/"):
                (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / file).write_bytes(data)
        return tmp_path / name

    return to_folder


@pytest.fixture(autouse=True)
def nothing_waits():
    """A test that waits, as for a pipe that nobody writes to, fails."""

    def fail(*_):
        pytest.fail("it waits")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, 10)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def little_memory(more=1 << 30):
    """Nothing inside can take more than that: what tries fails at once, and does not take the machine with it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def refused(tmp_path_factory):
    """``refused(path, match)``: neither its rows can be read nor can it be converted, which writes nothing."""
    folder = tmp_path_factory.mktemp("targets")

    def check(path, match, **options):
        def read(table):
            table.rows(0, table.vocab_size)

        def convert(table):
            convert_table(table, folder / "table.safetensors")

        for use in (read, convert):
            with pytest.raises(ValueError, match=match) as caught:
                use(open_table(path, **options))
            assert_clear(caught.value, path)
        assert not list(folder.iterdir())

    return check


def assert_clear(error, path):
    """One line, which names the file or one beside it; and no error that says only what Python was doing."""
    paths = path if isinstance(path, list) else [path]
    assert type(error) is ValueError
    assert len(str(error).splitlines()) == 1
    assert any(str(folder) in str(error) for path in paths for folder in (path, path.parent))


def outcome(path, partition=None, **options):
    """What comes of reading a table that should be VALUES: "refused", "same", or what is wrong."""
    try:
        table = open_table(path, **options)
        if partition is None:
            found, expected = table.rows(0, table.vocab_size), VALUES
        else:
            found = [rows_or_none(table, partition, rank) for rank in range(partition.world_size)]
            expected = np.zeros((partition.padded_vocab_size, 5), np.float32)
            expected[:24] = VALUES
            expected = expected.reshape(partition.world_size, -1, 5)
            expected = np.stack(
                [whole for whole, rows in zip(expected, found, strict=True) if rows is not None] or [[]]
            )
            found = np.stack([rows for rows in found if rows is not None] or [[]])
    except ValueError as error:
        assert_clear(error, path)
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if found.shape == expected.shape and found.tobytes() == expected.tobytes():
        return "same"
    return f"another table: {table.tensor} {found.dtype} {list(found.shape)}"


def rows_or_none(table, partition, rank):
    """The rows of a rank; None where they are refused, as those of another rank need not be."""
    try:
        return table.padded_rows(partition, rank, np.dtype(np.float32))
    except ValueError:
        return None


def test_originals_are_whole(put, tmp_path):
    """Or all would be refused for a reason of its own."""
    for name, options in (("source", {}), ("merged.safetensors", {}), ("parts", {"vocab_size": 24})):
        assert outcome(put(name), **options) == "same"
        assert outcome(put(name), VocabPartition(24, 5, "even"), **options) == "same"


# Files that are cut short, or are no safetensors files at all


@pytest.mark.parametrize("name", ["source", "merged.safetensors"])
def test_every_truncation_is_refused(put, name):
    path = put(name)
    whole = path.read_bytes()
    for size in [*range(40), *range(40, len(whole), 11), len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert outcome(path) == "refused", size


ONE = {"wte.weight": entry(VALUES)}
"""A header of the whole table, to be spoilt."""


def with_entry(**changes):
    return {
        "wte.weight": {name: value for name, value in {**ONE["wte.weight"], **changes}.items() if value != "left out"}
    }


def two(first, second):
    """A header of two tables at given bytes."""
    of = {"dtype": "F32", "shape": [12, 5]}
    return {"wte.weight": {**of, "data_offsets": first}, "wpe.weight": {**of, "data_offsets": second}}


ENTRY = json.dumps(ONE["wte.weight"])

NO_TABLES = {
    "nothing": b"",
    "one byte": b"\x01",
    "seven bytes": bytes(7),
    "zeros": bytes(600),
    "ones": b"\xff" * 600,
    "a text": b"hello, this is no table at all, but it is long enough to have a header",
    "a zip file": b"PK\x03\x04" + bytes(600),
    "an array of NumPy": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (24, 5), }"
    + bytes(600),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(600),
    "a GGUF file": b"GGUF\x03\0\0\0" + bytes(600),
    "a program": b"\x7fELF\x02\x01\x01" + bytes(600),
    "a pointer to a large file": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 480\n",
    "a page that says no": b"<!DOCTYPE html><html><body>401 Unauthorized</body></html>",
    "a header longer than the file": safetensors(ONE, VALUES.tobytes(), 10**6),
    "a header one byte longer": safetensors(ONE, VALUES.tobytes(), len(json.dumps(ONE)) + 1),
    "a header one byte shorter": safetensors(ONE, VALUES.tobytes(), len(json.dumps(ONE)) - 1),
    "a header of no bytes": safetensors(b"", VALUES.tobytes()),
    "a length of 2**63": safetensors(ONE, VALUES.tobytes(), 2**63),
    "a length of 2**63 - 1": safetensors(ONE, VALUES.tobytes(), 2**63 - 1),
    "a length of 2**64 - 1": safetensors(ONE, VALUES.tobytes(), 2**64 - 1),
    "a length of 2**64 - 8": safetensors(ONE, VALUES.tobytes(), 2**64 - 8),
    "a length of 2**32": safetensors(ONE, VALUES.tobytes(), 2**32),
    "a length the wrong way round": len(json.dumps(ONE)).to_bytes(8, "big")
    + json.dumps(ONE).encode()
    + VALUES.tobytes(),
    "no length": json.dumps(ONE).encode() + VALUES.tobytes(),
}

# fmt: off
SHAPES = (
    [24, 6], [25, 5], [24], [], [24, 5, 2], [-24, -5], [-24, 5], [24.0, 5], ["24", "5"], [True, 120], [None, 5],
    [[24], [5]], 24, "24x5", {"0": 24, "1": 5}, [2**62, 2**62], [2**63, 2], [2**64, 5], [2**64 + 24, 5], [10**400, 5],
    [0, 5],
)
OFFSETS = (
    [480, 0], [0, 479], [0, 481], [1, 481], [4, 480], [-480, 0], [-1, 479], [2**64 - 480, 2**64], [2**63, 2**63 + 480],
    [2**62, 2**62 + 480], [0.0, 480.0], ["0", "480"], [0], [0, 480, 480], [], 480, None, {"0": 480}, [False, 480],
)
# fmt: on
BAD_HEADERS = {
    "not UTF-8": json.dumps(ONE).encode().replace(b"wte", b"w\xffe"),
    "UTF-16": json.dumps(ONE).encode("utf-16"),
    "a byte order mark": json.dumps(ONE).encode("utf-8-sig"),
    "a list": b"[]",
    "a number": b"1",
    "a text": b'"wte.weight"',
    "null": b"null",
    "blanks": b"   ",
    "no JSON": b"{wte.weight}",
    "two objects": json.dumps(ONE).encode() * 2,
    "something after it": json.dumps(ONE).encode() + b"x",
    "zeros after it": json.dumps(ONE).encode() + bytes(8),
    "a tensor twice": f'{{"wte.weight": {ENTRY}, "wte.weight": {ENTRY}}}'.encode(),
    "a tensor twice, in other letters": f'{{"wte.weight": {ENTRY}, "wt\\u0065.weight": {ENTRY}}}'.encode(),
    "a shape twice": json.dumps(ONE).replace('"shape"', '"shape": [5, 24], "shape"').encode(),
    "offsets twice": json.dumps(ONE).replace('"data_offsets"', '"data_offsets": [0, 480], "data_offsets"').encode(),
    "something unknown twice": json.dumps(ONE).replace('"shape"', '"x": 1, "x": 2, "shape"').encode(),
    "metadata twice": f'{{"__metadata__": {{}}, "__metadata__": {{}}, "wte.weight": {ENTRY}}}'.encode(),
    "a text of the metadata twice": f'{{"__metadata__": {{"a": "b", "a": "c"}}, "wte.weight": {ENTRY}}}'.encode(),
    "NaN": json.dumps(ONE).replace("24", "NaN").encode(),
    "NaN in something unknown": json.dumps(with_entry(unknown=float("nan"))).encode(),
    "infinity": json.dumps(ONE).replace("24,", "Infinity,").encode(),
    "1e400": json.dumps(ONE).replace("24", "1e400").encode(),
    "deep": b'{"wte.weight": ' + b"[" * 200_000,
    "deep metadata": b'{"__metadata__": ' + b'{"a":' * 200_000,
    "metadata that is a list": {"__metadata__": [], **ONE},
    "metadata that is a text": {"__metadata__": "pt", **ONE},
    "metadata of numbers": {"__metadata__": {"format": 1}, **ONE},
    "a tensor that is a list": {"wte.weight": []},
    "a tensor that is null": {"wte.weight": None},
    "a tensor that is empty": {"wte.weight": {}},
    **{f"no {name}": with_entry(**{name: "left out"}) for name in ONE["wte.weight"]},
    **{f"{name} null": with_entry(**{name: None}) for name in ONE["wte.weight"]},
    **{
        f"dtype {dtype!r}": with_entry(dtype=dtype)
        for dtype in ("F31", "f32", "", 32, ["F32"], "F64", "F16", "U8", "C64")
    },
    **{f"shape {shape}": with_entry(shape=shape) for shape in SHAPES},
    **{f"offsets {offsets}": with_entry(data_offsets=offsets) for offsets in OFFSETS},
    "tables that overlap": two([0, 240], [120, 360]),
    "tables at one place": two([0, 240], [0, 240]),
    "a gap between tables": two([0, 240], [241, 481]),
    "a gap before the first": two([240, 480], [480, 720]),
    "bytes after the last": two([0, 240], [240, 480]) | {"x": with_entry(data_offsets=[480, 960])["wte.weight"]},
    "a table beyond the end": two([0, 240], [480, 720]),
}


@pytest.mark.parametrize("name", NO_TABLES)
def test_other_formats_are_refused(tmp_path, refused, name):
    path = tmp_path / "table.safetensors"
    path.write_bytes(NO_TABLES[name])
    with little_memory():
        refused(path, "table.safetensors: not a whole safetensors file")
        refused(tmp_path, "table.safetensors: not a whole safetensors file")


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_inconsistent_header_is_refused(tmp_path, refused, name):
    path = tmp_path / "table.safetensors"
    path.write_bytes(safetensors(BAD_HEADERS[name], VALUES.tobytes()))
    for options in ({}, {"tensor_name": "wte.weight"}):
        refused(path, r"table.safetensors: ", **options)


def test_header_they_were_made_of_is_good(tmp_path):
    (tmp_path / "t").write_bytes(safetensors(ONE, VALUES.tobytes()))
    assert outcome(tmp_path / "t") == "same"
    (tmp_path / "t").write_bytes(safetensors(two([240, 480], [0, 240]), VALUES.tobytes()))
    assert open_table(tmp_path / "t").rows(0, 12).tobytes() == VALUES[12:].tobytes()
    # Another shape of the same size cannot be noticed in a file without checksums.
    (tmp_path / "t").write_bytes(safetensors(with_entry(shape=[5, 24]), VALUES.tobytes()))
    assert open_table(tmp_path / "t").rows(0, 5).tobytes() == load_file(tmp_path / "t")["wte.weight"].tobytes()


# Indexes


DOCUMENTS = {
    "nothing": b"",
    "blanks": b" \n",
    "null": b"null",
    "a list": b"[]",
    "a number": b"3",
    "a text": b'"manifest"',
    "an empty object": b"{}",
    "zeros": bytes(400),
    "not UTF-8": b'{"format": "\xff\xfe"}',
    "half a surrogate, written out": b'{"format": "\xed\xa0\x80"}',
    "deep lists": b'{"shards": ' + b"[" * 10**6,
    "deep lists that end": b'{"shards": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
    "deep objects": b'{"a":' * 10**6,
    "a tar file": b"manifest.json" + bytes(400),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_index_that_is_no_json_object_is_refused(tmp_path, refused, name):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(DOCUMENTS[name])
    for each in (tmp_path, path):
        refused(each, f"{path.name}: ")


def test_ambiguous_index_is_refused(tmp_path, refused):
    path = tmp_path / "an.index.json"
    (tmp_path / "table.safetensors").write_bytes(FOREIGN)
    path.write_text('{"weight_map": {"wte.weight": "table.safetensors"}}')
    assert outcome(path) == "same"
    good, key = path.read_text(), "weight_map"
    for bad in (
        good.replace(f'"{key}"', f'"{key}": {{}}, "{key}"'),
        good.replace(f'"{key}"', f'"{key}": {{}}, "\\u00{ord(key[0]):x}{key[1:]}"'),
        good.replace("{", '{"x": {"y": 1, "y": 1}, ', 1),
        good + good,
        good + "x",
        good + "\0",
        good[:-1] + ",}",
        good[:-1] + '} // "x"',
        good.replace('"', "'"),
        good.replace("{", '{"x": NaN, ', 1),
        good.replace("{", '{"x": -Infinity, ', 1),
        good.replace("{", "{x: 1, ", 1),
        "[" + good + "]",
    ):
        path.write_text(bad)
        refused(path, "an.index.json: ")
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):  # as which it is the same text
        path.write_bytes(good.encode(encoding))
        assert outcome(path) in ("refused", "same")


def test_oversized_index_is_not_read(tmp_path, refused):
    path = tmp_path / "an.index.json"
    path.touch()
    os.truncate(path, 2**40)  # a hole, which takes no room on the disk
    with little_memory():
        refused(path, f"an.index.json: {2**40} bytes, too large for an index")


def test_index_of_30000_tensors_is_read(tmp_path):
    (tmp_path / "t").write_bytes(FOREIGN)
    names = {f"model.layers.{n}.mlp.weight": f"{n}.safetensors" for n in range(30_000)}
    (tmp_path / "i.json").write_text(json.dumps({"weight_map": {**names, "wte.weight": "t"}}))
    assert outcome(tmp_path / "i.json") == "same"


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"weight_map": None},
        {"weight_map": []},
        {"weight_map": "wte.weight"},
        {"weight_map": 3},
        {"weight_map": [["wte.weight", "t"]]},
        *({"weight_map": {"wte.weight": wrong}} for wrong in (None, 3, True, ["t"], {"t": "t"}, 1.5)),
        {"weight_map": {"wte.weight": "t", "another": None}},
        {"weight_maps": {"wte.weight": "t"}},
        {"metadata": {"weight_map": {"wte.weight": "t"}}},
    ],
    ids=str,
)
def test_index_without_a_weight_map_is_refused(tmp_path, refused, document):
    (tmp_path / "t").write_bytes(FOREIGN)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(document))
    refused(path, "index.json: not an index of a checkpoint, it has no weight_map")
    refused(tmp_path, "index.json: not an index of a checkpoint, it has no weight_map", tensor_name="wte.weight")


# fmt: off
LEAVES_THE_FOLDER = (
    "../t", "../inside/t", "sub/../t", "sub/../../t", "./../t", "..", "/", "{}/t", "//{}/t", "..\\t", "sub\\..\\..\\t",
    "\\t", "\\\\server\\share\\t", "//server/share/t", "C:\\t", "C:/t", "C:t", "c:", "t\\", "",
)
NO_FILES = (
    "missing", "~/t", "$HOME/t", "%2e%2e/t", "file:///t", "https://example.com/t", "t\0", "t\0.safetensors", "\0",
    "\ud800", " t", "t ", "T", "*", "t/", "t/.", "t/t", "sub", ".", "i.json", "x" * 256, "x" * 5000, "x/" * 3000,
    "x" * 10**6,
)
# fmt: on


@pytest.mark.parametrize("file", LEAVES_THE_FOLDER)
def test_index_cannot_leave_its_folder(tmp_path, refused, file):
    """On no operating system: there is a table wherever it might lead."""
    folder = tmp_path / "inside"
    (folder / "sub").mkdir(parents=True)
    named = file.replace("{}", str(tmp_path))
    for path in (tmp_path / "t", folder / "t", folder / "sub" / "t"):
        path.write_bytes(FOREIGN)
    if "\\" in named or ":" in named:
        (folder / named.replace("/", "-")).write_bytes(FOREIGN)
    (folder / "i.json").write_text(json.dumps({"weight_map": {"wte.weight": named, "wpe.weight": "t"}}))
    refused(folder / "i.json", "i.json: the file of 'wte.weight' must lie in the index's folder, got ")
    assert open_table(folder / "i.json", "wpe.weight").vocab_size == 7


@pytest.mark.parametrize(
    "file",
    NO_FILES,
    ids=lambda file: ascii(file[:20]) + (f" of {len(file)}" if len(file) > 20 else ""),
)
def test_index_that_names_no_file_is_refused(tmp_path, refused, file):
    (tmp_path / "sub").mkdir()
    (tmp_path / "t").write_bytes(FOREIGN)
    (tmp_path / "i.json").write_text(json.dumps({"weight_map": {"wte.weight": file}}))
    if file in ("t/", "t/."):  # which Python's paths take for t
        assert outcome(tmp_path / "i.json") in ("same", "refused")
    else:
        refused(tmp_path / "i.json", str(tmp_path))


def test_control_characters_in_names_are_escaped(tmp_path):
    """A tensor's name may hold ends of lines and what moves the cursor; an error stays one line, of what can be seen."""
    names = ["wte.weight\n\x1b[2Jno error", "\r\x1b]0;x\x07wte.weight", "\u2028.embedding", "x.embedding"]
    texts = []
    (tmp_path / "t").write_bytes(
        safetensors({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names})
    )
    for name in names:
        (tmp_path / "i.json").write_text(json.dumps({"weight_map": {**dict.fromkeys(names, "x"), "wte.weight": name}}))
        for path, tensor in ((tmp_path / "t", name), (tmp_path / "t", "absent"), (tmp_path / "i.json", None)):
            with pytest.raises(ValueError, match=str(tmp_path)) as caught:
                open_table(path, tensor)
            texts.append(str(caught.value))
        (tmp_path / "i.json").write_text(json.dumps({"weight_map": {"wte.weight": name}}))
        with pytest.raises(ValueError, match=str(tmp_path)) as caught:
            open_table(tmp_path / "i.json")
        texts.append(str(caught.value))
    assert [text for text in texts if not text.isprintable()] == []


def test_error_messages_are_bounded(tmp_path):
    """However long what is wrong is: one line may be short, and of a megabyte."""
    long = "x" * 10**6
    (tmp_path / "t").write_bytes(
        safetensors({long: entry(VALUES[:12]), long[1:]: entry(VALUES[12:], 240)}, VALUES.tobytes())
    )
    (tmp_path / "i.json").write_text(json.dumps({"weight_map": {"wte.weight": long}}))
    (tmp_path / "j.json").write_text(json.dumps({"weight_map": {"wte.weight": f"../{long}"}}))
    paths = [tmp_path / "t", tmp_path / "i.json", tmp_path / "j.json"]
    lengths = {}
    for path in paths:
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as caught:
            open_table(path)
        lengths[path.relative_to(tmp_path)] = len(str(caught.value))
    assert {path: length for path, length in lengths.items() if length > 2000} == {}


# Things that are no files


PLACES = {
    "the path": ("merged.safetensors", "merged.safetensors", {}),
    "the file of a folder": ("folder", "folder/table.safetensors", {}),
    "model.safetensors": ("folder", "folder/model.safetensors", {}),
    "the file of an index": ("index.json", "t", {}),
    "an index": ("index.json", "index.json", {}),
    "a folder's index": ("folder", "folder/model.safetensors.index.json", {}),
    "a part": ("parts", "parts/mp_rank_01/model.safetensors", {"vocab_size": 24}),
}


def make_pipe(path):
    os.mkfifo(path)


def make_loop(path):
    path.symlink_to(path.name)


def make_loop_of_two(path):
    path.symlink_to(f"{path.name}.other")
    path.with_name(f"{path.name}.other").symlink_to(path.name)


def make_link_to_nothing(path):
    path.symlink_to("/nowhere/at/all")


def make_link_to_zeros(path):
    path.symlink_to("/dev/zero")


def make_link_to_the_terminal(path):
    path.symlink_to("/dev/tty")


THINGS = [Path.mkdir, make_pipe, make_loop, make_loop_of_two, make_link_to_nothing, make_link_to_zeros]
THINGS += [make_link_to_the_terminal]


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__name__)
@pytest.mark.parametrize("place", PLACES)
def test_pipe_folder_or_loop_is_refused_at_once(tmp_path, put, refused, thing, place):
    for name in FORMS:
        put(name)
    (tmp_path / "folder").mkdir()
    (tmp_path / "t").write_bytes(FOREIGN)
    (tmp_path / "index.json").write_text('{"weight_map": {"wte.weight": "t"}}')
    path, name, options = PLACES[place]
    (tmp_path / name).unlink(missing_ok=True)
    thing(tmp_path / name)
    refused(tmp_path / path, str(tmp_path), **options)
    if place == "the path":
        refused([tmp_path / path], f"{path}: (not a|no such) file", vocab_size=24)


def test_folder_that_contains_itself(tmp_path, refused):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "again").symlink_to("../inside")
    refused(tmp_path / "loop", "loop: no such file or folder")
    refused(tmp_path / "loop" / "table.safetensors", "no such file or folder")
    refused(tmp_path / "inside", "inside: no safetensors file in it")
    (tmp_path / "inside" / "table.safetensors").write_bytes(FOREIGN)
    assert outcome(tmp_path / "inside" / "again" / "again") == "same"


# Files that change once the table is open, and disks that fail


CHANGES = {
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "removed": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a loop": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "a link to zeros": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_file_changed_after_opening_is_noticed(put, change):
    path = put("source")
    table = open_table(path)
    CHANGES[change](path)
    for start, stop in ((0, 24), (23, 24)):
        with pytest.raises(ValueError, match="source: "):
            table.rows(start, stop)
    with pytest.raises(ValueError, match="source: "):
        table.read_rows(0, np.zeros((24, 5), np.float64))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENXIO])
@pytest.mark.parametrize("name", ["source", "parts"])
def test_read_error_names_the_file(put, monkeypatch, name, number):
    table = open_table(put(name), vocab_size=24)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", fail)
    for dtype in (np.float32, np.float64):
        with pytest.raises(ValueError, match=f"{name}.*: .*{os.strerror(number)}"):
            table.read_rows(0, np.zeros((24, 5), dtype))


@pytest.mark.parametrize("name", ["merged.safetensors", "parts", "index.json"])
def test_permission_error_names_the_file(tmp_path, put, monkeypatch, name):
    for original in FORMS:
        put(original)
    (tmp_path / "index.json").write_text('{"weight_map": {"wte.weight": "merged.safetensors"}}')

    def fail(path, *_, **__):  # root, as whom tests may run, is never refused
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(builtins, "open", fail)
    monkeypatch.setattr(io, "open", fail)
    with pytest.raises(ValueError, match=f"{name}.*: .*Permission denied"):
        open_table(tmp_path / name, vocab_size=24)


# Pickles


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def bomb(tmp_path):
    mark = tmp_path / "unpickled"
    yield pickle.dumps(Bomb(mark))
    assert not mark.exists()


def test_the_bomb_works(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "unpickled")))
    assert (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    "suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".safetensors", ".json", ""]
)
def test_pickle_of_any_name_is_never_loaded(tmp_path, bomb, refused, suffix):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / f"table{suffix}"
    path.write_bytes(bomb)
    refused(path, f"table{suffix}: ")
    refused(folder, "folder")
    refused([path, path], f"table{suffix}: ", vocab_size=3)
    if suffix != ".json":
        (folder / "i.json").write_text(json.dumps({"weight_map": {"wte.weight": path.name}}))
        refused(folder / "i.json", f"table{suffix}: ")


def test_pickle_in_place_of_a_part_is_never_loaded(put, bomb, refused):
    parts = put("parts")
    (parts / "mp_rank_01" / "model.safetensors").rename(parts / "mp_rank_01" / "model_optim_rng.pt")
    (parts / "mp_rank_01" / "model_optim_rng.pt").write_bytes(bomb)
    refused(parts, "mp_rank_01: no safetensors file in it; pickle files", vocab_size=24)
    refused([parts / "mp_rank_01" / "model_optim_rng.pt"], "model_optim_rng.pt: a pickle file, which", vocab_size=24)


def test_pickle_inside_a_header_is_text(tmp_path, bomb):
    (tmp_path / "t").write_bytes(safetensors({"__metadata__": {"x": bomb.decode("latin-1")}, **ONE}, VALUES.tobytes()))
    assert outcome(tmp_path / "t") == "same"


# Thousands of mutations


def flipped_byte(rng, data, at):
    data[at] ^= rng.integers(1, 256)


def flipped_bit(rng, data, at):
    data[at] ^= 1 << rng.integers(8)


def cut_short(rng, data, at):
    del data[at:]


def inserted(rng, data, at):
    data[at:at] = rng.bytes(rng.integers(1, 17))


def left_out(rng, data, at):
    del data[at : at + rng.integers(1, 17)]


def exchanged_blocks(rng, data, at):
    size = int(rng.choice([1, 2, 4, 20, 60, 64]))
    other = int(rng.integers(0, max(1, len(data) - size)))
    low, high = sorted((min(at, max(0, len(data) - size)), other))
    if low + size <= high:
        data[low : low + size], data[high : high + size] = data[high : high + size], data[low : low + size]


def repeated_block(rng, data, at):
    size = int(rng.integers(1, 100))
    data[at:at] = data[at : at + size]


def written_over(rng, data, at):
    """As by a write that went to the wrong place."""
    size = int(rng.choice([1, 4, 20, 60, 64]))
    other = int(rng.integers(0, len(data)))
    data[at : at + size] = data[other : other + size][: len(data) - at]


def cleared(rng, data, at):
    size = min(int(rng.integers(1, 100)), len(data) - at)
    data[at : at + size] = bytes([int(rng.choice([0x00, 0x20, 0xFF]))]) * size


def longer(rng, data, at):
    data += rng.bytes(rng.integers(1, 100))


def another_number(rng, data, at):
    """Instead of one of those that are written out in figures before there."""
    places = [*re.finditer(rb"(?<![\w.])\d+(?![\w.])", data[:at])]
    if places:
        number = places[rng.integers(len(places))]
        value = int(number[0][:30])
        choices = [value + 1, value - 1, -value, 10 * value, value // 2, 0, 2**31, 2**62, 2**63, 2**64, 10**400]
        choices += [f"{value}.0", f"{value}e0", "1e400", "NaN", "true", "null", f'"{value}"', f"[{value}]", "0.5", ""]
        data[number.start() : number.end()] = str(choices[rng.integers(len(choices))]).encode()


MUTATIONS = [
    flipped_byte,
    flipped_bit,
    cut_short,
    inserted,
    left_out,
    exchanged_blocks,
    repeated_block,
    written_over,
    cleared,
    longer,
    another_number,
]


def mutated(rng, whole, end):
    """The file with one to three mutations of what is before ``end``, and what they are called."""
    data, names = bytearray(whole[:end]), []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if data:
            mutation = MUTATIONS[rng.integers(len(MUTATIONS))]
            at = int(rng.integers(0, len(data)))
            mutation(rng, data, at)
            names.append(f"{mutation.__name__} at {at}")
    return bytes(data) + whole[end:], ", ".join(names)


def header_end(whole):
    return 8 + int.from_bytes(whole[:8], "little")


class Fuzz:
    """Counts what comes of mutations of a file, as all its rows and as the rows of seven ranks; remembers what is wrong."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.counts = {"refused": 0, "same": 0}
        self.wrong = {}

    def __call__(self, opened, path, end=None, **options):
        whole = path.read_bytes()
        data, name = mutated(self.rng, whole, len(whole) if end is None else end)
        path.write_bytes(data)
        signal.setitimer(signal.ITIMER_REAL, 10)  # each anew
        try:
            for partition in (None, VocabPartition(24, 7, "even")):
                found = outcome(opened, partition, **options)
                if found in self.counts:
                    self.counts[found] += 1
                else:
                    self.wrong[f"{path.name}: {name}{' by ranks' if partition else ''}"] = found
        finally:
            path.write_bytes(whole)


CASES = pytest.mark.parametrize("cases", [150, pytest.param(10_000, marks=pytest.mark.slow)])


def run(fuzz, cases, case):
    for _ in range(cases):
        case()
    assert fuzz.wrong == {}
    assert fuzz.counts["refused"] > cases  # of two outcomes a case; or the mutations would not be worth the name


@CASES
@pytest.mark.parametrize("name", ["source", "merged.safetensors"])
def test_mutations_of_a_header(put, cases, name):
    """Rows have no checksum: other bytes there are other rows. So are they in another shape, which is unlikely."""
    path, fuzz = put(name), Fuzz(5)
    run(fuzz, cases, lambda: fuzz(path, path, header_end(path.read_bytes())))


@CASES
def test_mutations_of_the_headers_of_parts(put, cases):
    folder, fuzz = put("parts"), Fuzz(6)
    files = sorted(folder.glob("*/*"))

    def case():
        path = files[fuzz.rng.integers(3)]
        fuzz(folder, path, header_end(path.read_bytes()), vocab_size=24)

    run(fuzz, cases, case)


@CASES
def test_mutations_of_an_index(tmp_path, cases):
    (tmp_path / "a.safetensors").write_bytes(FOREIGN)
    other = safetensors({"lm_head.weight": entry(VALUES)}, VALUES[::-1].tobytes())
    (tmp_path / "b.safetensors").write_bytes(other)
    index = {"wte.weight": "a.safetensors", "wpe.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}
    path, fuzz = tmp_path / "model.safetensors.index.json", Fuzz(7)
    path.write_text(json.dumps({"metadata": {"total_size": 1100}, "weight_map": index}, indent=2))
    run(fuzz, cases, lambda: fuzz(tmp_path, path))
