"""An answer as people read it: its text as tokens arrive, ended before a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qkv.errors import InputError
from qkv.search import Finish, Token
from qkv.tokenizers import Pieces, Tokenizer


class Completion:
    """One answer: its text, its tokens, and why it ended."""

    text: str
    """What is certain of the text so far: no part of a stop string."""
    tokens: list[Token]
    """The new tokens, an end token and all of a stop string's among them."""
    finish: Finish | None
    """Why the answer ended; None: it has not yet."""
    score: float | None
    """Beam search's log-probability / length ** length_penalty."""
    place: tuple[int, int]
    """Number of the input, and of the answer to it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str] = (),
        place: tuple[int, int] = (0, 0),
        before: Sequence[int] = (),
    ) -> None:
        """before: ids that the answer goes on from. Raises InputError for a stop string that is empty."""
        if isinstance(stop_strings, str):
            raise InputError("give a list of stop strings, not a single one")
        if "" in stop_strings:
            raise InputError("a stop string is empty: every text would end before it begins")
        self.text = ""
        self.tokens = []
        self.finish = None
        self.score = None
        self.place = place
        self._tokenizer = tokenizer
        self._stops = tuple(stop_strings)
        self._pieces = Pieces(tokenizer, before)
        self._held = ""  # text that may be the beginning of a stop string

    def __repr__(self) -> str:
        return f"Completion({self.text!r}, finish={self.finish!r})"

    def push(self, token: Token) -> str:
        """One more token; the text that it makes certain. What comes after the end is passed over."""
        self.score = token.score
        if self.finish is not None:
            return ""
        self.tokens.append(token)
        self._held += self._pieces.push(token.id)
        if token.finish is not None:
            self._held += self._pieces.rest()
        found = [(self._held.find(stop), len(stop)) for stop in self._stops if stop in self._held]
        if found:
            # The first to end, which is the one that is found letter by letter, and of these the longest.
            self.finish, certain = "stop", min((start + size, start) for start, size in found)[1]
        else:
            self.finish = token.finish
            certain = len(self._held) - (0 if self.finish else self._undecided())
        piece, self._held = self._held[:certain], self._held[certain:]
        self.text += piece
        return piece

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        beginnings = (stop[:n] for stop in self._stops for n in range(1, len(stop)))
        return max((len(beginning) for beginning in beginnings if self._held.endswith(beginning)), default=0)

    def as_dict(self) -> dict[str, Any]:
        """All of it for programs, as JSON has it; tokens as the vocabulary writes them."""
        name = self._tokenizer.backend.id_to_token
        tokens = []
        for token in self.tokens:
            about: dict[str, Any] = {"id": token.id, "token": name(token.id), "guessed": token.guessed}
            if token.logprob is not None:
                top = [{"id": id, "token": name(id), "logprob": logprob} for id, logprob in token.top]
                about |= {"logprob": token.logprob, "top": top}
            tokens.append(about)
        return {"text": self.text, "finish": self.finish, "score": self.score, "tokens": tokens}
