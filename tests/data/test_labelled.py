from __future__ import annotations

import pytest
from corpus import character_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from qkv.data.dataset import fit
from qkv.data.labelled import LabelledDataset
from qkv.errors import InputError

words = st.text(alphabet="abcdef", max_size=20)
TOKENIZER = character_tokenizer("bert", ["abcdef"])


@given(
    rows=st.lists(st.tuples(words, words, st.integers(0, 3)), min_size=1, max_size=8), paired=st.booleans()
)
def test_batches_are_what_the_tokenizer_says(rows: list[tuple[str, str, int]], paired: bool) -> None:
    texts, pairs, labels = (list(column) for column in zip(*rows, strict=True))
    dataset = LabelledDataset(texts, pairs if paired else [], labels, TOKENIZER, 64, truncate=False)
    order = list(range(len(rows)))[::-1]
    batch = dataset.batch(order, epoch=1)
    segments = batch.segments.split(list(batch.ids.lengths))
    for row, i in enumerate(order):
        expected = TOKENIZER.encode(texts[i], pairs[i] if paired else None)
        assert batch.ids.split()[row].tolist() == expected.ids
        assert segments[row].tolist() == expected.segments
        assert batch.labels[row] == labels[i]
        assert dataset.costs[i] == len(expected.ids)
    assert dataset.notes == ()


@given(
    rows=st.lists(st.tuples(words, words), min_size=1, max_size=8),
    context=st.integers(5, 40),
    paired=st.booleans(),
)
def test_cut_texts_keep_their_template_and_their_beginnings(
    rows: list[tuple[str, str]], context: int, paired: bool
) -> None:
    texts, pairs = (list(column) for column in zip(*rows, strict=True))
    dataset = LabelledDataset(
        texts, pairs if paired else [], [0] * len(rows), TOKENIZER, context, truncate=True
    )
    too_long = 0
    for i, (text, pair) in enumerate(rows):
        whole = TOKENIZER.encode(text, pair if paired else None)
        too_long += len(whole.ids) > context
        room = context - (3 if paired else 2)
        kept = fit(len(text), len(pair) if paired else 0, room)
        expected = TOKENIZER.encode(text[: kept[0]], pair[: kept[1]] if paired else None)
        batch = dataset.batch([i], 0)
        assert batch.ids.values.tolist() == expected.ids
        assert batch.segments.tolist() == expected.segments
        assert dataset.costs[i] == len(expected.ids) == min(context, len(whole.ids))
    assert len(dataset.notes) == (too_long > 0)
    assert too_long == 0 or dataset.notes[0].startswith(f"{too_long} of {len(rows)} texts")


@given(first=st.integers(0, 50), second=st.integers(0, 50), budget=st.integers(0, 60))
def test_the_longer_gives_way(first: int, second: int, budget: int) -> None:
    a, b = fit(first, second, budget)
    assert a + b == min(first + second, budget)
    assert 0 <= a <= first and 0 <= b <= second
    if a < first and b < second:
        assert abs(a - b) <= 1
    elif a < first:
        assert b <= a + 1
    elif b < second:
        assert a <= b + 1


def test_a_text_over_the_context_is_an_error_that_shows_it() -> None:
    with pytest.raises(
        InputError, match=r"1 of 2 texts .* context of 6 tokens; the longest has 8 .*'abcdef'"
    ):
        LabelledDataset(["ab", "abcdef"], [], [0, 1], TOKENIZER, 6, truncate=False)


def test_unknown_characters_can_be_cut() -> None:
    dataset = LabelledDataset(["xxxxxxxx"], [], [0], TOKENIZER, 5, truncate=True)
    assert dataset.batch([0], 0).ids.values.tolist() == TOKENIZER.encode("xxx").ids
