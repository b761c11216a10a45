"""Attention recorded in whole models: every family, decoding from a cache, beams, and bounded memory."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONFIGS, DECODERS, answers, ids, samples, tiny

from qkv.config import Decoding
from qkv.decode import generate
from qkv.models import GPT
from qkv.ragged import pack
from qkv.recording import record

LENGTHS = [(7, 3), (1, 9), (12, 2)]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_stack_of_every_family_is_recorded(name: str):
    model = tiny(name, torch.float32)
    with torch.inference_mode(), record(model) as maps:
        answers(model, samples(model, LENGTHS))
    assert maps.residual < 1e-5
    depth = model.config.depth
    assert sorted(maps.taps) == sorted((stack, i) for stack in model.attentions() for i in range(depth))
    for key in maps.taps:
        assert len(maps[key]) == len(LENGTHS)
        for weights in maps[key]:
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))


@given(scores=st.integers(1, 200), name=st.sampled_from(["gpt-rotary", "transformer-rotary", "bert-tagging"]))
def test_how_much_is_computed_at_a_time_does_not_matter(scores: int, name: str):
    model = tiny(name, torch.float32)
    batch = samples(model, LENGTHS)
    with torch.inference_mode(), record(model) as whole:
        answers(model, batch)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode(), record(model) as parts:
        patch.setattr("qkv.recording._SCORES", scores)
        answers(model, batch)
    for key in whole.taps:
        for a, b in zip(whole[key], parts[key], strict=True):
            torch.testing.assert_close(a, b)
    assert parts.residual == pytest.approx(whole.residual, abs=1e-6)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_that_is_not_a_number_is_not_lost_among_others(layer: int):
    model = tiny("bert-masked-lm", torch.float32)
    with torch.inference_mode(), record(model, layers=[0, 1]) as maps:
        answers(model, samples(model, LENGTHS))
    assert maps.residual < 1e-5
    next(tap for (_, i), tap in maps.taps.items() if i == layer).residual = math.nan
    assert math.isnan(maps.residual)


def test_slots_that_ask_nothing_have_no_rows():
    model = tiny("gpt-pre-norm")
    with record(model, rows=[-1]) as maps:
        generate(model, [[4], [9, 1, 3]], Decoding(max_new_tokens=6, num_return_sequences=2, seed=3), [5])
    assert maps.residual < 1e-5


def test_half_precision_halves_what_is_kept():
    model = tiny("bert-masked-lm", torch.float32)
    batch = samples(model, LENGTHS)
    with torch.inference_mode(), record(model) as whole:
        answers(model, batch)
    with torch.inference_mode(), record(model, dtype=torch.float16) as half:
        answers(model, batch)
    for a, b in zip(whole[1], half[1], strict=True):
        assert b.dtype == torch.float16
        torch.testing.assert_close(b, a.half())
    assert half.residual == whole.residual  # of the probabilities before they are rounded


def test_only_the_latest_forward_passes_are_kept():
    model = tiny("gpt-pre-norm", torch.float32)
    with torch.inference_mode(), record(model, calls=2) as maps:
        for length in (2, 3, 4, 5):
            model(pack([ids(length, length)]))
    for key in maps.taps:
        assert [call[0].shape[-1] for call in maps.tap(key).calls] == [4, 5]


@pytest.mark.parametrize("name", DECODERS)
def test_decoding_from_a_cache_shows_the_rows_of_a_whole_pass(name: str):
    model = tiny(name)
    prompt = ids(6, 1).tolist()
    with record(model) as steps:
        (answer,) = generate(model, [prompt], Decoding(max_new_tokens=5, temperature=0.0), [])[0]
    with torch.inference_mode(), record(model) as whole:
        if isinstance(model, GPT):
            model(pack([[*prompt, *answer.ids[:-1]]]))
        else:
            model(pack([prompt]), pack([[model.config.pad_id, *answer.ids[:-1]]]))
    assert steps.residual < 1e-5
    for key in whole.taps:
        calls = [call[0] for call in steps.tap(key).calls]  # (H, new rows, keys so far) each
        rows = [row for call in calls for row in call.unbind(1)]
        every = whole[key][0].unbind(1)
        for row, expected in zip(rows, every, strict=True):
            padded = torch.zeros_like(expected)
            padded[:, : row.shape[-1]] = row
            torch.testing.assert_close(padded, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(max_new_tokens=8, num_beams=3, num_return_sequences=2),
        Decoding(max_new_tokens=8, num_return_sequences=3, seed=1),
        Decoding(max_new_tokens=8, temperature=0.0, speculate=3),
    ],
)
def test_what_is_recorded_explains_every_step_of_any_search(name: str, decoding: Decoding):
    model = tiny(name)
    inputs = [ids(length, length).tolist() for length in (5, 1, 9)]
    plain = [[h.ids for h in one] for one in generate(model, inputs, decoding, [1])]
    with record(model) as maps:
        found = [[h.ids for h in one] for one in generate(model, inputs, decoding, [1])]
    assert found == plain
    assert maps.residual < 1e-5
    for tap in maps.taps.values():
        for weights in (one for call in tap.calls for one in call if one.numel()):
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))


def test_maps_are_exact_while_a_model_is_trained_in_bfloat16():
    model = tiny("bert-masked-lm", torch.float32)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), record(model) as maps:
        answers(model, samples(model, LENGTHS))
    for weights in maps[1]:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
