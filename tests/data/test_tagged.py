from __future__ import annotations

import pytest
from corpus import character_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from qkv.config import TokenizerConfig
from qkv.data.tagged import TaggedDataset
from qkv.errors import InputError
from qkv.tokenizers import train_tokenizer

TOKENIZER = train_tokenizer(
    TokenizerConfig(kind="wordpiece", vocab_size=60), "bert", ["abc cab bca, a-b"] * 9
)

sentences = st.lists(
    st.lists(st.text("abcX-,", min_size=1, max_size=8), min_size=1, max_size=6), min_size=1, max_size=5
)


@given(sentences)
def test_the_first_piece_of_a_word_has_its_tag(rows: list[list[str]]) -> None:
    tags = [[(i + len(word)) % 5 for i, word in enumerate(words)] for words in rows]
    dataset = TaggedDataset(rows, tags, TOKENIZER, 64, truncate=False)
    order = list(range(len(rows)))[::-1]
    batch = dataset.batch(order, epoch=0)
    assert [list(map(int, row)) for row in batch.labels.split()] == [tags[i] for i in order]
    tokens = batch.ids.values.tolist()
    unknown = f"{tokens.count(TOKENIZER.unk_id)} of {len(tokens)} tokens are unknown to the tokenizer."
    assert dataset.notes == ((unknown,) if TOKENIZER.unk_id in tokens else ())
    rows_of_first = iter(batch.first.tolist())
    start = 0
    for i, ids in zip(order, batch.ids.split(), strict=True):
        pieces = [TOKENIZER.plain(word) for word in rows[i]]
        assert ids.tolist() == [TOKENIZER.cls_id, *(p for word in pieces for p in word), TOKENIZER.sep_id]
        place = start + 1
        for word in pieces:
            assert next(rows_of_first) == place
            place += len(word)
        assert dataset.costs[i] == len(ids)
        start += len(ids)
    assert next(rows_of_first, None) is None


def test_words_that_are_not_read_are_counted() -> None:
    words = ["abc", "\x00", "cab", "bca"]
    dataset = TaggedDataset([["\x00"], words], [[4], [0, 1, 2, 3]], TOKENIZER, 64, truncate=False)
    assert len(dataset) == 1
    assert dataset.batch([0], 0).labels.values.tolist() == [0, 2, 3]
    assert dataset.notes == ("2 of 5 words are left out: no token of theirs is read.",)
    with pytest.raises(InputError, match="no word has a token"):
        TaggedDataset([["\x00"]], [[0]], TOKENIZER, 64, truncate=False)


def test_long_sentences_are_refused_or_cut() -> None:
    words = ["a"] * 10
    with pytest.raises(InputError, match="longer than the model's context of 6 tokens; the longest has 12"):
        TaggedDataset([words], [[0] * 10], TOKENIZER, 6, truncate=False)
    dataset = TaggedDataset([words], [list(range(10))], TOKENIZER, 6, truncate=True)
    batch = dataset.batch([0], 0)
    assert batch.labels.values.tolist() == [0, 1, 2, 3] and batch.ids.lengths == (6,)
    assert [note.split(" ")[0] for note in dataset.notes] == ["1", "6"]


def test_characters_are_no_words() -> None:
    with pytest.raises(InputError, match=r"set tokenizer\.kind to wordpiece"):
        TaggedDataset([["ab"]], [[0]], character_tokenizer("bert", ["ab"]), 64, truncate=False)
