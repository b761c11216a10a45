"""`qkv.explain` as a whole: what it explains, what it says no to, and that it leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from test_pipelines import classifier, encoder, generator, image, translator
from tiny import tiny

import qkv
from explanations.subjects import CASES
from qkv.errors import InputError
from qkv.explanations.explanation import Method
from qkv.fast import Road
from qkv.hub.sentence import Pooling
from qkv.pipelines import pipeline

LABELS = ("a", "b", "c")


def quick(*given: object, **options: object) -> qkv.Explanation:
    return qkv.explain(*given, **{"methods": ["rollout"], "random_orders": 0, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CASES)
def test_an_explanation_is_whole(name: str):
    pipeline, given, target = CASES[name]()
    found = qkv.explain(pipeline, given, target, methods=get_args(Method), random_orders=2)
    assert found.family == name.split("-")[0]
    assert found.residual < 1e-4
    lengths = {one.name: len(one.units) for one in found.sequences}
    for one in found.attention:
        assert one.weights.dtype == np.float16
        assert one.weights.shape == (2, 2, lengths[one.queries], lengths[one.keys])
        np.testing.assert_allclose(one.weights.astype(np.float32).sum(-1), 1, atol=5e-3)
    stacks = [one.stack for one in found.attention]
    for choice in found.choices:
        assert 0 <= choice.unit < lengths[choice.sequence]
        assert any(guess == (choice.answer, choice.probability) for guess in choice.alternatives)
        assert [one.method for one in choice.relevances] == list(get_args(Method))
        for one in choice.relevances:
            assert {key: len(values) for key, values in one.values.items()} == lengths
            assert all(np.isfinite(values).all() for values in one.values.values())
            assert one.faithfulness.verdict
            if one.matrix:
                assert list(one.matrix) == stacks
        assert len(choice.lens) == 2
        assert {stack: values.shape for stack, values in choice.head_importance.items()} == dict.fromkeys(
            stacks, (2, 2)
        )
    alone = len(found.choices) == 1
    assert any(one.matrix for choice in found.choices for one in choice.relevances) == alone
    assert (found.picture is not None) == name.startswith("vit")
    assert (found.alignment is not None) == name.startswith("transformer")


def test_an_explanation_is_the_same_every_time_and_place():
    pipeline, given, _ = CASES["bert-classification"]()
    one = qkv.explain(pipeline, given, seed=3)
    with torch.inference_mode():
        other = qkv.explain(pipeline, given, seed=3)
    for a, b in zip(one.choices[0].relevances, other.choices[0].relevances, strict=True):
        np.testing.assert_array_equal(a.values["text"], b.values["text"])
        np.testing.assert_array_equal(a.faithfulness.random_deletion, b.faithfulness.random_deletion)


def test_gpt_is_explained_token_by_token():
    pipeline = generator()
    found = quick(pipeline, "The quick", max_new_tokens=4)
    text = pipeline.generate("The quick", max_new_tokens=4, temperature=0.0)
    (sequence,) = found.sequences
    written = "".join(sequence.units) + found.choices[-1].answer.removesuffix("<|endoftext|>")
    assert written == "The quick" + text
    first = len(pipeline.tokenizer.encode("The quick").ids) - 1
    assert [choice.unit for choice in found.choices] == [first + i for i in range(len(found.choices))]
    assert all(choice.answer == choice.alternatives[0].name for choice in found.choices)
    given = quick(pipeline, "The quick", " brown fox")
    assert "".join(choice.answer for choice in given.choices) == " brown fox"
    assert quick(pipeline, "", "The").sequences[0].special[0]


def test_a_translation_is_explained_token_by_token():
    pipeline = translator()
    letters = [pipeline.tokenizer.token(id).isascii() for id in range(pipeline.tokenizer.vocab_size)]
    pipeline.model.logits_bias += 30 * torch.tensor(letters)  # it writes no broken characters
    found = quick(pipeline, "Two dogs run.")
    source, target = found.sequences
    assert (
        "".join(u for u, marker in zip(source.units, source.special, strict=True) if not marker)
        == "Two dogs run."
    )
    written = "".join(choice.answer for choice in found.choices)
    assert written.removesuffix("</s>") == pipeline.translate("Two dogs run.")
    assert target.special[0]
    given = quick(pipeline, "Two dogs run.", "Zwei Hunde")
    assert "".join(choice.answer for choice in given.choices) == "Zwei Hunde</s>"


def test_classes_are_the_likeliest_or_those_asked_for():
    pipeline = encoder("classification", LABELS)
    best = pipeline.classify("A quick fox", top_k=3)
    (choice,) = quick(pipeline, "A quick fox").choices
    assert choice.answer == best[0].name
    assert [guess.name for guess in choice.alternatives] == [guess.name for guess in best]
    np.testing.assert_allclose(
        [g.probability for g in choice.alternatives], [g.probability for g in best], rtol=1e-5
    )
    (choice,) = quick(pipeline, "A quick fox", best[2].name, alternatives=1).choices
    assert [guess.name for guess in choice.alternatives] == [best[0].name, best[2].name]
    (choice,) = quick(classifier(), image(1), "bee").choices
    assert choice.answer == "bee"


def test_a_value_and_a_similarity_stand_where_a_probability_does():
    pipeline = encoder("regression", ("stars",))
    (choice,) = quick(pipeline, "A quick fox").choices
    assert choice.answer == "stars"
    assert choice.probability == pytest.approx(pipeline.estimate(["A quick fox"])[0, 0], rel=1e-4)
    pipeline = encoder("none", pooling=Pooling(normalize=True))
    one, other = pipeline.embed(["Two dogs run.", "A quick fox"])
    found = quick(pipeline, ("Two dogs run.", "A quick fox"))
    (sequence,) = found.sequences
    # Each text is asked about, while the other one stays.
    assert [choice.unit for choice in found.choices] == [0, sequence.segments.index(1)]
    for text, choice in enumerate(found.choices):
        assert choice.probability == pytest.approx(one @ other, rel=1e-4)
        values = choice.relevances[0].values["text"]
        assert (values[np.array(sequence.segments) != text] == 0).all()


def test_texts_are_as_long_as_their_vectors_allow():
    pipeline = encoder("none", pooling=Pooling(max_tokens=5))
    for ask in (pipeline.embed, lambda texts: quick(pipeline, tuple(texts))):
        with pytest.raises(InputError, match=r"tokens; .* 5: shorten it"):
            ask(["A quick brown fox jumps over it", "Two dogs run."])


def test_a_model_may_have_more_rows_than_there_are_tokens():
    """Those that only pad a matrix have no names but their numbers."""
    pipeline = generator(spare=2)
    size = pipeline.tokenizer.vocab_size
    (choice, *_) = quick(pipeline, "The quick", max_new_tokens=1, alternatives=size + 2).choices
    assert {f"<{size}>", f"<{size + 1}>"} <= {guess.name for guess in choice.alternatives}


@pytest.mark.parametrize(
    ("name", "outcome"), [("classification", "class"), ("multi_label", "label"), ("regression", "value")]
)
def test_what_an_answer_is_does_not_depend_on_the_alternatives(name: str, outcome: str):
    pipeline = encoder(name, ("a",) if outcome == "value" else LABELS)
    for alternatives in (1, 5):
        (choice,) = quick(pipeline, "A quick fox", alternatives=alternatives).choices
        assert choice.outcome == outcome
        assert len(choice.alternatives) == min(alternatives, 1 if outcome == "value" else 3)


def test_what_is_read_at_one_unit_is_of_that_unit():
    """Also of the first, which has no other to be of: 1 is its own, and more what attention brought."""
    pipeline, _, _ = CASES["gpt"]()
    first = quick(pipeline, "T", target="wo dogs", methods=["relevance"]).choices[0]
    assert first.unit == 0
    assert first.relevances[0].values["text"][0] >= 1 - 1e-6


def test_of_a_mean_over_units_their_own_shares_are_no_relevance():
    """Where attention has no effect on the answer, nothing is relevant."""
    pipeline, given, _ = CASES["bert-similarity"]()
    for attention in pipeline.model.attentions()["encoder"]:
        attention.out.weight.data.zero_()
    for choice in quick(pipeline, given, methods=["relevance"]).choices:
        assert np.abs(choice.relevances[0].values["text"]).max() < 1e-6


def test_every_mask_is_a_choice():
    pipeline = encoder()
    found = quick(pipeline, "The [MASK] brown [MASK]")
    (sequence,) = found.sequences
    assert [sequence.units[choice.unit].strip() for choice in found.choices] == ["[MASK]"] * 2
    (choice,) = quick(pipeline, "The [MASK] fox").choices
    assert choice.answer == pipeline.fill("The [MASK] fox")[0].name
    (choice,) = quick(pipeline, "The [MASK] fox", "run").choices
    assert choice.answer == "run"


def test_every_word_s_tag_is_a_choice_or_those_of_one_word_or_tag():
    pipeline = encoder("tagging", ("a", "b"))
    text = "The quick brown fox"
    tagged = pipeline.tag(text)
    found = quick(pipeline, text)
    assert [choice.answer for choice in found.choices] == [word.tag for word in tagged]
    words = [found.sequences[0].words[choice.unit] for choice in found.choices]
    assert words == [0, 1, 2, 3]
    (choice,) = quick(pipeline, text, "brown").choices
    assert found.sequences[0].words[choice.unit] == 2
    for tag in {word.tag for word in tagged}:
        assert len(quick(pipeline, text, tag).choices) == [word.tag for word in tagged].count(tag)


@pytest.mark.parametrize(
    ("make", "given", "target", "said"),
    [
        (generator, ("a", "b"), None, "reads one text"),
        (generator, "a", "", "target is empty"),
        (generator, "The quick brown fox " * 20, None, "40"),
        (generator, "a", "The quick brown fox " * 20, "at most 40"),
        (translator, "a", "", "target is empty"),
        (translator, "The quick brown fox " * 20, None, "source has"),
        (translator, "a", "The quick brown fox " * 20, "target has"),
        (classifier, ("a", "b"), None, "one image"),
        (classifier, image(0), "dog", "no label 'dog'; it has ant, bee, cat"),
        (classifier, "nowhere.png", None, "no image file"),
        (encoder, "no mask", None, r"write \[MASK\]"),
        (encoder, "[MASK] [MASK]", "fox", "2"),
        (encoder, "[MASK]", "no such token", "no single token"),
        (encoder, "The quick brown fox [MASK] " * 20, None, "at most 40"),
        (encoder, 3, None, "reads text"),
        (encoder, ("a", "b", "c"), None, "reads text"),
        (encoder, "half \ud800 [MASK]", None, "surrogate"),
        (lambda: encoder("tagging", ("a", "b")), "a fox", "dog", "no word"),
        (lambda: encoder("tagging", ("a", "b")), ("a", "b"), None, "one text"),
        (lambda: encoder("tagging", ("a", "b")), " ", None, "no words"),
        (lambda: encoder("none"), "a", None, "give two"),
        (lambda: encoder("classification", ("only",)), "a", None, "a single class"),
        (lambda: encoder("none"), ("a", "b"), "c", "no target"),
    ],
)
def test_what_cannot_be_explained_is_said_in_one_line(make, given, target, said):
    with pytest.raises(InputError, match=said) as error:
        quick(make(), given, target)
    assert "\n" not in str(error.value)


def test_options_that_mean_nothing_are_refused():
    pipeline, given, _ = CASES["bert-classification"]()
    for options in (
        {"methods": ["magic"]},
        {"alternatives": 0},
        {"random_orders": -1},
        {"heads": [7]},
        {"seed": -1},
    ):
        with pytest.raises(InputError):
            quick(pipeline, given, **options)


def test_a_model_with_a_precision_is_refused_and_a_folder_opened(tmp_path: Path):
    pipeline, given, target = CASES["bert-pair"]()
    pipeline.save_pretrained(tmp_path)
    found = quick(tmp_path, given, target)
    assert found.model == str(tmp_path)
    ours = quick(pipeline, given, target)
    assert found.choices[0].probability == pytest.approx(ours.choices[0].probability)
    pipeline.road = Road("torch", "fp32")
    with pytest.raises(InputError, match="without one"):
        quick(pipeline, given, target)


@pytest.mark.parametrize("name", ["gpt", "transformer", "bert-masked", "vit"])
def test_the_model_is_as_it_was(name: str):
    pipeline, given, target = CASES[name]()
    model = pipeline.model
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    found = quick(pipeline, given, target, methods=get_args(Method), random_orders=1)
    assert model.training
    assert all(module.training for module in model.modules())
    model.eval()
    again = quick(pipeline, given, target, methods=get_args(Method), random_orders=1)
    np.testing.assert_array_equal(
        found.choices[0].relevances[2].values[found.sequences[0].name],
        again.choices[0].relevances[2].values[found.sequences[0].name],
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [p is not frozen for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert all(module.tap is None for stack in model.attentions().values() for module in stack)


@pytest.mark.parametrize("none", [{"layers": []}, {"heads": []}])
def test_attention_of_no_layer_or_head_is_left_out(none: dict):
    one, given, target = CASES["bert-classification"]()
    made = qkv.explain(one, given, target=target, methods=("relevance",), random_orders=0, **none)
    assert made.attention == ()


def test_a_pair_for_a_model_without_segments_is_refused():
    reader = encoder("classification", ("a", "b"))
    config = replace(reader.model.config, segments=1)
    alone = pipeline(replace(reader.checkpoint, model=tiny(config, torch.float32)), "cpu")
    with pytest.raises(InputError, match="does not tell a second text from the first"):
        qkv.explain(alone, ("a", "b"))
