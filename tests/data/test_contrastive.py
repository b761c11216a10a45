from __future__ import annotations

import numpy as np
import pytest
from corpus import character_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from qkv.data.contrastive import _STRATUM, ContrastiveDataset
from qkv.errors import InputError

TOKENIZER = character_tokenizer("bert", ["abcdef"])
SETTINGS = {"context": 64, "truncate": False, "temperature": 0.05, "seed": 3}


def made(texts: list[str], pairs: list[str], candidates: int = 4) -> ContrastiveDataset:
    return ContrastiveDataset(texts, pairs, TOKENIZER, candidates=candidates, **SETTINGS)


rows = st.lists(st.text("abc", min_size=1, max_size=9), min_size=2, max_size=60)


@given(texts=rows, candidates=st.integers(2, 9), epoch=st.integers(0, 3))
def test_every_epoch_every_text_is_in_one_group(texts: list[str], candidates: int, epoch: int) -> None:
    texts += ["a", "b"]
    dataset = made(texts, [text[::-1] for text in texts], candidates)
    groups = [dataset.group(i, epoch).tolist() for i in range(len(dataset))]
    assert sorted(i for group in groups for i in group) == list(range(len(texts)))
    assert len(groups) == max(1, len(texts) // candidates)
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    for i, group in enumerate(groups):
        tokens = sum(2 * len(texts[j]) + 4 for j in group)
        assert tokens <= dataset.costs[i]
        assert sum(dataset.batch([i], epoch).ids.lengths) == tokens
    assert dataset.costs.max() <= (2 * 9 + 4) * (2 * candidates - 1)


def test_groups_are_a_function_of_seed_epoch_and_index() -> None:
    texts = [f"{'abc'[i % 3]}{'def'[i // 3 % 3]}{'a' * (i % 5)}" for i in range(40)]
    one, other = made(texts, []), made(texts, [])
    assert all(np.array_equal(one.group(i, 5), other.group(i, 5)) for i in range(len(one)))
    assert any(not np.array_equal(one.group(i, 0), one.group(i, 1)) for i in range(len(one)))
    alone, together = one.batch([2], 1), one.batch([0, 2], 1)
    size = len(alone.wrong)
    assert together.wrong[-size:, -size:].tolist() == alone.wrong.tolist()
    assert not together.wrong[:-size, -size:].any() and not together.wrong[-size:, :-size].any()


def test_groups_are_of_similar_lengths_where_there_are_many() -> None:
    texts = ["a" * (1 + i % 30) for i in range(2 * _STRATUM * 2)]
    dataset = made(texts, [], candidates=2)
    lengths = [np.array([len(texts[j]) for j in dataset.group(i, 0)]) for i in range(len(dataset))]
    assert max(length.max() for length in lengths[:_STRATUM]) <= min(
        length.min() for length in lengths[_STRATUM:]
    )


def test_texts_that_belong_together_stand_in_the_same_place_and_equals_are_not_wrong() -> None:
    texts, pairs = list("abca"), ["e", "f", "e", "ff"]
    dataset = made(texts, pairs)
    (members,) = (dataset.group(0, 0),)
    batch = dataset.batch([0], 0)
    sequences = batch.ids.split()
    for row, i in enumerate(members):
        assert sequences[row].tolist() == TOKENIZER.encode(texts[i]).ids
        assert sequences[4 + row].tolist() == TOKENIZER.encode(pairs[i]).ids
        expected = [pairs[i] != pairs[j] and texts[i] != texts[j] for j in members]
        assert batch.wrong[row].tolist() == expected
    itself = made(texts, [])
    batch = itself.batch([0], 0)
    assert [s.tolist() for s in batch.ids.split()[:4]] == [s.tolist() for s in batch.ids.split()[4:]]


def test_what_cannot_be_told_apart_is_refused() -> None:
    with pytest.raises(InputError, match="at least two different texts"):
        made(["a", "b"], ["c", "c"])
    with pytest.raises(InputError, match="at least two different texts"):
        made(["c", "c"], ["a", "b"])
    with pytest.raises(InputError, match="longer than the model's context"):
        made(["a" * 70, "b"], [])
    cut = ContrastiveDataset(["a" * 70, "b"], [], TOKENIZER, candidates=2, **{**SETTINGS, "truncate": True})
    assert cut.notes == ("1 of 2 texts were longer than 64 tokens and were cut.",)
    assert max(cut.batch([0], 0).ids.lengths) == 64
