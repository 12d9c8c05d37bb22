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
import secrets
import shutil
import signal
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import numpy as np
import pytest
from safetensors.numpy import load_file

from shared import VocabPartition
from shared.tables import row_checks, table_file
from shared.tables.find_table import open_table
from shared.tables.layouts import LAYOUTS
from shared.tables.manifest import Manifest
from shared.tables.table_writer import convert_table

VALUES = np.random.default_rng(7).standard_normal((24, 5)).astype(np.float32)
PARTITION = VocabPartition(24, 3, 36)
"""Of the sets here: twelve rows, twelve, and none."""


def safetensors(header, data=b"", length=None):
    """The bytes of a safetensors file, whatever its header is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(values, first=0):
    return {"dtype": "F32", "shape": list(values.shape), "data_offsets": [first, first + values.nbytes]}


FOREIGN = safetensors(
    {"__metadata__": {"format": "pt"}, "wpe.weight": entry(VALUES[:7]), "wte.weight": entry(VALUES, VALUES[:7].nbytes)},
    VALUES[:7].tobytes() + VALUES.tobytes(),
)
"""A file of someone else's, with another table before the one to find."""


def contents(folder):
    """Everything below a folder, byte for byte."""
    return {path: path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The files of one and the same table as a merged file, a set of shards and Megatron-style parts; of a second set.

    Whatever runs before, they are the same to the last byte, and so are the mutations of them.
    """
    folder = tmp_path_factory.mktemp("originals")
    (folder / "source").write_bytes(FOREIGN)
    (folder / "other").write_bytes(safetensors({"wte.weight": entry(VALUES)}, VALUES[::-1].tobytes()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_checks, "_BLOCK_BYTES", 64)  # a checksum for every three rows
        patch.setattr(secrets, "token_hex", lambda size: "0123456789abcdef")
        for layout, name in (("file", "merged"), ("shards", "set"), ("megatron", "parts")):
            convert_table(open_table(folder / "source"), folder / name, layout, PARTITION)
        patch.setattr(secrets, "token_hex", lambda size: "fedcba9876543210")
        convert_table(open_table(folder / "other"), folder / "other_set", "shards", PARTITION)
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


@pytest.fixture
def a_set(put):
    return put("set")


def shard(folder, rank):
    return next(folder.glob(f"rank-{rank:05d}-*"))


def edit_manifest(folder, change):
    """Let ``change(manifest)`` alter it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


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


@pytest.fixture(scope="module")
def targets(tmp_path_factory, originals):
    """A table of another dtype in each layout, which no hostile source may change."""
    folder = tmp_path_factory.mktemp("targets")
    (folder / "source").write_bytes(originals["source"])
    for layout in LAYOUTS:
        convert_table(open_table(folder / "source"), folder / layout, layout, VocabPartition(24, 2), dtype="float16")
    return folder


@pytest.fixture
def refused(targets):
    """``refused(path, match)``: neither its rows can be read nor can it be converted, which leaves all as it was."""

    def check(path, match, **options):
        def reading():
            table = open_table(path, **options)
            table.rows(0, table.vocab_size)

        def converting(layout, name):
            table = open_table(path, **options)
            partition = VocabPartition(table.vocab_size, 4, "even")
            convert_table(table, targets / name, layout, partition, force=True)

        before = contents(targets)
        works = [
            (lambda layout=layout, name=name: converting(layout, name))
            for layout in LAYOUTS
            for name in (layout, "new")
        ]
        for work in (reading, *works):
            with pytest.raises(ValueError, match=match) as caught:
                work()
            assert_clear(caught.value, path)
        assert contents(targets) == before

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


def test_the_originals_are_whole(put, tmp_path):
    """Or all would be refused for a reason of its own."""
    for name, options in (("source", {}), ("merged", {}), ("set", {}), ("parts", {"vocab_size": 24})):
        assert outcome(put(name), **options) == "same"
        assert outcome(put(name), VocabPartition(24, 5, "even"), **options) == "same"
    assert outcome(put("other_set")).startswith("another table: wte.weight float32 [24, 5]")
    assert {path.name: path.stat().st_size for path in put("set").iterdir() if "00002-of" in path.name}


# Files that are cut short, or are no safetensors files at all


@pytest.mark.parametrize("name", ["source", "merged", "set/manifest.json"])
def test_every_truncation_is_refused(put, name):
    path = put(name.split("/")[0])
    path = path.parent / name
    whole = path.read_bytes()
    end = len(whole) - (name == "set/manifest.json")  # whose last byte is a line's end
    for size in [*range(40), *range(40, end, 3), end - 1]:
        path.write_bytes(whole[:size])
        assert outcome(path) == "refused", size


def test_a_truncated_or_longer_shard_is_refused(a_set, refused):
    for rank in range(3):
        path = shard(a_set, rank)
        whole = path.read_bytes()
        for size in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1, len(whole) + 1, len(whole) + 64):
            path.write_bytes((whole + bytes(64))[:size])
            refused(
                a_set, rf"rank-0000{rank}-\S+: must have {len(whole)} bytes, has {size}: damaged, or of another set"
            )
        path.write_bytes(whole)
    assert outcome(a_set) == "same"


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
    **{
        f"shape {shape}": with_entry(shape=shape)
        for shape in (
            [24, 6],
            [25, 5],
            [24],
            [],
            [24, 5, 2],
            [-24, -5],
            [-24, 5],
            [24.0, 5],
            ["24", "5"],
            [True, 120],
            [None, 5],
            [[24], [5]],
            24,
            "24x5",
            {"0": 24, "1": 5},
            [2**62, 2**62],
            [2**63, 2],
            [2**64, 5],
            [2**64 + 24, 5],
            [10**400, 5],
            [0, 5],
        )
    },
    **{
        f"offsets {offsets}": with_entry(data_offsets=offsets)
        for offsets in (
            [480, 0],
            [0, 479],
            [0, 481],
            [1, 481],
            [4, 480],
            [-480, 0],
            [-1, 479],
            [2**64 - 480, 2**64],
            [2**63, 2**63 + 480],
            [2**62, 2**62 + 480],
            [0.0, 480.0],
            ["0", "480"],
            [0],
            [0, 480, 480],
            [],
            480,
            None,
            {"0": 480},
            [False, 480],
        )
    },
    "tables that overlap": two([0, 240], [120, 360]),
    "tables at one place": two([0, 240], [0, 240]),
    "a gap between tables": two([0, 240], [241, 481]),
    "a gap before the first": two([240, 480], [480, 720]),
    "bytes after the last": two([0, 240], [240, 480]) | {"x": with_entry(data_offsets=[480, 960])["wte.weight"]},
    "a table beyond the end": two([0, 240], [480, 720]),
}


@pytest.mark.parametrize("name", NO_TABLES)
def test_what_is_no_safetensors_file_is_refused(tmp_path, refused, name):
    path = tmp_path / "table.safetensors"
    path.write_bytes(NO_TABLES[name])
    with little_memory():
        refused(path, "table.safetensors: not a whole safetensors file")
        refused(tmp_path, "table.safetensors: not a whole safetensors file")


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_header_that_does_not_hold_together_is_refused(tmp_path, refused, name):
    path = tmp_path / "table.safetensors"
    path.write_bytes(safetensors(BAD_HEADERS[name], VALUES.tobytes()))
    for options in ({}, {"tensor_name": "wte.weight"}):
        refused(path, r"table.safetensors: ", **options)


def test_the_header_they_were_made_of_is_good(tmp_path):
    (tmp_path / "t").write_bytes(safetensors(ONE, VALUES.tobytes()))
    assert outcome(tmp_path / "t") == "same"
    (tmp_path / "t").write_bytes(safetensors(two([240, 480], [0, 240]), VALUES.tobytes()))
    assert open_table(tmp_path / "t").rows(0, 12).tobytes() == VALUES[12:].tobytes()


def test_another_file_in_place_of_the_tables_is_another_table_only_as_safetensors_itself_has_it(tmp_path):
    """A shape exchanged in a file without checksums is nothing that could be noticed."""
    path = tmp_path / "t"
    path.write_bytes(safetensors(with_entry(shape=[5, 24]), VALUES.tobytes()))
    assert open_table(path).rows(0, 5).tobytes() == load_file(path)["wte.weight"].tobytes()


# Files that tell of themselves what is not so, with checksums that fit


def telling(path, change=lambda facts: {}, shape=(3, 2), data=bytes(24), text=None):
    """A table file of six zeros that says of itself what it likes."""
    facts = {
        "format": "parallel-vocab-embedding table",
        "version": 1,
        "tensor": "wte.weight",
        "dtype": "float32",
        "vocab_size": shape[0],
        "emb_size": shape[1],
        "world_size": 1,
        "padded_vocab_size": shape[0],
        "cuts": [0, shape[0]],
        "block": 1,
        "crc32": f"{zlib.crc32(bytes(8)):08x}" * 3,
        "set_id": "0123456789abcdef",
    }
    facts.update(change(facts) if callable(change) else change)
    facts = {name: value for name, value in facts.items() if value != "left out"}
    text = json.dumps(facts) if text is None else text
    metadata = {"pve": text, "pve.crc32": f"{zlib.crc32(text.encode()):08x}"}
    place = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 4 * shape[0] * shape[1]]}
    path.write_bytes(safetensors({"__metadata__": metadata, "wte.weight": place}, data))
    return path


CLAIMS = {
    "format": ["parallel-vocab-embedding shards", "", None, 1, "left out"],
    "version": [0, 2, "1", 1.0, True, None, "left out"],
    "tensor": ["wpe.weight", "", 3, None, ["wte.weight"], "left out"],
    "dtype": ["float64", "float16", "int32", "", 32, None, "left out"],
    "vocab_size": [0, -3, 2, 4, 3.0, True, "3", None, 2**62, 2**70, 10**400, float("inf"), "left out"],
    "emb_size": [0, -2, 1, 3, 2.0, "2", None, 2**62, float("nan"), "left out"],
    "world_size": [0, -1, 2, 1.0, True, "1", None, 2**62, "left out"],
    "padded_vocab_size": [0, 2, -3, 3.0, True, "3", "even", None, "left out"],
    "cuts": [
        [],
        [0],
        [3],
        [0, 2],
        [1, 3],
        [1, 4],
        [3, 0],
        [0, 2, 1, 3],
        [0, 4],
        [-1, 2],
        [0.0, 3],
        [0, 3.0],
        [False, 3],
        ["0", "3"],
        [0, None, 3],
        [[0, 3]],
        "03",
        {"0": 0, "3": 3},
        None,
        3,
        [0, 2**62],
        [2**62, 2**62 + 3],
        "left out",
    ],
    "block": [0, -1, 2, 1.0, True, "1", None, [1], 2**62, 2**64, 10**400, "left out"],
    "crc32": [
        "",
        "00000000",
        "0" * 16,
        "0" * 22,
        "0" * 23,
        "0" * 24,
        "0" * 32,
        "xyz",
        "é" * 24,
        3,
        None,
        [1, 2, 3],
        "left out",
    ],
    "set_id": [3, None, ["x"], "left out"],
    "an unknown one": [1],
}


@pytest.mark.parametrize("field", CLAIMS)
def test_a_claim_that_is_not_so_is_refused_though_its_checksum_fits(tmp_path, field):
    survived = {}
    for value in CLAIMS[field]:
        with little_memory():
            found = outcome(telling(tmp_path / "table.safetensors", {field: value}))
        if found != "refused":
            survived[str(value)] = found
    assert survived == {}


def test_the_claims_they_were_made_of_are_good(tmp_path):
    telling(tmp_path / "t")
    assert not open_table(tmp_path / "t").rows(0, 3).any()
    telling(tmp_path / "t", {"cuts": [0, 1, 1, 3]})
    assert not open_table(tmp_path / "t").rows(0, 3).any()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "3",
        '"x"',
        "{",
        "{}",
        '{"format": NaN}',
        '{"version": 1, "version": 1}',
        "[" * 10**5,
        "\0",
        "{}{}",
    ],
)
def test_metadata_that_is_no_object_is_refused(tmp_path, refused, text):
    refused(telling(tmp_path / "table.safetensors", text=text), "table.safetensors: a damaged table file")


@pytest.mark.parametrize("missing", ["pve", "pve.crc32"])
def test_metadata_without_its_checksum_and_a_checksum_without_metadata_are_refused(put, refused, missing):
    path = put("merged")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(f'"{missing}":'.encode(), f'"{"x" * len(missing)}":'.encode()))
    refused(path, "merged: a damaged table file")


def test_numbers_of_rows_that_no_file_has_take_neither_memory_nor_time(tmp_path, refused):
    """A tensor without columns has no bytes, and so as many rows as it likes."""
    for rows in (2**33, 2**62, 2**63, 2**64 - 1):
        for change in ({"crc32": ""}, {"crc32": "", "block": 2**62}, {"crc32": "", "cuts": [0, 1, rows]}):
            path = telling(tmp_path / "table.safetensors", change, (rows, 0), b"")
            with little_memory():
                refused(path, "table.safetensors: ")


def test_rows_that_take_no_room_on_the_disk_take_no_memory(tmp_path, refused):
    """A file may say that it is a tebibyte, most of it a hole, and that each row has a checksum."""
    rows = 2**38
    path = telling(tmp_path / "table.safetensors", {"crc32": ""}, (rows, 1), b"")
    os.truncate(path, path.stat().st_size + rows * 4)
    with little_memory((1 << 40) + (1 << 30)):  # safetensors maps the file
        refused(path, "table.safetensors: a damaged table file")


@pytest.mark.parametrize("block", [2**62, 2**63, 2**70])
@pytest.mark.parametrize("first", [3, 2**62, 2**63, 2**70])
def test_rows_and_blocks_beyond_every_integer_of_numpy(tmp_path, refused, first, block):
    size = {"vocab_size": first + 3, "padded_vocab_size": first + 3, "cuts": [first, first + 3], "block": block}
    path = telling(tmp_path / "table.safetensors", {**size, "crc32": "0" * 8})
    refused(path, "(table.safetensors|manifest.json): ")


# Manifests


NUMBERS = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "-1",
    "-0.0",
    "0.5",
    "{}.0",
    "{}.5",
    "{}e0",
    '"{}"',
    "true",
    "false",
    "null",
    "[{}]",
    "{{}}",
    "[]",
    '""',
    '"even"',
    "-{}",
    "0{}",
    "+{}",
    "0x{}",
    "{}_0",
    "{}{}",
    "1" * 5000,
    str(2**31),
    str(2**62),
    str(2**63),
    str(2**64),
    str(10**400),
    "",
]
"""What stands in the place of a number, which is {} in it."""


FIELDS = [
    *((name,) for name in ("version", "vocab_size", "emb_size", "world_size", "padded_vocab_size")),
    *(("shards", rank, name) for rank in range(3) for name in ("start", "stop", "bytes")),
]


def with_in_place(folder, field, text):
    """Put a text in the place of a manifest's field; returns what was there, or None if it is that text already."""
    manifest = inner = json.loads((folder / "manifest.json").read_text())
    for key in field[:-1]:
        inner = inner[key]
    before, inner[field[-1]] = json.dumps(inner[field[-1]]), "in place"
    (folder / "manifest.json").write_text(json.dumps(manifest).replace('"in place"', text.replace("{}", before)))
    return before


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: " ".join(map(str, field)))
def test_only_the_number_itself_is_taken_for_a_number_of_a_manifest(put, field):
    """Not one that is equal to it, either: what reads the file next might not find it equal."""
    survived = {}
    for text in NUMBERS:
        folder = put("set")
        before = with_in_place(folder, field, text)
        if (before, text) != ("0", "-{}"):
            with little_memory():
                found = outcome(folder)
            if found != "refused":
                survived[text[:40]] = found
    assert survived == {}


TEXTS = ['""', '"x"', "3", "null", "true", "[]", "{ }", '["x"]', "[{}]", '" "', '"\\u0000"', '"\\ud800"', '"../x"']


@pytest.mark.parametrize(
    "field",
    [*((name,) for name in ("format", "tensor", "dtype", "set_id")), ("shards", 1, "file"), ("shards", 1, "crc32")],
    ids=lambda field: " ".join(map(str, field)),
)
def test_a_text_of_a_manifest_that_is_another_is_refused(put, field):
    survived = {}
    for text in TEXTS:
        folder = put("set")
        with_in_place(folder, field, text)
        found = outcome(folder)
        if found != "refused":
            survived[text] = found
    assert survived == {}


def without(name):
    return lambda manifest: manifest.pop(name)


def shards_changed(change):
    def apply(manifest):
        manifest["shards"] = change(manifest["shards"])

    return apply


def rows_claimed(rank, start, stop):
    return lambda manifest: manifest["shards"][rank].update(start=start, stop=stop)


MANIFESTS = {
    **{f"no {name}": without(name) for name in [field.name for field in Manifest.__dataclass_fields__.values()]},
    "no format": without("format"),
    "no version": without("version"),
    "of another program": lambda manifest: manifest.update(format="orbax"),
    "of the next version": lambda manifest: manifest.update(version=2),
    "with an unknown field": lambda manifest: manifest.update(compression="zip"),
    "with a field called self": lambda manifest: manifest.update(self=1),
    "without any shard": shards_changed(lambda shards: []),
    "without the last shard": shards_changed(lambda shards: shards[:-1]),
    "with a shard more": shards_changed(lambda shards: [*shards, shards[-1]]),
    "with a shard twice": shards_changed(lambda shards: [shards[0], shards[0], shards[2]]),
    "with shards in another order": shards_changed(lambda shards: shards[::-1]),
    "with shards by name": shards_changed(lambda shards: {str(rank): each for rank, each in enumerate(shards)}),
    "with shards that are a text": shards_changed(lambda shards: "abc"),
    "with shards that are numbers": shards_changed(lambda shards: [1, 2, 3]),
    "with shards that are lists": shards_changed(lambda shards: [[*each.values()] for each in shards]),
    "with shards that are null": shards_changed(lambda shards: [None] * 3),
    "with a shard of nothing": shards_changed(lambda shards: [{}, *shards[1:]]),
    "with a shard that has an unknown field": shards_changed(lambda shards: [{**each, "offset": 0} for each in shards]),
    "with rows in two shards": rows_claimed(1, 0, 12),
    "with rows in no shard": rows_claimed(0, 0, 11),
    "with rows the wrong way round": rows_claimed(1, 24, 12),
    "with rows before the first": rows_claimed(0, -12, 0),
    "with rows after the last": rows_claimed(2, 24, 36),
    "with another tensor": lambda manifest: manifest.update(tensor="wpe.weight"),
    "with another dtype of that size": lambda manifest: manifest.update(dtype="int32"),
    "with another dtype": lambda manifest: manifest.update(dtype="bfloat16"),
    "with another width": lambda manifest: manifest.update(emb_size=4),
    "with a row more": lambda manifest: manifest.update(vocab_size=25),
    "with more padding": lambda manifest: manifest.update(padded_vocab_size=39),
    "with less padding": lambda manifest: manifest.update(padded_vocab_size=24),
    "with more ranks": lambda manifest: manifest.update(world_size=4),
    "with 2**62 ranks": lambda manifest: manifest.update(world_size=2**62, padded_vocab_size=2**62),
    "with 2**62 rows": lambda manifest: manifest.update(vocab_size=2**62, padded_vocab_size=3 * 2**61),
    "with checksums exchanged": shards_changed(
        lambda shards: [
            {**each, "crc32": other["crc32"]} for each, other in zip(shards, shards[1:] + shards[:1], strict=True)
        ]
    ),
    "with a longer checksum": shards_changed(
        lambda shards: [{**each, "crc32": "0" + each["crc32"]} for each in shards]
    ),
    "with checksums in capitals": shards_changed(
        lambda shards: [{**e, "crc32": e["crc32"].upper() + " "} for e in shards]
    ),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_does_not_hold_together_is_refused(a_set, refused, name):
    edit_manifest(a_set, MANIFESTS[name])
    with little_memory():
        for path in (a_set, a_set / "manifest.json", shard(a_set, 1)):
            refused(path, r"(manifest\.json|rank-0000\S+): ")


def test_a_manifest_of_one_rank_that_contradicts_its_shard_about_the_padding_is_refused(tmp_path, originals):
    (tmp_path / "source").write_bytes(originals["source"])
    convert_table(open_table(tmp_path / "source"), tmp_path / "set", "shards", VocabPartition(24, 1, 40))
    edit_manifest(tmp_path / "set", lambda manifest: manifest.update(padded_vocab_size=48))
    assert outcome(tmp_path / "set") == "refused"


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
@pytest.mark.parametrize("file", ["manifest.json", "model.safetensors.index.json"])
def test_what_is_no_json_object_is_refused(a_set, refused, name, file):
    (a_set / "manifest.json").unlink()
    (a_set / file).write_bytes(DOCUMENTS[name])
    for path in (a_set, a_set / file):
        refused(path, f"{file}: ")


@pytest.mark.parametrize("file", ["manifest.json", "an.index.json"])
def test_json_that_is_read_in_several_ways_is_refused(a_set, refused, file):
    path = a_set / file
    (a_set / "table.safetensors").write_bytes(FOREIGN)
    (a_set / "an.index.json").write_text('{"weight_map": {"wte.weight": "table.safetensors"}}')
    assert outcome(path) == "same"
    good = path.read_text().strip()
    key = "tensor" if file == "manifest.json" else "weight_map"
    for bad in (
        good.replace(f'"{key}"', f'"{key}": {{}}, "{key}"'),
        good.replace(f'"{key}"', f'"{key}": {{}}, "\\u00{ord(key[0]):x}{key[1:]}"'),
        good.replace("{", '{"x": {"y": 1, "y": 1}, ', 1)
        if file != "manifest.json"
        else good.replace('"file"', '"bytes": 1, "file"'),
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
        refused(path, f"{file}: ")
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):  # as which it is the same text
        path.write_bytes(good.encode(encoding))
        assert outcome(path) in ("refused", "same")


def test_a_file_larger_than_any_index_is_not_read(a_set, refused):
    for file in ("manifest.json", "an.index.json"):
        path = a_set / file
        path.touch()
        os.truncate(path, 2**40)  # a hole, which takes no room on the disk
        with little_memory():
            refused(path, f"{file}: {2**40} bytes, too large for an index")


def test_an_index_of_very_many_tensors_is_read(tmp_path):
    (tmp_path / "t").write_bytes(FOREIGN)
    names = {f"model.layers.{n}.mlp.weight": f"{n}.safetensors" for n in range(30_000)}
    (tmp_path / "i.json").write_text(json.dumps({"weight_map": {**names, "wte.weight": "t"}}))
    assert outcome(tmp_path / "i.json") == "same"


# Indexes


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
def test_an_index_without_a_map_of_file_names_is_refused(tmp_path, refused, document):
    (tmp_path / "t").write_bytes(FOREIGN)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(document))
    refused(path, "index.json: not an index of a checkpoint, it has no weight_map")
    refused(tmp_path, "index.json: not an index of a checkpoint, it has no weight_map", tensor_name="wte.weight")


@pytest.mark.parametrize(
    "file",
    [
        "../t",
        "../inside/t",
        "sub/../t",
        "sub/../../t",
        "./../t",
        "..",
        "/",
        "{}/t",
        "//{}/t",
        "..\\t",
        "sub\\..\\..\\t",
        "\\t",
        "\\\\server\\share\\t",
        "//server/share/t",
        "C:\\t",
        "C:/t",
        "C:t",
        "c:",
        "t\\",
        "",
    ],
)
def test_an_index_leads_nowhere_but_to_its_own_folder(tmp_path, refused, file):
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
    [
        "missing",
        "~/t",
        "$HOME/t",
        "%2e%2e/t",
        "file:///t",
        "https://example.com/t",
        "t\0",
        "t\0.safetensors",
        "\0",
        "\ud800",
        " t",
        "t ",
        "T",
        "*",
        "t/",
        "t/.",
        "t/t",
        "sub",
        ".",
        "i.json",
        "x" * 256,
        "x" * 5000,
        "x/" * 3000,
        "x" * 10**6,
    ],
    ids=lambda file: ascii(file[:20]) + (f" of {len(file)}" if len(file) > 20 else ""),
)
def test_an_index_that_names_what_is_no_file_there_is_refused(tmp_path, refused, file):
    (tmp_path / "sub").mkdir()
    (tmp_path / "t").write_bytes(FOREIGN)
    (tmp_path / "i.json").write_text(json.dumps({"weight_map": {"wte.weight": file}}))
    if file in ("t/", "t/."):  # which Python's paths take for t
        assert outcome(tmp_path / "i.json") in ("same", "refused")
    else:
        refused(tmp_path / "i.json", str(tmp_path))


def test_names_that_would_write_on_the_terminal_are_spelt_out(tmp_path):
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


def test_an_error_is_no_longer_than_can_be_read(a_set, tmp_path):
    """However long what is wrong is: one line may be short, and of a megabyte."""
    long = "x" * 10**6
    (tmp_path / "t").write_bytes(
        safetensors({long: entry(VALUES[:12]), long[1:]: entry(VALUES[12:], 240)}, VALUES.tobytes())
    )
    (tmp_path / "i.json").write_text(json.dumps({"weight_map": {"wte.weight": long}}))
    (tmp_path / "j.json").write_text(json.dumps({"weight_map": {"wte.weight": f"../{long}"}}))
    paths = [tmp_path / "t", tmp_path / "i.json", tmp_path / "j.json"]
    for field, value in (
        ("version", long),
        ("version", 10**4000),
        ("vocab_size", 10**4000),
        ("dtype", long),
        (long, 1),
    ):
        (tmp_path / f"{len(paths)}").mkdir()
        paths.append(tmp_path / f"{len(paths)}" / "manifest.json")
        paths[-1].write_text(json.dumps({**json.loads((a_set / "manifest.json").read_text()), field: value}))
    lengths = {}
    for path in paths:
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as caught:
            open_table(path)
        lengths[path.relative_to(tmp_path)] = len(str(caught.value))
    assert {path: length for path, length in lengths.items() if length > 2000} == {}


# Sets whose files are not those that were written


def test_a_missing_shard_is_named_with_its_rows(put, refused):
    for rank, rows in ((0, "0 to 11"), (1, "12 to 23")):
        folder = put("set")
        path = shard(folder, rank)
        path.unlink()
        refused(folder, f"{path.name}: missing, the shard of rank {rank} with rows {rows}")
        refused(shard(folder, 2), f"{path.name}: missing")
    folder = put("set")
    shard(folder, 2).unlink()  # which has no rows, and yet the set is not whole
    refused(folder, "rank-00002-.*: missing")


def test_exchanged_shards_are_refused(a_set, refused):
    """They are of one size."""
    left, right = shard(a_set, 0), shard(a_set, 1)
    assert left.stat().st_size == right.stat().st_size
    left.rename(a_set / "aside")
    right.rename(left)
    (a_set / "aside").rename(right)
    for path in (a_set, left, right):
        refused(path, "rank-00000-.*: not the file that manifest.json was written with")


def test_one_shard_in_place_of_two_is_refused(a_set, refused):
    shutil.copy(shard(a_set, 0), shard(a_set, 1))
    refused(a_set, "rank-00001-.*: not the file that manifest.json was written with")


@pytest.mark.parametrize("rank", range(3))
def test_a_shard_of_another_set_in_place_is_refused(a_set, put, refused, rank):
    other = put("other_set")
    assert shard(a_set, rank).stat().st_size == shard(other, rank).stat().st_size
    shutil.copy(shard(other, rank), shard(a_set, rank))
    refused(a_set, rf"rank-0000{rank}-.*: not the file that manifest.json was written with")


def test_an_older_state_of_a_shard_is_refused(a_set, put, refused):
    """The same set as far as the names tell, with other rows: as a disk gives back that had lost what was written."""
    path = shard(a_set, 0)
    whole = path.read_bytes()
    old = VALUES[:12].copy()
    old[7, 3] += 1
    path.write_bytes(whole.replace(VALUES[:12].tobytes(), old.tobytes()))
    refused(a_set, "rank-00000-.*: damaged, the checksum of rows 6 to 8 of the table does not match")


def test_a_manifest_of_another_set_is_refused(a_set, put, refused):
    shutil.copy(put("other_set") / "manifest.json", a_set)
    refused(a_set, "rank-00000-of-00003.fedcba9876543210.safetensors: missing")
    refused(shard(a_set, 0), "rank-00000-of-00003.fedcba9876543210.safetensors: missing")


def test_a_set_whose_ids_are_the_other_sets_is_refused(a_set, put, refused):
    """The manifest of one, the files of the other, renamed to fit."""
    other = put("other_set")
    for path in [*a_set.glob("rank-*")]:
        (other / path.name.replace("0123456789abcdef", "fedcba9876543210")).write_bytes(path.read_bytes())
    refused(other, "rank-00000-.*: not the file that manifest.json was written with")


def test_a_set_id_that_leads_elsewhere_is_refused(a_set, refused):
    (a_set.parent / "x.safetensors").write_bytes(shard(a_set, 0).read_bytes())
    for set_id in ("/../../x", "x/../../x", "../x", "a/b", "x\0", "\ud800", "x" * 300, "x" * 10**5, "", "\n", "..\\x"):

        def change(manifest, set_id=set_id):
            manifest["set_id"] = set_id
            for rank, each in enumerate(manifest["shards"]):
                each["file"] = f"rank-{rank:05d}-of-00003.{set_id}.safetensors"

        edit_manifest(a_set, change)
        refused(a_set, str(a_set))


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_flipped_byte_is_refused_by_whoever_reads_its_rows_and_by_nobody_else(a_set, refused, rank, place):
    path = shard(a_set, rank)
    data = bytearray(path.read_bytes())
    row = {"first": 0, "middle": 6, "last": 11}[place]
    data[len(data) - 12 * 20 + row * 20 + 3] ^= 0x40
    path.write_bytes(data)
    block = (row + 12 * rank) // 3 * 3
    refused(a_set, f"{path.name}: damaged, the checksum of rows {block} to {block + 2} of the table does not match")
    table = open_table(a_set)
    for start in range(24):
        for stop in range(start + 1, 25):
            if start < block + 3 and stop > block:
                with pytest.raises(ValueError, match=f"{path.name}: damaged, the checksum of rows {block} to"):
                    table.rows(start, stop)
            else:
                assert table.rows(start, stop).tobytes() == VALUES[start:stop].tobytes()
    assert outcome(a_set, VocabPartition(24, 8)) == "same"  # of those ranks that have their rows


def test_checksums_are_of_the_tensor_they_were_made_for(tmp_path):
    """A program may add a tensor to a table file and keep its metadata, which tell of the first one alone."""
    both = {"wte.weight": entry(np.zeros((3, 2), np.float32)), "added": entry(VALUES, 24)}
    header = telling(tmp_path / "t").read_bytes()[8:]
    metadata = json.JSONDecoder().raw_decode(header.decode("latin-1"))[0]["__metadata__"]
    (tmp_path / "t").write_bytes(safetensors({"__metadata__": metadata, **both}, bytes(24) + VALUES.tobytes()))
    assert not open_table(tmp_path / "t").rows(0, 3).any()
    assert outcome(tmp_path / "t", tensor_name="added") == "same"
    assert outcome([tmp_path / "t"], tensor_name="added", vocab_size=24) == "same"


# Things that are no files


PLACES = {
    "the path": ("merged", "merged", {}),
    "the file of a folder": ("folder", "folder/table.safetensors", {}),
    "model.safetensors": ("folder", "folder/model.safetensors", {}),
    "the file of an index": ("index.json", "t", {}),
    "an index": ("index.json", "index.json", {}),
    "a folder's index": ("folder", "folder/model.safetensors.index.json", {}),
    "a manifest": ("set/manifest.json", "set/manifest.json", {}),
    "a folder's manifest": ("set", "set/manifest.json", {}),
    "a shard": ("set", "set/rank-00001-of-00003.0123456789abcdef.safetensors", {}),
    "a shard without rows": ("set", "set/rank-00002-of-00003.0123456789abcdef.safetensors", {}),
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
def test_what_is_no_file_is_refused_at_once_wherever_a_file_should_be(tmp_path, put, refused, thing, place):
    for name in ("merged", "set", "parts"):
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


def test_a_folder_that_leads_to_itself(tmp_path, refused):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "again").symlink_to("../inside")
    refused(tmp_path / "loop", "loop: no such file or folder")
    refused(tmp_path / "loop" / "table.safetensors", "no such file or folder")
    refused(tmp_path / "inside", "inside: no safetensors file in it")
    (tmp_path / "inside" / "table.safetensors").write_bytes(FOREIGN)
    assert outcome(tmp_path / "inside" / "again" / "again") == "same"


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__name__)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_called_like_a_leftover_is_neither_waited_for_nor_followed(tmp_path, put, layout, thing):
    """Whoever can write beside a target can put there what a killed process would have left, or what only looks so."""
    (tmp_path / "precious").write_text("precious")
    source = open_table(put("source"))
    thing(tmp_path / ".target.0123456789abcdef.tmp")
    (tmp_path / ".target.0123456789abcde0.tmp").symlink_to("precious")
    with contextlib.suppress(ValueError):
        convert_table(source, tmp_path / "target", layout, PARTITION)
        assert outcome(tmp_path / "target", vocab_size=24) == "same"
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__name__)
def test_what_is_called_like_a_manifest_in_a_target_is_replaced_or_all_stays_as_it_was(tmp_path, put, thing):
    source = open_table(put("source"))
    target = tmp_path / "target"
    target.mkdir()
    thing(target / "manifest.json")
    for force in (False, True):
        before = contents(target)
        try:
            convert_table(source, target, "shards", PARTITION, force=force)
        except (ValueError, OSError) as error:
            assert str(target) in str(error)  # noqa: PT017
            assert contents(target) == before
        else:
            assert force
            assert outcome(target) == "same"


# Files that change once the table is open, and disks that fail


CHANGES = {
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "cleared": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "removed": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a loop": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "a link to zeros": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "another table": lambda path: path.write_bytes(path.read_bytes().replace(VALUES.tobytes(), VALUES[::-1].tobytes())),
    "its own beginning again": lambda path: path.write_bytes(path.read_bytes()[:480] * 4),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["merged", "source"])
def test_a_file_that_changes_once_the_table_is_open_is_noticed(put, name, change):
    path = put(name)
    table = open_table(path)
    CHANGES[change](path)
    if name == "source" and change in ("another table", "cleared", "its own beginning again", "a link to zeros"):
        return  # without checksums, nobody could tell
    for start, stop in ((0, 24), (23, 24), (0, 1)):
        if (change, start, stop) != ("cut short", 0, 1):
            with pytest.raises(ValueError, match=f"{name}: "):
                table.rows(start, stop)
    out = np.zeros((24, 5), np.float64)
    with pytest.raises(ValueError, match=f"{name}: "):
        table.read_rows(0, out)


def test_a_set_that_is_replaced_once_it_is_open_is_noticed(put, originals, tmp_path):
    """By another set under the same name, whose files are called otherwise."""
    folder = put("set")
    table = open_table(folder)
    convert_table(open_table(put("source")), folder, "shards", VocabPartition(24, 2), force=True)
    with pytest.raises(ValueError, match="rank-00000-of-00003.0123456789abcdef.safetensors: cannot be read"):
        table.rows(0, 24)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENXIO])
@pytest.mark.parametrize("name", ["merged", "source", "set"])
def test_a_disk_that_fails_is_an_error_that_names_the_file(put, refused, monkeypatch, name, number):
    table = open_table(put(name))

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", fail)
    for dtype in (np.float32, np.float64):
        with pytest.raises(ValueError, match=f"{name}.*: .*{os.strerror(number)}"):
            table.read_rows(0, np.zeros((24, 5), dtype))


@pytest.mark.parametrize("name", ["merged", "set", "set/manifest.json", "parts", "index.json"])
def test_what_may_not_be_read_is_an_error_that_names_the_file(tmp_path, put, monkeypatch, name):
    for original in ("merged", "set", "parts"):
        put(original)
    (tmp_path / "index.json").write_text('{"weight_map": {"wte.weight": "merged"}}')

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
def test_a_pickle_is_never_loaded_whatever_it_is_called(tmp_path, bomb, refused, suffix):
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


def test_a_pickle_in_place_of_a_file_is_never_loaded(put, bomb, refused):
    for name in ("set/manifest.json", "set/rank-00001-of-00003.0123456789abcdef.safetensors"):
        folder = put("set")
        (folder.parent / name).write_bytes(bomb)
        refused(folder, f"{name}: ")
    parts = put("parts")
    (parts / "mp_rank_01" / "model.safetensors").rename(parts / "mp_rank_01" / "model_optim_rng.pt")
    (parts / "mp_rank_01" / "model_optim_rng.pt").write_bytes(bomb)
    refused(parts, "mp_rank_01: no safetensors file in it; pickle files", vocab_size=24)
    refused([parts / "mp_rank_01" / "model_optim_rng.pt"], "model_optim_rng.pt: a pickle file, which", vocab_size=24)


def test_a_pickle_inside_a_header_is_a_text(tmp_path, bomb, refused):
    header = {"__metadata__": {"pve": bomb.decode("latin-1"), "pve.crc32": "0"}, **ONE}
    (tmp_path / "t").write_bytes(safetensors(header, VALUES.tobytes()))
    refused(tmp_path / "t", "t: a damaged table file")
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


CASES = pytest.mark.parametrize("cases", [400, pytest.param(10_000, marks=pytest.mark.slow)])


def run(fuzz, cases, case):
    for _ in range(cases):
        case()
    assert fuzz.wrong == {}
    assert fuzz.counts["refused"] > cases  # of two outcomes a case; or the mutations would not be worth the name


@CASES
def test_mutations_of_a_merged_file(put, cases):
    path, fuzz = put("merged"), Fuzz(1)
    run(fuzz, cases, lambda: fuzz(path, path))


@CASES
def test_mutations_of_a_merged_files_header(put, cases):
    path, fuzz = put("merged"), Fuzz(2)
    run(fuzz, cases, lambda: fuzz(path, path, header_end(path.read_bytes())))


@CASES
def test_mutations_of_the_files_of_a_set(a_set, cases):
    fuzz, files = Fuzz(3), sorted(a_set.iterdir())
    opened = [a_set, *files]

    def case():
        fuzz(opened[fuzz.rng.integers(len(opened))], files[fuzz.rng.integers(len(files))])

    run(fuzz, cases, case)


@CASES
def test_mutations_of_a_manifest(a_set, cases):
    fuzz = Fuzz(4)
    run(fuzz, cases, lambda: fuzz(a_set, a_set / "manifest.json"))


@CASES
def test_mutations_of_a_foreign_files_header(put, cases):
    """Its rows have no checksum: other bytes there are other rows. So are they in another shape, which is unlikely."""
    path, fuzz = put("source"), Fuzz(5)
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


@pytest.mark.parametrize("name", ["merged", "set"])
def test_without_checksums_the_mutations_would_go_unnoticed(put, monkeypatch, name):
    """Else the tests above would prove nothing."""
    path, fuzz = put(name), Fuzz(8)
    file = shard(path, 0) if name == "set" else path
    monkeypatch.setattr(table_file, "zlib", SimpleNamespace(crc32=lambda data: ANY))
    for _ in range(100):
        fuzz(path, file)
    assert len([found for found in fuzz.wrong.values() if found.startswith("another table: wte.weight")]) > 10


def test_without_the_manifests_checksums_the_shards_of_another_set_would_go_unnoticed(a_set, put, monkeypatch):
    other, load = put("other_set"), Manifest.load
    for rank in range(3):
        shutil.copy(shard(other, rank), shard(a_set, rank))
    assert outcome(a_set) == "refused"

    def unchecked(path):
        manifest = load(path)
        object.__setattr__(manifest, "set_id", ANY)
        for each in manifest.shards:
            object.__setattr__(each, "crc32", ANY)
        return manifest

    monkeypatch.setattr(Manifest, "load", unchecked)
    assert outcome(a_set).startswith("another table: wte.weight")
