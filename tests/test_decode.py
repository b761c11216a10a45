"""Decoding against transformers' `generate` and logits warpers, and what a request may count on."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONTEXT, DECODERS, VOCAB, tiny
from transformers import GPT2Config, GPT2LMHeadModel, MarianConfig, MarianMTModel
from transformers.generation import logits_process

from qkv import hub, sampling
from qkv.decode import Decoding, Hypothesis, engine_for, generate, sample
from qkv.errors import InputError
from qkv.models import GPT, Transformer
from qkv.ragged import pack
from qkv.sampling import draw, filter_logits, penalise
from qkv.search import Request

EOS = 5
GREEDY = Decoding(temperature=0.0, max_new_tokens=20)


# ---------------------------------------------------------------- against transformers


def scale(model: torch.nn.Module, factor: float) -> None:
    """Make a random model surer of itself, so that its choices are far from ties."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT2LMHeadModel, GPT]:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=23, n_positions=48, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=EOS,
        pad_token_id=0,
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config).eval()
    scale(theirs, 2.0)
    model = through_hub(theirs, tmp_path_factory.mktemp("gpt2"))
    assert isinstance(model, GPT)
    return theirs, model


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> tuple[MarianMTModel, Transformer]:
    torch.manual_seed(0)
    config = MarianConfig(
        vocab_size=23, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=48,
        pad_token_id=22, eos_token_id=0, decoder_start_token_id=22, forced_eos_token_id=None,
        scale_embedding=True, activation_function="swish", init_std=0.3,
    )  # fmt: skip
    theirs = MarianMTModel(config).eval()
    theirs.final_logits_bias.normal_()
    theirs.final_logits_bias[0, 0] = 2.0  # some answers end by themselves, others do not
    theirs.final_logits_bias[0, 22] = 5.0  # were padding not banned, it would be chosen
    model = through_hub(theirs, tmp_path_factory.mktemp("marian"))
    assert isinstance(model, Transformer)
    return theirs, model


def through_hub(model: transformers.PreTrainedModel, folder: Path) -> object:
    model.save_pretrained(folder)
    return hub.load(folder).model


def prompts(number: int, first: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (number,), generator=generator).tolist()
    return [torch.randint(first, 22, (n,), generator=generator).tolist() for n in lengths]


def expected(
    model: transformers.PreTrainedModel, ids: list[int], eos: int, **options: object
) -> tuple[list[list[int]], list[float]]:
    """Their answers to one prompt without prompt and padding, and the scores that beam search gives them."""
    prompt = torch.tensor([ids])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, return_dict_in_generate=True,
        output_scores=True, **options,
    )  # fmt: skip
    start = 1 if model.config.is_encoder_decoder else len(ids)
    rows = [row[start:] for row in out.sequences.tolist()]
    answers = [row[: row.index(eos) + 1] if eos in row else row for row in rows]
    return answers, [] if options["num_beams"] == 1 else out.sequences_scores.tolist()


def ids_of(found: list[list[Hypothesis]]) -> list[list[list[int]]]:
    return [[answer.ids for answer in answers] for answers in found]


PENALTIES = [(0.0, 1.0), (0.6, 1.3), (1.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (1.0, 0.8)]


@pytest.mark.parametrize(("length_penalty", "repetition_penalty"), PENALTIES)
@pytest.mark.parametrize("num_beams", [2, 5])
def test_beam_search_of_gpt2_equals_transformers(
    gpt2: tuple[GPT2LMHeadModel, GPT], num_beams: int, length_penalty: float, repetition_penalty: float
) -> None:
    options = {
        "num_beams": num_beams, "length_penalty": length_penalty, "repetition_penalty": repetition_penalty,
        "max_new_tokens": 12, "num_return_sequences": 2,
    }  # fmt: skip
    theirs, ours = gpt2
    inputs = prompts(6, first=4)
    found = generate(ours, inputs, Decoding(**options), [EOS])
    check(found, [expected(theirs, ids, EOS, early_stopping=False, **options) for ids in inputs])
    if repetition_penalty == 1:
        assert {answer.finish for answers in found for answer in answers} == {"eos", "length"}


@pytest.mark.parametrize(("length_penalty", "repetition_penalty"), PENALTIES)
@pytest.mark.parametrize("num_beams", [2, 4])
def test_beam_search_of_marian_equals_transformers(
    marian: tuple[MarianMTModel, Transformer],
    num_beams: int,
    length_penalty: float,
    repetition_penalty: float,
) -> None:
    options = {
        "num_beams": num_beams, "length_penalty": length_penalty, "repetition_penalty": repetition_penalty,
        "max_new_tokens": 12, "num_return_sequences": 2,
    }  # fmt: skip
    theirs, ours = marian
    inputs = [[*ids, 0] for ids in prompts(6, first=1)]
    found = generate(ours, inputs, Decoding(**options), [0])
    banned = {"bad_words_ids": [[22]]}
    check(found, [expected(theirs, ids, 0, early_stopping=False, **banned, **options) for ids in inputs])
    assert all(22 not in answer.ids for answers in found for answer in answers)


def check(found: list[list[Hypothesis]], wanted: Sequence[tuple[list[list[int]], list[float]]]) -> None:
    for answers, (ids, scores) in zip(found, wanted, strict=True):
        assert ids_of([answers]) == [ids]
        assert [answer.score for answer in answers] == pytest.approx(scores, rel=1e-5, abs=1e-4)


def test_several_end_tokens_equal_transformers(gpt2: tuple[GPT2LMHeadModel, GPT]) -> None:
    theirs, ours = gpt2
    ends, inputs = [EOS, 19, 1], prompts(6, first=4)
    found = generate(ours, inputs, Decoding(num_beams=3, max_new_tokens=20), ends)
    for ids, (answer,) in zip(inputs, found, strict=True):
        (row,) = theirs.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, num_beams=3,
            eos_token_id=ends, max_new_tokens=20,
        ).tolist()  # fmt: skip
        assert answer.ids == row[len(ids) :]
    assert {answer.ids[-1] for (answer,) in found if answer.finish == "eos"} >= {19, 1}


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.3, 0.7])
def test_greedy_equals_transformers(
    gpt2: tuple[GPT2LMHeadModel, GPT], marian: tuple[MarianMTModel, Transformer], repetition_penalty: float
) -> None:
    options = {"repetition_penalty": repetition_penalty, "max_new_tokens": 20}
    decoding = Decoding(temperature=0.0, **options)
    inputs = prompts(8, first=4)
    found = generate(gpt2[1], inputs, decoding, [EOS])
    wanted = [expected(gpt2[0], ids, EOS, num_beams=1, **options)[0] for ids in inputs]
    assert ids_of(found) == wanted
    sources = [[*ids, 0] for ids in prompts(8, first=1)]
    found = generate(marian[1], sources, decoding, [0])
    banned = {"num_beams": 1, "bad_words_ids": [[22]]}
    wanted = [expected(marian[0], ids, 0, **banned, **options)[0] for ids in sources]
    assert ids_of(found) == wanted


@pytest.mark.parametrize(("num_beams", "length_penalty"), [(1, 1.0), (3, 0.0)])
def test_least_numbers_of_tokens_equal_transformers(
    gpt2: tuple[GPT2LMHeadModel, GPT], num_beams: int, length_penalty: float
) -> None:
    theirs, ours = gpt2
    free = {"num_beams": num_beams, "length_penalty": length_penalty, "max_new_tokens": 16}
    options = {**free, "min_new_tokens": 7}
    inputs, end = prompts(8, first=4), 19
    found = generate(ours, inputs, Decoding(temperature=0.0, **options), [end])
    assert ids_of(found) == [expected(theirs, i, end, eos_token_id=end, **options)[0] for i in inputs]
    others = generate(ours, inputs, Decoding(temperature=0.0, **free), [end])
    assert min(len(a.ids) for (a,) in others) < 7 <= min(len(a.ids) for (a,) in found)


@given(
    st.integers(0, 10**6),
    st.floats(0.05, 5.0),
    st.integers(0, 40),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
)
def test_filtered_distribution_equals_transformers_warpers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = 3 * torch.randn(4, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    decoding = Decoding(temperature=max(temperature, 1e-3), top_k=top_k, top_p=top_p, min_p=min_p)
    theirs = logits_process.TemperatureLogitsWarper(decoding.temperature)(None, logits)
    if top_k:
        theirs = logits_process.TopKLogitsWarper(top_k)(None, theirs)
    theirs = logits_process.TopPLogitsWarper(top_p)(None, theirs)
    theirs = logits_process.MinPLogitsWarper(min_p)(None, theirs)
    for size in (3, 30):  # of the tokens that are looked at first
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "NUCLEUS", size)
            torch.testing.assert_close(filter_logits(logits, decoding).softmax(-1), theirs.softmax(-1))


@given(
    st.integers(0, 10**6), st.floats(0.2, 3.0), st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1)
)
def test_repetition_penalty_equals_transformers(seed: int, penalty: float, past: list[list[int]]) -> None:
    scores = torch.randn(len(past), 10, generator=torch.Generator().manual_seed(seed))
    before = scores.clone()
    ours = penalise(scores, pack(past), penalty)
    for row, ids in enumerate(past):
        warper = logits_process.RepetitionPenaltyLogitsProcessor(penalty)
        theirs = warper(torch.tensor([ids], dtype=torch.long), scores[row : row + 1])[0]
        torch.testing.assert_close(ours[row], theirs)
    assert torch.equal(scores, before)


# ---------------------------------------------------------------- filters and draws


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.tensor([[1.0, 30.0, -5.0], [2.0, 1.0, 0.0]])
    for temperature in (1e-2, 1e-6):
        probabilities = filter_logits(logits, Decoding(temperature=temperature)).softmax(-1)
        torch.testing.assert_close(probabilities, torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))


@given(st.integers(0, 10**6), st.floats(0.0, 1.0, exclude_max=True))
def test_a_draw_is_never_an_impossible_token(seed: int, uniform: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 20, generator=generator) * 20
    logits[torch.rand(3, 20, generator=generator) < 0.7] = -math.inf
    logits[:, 7] = 0.0
    for chance in (uniform, 0.0, 1 - 2**-53):
        weights = filter_logits(logits, Decoding()).exp()
        ids = draw(weights, torch.full((3,), chance, dtype=torch.float64))
        assert torch.isfinite(logits[torch.arange(3), ids]).all()


def test_a_draw_inverts_the_cumulative_distribution() -> None:
    weights = torch.tensor([0.1, 0.0, 0.6, 0.3])
    uniforms = torch.tensor([0.0, 0.09, 0.11, 0.69, 0.71, 0.999], dtype=torch.float64)
    assert draw(weights.expand(6, 4), uniforms).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2, "temperature": 1.5}]
)
@pytest.mark.parametrize("name", DECODERS)
def test_samples_follow_the_filtered_distribution(name: str, options: dict[str, float]) -> None:
    """The first token's frequencies pass a chi-square test against what the model and the filters say."""
    model, number = tiny(name), 2000
    source = [5, 2, 7]
    decoding = Decoding(max_new_tokens=1, num_return_sequences=number, seed=3, **options)  # type: ignore[arg-type]
    counts = Counter(token.id for token in sample(model, [source], decoding))
    if isinstance(model, GPT):
        logits = model(pack([source])).logits.last()
    else:
        logits = model(pack([source]), pack([[model.config.pad_id]])).logits.last()
        logits[:, model.config.pad_id] = -math.inf
    chances = filter_logits(logits, decoding).softmax(-1)[0].tolist()
    assert all(chances[id] > 0 for id in counts)
    likely = [id for id, chance in enumerate(chances) if chance * number >= 5]
    seen = [counts[id] for id in likely] + [number - sum(counts[id] for id in likely)]
    wanted = [chances[id] * number for id in likely] + [number * (1 - sum(chances[id] for id in likely))]
    bins = [(s, w) for s, w in zip(seen, wanted, strict=True) if w > 1e-6]
    if len(bins) > 1:
        total = sum(w for _, w in bins)
        test = scipy.stats.chisquare([s for s, _ in bins], [w * number / total for _, w in bins])
        assert test.pvalue > 1e-3


# ---------------------------------------------------------------- what a request may count on

WAYS = {
    "greedy": GREEDY,
    "sampling": Decoding(max_new_tokens=20, top_p=0.95, seed=5),
    "penalised": Decoding(max_new_tokens=20, repetition_penalty=1.4, temperature=1.3),
    "several": Decoding(max_new_tokens=12, num_return_sequences=3),
    "beams": Decoding(max_new_tokens=12, num_beams=3, num_return_sequences=2, length_penalty=0.7),
}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("way", WAYS)
def test_an_answer_does_not_depend_on_its_neighbours(name: str, way: str) -> None:
    model = tiny(name)
    inputs = [[4, 9, 1], [7], [4, 9, 1, 12, 8, 8, 2, 5], [11, 6]]
    together = generate(model, inputs, WAYS[way], [EOS])
    for ids, answers in zip(inputs, together, strict=True):
        (alone,) = generate(model, [ids], WAYS[way], [EOS])
        assert [(a.ids, a.finish) for a in answers] == [(a.ids, a.finish) for a in alone]
    turned = generate(model, inputs[::-1], WAYS[way], [EOS])[::-1]
    assert ids_of(turned) == ids_of(together)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("way", ["greedy", "penalised"])
def test_steps_with_the_cache_equal_recomputation(name: str, way: str) -> None:
    """Every greedy token is the likeliest after the whole text so far, without a cache."""
    model = tiny(name)
    decoding = Decoding(temperature=0.0, max_new_tokens=15, repetition_penalty=WAYS[way].repetition_penalty)
    inputs = [[4, 9, 1], [7], [4, 9, 1, 12, 8, 8, 2, 5]]
    for ids, (answer,) in zip(inputs, generate(model, inputs, decoding, [EOS]), strict=True):
        past = list(ids) if isinstance(model, GPT) else [model.config.pad_id]
        for id in answer.ids:
            out = model(pack([past])) if isinstance(model, GPT) else model(pack([ids]), pack([past]))
            logits = penalise(out.logits.last(), pack([past]), decoding.repetition_penalty)
            if isinstance(model, Transformer):
                logits[:, model.config.pad_id] = -math.inf
            assert id == logits.argmax()
            past.append(id)


def test_a_nucleus_does_not_depend_on_other_rows() -> None:
    """Of 19,999 tokens that are equally likely, which come first in `topk` depends on its size."""
    peaked, flat = torch.zeros(2, 20000).unbind()
    peaked[-1] = 9.9  # has 0.499 of it all
    alone = filter_logits(peaked[None], Decoding(top_p=0.5))
    beside = filter_logits(torch.stack([peaked, flat]), Decoding(top_p=0.5))
    assert torch.equal(alone, beside[:1])
    assert filter_logits(peaked[None], Decoding(top_p=1e-300)).isfinite().nonzero().tolist() == [[0, 19999]]


def test_integers_of_numpy_draw_the_same() -> None:
    model = tiny("gpt-pre-norm")
    ours, theirs = Decoding(seed=3), Decoding(seed=np.int64(3), max_new_tokens=np.int32(128))  # type: ignore[arg-type]
    assert generate(model, [[4, 9]], ours) == generate(model, [np.array([4, 9])], theirs)  # type: ignore[list-item]


def test_seeds_and_samples_differ_and_repeat() -> None:
    model = tiny("gpt-pre-norm")

    def answers(seed: int) -> list[list[int]]:
        decoding = Decoding(max_new_tokens=30, num_return_sequences=3, temperature=3.0, seed=seed)
        return [answer.ids for answer in generate(model, [[4, 9]], decoding)[0]]

    assert answers(0) == answers(0)
    assert len({tuple(ids) for ids in answers(0) + answers(1)}) == 6


def test_a_cache_for_whole_answers_need_not_grow() -> None:
    model, prompts = tiny("gpt-pre-norm"), [[4, 9, 1], [5]]
    decoding = Decoding(max_new_tokens=40, temperature=0.0)
    engine = engine_for(model, prompts, decoding)
    for ids in prompts:
        engine.submit(Request(ids, decoding))
    before = engine._slots.cache.capacity
    assert sum(1 for _ in engine.run()) == 2 * 40
    assert engine._slots.cache.capacity == before


@pytest.mark.parametrize("name", DECODERS)
def test_tokens_arrive_step_by_step(name: str) -> None:
    """Each step has one token of every unfinished sequence, and a sequence's last token says why it ends."""
    model = tiny(name)
    decoding = Decoding(max_new_tokens=25, num_return_sequences=2, temperature=1.5)
    steps = sample(model, [[4], [5, 6, 7]], decoding, [EOS, 8])
    live = [(0, 0), (0, 1), (1, 0), (1, 1)]
    ids: dict[tuple[int, int], list[int]] = {place: [] for place in live}
    while live:
        step = {(token.request, token.answer): token for token in (next(steps) for _ in live)}
        assert list(step) == live
        for place, token in step.items():
            ids[place].append(token.id)
            ended = "eos" if token.id in (EOS, 8) else "length" if len(ids[place]) == 25 else None
            assert token.finish == ended
        live = [place for place, token in step.items() if token.finish is None]
    assert next(steps, None) is None
    together = generate(model, [[4], [5, 6, 7]], decoding, [EOS, 8])
    assert [a.ids for answers in together for a in answers] == list(ids.values())


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_ends_where_the_context_is_full(name: str, num_beams: int) -> None:
    """A model that reads C tokens can say what follows the last of them."""
    model = tiny(name)
    decoding = Decoding(max_new_tokens=2 * CONTEXT, num_beams=num_beams)
    lengths = [CONTEXT, CONTEXT - 3, 2]
    found = generate(model, [[4] * n for n in lengths], decoding)
    for length, (answer,) in zip(lengths, found, strict=True):
        assert answer.finish == "context"
        assert len(answer.ids) == CONTEXT - (length if isinstance(model, GPT) else 1) + 1
    (answer,) = generate(model, [[4] * lengths[1]], Decoding(max_new_tokens=4, num_beams=num_beams))[0]
    assert (answer.finish, len(answer.ids)) == ("length", 4)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", DECODERS)
def test_impossible_inputs_are_named(name: str, num_beams: int) -> None:
    model = tiny(name)
    decoding = Decoding(num_beams=num_beams)
    with pytest.raises(InputError, match="1 has no tokens"):
        generate(model, [[4], []], decoding)
    with pytest.raises(InputError, match=f"1 has {CONTEXT + 1} tokens; the model's context is {CONTEXT}"):
        generate(model, [[4], [4] * (CONTEXT + 1)], decoding)
    assert generate(model, [], decoding) == []


def test_more_beams_than_tokens() -> None:
    """With beams for every possible answer the search is exhaustive: it finds the likeliest of all."""
    model = tiny("gpt-pre-norm")
    steps = 2
    decoding = Decoding(num_beams=VOCAB**steps, max_new_tokens=steps, length_penalty=0.0)
    (best, *_), *_ = generate(model, [[4, 9]], decoding)

    def log_probability(answer: tuple[int, ...]) -> float:
        logits = model(pack([[4, 9, *answer]])).logits.values[1:-1]
        return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()

    scores = {answer: log_probability(answer) for answer in itertools.product(range(VOCAB), repeat=steps)}
    assert tuple(best.ids) == max(scores, key=scores.__getitem__)
    assert best.score == pytest.approx(max(scores.values()), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_return_sequences": -1}, "num_return_sequences is -1"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": 1e-320}, "temperature is 1e-320"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": None}, "top_p is None; it must be a number"),
        ({"temperature": "0.7"}, "temperature is '0.7'; it must be a number"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ({"top_k": 40.0}, "top_k is 40.0; it must be a whole number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; it must be a whole number"),
        ({"length_penalty": math.nan, "num_beams": 2}, "length_penalty is nan"),
        ({"length_penalty": 2.0}, "give num_beams above 1"),
        ({"num_beams": 4, "top_k": 5}, "beam search draws nothing"),
        ({"num_beams": 4, "temperature": 0.5}, "beam search draws nothing"),
        ({"num_beams": 2, "num_return_sequences": 3}, "raise num_beams"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "raise max_new_tokens"),
        ({"speculate": -1}, "speculate is -1"),
        ({"speculate": 2, "num_beams": 2}, "leave out speculate"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"temperature": 0.0, "num_return_sequences": 2}, "temperature 0 always"),
        ({"temperature": 0.0, "top_p": 0.9}, "temperature 0 always"),
    ],
)
def test_impossible_options_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Decoding(**options)  # type: ignore[arg-type]
