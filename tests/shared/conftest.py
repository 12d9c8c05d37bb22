"""A small case, and records of it that a test can tamper with."""

import ml_dtypes
import numpy as np
import pytest
from table_files import save

from shared.proof.case import CaseOptions, build_case
from shared.proof.record import Record, RecordWriter
from shared.proof.runner import run


class Arrays(dict):
    """Takes what a runner records, as the arrays themselves."""

    def add(self, name, array):
        self[name] = array.copy()


@pytest.fixture
def make_case(tmp_path):
    """30 rows over 3 ranks; ids with duplicates, every rank's edges, padding_idx 5 and two outside the vocabulary."""
    table = np.random.default_rng(0).standard_normal((30, 6)).astype(ml_dtypes.bfloat16)
    weights, ids = save(tmp_path / "table.safetensors", {"table": table}), tmp_path / "ids.npy"
    np.save(ids, np.array([[0, 9, 10, 19, 20, 29], [5, 5, 12, 12, 13, -1], [3, 4, 25, 14, 30, 0]]))

    def make(name="case", **options):
        (tmp_path / name).mkdir()
        given = {"weights": weights, "ids": ids, "world_size": 3, "padding_idx": 5}
        return build_case(CaseOptions(**{**given, **options}), tmp_path / name)

    return make


@pytest.fixture
def case(make_case):
    return make_case()


@pytest.fixture
def make_record(request, tmp_path):
    """Write the oracle's record under a backend's name, after ``change(arrays)`` had its way with it."""

    def make(name, change=None, of=None):
        case, arrays = of or request.getfixturevalue("case"), Arrays()
        run(case, arrays, lambda *_: None)
        if change is not None:
            change(arrays)
        writer, path = RecordWriter(case, name, {}), tmp_path / f"{name}.record"
        for key, array in arrays.items():
            writer.add(key, array)
        writer.write(path)
        return Record.open(path)

    return make
