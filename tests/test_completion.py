"""An answer's text ends before the first stop string, and what is shown of it never has to be taken back."""

from __future__ import annotations

import json
from itertools import accumulate

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qkv.completion import Completion
from qkv.config import TokenizerConfig
from qkv.errors import InputError
from qkv.search import Token
from qkv.tokenizers import Pieces, Tokenizer, train_tokenizer

TEXTS = ["abab cab aaab", "grüße 日本語 🙂 ab", "cabbage and baa"]
TOKENIZERS = {
    kind: train_tokenizer(TokenizerConfig(kind=kind, vocab_size=300), "gpt", TEXTS * 3)  # type: ignore[arg-type]
    for kind in ("bpe", "char", "wordpiece")
}
IDS = st.lists(st.integers(1, 50), min_size=1, max_size=40)
STOPS = st.lists(st.text("ab c日", min_size=1, max_size=4), max_size=3)


def write(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> tuple[Completion, list[str]]:
    """The answer of these ids, and what was shown of it after each."""
    completion = Completion(tokenizer, stops)
    shown, last = [""], len(ids) - 1
    for n, id in enumerate(ids):
        piece = completion.push(Token(0, 0, id, finish="length" if n == last else None))
        shown.append(shown[-1] + piece)
        assert completion.text == shown[-1]
    return completion, shown


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(
    words=st.lists(st.sampled_from(["a", "b", "ab", "ba", "aab", " ", "日本", "🙂"]), min_size=1), stops=STOPS
)
def test_a_text_ends_before_the_first_stop_string(kind: str, words: list[str], stops: list[str]) -> None:
    """Wherever tokens begin and end; pieces are all of the text, which is certain when it is shown."""
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.plain("".join(words))
    assume(ids)  # word pieces have none for spaces alone
    whole = tokenizer.decode(ids)
    completion, shown = write(tokenizer, ids, stops)
    found = [(whole.find(stop), len(stop)) for stop in stops if stop in whole]
    cut = min(((start + size, start) for start, size in found), default=(0, None))[1]
    assert completion.text == whole[:cut]
    assert completion.finish == ("length" if cut is None else "stop")
    assert all(completion.text.startswith(part) for part in shown)
    # The tokens are those as far as the one that completes the stop string.
    assert [token.id for token in completion.tokens] == ids[: len(completion.tokens)]
    if not stops:
        pieces = Pieces(tokenizer)
        *sure, last = accumulate(map(pieces.push, ids))
        assert shown[1:] == [*sure, last + pieces.rest()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text("abc ", min_size=2), place=st.integers(1, 20))
def test_an_answer_goes_on_from_what_is_before(kind: str, text: str, place: int) -> None:
    """A space between words belongs to the tokens of one tokenizer, and to the decoder of another."""
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.plain(text)
    before, after = ids[:place], ids[place:]
    completion = Completion(tokenizer, before=before)
    for id in after:
        completion.push(Token(0, 0, id))
    assert tokenizer.decode(before) + completion.text == tokenizer.decode(ids)


def test_a_stop_string_may_span_tokens_and_part_of_one_is_shown_once_it_is_none() -> None:
    tokenizer = TOKENIZERS["char"]
    completion = Completion(tokenizer, ["abc", "bb"])
    pieces = [completion.push(Token(0, 0, id)) for id in tokenizer.plain("aababbcc")]
    assert pieces == ["", "a", "", "ab", "", "a", "", ""]
    assert (completion.text, completion.finish) == ("aaba", "stop")
    assert len(completion.tokens) == 6  # what comes after the stop string is passed over


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_stop_string_that_is_complete_first_ends_a_text(kind: str) -> None:
    """However many letters a token has: where they come one by one, no other can be known yet."""
    tokenizer = TOKENIZERS[kind]
    assert write(tokenizer, tokenizer.plain("cbaa"), ["baa", "a"])[0].text == "cb"
    assert write(tokenizer, tokenizer.plain("cab"), ["b", "ab"])[0].text == "c"


def test_an_unfinished_beginning_of_a_stop_string_is_shown_at_the_end() -> None:
    tokenizer = TOKENIZERS["char"]
    completion, shown = write(tokenizer, tokenizer.plain("aab"), ["abc"])
    assert shown == ["", "", "a", "aab"]
    assert (completion.text, completion.finish) == ("aab", "length")


def test_stop_strings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match="a stop string is empty"):
        Completion(TOKENIZERS["char"], ["a", ""])
    with pytest.raises(InputError, match="a list of stop strings"):
        Completion(TOKENIZERS["char"], "ab")


def test_programs_read_all_of_it() -> None:
    tokenizer = TOKENIZERS["char"]
    (a, b), completion = tokenizer.plain("ab"), Completion(tokenizer)
    completion.push(Token(0, 0, a, logprob=-0.5, top=((a, -0.5), (10**6, -2.0))))
    completion.push(Token(0, 0, b, finish="eos", guessed=True))
    assert json.loads(json.dumps(completion.as_dict())) == {
        "text": "ab",
        "finish": "eos",
        "score": None,
        "tokens": [
            {
                "id": a, "token": "a", "guessed": False, "logprob": -0.5,
                "top": [
                    {"id": a, "token": "a", "logprob": -0.5},
                    {"id": 10**6, "token": None, "logprob": -2.0},  # one that only the model has
                ],
            },
            {"id": b, "token": "b", "guessed": True},
        ],
    }  # fmt: skip
