"""Whole answers of a model to a list of inputs, by the engine.

`sample` yields each token as it is drawn; `generate` gives the answers when all are there. Both continue
the prompts of a GPT, or translate the sources of a Transformer. Everything is ids: text is the pipelines'
business.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from qkv.config import Decoding as Decoding
from qkv.engine import Engine
from qkv.kv_cache import ROWS
from qkv.models.transformer import Transformer
from qkv.search import Finish, Request, Token
from qkv.slots import Decoder

CACHE_TOKENS = 16384
"""Tokens that the cache is made for: so many slots as texts of full length fit in, but at least one."""

AHEAD = 128
"""Tokens of a GPT's answer that its cache has room for before it grows: answers may end before the limit."""

TRANSLATED = 2
"""How many times as long as its source a translation is taken to be; for longer ones the cache grows."""


@dataclass
class Hypothesis:
    """A whole answer."""

    tokens: list[Token] = field(default_factory=list)
    """The new tokens only, an end token among them."""

    @property
    def ids(self) -> list[int]:
        """Their ids."""
        return [token.id for token in self.tokens]

    @property
    def finish(self) -> Finish | None:
        """Why it ended; None: it has not yet."""
        return self.tokens[-1].finish if self.tokens else None

    @property
    def score(self) -> float | None:
        """Beam search's log-probability / length ** length_penalty."""
        return self.tokens[-1].score if self.tokens else None


def engine_for(
    model: Decoder, inputs: Sequence[Sequence[int]], decoding: Decoding, draft: Decoder | None = None
) -> Engine:
    """An engine with as many slots as these inputs need and CACHE_TOKENS allow.

    A GPT's cache has room for prompts and AHEAD tokens from the beginning, so that it is not there twice, as
    while it grows; how long a translation becomes is not known.
    """
    searches = len(inputs) * (1 if decoding.num_beams > 1 else decoding.num_return_sequences)
    longest, new = max((len(ids) for ids in inputs), default=0), decoding.max_new_tokens
    if isinstance(model, Transformer):
        new = min(new, TRANSLATED * longest)
    tokens = max(1, min(longest + new, model.config.context))
    slots = max(1, min(searches, CACHE_TOKENS // (tokens * decoding.num_beams)))
    rows = longest + (1 if isinstance(model, Transformer) else AHEAD)
    return Engine(model, slots, draft, max(ROWS, min(rows, tokens)))


def sample(
    model: Decoder, inputs: Sequence[Sequence[int]], decoding: Decoding, eos: Collection[int] = ()
) -> Iterator[Token]:
    """The tokens of the inputs' answers, step by step; input i is request i.

    inputs: ids of a GPT's prompts or a Transformer's sources. eos: ids that end an answer. What is drawn
    depends on an input's ids, the seed and the answer's number, not on the other inputs. Raises
    InputError for an input that is empty or longer than the context.
    """
    engine = engine_for(model, inputs, decoding)
    for ids in inputs:
        engine.submit(Request(ids, decoding, eos))
    return engine.run()


def generate(
    model: Decoder, inputs: Sequence[Sequence[int]], decoding: Decoding, eos: Collection[int] = ()
) -> list[list[Hypothesis]]:
    """For each input its `num_return_sequences` answers, by beam search if there are beams, else by sampling.

    Arguments and errors as for `sample`. A beam search may end with fewer: there may be no more texts.
    """
    answers = [[Hypothesis() for _ in range(decoding.num_return_sequences)] for _ in inputs]
    for token in sample(model, inputs, decoding, eos):
        answers[token.request][token.answer].tokens.append(token)
    return [[answer for answer in found if answer.tokens] for found in answers]
