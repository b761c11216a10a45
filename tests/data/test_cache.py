"""The cache changes no batch; entries are whole or made again; without a disk there is still memory."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpus import character_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import qkv.data.cache
import qkv.data.images
from qkv.config import Family, TokenizerConfig
from qkv.data import Cache, Dataset, Raw, Samples, trained_tokenizer
from qkv.data.batches import Batch
from qkv.data.bpe_dropout import BPEDropout
from qkv.data.cache import Chunks, Columns, fingerprint
from qkv.data.contrastive import ContrastiveDataset
from qkv.data.documents import MaskedDataset
from qkv.data.images import ImageDataset
from qkv.data.labelled import LabelledDataset
from qkv.data.pairs import PairDataset
from qkv.data.raw import ImageFile
from qkv.data.tagged import TaggedDataset
from qkv.data.text import LanguageDataset
from qkv.errors import InputError
from qkv.images import ImageProcessor
from qkv.ragged import Ragged
from qkv.tokenizers import Tokenizer, train_tokenizer

TEXTS = ["one two three\nfour five", "six seven\neight", "nine ten\neleven twelve\nthirteen"]


def _png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def _language(cache: Cache) -> Dataset:
    return LanguageDataset(TEXTS, character_tokenizer("gpt", TEXTS), 5, 0, training=True, cache=cache)


def _masked(cache: Cache) -> Dataset:
    return MaskedDataset(TEXTS, character_tokenizer("bert", TEXTS), 16, 0, cache)


def _labelled(cache: Cache) -> Dataset:
    tokenizer = character_tokenizer("bert", TEXTS)
    return LabelledDataset(TEXTS, TEXTS[::-1], [0, 1, 0], tokenizer, 20, truncate=True, cache=cache)


def _pairs(cache: Cache) -> Dataset:
    tokenizer = character_tokenizer("transformer", TEXTS)
    return PairDataset(
        TEXTS, TEXTS[::-1], tokenizer, start_id=0, end_id=1, context=12, truncate=True, cache=cache
    )


def _images(cache: Cache) -> Dataset:
    files = [ImageFile(str(i), _png(i)) for i in range(3)]
    return ImageDataset(files, [0, 1, 1], ImageProcessor(6, (0.5,), (0.5,)), 3, cache)


def _tagged(cache: Cache) -> Dataset:
    tokenizer = train_tokenizer(TokenizerConfig(kind="wordpiece", vocab_size=60), "bert", TEXTS)
    sentences = [text.split() for text in TEXTS]
    tags = [list(range(len(words))) for words in sentences]
    return TaggedDataset(sentences, tags, tokenizer, 9, truncate=True, cache=cache)


def _contrastive(cache: Cache) -> Dataset:
    return ContrastiveDataset(
        TEXTS,
        TEXTS[::-1],
        character_tokenizer("bert", TEXTS),
        context=20,
        truncate=True,
        candidates=2,
        temperature=0.1,
        seed=0,
        cache=cache,
    )


def _byte_pairs(family: Family) -> tuple[Tokenizer, BPEDropout]:
    tokenizer = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), family, TEXTS)
    return tokenizer, BPEDropout(tokenizer, 0.5)


def _language_with_dropout(cache: Cache) -> Dataset:
    tokenizer, dropout = _byte_pairs("gpt")
    return LanguageDataset(TEXTS, tokenizer, 9, 0, training=True, cache=cache, dropout=dropout)


def _pairs_with_dropout(cache: Cache) -> Dataset:
    tokenizer, dropout = _byte_pairs("transformer")
    ends = {"start_id": 0, "end_id": 1, "context": 64, "truncate": False}
    return PairDataset(TEXTS, TEXTS[::-1], tokenizer, **ends, cache=cache, dropout=dropout)


KINDS = [
    _language,
    _masked,
    _labelled,
    _pairs,
    _images,
    _tagged,
    _contrastive,
    _language_with_dropout,
    _pairs_with_dropout,
]


def _bits(value: Any) -> list[object]:
    """Types and values of everything in a batch."""
    if isinstance(value, Batch):
        return [bits for f in dataclasses.fields(value) for bits in _bits(getattr(value, f.name))]
    if isinstance(value, Ragged):
        return [value.lengths, *_bits(value.values)]
    return [value.dtype, value.tolist()]


def _all(dataset: Dataset) -> list[object]:
    return [_bits(dataset.batch(list(range(len(dataset)))[::-1], epoch)) for epoch in (0, 3)]


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "photos")


@pytest.mark.parametrize("make", KINDS)
def test_batches_are_the_same_without_a_cache_and_with_an_empty_or_a_filled_one(
    make: Callable[[Cache], Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = make(Cache(None))
    first = make(Cache(tmp_path))

    def work(*_: object) -> None:
        raise AssertionError("this is in the cache")

    for method in ("plain_batch", "encode_batch", "encode_words", "word_begins"):
        monkeypatch.setattr(Tokenizer, method, work)
    monkeypatch.setattr(ImageFile, "pixels", work)
    second = make(Cache(tmp_path))
    assert _all(without) == _all(first) == _all(second)
    assert without.fingerprint == first.fingerprint == second.fingerprint
    assert without.notes == first.notes == second.notes
    assert without.costs.tolist() == second.costs.tolist()
    assert without.size_in_bytes == second.size_in_bytes


def test_a_sentence_s_fingerprint_tells_its_words_and_tags_apart() -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind="wordpiece", vocab_size=60), "bert", TEXTS)
    made = [
        TaggedDataset(sentences, tags, tokenizer, 32, truncate=False).fingerprint
        for sentences, tags in (
            ([["one", "two"], ["ten"]], [[0, 1], [0]]),
            ([["one", "two"], ["ten"]], [[0, 1], [1]]),
            ([["one"], ["two", "ten"]], [[0], [1, 0]]),
            ([["onetwo", "ten"]], [[0, 1]]),
        )
    ]
    assert len(set(made)) == 4


def test_a_tokenizer_learns_from_the_words_of_sentences(tmp_path: Path) -> None:
    config, cache = TokenizerConfig(kind="wordpiece", vocab_size=60), Cache(tmp_path)
    for words in ([["one"], ["two"]], [["ten"], ["nine"]]):
        samples = Samples("tagging", words=words, tags=[[0], [1]])
        made = trained_tokenizer(config, "bert", [Raw(samples, samples, (), "")], cache)
        assert all(made.unk_id not in made.plain(word) for (word,) in words)
    assert len(_entries(tmp_path)) == 2


def test_fingerprints_tell_contents_tokenizers_and_labels_apart() -> None:
    one, two = character_tokenizer("bert", TEXTS), character_tokenizer("bert", [*TEXTS, "X"])

    def labelled(texts: list[str], labels: list[int], tokenizer: Tokenizer) -> str:
        return LabelledDataset(texts, [], labels, tokenizer, 64, truncate=False).fingerprint

    prints = {
        labelled(["ab", "c"], [0, 1], one),
        labelled(["a", "bc"], [0, 1], one),  # the same characters
        labelled(["ab", "c"], [1, 0], one),
        labelled(["ab", "c"], [0, 1], two),
        *(make(Cache(None)).fingerprint for make in KINDS),
    }
    assert len(prints) == 4 + len(KINDS)
    assert labelled(["ab", "c"], [0, 1], one) in prints


@given(st.lists(st.lists(st.text(max_size=3), max_size=3), max_size=5))
def test_different_parts_have_different_fingerprints(parts: list[list[str]]) -> None:
    assert len({fingerprint(*some) for some in parts}) == len({tuple(some) for some in parts})


def test_a_tokenizer_is_the_same_after_it_was_stored(tmp_path: Path) -> None:
    for kind in ("char", "bpe", "wordpiece"):
        config = TokenizerConfig(kind=kind, vocab_size=300)  # type: ignore[arg-type]
        raw = Raw(Samples("text", TEXTS), Samples("text", TEXTS), (), "")
        made = train_tokenizer(config, "bert", raw.texts())
        first, second = (trained_tokenizer(config, "bert", [raw], Cache(tmp_path)) for _ in range(2))
        made.save(tmp_path)
        for other in (first, second, Tokenizer.load(tmp_path)):
            assert other.definition == made.definition and other.special == made.special
    assert len(_entries(tmp_path)) == 3


# ---------------------------------------------------------------- entries


def _chunks(*sizes: int) -> Callable[[], Chunks]:
    def chunks() -> Chunks:
        for size in sizes:
            yield size, {"a": np.arange(size, dtype=np.uint16), "b": np.zeros((size, 2, 3), np.uint8)}

    return chunks


def _get(cache: Cache, chunks: Callable[[], Chunks], key: str = "key") -> Columns:
    return cache.get(key, "library 1", chunks, "things done", 7)


def test_arrays_are_their_chunks_end_to_end_and_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []

    def watch(doing: str, done: int, total: int) -> None:
        told.append((doing, done, total))

    for folder in (None, tmp_path):
        told.clear()
        found = _get(Cache(folder, watch), _chunks(3, 0, 4))
        assert found["a"].tolist() == [0, 1, 2, 0, 1, 2, 3] and found["a"].dtype == np.uint16
        assert found["b"].shape == (7, 2, 3)
        assert told == [("things done", n, 7) for n in (3, 3, 7)]
    assert _get(Cache(tmp_path), _chunks(0), "empty")["b"].shape == (0, 2, 3)
    assert _get(Cache(tmp_path), _chunks(1), "empty")["b"].shape == (0, 2, 3)


def test_what_is_written_to_the_arrays_does_not_reach_the_files(tmp_path: Path) -> None:
    torch.from_numpy(_get(Cache(tmp_path), _chunks(3))["b"]).fill_(1)
    assert not _get(Cache(tmp_path), _chunks(3))["b"].any()


def _cut(entry: Path) -> None:
    (entry / "a").write_bytes((entry / "a").read_bytes()[:-1])


def _lengthen(entry: Path) -> None:
    (entry / "b").write_bytes((entry / "b").read_bytes() + b"x")


def _remove(entry: Path) -> None:
    (entry / "a").unlink()


def _tear(entry: Path) -> None:
    index = entry / "index.json"
    index.write_text(index.read_text()[:-9])


def _foreign(entry: Path) -> None:
    (entry / "index.json").write_text("[1, 2]")


def _other_type(entry: Path) -> None:
    index = json.loads((entry / "index.json").read_text())
    index["columns"]["a"][0] = "<i2"
    (entry / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("damage", [_cut, _lengthen, _remove, _tear, _foreign, _other_type])
def test_a_damaged_entry_is_made_again(damage: Callable[[Path], None], tmp_path: Path) -> None:
    _get(Cache(tmp_path), _chunks(4))
    (entry,) = _entries(tmp_path)
    damage(entry)
    cache = Cache(tmp_path)
    assert _get(cache, _chunks(5))["a"].tolist() == [0, 1, 2, 3, 4]
    assert _get(cache, _chunks(6))["a"].tolist() == [0, 1, 2, 3, 4]
    assert cache.problem == ""


def test_an_interrupted_entry_is_not_there(tmp_path: Path) -> None:
    def interrupted() -> Chunks:
        yield from _chunks(3)()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _get(Cache(tmp_path), interrupted)
    assert _entries(tmp_path) == []

    def wrong() -> Chunks:
        yield from _chunks(3)()
        raise InputError("a broken image")

    with pytest.raises(InputError, match="a broken image"):
        _get(Cache(tmp_path), wrong)
    assert _get(Cache(tmp_path), _chunks(2))["a"].tolist() == [0, 1]


def test_a_full_disk_costs_memory_and_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(qkv.data.cache, "sync", full)
    cache = Cache(tmp_path)
    for key in ("one", "two"):
        assert _get(cache, _chunks(3), key)["a"].tolist() == [0, 1, 2]
    assert "the disk is full" in cache.problem and "QKV_CACHE" in cache.problem
    assert _entries(tmp_path) == []


def test_a_folder_that_is_none_costs_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "folder")
    assert _get(cache, _chunks(3))["a"].tolist() == [0, 1, 2]
    assert str(tmp_path / "file" / "folder") in cache.problem


def test_pixels_without_a_cache_that_are_too_many_for_memory_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qkv.data.images, "KEEP_BYTES", 0)
    (tmp_path / "file").write_text("")
    kept, broken = _images(Cache(tmp_path / "cache")), _images(Cache(tmp_path / "file"))
    assert isinstance(kept, ImageDataset) and kept.pixels is not None
    assert isinstance(broken, ImageDataset) and broken.pixels is None
    monkeypatch.setattr(qkv.data.images, "LIMIT_BYTES", 0)
    large = _images(Cache(tmp_path / "cache"))
    assert isinstance(large, ImageDataset) and large.pixels is None
    assert _all(kept) == _all(broken) == _all(large)


def test_least_recently_used_entries_are_dropped_beyond_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for age, key in ((300, "old"), (200, "older when used"), (100, "new")):
        before = set(_entries(tmp_path)) if tmp_path.exists() else set()
        _get(Cache(tmp_path), _chunks(1000), key)
        (entry,) = set(_entries(tmp_path)) - before
        os.utime(entry / "index.json", (1e9 - age, 1e9 - age))
    _get(Cache(tmp_path), _chunks(), "old")  # a use
    size = sum(path.stat().st_size for path in entry.iterdir())
    monkeypatch.setattr(qkv.data.cache, "LIMIT_BYTES", 3 * size + 100)
    (tmp_path / f"{7:064x}").mkdir()  # left by a killed process
    (tmp_path / "photos").mkdir()
    _get(Cache(tmp_path), _chunks(1000), "newest")
    assert len(_entries(tmp_path)) == 3
    for key, size in (("old", 1000), ("new", 1000), ("newest", 1000), ("older when used", 2)):
        assert len(_get(Cache(tmp_path), _chunks(2), key)["a"]) == size
    monkeypatch.setattr(qkv.data.cache, "LIMIT_BYTES", 0)
    assert len(_get(Cache(tmp_path), _chunks(9), "larger than the limit")["a"]) == 9
    assert len(_entries(tmp_path)) == 1
    assert (tmp_path / "photos").is_dir()  # whatever else a folder holds that QKV_CACHE names


def test_an_entry_is_made_by_one_of_those_who_want_it(tmp_path: Path) -> None:
    made: list[int] = []
    began = threading.Event()

    def slow() -> Iterator[tuple[int, Columns]]:
        made.append(1)
        began.set()
        for _ in range(20):
            yield from _chunks(5)()

    found: list[Columns] = []
    threads = [threading.Thread(target=lambda: found.append(_get(Cache(tmp_path), slow))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert [len(columns["a"]) for columns in found] == [100] * 4


def test_two_processes_make_one_entry(tmp_path: Path) -> None:
    def run() -> None:
        found = _get(Cache(tmp_path), _chunks(*[1000] * 50))
        sys.exit(0 if found["a"].tolist() == list(range(1000)) * 50 else 1)

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(_entries(tmp_path)) == 1
