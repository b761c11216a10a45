"""Adapters in peft's format in both directions, with peft as the independent judge."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from qkv import hub
from qkv.config import LoraConfig
from qkv.errors import InputError
from qkv.lora import adapted, head

from . import theirs

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
NAMES = [
    "gpt2",
    "openai-gpt",
    "persimmon-qk-norm",
    "bert",
    "bert-classification",
    "bert-tagging",
    "vit-classification",
    "vit-convolutions-classification",
    "vit-rotary-classification",
    "marian",
    "rotary-marian-qk-norm",
]


def stir(model: nn.Module) -> None:
    """Make all that is trained far from its initial value."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def base(name: str, folder: Path) -> transformers.PreTrainedModel:
    """A model that transformers has saved and opened again, so that it knows its folder."""
    model = theirs.make(name)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def made_by_peft(name: str, folder: Path, **settings: Any) -> peft.PeftModel:
    """A trained adapter in folder/adapter, of the checkpoint in folder/base."""
    config = peft.LoraConfig(r=3, lora_alpha=5, **settings)
    model = peft.get_peft_model(base(name, folder / "base"), config).eval()
    stir(model)
    model.save_pretrained(folder / "adapter")
    return model


def made_here(folder: Path, config: LoraConfig, **asked: Any) -> hub.Checkpoint:
    """A trained adapter in folder/adapter, of the checkpoint in folder/base."""
    checkpoint = hub.load(folder / "base", **asked)
    hub.adapt(checkpoint, config, str(folder / "base"))
    stir(checkpoint.model)
    hub.save(folder / "adapter", checkpoint)
    return checkpoint


def opened_by_peft(model: transformers.PreTrainedModel, folder: Path) -> transformers.PreTrainedModel:
    """An adapter on its base; peft warns of tensors that it misses or cannot place."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(model, folder).eval().get_base_model()


# ---------------------------------------------------------------- both directions


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "task_type": "CAUSAL_LM"}),
        ("gpt2-bare", {"target_modules": ["c_fc", "attn.c_proj"], "modules_to_save": ["ln_f"]}),
        ("openai-gpt", {"target_modules": "all-linear"}),
        ("bert", {"target_modules": ["query", "value"], "modules_to_save": ["pooler"]}),
        ("bert-classification", {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"}),
        ("bert-tagging", {"target_modules": r".*layer\.1\..*(key|dense)", "task_type": "TOKEN_CLS"}),
        ("bert-masked-lm", {"target_modules": "all-linear", "exclude_modules": []}),
        ("vit-classification", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
        ("vit-convolutions-classification", {"target_modules": "all-linear"}),
        ("marian", {"target_modules": ["q_proj", "v_proj", "fc2"], "task_type": "SEQ_2_SEQ_LM"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_peft_saves_is_loaded_with_the_same_answers(name: str, settings: dict, tmp_path: Path) -> None:
    model = made_by_peft(name, tmp_path, **settings)
    ours = hub.load(tmp_path / "adapter")
    assert ours.fresh == ()
    theirs.compare(ours.model, model.get_base_model())
    with pytest.raises(AssertionError):  # and they are not the base's
        theirs.compare(hub.load(tmp_path / "base").model, model.get_base_model())


@pytest.mark.parametrize("targets", [("qkv", "out", "up", "down"), ("qkv",), ("out", "up"), ("down",)])
@pytest.mark.parametrize("name", NAMES)
def test_what_we_save_peft_loads_with_the_same_answers(name: str, targets: tuple, tmp_path: Path) -> None:
    model = base(name, tmp_path / "base")
    trained = made_here(tmp_path, LoraConfig(rank=3, alpha=5, targets=targets)).model
    theirs.compare(trained, opened_by_peft(model, tmp_path / "adapter"))
    merged = hub.load(tmp_path / "adapter").model
    assert not adapted(merged)
    found, expected = theirs.our_answers(merged), theirs.our_answers(trained)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_modules_are_named_as_peft_users_name_them(tmp_path: Path) -> None:
    names = {
        "gpt2": ["attn.c_attn"],
        "bert-classification": [f"attention.self.{x}" for x in ("key", "query", "value")],
        "marian": [f"{a}.{x}_proj" for a in ("encoder_attn", "self_attn") for x in "kqv"],
    }
    for name, expected in names.items():
        folder = tmp_path / name
        base(name, folder / "base")
        made_here(folder, LoraConfig(rank=1, targets=("qkv",)))
        settings = json.loads((folder / "adapter" / SETTINGS).read_text())
        assert settings["target_modules"] == expected
        assert settings["modules_to_save"] == (
            ["classifier", "pooler.dense"] if name == "bert-classification" else None
        )


@pytest.mark.parametrize("name", ["bert-masked-lm", "bert-without-pooler", "bert-pretraining", "vit"])
def test_a_fresh_head_is_saved_beside_the_adapters(name: str, tmp_path: Path) -> None:
    base(name, tmp_path / "base")
    labels = ("bad", "fair", "good")
    asked = {"labels": labels} if name == "vit" else {"labels": labels, "head": "classification"}
    trained = made_here(tmp_path, LoraConfig(rank=2), **asked).model
    again = hub.load(tmp_path / "adapter")
    assert again.model.config == trained.config
    torch.testing.assert_close(
        theirs.our_answers(again.model), theirs.our_answers(trained), atol=1e-5, rtol=1e-5
    )
    architecture = "ViTForImageClassification" if name == "vit" else "BertForSequenceClassification"
    model = getattr(transformers, architecture).from_pretrained(tmp_path / "base", num_labels=len(labels))
    theirs.compare(trained, opened_by_peft(model, tmp_path / "adapter"))


# ---------------------------------------------------------------- the model while it is trained


@pytest.mark.parametrize("name", NAMES)
def test_fresh_adapters_change_nothing_and_alone_have_gradients(name: str, tmp_path: Path) -> None:
    base(name, tmp_path)
    checkpoint = hub.load(tmp_path)
    before = {key: value.clone() for key, value in theirs.our_answers(checkpoint.model).items()}
    hub.adapt(checkpoint, LoraConfig(rank=2), str(tmp_path))
    model = checkpoint.model
    torch.testing.assert_close(theirs.our_answers(model), before, atol=1e-6, rtol=1e-6)
    stir(model)
    loss = theirs.our_answers.__wrapped__(model)  # without its no_grad
    sum(value.square().sum() for value in loss.values()).backward()
    whole = tuple(f"{module}." for module in head(model))
    parameters = dict(model.named_parameters())
    trained = {key for key in parameters if key.endswith((".A", ".B")) or key.startswith(whole)}
    assert {key for key, p in parameters.items() if p.grad is not None and p.grad.any()} == trained


def test_an_adapter_of_half_its_alpha_adds_half(tmp_path: Path) -> None:
    base("gpt2", tmp_path / "base")
    made_here(tmp_path, LoraConfig(rank=4, alpha=8))
    plain = hub.load(tmp_path / "base").model.state_dict()
    full = hub.load(tmp_path / "adapter").model.state_dict()
    configure(tmp_path, lora_alpha=4)
    half = hub.load(tmp_path / "adapter").model.state_dict()
    for name, weight in plain.items():
        torch.testing.assert_close(half[name] - weight, (full[name] - weight) / 2)


# ---------------------------------------------------------------- what does not fit


def test_an_adapter_of_a_sentence_encoder_pools_as_its_base_does(tmp_path: Path) -> None:
    made_by_peft("bert", tmp_path, target_modules=["query"])
    modules = [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]
    (tmp_path / "base" / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "base" / "1_Pooling").mkdir()
    (tmp_path / "base" / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert hub.load(tmp_path / "adapter").pooling == hub.load(tmp_path / "base").pooling
    assert hub.load(tmp_path / "base").pooling.mode == "cls"


def configure(folder: Path, **values: object) -> None:
    path = folder / "adapter" / SETTINGS
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder: Path, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern) as error:
        hub.load(folder / "adapter")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ours", [True, False])
def test_every_tensor_of_an_adapter_is_needed(ours: bool, tmp_path: Path) -> None:
    if ours:
        base("bert-classification", tmp_path / "base")
        made_here(tmp_path, LoraConfig(rank=2))
    else:
        targets = ["query", "value", "dense"]
        made_by_peft("bert-classification", tmp_path, target_modules=targets, task_type="SEQ_CLS")
    whole = load_file(tmp_path / "adapter" / WEIGHTS)
    assert any("classifier" in name for name in whole)
    for missing in whole:
        save_file({k: v for k, v in whole.items() if k != missing}, tmp_path / "adapter" / WEIGHTS)
        refused(tmp_path, f"missing: {missing}$")


def test_tensors_that_do_not_fit_the_base_are_named(tmp_path: Path) -> None:
    made_by_peft("vit-classification", tmp_path, target_modules=["q_proj"], modules_to_save=["classifier"])
    whole = load_file(tmp_path / "adapter" / WEIGHTS)
    name = "base_model.model.vit.layers.1.attention.q_proj.lora_A.weight"
    for extra in ("base_model.model.vit.layers.2.attention.q_proj.lora_A.weight", "nonsense"):
        save_file({**whole, extra: torch.ones(3, 12)}, tmp_path / "adapter" / WEIGHTS)
        refused(tmp_path, rf"unexpected: .*{extra}")
    save_file({**whole, name: torch.ones(4, 12)}, tmp_path / "adapter" / WEIGHTS)
    refused(tmp_path, rf"of a wrong shape: {name} \(4, 12\) instead of \(3, 12\)")
    (tmp_path / "adapter" / WEIGHTS).unlink()
    torch.save({}, tmp_path / "adapter" / "adapter_model.bin")
    refused(tmp_path, r"has no adapter_model\.safetensors; pickled")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"use_rslora": True}, "use_rslora is True"),
        ({"rank_pattern": {"c_attn": 4}}, "rank_pattern"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA' is supported"),
        ({"of_the_future": {"x": 1}}, "of_the_future"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path must name"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "no folder /nowhere/at/all"),
        ({"r": "many"}, "r is 'many'"),
        ({"target_modules": "(c_attn"}, "target_modules is '.c_attn', no regular expression"),
        ({"target_modules": 3}, "malformed"),
        ({"lora_alpha": "much"}, "malformed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_are_not_supported_are_named(settings: dict, message: str, tmp_path: Path) -> None:
    made_by_peft("gpt2", tmp_path, target_modules=["c_attn"])
    hub.load(tmp_path / "adapter")
    configure(tmp_path, **settings)
    refused(tmp_path, rf"adapter_config\.json.*{message}")


def test_an_adapter_of_an_adapter_is_refused(tmp_path: Path) -> None:
    made_by_peft("gpt2", tmp_path, target_modules=["c_attn"])
    configure(tmp_path, base_model_name_or_path=str(tmp_path / "adapter"))
    refused(tmp_path, "is itself an adapter")


def test_a_whole_model_and_an_adapter_replace_each_other_in_a_folder(tmp_path: Path) -> None:
    base("gpt2", tmp_path / "base")
    trained = made_here(tmp_path, LoraConfig(rank=2))
    expected = theirs.our_answers(trained.model)
    hub.save(tmp_path / "whole", hub.load(tmp_path / "adapter"))
    theirs.compare(trained.model, theirs.reopen(tmp_path / "whole"))
    for source, weights in (("adapter", "model.safetensors"), ("whole", WEIGHTS)):
        checkpoint = trained if source == "whole" else hub.load(tmp_path / source)
        hub.save(tmp_path / source, checkpoint)
        assert (tmp_path / source / weights).is_file()
        assert sum((tmp_path / source / file).is_file() for file in (WEIGHTS, "model.safetensors")) == 1
        found = theirs.our_answers(hub.load(tmp_path / source).model)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_a_task_of_peft_means_is_the_bases_to_say(tmp_path: Path) -> None:
    """peft calls regression and several labels sequence classification too."""
    for kind, outputs in (("regression", 1), ("multi_label_classification", 3)):
        folder = tmp_path / kind
        config = theirs.make("bert-classification").config
        config.num_labels, config.problem_type = outputs, kind
        transformers.BertForSequenceClassification(config).save_pretrained(folder / "base")
        model = transformers.BertForSequenceClassification.from_pretrained(folder / "base").eval()
        settings = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
        adapted_model = peft.get_peft_model(model, settings).eval()
        stir(adapted_model)
        adapted_model.save_pretrained(folder / "adapter")
        ours = hub.load(folder / "adapter").model
        assert ours.config.head == kind.removesuffix("_classification")
        theirs.compare(ours, adapted_model.get_base_model())


@pytest.mark.parametrize(
    ("make", "task", "outputs", "head"),
    [
        (transformers.BertForSequenceClassification, "SEQ_CLS", 3, "classification"),
        (transformers.BertForSequenceClassification, "SEQ_CLS", 1, "regression"),
        (transformers.BertForTokenClassification, "TOKEN_CLS", 3, "tagging"),
    ],
)
def test_a_classifier_that_only_the_adapter_has(
    make: Any, task: str, outputs: int, head: str, tmp_path: Path
) -> None:
    """peft keeps no names of classes, and a pretrained base has none."""
    theirs.make("bert-pretraining").save_pretrained(tmp_path / "base")
    model = make.from_pretrained(tmp_path / "base", num_labels=outputs).eval()
    adapted_model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], task_type=task))
    stir(adapted_model.eval())
    adapted_model.save_pretrained(tmp_path / "adapter")
    ours = hub.load(tmp_path / "adapter").model
    assert ours.config.head == head
    assert ours.config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")[:outputs]
    theirs.compare(ours, adapted_model.get_base_model())


@pytest.mark.parametrize(
    ("name", "architecture", "settings"),
    [
        ("vit", "ViTForImageClassification", {"modules_to_save": ["classifier"]}),
        ("vit-classification", "ViTForImageClassification", {"modules_to_save": ["classifier"]}),
        ("bert-classification", "BertForSequenceClassification", {"task_type": "SEQ_CLS"}),
    ],
)
def test_a_classifier_of_other_classes_than_the_base_has(
    name: str, architecture: str, settings: dict, tmp_path: Path
) -> None:
    theirs.make(name).save_pretrained(tmp_path / "base")
    made = getattr(transformers, architecture)
    model = made.from_pretrained(tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True).eval()
    targets = ["q_proj"] if name.startswith("vit") else ["query"]
    adapted_model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **settings))
    stir(adapted_model.eval())
    adapted_model.save_pretrained(tmp_path / "adapter")
    ours = hub.load(tmp_path / "adapter").model
    assert ours.config.labels == tuple(f"LABEL_{i}" for i in range(5))
    theirs.compare(ours, adapted_model.get_base_model())


@pytest.mark.parametrize(
    "asked",
    [{"head": "tagging", "labels": ("bad", "good")}, {"head": "classification", "labels": ("good", "bad")}],
    ids=["head", "labels"],
)
def test_an_adapter_has_the_head_that_it_was_trained_with(asked: dict, tmp_path: Path) -> None:
    base("bert", tmp_path / "base")
    made_here(tmp_path, LoraConfig(rank=2), head="classification", labels=("bad", "good"))
    assert hub.load(tmp_path / "adapter", head="classification", labels=("bad", "good")).fresh == ()
    with pytest.raises(InputError, match="another head or other labels: write its whole model"):
        hub.load(tmp_path / "adapter", **asked)
