"""What the environment that the tests are run in is to have, and what the oldest versions in it cannot do.

A framework that is missing makes its tests fail, unless PVE_TEST_WITHOUT names it: the tests that need it are then left out.
"""

import os
from importlib.metadata import version
from pathlib import Path

WITHOUT = frozenset(os.environ.get("PVE_TEST_WITHOUT", "").replace(",", " ").split())
if WITHOUT - {"torch", "jax"}:
    raise ValueError(f"PVE_TEST_WITHOUT names torch, jax or both, not {' '.join(sorted(WITHOUT))}")

# The tests that import a framework as they are collected, beside this file.
NEEDED_BY = {
    "torch": ["torch_impl", "consistency", "contract/test_dynamic_shapes.py"],
    "jax": ["jax_impl", "consistency"],
}

# Each test, the first version that it is promised for, and what the versions before do.
SINCE = {
    "jax_impl/test_16_bit_gradients.py::test_per_sample_gradients_scan_and_checkpoint[Auto]": (
        "jax",
        (0, 9, 0),
        "vmap of a psum over a part of the mesh's axes raises a TypeError",
    ),
    "jax_impl/test_lookup.py::test_an_empty_batch_has_no_invalid_ids[Explicit]": (
        "jax",
        (0, 9, 2),
        "jit does not return an empty array that is split over an Explicit axis",
    ),
}


def reason_to_leave_out(node_id: str) -> str | None:
    """Why a test is skipped with the versions that are installed; None: it is not."""
    name = node_id.removeprefix("tests/")
    framework, since, why = SINCE.get(name) or SINCE.get(name.partition("[")[0]) or ("", (), "")
    if framework and installed(framework) < since:
        return f"needs {framework} {'.'.join(map(str, since))}: before, {why}"
    return None


def installed(framework: str) -> tuple[int, ...]:
    """The version, as numbers."""
    return tuple(int(part) for part in version(framework).split("+")[0].split(".")[:3] if part.isdecimal())


def left_out() -> list[str]:
    """The tests that need a framework which is missing on purpose."""
    return sorted({tests for framework in WITHOUT for tests in NEEDED_BY[framework]})


def missing_tests() -> list[str]:
    """Names in ``SINCE`` that no test has."""
    found = []
    for name in SINCE:
        path, _, function = name.partition("[")[0].partition("::")
        if f"def {function}(" not in (Path(__file__).parent / path).read_text():
            found.append(name)
    return found
