"""How a sequence is cut, and what ranks that disagree are told."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.agreement import describe_ids, disagreement, ids_disagreement
from shared.sequence import chunk_shape, resolve_seq_dim


@given(st.lists(st.integers(0, 12), min_size=1, max_size=4), st.data(), st.integers(1, 5))
def test_chunks_make_up_the_whole(shape, data, world_size):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    if shape[dim] % world_size:
        with pytest.raises(ValueError, match="the sequence must be divisible by world_size"):
            chunk_shape(shape, dim, world_size)
        return
    assert chunk_shape(shape, dim, world_size) == np.split(np.zeros(shape), world_size, axis=dim)[0].shape
    assert resolve_seq_dim(len(shape), dim) == dim % len(shape)


def test_what_cannot_be_split_is_told_with_its_sizes():
    says = r"ids of shape \(4, 10\) have 10 positions along dimension 1.*pad the sequence to 12"
    with pytest.raises(ValueError, match=says):
        chunk_shape((4, 10), -1, 4)
    for ndim, seq_dim in ((0, -1), (2, 2), (2, -3)):
        with pytest.raises(ValueError, match="seq_dim must name a dimension of the ids"):
            resolve_seq_dim(ndim, seq_dim)


def test_what_ranks_disagree_about_is_told_briefly():
    assert disagreement([describe_ids(np.arange(6).reshape(2, 3)) for _ in range(3)]) is None
    found = disagreement([{"x": str(rank % 2)} for rank in range(40)])
    some = "0 on ranks 0, 2, 4, 6, 8, 10, 12, 14, ...; 1 on ranks 1, 3, 5, 7, 9, 11, 13, 15, ..."
    assert found == f"the ranks disagree about x: {some}"


def test_the_first_position_at_which_ids_differ():
    assert ids_disagreement([np.arange(3)] * 2) is None
    ids = [np.array([[1, 2], [3, 4]])] * 2 + [np.array([[1, 2], [5, 6]])]
    for given_ids, says in (
        (ids, "ids[1, 0] is 3 on ranks 0, 1; 5 on rank 2;"),
        ([np.array(1), np.array(2)], "ids is 1 on rank 0"),
    ):
        assert ids_disagreement(given_ids).startswith(f"the ranks disagree about the ids: {says}")
