"""Units as people write them, and the words they are part of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_pipelines import TEXTS, tokenizer, translator

from explanations.subjects import CASES, subject
from qkv.explanations import units
from qkv.explanations.inputs import subject_of

WRITTEN = st.text("abc xyz Zwölf.,🙂日", max_size=30)


@given(WRITTEN)
def test_tokens_of_ids_are_the_text_in_pieces(text: str):
    made = tokenizer("gpt", "bpe", 300)
    ids = made.plain(text)
    found = units.of_ids("text", made, ids, [False] * len(ids))
    whole = made.decode(ids)
    # What is no text by itself, such as a part of a character, is shown as the vocabulary writes it.
    shown = "".join(unit for unit in found.units if unit in whole)
    assert len(found.units) == len(ids)
    if all(unit in whole for unit in found.units):
        assert shown == whole
        words = {
            w: "".join(u for u, at in zip(found.units, found.words, strict=True) if at == w)
            for w in found.words
        }
        assert [words[w].strip() for w in sorted(words) if w >= 0] == whole.split()


@given(WRITTEN, WRITTEN)
def test_tokens_of_texts_keep_to_what_is_written(one: str, other: str):
    made = tokenizer("bert", "wordpiece", 200)
    found = units.of_encoding("text", (one, other), made.located(one, other))
    assert found.special == tuple(word == -1 for word in found.words)
    words = [*one.split(), *other.split()]
    for unit, word, marker in zip(found.units, found.words, found.special, strict=True):
        assert marker or unit.strip() in words[word]
    assert len(found.segments) in (0, len(found.units))
    count = len(one.split())
    for word, segment in zip(found.words, found.segments, strict=False):
        assert word == -1 or segment == (word >= count)


def test_a_letter_of_several_tokens_is_written_once():
    made = tokenizer("bert", "bpe", 300)
    text = "a 🙂🙂 b"
    found = units.of_encoding("text", (text,), made.located(text))
    count = made.located("🙂").tokens
    assert len(count) > 3  # its bytes, and the markers
    legible = [u for u, w in zip(found.units, found.words, strict=True) if w >= 0 or u.isspace()]
    assert "".join(legible) == text


def test_units_of_a_pair():
    one = subject("bert-pair").sequences[0]
    assert one.units[0] == "[CLS]"
    assert [unit for unit, marker in zip(one.units, one.special, strict=True) if marker] == [
        "[CLS]",
        "[SEP]",
        "[SEP]",
    ]
    text = "".join(unit for unit, marker in zip(one.units, one.special, strict=True) if not marker)
    assert text == "Two dogs run.A fox jumps"
    assert one.words[1] == 0
    assert one.words[-2] == 5
    assert one.segments[0] == 0
    assert one.segments[-1] == 1


def test_units_of_an_image_are_its_class_token_and_patches():
    one = subject("vit")
    (sequence,) = one.sequences
    assert sequence.units[:3] == ("class", "0,0", "0,1")
    assert sequence.units[-1] == "3,3"
    assert sequence.special == (True, *[False] * 16)
    assert one.picture.grid == (4, 4)
    assert one.picture.pixels.shape == (16, 16, 3)


@pytest.mark.parametrize("text", TEXTS)
def test_a_token_alone_is_written_as_behind_another(text: str):
    made = tokenizer("gpt", "bpe", 300)
    for id in made.plain(text):
        found = units.written(made, id)
        assert found in (made.decode([id]), made.token(id))


@pytest.mark.parametrize("name", CASES)
def test_every_unit_has_all_that_is_said_of_units(name: str):
    one = subject(name)
    assert sum(len(s.units) for s in one.sequences) == len(one.embedded)
    for s in one.sequences:
        assert len(s.special) == len(s.units)
        assert len(s.segments) in (0, len(s.units))
        assert len(s.words) in (0, len(s.units))
        assert s.name == "image" or s.words


def test_a_word_that_the_vocabulary_lacks_counts_as_one():
    made = tokenizer("transformer", "char", 60)
    ids = made.plain("☃ Two dogs")
    found = units.of_ids("source", made, ids, [False] * len(ids))
    assert [found.words[i] for i, unit in enumerate(found.units) if unit.strip() in ("T", "d")][:2] == [1, 2]
    assert found.words[0] == 0


def test_words_of_a_translation_are_those_of_its_texts():
    """WordPiece decodes "Two-dogs" as three words."""
    one = subject_of(translator("wordpiece"), "Two-dogs run, (it's) lazy.", "Zwei-Hunde über den", 1)
    assert [max(sequence.words) for sequence in one.sequences] == [3, 2]
    for sequence in one.sequences:
        assert sequence.words[sequence.special.index(False)] == 0
