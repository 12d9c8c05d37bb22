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


def set_to(value, *places):
    def change(arrays, case):
        for name, *place in places:
            arrays[name][tuple(place)] = value

    return change


def flip_a_bit(arrays, case):
    unsigned_view(arrays["forward.1"])[1, 2, 4] ^= 1


def shift(step, *ranks):
    """Look up other rows."""

    def change(arrays, case):
        table, ids = case.table.rows(0, 30), case.batch_array("ids")
        for rank in ranks:
            owned = case.partition.owns(ids, rank) & (ids + step < 30)
            arrays[f"forward.{rank}"][owned] = table[ids[owned] + step]

    return change


def swap_ranks(what):
    def swap(arrays, case):
        arrays[f"{what}.0"], arrays[f"{what}.2"] = arrays[f"{what}.2"], arrays[f"{what}.0"]

    return swap


def scale(factor):
    def change(arrays, case):
        arrays["gradient.2"] *= np.array(factor, arrays["gradient.2"].dtype)

    return change


def permute(rows):
    def change(arrays, case):
        arrays["gradient.1"] = arrays["gradient.1"][rows]

    return change


def negate_holes(arrays, case):
    """Which must not look like rows of the table that are -0.0 throughout."""
    arrays["forward.1"][arrays["forward.1"] == 0] = -0.0


def fill_padding(arrays, case):
    for value, place in ((1, ("gradient.0", 5)), (np.nan, ("forward.2", 1, 5)), (7, ("sum", 2, 4))):
        set_to(value, place)(arrays, case)  # padding_idx, id -1, id 30


FORWARD = [("forward", rank) for rank in range(3)]
GRADIENT = [("gradient", 1), ("gradient", None)]
LAST_GRADIENT = [("gradient", 2), ("gradient", None)]
EVERYWHERE = [("gradient", 0), ("forward", 2), ("forward", None), ("gradient", None)]
# What is done, the comparisons that are to differ, the kinds that each is to name, and the first row's note.
TAMPERED = {
    "flipped bit": (flip_a_bit, FORWARD[1:2], {"rounding only"}, ""),
    "off by one": (shift(1, 0, 1, 2), FORWARD, {"off by one row"}, "right has row 1"),
    "swapped": (swap_ranks("forward"), FORWARD[::2], {"ranks swapped"}, ""),
    "another rank's table": (shift(10, 0), FORWARD[:1], {"ranks swapped"}, "right has row 10"),
    "another row": (shift(7, 0), FORWARD[:1], {"other row"}, "right has row 7"),
    "zeroed": (set_to(0, ("forward.1",)), FORWARD[1:2], {"zeroed"}, ""),
    "filled": (set_to(3, ("forward.1", 0, 0)), FORWARD[1:2], {"hole filled"}, ""),
    "padding": (fill_padding, EVERYWHERE, {"padding only"}, ""),
    "signs of holes": (negate_holes, FORWARD[1:2], {"sign of zero", "padding only"}, ""),
    "NaN": (set_to(np.nan, ("forward.0", 0, 0, 1)), FORWARD[:1], {"NaN"}, ""),
    "gradient off by one": (permute(np.arange(10) - 1), GRADIENT, {"off by one row", "other row"}, "right has row 19"),
    "gradient's rows swapped": (permute([0, 1, 3, 2, *range(4, 10)]), GRADIENT, {"rows swapped"}, "left has row 13"),
    "gradients swapped": (swap_ranks("gradient"), [("gradient", 0), *LAST_GRADIENT], {"ranks swapped"}, ""),
    "gradient zeroed": (set_to(0, ("gradient.1",)), GRADIENT, {"zeroed"}, ""),
    "gradient filled": (set_to(3, ("gradient.1", 1)), GRADIENT, {"hole filled"}, ""),
    "gradient rounded": (scale(1 + 2**-7), LAST_GRADIENT, {"rounding only"}, ""),
    "gradient doubled": (scale(2), LAST_GRADIENT, {"other values"}, ""),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampering_is_found_and_named(make_record, case, name):
    change, places, kinds, note = TAMPERED[name]
    differing = found(make_record("left"), make_record("right", lambda arrays: change(arrays, case)))
    assert {where: set(comparison.kinds) for where, comparison in differing.items()} == dict.fromkeys(places, kinds)
    assert note in differing[places[0]].examples[0].note


def test_empty_results_are_no_other_ranks(make_record):
    left, right = (
        make_record(side, lambda arrays, ranks=ranks: [arrays[f"forward.{r}"].fill(0) for r in ranks])
        for side, ranks in (("left", [2]), ("right", [1, 2]))
    )
    assert found(left, right)["forward", 1].kinds == {"zeroed": 6}


def test_every_kind_is_tested():
    """Here, and of tables in ``test_table_diff``."""
    tested = set().union(*(kinds for _, _, kinds, _ in TAMPERED.values()))
    assert set(KINDS) == tested | {"subnormal flushed", "row missing"}


def test_differing_row_is_described(make_record, case):
    differing = found(make_record("left"), make_record("right", lambda arrays: flip_a_bit(arrays, case)))
    comparison = differing["forward", 1]
    assert (comparison.kinds, comparison.max_ulp, comparison.ulps) == ({"rounding only": 1}, 1, {"1": 1})
    assert 0 < comparison.max_abs < 0.1
    (row,) = comparison.examples
    assert (row.index, row.id, row.owner, row.kind, row.max_ulp) == ((1, 2), 12, 1, "rounding only", 1)


def set_bits(place, bits, *names):
    def change(arrays):
        for name in names:
            unsigned_view(arrays[name])[place] = bits

    return change


@pytest.mark.parametrize(
    ("place", "bits", "names", "where", "kind", "max_ulp"),
    [
        ((0, 0, 1), (0, 0x8000), ["forward.0"], ("forward", 0), "sign of zero", 0),
        # Which NaN it is matters in a lookup and not in a sum.
        ((0, 0), (0x7FC0, 0x7F81), ["forward.0", "sum"], ("forward", 0), "NaN", None),
        ((0, 0, 3), (1, 0), ["sum"], ("forward", None), "subnormal flushed", 1),
    ],
)
def test_numbers_that_compare_equal_are_told_apart(make_record, place, bits, names, where, kind, max_ulp):
    sides = zip(("left", "right"), bits, strict=True)
    left, right = (make_record(side, set_bits(place, b, *names)) for side, b in sides)
    ((found_where, comparison),) = found(left, right).items()
    assert (found_where, comparison.kinds, comparison.examples[0].max_ulp) == (where, {kind: 1}, max_ulp)


def test_one_id_without_dimensions(make_case, make_record, tmp_path):
    np.save(tmp_path / "one.npy", np.array(12))
    case = make_case("one", ids=tmp_path / "one.npy")
    clear = set_to(0, ("forward.1",))
    differing = found(make_record("left", of=case), make_record("right", lambda arrays: clear(arrays, case), case))
    (row,) = differing["forward", 1].examples
    assert (row.index, row.id, row.kind) == ((), 12, "zeroed")


@pytest.mark.parametrize("change", [{"seed": 1}, {"world_size": 2}, {"dtype": "float16"}])
def test_records_of_different_cases_are_refused(make_record, make_case, change):
    left, right = make_record("left"), make_record("right", of=make_case("other", **change))
    with pytest.raises(ValueError, match=f"different cases: .*{next(iter(change))}"):
        compare_records(left, right)


@pytest.mark.parametrize(
    ("reduction", "change", "kinds"),
    [
        # Of a chunk, positions are those of the whole sequence: (1, 0) is (1, 2).
        ("reduce_scatter", set_to(0, ("forward.1", 1, 0)), {1: {"zeroed": 1}}),
        ("reduce_scatter", swap_ranks("forward"), {0: {"ranks swapped": 6}, 2: {"ranks swapped": 6}}),
        # Every rank has every position of an embedding: a zero row is missing, not foreign.
        ("all_reduce", fill_padding, {2: {"padding only": 1}, None: {"padding only": 1}}),
        ("all_reduce", set_to(0, ("forward.2", 1, 2)), {2: {"zeroed": 1}}),
    ],
)
def test_results_of_a_reduction(make_case, make_record, reduction, change, kinds):
    case = make_case(reduction, reduction=reduction)
    differing = found(make_record("left", of=case), make_record("right", lambda arrays: change(arrays, case), case))
    forward = {rank: comparison for (what, rank), comparison in differing.items() if what == "forward"}
    assert {rank: comparison.kinds for rank, comparison in forward.items()} == kinds
    assert {comparison.rows for rank, comparison in forward.items() if rank} <= {6 if "scatter" in reduction else 18}
    if kinds.get(1) or kinds.get(2) == {"zeroed": 1}:
        (row,) = next(iter(forward.values())).examples
        assert (row.index, row.id, row.owner) == ((1, 2), 12, 1)
