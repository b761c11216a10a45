"""Every family learns from raw files; accumulation changes nothing; resuming is exact, also after kill -9."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import samples
import torch
from PIL import Image
from safetensors.torch import load_file

from qkv import hub
from qkv.checkpoint import CONFIG, read_metrics, saved_states
from qkv.config import (
    AugmentConfig,
    BertConfig,
    DataConfig,
    GPTConfig,
    LoraConfig,
    RunConfig,
    TokenizerConfig,
    TrainConfig,
    TransformerConfig,
    ViTConfig,
    read_toml,
    write_toml,
)
from qkv.errors import InputError
from qkv.evaluate import evaluate, score
from qkv.hub import Checkpoint
from qkv.job import Job, new_job, resumed_job
from qkv.objectives import Objective, item_counts
from qkv.observe import Observer, Record
from qkv.pipelines import from_pretrained
from qkv.report.run import RunReport
from qkv.train import train

SIZES = {"dim": 32, "depth": 1, "heads": 2, "mlp_dim": 64, "dropout": 0.1}
MODELS = {
    "gpt": GPTConfig(**SIZES, context=32),
    "bert": BertConfig(**SIZES, context=32),
    "transformer": TransformerConfig(**SIZES, context=32),
    "vit": ViTConfig(**SIZES, image_size=0, patch_size=4),
}
FAMILIES = list(MODELS)
TOKENIZERS = {"bert": TokenizerConfig(kind="wordpiece", vocab_size=200)}


class Nobody(Observer):
    """An observer that only remembers, and can stop the run as Ctrl-C would."""

    def __init__(self, interrupt_at: int = 0) -> None:
        self.said: list[str] = []
        self.interrupt_at = interrupt_at

    def say(self, message: str) -> None:
        self.said.append(message)

    def begin(self, config: RunConfig, step: int) -> None:
        self.first = step

    def step(self, step: int, record: Record) -> None:
        if step == self.interrupt_at:
            signal.raise_signal(signal.SIGINT)

    def evaluated(self, step: int, scores: Record, checkpoint: Checkpoint) -> None:
        self.scores = scores


def run_config(folder: Path, family: str, **changes) -> RunConfig:
    settings = {
        "max_steps": 60,
        "batch_tokens": 256,
        "learning_rate": 1e-2,
        "warmup_steps": 10,
        "eval_steps": 30,
        "save_steps": 30,
        "precision": "fp32",
        **changes,
    }
    return RunConfig(
        model=MODELS[family],
        tokenizer=TOKENIZERS.get(family, TokenizerConfig(kind="char")),
        data=DataConfig(path=samples.write(folder, family)),
        train=TrainConfig(**settings),
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {
        name: t
        for name, t in load_file(next(saved_states(run)[-1].glob("*.safetensors"))).items()
        if name.startswith(("model.", "optimizer."))
    }


def assert_equal_runs(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    timeless = [[{**r, "seconds": 0} for r in read_metrics(run)] for run in (one, other)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_learns_from_files_and_scores_itself(family, tmp_path):
    run = tmp_path / "run"
    job = new_job(run_config(tmp_path, family))
    untrained = evaluate(Objective(job.checkpoint.model), job.valid)
    best = train(job, run, Nobody())
    losses = [r["loss"] for r in read_metrics(run) if "loss" in r]
    assert losses[-1] < 0.7 * losses[0]
    assert best.best_scores["loss"] < 0.7 * untrained["loss"]
    again = score(str(run))
    assert again["loss"] == pytest.approx(best.best_scores["loss"], rel=1e-4)
    assert read_toml(run / "config.toml") == job.config
    if family in ("bert", "vit"):
        assert best.best_scores["label_accuracy"] > 0.9
        assert job.config.model.labels == (("bad", "good") if family == "bert" else ("bright", "dark"))


def test_a_run_says_how_often_it_goes_through_its_data(tmp_path):
    nobody = Nobody()
    config = run_config(tmp_path, "vit", max_steps=4, batch_tokens=40)  # 36 images of 4 patches, 10 in a step
    train(new_job(config), tmp_path / "run", nobody)
    assert nobody.said[-1] == (
        "Each image is read as 8 x 8 pixels. 144 tokens, room for 40 in a step: the run goes through them "
        "1.0 times. The learning rate is still rising when it ends: lower train.warmup_steps."
    )
    changes = {"batch_tokens": 3, "warmup_steps": 0, "average_checkpoints": 2, "save_steps": 4}
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
    train(new_job(config), tmp_path / "averaged", nobody)
    assert nobody.said[-1].endswith(
        " A step has up to 4 of them, as no sample is divided. No state is saved before it ends, so none is "
        "averaged: lower train.save_steps."
    )


@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_a_model_in_its_mode(training, tmp_path):
    job = new_job(run_config(tmp_path, "transformer"))
    model = job.checkpoint.model.train(training)
    evaluate(Objective(model), job.valid)
    assert {module.training for module in model.modules()} == {training}


def test_masked_words_and_next_sentence_from_documents(tmp_path):
    config = run_config(tmp_path, "bert", batch_tokens=512)
    config = dataclasses.replace(config, data=DataConfig(path=samples.documents(tmp_path)))
    job = new_job(config)
    untrained = evaluate(Objective(job.checkpoint.model), job.valid)
    best = train(job, tmp_path / "run", Nobody())
    assert job.config.model.head == "pretraining"
    assert best.best_scores["masked_word_loss"] < 0.6 * untrained["masked_word_loss"]
    assert {"next_sentence_loss", "next_sentence_accuracy"} <= best.best_scores.keys()
    fine = dataclasses.replace(
        config,
        data=DataConfig(path=samples.labelled(tmp_path)),
        train=dataclasses.replace(config.train, learning_rate=3e-3),
        init=str(tmp_path / "run"),
    )
    tuned = new_job(fine)
    assert tuned.config.model.head == "classification"
    assert torch.equal(
        tuned.checkpoint.model.tokens.weight, from_pretrained(tmp_path / "run").model.tokens.weight
    )
    assert train(tuned, tmp_path / "tuned", Nobody()).best_scores["label_accuracy"] > 0.9


def test_fresh_weights_read_the_tokens_of_another_run(tmp_path, monkeypatch):
    config = run_config(tmp_path, "bert", max_steps=1)
    train(
        new_job(dataclasses.replace(config, data=DataConfig(path=samples.documents(tmp_path)))),
        tmp_path / "run",
        Nobody(),
    )
    theirs = from_pretrained(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    job = new_job(dataclasses.replace(config, tokenizer=TokenizerConfig(path="run")))
    assert job.checkpoint.tokenizer.definition == theirs.tokenizer.definition
    assert job.config.model.vocab_size == theirs.model.config.vocab_size
    assert not torch.equal(job.checkpoint.model.tokens.weight, theirs.model.tokens.weight)
    train(job, tmp_path / "fresh", Nobody())
    monkeypatch.chdir("/")  # the run's config means the same from every folder
    again = new_job(read_toml(tmp_path / "fresh" / "config.toml"))
    assert again.train.fingerprint == job.train.fingerprint
    gpt = dataclasses.replace(
        run_config(tmp_path, "gpt"), tokenizer=TokenizerConfig(path=str(tmp_path / "run"))
    )
    with pytest.raises(InputError, match=r"the tokenizer of .*run has no bos token, which a gpt needs"):
        new_job(gpt)


def test_tokens_that_frame_a_text_in_another_way_than_a_family_learns_it_are_refused(tmp_path):
    """Prompts and sources would begin or end with tokens that were never trained, or lack one that was."""
    train(new_job(run_config(tmp_path, "transformer", max_steps=1)), tmp_path / "run", Nobody())
    tokens = TokenizerConfig(path=str(tmp_path / "run"))
    config = dataclasses.replace(run_config(tmp_path, "transformer"), tokenizer=tokens)
    assert new_job(config).checkpoint.tokenizer.encode("a").ids
    path = tmp_path / "run" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    with pytest.raises(InputError, match="frames a text with other tokens than a transformer learns it with"):
        new_job(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulation_changes_neither_loss_nor_gradient(family, tmp_path):
    config = run_config(tmp_path, family)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, dropout=0.0, attention_dropout=0.0)
    )
    job = new_job(config)
    indices = list(range(min(16, len(job.train))))
    whole = step_gradient(job, [indices])
    pieces = step_gradient(job, [indices[:1], indices[1:6], indices[6:]])
    assert pieces[0] == pytest.approx(whole[0], rel=1e-5)
    for a, b in zip(whole[1], pieces[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_accumulation_changes_nothing_of_augmented_images(tmp_path):
    job = new_job(augmented(run_config(tmp_path, "vit"), dropout=0.0))
    whole = step_gradient(job, [list(range(16))])
    pieces = step_gradient(job, [[0], [1, 2, 3, 4, 5], list(range(6, 16))])
    assert pieces[0] == pytest.approx(whole[0], rel=1e-5)
    for a, b in zip(whole[1], pieces[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_convolutional_stem_learns_is_divided_and_tuned_like_any_vit(tmp_path):
    config = run_config(tmp_path, "vit")
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, stem="convolutions", dropout=0.0)
    )
    job = new_job(config)
    whole = step_gradient(job, [list(range(16))])
    pieces = step_gradient(job, [[0], [1, 2, 3, 4, 5], list(range(6, 16))])
    assert pieces[0] == pytest.approx(whole[0], rel=1e-5)
    for a, b in zip(whole[1], pieces[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    best = train(job, tmp_path / "run", Nobody())
    assert best.best_scores["label_accuracy"] > 0.9
    assert score(str(tmp_path / "run"))["loss"] == pytest.approx(best.best_scores["loss"], rel=1e-4)
    tuned = dataclasses.replace(
        run_config(tmp_path / "again", "vit", max_steps=2),
        init=str(tmp_path / "run"),
        lora=LoraConfig(rank=2),
    )
    best = train(new_job(tuned), tmp_path / "tuned", Nobody())
    assert read_toml(tmp_path / "tuned" / "config.toml").model.stem == "convolutions"
    assert score(str(tmp_path / "tuned"))["loss"] == pytest.approx(best.best_scores["loss"], rel=1e-4)


def augmented(config: RunConfig, **model) -> RunConfig:
    """With all augmentations."""
    everything = AugmentConfig(
        crop_area=0.3, crop_padding=1, flip=True, randaugment=2, erasing=0.5, mixup=0.8, cutmix=1.0
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model), augment=everything)


def step_gradient(job: Job, parts: list[list[int]]):
    model = job.checkpoint.model
    model.zero_grad()
    batches = [job.train.batch(part, 0).to("cpu") for part in parts]
    counts = {name: sum(item_counts(b)[name] for b in batches) for name in item_counts(batches[0])}
    objective = Objective(model)
    losses = [objective(batch, counts) for batch in batches]
    for loss in losses:
        loss.backward()
    return sum(loss.item() for loss in losses), [
        p.grad.clone() for p in model.parameters() if p.grad is not None
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_resume_after_an_interrupt_is_exact(family, tmp_path):
    config = run_config(
        tmp_path,
        family,
        optimizer="muon" if family == "gpt" else "adamw",
        max_steps=12,
        save_steps=5,
        eval_steps=4,
        logging_steps=1,
        warmup_steps=2,
    )
    train(new_job(config), tmp_path / "whole", Nobody())
    with pytest.raises(KeyboardInterrupt):
        train(new_job(config), tmp_path / "cut", Nobody(interrupt_at=7))
    assert read_metrics(tmp_path / "cut")[-1]["step"] == 7
    rest = Nobody()
    train(resumed_job(tmp_path / "cut"), tmp_path / "cut", rest, resume=True)
    assert rest.first == 7
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_resume_with_all_augmentations_and_drop_path_is_exact(tmp_path):
    config = run_config(tmp_path, "vit", max_steps=9, save_steps=4, eval_steps=3, logging_steps=1)
    config = augmented(config, drop_path=0.3, depth=2)
    train(new_job(config), tmp_path / "whole", Nobody())
    with pytest.raises(KeyboardInterrupt):
        train(new_job(config), tmp_path / "cut", Nobody(interrupt_at=5))
    train(resumed_job(tmp_path / "cut"), tmp_path / "cut", Nobody(), resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_a_model_learns_from_varied_images(tmp_path):
    config = augmented(run_config(tmp_path, "vit"))
    gentle = AugmentConfig(crop_padding=1, flip=True, erasing=0.5, mixup=0.2, cutmix=1.0)
    best = train(new_job(dataclasses.replace(config, augment=gentle)), tmp_path / "run", Nobody())
    assert best.best_scores["label_accuracy"] > 0.9
    assert score(str(tmp_path / "run"))["loss"] == pytest.approx(best.best_scores["loss"], rel=1e-4)


def test_resume_after_kill_9_is_exact(tmp_path):
    config = run_config(tmp_path, "gpt", max_steps=60, save_steps=7, eval_steps=20, logging_steps=1)
    (tmp_path / "recipe.toml").write_text(write_toml(config))
    command = [sys.executable, "-c", "from qkv.cli import main; main()", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torch_threads = torch.get_num_threads()
    assert torch_threads == 1
    train(new_job(config), tmp_path / "whole", Nobody())
    cut = tmp_path / "cut"
    arguments = [str(tmp_path / "recipe.toml"), "--out", str(cut)]
    for wanted in (0, 1, 3):  # at 0, before any step is saved
        process = subprocess.Popen([*command, *arguments], env=environment, stderr=subprocess.DEVNULL)
        while (
            not (cut / "config.toml").exists() or len(read_metrics(cut)) < 20 * wanted
        ) and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        arguments = ["--resume", str(cut)]
    subprocess.run([*command, *arguments], env=environment, check=True, stderr=subprocess.DEVNULL)
    assert_equal_runs(tmp_path / "whole", cut)


def test_a_finished_run_resumes_to_its_own_scores(tmp_path):
    config = run_config(tmp_path, "vit", max_steps=5)
    first = train(new_job(config), tmp_path / "run", Nobody())
    assert train(resumed_job(tmp_path / "run"), tmp_path / "run", Nobody(), resume=True) == first


def test_a_finished_run_goes_on_where_more_steps_are_asked_for(tmp_path):
    config = run_config(tmp_path, "vit", max_steps=5, schedule="constant")
    train(new_job(config), tmp_path / "run", Nobody())
    settings = tmp_path / "run" / "config.toml"
    settings.write_text(settings.read_text().replace("max_steps = 5", "max_steps = 8"))
    assert train(resumed_job(tmp_path / "run"), tmp_path / "run", Nobody(), resume=True).step == 8
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=8))
    train(new_job(longer), tmp_path / "longer", Nobody())
    found, expected = (load_file(tmp_path / run / "model.safetensors") for run in ("run", "longer"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_is_not_scored_on_data_that_have_other_labels_by_now(tmp_path):
    config = run_config(tmp_path, "vit", max_steps=2)
    train(new_job(config), tmp_path / "run", Nobody())
    assert score(str(tmp_path / "run"))["samples"] > 0
    shutil.copytree(Path(config.data.path) / "dark", Path(config.data.path) / "black")
    with pytest.raises(
        InputError, match="the data have the labels black, bright, dark, but the model bright, dark"
    ):
        score(str(tmp_path / "run"))


def test_a_comma_in_the_name_of_a_folder_divides_nothing(tmp_path, monkeypatch):
    (tmp_path / "en,de").mkdir()
    config = run_config(tmp_path / "en,de", "gpt", max_steps=1)
    monkeypatch.chdir(tmp_path)
    given = dataclasses.replace(config.data, path=str(Path(config.data.path).relative_to(tmp_path)))
    job = new_job(dataclasses.replace(config, data=given))
    assert job.config.data.path == config.data.path
    train(job, tmp_path / "a, run", Nobody())
    for name in ("train.en", "train.de"):
        (tmp_path / "en,de" / name).write_text("a\nb\n")
    monkeypatch.chdir(tmp_path / "en,de")
    pairs = dataclasses.replace(run_config(tmp_path, "transformer").data, path="train.en,train.de")
    job = new_job(dataclasses.replace(run_config(tmp_path, "transformer", max_steps=1), data=pairs))
    train(job, tmp_path / "translates", Nobody())
    assert train(
        resumed_job(tmp_path / "translates"), tmp_path / "translates", Nobody(), resume=True
    ).finished
    monkeypatch.chdir(tmp_path)
    again = new_job(dataclasses.replace(config, init="a, run"))
    assert again.config.init == str(tmp_path / "a, run")


def test_a_run_folder_is_not_overwritten(tmp_path):
    config = run_config(tmp_path, "vit", max_steps=2)
    train(new_job(config), tmp_path / "run", Nobody())
    with pytest.raises(InputError, match="already holds a run"):
        train(new_job(config), tmp_path / "run", Nobody())


def test_a_checkpoint_is_not_overwritten(tmp_path):
    config = run_config(tmp_path, "gpt", max_steps=1)
    hub.save(tmp_path / "model", new_job(config).checkpoint)
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with pytest.raises(InputError, match="holds a checkpoint, which would be lost: choose another --out"):
        train(new_job(config), tmp_path / "model", Nobody())
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


@pytest.mark.parametrize("on_gpu", [True, False])
def test_too_little_memory_is_one_line(on_gpu, tmp_path, monkeypatch):
    def out_of_memory(*_):
        if on_gpu:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr("qkv.trainer.Trainer.step", out_of_memory)
    with pytest.raises(InputError, match=r"out of memory behind step 0: raise train\.gradient_accumulation"):
        train(new_job(run_config(tmp_path, "gpt")), tmp_path / "run", Nobody())


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    job = new_job(run_config(tmp_path, "gpt"))
    with torch.no_grad():
        job.checkpoint.model.tokens.weight[3] = float("nan")
    with pytest.raises(InputError, match="no longer a number at step 1"):
        train(job, tmp_path / "run", Nobody())


def test_the_best_model_stays_when_later_ones_are_worse(tmp_path):
    config = run_config(tmp_path, "bert", max_steps=40, eval_steps=5, learning_rate=1e-2)
    best = train(new_job(config), tmp_path / "run", Nobody())
    records = [r for r in read_metrics(tmp_path / "run") if "valid_loss" in r]
    lowest = min(records, key=lambda r: r["valid_loss"])
    assert (best.best_step, best.best_scores["loss"]) == (lowest["step"], lowest["valid_loss"])
    assert score(str(tmp_path / "run"))["loss"] == pytest.approx(best.best_scores["loss"], rel=1e-4)


def test_bfloat16_trains_too(tmp_path):
    best = train(new_job(run_config(tmp_path, "gpt", precision="bf16")), tmp_path / "run", Nobody())
    assert best.best_scores["loss"] < 1.0


def test_settings_that_a_checkpoint_decides_are_refused_but_dropout_is_taken(tmp_path):
    config = run_config(tmp_path, "bert", max_steps=2)
    train(new_job(config), tmp_path / "run", Nobody())
    again = dataclasses.replace(config, init=str(tmp_path / "run"))
    rates = {"dropout": 0.37, "word_dropout": 0.1, "drop_path": 0.2}
    job = new_job(dataclasses.replace(again, model=dataclasses.replace(config.model, **rates)))
    assert {name: getattr(job.config.model, name) for name in rates} == rates
    assert job.checkpoint.model.tokens.dropout == 0.1
    assert [m.p for m in job.checkpoint.model.modules() if isinstance(m, torch.nn.Dropout)] == [0.37] * 2
    with pytest.raises(InputError, match=r"model.depth is 5, but .* has 1"):
        new_job(dataclasses.replace(again, model=dataclasses.replace(config.model, depth=5)))


def test_a_fresh_head_is_a_function_of_the_seed(tmp_path):
    config = run_config(tmp_path, "vit", max_steps=2)
    train(new_job(config), tmp_path / "run", Nobody())
    again = dataclasses.replace(config, init=str(tmp_path / "run"))
    assert not new_job(again).checkpoint.fresh
    folder = Path(config.data.path)
    (folder / "dark").rename(folder / "night")
    jobs = [new_job(again) for _ in range(2)]
    assert torch.equal(*(job.checkpoint.model.classifier.weight for job in jobs))
    nobody = Nobody()
    train(jobs[0], tmp_path / "tuned", nobody)
    assert f"Not in {tmp_path / 'run'}, so with new random weights: classifier." in nobody.said


@pytest.mark.parametrize("which", ["path", "valid"])
def test_changed_data_are_noticed_even_if_no_length_changes(which, tmp_path):
    config = run_config(tmp_path, "bert", max_steps=2)
    shutil.copy(config.data.path, tmp_path / "valid.csv")
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, valid=str(tmp_path / "valid.csv"))
    )
    train(new_job(config), tmp_path / "run", Nobody())
    path = Path(getattr(config.data, which))
    path.write_text(path.read_text().replace("red", "old"))
    with pytest.raises(InputError, match="have changed"):
        train(resumed_job(tmp_path / "run"), tmp_path / "run", Nobody(), resume=True)


def test_a_run_without_a_cache_says_so_and_learns_the_same(tmp_path, monkeypatch):
    config = run_config(tmp_path, "gpt", max_steps=3)
    train(new_job(config), tmp_path / "cached", Nobody())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "file"))
    nobody = Nobody()
    train(new_job(config), tmp_path / "uncached", nobody)
    assert "Name another folder with QKV_CACHE" in nobody.said[0]
    one, two = (load_file(tmp_path / run / "model.safetensors") for run in ("cached", "uncached"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_can_be_used_from_another_folder(tmp_path, monkeypatch):
    config = run_config(tmp_path, "gpt", max_steps=2)
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(config, data=DataConfig(path="song.txt"))
    train(new_job(config), tmp_path / "run", Nobody())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert score("../run")["samples"] == 1


@pytest.mark.parametrize(("side", "expected"), [(37, 36), (400, 64)])
def test_images_of_any_size_train(side, expected, tmp_path):
    for name, level in (("dark", 20), ("bright", 220)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for n in range(4):
            Image.new("RGB", (side + n, side), (level, level, n)).save(
                tmp_path / "photos" / name / f"{n}.png"
            )
    config = run_config(tmp_path, "vit", max_steps=1)
    job = new_job(dataclasses.replace(config, data=DataConfig(path=str(tmp_path / "photos"))))
    assert job.config.model.image_size == expected


@pytest.mark.parametrize("cut", [0, 5, 9, 11])
def test_a_run_stops_early_at_the_right_evaluation_also_when_it_was_resumed(cut, tmp_path, monkeypatch):
    config = run_config(
        tmp_path, "vit", max_steps=40, eval_steps=2, save_steps=3, logging_steps=1, early_stopping_patience=3
    )
    losses = [5.0, 3.0, 4.0, 2.0, 2.0, 3.0, 2.5, 1.0]  # an equal one is not better
    monkeypatch.setattr("qkv.train.evaluate", lambda *_: {"loss": losses[given_scores(run)]})
    run = tmp_path / "run"
    if cut:
        with pytest.raises(KeyboardInterrupt):
            train(new_job(config), run, Nobody(interrupt_at=cut))
    nobody = Nobody()
    done = train(resumed_job(run) if cut else new_job(config), run, nobody, resume=bool(cut))
    assert (done.step, done.best_step, done.finished) == (14, 8, True)
    assert "Stopped at step 14: no better score since step 8." in nobody.said
    assert [r["step"] for r in read_metrics(run) if "valid_loss" in r] == [2, 4, 6, 8, 10, 12, 14]
    again = Nobody()
    assert train(resumed_job(run), run, again, resume=True) == done
    assert any("raise train.early_stopping_patience in" in line for line in again.said)


def test_patience_counts_evaluations_also_behind_a_best_step_between_two(tmp_path, monkeypatch):
    """The last step of a run is scored whatever it is; then the run is made longer."""
    config = run_config(tmp_path, "vit", max_steps=5, eval_steps=2, save_steps=3, early_stopping_patience=2)
    losses, run = [5.0, 4.0, 3.0, 3.5, 3.5, 1.0], tmp_path / "run"
    monkeypatch.setattr("qkv.train.evaluate", lambda *_: {"loss": losses[given_scores(run)]})
    train(new_job(config), run, Nobody())
    text = (run / CONFIG).read_text()
    (run / CONFIG).write_text(text.replace("max_steps = 5", "max_steps = 40"))
    done = train(resumed_job(run), run, Nobody(), resume=True)
    assert (done.step, done.best_step) == (8, 5)


def given_scores(run: Path) -> int:
    """How many evaluations a run has behind it."""
    return sum("valid_loss" in record for record in read_metrics(run))


def test_recomputing_blocks_changes_no_bit_of_a_run_with_dropout_and_drop_path(tmp_path):
    config = run_config(tmp_path, "gpt", max_steps=6, eval_steps=3, logging_steps=1)
    model = dataclasses.replace(config.model, depth=2, attention_dropout=0.2, drop_path=0.3)
    for kept in (True, False):
        changed = dataclasses.replace(config.train, gradient_checkpointing=not kept)
        job = new_job(dataclasses.replace(config, model=model, train=changed))
        train(job, tmp_path / str(kept), Nobody())
    assert_equal_runs(tmp_path / "True", tmp_path / "False")


@pytest.mark.parametrize("family", ["gpt", "vit"])
def test_compiled_blocks_learn_are_scored_and_reported_as_others(family, tmp_path):
    config = run_config(tmp_path, family, max_steps=4, eval_steps=4, logging_steps=1)
    model = dataclasses.replace(config.model, dropout=0.0, position="rotary")
    config = dataclasses.replace(config, model=model)
    compiled = dataclasses.replace(config, train=dataclasses.replace(config.train, torch_compile=True))
    records = []
    for settings, name in ((config, "plain"), (compiled, "compiled")):
        job, run = new_job(settings), tmp_path / name
        train(job, run, RunReport(job, run))
        records.append(read_metrics(run))
    for one, other in zip(*records, strict=True):
        name = "loss" if "loss" in one else "valid_loss"
        assert (other["step"], other[name]) == (one["step"], pytest.approx(one[name], rel=1e-3))


def test_fewer_steps_than_were_done_are_an_error(tmp_path):
    config = run_config(tmp_path, "vit", max_steps=4, save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(new_job(config), tmp_path / "run", Nobody(interrupt_at=3))
    settings = tmp_path / "run" / "config.toml"
    settings.write_text(settings.read_text().replace("max_steps = 4", "max_steps = 2"))
    with pytest.raises(InputError, match=r"max_steps is 2, but .* is at step 3"):
        train(resumed_job(tmp_path / "run"), tmp_path / "run", Nobody(), resume=True)


def test_states_of_a_run_without_its_settings_are_not_taken_up(tmp_path):
    config = run_config(tmp_path, "vit", max_steps=2)
    train(new_job(config), tmp_path / "run", Nobody())
    (tmp_path / "run" / "config.toml").unlink()
    with pytest.raises(InputError, match="already holds a run"):
        train(new_job(config), tmp_path / "run", Nobody())


def test_a_finished_run_drops_the_state_that_it_was_killed_before_dropping(tmp_path):
    run = tmp_path / "run"
    train(new_job(run_config(tmp_path, "vit", max_steps=4, save_steps=2)), run, Nobody())
    (last,) = saved_states(run)
    shutil.copytree(last, last.with_name("step-000000002"))
    train(resumed_job(run), run, Nobody(), resume=True)
    assert saved_states(run) == [last]


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    config = run_config(tmp_path, "vit", max_steps=4)
    run = tmp_path / "run"

    class Second(Nobody):
        """Resumes the run that it watches."""

        def step(self, step: int, record: Record) -> None:
            with pytest.raises(InputError, match="another process is training in"):
                train(resumed_job(run), run, Nobody(), resume=True)
            super().step(step, record)

    train(new_job(config), run, Second())
    assert train(resumed_job(run), run, Nobody(), resume=True).finished
