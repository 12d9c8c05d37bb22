"""The check of what commands print with `--json` can fail. Each command's test makes it, by the fixture `pve`."""

import numpy as np
from command import SCHEMA, faults
from table_files import save


def test_the_check_can_fail(pve, tmp_path):
    ones = np.ones((4, 2), np.float32)
    paths = [save(tmp_path / name, {"wte.weight": rows}) for name, rows in (("a", ones), ("b", ones * np.nan))]
    found = pve.json("diff", *paths, status=1)
    for key in found:
        assert faults({other: value for other, value in found.items() if other != key}, SCHEMA)
        assert faults({**found, key: object()}, SCHEMA)
    assert faults({**found, "more": 1}, SCHEMA)
    assert faults({**found, "comparisons": [{**found["comparisons"][0], "rank": 1.5}]}, SCHEMA)
