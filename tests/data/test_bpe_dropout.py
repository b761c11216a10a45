from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from qkv.config import Family, TokenizerConfig
from qkv.data.bpe_dropout import BPEDropout
from qkv.data.dataset import Ids
from qkv.data.files import TextFile
from qkv.data.pairs import PairDataset
from qkv.data.text import LanguageDataset
from qkv.errors import InputError
from qkv.tokenizers import Tokenizer, train_tokenizer

CORPUS = [
    "the cat sat on the mat, the bat that sat",
    "a hat, an ant; that tent",
    "don't  stop\n\nÜber 日本語 🙂",
] * 5


def tokenizer(family: Family = "gpt", kind: str = "bpe", size: int = 330) -> Tokenizer:
    return train_tokenizer(TokenizerConfig(kind=kind, vocab_size=size), family, CORPUS)  # type: ignore[arg-type]


def marked() -> Tokenizer:
    """A tokenizer whose tokens mark the ends of words, as GPT-1's do."""
    backend = Backend(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=80, end_of_word_suffix="</w>", special_tokens=["<unk>"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return Tokenizer(backend, {"unk": "<unk>"})


TOKENIZERS = {"bytes": tokenizer(), "marks": marked()}
texts = st.one_of(
    st.text(max_size=30), st.lists(st.sampled_from(" ".join(CORPUS).split()), max_size=12).map(" ".join)
)


def parts(made: Tokenizer, text: str) -> tuple[Ids, Ids]:
    return np.array(made.plain(text), dtype=np.int64), np.array(made.word_begins([text])[0], dtype=np.int64)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=texts)
def test_without_dropout_it_is_the_library_s_segmentation(kind: str, text: str) -> None:
    made = TOKENIZERS[kind]
    ids, begins = parts(made, text)
    found = BPEDropout(made, 0.0).segment(ids, begins, np.random.default_rng(0))
    assert found.tolist() == ids.tolist()


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=texts, rate=st.floats(0.05, 0.95), seed=st.integers(0, 99))
def test_a_segmentation_says_the_same_text(kind: str, text: str, rate: float, seed: int) -> None:
    made = TOKENIZERS[kind]
    ids, begins = parts(made, text)
    dropout = BPEDropout(made, rate)
    found = dropout.segment(ids, begins, np.random.default_rng(seed))
    assert "".join(map(made.token, found)) == "".join(map(made.token, ids))
    again = dropout.segment(ids, begins, np.random.default_rng(seed))
    assert found.tolist() == again.tolist()


def test_certain_dropout_leaves_the_symbols() -> None:
    made = tokenizer()
    ids, begins = parts(made, "the cat sat")
    dropout = BPEDropout(made, 1.0)
    found = dropout.segment(ids, begins, np.random.default_rng(0))
    assert [made.token(id) for id in found] == list("theĠcatĠsat")


def test_segmentations_are_as_frequent_as_the_algorithm_makes_them() -> None:
    """For abc with the merges ab, abc: a b c if ab is left out, ab c if only abc is, abc otherwise."""
    backend = Backend(models.BPE({"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}, [("a", "b"), ("ab", "c")]))
    dropout = BPEDropout(Tokenizer(backend, {}), 0.3)
    rng = np.random.default_rng(0)
    ids, begins = np.array([4]), np.array([1])
    counts = Counter(tuple(dropout.segment(ids, begins, rng).tolist()) for _ in range(4000))
    expected = {(0, 1, 2): 0.3, (3, 2): 0.7 * 0.3, (4,): 0.7 * 0.7}
    for pieces, chance in expected.items():
        assert counts[pieces] / 4000 == pytest.approx(chance, abs=0.03)  # four standard deviations
    assert counts.keys() == expected.keys()


def test_segmentations_are_as_frequent_as_the_library_s() -> None:
    made, count = tokenizer(), 8000
    ids, begins = parts(made, "that")
    dropout, rng = BPEDropout(made, 0.3), np.random.default_rng(0)
    ours = Counter(tuple(dropout.segment(ids, begins, rng).tolist()) for _ in range(count))
    library = Backend.from_str(made.backend.to_str())
    library.model.dropout = 0.3
    theirs = Counter(tuple(e.ids) for e in library.encode_batch(["that"] * count))
    assert len(ours) > 3
    for pieces in ours | theirs:
        # Their draws cannot be seeded: the bound is seven standard deviations of the difference.
        assert abs(ours[pieces] - theirs[pieces]) / count < 0.055


def test_tokenizers_without_merges_are_refused() -> None:
    for kind in ("char", "wordpiece"):
        with pytest.raises(InputError, match=r"set tokenizer\.kind to bpe"):
            BPEDropout(tokenizer(kind=kind), 0.1)


# ---------------------------------------------------------------- in datasets


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_windows_begin_in_their_places(rate: float) -> None:
    made = tokenizer()
    plain = LanguageDataset(CORPUS, made, 16, 7, training=True)
    cut = LanguageDataset(CORPUS, made, 16, 7, training=True, dropout=BPEDropout(made, rate))
    assert cut.costs.tolist() == plain.costs.tolist()
    different = 0
    for epoch in range(2):
        for i in range(len(plain)):
            expected, found = plain.batch([i], epoch), cut.batch([i], epoch)
            whole = "".join(map(made.token, [expected.ids.values[0], *expected.labels]))
            said = "".join(map(made.token, [found.ids.values[0], *found.labels]))
            assert len(found.labels) <= cut.costs[i]
            assert whole.startswith(said) if len(found.labels) == 16 else whole == said
            assert found.labels.tolist() == cut.batch([0, i], epoch).labels.tolist()[-len(found.labels) :]
            different += found.labels.tolist() != expected.labels.tolist()
    assert (different > 0) == (rate > 0)


def test_windows_of_files_are_those_of_their_texts(tmp_path: Path) -> None:
    made = tokenizer()
    files = [tmp_path / f"{i}.txt" for i in range(len(CORPUS))]
    for file, text in zip(files, CORPUS, strict=True):
        file.write_bytes(text.encode())
    datasets = [
        LanguageDataset(texts, made, 16, 7, training=True, dropout=BPEDropout(made, 0.4))
        for texts in (CORPUS, [TextFile.open(file) for file in files])
    ]
    everything = [dataset.batch(range(len(dataset)), 1).ids.values.tolist() for dataset in datasets]
    assert everything[0] == everything[1]


def test_pairs_are_cut_anew_in_every_epoch_and_never_beyond_the_context() -> None:
    made = tokenizer("transformer")
    sources, targets = CORPUS[:3], CORPUS[:3][::-1]
    longest = max(len(made.plain(text)) for text in sources)
    context = 2 * longest
    dropout = BPEDropout(made, 0.4)
    ends = {"start_id": made.pad_id, "end_id": made.eos_id, "context": context, "truncate": False}
    pairs = PairDataset(sources, targets, made, **ends, dropout=dropout, seed=1)
    seen, tokens = set(), 0
    for epoch in range(20):
        batch = pairs.batch([0, 1, 2], epoch)
        for i, (source, target) in enumerate(zip(batch.source.split(), batch.inputs.split(), strict=True)):
            assert made.decode(source.tolist()) == sources[i] and made.decode(target.tolist()) == targets[i]
            assert max(len(source), len(target)) <= context
            tokens += len(source) + len(target)
            alone = pairs.batch([i], epoch)
            assert alone.source.values.tolist() == source.tolist()
        seen.add(tuple(batch.source.values.tolist()))
    assert len(seen) > 15
    assert tokens / 20 == pytest.approx(pairs.costs.sum(), rel=0.1)  # known from one drawing
    assert re.search(r"texts have 1\.\d\d times as many tokens as without", pairs.notes[0])
