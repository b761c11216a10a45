"""The engine: what a request may count on among others, and what is computed, kept and forgotten."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONFIGS, CONTEXT, DECODERS, VOCAB, tiny

import qkv.search
import qkv.speculate
from qkv.config import Decoding
from qkv.decode import Hypothesis
from qkv.engine import STEP_TOKENS, Engine
from qkv.errors import InputError
from qkv.kv_cache import Branches
from qkv.models import GPT, Transformer
from qkv.search import Beams, Request, Stream
from qkv.slots import Decoder, Reading, Slots

EOS = (5, 8)
GREEDY = Decoding(temperature=0.0, max_new_tokens=12)


def answers(engine: Engine, requests: Sequence[Request]) -> dict[tuple[int, int], Hypothesis]:
    """All answers to requests that come at once."""
    for request in requests:
        engine.submit(request)
    return gather(engine)


def gather(engine: Engine) -> dict[tuple[int, int], Hypothesis]:
    found: dict[tuple[int, int], Hypothesis] = {}
    for token in engine.run():
        found.setdefault((token.request, token.answer), Hypothesis()).tokens.append(token)
    return found


def said(found: dict[tuple[int, int], Hypothesis], number: int) -> list[tuple[list[int], object]]:
    return [(found[key].ids, found[key].finish) for key in sorted(found) if key[0] == number]


def alone(model: Decoder, request: Request) -> list[tuple[list[int], object]]:
    slots = max(request.decoding.num_return_sequences, 1)
    return said(answers(Engine(model, slots), [request]), 0)


DECODINGS = st.sampled_from(
    [
        GREEDY,
        Decoding(max_new_tokens=9, seed=1),
        Decoding(max_new_tokens=7, seed=2, temperature=1.7, top_p=0.9),
        Decoding(max_new_tokens=8, seed=3, repetition_penalty=1.5, min_new_tokens=4),
        Decoding(max_new_tokens=6, seed=4, num_return_sequences=3, temperature=2.0),
        Decoding(max_new_tokens=8, num_beams=3, num_return_sequences=2, length_penalty=0.5),
        Decoding(max_new_tokens=5, num_beams=2, repetition_penalty=1.2, min_new_tokens=2),
        Decoding(max_new_tokens=10, speculate=3, temperature=0.0),
        Decoding(max_new_tokens=10, speculate=2, seed=5),
    ]
)
# Of few ids, so that prompts often begin alike.
PROMPTS = st.lists(st.integers(3, 4), min_size=1, max_size=6)


@pytest.mark.parametrize("name", DECODERS)
@given(
    arrivals=st.lists(st.tuples(PROMPTS, DECODINGS, st.integers(0, 4)), min_size=1, max_size=6),
    slots=st.integers(1, 4),
    drafted=st.booleans(),
)
def test_what_a_request_gets_does_not_depend_on_the_others(
    name: str, arrivals: list[tuple[list[int], Decoding, int]], slots: int, drafted: bool
) -> None:
    """Requests that arrive at any step are answered as alone; a greedy draft model changes nothing either."""
    model = tiny(name)
    draft = tiny("gpt-rotary" if isinstance(model, GPT) else "transformer-post-norm") if drafted else None
    arrivals = [a for a in arrivals if not (drafted and a[1].speculate and a[1].temperature > 0)]
    engine = Engine(model, slots, draft)
    found: dict[tuple[int, int], Hypothesis] = {}
    for ids, decoding, pause in arrivals:
        engine.submit(Request(ids, decoding, EOS))
        for _ in range(pause):
            for token in engine.step():
                found.setdefault((token.request, token.answer), Hypothesis()).tokens.append(token)
    for key, rest in gather(engine).items():
        found.setdefault(key, Hypothesis()).tokens.extend(rest.tokens)
    assert not engine.busy and engine.step() == []
    for number, (ids, decoding, _) in enumerate(arrivals):
        assert said(found, number) == alone(model, Request(ids, decoding, EOS))


def test_requests_wait_in_order_for_a_slot_and_leave_at_once() -> None:
    model = tiny("gpt-pre-norm")
    engine = Engine(model, 2)
    for number, length in enumerate([3, 1, 2, 4]):
        engine.submit(Request([4 + number, 4], Decoding(max_new_tokens=length)))
    steps: list[list[int]] = []
    met: set[int] = set()
    while engine.busy:
        before = engine.computed
        steps.append([token.request for token in engine.step()])
        new = set(steps[-1]) - met
        assert engine.computed - before == len(steps[-1]) + len(new)  # a prompt has two tokens
        met |= new
    assert steps == [[0, 1], [0, 2], [0, 2], [3], [3], [3], [3]]
    assert engine.counts.steps == len(steps)


@pytest.mark.parametrize("name", DECODERS)
def test_a_cancelled_request_frees_its_slots(name: str) -> None:
    model = tiny(name)
    engine = Engine(model, 2)
    several = engine.submit(Request([4], Decoding(max_new_tokens=20, num_return_sequences=2)))
    beams = engine.submit(Request([6], Decoding(max_new_tokens=20, num_beams=2)))
    waiting = engine.submit(Request([9], GREEDY))
    last = engine.submit(Request([7], GREEDY))
    assert {(t.request, t.answer) for t in engine.step()} == {(several, 0), (several, 1)}
    engine.cancel(waiting)
    engine.cancel(several, 0)
    assert {(t.request, t.answer) for t in engine.step()} == {(several, 1)}  # the beams are at work
    engine.cancel(several)
    assert {(t.request, t.answer) for t in engine.step()} == {(last, 0)}
    engine.cancel(beams)
    engine.cancel(beams)
    rest = list(engine.run())
    assert {token.request for token in rest} == {last}
    assert [t.id for t in rest] == alone(model, Request([7], GREEDY))[0][0][1:]


# ---------------------------------------------------------------- what is not computed again


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.data())
def test_texts_that_begin_like_others_have_the_same_logits_from_fewer_tokens(name: str, data) -> None:
    """Read after any history of slots, copies among them, a text's logits are those of a fresh cache."""
    model = tiny(name)
    slots = Slots(model, 3)
    texts = st.lists(st.integers(3, 4), min_size=1, max_size=8)
    sources = st.just(()) if isinstance(model, GPT) else st.sampled_from([(4,), (4, 9, 2), (7, 1)])
    for _ in range(data.draw(st.integers(1, 6), label="steps")):
        donor, target = data.draw(st.permutations(range(3)), label="copy")[:2]
        length = data.draw(st.integers(0, len(slots.texts[donor])), label="length")
        if slots.texts[donor]:
            slots.copy(donor, target, length)
        chosen = data.draw(st.sets(st.integers(0, 2), min_size=1), label="slots")
        readings = {
            slot: Reading(ids := data.draw(texts), data.draw(sources), data.draw(st.integers(1, len(ids))))
            for slot in chosen
        }
        saved = {slot: slots.saved(slot, reading) for slot, reading in readings.items()}
        before = slots.computed
        ahead, places = slots.read(readings)
        whole = sum(len(r.ids) + len(r.source) for r in readings.values())
        assert slots.computed - before == whole - sum(saved.values())
        for slot, reading in readings.items():
            fresh = Slots(model, 1)
            wanted, rows = fresh.read({0: reading})
            torch.testing.assert_close(ahead.logits(places[slot]), wanted.logits(rows[0]))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("finished", [True, False])
def test_a_prompt_that_was_read_is_not_read_again(name: str, finished: bool) -> None:
    """Neither after its request has ended nor while it goes on; answers are those of a fresh engine."""
    model = tiny(name)
    engine = Engine(model, 2)
    first = Request([4, 9, 1, 12, 7], Decoding(temperature=0.0, max_new_tokens=6))
    engine.submit(first)
    tokens = list(engine.run()) if finished else engine.step() + engine.step()
    text = [*first.ids, *(t.id for t in tokens[:-1])]  # the last is not read yet
    again = Request([*text, 3, 2] if isinstance(model, GPT) else list(first.ids), GREEDY, EOS)
    before, reused = engine.computed, engine.counts.reused
    number = engine.submit(again)
    engine.step()
    goes_on = 0 if finished else 1
    assert engine.computed - before == goes_on + (2 if isinstance(model, GPT) else 1)
    assert engine.counts.reused - reused == (len(text) if isinstance(model, GPT) else len(first.ids))
    engine = Engine(model, 2)
    engine.submit(first)
    _ = list(engine.run()) if finished else engine.step() + engine.step()
    engine.submit(again)
    assert said(gather(engine), number) == alone(model, again)


@pytest.mark.parametrize("name", DECODERS)
def test_samples_of_one_input_read_it_once(name: str) -> None:
    model = tiny(name)
    engine = Engine(model, 5)
    engine.submit(Request([4, 9, 1], Decoding(max_new_tokens=1, num_return_sequences=4)))
    engine.submit(Request([4, 9, 1], Decoding(num_beams=2)))
    engine.step()
    assert engine.computed == 3 + isinstance(model, Transformer)  # its text begins with padding


def test_a_step_begins_with_so_many_tokens() -> None:
    """More prompts wait for the next step, but for one that is longer than what a step may begin with."""
    model = tiny("gpt-pre-norm")
    fit = STEP_TOKENS // CONTEXT
    engine = Engine(model, fit + 3)
    for i in range(fit + 3):
        engine.submit(Request([3 + i % 8, i // 8, *[4] * (CONTEXT - 2)], Decoding(max_new_tokens=1)))
    assert len(engine.step()) == fit
    assert len(engine.step()) == 3


@pytest.mark.parametrize("name", DECODERS)
def test_the_cache_holds_at_most_slots_times_context(name: str) -> None:
    model = tiny(name)
    engine = Engine(model, 2)
    for i in range(5):
        engine.submit(Request([3 + i] * (10 * i + 1), Decoding(max_new_tokens=2 * CONTEXT, seed=i)))
    assert all(token.finish in (None, "context") for token in engine.run())
    for layer in engine._slots.cache.layers:
        assert layer.key is not None and layer.key.shape[0] == 2 * CONTEXT


def interrupt_once(patch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """Let this function fail the n-th time that it is called, and never again."""
    calls, original = iter(range(10**6)), getattr(owner, name)

    def failing(*args: object, **options: object) -> object:
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **options)

    patch.setattr(owner, name, failing)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("call", [0, 1, 3])
def test_a_cache_that_could_not_grow_is_as_it_was(
    name: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory may not suffice, or somebody lose patience; the other requests go on."""
    requests = [Request([4, 9, 3 + i, 7], replace(GREEDY, max_new_tokens=38)) for i in range(3)]
    model = tiny(name)
    engine = Engine(model, 3)
    for request in requests:
        engine.submit(request)
    found: dict[int, list[int]] = {}
    interrupt_once(monkeypatch, torch.nn.functional, "pad", call)
    interrupted = False
    while engine.busy:
        try:
            tokens = engine.step()
        except KeyboardInterrupt:
            interrupted = True
            continue
        for token in tokens:
            found.setdefault(token.request, []).append(token.id)
    assert interrupted
    assert all(found[i] == alone(model, request)[0][0] for i, request in enumerate(requests))


def test_a_text_too_long_for_the_memory_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    model = tiny("gpt-pre-norm")
    short = Request([4, 9], replace(GREEDY, max_new_tokens=20))
    engine = Engine(model, 2)
    engine.submit(short)
    found = [token.id for token in engine.step()]
    monkeypatch.setattr(torch.nn.functional, "pad", full)
    long = engine.submit(Request([5] * 38, replace(GREEDY, max_new_tokens=2)))
    with pytest.raises(MemoryError):
        engine.step()
    engine.cancel(long)
    assert found + [token.id for token in engine.run()] == alone(model, short)[0][0]


def test_a_copy_that_was_interrupted_is_not_taken_for_a_text() -> None:
    model = tiny("gpt-pre-norm")
    slots = Slots(model, 2)
    for slot, first in enumerate((4, 9)):
        slots.read({slot: Reading([first, 3, 3, 4, 4])})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots.cache.layers[-1], "slots", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            slots.copy(0, 1, 3)
    text = Reading([9, 3, 3, 4, 4])
    assert slots.shared(1, text) == 0
    again, places = slots.read({1: text})
    expected, rows = Slots(model, 1).read({0: text})
    torch.testing.assert_close(again.logits(places[1]), expected.logits(rows[0]))


def test_a_source_whose_reading_was_interrupted_is_read_again() -> None:
    model = tiny("transformer-pre-norm")
    slots = Slots(model, 1)
    first = Reading([2], source=(4, 9))
    slots.read({0: first})
    memory = slots.cache.memory
    assert memory is not None
    truncate = memory.truncate

    def interrupted(lengths: Sequence[int]) -> None:
        truncate(lengths)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "truncate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            slots.read({0: Reading([2], source=(7, 1, 3))})
    again, places = slots.read({0: first})
    expected, rows = Slots(model, 1).read({0: first})
    torch.testing.assert_close(again.logits(places[0]), expected.logits(rows[0]))


def test_an_interrupt_while_tokens_are_forgotten_leaves_no_text_of_zeros() -> None:
    slots = Slots(tiny("gpt-pre-norm"), 1)
    slots.read({0: Reading([4, 3, 3, 4, 4])})
    cache = slots.cache
    with pytest.MonkeyPatch.context() as patch:
        interrupt_once(patch, cache.layers[-1], "forget", 0)
        with pytest.raises(KeyboardInterrupt):
            cache.truncate([2])
    assert cache.lengths == (2,)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_on_which_a_model_fails_leaves_nothing_in_its_slot(temperature: float) -> None:
    model = tiny("gpt-pre-norm")
    assert isinstance(model, GPT)
    with torch.no_grad():
        model.positions.weight[9] = math.nan
    engine = Engine(model, 2)
    options = replace(GREEDY, max_new_tokens=4)
    # Ends first, and leaves its slot.
    engine.submit(Request([4] * 10, replace(options, temperature=temperature)))
    engine.submit(Request([3, 1], replace(GREEDY, max_new_tokens=7)))
    short = engine.submit(Request([7, 1, 3], options))
    found = said(gather(engine), short)
    assert found == alone(model, Request([7, 1, 3], options))


def test_what_ended_in_a_step_that_was_interrupted_has_left() -> None:
    engine = Engine(tiny("gpt-pre-norm"), 2)
    for length in (1, 5):
        engine.submit(Request([4, 9], replace(GREEDY, max_new_tokens=length)))
    with pytest.MonkeyPatch.context() as patch:
        interrupt_once(patch, Stream, "take", 1)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert [token.request for token in engine.run()].count(0) == 1


@pytest.mark.parametrize("call", [1, 2])
def test_tokens_of_a_step_that_was_interrupted_come_with_the_next(call: int) -> None:
    model = tiny("gpt-pre-norm")
    requests = [Request([4, 9 + i], replace(GREEDY, logprobs=1)) for i in range(3)]
    engine = Engine(model, 3)
    for request in requests:
        engine.submit(request)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_once(patch, qkv.search, "with_logprobs", call)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    found = gather(engine)
    assert [said(found, i) for i in range(3)] == [alone(model, request) for request in requests]


def test_beams_whose_step_was_interrupted_go_on() -> None:
    model = tiny("gpt-pre-norm")
    request = Request([4, 9], Decoding(max_new_tokens=6, num_beams=3, logprobs=1))
    engine = Engine(model, 1)
    engine.submit(request)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_once(patch, qkv.search, "with_logprobs", 0)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert said(gather(engine), 0) == alone(model, request)


@pytest.mark.parametrize("call", range(3))
def test_guesses_of_a_step_that_was_interrupted_are_made_again(call: int) -> None:
    model, draft = tiny("gpt-pre-norm"), tiny("gpt-rotary")
    request = Request([4, 9], Decoding(max_new_tokens=8, speculate=3, seed=3))
    expected = said(answers(Engine(model, 1, draft), [request]), 0)
    engine = Engine(model, 1, draft)
    engine.submit(request)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_once(patch, qkv.speculate, "distribution", call)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert said(gather(engine), 0) == expected


# ---------------------------------------------------------------- beams


def test_a_tree_that_becomes_narrower_leaves_nothing_behind() -> None:
    slots = Slots(tiny("gpt-pre-norm"), 1)
    slots.read({0: Reading([4, 3])})
    for rows, width in (((4, 5), 6), ((2, 3), 4)):
        slots.read({0: Reading([7, 8], (), 2, Branches(rows, 2, torch.ones(2, width, dtype=torch.bool)))})
    for layer in slots.cache.layers:
        for values in layer.slots():
            assert not values[0, 4:6].any()


@pytest.mark.parametrize("name", DECODERS)
def test_beams_share_a_slot_and_what_they_have_in_common(name: str) -> None:
    """The input is read once, a step reads a token of each beam, and rows of dead beams are used again."""
    model = tiny(name)
    engine = Engine(model, 1)
    K, steps = 4, 30
    source = [4, 9, 1, 12]
    engine.submit(Request(source, Decoding(num_beams=K, max_new_tokens=steps)))
    prompt = len(source) if isinstance(model, GPT) else 1
    engine.step()
    (search,) = engine._live
    assert isinstance(search, Beams)
    before, most = engine.computed, 0
    while engine.busy:
        # The tree of the texts: each is told by its tokens.
        most = max(most, len({beam.tokens[: n + 1] for beam in search.beams for n in range(search.made)}))
        engine.step()
        assert search.seen.shape[1] <= prompt + most + K
        assert engine.computed - before <= K
        before = engine.computed
    assert most + K < K * (steps - 1)  # so rows were used again
    moved = Engine(model, 3)
    for ids in (source, [7], source[:2]):
        moved.submit(Request(ids, Decoding(num_beams=K, max_new_tokens=steps)))
    assert said(gather(moved), 0) == alone(
        model, Request(source, Decoding(num_beams=K, max_new_tokens=steps))
    )


# ---------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 2.0, "top_k": 3, "repetition_penalty": 1.3},
        {"temperature": 0.0, "speculate": 3},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0},
    ],
)
@pytest.mark.parametrize("name", DECODERS)
def test_log_probabilities_are_the_models_own(name: str, options: dict[str, float]) -> None:
    model = tiny(name, torch.float32)
    decoding = Decoding(max_new_tokens=9, logprobs=4, **options)  # type: ignore[arg-type]
    source = [4, 9, 1]
    found = answers(Engine(model, 2), [Request(source, decoding, EOS)])
    assert len(found) == decoding.num_return_sequences
    for answer in found.values():
        if isinstance(model, GPT):
            reading = Reading(source + answer.ids, wanted=len(answer.ids) + 1)
        else:
            reading = Reading([model.config.pad_id, *answer.ids], tuple(source), len(answer.ids) + 1)
        ahead, places = Slots(model, 1).read({0: reading})
        logits = ahead.logits(places[0])
        for token, scores in zip(answer.tokens, logits[:-1].log_softmax(-1), strict=True):
            assert token.logprob == pytest.approx(scores[token.id].item(), abs=1e-4)
            best = scores.sort(descending=True)
            assert [id for id, _ in token.top] == best.indices[:4].tolist()
            assert [x for _, x in token.top] == pytest.approx(best.values[:4].tolist(), abs=1e-4)
        if answer.score is not None:  # no penalties: the score of a text is its log-probability
            assert answer.score == pytest.approx(sum(t.logprob or 0.0 for t in answer.tokens), abs=1e-4)
    plain = answers(Engine(model, 2), [Request(source, Decoding(max_new_tokens=3), EOS)])
    assert all(t.logprob is None and t.top == () for answer in plain.values() for t in answer.tokens)
    many = Decoding(max_new_tokens=1, logprobs=10**6)
    (everything,) = answers(Engine(model, 1), [Request(source, many)]).values()
    assert len(everything.tokens[0].top) == VOCAB


def test_equal_logits_are_chosen_from_whatever_else_is_asked() -> None:
    """In bfloat16 the likeliest are often equal."""
    model = tiny(replace(CONFIGS["gpt-pre-norm"], vocab_size=4000)).bfloat16()
    other = Request([3], replace(GREEDY, min_new_tokens=12), EOS)
    for decoding in (GREEDY, Decoding(max_new_tokens=6, num_beams=2)):
        others = [other, Request([9], Decoding(max_new_tokens=6, num_beams=3), EOS)]
        for prompt in range(10):
            request = Request([prompt], decoding, EOS)
            assert said(answers(Engine(model, 3), [request, *others]), 0) == alone(model, request)


@pytest.mark.parametrize("which", ["model", "draft"])
def test_a_model_in_training_mode_is_refused(which: str) -> None:
    models = {"model": tiny("gpt-pre-norm"), "draft": tiny("gpt-rotary")}
    models[which].train()
    with pytest.raises(InputError, match=r"training mode answers with dropout: call its eval\(\) first"):
        Engine(models["model"], 1, models["draft"])


def test_an_engine_without_slots_is_refused() -> None:
    with pytest.raises(InputError, match="give it at least one"):
        Engine(tiny("gpt-pre-norm"), 0)


def test_impossible_requests_are_named_when_they_come() -> None:
    engine = Engine(tiny("gpt-pre-norm"), 1)
    engine.submit(Request([4], GREEDY))
    with pytest.raises(InputError, match="prompt 1 has no tokens"):
        engine.submit(Request([], GREEDY))
    for strange in (Request([4, VOCAB], GREEDY), Request([4], GREEDY, eos=[-1])):
        with pytest.raises(
            InputError, match=f"prompt 1 has, or is to end at, the id .*; the model's are 0 to {VOCAB - 1}"
        ):
            engine.submit(strange)
    assert engine.submit(Request([4], GREEDY)) == 1
    assert len(list(engine.run())) == 2 * GREEDY.max_new_tokens
