"""The demo from end to end at a few steps, and its count models against plain counting."""

import json
import math
import sys
from itertools import product
from pathlib import Path

import corpus
import numpy as np
import pytest
from rich.console import Console
from test_report import assert_self_contained

from qkv.config import FAMILIES
from qkv.data.documents import MaskedDataset
from qkv.demo import run_demo
from qkv.demo.bert import _balanced, _sentences
from qkv.demo.counts import KneserNey, Neighbours, masked_word_accuracies
from qkv.demo.gpt import counted
from qkv.demo.transformer import _dictionary, make_pairs
from qkv.errors import InputError


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A demo of all families at a hundredth of its steps."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    run_demo(FAMILIES, folder, Console(quiet=True), share=0.004)
    return folder


# ---------------------------------------------------------------- the whole


def test_report_has_every_model_with_scores_curve_and_attention(out: Path):
    found = assert_self_contained((out / "report.html").read_text("utf-8"))
    assert {section["id"] for section in found.all("section")} == set(FAMILIES)
    names = [svg["aria-label"] or "" for svg in found.all("svg")]
    assert sum(name.startswith("learning curve") for name in names) >= 4
    assert sum(name.startswith("attention") for name in names) >= 4
    assert all(image["src"].startswith("data:image/png;base64,") for image in found.all("img"))


def test_scores_are_written_beside_baselines(out: Path):
    scores = json.loads((out / "scores.json").read_text("utf-8"))
    assert set(scores) == set(FAMILIES)
    for family in scores.values():
        assert family["seconds"] > 0
        assert len(family["held_out"]) >= 3
        assert all(math.isfinite(v) for row in family["held_out"].values() for v in row.values())


def test_runs_are_checkpoints_that_know_where_their_data_lie(out: Path):
    for name in ("gpt", "bert", "bert-kinds", "transformer", "vit"):
        assert (out / name / "model.safetensors").is_file()
    assert (out / "data" / "vit" / "train" / "7").is_dir()


def test_nothing_held_out_is_trained_on(out: Path):
    data = out / "data"
    for family, pattern in (("gpt", "*.txt"), ("vit", "*/*.png")):
        train, valid = (
            {p.relative_to(data / family / split) for p in (data / family / split).glob(pattern)}
            for split in ("train", "valid")
        )
        assert train and valid and not train & valid
    texts = [(data / "bert" / f"kinds{s}.csv").read_text("utf-8").splitlines()[1:] for s in ("", "-valid")]
    assert not set(texts[0]) & set(texts[1])


def test_again_into_the_same_folder_begins_afresh(out: Path):
    stale = out / "data" / "vit" / "train" / "7" / "stale.png"
    stale.write_bytes(b"")
    run_demo(("vit",), out, Console(quiet=True), share=0.004)
    assert not stale.exists()
    assert set(json.loads((out / "scores.json").read_text("utf-8"))) == {"vit"}


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="choose another --out"):
        run_demo(("vit",), tmp_path, Console(quiet=True))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_missing_package_is_named(monkeypatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InputError, match=r"pip install 'qkv\[demo\]'"):
        run_demo(("vit",), tmp_path / "demo", Console(quiet=True))


# ---------------------------------------------------------------- count models


def kneser_ney(stream: list[int], order: int, vocab: int, run: tuple[int, ...]) -> float:
    """P(last token of run | those before it), by dictionaries and recursion, straight from the paper."""
    levels: list[dict[tuple[int, ...], int]] = []
    for length in range(order, 0, -1):
        counts: dict[tuple[int, ...], int] = {}
        if length == order:
            for i in range(len(stream) - order + 1):
                key = tuple(stream[i : i + order])
                counts[key] = counts.get(key, 0) + 1
        else:
            for longer in levels[-1]:
                counts[longer[1:]] = counts.get(longer[1:], 0) + 1
        levels.append(counts)

    def probability(run: tuple[int, ...]) -> float:
        if not run:
            return 1 / vocab
        counts = levels[order - len(run)]
        n = [max(sum(c == k for c in counts.values()), 1) if k < 4 else 0 for k in range(1, 4)]
        n.append(max(sum(c >= 4 for c in counts.values()), 1))
        y = n[0] / (n[0] + 2 * n[1])
        discounts = []
        for k in (1, 2, 3):
            d = k - (k + 1) * y * n[k] / n[k - 1]
            discounts.append(d if 0 < d < k else k / 2)
        followers = {key: c for key, c in counts.items() if key[:-1] == run[:-1]}
        if not followers:
            return probability(run[1:])
        total = sum(followers.values())
        freed = sum(discounts[min(c, 3) - 1] for c in followers.values())
        own = followers.get(run, 0)
        kept = own - discounts[min(own, 3) - 1] if own else 0.0
        return kept / total + freed / total * probability(run[1:])

    return probability(run)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_kneser_ney_is_what_the_formula_says(order: int):
    rng = np.random.default_rng(order)
    stream = rng.choice(5, 200, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    asked = np.array([0, 4, 4, 2, 1, 0, 3, 3, 0, 5])  # token 5 never occurred
    found = np.exp(KneserNey(stream, order, 6).log_probabilities(asked))
    runs = [tuple(asked[i : i + order].tolist()) for i in range(len(asked) - order + 1)]
    expected = [kneser_ney(stream.tolist(), order, 6, run) for run in runs]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_kneser_ney_is_a_distribution_behind_any_context(order: int):
    stream = np.random.default_rng(0).choice(4, 300)
    model = KneserNey(stream, order, 5)
    for context in product(range(5), repeat=order - 1):
        total = sum(math.exp(model.log_probabilities(np.array([*context, word]))[0]) for word in range(5))
        assert total == pytest.approx(1, abs=1e-12)


def test_counts_score_every_held_out_token_but_the_first():
    train, valid = np.array([0, 1, 2, 1] * 30), np.array([1, 2, 1, 0, 1])
    for order in (1, 2, 5):
        bits, perplexity = counted(train, valid, order, vocab_size=3, size_in_bytes=8)
        assert bits == pytest.approx(4 * math.log2(perplexity) / 8)


def test_neighbours_guess_what_stood_between_them():
    stream = np.array([3, 4, 5, 6, 7, 8] * 50 + [3, 9, 5])
    model = Neighbours(stream, 12)
    found = model.guesses(np.array([3, 6, 7]), np.array([5, 8, 5]))
    np.testing.assert_array_equal(found["both bigrams"][:2], [4, 7])
    np.testing.assert_array_equal(found["left bigram"], [4, 7, 8])
    np.testing.assert_array_equal(found["right bigram"], [4, 7, 4])
    np.testing.assert_allclose(np.exp(model.next).sum(1), 1, rtol=1e-5)
    assert set(found["unigram"]) <= {3, 5}  # 51 times each, the others less


def test_hidden_words_are_counted_as_bert_is_scored():
    texts = ["\n".join(["abacad"] * 4)] * 30
    tokenizer = corpus.character_tokenizer("bert", texts)
    train = MaskedDataset(texts[:20], tokenizer, 16, seed=0)
    valid = MaskedDataset(texts[20:], tokenizer, 16, seed=1)
    found = masked_word_accuracies(train, valid)
    stream = train.sentences.values
    usual = np.bincount(stream).argmax()
    right = []  # one pair at a time, one token at a time
    for i in range(len(valid)):
        pair = valid.batch([i], epoch=0)
        for place, label in zip(pair.selected.tolist(), pair.labels.tolist(), strict=True):
            seen = int(pair.ids.values[place])
            right.append(label == (usual if seen == valid.mask else seen))
    assert found["unigram"] == pytest.approx(np.mean(right))


def test_a_neighbour_that_says_nothing_leaves_it_to_the_other():
    model = Neighbours(np.array([3, 4, 5, 6, 7, 8] * 50 + [3, 9, 5]), 12)
    found = model.guesses(np.array([0, 3, 0]), np.array([8, 0, 0]))  # 0, a mask, never occurs
    np.testing.assert_array_equal(found["both bigrams"][:2], [7, 4])
    assert found["both bigrams"][2] == found["unigram"][2]


# ---------------------------------------------------------------- data


def test_sentences_of_prose_without_code():
    text = "Open the file now. It must exist already!\n\n    >>> open('x')\n\nCall close() in the end."
    assert list(_sentences(text)) == [
        "Open the file now.",
        "It must exist already!",
        "Call close() in the end.",
    ]


def test_functions_are_as_many_as_classes():
    rows = [(f"f{i}", "function") for i in range(100)] + [(f"c{i}", "class") for i in range(7)]
    kinds = [kind for _, kind in _balanced(rows)]
    assert kinds.count("class") == kinds.count("function") == 7


def test_pairs_are_the_same_every_time_and_hold_out_unseen_phrases():
    train, valid = make_pairs()
    assert (train, valid) == make_pairs()
    assert len(valid) > 500
    assert not dict(train).keys() & dict(valid).keys()


def test_dictionary_pairs_words_that_occur_together():
    pairs = [("5 meters", "5 méter"), ("7 meters", "7 méter"), ("in 3 weeks", "3 hét múlva")]
    assert _dictionary(pairs)["meters"] == "méter"
    assert "5" not in _dictionary(pairs)
