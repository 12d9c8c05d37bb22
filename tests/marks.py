"""Marks that tests of several rooms share."""

import itertools

import pytest


def slower(*values):
    """The values of a case that is left out of the default run."""
    return pytest.param(*values, marks=pytest.mark.slow)


def pairwise(default, *axes):
    """The cases of the default run, and as slow ones all others of the product of the axes."""
    return [*default, *(slower(*case) for case in itertools.product(*axes) if case not in default)]
