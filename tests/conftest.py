"""What tests of several rooms need."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import types

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260101)


def modules_of(package: str) -> list[types.ModuleType]:
    """A package and all its modules, those that run on import left out."""
    root = importlib.import_module(package)
    found = pkgutil.walk_packages(root.__path__, package + ".")
    return [root, *(importlib.import_module(each.name) for each in found)]


@pytest.fixture
def check_documentation():
    """Run a package's examples, and hold every module to its ``__all__``."""

    def check(package: str, with_examples: set[str]) -> None:
        attempted = set()
        for module in modules_of(package):
            runner = doctest.DocTestRunner(verbose=False)
            for test in doctest.DocTestFinder().find(module, globs={}):
                failures, tried = runner.run(test)
                assert failures == 0, f"the example of {test.name} fails"
                if tried:
                    attempted.add(test.name)
            assert isinstance(module.__all__, list), module.__name__
            for name in module.__all__:
                assert hasattr(module, name), f"{module.__name__}.__all__ names {name}, which is not there"
            public = {
                name
                for name, value in vars(module).items()
                if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
            }
            undocumented = {name for name in public & set(module.__all__) if not vars(module)[name].__doc__}
            assert not undocumented, f"{module.__name__}: no docstring for {undocumented}"
        assert with_examples <= attempted, f"no example run for {with_examples - attempted}"

    return check
