"""Guesses ahead: they change how many calls are made, and nothing about the answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONTEXT, DECODERS, VOCAB, tiny
from torch import Tensor

import qkv.engine
from qkv.config import Decoding
from qkv.decode import Hypothesis
from qkv.engine import Engine
from qkv.errors import InputError
from qkv.models import GPT
from qkv.sampling import filter_logits, verify
from qkv.search import Request
from qkv.slots import Decoder, Reading, Slots
from qkv.speculate import LONGEST_MATCH, Draft, look_up

EOS = (5, 8)


def answer(engine: Engine, ids: list[int], decoding: Decoding) -> tuple[list[int], object]:
    """Ids and end of an answer, for which there was a call for each token that was not guessed."""
    engine.submit(Request(ids, decoding, EOS))
    found = Hypothesis(list(engine.run()))
    assert engine.counts.accepted == sum(token.guessed for token in found.tokens)
    # Nothing follows an end token that was guessed.
    assert engine.counts.steps == len(found.ids) - engine.counts.accepted + found.tokens[-1].guessed
    return found.ids, found.finish


def smaller(model: Decoder) -> Decoder:
    """Another model of the family."""
    return tiny("gpt-rotary" if isinstance(model, GPT) else "transformer-post-norm")  # type: ignore[return-value]


# ---------------------------------------------------------------- looking up


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5))
def test_what_is_looked_up_followed_the_longest_and_latest_occurrence(text: list[int], tokens: int) -> None:
    wanted: list[int] = []
    for length in range(1, LONGEST_MATCH + 1):
        for start in range(len(text) - length):
            if text[start : start + length] == text[len(text) - length :]:
                wanted = text[start + length : start + length + tokens]
    assert look_up(text, tokens) == wanted


# ---------------------------------------------------------------- answers are the same


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.7, "seed": 4}])
@pytest.mark.parametrize("name", DECODERS)
@given(prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=CONTEXT), data=st.data())
def test_looking_up_changes_no_token(name: str, options: dict[str, float], prompt: list[int], data) -> None:
    """Not even a drawn one, wherever an answer ends: at an end token, its limit or the context's."""
    model = tiny(name)
    more = {
        "max_new_tokens": data.draw(st.sampled_from([1, 2, 7, 200])),
        "min_new_tokens": data.draw(st.integers(0, 1)),
        "repetition_penalty": data.draw(st.sampled_from([1.0, 1.3])),
    }
    plain = answer(Engine(model, 1), prompt, Decoding(**options, **more))
    ahead = Decoding(speculate=data.draw(st.integers(1, 6)), **options, **more)
    assert answer(Engine(model, 1), prompt, ahead) == plain


@pytest.mark.parametrize("name", DECODERS)
def test_guesses_that_are_right_save_calls(name: str) -> None:
    """A greedy text of a random model soon repeats itself, and a model guesses all of its own tokens."""
    model = tiny(name)
    options = Decoding(temperature=0.0, max_new_tokens=60, speculate=4)
    engine = Engine(model, 1)
    engine.submit(Request([4, 9, 1], options))
    assert len(list(engine.run())) == 60
    assert 0 < engine.counts.accepted <= engine.counts.guessed
    assert engine.counts.steps == 60 - engine.counts.accepted < 50
    for temperature in (0.0, 1.3):
        engine = Engine(model, 1, draft=model)
        decoding = Decoding(temperature=temperature, max_new_tokens=60, speculate=4)
        engine.submit(Request([4, 9, 1], decoding))
        tokens = list(engine.run())
        assert engine.counts.accepted == engine.counts.guessed == 48
        assert engine.counts.steps == 12
        assert [token.guessed for token in tokens] == [True, True, True, True, False] * 12


@pytest.mark.parametrize("name", DECODERS)
@given(prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=CONTEXT), data=st.data())
def test_a_draft_model_changes_no_greedy_token(name: str, prompt: list[int], data) -> None:
    model = tiny(name)
    options = {"temperature": 0.0, "max_new_tokens": data.draw(st.sampled_from([1, 9, CONTEXT]))}
    plain = answer(Engine(model, 1), prompt, Decoding(**options))
    engine = Engine(model, 1, draft=smaller(model))
    assert answer(engine, prompt, Decoding(speculate=data.draw(st.integers(1, 5)), **options)) == plain


@pytest.mark.parametrize("name", DECODERS)
def test_a_draft_model_reads_the_input_of_several_samples_once(name: str) -> None:
    model, prompt = tiny(name), [4, 9, 1] * 5
    engine = Engine(model, 4, draft=smaller(model))
    engine.submit(Request(prompt, Decoding(max_new_tokens=4, speculate=2, num_return_sequences=4)))
    _ = list(engine.run())
    assert isinstance(engine._guesser, Draft)
    assert len(prompt) < engine._guesser.slots.computed < 2 * len(prompt) + 4 * 4
    engine = Engine(model, 4, draft=model)  # each sample is right at once, and then guesses no more
    engine.submit(Request(prompt, Decoding(max_new_tokens=3, speculate=1, num_return_sequences=4)))
    _ = list(engine.run())
    assert len(prompt) < engine._guesser.slots.computed < 2 * len(prompt) + 4 * 4


def test_a_draft_model_that_does_not_fit_is_refused() -> None:
    model = tiny("gpt-pre-norm")
    with pytest.raises(InputError, match="a transformer of 13 tokens for a gpt of 13"):
        Engine(model, 1, tiny("transformer-pre-norm"))


# ---------------------------------------------------------------- the distribution is the target's


def chi_square(seen: Counter[tuple[int, ...]], chances: dict[tuple[int, ...], float]) -> float:
    """p-value of the counts; rare outcomes are one."""
    number = sum(seen.values())
    assert all(chances.get(outcome, 0.0) > 0 for outcome in seen)
    common = [outcome for outcome, chance in chances.items() if chance * number >= 5]
    counts = [seen[outcome] for outcome in common]
    wanted = [chances[outcome] * number for outcome in common]
    counts, wanted = [*counts, number - sum(counts)], [*wanted, number - sum(wanted)]
    if wanted[-1] < 1e-6 * number:
        counts, wanted = counts[:-1], [w * number / sum(wanted[:-1]) for w in wanted[:-1]]
    return float(scipy.stats.chisquare(counts, wanted).pvalue)


def keep_all(
    target: Tensor, draft: Tensor, guesses: Sequence[int], chances: Sequence[float], uniforms: Sequence[float]
) -> list[int]:
    """A wrong rule: every guess is kept."""
    return verify(target, draft, guesses, [0.0] * len(chances), uniforms)


def from_target(
    target: Tensor, draft: Tensor, guesses: Sequence[int], chances: Sequence[float], uniforms: Sequence[float]
) -> list[int]:
    """A wrong rule: a guess that is not kept gives way to a draw from p, not from max(0, p - q)."""
    found = verify(target, draft, guesses, chances, uniforms)
    if len(found) > len(guesses):
        return found
    last = len(found) - 1
    instead = verify(target[last : last + 1], draft[:0], [], [], uniforms[last : last + 1])
    return found[:-1] + instead


RULES = [(verify, True), (keep_all, False), (from_target, False)]


@pytest.mark.parametrize(("rule", "right"), RULES)
def test_what_is_verified_has_the_targets_distribution(rule: Callable[..., list[int]], right: bool) -> None:
    """For distributions that differ in every way, zeros among them: the first two tokens of two guesses."""
    generator, random = torch.Generator().manual_seed(0), Random(0)
    values = []
    for _ in range(4):
        weights = torch.rand(5, 4, generator=generator, dtype=torch.float64).pow(3)  # p: 3 rows, q: 2
        weights[torch.rand(5, 4, generator=generator) < 0.2] = 0.0
        p, q = (weights + 1e-3 * (weights.sum(-1, keepdim=True) == 0)).split([3, 2])
        p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
        seen: Counter[tuple[int, ...]] = Counter()
        for _ in range(3000):
            guesses = [random.choices(range(4), row)[0] for row in q.tolist()]
            uniforms = [random.random() for _ in range(5)]
            found = rule(p, q, guesses, uniforms[:2], uniforms[2:])
            # What was not reached would be drawn later, from the target.
            rest = [random.choices(range(4), row)[0] for row in p[len(found) :].tolist()]
            seen[tuple((found + rest)[:2])] += 1
        chances = {(a, b): float(p[0, a] * p[1, b]) for a in range(4) for b in range(4)}
        if not right and any(chances[outcome] == 0 for outcome in seen):
            values.append(0.0)
        else:
            values.append(chi_square(seen, chances))
    assert min(values) > 1e-3 if right else min(values) < 1e-6


@pytest.mark.parametrize(("rule", "right"), RULES)
@pytest.mark.parametrize(
    ("name", "options"), [("gpt-pre-norm", {}), ("transformer-pre-norm", {"temperature": 1.5, "top_k": 6})]
)
def test_samples_with_a_draft_model_follow_the_targets_distribution(
    name: str,
    options: dict[str, float],
    rule: Callable[..., list[int]],
    right: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first three tokens' frequencies against their exact probabilities, a few of them over all texts."""
    monkeypatch.setattr(qkv.engine, "verify", rule)
    model, source, number = tiny(name), [4, 9, 1], 2000
    decoding = Decoding(
        max_new_tokens=3, speculate=2, num_return_sequences=number, seed=1,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip
    engine = Engine(model, 500, smaller(model))
    engine.submit(Request(source, decoding))
    texts = [[0] * 0 for _ in range(number)]
    for token in engine.run():
        texts[token.answer].append(token.id)
    seen = Counter(tuple(text[:2]) for text in texts)
    assert engine.counts.accepted > 0
    assert not right or engine.counts.accepted < engine.counts.guessed
    start = source if isinstance(model, GPT) else [model.config.pad_id]
    memory = () if isinstance(model, GPT) else tuple(source)
    slots = Slots(model, 1)

    def chances(text: list[int]) -> list[float]:
        ahead, places = slots.read({0: Reading(start + text, memory)})
        logits = ahead.logits(places[0])
        if not isinstance(model, GPT):
            logits = logits.index_fill(1, torch.tensor(model.config.pad_id), -torch.inf)
        return filter_logits(logits, decoding).double().softmax(-1)[0].tolist()

    exact = {
        (a, b): first * second
        for a, first in enumerate(chances([]))
        if first > 0
        for b, second in enumerate(chances([a]))
    }
    possible = all(exact.get(outcome, 0.0) > 0 for outcome in seen)
    assert possible or not right
    p_value = chi_square(seen, exact) if possible else 0.0
    assert p_value > 1e-3 if right else p_value < 1e-6
