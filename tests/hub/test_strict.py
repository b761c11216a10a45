"""What does not fit is named before anything is used; an absent head is made only on demand."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkv import hub
from qkv.config import BertConfig, GPTConfig, TokenizerConfig, TransformerConfig, ViTConfig
from qkv.errors import InputError
from qkv.hub.sentence import Pooling
from qkv.models import build
from qkv.tokenizers import train_tokenizer

from . import theirs

WEIGHTS = "model.safetensors"


def saved(name: str, folder: Path) -> Path:
    theirs.make(name).save_pretrained(folder)
    return folder


def edit(folder: Path, change: Callable[[dict], Any]) -> None:
    """Change a folder's tensors in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def configure(folder: Path, **values: object) -> None:
    """Change settings of a folder's config.json; `...` removes one."""
    config = json.loads((folder / "config.json").read_text()) | values
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder: str | Path, pattern: str, **options: object) -> str:
    """The one line with which loading is refused."""
    with pytest.raises(InputError, match=pattern) as error:
        hub.load(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- tensors


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "openai-gpt",
        "bert-masked-lm",
        "vit-classification",
        "vit-convolutions",
        "vit-rotary-classification",
        "marian",
        "rotary-marian-qk-norm",
    ],
)
def test_every_tensor_is_needed(name: str, tmp_path: Path) -> None:
    """Without any one of its tensors a checkpoint is refused, and the message names it."""
    saved(name, tmp_path)
    whole = load_file(tmp_path / WEIGHTS)
    layer_1 = [key for key in whole if ".1." in key]
    for missing in [key for key in whole if key not in layer_1] + layer_1[:2]:
        save_file({k: v for k, v in whole.items() if k != missing}, tmp_path / WEIGHTS)
        assert refused(tmp_path, "missing: ").endswith(f"missing: {missing}")


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    saved("gpt2", tmp_path)
    edit(
        tmp_path,
        lambda t: t.update({"score.weight": torch.ones(2), "transformer.h.2.ln_1.bias": torch.ones(12)}),
    )
    assert "score.weight" in refused(tmp_path, r"unexpected: .*transformer\.h\.2\.ln_1\.bias")
    saved("gpt2", tmp_path)
    edit(tmp_path, lambda t: t.update({"transformer.wpe.weight": torch.ones(19, 12)}))
    refused(tmp_path, r"of a wrong shape: transformer\.wpe\.weight \(19, 12\) instead of \(20, 12\)")
    saved("gpt2", tmp_path)
    edit(tmp_path, lambda t: t.update({"transformer.h.0.mlp.c_fc.weight": torch.ones(48, 12)}))
    refused(tmp_path, r"c_fc\.weight \(48, 12\) instead of \(12, 48\)")
    saved("vit", tmp_path)
    edit(tmp_path, lambda t: t.update({"embeddings.position_embeddings": torch.ones(1, 6, 12)}))
    refused(tmp_path, r"position_embeddings \(1, 6, 12\) instead of \(1, 5, 12\)")


def test_many_names_are_cut_short(tmp_path: Path) -> None:
    saved("bert", tmp_path)
    edit(tmp_path, lambda t: [t.pop(key) for key in list(t) if "layer.1" in key])
    refused(tmp_path, r"missing: ([^,]+, ){4}[^,]+ and 11 more$")


@pytest.mark.parametrize("file", ["pytorch_model.bin", None])
def test_pickled_weights_are_refused(file: str | None, tmp_path: Path) -> None:
    saved("gpt2", tmp_path)
    (tmp_path / WEIGHTS).unlink()
    if file:
        torch.save({}, tmp_path / file)
    refused(tmp_path, r"has no model\.safetensors; pickled .* never loaded")


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"\xff" * 100])
def test_broken_safetensors(content: bytes, tmp_path: Path) -> None:
    saved("gpt2", tmp_path)
    (tmp_path / WEIGHTS).write_bytes(content)
    refused(tmp_path, r"model\.safetensors cannot be read")


def test_truncated_safetensors(tmp_path: Path) -> None:
    saved("gpt2", tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[: len(content) // 2])
    refused(tmp_path, r"model\.safetensors cannot be read")


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("gpt2", {"model_type": "llama"}, "model_type is 'llama'; supported are gpt2"),
        ("gpt2", {"model_type": ...}, "model_type is None"),
        ("gpt2", {"n_embd": ...}, "n_embd is missing"),
        ("gpt2", {"n_layer": "two"}, "depth"),
        ("gpt2", {"n_embd": None}, "n_embd is missing"),
        ("gpt2", {"n_embd": "12"}, "dim"),
        ("gpt2", {"n_embd": [12]}, "dim"),
        ("gpt2", {"n_embd": {}}, "malformed"),
        ("gpt2", {"model_type": ["gpt2"]}, "malformed"),
        ("gpt2", {"activation_function": ["gelu"]}, "malformed"),
        ("gpt2", {"activation_function": "mish"}, "'mish'; supported are gelu"),
        ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"n_head": 5}, "not divisible"),
        ("openai-gpt", {"afn": "gelu_new"}, "gelu_new"),
        ("bert", {"position_embedding_type": "relative_key"}, "relative_key"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("bert", {"architectures": ["BertForQuestionAnswering"]}, "architecture BertForQuestionAnswering"),
        ("bert-classification", {"problem_type": "ranking"}, "problem_type is 'ranking'; supported"),
        ("bert-classification", {"id2label": {"1": "a", "2": "b"}}, "must be 0, 1, 2"),
        ("bert-classification", {"id2label": ["a", "b"]}, "malformed"),
        ("bert-classification", {"id2label": {"a": "a", "b": "b"}}, "malformed"),
        ("bert-classification", {"id2label": {"0": 1, "1": None}}, "labels"),
        ("bert-classification", {"id2label": ..., "num_labels": "2"}, "malformed"),
        ("bert", {"architectures": 3}, "malformed"),
        ("vit-classification", {"architectures": 3}, "malformed"),
        ("vit", {"qkv_bias": False}, "qkv_bias"),
        ("vit", {"patch_size": [4, 2]}, "patch_size"),
        ("marian", {"scale_embedding": ...}, "scale_embedding is False"),
        ("marian", {"decoder_layers": 1}, "encoder_layers and decoder_layers"),
        ("marian", {"decoder_start_token_id": 1}, "pad_token_id and decoder_start_token_id"),
        ("marian", {"decoder_vocab_size": 99}, "decoder_vocab_size"),
        ("marian", {"normalize_before": True}, "normalize_before"),
    ],
)
def test_settings_that_are_not_supported(name: str, values: dict, message: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    configure(tmp_path, **values)
    assert str(tmp_path) in refused(tmp_path, message)


def test_folders_without_a_config(tmp_path: Path) -> None:
    refused(tmp_path, r"has no config\.json")
    (tmp_path / "config.json").write_text("[")
    refused(tmp_path, "not valid JSON")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, r"config\.json is malformed")


@pytest.mark.parametrize(
    "index", [[], {}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}, {"weight_map": 3}]
)
def test_malformed_indices(index: object, tmp_path: Path) -> None:
    saved("gpt2", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, r"model\.safetensors\.index\.json is malformed")


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    saved("gpt2", tmp_path)
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=300), "gpt", ["one two three"] * 9)
    tokenizer.save(tmp_path)
    size = tokenizer.vocab_size
    refused(tmp_path, f"the tokenizer in {tmp_path} has {size} tokens, its model only {theirs.VOCAB}")


def test_only_the_family_that_is_wanted(tmp_path: Path) -> None:
    saved("gpt2", tmp_path)
    assert hub.load(tmp_path, families=("gpt",)).model.config.family == "gpt"
    message = f"{tmp_path} is a gpt model; needed is bert"
    refused(tmp_path, message, families=("bert",))
    refused(tmp_path, message, families=("bert",), head="classification", labels=("a", "b"))


# ---------------------------------------------------------------- heads on demand


@pytest.mark.parametrize(
    ("source", "head", "labels", "fresh"),
    [
        ("bert-without-pooler", "pooler", (), {"pooler"}),
        ("bert", "none", (), set()),
        ("bert", "masked_lm", (), {"words"}),
        ("bert", "pretraining", (), {"words", "next_sentence"}),
        ("bert-masked-lm", "pretraining", (), {"pooler", "next_sentence"}),
        ("bert-pretraining", "masked_lm", (), set()),
        ("bert-pretraining", "classification", ("x", "y"), {"classifier"}),
        ("bert-masked-lm", "classification", ("x", "y"), {"classifier", "pooler"}),
        ("bert-pretraining", "tagging", ("x", "y"), {"classifier"}),
        ("bert-classification", "classification", (), set()),
        ("bert-classification", None, ("bad", "fair", "good"), set()),
        ("bert-classification", None, ("good", "fair", "bad"), {"classifier"}),
        ("bert-classification", "tagging", ("bad", "fair", "good"), {"classifier"}),
        ("bert-classification", "multi_label", ("bad", "fair", "good"), {"classifier"}),
        ("bert-masked-lm", "regression", ("score",), {"classifier", "pooler"}),
        ("bert-regression", "regression", ("score",), set()),
        ("vit-classification", None, ("bad", "fair", "good"), set()),
        ("vit-classification", None, ("x", "y"), {"classifier"}),
        ("vit", None, ("x", "y"), {"classifier"}),
        ("vit-convolutions", None, ("x", "y"), {"classifier"}),
        ("vit-convolutions-classification", None, ("bad", "fair", "good"), set()),
    ],
)
def test_heads_asked_for(source: str, head, labels: tuple[str, ...], fresh: set[str], tmp_path: Path) -> None:
    model = theirs.make(source)
    model.save_pretrained(tmp_path)
    declared = hub.load(tmp_path).model
    checkpoint = hub.load(tmp_path, head=head, labels=labels)
    assert {name.partition(".")[0] for name in checkpoint.fresh} == fresh
    state, before = checkpoint.model.state_dict(), declared.state_dict()
    for name in state.keys() & before.keys() - set(checkpoint.fresh):
        assert torch.equal(state[name], before[name])
    if isinstance(checkpoint.model.config, BertConfig):
        assert checkpoint.model.config.head == (head or "classification")
    hub.save(tmp_path / "again", checkpoint)
    theirs.compare(checkpoint.model, theirs.reopen(tmp_path / "again"))


def test_a_head_that_is_declared_must_be_there(tmp_path: Path) -> None:
    saved("bert", tmp_path)
    configure(tmp_path, architectures=["BertForMaskedLM"])
    refused(tmp_path, r"missing: cls\.predictions\.transform\.dense\.weight")
    saved("bert-masked-lm", tmp_path)
    edit(tmp_path, lambda t: t.pop("cls.predictions.transform.dense.bias"))
    refused(tmp_path, r"missing: cls\.predictions\.transform\.dense\.bias", head="masked_lm")


def test_heads_that_make_no_sense(tmp_path: Path) -> None:
    refused(saved("bert", tmp_path), "needs labels", head="classification")
    refused(tmp_path, "has no labels", head="masked_lm", labels=("a",))
    refused(tmp_path, "has no labels", labels=("a",))
    refused(saved("gpt2", tmp_path), "a gpt checkpoint has no head masked_lm", head="masked_lm")
    refused(tmp_path, "a gpt checkpoint has no head with labels", labels=("a",))
    refused(saved("vit", tmp_path), "a vit checkpoint has no head pooler", head="pooler")


# ---------------------------------------------------------------- what no format can express


SIZES = {"dim": 12, "depth": 1, "heads": 2, "mlp_dim": 48}
TEXT = {**SIZES, "vocab_size": 9, "context": 5}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPTConfig(**TEXT, position="rotary", norm_first=False), "persimmon is pre-norm"),
        (GPTConfig(**TEXT, qk_norm=True), "gpt2 has no model.qk_norm"),
        (GPTConfig(**TEXT, qk_norm=True, norm_first=False), "openai-gpt has no model.qk_norm"),
        (GPTConfig(**{**TEXT, "mlp_dim": 47}, norm_first=False), "mlp_dim = 4"),
        (GPTConfig(**TEXT, norm_first=False, activation="gelu"), "gelu_tanh"),
        (BertConfig(**TEXT, norm_first=True), "post-norm"),
        (BertConfig(**TEXT, head="classification", labels=("only",)), "at least two labels"),
        (TransformerConfig(**TEXT, norm_first=True), "post-norm"),
        (TransformerConfig(**TEXT, norm_eps=1e-6), "norm_eps"),
        (ViTConfig(**SIZES, norm_first=False), "pre-norm"),
        (ViTConfig(**SIZES, qk_norm=True), "vit has no model.qk_norm"),
    ],
)
def test_models_that_cannot_be_saved(config, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        hub.check_savable(config)
    with pytest.raises(InputError, match=message):
        hub.save(tmp_path / "new", hub.Checkpoint(build(config)))
    assert not (tmp_path / "new").exists()


def test_pooling_is_for_bert(tmp_path: Path) -> None:
    model = build(replace(GPTConfig(), **TEXT))
    with pytest.raises(InputError, match="pooling is for bert"):
        hub.save(tmp_path / "new", hub.Checkpoint(model, pooling=Pooling()))
