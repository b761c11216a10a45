"""Runs that train adapters: what they change, what they leave, and that resuming them is exact."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import samples
import torch
from safetensors.torch import load_file
from test_train import FAMILIES, Nobody, assert_equal_runs, run_config

from qkv import hub
from qkv.config import BertConfig, DataConfig, LoraConfig, RunConfig, TokenizerConfig, read_toml
from qkv.errors import InputError
from qkv.evaluate import score
from qkv.hub import Checkpoint
from qkv.job import new_job, resumed_job
from qkv.lora import Adapted
from qkv.models import build
from qkv.pipelines import from_pretrained
from qkv.stream import work
from qkv.train import train

LORA = LoraConfig(rank=4, alpha=8)


def tuning(folder: Path, family: str, **changes) -> RunConfig:
    """Settings of a run with adapters on a model of that family, which is trained first."""
    config = run_config(folder, family, max_steps=2)
    train(new_job(config), folder / "base", Nobody())
    settings = {"max_steps": 60, "learning_rate": 2e-2, **changes}
    return replace(config, train=replace(config.train, **settings), init=str(folder / "base"), lora=LORA)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_learn_and_the_base_stays(family: str, tmp_path: Path):
    config = tuning(tmp_path, family)
    before = score(str(tmp_path / "base"))
    best = train(new_job(config), tmp_path / "run", Nobody())
    assert best.best_scores["loss"] < 0.97 * before["loss"]
    assert score(str(tmp_path / "run"))["loss"] == pytest.approx(best.best_scores["loss"], rel=1e-4)
    base, tuned = (from_pretrained(tmp_path / name).model.state_dict() for name in ("base", "run"))
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    targets = ("qkv.weight", "out.weight", "up.weight", "down.weight")
    assert changed == {
        name for name in base if name.endswith(targets) or name.startswith(("pooler.", "classifier."))
    }
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert read_toml(tmp_path / "run" / "config.toml").lora == LORA


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_answer_faster_too(family: str, tmp_path: Path):
    train(new_job(tuning(tmp_path, family, max_steps=3)), tmp_path / "run", Nobody())
    exact, quick = (score(str(tmp_path / "run"), precision=precision) for precision in (None, "fp32"))
    assert quick["loss"] == pytest.approx(exact["loss"], rel=1e-4)


def test_what_is_kept_of_a_corpus_belongs_to_one_scale_of_an_adapter(tmp_path: Path):
    train(new_job(tuning(tmp_path, "bert", max_steps=3)), tmp_path / "run", Nobody())
    before = work(from_pretrained(tmp_path / "run"), "a corpus")
    assert work(from_pretrained(tmp_path / "run"), "a corpus") == before
    path = tmp_path / "run" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 9}))
    assert work(from_pretrained(tmp_path / "run"), "a corpus") != before


@pytest.mark.parametrize("family", FAMILIES)
def test_resuming_is_exact(family: str, tmp_path: Path):
    config = tuning(tmp_path, family, max_steps=8, save_steps=3, eval_steps=4, logging_steps=1)
    config = replace(config, lora=replace(LORA, dropout=0.2))
    train(new_job(config), tmp_path / "whole", Nobody())
    with pytest.raises(KeyboardInterrupt):
        train(new_job(config), tmp_path / "cut", Nobody(interrupt_at=5))
    train(resumed_job(tmp_path / "cut"), tmp_path / "cut", Nobody(), resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")
    files = [load_file(tmp_path / run / "adapter_model.safetensors") for run in ("whole", "cut")]
    torch.testing.assert_close(*files, atol=0, rtol=0)


def test_a_masked_language_model_becomes_a_classifier(tmp_path: Path):
    config = run_config(tmp_path, "bert", max_steps=2)
    documents = replace(config, data=DataConfig(path=samples.documents(tmp_path)))
    train(new_job(documents), tmp_path / "mlm", Nobody())
    longer = replace(config.train, max_steps=60)
    tuned = replace(config, init=str(tmp_path / "mlm"), lora=LORA, train=longer)
    best = train(new_job(tuned), tmp_path / "run", Nobody())
    assert best.best_scores["label_accuracy"] > 0.9
    [guess] = from_pretrained(tmp_path / "run").classify(["red green fine"], top_k=1)[0]
    assert guess.name == "good"


def test_a_base_that_adapters_cannot_belong_to(tmp_path: Path):
    config = tuning(tmp_path, "bert", max_steps=1)
    train(new_job(config), tmp_path / "run", Nobody())
    with pytest.raises(InputError, match=r"is itself an adapter: .* `qkv export .*` first"):
        new_job(replace(config, init=str(tmp_path / "run")))
    hub.save(tmp_path / "merged", hub.load(tmp_path / "run"))
    new_job(replace(config, init=str(tmp_path / "merged")))
    with pytest.raises(InputError, match="has no words head, and adapters alone cannot make one"):
        new_job(replace(config, data=DataConfig(path=samples.documents(tmp_path))))


def test_settings_of_adapters_or_a_tokenizer_that_would_do_nothing(tmp_path: Path):
    config = tuning(tmp_path, "bert", max_steps=1)
    with pytest.raises(InputError, match=r"without lora\.rank there are no adapters"):
        new_job(replace(config, lora=LoraConfig(alpha=32.0)))
    with pytest.raises(InputError, match=r"leave out tokenizer\.path"):
        new_job(replace(config, tokenizer=TokenizerConfig(path=config.init)))


def test_the_base_is_named_so_that_it_is_found_from_every_folder(tmp_path: Path, monkeypatch):
    config = tuning(tmp_path, "vit", max_steps=1)
    monkeypatch.chdir(tmp_path)
    train(new_job(replace(config, init="base")), tmp_path / "run", Nobody())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert score("../run")["samples"] > 0


def test_dropout_of_adapters_is_for_training_only():
    linear = torch.nn.Linear(6, 9)
    layer = Adapted(linear, 3, LoraConfig(rank=2, dropout=0.5))
    torch.nn.init.normal_(layer.B)
    x = torch.randn(50, 6)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    learned = torch.cat([B @ A for A, B in zip(layer.A, layer.B, strict=True)]) * 16 / 2
    torch.testing.assert_close(layer(x), x @ (linear.weight + learned).T + linear.bias)
    for part in (slice(3), slice(3, 9), slice(6, 9)):
        torch.testing.assert_close(layer.part(x, part), layer(x)[:, part])


def test_adapters_start_as_pefts_do():
    """A uniform up to 1 / sqrt(inputs) in size, B zero (Kaiming's bound with a = sqrt(5))."""
    layer = Adapted(torch.nn.Linear(400, 600), 2, LoraConfig(rank=8))
    assert layer.A.shape == (2, 8, 400)
    assert layer.B.shape == (2, 300, 8)
    assert not layer.B.any()
    assert layer.A.abs().max() <= 400**-0.5
    assert layer.A.std().item() == pytest.approx((400 * 3) ** -0.5, rel=0.05)


def test_only_what_learned_is_on_disk(tmp_path: Path):
    model = build(BertConfig(vocab_size=11, context=8, dim=8, depth=1, heads=2, mlp_dim=16, head="masked_lm"))
    hub.save(tmp_path / "base", Checkpoint(model))
    checkpoint = hub.load(tmp_path / "base")
    hub.adapt(checkpoint, LoraConfig(rank=2, targets=("qkv", "down")), "base")
    hub.save(tmp_path / "run", checkpoint)
    shapes = {k: tuple(t.shape) for k, t in load_file(tmp_path / "run" / "adapter_model.safetensors").items()}
    layer = "base_model.model.bert.encoder.layer.0"
    expected = {f"{layer}.output.dense.lora_A.weight": (2, 16), f"{layer}.output.dense.lora_B.weight": (8, 2)}
    for part in ("query", "key", "value"):
        name = f"{layer}.attention.self.{part}.lora"
        expected |= {f"{name}_A.weight": (2, 8), f"{name}_B.weight": (8, 2)}
    assert shapes == expected
