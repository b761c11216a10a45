"""Batches keep the budget, answers their order, and no more is read ahead than is said."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_pipelines import TEXTS, classifier, encoder, image, translator

from qkv import batching
from qkv.batching import batches, in_order, windows
from qkv.data.corpus import TextCorpus
from qkv.errors import InputError

COSTS = st.lists(st.integers(1, 3 * batching.BATCH_TOKENS // 2))


@given(COSTS)
def test_batches_keep_the_budget_and_lose_nothing(costs):
    found = list(batches(costs))
    assert sorted(i for batch in found for i in batch) == list(range(len(costs)))
    assert all(len(batch) == 1 or sum(costs[i] for i in batch) <= batching.BATCH_TOKENS for batch in found)


@given(COSTS, st.integers(1, 10**5))
def test_windows_keep_their_room_but_for_the_last_input(sizes, room):
    found = list(windows(sizes, lambda size: size, room))
    assert [size for window in found for size in window] == sizes
    assert all(sum(window[:-1]) < room for window in found)
    assert all(sum(window) >= room for window in found[:-1])


@given(COSTS, st.integers(1, 10**5))
def test_answers_are_in_order_and_inputs_read_when_needed(costs, room):
    reader = Reader(list(enumerate(costs)))
    starts = []

    def prepare(window, first):
        starts.append((first, len(window)))
        return window

    answers = in_order(
        reader, prepare, lambda one: one[1], lambda batch: [-i for i, _ in batch], lambda one: one[1], room
    )
    assert reader.count == 0
    for i, answer in enumerate(answers):
        assert answer == -i
        assert sum(costs[i : reader.count - 1]) < room
    assert reader.count == len(costs)
    assert [first for first, _ in starts] == [sum(n for _, n in starts[:k]) for k in range(len(starts))]


class Reader:
    """An iterator that knows how far it was read."""

    def __init__(self, values):
        self.values = iter(values)
        self.count = 0

    def __iter__(self):
        return self

    def __next__(self):
        value = next(self.values)
        self.count += 1
        return value


def asks():
    """What pipelines answer: for each a list of inputs, and the question."""
    texts = [text[:30] for text in TEXTS] * 5
    pairs = list(zip(texts, reversed(texts), strict=True))
    bert, tagger = encoder(), encoder("tagging", ("O", "B-X"))
    classes, values = encoder("classification", ("bad", "good")), encoder("regression", ("score",))
    mt, vit = translator(), classifier()
    return {
        "embed": (texts, bert.embed),
        "classify": (pairs, classes.classify),
        "estimate": (pairs, values.estimate),
        "tag": (texts, tagger.tag),
        "translate": (texts[:9], lambda given: mt.translate(given, num_beams=2, max_new_tokens=6)),
        "images": ([image(seed) for seed in range(9)], vit.classify),
    }


@pytest.mark.filterwarnings("ignore:.*translations were cut")
@pytest.mark.parametrize("name", asks())
def test_an_iterator_gives_the_answers_of_the_list_and_of_each_alone(name, monkeypatch):
    inputs, ask = asks()[name]
    together = list(ask(inputs))
    monkeypatch.setattr(batching, "BATCH_TOKENS", 40)
    monkeypatch.setattr(batching, "WINDOW_CHARACTERS", 300)
    reader = Reader(inputs)
    streamed = ask(reader)
    assert isinstance(streamed, Iterator) and reader.count == 0
    first = list(islice(streamed, 2))
    assert 2 <= reader.count < len(inputs)
    streamed = first + list(streamed)
    alone = [answer for one in inputs for answer in ask([one])]
    assert len(together) == len(streamed) == len(alone) == len(inputs)
    for answers in (streamed, alone):
        for found, wanted in zip(answers, together, strict=True):
            same(found, wanted)


def same(found, wanted):
    """Equal words and places, and numbers but for rounding."""
    if isinstance(wanted, str | int):
        assert found == wanted
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            same(one, other)
    else:
        assert found == pytest.approx(wanted, abs=1e-5)


def test_cut_texts_are_counted_over_all_windows(monkeypatch):
    monkeypatch.setattr(batching, "WINDOW_CHARACTERS", 300)
    texts = ["fox", "dog " * 60] * 9
    bert = encoder()
    with pytest.warns(UserWarning, match="9 of 18 texts were longer than 40 tokens and were cut") as seen:
        assert len(list(bert.embed(iter(texts), truncate=True))) == 18
    assert len(seen) == 1
    with pytest.raises(InputError, match="text 7 has 62 tokens"):
        list(bert.embed(["fox"] * 7 + texts[1:]))


def test_a_large_file_takes_little_memory(tmp_path):
    path = tmp_path / "corpus.txt"
    line = "a line of some fifty characters, as sentences have\n"
    path.write_text(line * 200_000)  # 10 MB, as strings 20 MB
    texts = (text for (text,) in TextCorpus(path, ["text"]))
    tracemalloc.start()
    answers = in_order(
        texts,
        lambda window, first: window,
        len,
        lambda batch: [len(text) for text in batch],
        len,
        batching.WINDOW_CHARACTERS,
    )
    total = sum(answers)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 200_000 * (len(line) - 1)
    assert peak < 16 * batching.WINDOW_CHARACTERS
