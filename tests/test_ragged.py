from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkv.ragged import Layout, Ragged, pack

CPU = torch.device("cpu")
SEQUENCES = st.lists(st.lists(st.integers(0, 99), max_size=6), max_size=6)


@given(SEQUENCES)
def test_split_undoes_pack(sequences: list[list[int]]):
    batch = pack(sequences)
    assert [part.tolist() for part in batch.split()] == sequences
    assert batch.lengths == tuple(len(s) for s in sequences)
    assert len(batch) == len(sequences)
    assert batch.values.dtype == torch.long


@given(SEQUENCES)
def test_layout_says_where_each_token_is(sequences: list[list[int]]):
    layout = pack(sequences).layout
    lengths = [len(s) for s in sequences]
    assert layout.tokens == sum(lengths)
    assert layout.longest == max(lengths, default=0)
    assert layout.equal == (len(set(lengths)) <= 1)
    assert layout.sizes.tolist() == lengths
    assert layout.starts.tolist() == [sum(lengths[:i]) for i in range(len(lengths))]
    assert layout.boundaries.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert layout.boundaries.dtype == torch.int32
    assert layout.owner.tolist() == [i for i, length in enumerate(lengths) for _ in range(length)]
    assert layout.positions.tolist() == [p for length in lengths for p in range(length)]
    assert layout.rows.tolist() == list(range(sum(lengths)))


def test_layout_with_a_stride_leaves_room_after_each_sequence():
    layout = Layout((2, 0, 3), CPU, stride=5)
    assert layout.starts.tolist() == [0, 5, 10]
    assert layout.rows.tolist() == [0, 1, 10, 11, 12]
    assert layout.positions.tolist() == [0, 1, 0, 1, 2]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_first_last_and_mean_are_those_of_each_sequence_alone(lengths: list[int]):
    parts = [torch.randn(length, 3, dtype=torch.float64) for length in lengths]
    batch = pack(parts)
    assert torch.equal(batch.first(), torch.stack([p[0] for p in parts]))
    assert torch.equal(batch.last(), torch.stack([p[-1] for p in parts]))
    torch.testing.assert_close(batch.mean(), torch.stack([p.mean(0) for p in parts]))
    scalars = batch.like(batch.values[:, 0])
    torch.testing.assert_close(scalars.mean(), torch.stack([p[:, 0].mean() for p in parts]))


@pytest.mark.parametrize("reduce", [Ragged.first, Ragged.last, Ragged.mean])
def test_an_empty_sequence_has_no_first_last_or_mean(reduce):
    with pytest.raises(ValueError, match="sequence 1 has no tokens"):
        reduce(pack([[1], [], [2]]))


def test_pack_takes_tensors_of_any_trailing_shape():
    batch = pack([torch.ones(2, 4, 3), torch.zeros(1, 4, 3)])
    assert batch.values.shape == (3, 4, 3)
    assert repr(batch) == "Ragged(2 sequences, values (3, 4, 3) torch.float32)"


def test_values_must_fill_the_lengths():
    with pytest.raises(ValueError, match="3 rows of values, but the lengths sum to 2"):
        Ragged(torch.zeros(3), Layout((1, 1), CPU))


def test_to_moves_values_and_layout():
    moved = pack([[1, 2], [3]]).to("meta")
    assert moved.values.device.type == moved.layout.device.type == moved.layout.owner.device.type == "meta"
    assert moved.lengths == (2, 1)
    assert pack([[1]], device="meta").layout.device.type == "meta"
