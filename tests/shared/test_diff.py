"""`diff` finds what was tampered with, and calls it by its name."""

import numpy as np
import pytest

from shared.bits import unsigned_view
from shared.proof.case import CaseOptions, build_case
from shared.proof.classify import KINDS
from shared.proof.diff import compare_records
from shared.proof.record import Record, RecordWriter
from shared.proof.runner import run


class Arrays(dict):
    """Takes what a runner records, as the arrays themselves."""

    def add(self, name, array):
        self[name] = array.copy()


def found(make_record, change):
    """The comparisons that differ, as {(what, rank): comparison}; the other way round must find the same."""
    left, right = make_record("left"), make_record("right", change)
    there, back = compare_records(left, right), compare_records(right, left)
    for a, b in zip(there, back, strict=True):
        assert (a.what, a.rank, a.differing, a.kinds, a.max_ulp) == (b.what, b.rank, b.differing, b.kinds, b.max_ulp)
    return {(c.what, c.rank): c for c in there if c.differing}


def test_untouched_records_are_equal(make_record):
    comparisons = compare_records(make_record("left"), make_record("right"))
    assert [(c.what, c.rank, c.rows) for c in comparisons] == [
        *((what, rank, rows) for rank in range(3) for what, rows in (("forward", 18), ("gradient", 10))),
        ("forward", None, 18),
        ("gradient", None, 30),
    ]
    assert not any(c.differing for c in comparisons)
    assert [c.nonzero for c in comparisons if c.what == "forward"] == [7, 6, 3, 16]


def test_one_flipped_bit_is_found_and_named(make_record):
    def flip(arrays):
        unsigned_view(arrays["forward.1"])[1, 2, 4] ^= 1

    ((where, comparison),) = found(make_record, flip).items()
    assert where == ("forward", 1)
    assert comparison.kinds == {"rounding only": 1}
    assert comparison.max_ulp == 1
    assert comparison.max_abs > 0
    (row,) = comparison.examples
    assert (row.index, row.id, row.owner, row.kind, row.max_ulp) == ((1, 2), 12, 1, "rounding only", 1)


def test_off_by_one_row_forward(make_record, case):
    def shift(arrays):
        table = case.table.rows(0, 30)
        ids = case.batch_array("ids")
        for rank in range(3):
            owned = case.partition.owns(ids, rank) & (ids + 1 < case.partition.stop(rank))
            arrays[f"forward.{rank}"][owned] = table[ids[owned] + 1]

    differing = found(make_record, shift)
    assert set(differing) == {("forward", r) for r in range(3)}
    rows = differing["forward", 1]
    assert rows.kinds == {"off by one row": 5}
    assert [row.note for row in rows.examples][:2] == ["right has row 11", "right has row 13"]


def test_off_by_one_row_gradient(make_record):
    def shift(arrays):
        for rank in range(3):
            arrays[f"gradient.{rank}"] = np.roll(arrays[f"gradient.{rank}"], 1, axis=0)

    differing = found(make_record, shift)
    assert set(differing) == {*(("gradient", r) for r in range(3)), ("gradient", None)}
    kinds = differing["gradient", 1].kinds
    assert next(iter(kinds)) == "off by one row"


@pytest.mark.parametrize("what", ["forward", "gradient"])
def test_ranks_swapped(make_record, what):
    def swap(arrays):
        arrays[f"{what}.0"], arrays[f"{what}.2"] = arrays[f"{what}.2"], arrays[f"{what}.0"]

    differing = found(make_record, swap)
    for rank in (0, 2):
        assert set(differing[what, rank].kinds) == {"ranks swapped"}
    assert (what, 1) not in differing


def test_a_rank_that_looks_its_ids_up_in_another_ranks_table(make_record, case):
    def other_table(arrays):
        ids = case.batch_array("ids")
        owned = case.partition.owns(ids, 0)
        arrays["forward.0"][owned] = case.rank_rows(1)[ids[owned]]

    rows = found(make_record, other_table)["forward", 0]
    assert rows.kinds == {"ranks swapped": 7}
    assert "right has row 10" in rows.examples[0].note


def test_some_other_row(make_record, case):
    def other(arrays):
        arrays["forward.0"][0, 0] = case.table.rows(7, 8)

    rows = found(make_record, other)["forward", 0]
    assert rows.kinds == {"other row": 1}
    assert rows.examples[0].note == "right has row 7"


@pytest.mark.parametrize("name", ["forward.1", "gradient.1", "forward.2"])
def test_zeroed(make_record, name):
    def wipe(arrays):
        arrays[name].reshape(-1, 6)[arrays[name].reshape(-1, 6).any(axis=1)] = 0

    differing = found(make_record, wipe)
    assert all(set(comparison.kinds) == {"zeroed"} for comparison in differing.values())
    assert differing


@pytest.mark.parametrize(("name", "row"), [("forward.1", 0), ("gradient.1", 1)])
def test_hole_filled(make_record, name, row):
    def fill(arrays):
        arrays[name].reshape(-1, 6)[row] = 3

    differing = found(make_record, fill)
    assert all(comparison.kinds == {"hole filled": 1} for comparison in differing.values())
    assert differing


def test_padding_only(make_record):
    def fill(arrays):
        arrays["gradient.0"][5] = 1  # padding_idx
        arrays["forward.2"][1, 5] = np.nan  # id -1
        arrays["sum"][2, 4] = 7  # id 30

    differing = found(make_record, fill)
    assert set(differing) == {("gradient", 0), ("gradient", None), ("forward", 2), ("forward", None)}
    assert all(comparison.kinds == {"padding only": 1} for comparison in differing.values())
    assert differing["forward", 2].examples[0].owner == -1


def test_sign_of_zero(make_record):
    def negate(arrays):
        arrays["forward.0"][0, 2] = -0.0

    def make_zero(arrays):
        arrays["forward.0"][0, 0, 1] = 0.0

    def make_minus_zero(arrays):
        arrays["forward.0"][0, 0, 1] = -0.0

    assert found(make_record, negate)["forward", 0].kinds == {"sign of zero": 1}
    left, right = make_record("left", make_zero), make_record("right", make_minus_zero)
    (comparison,) = (c for c in compare_records(left, right) if c.differing)
    assert comparison.kinds == {"sign of zero": 1}
    assert comparison.max_ulp == 0


def test_negative_zeros_are_not_taken_for_table_rows(make_record, case):
    """A table with a row of -0.0 throughout must not make every hole of -0.0 look like that row."""

    def negate_holes(arrays):
        arrays["forward.1"][arrays["forward.1"] == 0] = -0.0

    assert set(found(make_record, negate_holes)["forward", 1].kinds) == {"sign of zero", "padding only"}


def test_nan(make_record):
    def poison(arrays):
        arrays["forward.0"][0, 0, 1] = np.nan

    comparison = found(make_record, poison)["forward", 0]
    assert comparison.kinds == {"NaN": 1}
    assert comparison.examples[0].max_ulp == 0


def test_which_nan_matters_in_a_lookup_and_not_in_a_sum(make_record):
    def nan(bits):
        def change(arrays):
            for name in ("forward.0", "sum"):
                unsigned_view(arrays[name])[0, 0, :] = bits

        return change

    left, right = make_record("left", nan(0x7FC0)), make_record("right", nan(0xFFC1))
    (comparison,) = (c for c in compare_records(left, right) if c.differing)
    assert (comparison.what, comparison.rank, comparison.kinds) == ("forward", 0, {"NaN": 1})
    assert comparison.examples[0].max_ulp is None


def test_subnormal_flushed(make_record):
    def tiny(arrays):
        unsigned_view(arrays["sum"])[0, 0, 3] = 1

    def zero(arrays):
        unsigned_view(arrays["sum"])[0, 0, 3] = 0

    left, right = make_record("left", tiny), make_record("right", zero)
    (comparison,) = (c for c in compare_records(left, right) if c.differing)
    assert comparison.kinds == {"subnormal flushed": 1}


def test_rounding_only_and_other_values(make_record):
    def scale(factor):
        def change(arrays):
            arrays["gradient.2"] *= factor

        return change

    rounded = found(make_record, scale(1 + 2**-7))
    assert set(rounded["gradient", 2].kinds) == {"rounding only"}
    assert 0 < rounded["gradient", 2].max_ulp <= 4
    doubled = found(make_record, scale(2))
    assert set(doubled["gradient", 2].kinds) == {"other values"}


def test_every_kind_is_explained_and_tested():
    assert set(KINDS) == {
        "ranks swapped",
        "rows swapped",
        "off by one row",
        "other row",
        "subnormal flushed",
        "zeroed",
        "hole filled",
        "padding only",
        "rounding only",
        "sign of zero",
        "row missing",
        "NaN",
        "other values",
    }


def test_records_of_different_cases_are_refused(make_record, case, tmp_path):
    left = make_record("left")
    for number, change in enumerate(({"seed": 1}, {"world_size": 2}, {"padding_idx": 6}, {"dtype": "float16"})):
        folder = tmp_path / f"other{number}"
        folder.mkdir()
        options = {"weights": case.table.path, "ids": tmp_path / "ids.npy", "world_size": 3, "padding_idx": 5} | change
        other = build_case(CaseOptions(**options), folder)
        writer = RecordWriter(other, "right", {})
        zeros = np.zeros((1, 6), left.rows("sum").values.dtype if "dtype" not in change else np.float16)
        for rank in range(other.world_size):
            writer.add(f"forward.{rank}", zeros)
            writer.add(f"gradient.{rank}", zeros)
        writer.add("sum", zeros)
        writer.write(folder / "record")
        with pytest.raises(ValueError, match=f"different cases: .*{next(iter(change))}|different cases: weights"):
            compare_records(left, Record.open(folder / "record"))


def reduced_records(tmp_path, reduction, change):
    """Two records of a case with a reduction, the second one changed."""
    folder = tmp_path / reduction
    folder.mkdir()
    np.save(tmp_path / "ids.npy", np.array([[0, 9, 10, 19, 20, 29], [5, 5, 12, 12, 13, -1]]))
    case = build_case(
        CaseOptions(
            ids=tmp_path / "ids.npy", vocab_size=30, emb_size=6, dtype="float32", world_size=3, reduction=reduction
        ),
        folder,
    )
    records = []
    for name in ("left", "right"):
        arrays = Arrays()
        run(case, arrays, lambda *_: None)
        if name == "right":
            change(arrays)
        writer = RecordWriter(case, name, {})
        for key, array in arrays.items():
            writer.add(key, array)
        writer.write(folder / name)
        records.append(Record.open(folder / name))
    return case, {(c.what, c.rank): c for c in compare_records(*records) if c.differing}


def test_chunk_positions_are_those_of_the_whole_sequence(tmp_path):
    def zero(arrays):
        arrays["forward.1"][1, 1] = 0

    case, differing = reduced_records(tmp_path, "reduce_scatter", zero)
    assert case.output_shape == (2, 2)
    ((where, comparison),) = differing.items()
    assert where == ("forward", 1)
    assert (comparison.rows, comparison.kinds) == (4, {"zeroed": 1})
    (row,) = comparison.examples
    assert (row.index, row.id, row.owner) == ((1, 3), 12, 1)


def test_chunks_that_went_to_each_others_ranks(tmp_path):
    def swap(arrays):
        arrays["forward.0"], arrays["forward.2"] = arrays["forward.2"], arrays["forward.0"]

    _, differing = reduced_records(tmp_path, "reduce_scatter", swap)
    assert {where: set(c.kinds) for where, c in differing.items()} == {
        ("forward", 0): {"ranks swapped"},
        ("forward", 2): {"ranks swapped"},
    }


def test_an_embedding_that_one_rank_has_wrong(tmp_path):
    """Every rank owns every position of an embedding that is on all ranks: a zero row is missing, not foreign."""

    def spoil(arrays):
        arrays["forward.2"][0, 0] = 0
        arrays["forward.2"][1, 5] = 1

    _, differing = reduced_records(tmp_path, "all_reduce", spoil)
    ((where, comparison),) = differing.items()
    assert where == ("forward", 2)
    assert comparison.kinds == {"zeroed": 1, "padding only": 1}
