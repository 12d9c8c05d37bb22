"""Private names of PyTorch are in one file. What they do is tested where the package uses them."""

import re
from pathlib import Path

import torch_impl


def test_they_are_in_one_file():
    private = re.compile(
        r"torch\._(?!_version__)|forward_ad|super\(torch\.autograd|ctypes|mincore|_make_wrapper_subclass|_resolve_process_group"
        r"|\._(?:apply|backward_hooks|indices|values|nnz|base|is_view|get_\w+)\b"
    )
    folder = Path(torch_impl.__file__).parent
    used = {path.name for path in folder.rglob("*.py") if private.search(path.read_text())}
    assert used == {"private_api.py"}
