"""Guesses of the coming tokens, which one call of the model then checks.

Whatever is guessed, answers are as likely as without (Leviathan et al. 2023; Chen et al. 2023): good
guesses only save calls.

Legend: R rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qkv.errors import InputError
from qkv.sampling import choose, distribution
from qkv.search import Stream
from qkv.slots import Decoder, Reading, Slots

LONGEST_MATCH = 3
"""Most tokens at the end of a text that are looked for earlier in it."""


def look_up(text: Sequence[int], tokens: int) -> list[int]:
    """At most so many tokens that followed the end of the text where it occurred before (Saxena 2023).

    The longest end that occurs, up to LONGEST_MATCH tokens, and its last occurrence.
    """
    written = "".join(map(chr, text))  # in which strings are found fast
    for length in range(min(LONGEST_MATCH, len(text) - 1), 0, -1):
        if (start := written.rfind(written[-length:], 0, -1)) >= 0:
            return list(text[start + length : start + length + tokens])
    return []


class LookUp:
    """Guesses what stands earlier in the text, or in the source that it translates."""

    def guess(self, streams: Sequence[Stream]) -> None:
        """Give each stream its guesses."""
        for stream in streams:
            stream.guesses = look_up([*stream.source, *stream.ids], stream.room)


class Draft:
    """Guesses what a smaller model draws, by each stream's own settings."""

    def __init__(self, model: Decoder, large: Decoder, slots: int, rows: int) -> None:
        """large: whose tokens are guessed. slots, rows: as for `Slots`.

        Raises InputError for models that do not belong together.
        """
        if type(model) is not type(large) or model.config.vocab_size != large.config.vocab_size:
            raise InputError(
                f"a draft model is of the model's family and has its vocabulary, but this is a "
                f"{model.config.family} of {model.config.vocab_size} tokens for a {large.config.family} "
                f"of {large.config.vocab_size}"
            )
        self.slots = Slots(model, slots, rows)

    def guess(self, streams: Sequence[Stream]) -> None:
        """Give each stream its guesses, as far as the draft model's context goes."""
        for stream in streams:
            stream.guesses, stream.draft = [], []  # those of a step that was interrupted
        going = list(streams)
        while going := [stream for stream in going if self._goes_on(stream)]:
            now = list(self._readers(going))
            ahead, places = self.slots.read({s.slot: _reading(s) for s in now})
            logits = ahead.logits([places[s.slot][0] for s in now])  # (R, V)
            rows = [s.row(len(s.guesses), s.draft_uniforms) for s in now]
            for stream, row, id, scores in zip(now, rows, choose(logits, rows), logits, strict=True):
                stream.guesses.append(id)
                if stream.decoding.temperature > 0:
                    stream.draft.append(distribution(scores[None], [row])[0])

    def _readers(self, streams: Sequence[Stream]) -> Iterator[Stream]:
        """Those that read now: of samples of one text one, from which the others copy it."""
        begun: list[Stream] = []
        for stream in streams:
            reading = _reading(stream)
            if not self.slots.saved(stream.slot, reading):
                self.slots.borrow(stream.slot, reading, range(len(self.slots.texts)))
            if not self.slots.saved(stream.slot, reading):
                if any((s.prompt, s.source) == (stream.prompt, stream.source) for s in begun):
                    continue
                begun.append(stream)
            yield stream

    def _goes_on(self, stream: Stream) -> bool:
        length = max(len(stream.ids) + len(stream.guesses), len(stream.source))
        return len(stream.guesses) < stream.room and length <= self.slots.model.config.context


def _reading(stream: Stream) -> Reading:
    return Reading(stream.ids + stream.guesses, stream.source)
