from __future__ import annotations

import pytest
import torch
from corpus import character_tokenizer, characters
from hypothesis import given
from hypothesis import strategies as st

import qkv.data.files
import qkv.data.text
from qkv.config import TokenizerConfig
from qkv.data.files import TextFile
from qkv.data.text import LanguageDataset, pieces
from qkv.errors import InputError
from qkv.tokenizers import train_tokenizer

texts_of = st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 0)


def _texts(sizes: list[int]) -> list[str]:
    return [characters(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _stream(texts: list[str], dataset_tokenizer: object) -> list[int]:
    tokenizer = dataset_tokenizer
    return [id for text in texts for id in [tokenizer.eos_id, *tokenizer.plain(text)]]  # type: ignore[attr-defined]


@given(sizes=texts_of, context=st.integers(1, 40))
def test_held_out_windows_predict_every_token_but_the_first_exactly_once(
    sizes: list[int], context: int
) -> None:
    texts = _texts(sizes)
    tokenizer = character_tokenizer("gpt", texts)
    dataset = LanguageDataset(texts, tokenizer, context, seed=0, training=False)
    stream = _stream(texts, tokenizer)
    batch = dataset.batch(range(len(dataset)), epoch=3)
    assert batch.labels.tolist() == stream[1:]
    assert batch.ids.values.tolist() == stream[:-1]
    assert batch.ids.lengths == tuple(dataset.costs)
    assert max(batch.ids.lengths) <= context
    assert dataset.size_in_bytes == len("".join(texts).encode())


@given(sizes=texts_of, context=st.integers(1, 40), seed=st.integers(0, 3), epoch=st.integers(0, 9))
def test_training_windows_cut_a_ring_and_predict_no_token_twice(
    sizes: list[int], context: int, seed: int, epoch: int
) -> None:
    texts = _texts(sizes)
    tokenizer = character_tokenizer("gpt", texts)
    dataset = LanguageDataset(texts, tokenizer, context, seed, training=True)
    stream = _stream(texts, tokenizer)
    batch = dataset.batch(range(len(dataset)), epoch)
    assert set(batch.ids.lengths) == {min(context, len(stream) - 1)}
    ring = {(a, b) for a, b in zip(stream, [*stream[1:], stream[0]], strict=True)}
    assert set(zip(batch.ids.values.tolist(), batch.labels.tolist(), strict=True)) <= ring
    words = [id for id in batch.labels.tolist() if id != tokenizer.eos_id]
    assert len(words) == len(set(words))
    assert len(stream) - len(batch.labels) < min(context, len(stream) - 1)  # less than a window is left over


def test_training_windows_move_from_epoch_to_epoch_and_come_back() -> None:
    text = characters(0, 100)
    tokenizer = character_tokenizer("gpt", [text])
    one, two = (LanguageDataset([text], tokenizer, 10, seed=1, training=True) for _ in range(2))
    starts = {int(one.batch([0], epoch).ids.values[0]) for epoch in range(20)}
    assert len(starts) > 10
    for epoch in (0, 7):
        torch.testing.assert_close(one.batch([3], epoch).labels, two.batch([3], epoch).labels)


def test_a_window_does_not_depend_on_its_neighbours() -> None:
    text = characters(0, 100)
    dataset = LanguageDataset([text], character_tokenizer("gpt", [text]), 10, seed=1, training=True)
    together, alone = dataset.batch([4, 0, 7], 2), dataset.batch([7], 2)
    assert together.ids.split()[2].tolist() == alone.ids.values.tolist()
    assert together.labels[20:].tolist() == alone.labels.tolist()


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "char"])
def test_pieces_have_the_tokens_of_the_whole_text(kind: str) -> None:
    sample = [
        "it's a\nb c\n\nd  1\n e \nf\t\ng's",
        "a\n\n",
        "a\n\n\n",
        "a \n",
        "a\t\n",
        "a\r\nb\r\n",
        " a = \n b = \n \n c",
    ] * 3  # white space merges
    tokenizer = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=300), "gpt", sample)  # type: ignore[arg-type]

    @given(st.text(alphabet="ab1's. \n\r\t", max_size=80))
    def check(text: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(qkv.data.text, "_PIECE", 3)
            parts = list(pieces(text))
        assert "".join(parts) == text
        assert [id for part in parts for id in tokenizer.plain(part)] == tokenizer.plain(text)

    check()


@given(st.text(alphabet="ab\n é€", max_size=60), st.integers(1, 9))
def test_a_file_read_in_parts_has_the_pieces_of_its_text(
    tmp_path_factory: pytest.TempPathFactory, text: str, part: int
) -> None:
    path = tmp_path_factory.mktemp("file") / "a.txt"
    path.write_text(f"x{text}", encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qkv.data.text, "_PIECE", 3)
        patch.setattr(qkv.data.files, "_PART_BYTES", part)
        assert list(pieces(TextFile.open(path))) == list(pieces(f"x{text}"))


def test_long_texts_are_divided() -> None:
    assert len(list(pieces("a paragraph without line breaks\n\n" * 40_000))) > 10
    assert len(list(pieces("some words\n" * 100_000))) > 10
    assert len(list(pieces("of another system\r\n" * 100_000))) > 10
    assert len(list(pieces(" = tokenised = \n" * 100_000))) > 10


def test_unknown_characters_are_reported() -> None:
    tokenizer = character_tokenizer("gpt", ["abc"])
    assert LanguageDataset(["abc"], tokenizer, 4, 0, training=False).notes == ()
    (note,) = LanguageDataset(["abxc", "y"], tokenizer, 4, 0, training=False).notes
    assert note.startswith("2 of 7 tokens are unknown")


def test_text_without_a_token_to_predict_is_refused() -> None:
    tokenizer = character_tokenizer("gpt", ["abc"])
    with pytest.raises(InputError, match="fewer than 2 tokens"):
        LanguageDataset([""], tokenizer, 4, 0, training=False)
