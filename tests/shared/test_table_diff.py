"""Two tables in files are equal, or what differs is named."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from table_files import save, save_index, save_parts

from shared.bits import STORED_DTYPES, cast, unsigned_view
from shared.proof import table_diff
from shared.proof.table_diff import compare_tables
from shared.tables.find_table import open_table

V, E = 30, 6


@pytest.fixture
def table(rng):
    return rng.standard_normal((V, E)).astype(np.float32)


@pytest.fixture
def stored(tmp_path):
    """Write a table as one file, as a Hugging Face checkpoint, or as parts over 4 ranks; opened again."""

    def store(name, rows, layout="file"):
        folder = tmp_path / name
        folder.mkdir()
        if layout == "parts":
            save_parts(folder, np.split(rows, 4))
        elif layout == "checkpoint":
            save_index(folder / "model.safetensors.index.json", {"model-1.safetensors": {"wte.weight": rows}})
        else:
            save(folder / "model-1.safetensors", {"wte.weight": rows})
        return open_table(folder, with_padding=True)

    return store


def padded(rows, size, fill=0):
    more = np.broadcast_to(np.asarray(fill, rows.dtype), (size - len(rows), E))
    return np.concatenate([rows, more])


def kinds(report):
    return {c.rank: c.kinds for c in report.comparisons if c.differing}


@pytest.mark.parametrize("layout", ["file", "checkpoint", "parts"])
@pytest.mark.parametrize("fill", ["zeros", "one row repeated"])
def test_layouts_padding_and_dtypes_do_not_matter(stored, table, layout, fill):
    left = stored("left", table)
    rows = cast(table, np.dtype(ml_dtypes.bfloat16))
    right = stored("right", padded(rows, 32, 0 if fill == "zeros" else rows[-1]), layout)
    report = compare_tables(left, right)
    assert not report.different
    assert [note.partition(": ")[2] for note in report.notes] == [
        "float32 rounded to bfloat16 to be compared",
        f"2 rows of padding ({fill}), not compared",
    ]
    ranks = range(4) if layout == "parts" else []
    assert [(c.rank, c.rows) for c in report.comparisons[:-1]] == [(rank, 8 if rank < 3 else 6) for rank in ranks]
    assert report.comparisons[-1].rows == V


def test_one_more_row_is_padding_only_if_it_is_zero(stored, table):
    left = stored("left", table)
    assert not compare_tables(left, stored("zero", padded(table, V + 1))).different
    assert kinds(compare_tables(left, stored("more", padded(table, V + 1, 0.5)))) == {None: {"row missing": 1}}


@pytest.mark.parametrize("pair", [("float16", "bfloat16"), ("float32", "float8_e4m3fn"), ("float64", "float8_e5m2")])
def test_the_wider_dtype_is_rounded_once(stored, table, pair):
    values = [cast(table, STORED_DTYPES[name]) for name in pair]
    values[1] = cast(values[0], STORED_DTYPES[pair[1]])
    assert not compare_tables(stored("left", values[0]), stored("right", values[1])).different
    unsigned_view(values[1])[4, 2] ^= 1
    for sides in ((0, 1), (1, 0)):
        report = compare_tables(*(stored(f"{side}{sides}", values[side]) for side in sides))
        assert kinds(report) == {None: {"rounding only": 1}}
        assert report.facts["compared_as"] == pair[1]


def swap(rows, i, j):
    rows[i], rows[j] = rows[j].copy(), rows[i].copy()


CHANGES = {
    "rows swapped": (lambda rows: swap(rows, 1, 3), {0: 2}),
    "off by one row": (lambda rows: rows.__setitem__(slice(9, 13), rows[10:14].copy()), {1: 4}),
    "other row": (lambda rows: rows.__setitem__(2, rows[7]), {0: 1}),
    "zeroed": (lambda rows: rows.__setitem__(slice(6, 10), 0), {0: 2, 1: 2}),
    "rounding only": (lambda rows: rows.__setitem__(29, np.nextafter(rows[29], np.float32(9))), {3: 1}),
    "NaN": (lambda rows: rows.__setitem__((20, 3), np.nan), {2: 1}),
    "other values": (lambda rows: rows.__setitem__(0, -rows[0]), {0: 1}),
    "ranks swapped": (lambda rows: swap(rows, slice(0, 8), slice(8, 16)), {0: 8, 1: 8}),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_differences_are_named_with_their_rank(stored, table, monkeypatch, kind):
    monkeypatch.setattr(table_diff, "_BATCH", 4 * E)
    change, where = CHANGES[kind]
    changed = table.copy()
    change(changed)
    left, right = stored("left", padded(table, 32), "parts"), stored("right", changed)
    for sides in ((left, right), (right, left)):
        report = compare_tables(*sides)
        assert kinds(report) == {rank: {kind: rows} for rank, rows in {**where, None: sum(where.values())}.items()}
    for comparison in report.comparisons:
        assert len(comparison.examples) == min(comparison.differing, 5)
        for row in comparison.examples:
            assert (row.id, row.owner) == (row.index[0], row.id // 8)


def test_distances_are_counted_by_element(stored, table):
    changed = table.copy()
    changed[0, 0] = np.nan
    table[0, 1], changed[0, 1] = 0.0, -0.0
    table[1, 5] = changed[1, 5] = np.nan
    unsigned_view(changed)[1, :3] += np.array([1, 3, 4], np.uint32)
    whole = compare_tables(stored("left", table), stored("right", changed)).comparisons[-1]
    assert whole.ulps == {"0": 1, "1": 1, "2": 1, "4": 1, "NaN": 1}
    assert whole.kinds == {"NaN": 1, "rounding only": 1}


def test_rows_that_one_table_lacks(stored, table):
    table[28] = 0
    left, right = stored("left", table), stored("right", table[:28])
    report = compare_tables(left, right, world_size=4)
    assert kinds(report) == {3: {"row missing": 2}, None: {"row missing": 2}}
    assert report.notes == ("right: lacks the last 2 rows, which are not padding in the other table",)
    assert not compare_tables(left, right, vocab_size=28).different


def test_a_padded_vocabulary_of_a_given_size(stored, table, rng):
    noise = rng.standard_normal((2, E)).astype(np.float32)
    left, right = stored("left", padded(table, 32)), stored("right", np.concatenate([table, noise]))
    assert kinds(compare_tables(left, right))[None] == {"zeroed": 2}
    report = compare_tables(left, right, vocab_size=V)
    assert not report.different
    assert [each["padding"] for each in report.facts["tables"]] == ["zeros", "other values"]


def test_memory_does_not_grow_with_the_tables(stored, rng, monkeypatch):
    monkeypatch.setattr(table_diff, "_BATCH", 1 << 13)
    table = rng.standard_normal((1 << 13, 128)).astype(np.float32)  # 4 MiB
    left, right = stored("left", table), stored("right", -table)
    tracemalloc.start()
    report = compare_tables(left, right)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.comparisons[-1].differing == len(table)
    assert peak < 3 << 20


def test_tables_that_cannot_be_compared_are_refused(stored, table):
    left, right = stored("left", table), stored("right", table[:, :4].copy())
    with pytest.raises(ValueError, match="same number of columns to be compared: left has 6 columns, right has 4"):
        compare_tables(left, right)
    with pytest.raises(ValueError, match="vocab_size must be at most the 30 rows that left has, got 31"):
        compare_tables(left, stored("other", table), vocab_size=31)
