from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from corpus import character_tokenizer, documents, places
from hypothesis import given
from hypothesis import strategies as st

from qkv.config import TokenizerConfig
from qkv.data.batches import MaskedBatch
from qkv.data.documents import MaskedDataset
from qkv.errors import InputError
from qkv.tokenizers import Tokenizer, train_tokenizer

lengths_of = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=8), min_size=2, max_size=6).filter(
    lambda documents: any(len(sentences) > 1 for sentences in documents)
)
context_of = st.integers(5, 40)


def _dataset(
    lengths: Sequence[Sequence[int]], context: int, seed: int = 0
) -> tuple[MaskedDataset, Tokenizer]:
    texts = documents(lengths)
    tokenizer = character_tokenizer("bert", texts)
    return MaskedDataset(texts, tokenizer, context, seed), tokenizer


def _restored(batch: MaskedBatch) -> list[list[int]]:
    """Each pair's ids before any were hidden."""
    ids = batch.ids.values.clone()
    ids[batch.selected] = batch.labels
    return [part.tolist() for part in ids.split(list(batch.ids.lengths))]


def _segments(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[int], list[int]]:
    """A and B of [CLS] A [SEP] B [SEP]."""
    first = ids.index(tokenizer.sep_id)
    assert ids[0] == tokenizer.cls_id and ids[-1] == tokenizer.sep_id
    assert ids.count(tokenizer.sep_id) == 2
    return ids[1:first], ids[first + 1 : -1]


@given(lengths=lengths_of, context=context_of, epoch=st.integers(0, 3))
def test_pairs_are_two_passages_in_the_template_and_within_their_cost(
    lengths: list[list[int]], context: int, epoch: int
) -> None:
    dataset, tokenizer = _dataset(lengths, context)
    batch = dataset.batch(range(len(dataset)), epoch)
    assert all(n <= cost <= context for n, cost in zip(batch.ids.lengths, dataset.costs, strict=True))
    segments = batch.segments.split(list(batch.ids.lengths))
    for ids, segment in zip(_restored(batch), segments, strict=True):
        a, b = _segments(tokenizer, ids)
        assert a and b
        assert segment.tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1)
        for passage in (a, b):
            assert all(y == x + 1 for x, y in pairwise(places(tokenizer, passage)))


@given(lengths=lengths_of, context=context_of, epoch=st.integers(0, 3))
def test_b_follows_a_in_its_document_or_is_from_another(
    lengths: list[list[int]], context: int, epoch: int
) -> None:
    dataset, tokenizer = _dataset(lengths, context)
    ends = np.cumsum([sum(sentences) + 1 for sentences in lengths])
    batch = dataset.batch(range(len(dataset)), epoch)
    for ids, random in zip(_restored(batch), batch.next_labels.tolist(), strict=True):
        a, b = (places(tokenizer, passage) for passage in _segments(tokenizer, ids))
        same = np.searchsorted(ends, a[0], "right") == np.searchsorted(ends, b[0], "right")
        assert same == (not random)
        assert random or a[-1] < b[0]


def test_b_begins_right_behind_a_where_nothing_was_cut() -> None:
    dataset, tokenizer = _dataset([[3, 2, 4], [5, 1]], context=64)
    seen = set()
    for epoch in range(40):
        batch = dataset.batch([0, 1], epoch)
        for ids, random in zip(_restored(batch), batch.next_labels.tolist(), strict=True):
            a, b = (places(tokenizer, passage) for passage in _segments(tokenizer, ids))
            if not random:
                assert a[-1] + 1 == b[0]
                seen.add((a[0], b[0], b[-1]))
    assert seen == {(0, 3, 8), (0, 5, 8), (10, 15, 15)}  # every cut between sentences


@given(lengths=lengths_of)
def test_every_sentence_of_a_document_with_several_is_in_one_chunk(lengths: list[list[int]]) -> None:
    dataset, _ = _dataset(lengths, context=20)
    covered = [i for chunk in dataset.chunks for i in range(chunk.first, chunk.last)]
    starts = np.cumsum([0, *(len(sentences) for sentences in lengths)])
    several = [
        i
        for start, sentences in zip(starts[:-1], lengths, strict=True)
        for i in range(start, start + len(sentences))
        if len(sentences) > 1
    ]
    assert covered == several
    assert len(dataset.notes) == any(len(sentences) == 1 for sentences in lengths)


@given(lengths=lengths_of, context=context_of)
def test_exactly_15_percent_of_the_text_is_selected_and_no_special_token(
    lengths: list[list[int]], context: int
) -> None:
    dataset, tokenizer = _dataset(lengths, context)
    batch = dataset.batch(range(len(dataset)), 0)
    special = {tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id, tokenizer.pad_id, tokenizer.unk_id}
    assert special.isdisjoint(batch.labels.tolist())
    owner = batch.ids.layout.owner[batch.selected]
    for i, ids in enumerate(_restored(batch)):
        words = len(ids) - 3
        assert int((owner == i).sum()) == max(1, round(0.15 * words))
    untouched = torch.ones(batch.ids.layout.tokens, dtype=torch.bool)
    untouched[batch.selected] = False
    assert tokenizer.mask_id not in batch.ids.values[untouched].tolist()


def _within(count: int, trials: int, share: float) -> bool:
    """Whether a binomial count is within five standard deviations of what is expected."""
    return abs(count - trials * share) < 5 * math.sqrt(trials * share * (1 - share))


def test_shares_of_masks_random_words_and_random_segments() -> None:
    dataset, tokenizer = _dataset([[10] * 40] * 10, context=64)
    masked = random_word = kept = selected = following = pairs = 0
    for epoch in range(20):
        batch = dataset.batch(range(len(dataset)), epoch)
        now = batch.ids.values[batch.selected]
        masked += int((now == tokenizer.mask_id).sum())
        kept += int((now == batch.labels).sum())
        random_word += int(((now != tokenizer.mask_id) & (now != batch.labels)).sum())
        selected += len(now)
        following += int((batch.next_labels == 0).sum())
        pairs += len(batch.next_labels)
    assert selected > 5000 and pairs > 1000
    assert _within(masked, selected, 0.8)
    assert _within(random_word, selected, 0.1)
    assert _within(kept, selected, 0.1)
    assert _within(following, pairs, 0.5)


def test_random_words_are_never_special_and_come_from_the_whole_vocabulary() -> None:
    dataset, tokenizer = _dataset([[10] * 4] * 2, context=64)
    seen: set[int] = set()
    for epoch in range(400):
        batch = dataset.batch(range(len(dataset)), epoch)
        now = batch.ids.values[batch.selected]
        seen |= set(now[(now != tokenizer.mask_id) & (now != batch.labels)].tolist())
    assert seen.isdisjoint({tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.unk_id})
    assert len(seen) > 40  # of 80 characters


def test_a_pair_is_decided_by_seed_epoch_and_index_alone() -> None:
    lengths = [[4, 5, 6, 3, 2, 7]] * 4
    one, two = _dataset(lengths, 24)[0], _dataset(lengths, 24)[0]
    together, alone = one.batch([2, 0, 3], 5), two.batch([3], 5)
    assert together.ids.split()[2].tolist() == alone.ids.values.tolist()
    assert together.next_labels[2] == alone.next_labels[0]
    mine = together.ids.layout.owner[together.selected] == 2
    assert together.labels[mine].tolist() == alone.labels.tolist()
    assert (together.selected[mine] - sum(together.ids.lengths[:2])).tolist() == alone.selected.tolist()
    other_seed = _dataset(lengths, 24, seed=1)[0]
    different = [
        dataset.batch(range(4), e).ids.values.tolist() for dataset in (one, other_seed) for e in (0, 1)
    ]
    assert all(x != y for i, x in enumerate(different) for y in different[:i])


def test_chunks_fill_the_context_but_for_one_in_ten() -> None:
    dataset, _ = _dataset([[3] * 2000] * 2, context=35)
    full = np.mean(dataset.costs == 35)
    assert 0.8 < full < 0.97


def test_text_like_special_tokens_stays_text() -> None:
    texts = ["look at [MASK] and [SEP]\nhere is [CLS]", "one more\nand one"]
    tokenizer = train_tokenizer(TokenizerConfig(kind="wordpiece", vocab_size=200), "bert", texts)
    dataset = MaskedDataset(texts, tokenizer, 64, 0)
    for epoch in range(20):
        for ids in _restored(dataset.batch([0, 1], epoch)):
            assert ids.count(tokenizer.sep_id) == 2 and ids.count(tokenizer.mask_id) == 0


def test_unknown_words_are_never_selected() -> None:
    texts = ["abc\nabd", "bca\ncab"]
    tokenizer = character_tokenizer("bert", texts)
    dataset = MaskedDataset(["xyz\nxya", "xxx\nyyy"], tokenizer, 16, 0)
    labels = [id for epoch in range(200) for id in dataset.batch([0, 1], epoch).labels.tolist()]
    assert set(labels) == set(tokenizer.plain("a"))
    with pytest.raises(InputError, match="knows no word of the documents: is it of another language"):
        MaskedDataset(["xyz\nxyz", "xxx\nyyy"], tokenizer, 16, 0)


@pytest.mark.parametrize("texts", [["one\ntwo"], ["one", "two", "six"], []])
def test_documents_that_make_no_pairs_are_refused(texts: list[str]) -> None:
    tokenizer = character_tokenizer("bert", ["onetwsix"])
    with pytest.raises(InputError, match="at least 2 documents"):
        MaskedDataset(texts, tokenizer, 16, 0)


def test_tiny_contexts_and_other_tokenizers_are_refused() -> None:
    texts = ["ab\nab", "ba\nba"]
    with pytest.raises(InputError, match=r"model.context is 4"):
        MaskedDataset(texts, character_tokenizer("bert", texts), 4, 0)
    with pytest.raises(InputError, match=r"lacks \[CLS\]"):
        MaskedDataset(texts, character_tokenizer("gpt", texts), 16, 0)


# ---------------------------------------------------------------- whole words


@given(seed=st.integers(0, 20), epoch=st.integers(0, 3))
def test_all_pieces_of_a_word_are_selected_or_none(seed: int, epoch: int) -> None:
    text = [f"unbelievable {w}ness of {w}ing {w}" for w in ("kind", "dark", "sad", "mad", "glad", "odd")]
    made = train_tokenizer(TokenizerConfig(kind="wordpiece", vocab_size=70), "bert", text)
    dataset = MaskedDataset(["\n".join(text), "\n".join(reversed(text))], made, 60, seed, whole_words=True)
    batch = dataset.batch(range(len(dataset)), epoch)
    ids = batch.ids.values.clone()
    ids[batch.selected] = batch.labels  # as they were
    chosen = set(batch.selected.tolist())
    special = {made.cls_id, made.sep_id, made.unk_id}
    for place, id in enumerate(ids.tolist()):
        if place and made.token(id).startswith("##") and ids[place - 1].item() not in special:
            assert (place in chosen) == (place - 1 in chosen)
    assert not chosen & {place for place, id in enumerate(ids.tolist()) if id in special}
    start = 0
    for pair in batch.ids.split():
        share = sum(start <= place < start + len(pair) for place in chosen)
        longest_word = 12  # characters of unbelievable
        assert 1 <= share <= max(round(0.15 * len(pair)), longest_word)
        start += len(pair)


def test_about_as_many_tokens_are_selected_in_whole_words() -> None:
    lines = [" ".join(f"w{chr(97 + (i * j) % 26)}" for j in range(8)) for i in range(1, 60)]
    made = train_tokenizer(TokenizerConfig(kind="wordpiece", vocab_size=70), "bert", lines)
    documents = ["\n".join(lines[i : i + 10]) for i in range(0, 50, 10)]
    counts = {}
    for whole in (False, True):
        dataset = MaskedDataset(documents, made, 100, 0, whole_words=whole)
        batches = [dataset.batch(range(len(dataset)), epoch) for epoch in range(5)]
        counts[whole] = sum(len(b.labels) for b in batches) / sum(len(b.ids.values) for b in batches)
    assert counts[True] == pytest.approx(counts[False], rel=0.1)


def test_whole_words_need_word_pieces() -> None:
    texts = documents([[5, 5], [5, 5]])
    with pytest.raises(InputError, match=r"set tokenizer\.kind to wordpiece"):
        MaskedDataset(texts, character_tokenizer("bert", texts), 20, 0, whole_words=True)
