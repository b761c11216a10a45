from __future__ import annotations

import pytest
from corpus import character_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from qkv.data.pairs import PairDataset
from qkv.errors import InputError
from qkv.tokenizers import Tokenizer

words = st.text(alphabet="abcdef", max_size=12)
TOKENIZER = character_tokenizer("transformer", ["abcdef"])
START, END = 0, 1


def _dataset(
    sources: list[str], targets: list[str], context: int, truncate: bool, tokenizer: Tokenizer = TOKENIZER
) -> PairDataset:
    return PairDataset(
        sources, targets, tokenizer, start_id=START, end_id=END, context=context, truncate=truncate
    )


@given(rows=st.lists(st.tuples(words, words), min_size=1, max_size=8), context=st.integers(2, 14))
def test_sources_end_and_targets_are_shifted_by_one(rows: list[tuple[str, str]], context: int) -> None:
    sources, targets = (list(column) for column in zip(*rows, strict=True))
    dataset = _dataset(sources, targets, context, truncate=True)
    order = list(range(len(rows)))[::-1]
    batch = dataset.batch(order, epoch=0)
    labels = batch.labels.split(list(batch.inputs.lengths))
    for row, i in enumerate(order):
        source = TOKENIZER.plain(sources[i])[: context - 1]
        target = TOKENIZER.plain(targets[i])[: context - 1]
        assert batch.source.split()[row].tolist() == [*source, END]
        assert batch.inputs.split()[row].tolist() == [START, *target]
        assert labels[row].tolist() == [*target, END]
        assert dataset.costs[i] == len(source) + 1 + len(target) + 1
    cut = [sum(len(text) + 1 > context for text in column) for column in (sources, targets)]
    assert len(dataset.notes) == sum(count > 0 for count in cut)


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_text_over_the_context_is_an_error(side: str) -> None:
    texts = {"source": ["ab"], "target": ["ab"]} | {side: ["abcdef"]}
    with pytest.raises(InputError, match="1 of 1 texts are longer than the model's context of 6"):
        _dataset(texts["source"], texts["target"], 6, truncate=False)


def test_targets_go_through_the_tokenizer_of_targets() -> None:
    class Halved(Tokenizer):
        @property
        def target(self) -> Tokenizer:
            return TOKENIZER

    other = character_tokenizer("transformer", ["ABCabcdef"])
    halved = Halved(other.backend, other.special)
    batch = _dataset(["abc"], ["abc"], 9, truncate=False, tokenizer=halved).batch([0], 0)
    assert batch.source.values.tolist() == [*other.plain("abc"), END]
    assert batch.labels.tolist() == [*TOKENIZER.plain("abc"), END]
    assert other.plain("abc") != TOKENIZER.plain("abc")
