"""What the tests of the PyTorch layer share."""

import pytest
import torch


@pytest.fixture(params=["between zeros", "bare"])
def where_the_table_lies(request, monkeypatch):
    """A layer's own memory makes a lookup shorter; a table in anybody else's gives the same."""
    if request.param == "bare":

        def plain(num_rows, emb_size, dtype, device):
            return torch.empty(num_rows, emb_size, dtype=dtype, device=device)

        monkeypatch.setattr("torch_impl.vocab_emb.empty_table", plain)
