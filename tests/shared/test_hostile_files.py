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
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from table_files import entry, safetensors

from shared import VocabPartition
from shared.tables.find_table import PICKLE_SUFFIXES, open_table
from shared.tables.table_writer import convert_table

VALUES = np.random.default_rng(7).standard_normal((24, 5)).astype(np.float32)
PARTITION = VocabPartition(24, 3, 36)
"""Twelve rows, twelve, and none."""
SEVEN_RANKS = VocabPartition(24, 7, "even")
FORMS = {"merged.safetensors": None, "parts": PARTITION}
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
    return folder


@pytest.fixture
def put(tmp_path, originals):
    """Copies one of the originals to a folder of the test's own; returns the path."""

    def copy(name):
        (shutil.copytree if (originals / name).is_dir() else shutil.copy)(originals / name, tmp_path / name)
        return tmp_path / name

    return copy


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
    target = tmp_path_factory.mktemp("targets") / "table.safetensors"

    def check(path, match, **options):
        for use in (lambda table: table.rows(0, table.vocab_size), lambda table: convert_table(table, target)):
            with pytest.raises(ValueError, match=match) as caught:
                use(open_table(path, **options))
            assert_clear(caught.value, path)
        assert not list(target.parent.iterdir())

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
        pairs = [*read_and_expected(table, partition)]
    except ValueError as error:
        assert_clear(error, path)
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if all(found.shape == rows.shape and found.tobytes() == rows.tobytes() for found, rows in pairs):
        return "same"
    return f"another table: {table.tensor} {[found.shape for found, _ in pairs]}"


def read_and_expected(table, partition):
    """All rows, or each rank's; not of a rank to which they are refused, as to another they need not be."""
    if partition is None:
        yield table.rows(0, table.vocab_size), VALUES
        return
    whole = np.zeros((partition.padded_vocab_size, 5), np.float32)
    whole[:24] = VALUES
    for rank in range(partition.world_size):
        with contextlib.suppress(ValueError):
            found = table.padded_rows(partition, rank, np.dtype(np.float32))
            yield found, whole[partition.start(rank) : partition.stop(rank)]


def test_originals_are_whole(put):
    """Or all would be refused for a reason of its own."""
    for name, options in (("source", {}), ("merged.safetensors", {}), ("parts", {"vocab_size": 24})):
        path = put(name)
        assert outcome(path, **options) == outcome(path, SEVEN_RANKS, **options) == "same"


# Files that are cut short, or are no safetensors files at all

ONE = {"wte.weight": entry(VALUES)}
"""A header of the whole table, to be spoilt."""
TEXT = json.dumps(ONE)


def one(**changes):
    """The header with other facts about its tensor, or some left out."""
    facts = {**ONE["wte.weight"], **changes}
    return {"wte.weight": {name: value for name, value in facts.items() if value != "left out"}}


def two(first, second):
    """A header of two tables at given bytes."""
    of = {"dtype": "F32", "shape": [12, 5]}
    return {"wte.weight": {**of, "data_offsets": first}, "wpe.weight": {**of, "data_offsets": second}}


@pytest.mark.parametrize("name", ["source", "merged.safetensors"])
def test_every_truncation_is_refused(put, name):
    path = put(name)
    whole = path.read_bytes()
    for size in [*range(40), *range(40, len(whole), 11), len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert outcome(path) == "refused", size


LENGTHS = [0, len(TEXT) - 1, len(TEXT) + 1, 10**6, 2**32, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]
LENGTHS += [int.from_bytes(len(TEXT).to_bytes(8, "big"), "little")]
NO_TABLES = [
    *(safetensors(ONE, VALUES.tobytes(), length) for length in LENGTHS),
    *(b"", b"\x01", bytes(7), bytes(600), b"\xff" * 600),
    TEXT.encode() + VALUES.tobytes(),  # no length
    safetensors(b"", VALUES.tobytes()),
    b"a text, which is no table at all, but is long enough to have a header",
    b"PK\x03\x04" + bytes(600),  # a zip file
    b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (24, 5), }" + bytes(600),
    b"\x89HDF\r\n\x1a\n" + bytes(600),
    b"GGUF\x03\0\0\0" + bytes(600),
    b"\x7fELF\x02\x01\x01" + bytes(600),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 480\n",
    b"<!DOCTYPE html><html><body>401 Unauthorized</body></html>",
]


def test_other_formats_are_refused(tmp_path, refused):
    path = tmp_path / "table.safetensors"
    for content in NO_TABLES:
        path.write_bytes(content)
        with little_memory():
            for given in (path, tmp_path):
                refused(given, "table.safetensors: not a whole safetensors file")


# fmt: off
SHAPES = (
    [24, 6], [25, 5], [24], [], [24, 5, 2], [-24, -5], [-24, 5], [24.0, 5], ["24", "5"], [True, 120], [None, 5],
    [[24], [5]], 24, "24x5", {"0": 24, "1": 5}, [2**62, 2**62], [2**63, 2], [2**64, 5], [2**64 + 24, 5], [10**400, 5],
    [0, 5], None, "left out",
)
OFFSETS = (
    [480, 0], [0, 479], [0, 481], [1, 481], [4, 480], [-480, 0], [-1, 479], [2**64 - 480, 2**64], [2**63, 2**63 + 480],
    [2**62, 2**62 + 480], [0.0, 480.0], ["0", "480"], [0], [0, 480, 480], [], 480, None, {"0": 480}, [False, 480],
    "left out",
)
DTYPES = ("F31", "f32", "", 32, ["F32"], "F64", "F16", "U8", "C64", None, "left out")
# fmt: on
REPLACED = [
    ('"shape"', '"shape": [5, 24], "shape"'),
    ('"data_offsets"', '"data_offsets": [0, 480], "data_offsets"'),
    ('"shape"', '"x": 1, "x": 2, "shape"'),
    ('"shape"', '"x": NaN, "shape"'),
    ("24", "NaN"),
    ("24", "Infinity"),
    ("24", "1e400"),
    ("{", '{"__metadata__": {}, "__metadata__": {}, '),
    ("{", '{"__metadata__": {"a": "b", "a": "c"}, '),
    ("{", f"{TEXT[:-1]}, "),  # the tensor twice
    ("{", TEXT[:-1].replace("wte", "wt\\u0065") + ", "),
]
BAD_HEADERS = [
    *(TEXT.replace(old, new, 1).encode() for old, new in REPLACED),
    TEXT.encode().replace(b"wte", b"w\xffe"),
    *(TEXT.encode(encoding) for encoding in ("utf-16", "utf-8-sig")),
    *(b"[]", b"1", b'"wte.weight"', b"null", b"   ", b"{wte.weight}"),
    *(TEXT.encode() + more for more in (TEXT.encode(), b"x", bytes(8))),
    b'{"wte.weight": ' + b"[" * 200_000,
    b'{"__metadata__": ' + b'{"a":' * 200_000,
    *({"__metadata__": wrong, **ONE} for wrong in ([], "pt", {"format": 1})),
    *({"wte.weight": wrong} for wrong in ([], None, {})),
    *(one(dtype=dtype) for dtype in DTYPES),
    *(one(shape=shape) for shape in SHAPES),
    *(one(data_offsets=offsets) for offsets in OFFSETS),
    two([0, 240], [120, 360]),  # overlap
    two([0, 240], [0, 240]),
    two([0, 240], [241, 481]),  # a gap
    two([240, 480], [480, 720]),
    two([0, 240], [240, 480]) | {"x": one(data_offsets=[480, 960])["wte.weight"]},  # beyond the end
    two([0, 240], [480, 720]),
]


@pytest.mark.parametrize("header", BAD_HEADERS, ids=lambda header: ascii(header)[:60])
def test_inconsistent_header_is_refused(tmp_path, refused, header):
    path = tmp_path / "table.safetensors"
    path.write_bytes(safetensors(header, VALUES.tobytes()))
    for options in ({}, {"tensor_name": "wte.weight"}):
        refused(path, r"table.safetensors: ", **options)


def test_header_they_were_made_of_is_good(tmp_path):
    path, data = tmp_path / "t", VALUES.tobytes()
    path.write_bytes(safetensors(ONE, data))
    assert outcome(path) == "same"
    path.write_bytes(safetensors(two([240, 480], [0, 240]), data))
    assert open_table(path).rows(0, 12).tobytes() == data[240:]
    # Another shape of the same size cannot be noticed in a file without checksums.
    path.write_bytes(safetensors(one(shape=[5, 24]), data))
    assert open_table(path).rows(0, 5).tobytes() == data


# Indexes

INDEX = '{"weight_map": {"wte.weight": "t"}}'
"""A good one, to be spoilt."""
BAD_INDEXES = [
    *(b"", b" \n", b"null", b"[]", b"3", b'"manifest"', bytes(400), b"manifest.json" + bytes(400)),
    b'{"format": "\xff\xfe"}',
    b'{"format": "\xed\xa0\x80"}',  # half a surrogate, written out
    b'{"shards": ' + b"[" * 10**6,
    b'{"shards": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
    b'{"a":' * 10**6,
    INDEX.replace('"weight_map"', '"weight_map": {}, "weight_map"'),
    INDEX.replace('"weight_map"', '"weight_map": {}, "\\u0077eight_map"'),
    INDEX.replace("{", '{"x": {"y": 1, "y": 1}, ', 1),
    *(INDEX + more for more in (INDEX, "x", "\0", ' // "x"')),
    INDEX[:-1] + ",}",
    INDEX.replace('"', "'"),
    *(INDEX.replace("{", f"{{{more}, ", 1) for more in ('"x": NaN', '"x": -Infinity', "x: 1")),
    f"[{INDEX}]",
]
NO_WEIGHT_MAPS = [
    {},
    *({"weight_map": wrong} for wrong in (None, [], "wte.weight", 3, [["wte.weight", "t"]])),
    *({"weight_map": {"wte.weight": wrong}} for wrong in (None, 3, True, ["t"], {"t": "t"}, 1.5)),
    {"weight_map": {"wte.weight": "t", "another": None}},
    {"weight_maps": {"wte.weight": "t"}},
    {"metadata": {"weight_map": {"wte.weight": "t"}}},
]


@pytest.fixture
def index(tmp_path):
    """The usual index of a folder that holds FOREIGN as ``t``."""
    (tmp_path / "t").write_bytes(FOREIGN)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(INDEX)
    return path


def write_index(path, weight_map):
    path.write_text(json.dumps({"weight_map": weight_map}))


def test_index_they_were_made_of_is_good(index):
    assert outcome(index) == outcome(index.parent) == "same"
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):  # as which it is the same text
        index.write_bytes(INDEX.encode(encoding))
        assert outcome(index) in ("refused", "same")
    write_index(
        index, {f"model.layers.{n}.mlp.weight": f"{n}.safetensors" for n in range(30_000)} | {"wte.weight": "t"}
    )
    assert outcome(index) == "same"


@pytest.mark.parametrize("content", BAD_INDEXES, ids=lambda content: ascii(content)[:60])
def test_damaged_or_ambiguous_index_is_refused(index, refused, content):
    index.write_bytes(content if isinstance(content, bytes) else content.encode())
    for given in (index, index.parent):
        refused(given, f"{index.name}: ")


def test_oversized_index_is_not_read(index, refused):
    os.truncate(index, 2**40)  # a hole, which takes no room on the disk
    with little_memory():
        refused(index, f"index.json: {2**40} bytes, too large for an index")


@pytest.mark.parametrize("document", NO_WEIGHT_MAPS, ids=str)
def test_index_without_a_weight_map_is_refused(index, refused, document):
    index.write_text(json.dumps(document))
    for given, options in ((index, {}), (index.parent, {"tensor_name": "wte.weight"})):
        refused(given, "index.json: not an index of a checkpoint, it has no weight_map", **options)


# fmt: off
LEAVES_THE_FOLDER = (
    "../t", "../inside/t", "sub/../t", "sub/../../t", "./../t", "..", "/", "{}/t", "//{}/t", "..\\t", "sub\\..\\..\\t",
    "\\t", "\\\\server\\share\\t", "//server/share/t", "C:\\t", "C:/t", "C:t", "c:", "t\\", "",
)
NO_FILES = (
    "missing", "~/t", "$HOME/t", "%2e%2e/t", "file:///t", "https://example.com/t", "t\0", "t\0.safetensors", "\0",
    "\ud800", " t", "t ", "T", "*", "t/t", "sub", ".", "x" * 256, "x" * 5000, "x/" * 3000, "x" * 10**6,
    "model.safetensors.index.json",
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
    write_index(folder / "i.json", {"wte.weight": named, "wpe.weight": "t"})
    refused(folder / "i.json", "i.json: the file of 'wte.weight' must lie in the index's folder, got ")
    assert open_table(folder / "i.json", "wpe.weight").vocab_size == 7


def test_index_that_names_no_file_is_refused(index, refused):
    (index.parent / "sub").mkdir()
    for file in NO_FILES:
        write_index(index, {"wte.weight": file})
        refused(index, str(index.parent))
    for file in ("t/", "t/."):  # which Python's paths take for t
        write_index(index, {"wte.weight": file})
        assert outcome(index) in ("same", "refused")


def test_control_characters_in_names_are_escaped(tmp_path):
    """A tensor's name may hold ends of lines and what moves the cursor; an error stays one line, of what can be seen."""
    names = ["wte.weight\n\x1b[2Jno error", "\r\x1b]0;x\x07wte.weight", "\u2028.embedding", "x.embedding"]
    (tmp_path / "t").write_bytes(safetensors({name: entry(np.zeros(0, np.float32)) for name in names}))
    for name in names:
        write_index(tmp_path / "i.json", {**dict.fromkeys(names, "x"), "wte.weight": name})
        write_index(tmp_path / "j.json", {"wte.weight": name})
        for file, tensor in (("t", name), ("t", "absent"), ("i.json", None), ("j.json", None)):
            with pytest.raises(ValueError, match=str(tmp_path)) as caught:
                open_table(tmp_path / file, tensor)
            assert str(caught.value).isprintable()


def test_error_messages_are_bounded(tmp_path):
    """However long what is wrong is: one line may be short, and of a megabyte."""
    long = "x" * 10**6
    header = {long: entry(VALUES[:12]), long[1:]: entry(VALUES[12:], 240)}
    (tmp_path / "t").write_bytes(safetensors(header, VALUES.tobytes()))
    write_index(tmp_path / "i.json", {"wte.weight": long})
    write_index(tmp_path / "j.json", {"wte.weight": f"../{long}"})
    for name in ("t", "i.json", "j.json"):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as caught:
            open_table(tmp_path / name)
        assert len(str(caught.value)) <= 2000, name


# Things that are no files, files that change once the table is open, and disks that fail

PLACES = {
    "the path": ("merged.safetensors", "merged.safetensors", {}),
    "the file of a folder": ("folder", "folder/table.safetensors", {}),
    "model.safetensors": ("folder", "folder/model.safetensors", {}),
    "the file of an index": ("model.safetensors.index.json", "t", {}),
    "an index": ("model.safetensors.index.json", "model.safetensors.index.json", {}),
    "a folder's index": ("folder", "folder/model.safetensors.index.json", {}),
    "a part": ("parts", "parts/mp_rank_01/model.safetensors", {"vocab_size": 24}),
}
THINGS = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a loop": lambda path: path.symlink_to(path.name),
    "a loop of two": lambda path: (path.symlink_to("other"), path.with_name("other").symlink_to(path.name)),
    "a link to nothing": lambda path: path.symlink_to("/nowhere/at/all"),
    "a link to zeros": lambda path: path.symlink_to("/dev/zero"),
    "a link to the terminal": lambda path: path.symlink_to("/dev/tty"),
}


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("place", PLACES)
def test_pipe_folder_or_loop_is_refused_at_once(tmp_path, index, put, refused, thing, place):
    for name in FORMS:
        put(name)
    (tmp_path / "folder").mkdir()
    path, name, options = PLACES[place]
    (tmp_path / name).unlink(missing_ok=True)
    THINGS[thing](tmp_path / name)
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


def replaced_by(thing):
    return lambda path: (path.unlink(), thing(path))


CHANGES = {
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "removed": Path.unlink,
    **{name: replaced_by(thing) for name, thing in THINGS.items()},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("name", "file"), [("source", "source"), ("parts", "parts/mp_rank_01/model.safetensors")])
def test_file_changed_after_opening_is_noticed(tmp_path, put, change, name, file):
    table = open_table(put(name), vocab_size=24)
    CHANGES[change](tmp_path / file)
    before = sorted(tmp_path.rglob("*"))
    for use in (
        lambda: table.rows(0, 24),
        lambda: table.rows(23, 24),
        lambda: table.read_rows(0, np.zeros((24, 5), np.float64)),
        lambda: convert_table(table, tmp_path / "new.safetensors"),
        lambda: convert_table(table, tmp_path / "new", PARTITION, dtype="float16"),
    ):
        with pytest.raises(ValueError, match=f"{file}: "):
            use()
    assert sorted(tmp_path.rglob("*")) == before


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


def test_permission_error_names_the_file(index, put, monkeypatch):
    paths = [index, *map(put, FORMS)]

    def fail(path, *_, **__):  # root, as whom tests may run, is never refused
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(builtins, "open", fail)
    monkeypatch.setattr(io, "open", fail)
    for path in paths:
        with pytest.raises(ValueError, match=f"{path.name}.*: .*Permission denied"):
            open_table(path, vocab_size=24)


# Pickles


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def bomb(tmp_path):
    """A pickle that must not be loaded, tried out."""
    mark = tmp_path / "unpickled"
    data = pickle.dumps(Bomb(mark))
    pickle.loads(data)
    mark.unlink()
    yield data
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [*PICKLE_SUFFIXES, ".pickle", ".npy", ".safetensors", ".json", ""])
def test_pickle_of_any_name_is_never_loaded(tmp_path, bomb, refused, suffix):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / f"table{suffix}"
    path.write_bytes(bomb)
    known = suffix in PICKLE_SUFFIXES
    says = f"table{suffix}: " + "a pickle file, which is never loaded; save" * known
    refused(path, says)
    refused([path, path], says, vocab_size=3)
    refused(folder, rf"no safetensors file in it; pickle files \(table{suffix}\) are never" if known else "folder")
    if suffix != ".json":
        write_index(folder / "i.json", {"wte.weight": path.name})
        refused(folder / "i.json", says)


@pytest.mark.parametrize("suffix", PICKLE_SUFFIXES)
def test_table_of_a_pickles_name_is_refused(tmp_path, refused, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(FOREIGN)
    refused(path, "a pickle file, which is never loaded; save")


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


def another_number(rng, data):
    """The data with another number in the place of one that is written out in figures."""
    numbers = [*re.finditer(rb"(?<![\w.])\d+(?![\w.])", data)]
    if not numbers:
        return data
    number = numbers[rng.integers(len(numbers))]
    value = int(number[0][:30])
    choices = [value + 1, value - 1, -value, 10 * value, value // 2, 0, 2**31, 2**62, 2**63, 2**64, 10**400]
    choices += [f"{value}.0", f"{value}e0", "1e400", "NaN", "true", "null", f'"{value}"', f"[{value}]", "0.5", ""]
    return data[: number.start()] + str(choices[rng.integers(len(choices))]).encode() + data[number.end() :]


def mutated(rng, data):
    """The data with one mutation, and what that is called."""
    first, second = sorted(int(place) for place in rng.integers(0, len(data), 2))
    size = min(int(rng.choice([1, 2, 4, 20, 60, 64])), max(1, second - first))
    before, block, after = data[:first], data[first : first + size], data[first + size :]
    other = data[second : second + size]
    mutations = {
        "another bit": before + bytes([block[0] ^ 1 << rng.integers(8)]) + block[1:] + after,
        "another byte": before + bytes([block[0] ^ rng.integers(1, 256)]) + block[1:] + after,
        "cut short": before,
        "longer": data + rng.bytes(size),
        "inserted": before + rng.bytes(size) + block + after,
        "left out": before + after,
        "repeated": before + block + block + after,
        "written over": before + other + after,  # as by a write that went to the wrong place
        "exchanged": before + other + data[first + size : second] + block + data[second + size :],
        "cleared": before + bytes([rng.choice([0x00, 0x20, 0xFF])]) * size + after,
        "another number": another_number(rng, data),
    }
    name = str(rng.choice(list(mutations)))
    return mutations[name], f"{size} {name} at {first}"


@pytest.fixture(params=["source", "merged.safetensors", "parts", "index"])
def mutable(request, tmp_path, put):
    """What to open, its options, and the files to mutate. Rows have no checksum: other bytes there are other rows."""
    if request.param != "index":
        path = put(request.param)
        return path, {"vocab_size": 24}, sorted(path.glob("*/*")) or [path]
    (tmp_path / "a.safetensors").write_bytes(FOREIGN)
    other = safetensors({"lm_head.weight": entry(VALUES)}, VALUES[::-1].tobytes())
    (tmp_path / "b.safetensors").write_bytes(other)
    index = {"wte.weight": "a.safetensors", "wpe.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1100}, "weight_map": index}, indent=2))
    return tmp_path, {}, [path]


@pytest.mark.parametrize("cases", [150, pytest.param(3_000, marks=pytest.mark.slow)])
def test_mutations_of_headers_and_indexes(mutable, cases):
    opened, options, files = mutable
    rng, counts, wrong = np.random.default_rng(5), Counter(), {}
    for _ in range(cases):
        path = files[rng.integers(len(files))]
        whole = path.read_bytes()
        end = len(whole) if path.suffix == ".json" else 8 + int.from_bytes(whole[:8], "little")
        data, names = whole[:end], []
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            if data:
                data, name = mutated(rng, data)
                names.append(name)
        path.write_bytes(data + whole[end:])
        signal.setitimer(signal.ITIMER_REAL, 10)  # each anew
        for partition in (None, SEVEN_RANKS):
            found = outcome(opened, partition, **options)
            counts[found] += 1
            if found not in ("refused", "same"):
                wrong[f"{path.name}: {', '.join(names)}; {partition}"] = found
        path.write_bytes(whole)
    assert wrong == {}
    assert counts["refused"] > cases  # of two outcomes a case; or the mutations would not be worth the name
