"""The data summary against plain counting, for every kind of data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import samples
from corpus import character_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from qkv.config import DataConfig
from qkv.data import Dataset, Raw, Samples, read
from qkv.data.batches import Batch
from qkv.data.contrastive import ContrastiveDataset
from qkv.data.summary import Spread, Summary, summarize


class Costs(Dataset):
    """Only as many tokens as given."""

    def __init__(self, costs: list[int], notes: tuple[str, ...] = ()) -> None:
        self.costs = np.array(costs)
        self.notes = notes

    def batch(self, indices, epoch) -> Batch:
        raise NotImplementedError


def summary_of(train: Samples, valid: Samples, labels: tuple[str, ...] = ()) -> Summary:
    raw = Raw(train, valid, labels, "some")
    return summarize(raw, Costs([3] * len(train)), Costs([3] * len(valid)))


texts_of = st.lists(st.sampled_from(["", " ", "a", "b", "c", "a b", "d" * 100]), min_size=1, max_size=20)


@given(train=texts_of, valid=texts_of)
def test_repetitions_leaks_and_empty_texts_are_counted(train: list[str], valid: list[str]) -> None:
    found = summary_of(Samples("text", train), Samples("text", valid))
    for split, texts in ((found.train, train), (found.valid, valid)):
        full = [text for text in texts if text.strip()]
        assert split.samples == len(texts)
        assert split.empty == len(texts) - len(full)
        assert split.repeated == sum(text in full[:i] for i, text in enumerate(full))
    leaked = [text for text in valid if text.strip() and text in train]
    assert found.leaked == len(leaked)
    warnings = [line for line in found.remarks() if line.startswith("Warning: ")]
    assert len(warnings) == bool(leaked)
    if leaked:
        shown = repr(leaked[0]) if len(leaked[0]) <= 60 else repr("d" * 57 + "...")
        assert warnings[0].startswith(f"Warning: {len(leaked)} of {len(valid)} held-out samples")
        assert warnings[0].endswith(f"for instance {shown}.")


@given(
    rows=st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xy")), min_size=1, max_size=10),
    held_out=st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xy")), min_size=1, max_size=10),
)
def test_a_pair_is_repeated_only_if_both_its_texts_are(rows, held_out) -> None:
    train, valid = (Samples("pairs", [s for s, _ in some], [t for _, t in some]) for some in (rows, held_out))
    found = summary_of(train, valid)
    assert found.train.repeated == len(rows) - len(set(rows))
    assert found.leaked == sum(row in rows for row in held_out)


def test_balance_and_a_label_without_samples() -> None:
    train = Samples("classification", list("abcd"), labels=[0, 0, 0, 1])
    valid = Samples("classification", list("xyz"), labels=[0, 1, 1])
    found = summary_of(train, valid, ("no", "yes", "never"))
    assert found.train.labels == (3, 1, 0) and found.valid.labels == (1, 2, 0)
    remarks = list(found.remarks())
    assert "Warning: no training sample is labelled 'never'." in remarks
    assert remarks[-1] == "Always saying 'no' is right for 33.3 % of the held-out samples."


def test_sets_of_labels_are_counted_by_label() -> None:
    train = Samples("multi_label", list("abc"), label_sets=[(0, 1), (), (1,)])
    found = summary_of(train, Samples("multi_label", list("xy"), label_sets=[(0,), ()]), ("no", "yes"))
    assert (found.train.labelled, found.train.labels) == (3, (1, 2))
    assert list(found.remarks())[-1] == "Never giving a label is right for 75.0 % of the held-out decisions."


def test_tags_are_counted_by_word_and_sentences_compared() -> None:
    train = Samples("tagging", words=[["a", "b"], ["c"], ["c"]], tags=[[0, 0], [1], [1]])
    valid = Samples("tagging", words=[["a", "b"], ["ab"]], tags=[[0, 1], [1]])
    found = summary_of(train, valid, ("O", "X"))
    assert (found.train.labelled, found.train.labels, found.valid.labels) == (4, (2, 2), (1, 2))
    assert (found.train.repeated, found.leaked, found.train.empty) == (1, 1, 0)
    assert found.train.characters == (Spread(1, 1, 3),)
    first, *_, last = found.remarks()
    assert first.endswith("for instance 'a b'.")
    assert last == "Always saying 'O' is right for 33.3 % of the held-out words."


def test_values_have_no_labels_but_a_mean() -> None:
    train = Samples("regression", list("ab"), values=[1.0, 3.0])
    found = summary_of(train, Samples("regression", list("xy"), values=[2.0, 5.0]), ("label",))
    assert found.labels == found.train.labels == ()
    assert list(found.remarks()) == ["Always saying 2 has the held-out loss 4.5."]


def test_lengths_are_those_of_texts_where_a_sample_is_a_group() -> None:
    texts = ["a", "bbb", "cc"]
    tokenizer = character_tokenizer("bert", texts)
    groups = ContrastiveDataset(
        texts, [], tokenizer, context=9, truncate=False, candidates=2, temperature=0.1, seed=0
    )
    raw = Raw(Samples("contrastive", texts), Samples("contrastive", texts), (), "some")
    split = summarize(raw, groups, groups).train
    assert (split.samples, split.lengths, split.tokens) == (3, Spread(3, 4, 5), 2 * 12)


def test_notes_say_which_data_they_are_about_and_lengths_are_tokens() -> None:
    raw = Raw(Samples("text", ["aa", "b"]), Samples("text", ["c"]), (), "some")
    found = summarize(raw, Costs([5, 1, 3], ("two were cut.",)), Costs([2], ("one is odd.",)))
    assert found.train.lengths == Spread(1, 3, 5) and found.train.tokens == 9
    assert found.train.characters == (Spread(1, 1, 2),)
    assert list(found.remarks()) == ["Training data: two were cut.", "Held-out data: one is odd."]
    assert found.text().startswith(raw.describe() + "\n")


def test_images_are_compared_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(samples.images(tmp_path))
    raw = read(DataConfig(path=str(folder)), "vit")
    clean = summarize(raw, Costs([1] * 36), Costs([1] * 4))
    assert (clean.train.repeated, clean.leaked) == (0, 0)
    twin = raw.valid.images[2].source
    assert isinstance(twin, Path) and isinstance(raw.train.images[0].source, Path)
    raw.train.images[0].source.write_bytes(twin.read_bytes())
    found = summarize(raw, Costs([1] * 36), Costs([1] * 4))
    assert found.leaked == 1 and str(twin) in next(found.remarks())
    monkeypatch.setattr("qkv.data.summary.COMPARED_BYTES", 10)
    found = summarize(raw, Costs([1] * 36), Costs([1] * 4))
    assert found.leaked is None and "were not compared" in next(found.remarks())
