"""What is damaged, cut short, exchanged or made up is refused in one line that names the file, and never takes effect.

Of a mutated file, either all rows come back as they were, or a ValueError: no other error, no other rows, no waiting.
"""

import builtins
import errno
import io
import json
import os
import pickle
import re
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from table_files import assert_same, entry, safetensors, save_parts

from shared import VocabPartition
from shared.tables import table_file
from shared.tables.find_table import PICKLE_SUFFIXES, open_table
from shared.tables.table_writer import convert_table

VALUES = np.random.default_rng(7).standard_normal((24, 5)).astype(np.float32)
FOREIGN = safetensors(
    {"__metadata__": {"format": "pt"}, "wpe.weight": entry(VALUES[:7]), "wte.weight": entry(VALUES, VALUES[:7].nbytes)},
    VALUES[:7].tobytes() + VALUES.tobytes(),
)
"""A file of someone else's, with another table before the one to find."""


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").write_bytes(FOREIGN)
    return tmp_path / "source"


@pytest.fixture
def parts(tmp_path):
    """Twelve rows, twelve, and none."""
    save_parts(tmp_path / "parts", np.split(np.pad(VALUES, ((0, 12), (0, 0))), 3))
    return tmp_path / "parts"


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


def outcome(path, **options):
    """Read a table that must be VALUES, or refused with a clear error; return which it is."""
    try:
        table = open_table(path, **options)
        rows = table.rows(0, table.vocab_size)
    except ValueError as error:
        assert_clear(error, path)
        return "refused"
    assert_same(rows, VALUES)
    return "same"


# Headers. The safetensors library refuses what is not consistent; what it lets pass is ours to refuse

ONE = {"wte.weight": entry(VALUES)}
"""A header of the whole table, to be spoilt."""
TEXT = json.dumps(ONE)


def one(**changes):
    """The header with other facts about its tensor."""
    return {"wte.weight": {**ONE["wte.weight"], **changes}}


def test_every_truncation_is_refused(source):
    for size in [*range(40), *range(40, len(FOREIGN), 11), len(FOREIGN) - 1]:
        source.write_bytes(FOREIGN[:size])
        assert outcome(source) == "refused", size


BAD_FILES = [
    b"",
    b"PK\x03\x04" + bytes(600),  # a zip file
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 480\n",
    *(safetensors(ONE, VALUES.tobytes(), length) for length in (len(TEXT) - 1, 2**64 - 8)),
]
BAD_HEADERS = [
    TEXT.replace("{", f"{TEXT[:-1]}, ", 1).encode(),  # the tensor twice
    TEXT.replace("{", TEXT[:-1].replace("wte", "wt\\u0065") + ", ", 1).encode(),
    TEXT.replace('"shape"', '"x": 1, "x": 2, "shape"').encode(),
    TEXT.replace("{", '{"__metadata__": {"a": "b", "a": "c"}, ', 1).encode(),
    b'{"wte.weight": ' + b"[" * 200_000,
    one(dtype="F31"),
    one(shape=[2**62, 2**62]),
    one(data_offsets=[-480, 0]),
    {**ONE, "wpe.weight": ONE["wte.weight"]},  # overlap
    {"wte.weight": ["F32", [24, 5], [0, 480]]},  # which the library takes, as it does the next
    one(dtype={"F32": None}),
]


@pytest.mark.parametrize(
    "content",
    [*BAD_FILES, *(safetensors(header, VALUES.tobytes()) for header in BAD_HEADERS)],
    ids=lambda content: ascii(content[8:])[:60],
)
def test_inconsistent_file_is_refused(tmp_path, refused, content):
    path = tmp_path / "table.safetensors"
    path.write_bytes(content)
    says = "not a whole safetensors file|header: not well-formed|a damaged header|pass tensor_name|tensor"
    for given, options in ((path, {}), (tmp_path, {"tensor_name": "wte.weight"})):
        refused(given, f"table.safetensors: ({says})", **options)


# Indexes

INDEX = '{"weight_map": {"wte.weight": "t"}}'
"""A good one, to be spoilt."""
BAD_INDEXES = [
    *(b"", b"null", bytes(400), b'{"format": "\xff\xfe"}'),
    b'{"shards": ' + b"[" * 10**6,
    INDEX.replace('"weight_map"', '"weight_map": {}, "\\u0077eight_map"').encode(),
    INDEX.replace("{", '{"x": {"y": 1, "y": 1}, ', 1).encode(),
    INDEX.replace("{", '{"x": -Infinity, ', 1).encode(),
    f"{INDEX}x".encode(),
    f"[{INDEX}]".encode(),
]
BAD_INDEXES += [
    json.dumps(document).encode()
    for document in (
        {},
        {"weight_map": None},
        {"weight_map": [["wte.weight", "t"]]},
        {"weight_map": {"wte.weight": 3}},
        {"weight_map": {"wte.weight": "t", "another": None}},
        {"metadata": {"weight_map": {"wte.weight": "t"}}},
    )
]


@pytest.fixture
def index(tmp_path):
    """The usual index of a folder that holds FOREIGN as ``t``."""
    (tmp_path / "t").write_bytes(FOREIGN)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(INDEX)
    return path


def write_index(path, weight_map, **more):
    path.write_text(json.dumps({"weight_map": weight_map, **more}))


def test_what_is_damaged_here_is_whole_before(tmp_path, source, index, parts):
    """Or all would be refused for a reason of its own."""
    (tmp_path / "one").write_bytes(safetensors(ONE, VALUES.tobytes()))
    for path in (source, tmp_path / "one", index, index.parent, parts):
        assert outcome(path, vocab_size=24) == "same"


@pytest.mark.parametrize("content", BAD_INDEXES, ids=lambda content: ascii(content)[:60])
def test_damaged_or_ambiguous_index_is_refused(index, refused, content):
    index.write_bytes(content)
    says = "not well-formed JSON|must hold a JSON object|not an index of a checkpoint, it has no weight_map"
    for given, options in ((index, {}), (index.parent, {"tensor_name": "wte.weight"})):
        refused(given, f"{index.name}: ({says})", **options)


def test_oversized_index_is_not_read(index, refused, monkeypatch):
    os.truncate(index, 2**40)  # a hole, which takes no room on the disk
    monkeypatch.setattr(Path, "read_bytes", pytest.fail)
    refused(index, f"index.json: {2**40} bytes, too large for an index")


# fmt: off
LEAVES_THE_FOLDER = (
    "../t", "sub/../t", "sub/../../t", "..", "/", "{}/t", "//{}/t", "..\\t", "sub\\..\\..\\t", "\\t",
    "\\\\server\\share\\t", "C:\\t", "C:/t", "C:t", "",
)
NO_FILES = ("missing", "~/t", "https://example.com/t", "t\0", "\ud800", " t", "*", "t/t", "sub", ".", "x" * 10**6)
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


@pytest.mark.parametrize("file", NO_FILES, ids=lambda file: ascii(file)[:20])
def test_index_that_names_no_file_is_refused(index, refused, file):
    (index.parent / "sub").mkdir()
    write_index(index, {"wte.weight": file})
    refused(index, str(index.parent))


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


@pytest.mark.parametrize("name", ["t", "i.json"])
def test_error_messages_are_bounded(tmp_path, name):
    """However long what is wrong is: one line may be short, and of a megabyte."""
    long = "x" * 10**6
    header = {long: entry(VALUES[:12]), long[1:]: entry(VALUES[12:], 240)}
    (tmp_path / "t").write_bytes(safetensors(header, VALUES.tobytes()))
    write_index(tmp_path / "i.json", {"wte.weight": f"../{long}"})
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as caught:
        open_table(tmp_path / name)
    assert len(str(caught.value)) <= 2000, name


# Things that are no files, files that change once the table is open, and disks that fail

PLACES = {
    "the path": ("source", "source", {}),
    "the file of a folder": ("folder", "folder/table.safetensors", {}),
    "the file of an index": ("model.safetensors.index.json", "t", {}),
    "an index": ("model.safetensors.index.json", "model.safetensors.index.json", {}),
    "a folder's index": ("folder", "folder/model.safetensors.index.json", {}),
    "a part": ("parts", "parts/mp_rank_01/model.safetensors", {"vocab_size": 24}),
}
THINGS = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a loop": lambda path: path.symlink_to(path.name),
    "a link to zeros": lambda path: path.symlink_to("/dev/zero"),
    "a link to the terminal": lambda path: path.symlink_to("/dev/tty"),
}


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("place", PLACES)
def test_pipe_folder_or_loop_is_refused_at_once(tmp_path, source, index, parts, refused, thing, place):
    (tmp_path / "folder").mkdir()
    path, name, options = PLACES[place]
    (tmp_path / name).unlink(missing_ok=True)
    THINGS[thing](tmp_path / name)
    refused(tmp_path / path, str(tmp_path), **options)
    if place == "the path":
        refused([tmp_path / path], f"{path}: (not a|no such) file", vocab_size=24)


def replaced_by(thing):
    return lambda path: (path.unlink(), thing(path))


CHANGES = {
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "removed": Path.unlink,
    **{name: replaced_by(thing) for name, thing in THINGS.items()},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("file", ["source", "parts/mp_rank_01/model.safetensors"])
def test_file_changed_after_opening_is_noticed(tmp_path, source, parts, change, file):
    table = open_table(source if file == "source" else parts, vocab_size=24)
    CHANGES[change](tmp_path / file)
    before = sorted(tmp_path.rglob("*"))
    for use in (
        lambda: table.rows(23, 24),
        lambda: table.read_rows(0, np.zeros((24, 5), np.float64)),
        lambda: convert_table(table, tmp_path / "new.safetensors"),
        lambda: convert_table(table, tmp_path / "new", VocabPartition(24, 3), dtype="float16"),
    ):
        with pytest.raises(ValueError, match=f"{file}: "):
            use()
    assert sorted(tmp_path.rglob("*")) == before


class Failing(io.FileIO):
    """A file on a disk that fails."""

    def readinto(self, buffer):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_read_error_names_the_file(source, monkeypatch, dtype):
    table = open_table(source)
    monkeypatch.setattr(table_file, "open", Failing, raising=False)
    with pytest.raises(ValueError, match="source: cannot be read .Input/output error"):
        table.read_rows(0, np.zeros((24, 5), dtype))


def test_permission_error_names_the_file(index, source, parts, monkeypatch):
    def fail(path, *_, **__):  # root, as whom tests may run, is never refused
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(builtins, "open", fail)
    monkeypatch.setattr(io, "open", fail)
    for path in (index, source, parts):
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


@pytest.mark.parametrize("suffix", [*PICKLE_SUFFIXES, ".safetensors", ".json", ""])
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
    if known:  # by its name, whatever it holds
        path.write_bytes(FOREIGN)
        refused(path, says)


# Mutations


def mutated(rng, data):
    """The data with one mutation."""
    place, size = int(rng.integers(len(data))), int(rng.choice([1, 2, 4, 20, 64]))
    before, block, after = data[:place], data[place : place + size], data[place + size :]
    number = rng.choice([*re.finditer(rb"(?<![\w.])\d+(?![\w.])", data)])
    value = int(number[0])
    numbers = [value + 1, value - 1, -value, 0, 2**63, 2**64, "0.5", "NaN", "true", f'"{value}"', f"[{value}]", ""]
    choices = [
        before,
        before + bytes([block[0] ^ 1 << rng.integers(8)]) + block[1:] + after,
        before + rng.bytes(size) + block + after,
        before + after,
        before + block + block + after,
        before + b" " * len(block) + after,
        data[: number.start()] + str(numbers[rng.integers(len(numbers))]).encode() + data[number.end() :],
    ]
    return choices[rng.integers(len(choices))]


@pytest.mark.parametrize("name", ["source", "parts", "index"])
def test_mutations_of_headers_and_indexes(tmp_path, source, parts, index, name):
    """Not of rows, which have no checksum: other bytes there are other rows."""
    (tmp_path / "u").write_bytes(safetensors({"lm_head.weight": entry(VALUES)}, VALUES[::-1].tobytes()))
    write_index(index, {"wte.weight": "t", "wpe.weight": "t", "lm_head.weight": "u"}, total_size=1100)
    opened = {"source": source, "parts": parts, "index": index}[name]
    path = parts / "mp_rank_01" / "model.safetensors" if name == "parts" else opened
    whole, rng, outcomes = path.read_bytes(), np.random.default_rng(5), Counter()
    end = len(whole) if name == "index" else 8 + int.from_bytes(whole[:8], "little")
    for _ in range(300):
        path.write_bytes(mutated(rng, whole[:end]) + whole[end:])
        signal.setitimer(signal.ITIMER_REAL, 10)  # each anew
        outcomes[outcome(opened, vocab_size=24)] += 1
    assert outcomes["refused"] > 150  # or the mutations would not be worth the name
