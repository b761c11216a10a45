"""Attention, rollout and flow against numbers by hand, explicit softmaxes and transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import qkv
from explanations.subjects import ALONE, CASES, explicit_attention, subject
from qkv.errors import InputError
from qkv.explanations import attention_flow
from qkv.explanations.attention_flow import Look, check_flow, flow, last, looks, rollout, steps


def layer(number: int, *heads: list[list[float]]) -> Look:
    return Look("encoder", number, slice(0, 2), slice(0, 2), torch.tensor(heads))


def test_rollout_of_two_layers_by_hand():
    first = layer(0, [[0.2, 0.8], [0.6, 0.4]], [[0.4, 0.6], [0.2, 0.8]])  # mean: .3 .7 / .4 .6
    second = layer(1, [[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]])  # mean: .5 .5 / .5 .5
    # With the residual: first .65 .35 / .2 .8, second .75 .25 / .25 .75.
    expected = [[0.75 * 0.65 + 0.25 * 0.2, 0.75 * 0.35 + 0.25 * 0.8],
                [0.25 * 0.65 + 0.75 * 0.2, 0.25 * 0.35 + 0.75 * 0.8]]  # fmt: skip
    found = rollout(steps([first, second], 2))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(last([first, second], 2), [[0.5, 0.5], [0.5, 0.5]])


def test_flow_of_two_layers_by_hand():
    mixed = steps([layer(0, [[0.0, 1.0], [0.0, 1.0]]), layer(1, [[0.2, 0.8], [1.0, 0.0]])], 2)
    # Lowest edges: 0 takes .5 from 0 and .5 from 1; 1 takes 1 from 1. Above them: .6 and .4; .5 and .5.
    found = flow(mixed, torch.tensor([1.0, 0.0]))
    np.testing.assert_allclose(found, [min(0.6, 0.5), min(0.6, 0.5) + min(0.4, 1.0)], atol=1e-5)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_flow_is_at_least_what_rollout_brings_and_at_most_all(units: int, depth: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(2, units, units, generator=generator).softmax(-1) for _ in range(depth)]
    every = slice(0, units)
    mixed = steps([Look("encoder", i, every, every, w) for i, w in enumerate(weights)], units)
    reads = torch.eye(units)[0]
    found, rolled = flow(mixed, reads), rollout(mixed)[0]
    assert (found <= 1 + 1e-4).all()
    # What rollout brings to a unit is a flow that the edges can carry.
    assert (found >= rolled - 1e-4).all()


def test_flow_of_a_large_input_is_refused(monkeypatch):
    monkeypatch.setattr(attention_flow, "FLOW_EDGES", 10)
    with pytest.raises(InputError, match="short inputs"):
        check_flow([torch.full((5, 5), 0.2)])


@pytest.mark.parametrize("name", CASES)
def test_rollout_tells_where_all_of_a_state_comes_from(name: str):
    one = subject(name)
    seen, residual = looks(one)
    assert residual < 3e-5
    total = rollout(steps(seen, len(one.embedded)))
    torch.testing.assert_close(total.sum(-1), torch.ones(len(total)))
    for question in one.questions:
        values = question.reads.float() @ total
        assert (values[~question.candidates] == 0).all()


@pytest.mark.parametrize("name", ALONE)
def test_attention_is_that_of_an_explicit_softmax(name: str):
    one = subject(name)
    seen, _ = looks(one)
    with explicit_attention() as shown, torch.no_grad():
        one.outputs(one.embedded[None], one.questions)
    assert len(seen) == len(shown.maps)
    for look, A in zip(seen, shown.maps, strict=True):
        torch.testing.assert_close(look.weights, A.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert-similarity", "bert-first-token"])
def test_texts_that_are_compared_do_not_look_at_each_other(name: str):
    one = subject(name)
    for look in looks(one)[0]:
        first, _ = one.lengths
        assert (look.weights[:, :first, first:] == 0).all()
        assert (look.weights[:, first:, :first] == 0).all()
        torch.testing.assert_close(look.weights.sum(-1), torch.ones_like(look.weights[..., 0]))


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("gpt", "AutoModelForCausalLM"),
        ("bert-pair", "AutoModelForSequenceClassification"),
        ("vit", "AutoModelForImageClassification"),
        ("transformer", "MarianMTModel"),
    ],
)
def test_attention_is_that_of_transformers(name: str, model: str, tmp_path: Path):
    pipeline, given, target = CASES[name]()
    found = qkv.explain(pipeline, given, target, methods=["attention"], random_orders=0)
    pipeline.save_pretrained(tmp_path)
    theirs = getattr(transformers, model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokenizer = pipeline.checkpoint.tokenizer
    if name == "gpt":
        ids = [*tokenizer.encode(given).ids, *tokenizer.plain(target)[:-1]]
        out = theirs(torch.tensor([ids]), output_attentions=True)
        expected = {"decoder": out.attentions}
    elif name == "bert-pair":
        e = tokenizer.encode(*given)
        types = torch.tensor([e.segments])
        out = theirs(torch.tensor([e.ids]), token_type_ids=types, output_attentions=True)
        expected = {"encoder": out.attentions}
    elif name == "vit":
        out = theirs(pipeline.images(given)[None], output_attentions=True)
        expected = {"encoder": out.attentions}
    else:
        ids = [pipeline.model.config.pad_id, *tokenizer.plain(target)]
        source = torch.tensor([tokenizer.encode(given).ids])
        out = theirs(source, decoder_input_ids=torch.tensor([ids]), output_attentions=True)
        expected = {
            "encoder": out.encoder_attentions,
            "decoder": out.decoder_attentions,
            "cross": out.cross_attentions,
        }
    assert [one.stack for one in found.attention] == list(expected)
    for one in found.attention:
        wanted = torch.cat(list(expected[one.stack])).detach().numpy()  # (L, H, Uq, Uk)
        np.testing.assert_allclose(one.weights.astype(np.float32), wanted, atol=1e-3)


def test_attention_of_chosen_layers_and_heads():
    pipeline, given, target = CASES["transformer"]()
    options = {"methods": ["rollout"], "random_orders": 0}
    whole = qkv.explain(pipeline, given, target, **options)
    some = qkv.explain(pipeline, given, target, **options, layers=[-1], heads=[1])
    for part, every in zip(some.attention, whole.attention, strict=True):
        assert (part.layers, part.heads) == ((1,), (1,))
        assert (every.layers, every.heads) == ((0, 1), (0, 1))
        np.testing.assert_array_equal(part.weights, every.weights[1:, 1:])
    with pytest.raises(InputError, match="has 2"):
        qkv.explain(pipeline, given, target, **options, layers=[2])
