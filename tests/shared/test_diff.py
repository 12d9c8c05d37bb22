"""`diff` finds what was tampered with, and calls it by its name."""

import numpy as np
import pytest

from shared.bits import unsigned_view
from shared.proof.classify import KINDS
from shared.proof.diff import compare_records


def found(left, right):
    """The comparisons that differ, as {(what, rank): comparison}; the other way round must find the same."""
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


# What is done to the right record, and what each comparison that differs is to say of how many rows.


def set_to(name, place, value):
    def change(arrays, case):
        arrays[name][place] = value

    return change


def flip_a_bit(arrays, case):
    unsigned_view(arrays["forward.1"])[1, 2, 4] ^= 1


def shift_forward(arrays, case):
    table, ids = case.table.rows(0, 30), case.batch_array("ids")
    for rank in range(3):
        owned = case.partition.owns(ids, rank) & (ids + 1 < case.partition.stop(rank))
        arrays[f"forward.{rank}"][owned] = table[ids[owned] + 1]


def shift_gradients(arrays, case):
    for rank in range(3):
        arrays[f"gradient.{rank}"] = np.roll(arrays[f"gradient.{rank}"], 1, axis=0)


def swap_ranks(what):
    def swap(arrays, case):
        arrays[f"{what}.0"], arrays[f"{what}.2"] = arrays[f"{what}.2"], arrays[f"{what}.0"]

    return swap


def take_the_next_ranks_table(arrays, case):
    ids = case.batch_array("ids")
    owned = case.partition.owns(ids, 0)
    arrays["forward.0"][owned] = case.rank_rows(1)[ids[owned]]


def take_row_7(arrays, case):
    arrays["forward.0"][0, 0] = case.table.rows(7, 8)


def wipe(name):
    def change(arrays, case):
        rows = arrays[name].reshape(-1, 6)
        rows[rows.any(axis=1)] = 0

    return change


def fill_what_does_not_matter(arrays, case):
    arrays["gradient.0"][5] = 1  # padding_idx
    arrays["forward.2"][1, 5] = np.nan  # id -1
    arrays["sum"][2, 4] = 7  # id 30


def negate_holes(arrays, case):
    """Which must not look like rows of the table that are -0.0 throughout."""
    arrays["forward.1"][arrays["forward.1"] == 0] = -0.0


def scale(factor):
    def change(arrays, case):
        arrays["gradient.2"] *= factor

    return change


FORWARD = [("forward", rank) for rank in range(3)]
GRADIENT = [("gradient", 1), ("gradient", None)]
EVERYWHERE = [("gradient", 0), ("forward", 2), ("forward", None), ("gradient", None)]
TAMPERED = {
    "flipped bit": (flip_a_bit, [FORWARD[1]], {"rounding only"}),
    "forward off by one": (shift_forward, FORWARD, {"off by one row"}),
    "forward swapped": (swap_ranks("forward"), FORWARD[::2], {"ranks swapped"}),
    "another rank's table": (take_the_next_ranks_table, [FORWARD[0]], {"ranks swapped"}),
    "another row": (take_row_7, [FORWARD[0]], {"other row"}),
    "forward.1 zeroed": (wipe("forward.1"), [FORWARD[1]], {"zeroed"}),
    "forward.2 zeroed": (wipe("forward.2"), [FORWARD[2]], {"zeroed"}),
    "gradient zeroed": (wipe("gradient.1"), GRADIENT, {"zeroed"}),
    "forward filled": (set_to("forward.1", (0, 0), 3), [FORWARD[1]], {"hole filled"}),
    "gradient filled": (set_to("gradient.1", 1, 3), GRADIENT, {"hole filled"}),
    "padding": (fill_what_does_not_matter, EVERYWHERE, {"padding only"}),
    "sign of a hole": (set_to("forward.0", (0, 2), -0.0), [FORWARD[0]], {"sign of zero"}),
    "signs of holes": (negate_holes, [FORWARD[1]], {"sign of zero", "padding only"}),
    "NaN": (set_to("forward.0", (0, 0, 1), np.nan), [FORWARD[0]], {"NaN"}),
}
"""What is done, the comparisons that are to differ, and the kinds that each is to name."""


@pytest.mark.parametrize("name", TAMPERED)
def test_tampering_is_found_and_named(make_record, case, name):
    change, places, kinds = TAMPERED[name]
    differing = found(make_record("left"), make_record("right", lambda arrays: change(arrays, case)))
    assert {where: set(comparison.kinds) for where, comparison in differing.items()} == dict.fromkeys(places, kinds)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (shift_gradients, "off by one row"),
        (swap_ranks("gradient"), "ranks swapped"),
        (scale(1 + 2**-7), "rounding only"),
        (scale(2), "other values"),
    ],
)
def test_tampered_gradients_are_named(make_record, case, change, kind):
    differing = found(make_record("left"), make_record("right", lambda arrays: change(arrays, case)))
    assert {what for what, _ in differing} == {"gradient"}
    assert {2, None} <= {rank for _, rank in differing}
    assert next(iter(differing["gradient", 2].kinds)) == kind
    if kind == "rounding only":
        assert 0 < differing["gradient", 2].max_ulp <= 4


def test_differing_rows_are_described(make_record, case):
    def row(change, where, kinds):
        comparison = found(make_record("left"), make_record("right", lambda arrays: change(arrays, case)))[where]
        assert comparison.kinds == kinds
        return comparison, comparison.examples[0]

    comparison, shown = row(flip_a_bit, ("forward", 1), {"rounding only": 1})
    assert (comparison.max_ulp, comparison.max_abs > 0) == (1, True)
    assert (shown.index, shown.id, shown.owner, shown.kind, shown.max_ulp) == ((1, 2), 12, 1, "rounding only", 1)
    comparison, _ = row(shift_forward, ("forward", 1), {"off by one row": 5})
    assert [shown.note for shown in comparison.examples][:2] == ["right has row 11", "right has row 13"]
    _, shown = row(take_the_next_ranks_table, ("forward", 0), {"ranks swapped": 7})
    assert "right has row 10" in shown.note
    _, shown = row(take_row_7, ("forward", 0), {"other row": 1})
    assert shown.note == "right has row 7"
    _, shown = row(fill_what_does_not_matter, ("forward", 2), {"padding only": 1})
    assert shown.owner == -1
    _, shown = row(TAMPERED["NaN"][0], ("forward", 0), {"NaN": 1})
    assert shown.max_ulp == 0


def set_bits(place, bits, *names):
    def change(arrays):
        for name in names:
            unsigned_view(arrays[name])[place] = bits

    return change


FIRST = (0, 0, slice(None))


@pytest.mark.parametrize(
    ("place", "bits", "names", "where", "kind", "max_ulp"),
    [
        ((0, 0, 1), (0, 0x8000), ["forward.0"], ("forward", 0), "sign of zero", 0),
        # Which NaN it is matters in a lookup and not in a sum.
        (FIRST, (0x7FC0, 0xFFC1), ["forward.0", "sum"], ("forward", 0), "NaN", None),
        ((0, 0, 3), (1, 0), ["sum"], ("forward", None), "subnormal flushed", 1),
    ],
)
def test_numbers_that_compare_equal_are_told_apart(make_record, place, bits, names, where, kind, max_ulp):
    left, right = (
        make_record(side, set_bits(place, b, *names)) for side, b in zip(("left", "right"), bits, strict=True)
    )
    ((found_where, comparison),) = found(left, right).items()
    assert (found_where, comparison.kinds, comparison.examples[0].max_ulp) == (where, {kind: 1}, max_ulp)


def test_every_kind_is_tested():
    """Here, and of tables in ``test_table_diff``."""
    tested = set().union(*(kinds for _, _, kinds in TAMPERED.values()))
    assert set(KINDS) == tested | {"other values", "subnormal flushed", "rows swapped", "row missing"}


@pytest.mark.parametrize("change", [{"seed": 1}, {"world_size": 2}, {"padding_idx": 6}, {"dtype": "float16"}])
def test_records_of_different_cases_are_refused(make_record, make_case, change):
    left, right = make_record("left"), make_record("right", of=make_case("other", **change))
    with pytest.raises(ValueError, match=f"different cases: .*{next(iter(change))}"):
        compare_records(left, right)


@pytest.fixture
def reduced(make_case, make_record):
    """What differs between two records of a case with a reduction, the second one changed."""

    def compare(reduction, change):
        case = make_case(reduction, reduction=reduction)
        return found(make_record("left", of=case), make_record("right", change, case))

    return compare


def test_chunk_positions_are_those_of_the_whole_sequence(reduced):
    ((where, comparison),) = reduced(
        "reduce_scatter", lambda arrays: set_to("forward.1", (1, 0), 0)(arrays, None)
    ).items()
    assert where == ("forward", 1)
    assert (comparison.rows, comparison.kinds) == (6, {"zeroed": 1})
    (row,) = comparison.examples
    assert (row.index, row.id, row.owner) == ((1, 2), 12, 1)


def test_chunks_that_went_to_each_others_ranks(reduced):
    differing = reduced("reduce_scatter", lambda arrays: swap_ranks("forward")(arrays, None))
    assert {where: set(c.kinds) for where, c in differing.items()} == {
        ("forward", 0): {"ranks swapped"},
        ("forward", 2): {"ranks swapped"},
    }


def test_an_embedding_that_one_rank_has_wrong(reduced):
    """Every rank owns every position of an embedding that is on all ranks: a zero row is missing, not foreign."""

    def spoil(arrays):
        arrays["forward.2"][0, 0] = 0
        arrays["forward.2"][1, 5] = 1

    ((where, comparison),) = reduced("all_reduce", spoil).items()
    assert (where, comparison.kinds) == (("forward", 2), {"zeroed": 1, "padding only": 1})
