"""Gradients, relevance and integrated gradients against autograd, the papers' equations and captum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients
from torch import Tensor

from explanations.subjects import ALONE, CASES, explicit_attention, subject
from qkv.explanations.attention_flow import Look, looks
from qkv.explanations.gradients import gradient_x_input, gradients, integrated_gradients, relevance
from qkv.explanations.subjects import Question, Subject


def log_odds(one: Subject, x: Tensor, question: Question) -> Tensor:
    """x (N, U, D) -> the score of a choice (N,), by its definition."""
    outputs = one.outputs(x, [question])[:, 0]
    if one.outcome == "value":
        return outputs[:, question.answer]
    p = (outputs.softmax(-1) if one.outcome == "class" else outputs.sigmoid())[:, question.answer]
    return (p / (1 - p)).log()


@pytest.mark.parametrize("name", ALONE)
def test_gradients_of_attention_are_those_through_an_explicit_softmax(name: str):
    one = subject(name)
    seen, _ = looks(one)
    for question, found in zip(one.questions, gradients(one, seen), strict=True):
        x = one.embedded[None].clone().requires_grad_()
        with explicit_attention() as shown:
            log_odds(one, x, question).sum().backward()
        torch.testing.assert_close(found.embedded, x.grad[0])
        for ours, A in zip(found.weights, shown.maps, strict=True):
            # What no weight of the softmax lets through has a gradient here, but none of consequence.
            expected = torch.zeros_like(A) if A.grad is None else A.grad
            torch.testing.assert_close(ours * (A > 0), expected * (A > 0))


def rest_with_rows_of_one(R: np.ndarray) -> np.ndarray:
    """Equations 8 and 9 of Chefer et al. 2021."""
    out = np.eye(len(R))
    for i, row in enumerate(R - np.eye(len(R))):
        if row.sum() > 0:
            out[i] += row / row.sum()
    return out


def test_relevance_of_two_layers_by_hand():
    A = [torch.tensor([[[0.5, 0.5], [0.2, 0.8]]]), torch.tensor([[[0.1, 0.9], [0.6, 0.4]]])]
    G = [torch.tensor([[[2.0, -1.0], [1.0, 0.5]]]), torch.tensor([[[-3.0, 1.0], [0.5, 0.0]]])]
    # (G A)+: 1 0 / .2 .4, then 0 .9 / .3 0. R = (I + second) (I + first) = 1 .9 / .3 1 times 2 0 / .2 1.4.
    seen = [Look("encoder", i, slice(0, 2), slice(0, 2), weights) for i, weights in enumerate(A)]
    found = relevance(seen, G, 2)
    np.testing.assert_allclose(found, [[2.18, 1.26], [0.8, 1.4]], rtol=1e-6)


@pytest.mark.parametrize("name", ["gpt", "vit", "bert-pair"])
def test_relevance_of_self_attention_is_a_product_over_layers(name: str):
    one = subject(name)
    seen, _ = looks(one)
    for question, found in zip(one.questions, gradients(one, seen), strict=True):
        with explicit_attention() as shown:
            log_odds(one, one.embedded[None].clone().requires_grad_(), question).sum().backward()
        R = np.eye(len(one.embedded))
        for A in shown.maps:
            positive = np.maximum((A.grad * A).detach().numpy(), 0).mean(0)
            R = R + positive @ R
        np.testing.assert_allclose(relevance(seen, found.weights, len(R)), R, rtol=1e-4, atol=1e-6)


def test_relevance_of_an_encoder_decoder_follows_the_paper_s_rules():
    one = subject("transformer")
    seen, _ = looks(one)
    source, target = one.place("source"), one.place("target")
    for question, found in zip(one.questions, gradients(one, seen), strict=True):
        with explicit_attention() as shown:
            log_odds(one, one.embedded[None].clone().requires_grad_(), question).sum().backward()
        positive = [np.maximum((A.grad * A).detach().numpy(), 0).mean(0) for A in shown.maps]
        encoder, decoder = positive[:2], positive[2:]
        Rss, Rtt = np.eye(source.stop), np.eye(target.stop - target.start)
        Rts = np.zeros((len(Rtt), len(Rss)))
        for A in encoder:
            Rss = Rss + A @ Rss  # (6)
        for own, cross in zip(decoder[::2], decoder[1::2], strict=True):
            Rtt, Rts = Rtt + own @ Rtt, Rts + own @ Rts  # (6), (7)
            Rts = Rts + rest_with_rows_of_one(Rtt).T @ cross @ rest_with_rows_of_one(Rss)  # (10)
        R = relevance(seen, found.weights, len(one.embedded)).numpy()
        np.testing.assert_allclose(R[source, source], Rss, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(R[target, target], Rtt, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(R[target, source], Rts, rtol=1e-4, atol=1e-6)
        assert (R[source, target] == 0).all()


@pytest.mark.parametrize("name", CASES)
def test_attributions_are_captum_s(name: str):
    one = subject(name)
    question = one.questions[-1]
    found = list(gradients(one, looks(one)[0]))[-1]
    baseline = one.without(question.candidates[None])
    difference = one.embedded - baseline

    def from_baseline(x: Tensor) -> Tensor:
        return log_odds(one, baseline + x, question)

    theirs = InputXGradient(from_baseline).attribute(difference)[0].sum(-1)
    torch.testing.assert_close(gradient_x_input(one, question, found.embedded), theirs, atol=1e-8, rtol=1e-6)
    method = IntegratedGradients(lambda x: log_odds(one, x, question))
    theirs = method.attribute(one.embedded[None], baseline, n_steps=20)[0].sum(-1)
    ours = integrated_gradients(one, question, points=20)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert (ours[~one.free(question)].abs() < 1e-12).all()


@pytest.mark.parametrize("name", CASES)
def test_integrated_gradients_are_complete(name: str):
    one = subject(name)
    question = one.questions[0]
    with torch.no_grad():
        ends = log_odds(one, torch.stack([one.without(question.candidates), one.embedded]), question)
    found = integrated_gradients(one, question, points=300).sum()
    # A ReLU has kinks, at which a quadrature converges slowly.
    torch.testing.assert_close(found, ends[1] - ends[0], atol=1e-2, rtol=1e-3)
