"""Head importance against edited weights, and the lens against the model's own answers."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from explanations.subjects import CASES, subject
from qkv.attention import Attention
from qkv.explanations import subjects
from qkv.explanations.heads import head_importance
from qkv.explanations.lens import guesses, lens


@pytest.mark.parametrize("name", CASES)
def test_a_silent_head_is_one_without_output_weights(name: str, monkeypatch):
    one = subject(name)
    answers = [q.answer for q in one.questions]
    before = copy.deepcopy(one.model.state_dict())
    with torch.no_grad():
        whole = one.outputs(one.embedded[None], one.questions)[0]
    found = head_importance(one)
    monkeypatch.setattr(subjects, "TOKENS", 1)
    alone = head_importance(one)
    for stack, modules in one.model.attentions().items():
        for layer, module in enumerate(modules):
            assert isinstance(module, Attention)
            width = module.out.in_features // module.heads
            for head in range(module.heads):
                weights = module.out.weight.data.clone()
                module.out.weight.data[:, head * width : (head + 1) * width] = 0
                with torch.no_grad():
                    edited = one.outputs(one.embedded[None], one.questions)[0]
                module.out.weight.data = weights
                for number, answer in enumerate(answers):
                    both = [one.log_probability(x[number], answer) for x in (whole, edited)]
                    expected = float(both[0] - both[1])
                    assert found[number][stack][layer, head] == pytest.approx(expected, abs=1e-5)
                    assert alone[number][stack][layer, head] == pytest.approx(expected, abs=1e-5)
    after = one.model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", CASES)
def test_the_last_layer_of_the_lens_is_the_model_s_answer(name: str):
    one = subject(name)
    with torch.no_grad():
        chances = one.probabilities(one.outputs(one.embedded[None], one.questions)[0])
    found = lens(one, 3)
    assert len(found) == len(one.questions)
    for layers, row in zip(found, chances, strict=True):
        assert len(layers) == one.model.config.depth
        assert layers[-1] == guesses(one, row, 3)
        for guess in layers:
            assert all(a.probability >= b.probability for a, b in itertools.pairwise(guess))


def test_the_lens_reads_a_layer_as_if_there_were_no_more():
    one = subject("gpt")
    first = [layers[0] for layers in lens(one, 3)]
    with torch.no_grad():
        del one.model.blocks[1]
        chances = one.probabilities(one.outputs(one.embedded[None], one.questions)[0])
    assert first == [guesses(one, row, 3) for row in chances]


def test_the_chosen_answer_is_among_the_guesses_wherever_it_stands():
    one = subject("bert-pair")
    chances = torch.tensor([0.5, 0.2, 0.3])
    assert [guess.name for guess in guesses(one, chances, 2)] == ["a", "c"]
    assert [guess.name for guess in guesses(one, chances, 2, always=1)] == ["a", "c", "b"]
    assert [guess.name for guess in guesses(one, chances, 2, always=0)] == ["a", "c"]
