"""The list of what is promised from a version on only, in the tests' ``environment``."""

from pathlib import Path

import environment
import pytest

TESTS = Path(environment.__file__).parent
LISTED = [(framework, since, name) for framework, since, _, names in environment.SINCE for name in names]


@pytest.mark.parametrize(("framework", "since", "name"), LISTED, ids=[name for *_, name in LISTED])
def test_listed_tests_exist_and_are_skipped_by_version(framework, since, name, monkeypatch):
    path, _, function = name.partition("[")[0].partition("::")
    assert f"def {function}(" in (TESTS / path).read_text()
    monkeypatch.setattr(environment, "WITHOUT", frozenset())
    older, newer = (".".join(map(str, version)) for version in ((since[0], since[1] - 1, 9), (*since, 0)))
    for installed, skipped in ((older, True), (newer, False), (f"{newer}a0+build", False)):
        monkeypatch.setattr(environment, "version", lambda _, installed=installed: installed)
        assert (environment.reason_to_skip(f"tests/{name}") is not None) == skipped, installed


def test_other_tests_are_run(monkeypatch):
    monkeypatch.setattr(environment, "version", lambda _: "0.1")
    assert environment.reason_to_skip("tests/shared/test_environment.py::test_other_tests_are_run") is None
