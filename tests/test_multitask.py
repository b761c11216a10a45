"""Several tasks over one encoder: how they are mixed, learnt, saved, resumed and used; what is refused."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import samples
import test_distributed as distributed
import torch
from hub import theirs
from safetensors.torch import load_file
from test_train import Nobody, assert_equal_runs, run_config, step_gradient

from qkv import hub
from qkv.config import DataConfig, GPTConfig, LoraConfig, RunConfig, read_toml, write_toml
from qkv.config import run_config as from_values
from qkv.data import Sampler
from qkv.data.multitask import MultiTaskDataset
from qkv.errors import InputError
from qkv.evaluate import evaluate, score
from qkv.hub.sentence import Pooling
from qkv.job import Job, new_job, resumed_job
from qkv.models import MultiTaskBert
from qkv.objectives import Objective, item_counts
from qkv.observe import Observers
from qkv.pipelines import Encoder, from_pretrained
from qkv.plan import plan
from qkv.ragged import Ragged, pack
from qkv.report.run import REPORT, RunReport
from qkv.roofline import flops_per_token
from qkv.train import train

SHORT = {"max_steps": 12, "save_steps": 5, "eval_steps": 4, "logging_steps": 1, "warmup_steps": 2}


def recipe(folder: Path, **changes) -> RunConfig:
    """Classes of texts, and for half as many sentences tags of words."""
    folder.mkdir(exist_ok=True)
    config = run_config(folder, "bert", **{"max_steps": 240, "eval_steps": 60, **changes})
    tasks = {
        "mood": DataConfig(path=samples.labelled(folder, 240)),
        "color": DataConfig(path=samples.conll(folder, 120)),
    }
    return dataclasses.replace(config, data=DataConfig(), tasks=tasks)


@dataclasses.dataclass
class Trained:
    """A finished run, and how it began."""

    job: Job
    folder: Path
    untrained: dict[str, float]
    best: dict[str, float]
    said: list[str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tasks")
    job = new_job(recipe(folder))
    untrained = evaluate(Objective(job.checkpoint.model), job.valid)
    watcher = Nobody()
    best = train(job, folder / "run", Observers([watcher, RunReport(job, folder / "run")])).best_scores
    return Trained(job, folder / "run", untrained, best, watcher.said)


def opened(trained: Trained, task: str) -> Encoder:
    found = from_pretrained(trained.folder / task, device="cpu")
    assert isinstance(found, Encoder)
    return found


# ---------------------------------------------------------------- data


def test_batches_hold_one_task_and_tasks_come_in_proportion_to_their_size(trained: Trained) -> None:
    dataset = trained.job.train
    assert isinstance(dataset, MultiTaskDataset)
    sampler = Sampler(dataset.costs, 64, 0, dataset.groups)
    epoch = sampler.epoch(0)
    assert sorted(i for batch in epoch for i in batch) == list(range(len(dataset)))
    batches = [dataset.batch(indices, 0) for indices in epoch]  # raises for samples of two tasks
    steps = Counter(batch.task for batch in batches)
    tokens = {task: int(part.costs.sum()) for task, part in dataset.tasks.items()}
    share = tokens["mood"] / sum(tokens.values())
    assert steps["mood"] / len(batches) == pytest.approx(share, abs=0.05)
    # They are mixed throughout, not one behind the other.
    half = Counter(batch.task for batch in batches[: len(batches) // 2])
    assert half["mood"] / half.total() == pytest.approx(share, abs=0.2)


def test_a_batch_of_a_task_is_what_the_task_alone_makes_of_it(trained: Trained, tmp_path: Path) -> None:
    dataset = trained.job.train
    assert isinstance(dataset, MultiTaskDataset)
    first = len(dataset.tasks["mood"])
    found, alone = dataset.batch([first + 3, first], 0), dataset.tasks["color"].batch([3, 0], 0)
    assert found.task == "color"
    assert torch.equal(found.batch.ids.values, alone.ids.values)
    assert item_counts(found) == {"color/tag": len(alone.labels.values)}


def test_other_names_of_labels_are_other_data(trained: Trained) -> None:
    tasks = {"mood": trained.job.train.tasks["mood"]}
    prints = {MultiTaskDataset(tasks, {"mood": names}).fingerprint for names in (("a", "b"), ("b", "a"))}
    assert len(prints) == 2


# ---------------------------------------------------------------- model


def test_parameters_are_those_of_one_encoder_and_of_the_heads(trained: Trained) -> None:
    model = trained.job.checkpoint.model
    assert isinstance(model, MultiTaskBert)
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()
    counts = {task: sum(p.numel() for p in one.parameters()) for task, one in model.tasks.items()}
    heads = {task: sum(p.numel() for p in one.classifier.parameters()) for task, one in model.tasks.items()}
    assert sum(p.numel() for p in model.parameters()) == counts["mood"] + heads["color"]
    assert model.tasks["color"].pooler is None  # tags need none
    for one in model.tasks.values():
        assert all(a is b for a, b in zip(one.blocks.parameters(), model.blocks.parameters(), strict=True))


def test_work_is_counted_over_all_tasks(trained: Trained) -> None:
    model, dataset = trained.job.checkpoint.model, trained.job.train
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    assert 0.9 * 6 * matrices < flops_per_token(model, dataset) < 2 * 6 * matrices


# ---------------------------------------------------------------- a run


def test_learns_all_tasks_and_says_what_it_understood(trained: Trained) -> None:
    best = trained.best
    assert best["mood/label_accuracy"] > 0.9 and best["color/f1"] > 0.9
    assert best["loss"] == pytest.approx(best["mood/label_loss"] + best["color/tag_loss"])
    assert best["loss"] < 0.5 * trained.untrained["loss"]
    assert trained.said[0].startswith("mood: 216 labelled texts")
    assert trained.said[1].startswith("color: 108 sentences")
    page = (trained.folder / REPORT).read_text("utf-8")
    for told in ("Held-out accuracy: color", "Data: mood", "Data: color", "What it does: color"):
        assert told in page


def test_each_folder_is_a_whole_model_over_the_same_encoder(trained: Trained) -> None:
    mood, color = (load_file(trained.folder / task / "model.safetensors") for task in ("mood", "color"))
    shared = mood.keys() & color.keys()
    assert sum(name.startswith("bert.encoder.") for name in shared) == 16
    assert [name for name in mood.keys() ^ color.keys() if not name.startswith("bert.pooler.")] == []
    assert {name for name in shared if not torch.equal(mood[name], color[name])} <= {
        "classifier.weight",
        "classifier.bias",
    }
    texts = ["red fine blue", "awful old"]
    assert [row[0].name for row in opened(trained, "mood").classify(texts)] == ["good", "bad"]
    assert [word.tag for word in opened(trained, "color").tag("old quick red")] == ["B-AGE", "O", "B-COL"]


@pytest.mark.parametrize(("task", "logits"), [("mood", "class_logits"), ("color", "tag_logits")])
@torch.no_grad()
def test_transformers_opens_each_folder_with_equal_logits(task: str, logits: str, trained: Trained) -> None:
    encoder = opened(trained, task)
    ids = encoder.tokenizer.encode("red fine old").ids
    answer = vars(encoder.model(pack([ids])))[logits]
    ours = answer.values if isinstance(answer, Ragged) else answer
    said = theirs.reopen(trained.folder / task)(torch.tensor([ids])).logits
    torch.testing.assert_close(ours, said.flatten(0, -2), atol=1e-5, rtol=1e-5)


def test_scores_of_the_run_are_those_of_its_folders(trained: Trained, monkeypatch) -> None:
    found = score(str(trained.folder))
    assert found["loss"] == pytest.approx(trained.best["loss"], rel=1e-4)
    for task in ("mood", "color"):
        alone = score(str(trained.folder / task))
        assert alone == {name: found[f"{task}/{name}"] for name in alone}
    mood = trained.job.config.tasks["mood"]
    data = mood.path
    assert mood.text_pair == "" and trained.job.config.tasks["color"].text_pair == "text_pair"
    assert score(str(trained.folder / "mood"), data)["samples"] == 240
    with monkeypatch.context() as patch:
        patch.chdir(trained.folder / "mood")
        assert score(".") == score(str(trained.folder / "mood"))
    with pytest.raises(InputError, match=r"has several tasks: score one on other data, as .*run/mood, "):
        score(str(trained.folder), data)


def test_a_run_beside_a_tasks_name_is_not_overwritten(trained: Trained, tmp_path: Path) -> None:
    hub.save(tmp_path / "runs" / "mood", hub.load(trained.folder / "mood"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "runs" / "mood").iterdir()}
    with pytest.raises(InputError, match=r"runs/mood holds a checkpoint, which would be lost"):
        train(new_job(recipe(tmp_path)), tmp_path / "runs", Nobody())
    assert {path.name: path.read_bytes() for path in (tmp_path / "runs" / "mood").iterdir()} == before


def test_the_run_itself_is_no_model_but_names_them(trained: Trained) -> None:
    with pytest.raises(InputError, match=r"is a folder of models: name one of .*run/color, .*run/mood$"):
        from_pretrained(trained.folder)


def test_accumulation_changes_neither_loss_nor_gradient(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    sizes = dataclasses.replace(config.model, dropout=0.0, attention_dropout=0.0)
    job = new_job(dataclasses.replace(config, model=sizes))
    indices = list(range(216, 232))
    whole, pieces = (step_gradient(job, parts) for parts in ([indices], [indices[:5], indices[5:]]))
    assert pieces[0] == pytest.approx(whole[0], rel=1e-5)
    for a, b in zip(whole[1], pieces[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes", [{"gradient_accumulation_steps": 3}, {"optimizer": "muon", "ema_decay": 0.9}]
)
def test_resume_is_exact(changes: dict, tmp_path: Path) -> None:
    config = recipe(tmp_path, **SHORT, **changes)
    train(new_job(config), tmp_path / "whole", Nobody())
    with pytest.raises(KeyboardInterrupt):
        train(new_job(config), tmp_path / "cut", Nobody(interrupt_at=7))
    train(resumed_job(tmp_path / "cut"), tmp_path / "cut", Nobody(), resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")
    for task in ("mood", "color"):
        one, other = (load_file(tmp_path / run / task / "model.safetensors") for run in ("whole", "cut"))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_ranks_share_the_batches_of_each_task(tmp_path: Path) -> None:
    config = recipe(tmp_path, **SHORT, shard_ranks=2, gradient_accumulation_steps=2)
    still = dataclasses.replace(config.model, dropout=0.0, attention_dropout=0.0)
    config = dataclasses.replace(config, model=still)
    one, two = tmp_path / "one", tmp_path / "two"
    train(new_job(config), one, Nobody())
    distributed.run(2, tmp_path, config, two)
    distributed.assert_close_metrics(one, two)
    for task in config.tasks:
        distributed.assert_close_models(one / task, two / task)


def test_tasks_begin_from_a_checkpoint_with_fresh_heads(trained: Trained, tmp_path: Path) -> None:
    config = dataclasses.replace(recipe(tmp_path), init=str(trained.folder / "mood"))
    model, base = new_job(config).checkpoint.model, opened(trained, "mood").model
    for name in ("tokens", "blocks", "pooler"):
        one, other = (getattr(m, name).state_dict() for m in (model, base))
        assert all(torch.equal(one[key], other[key]) for key in one)
    again = new_job(config).checkpoint.model
    assert not torch.equal(model.tasks["mood"].classifier.weight, base.classifier.weight)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_all_kinds_of_tasks_train_together(tmp_path: Path) -> None:
    kinds = {
        "sets": samples.multi_label(tmp_path),
        "values": samples.regression(tmp_path),
        "pairs": samples.contrastive(tmp_path),
        "words": samples.documents(tmp_path),
    }
    config = recipe(tmp_path, max_steps=20, eval_steps=20)
    tasks = {name: DataConfig(path=path) for name, path in kinds.items()}
    tasks["pairs"] = dataclasses.replace(tasks["pairs"], candidates=16)
    best = train(new_job(dataclasses.replace(config, tasks=tasks)), tmp_path / "run", Nobody()).best_scores
    names = ("sets/labels", "values/value", "pairs/pair", "words/masked_word", "words/next_sentence")
    assert best["loss"] == pytest.approx(sum(best[f"{name}_loss"] for name in names))
    found = from_pretrained(tmp_path / "run" / "pairs", device="cpu").checkpoint
    assert found.pooling == Pooling("mean", True, 32)
    for task in ("sets", "values", "words"):
        alone = score(str(tmp_path / "run" / task))
        assert alone["loss"] == pytest.approx(
            sum(best[n] for n in best if n.startswith(task) and n.endswith("_loss")), 1e-3
        )
    heads = {name: from_pretrained(tmp_path / "run" / name).model.config.head for name in kinds}
    assert heads == {"sets": "multi_label", "values": "regression", "pairs": "none", "words": "pretraining"}


def test_a_failure_between_two_folders_leaves_both_as_they_were(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    hub.save(tmp_path / "run", trained.job.checkpoint)
    before, save_file = files(), hub.save_file

    def fails_for_the_second(tensors: dict, path: Path, **options) -> None:
        if path.parent.name == "color":
            raise OSError(28, "No space left on device")
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, path, **options)

    monkeypatch.setattr(hub, "save_file", fails_for_the_second)
    with pytest.raises(InputError, match="the disk is full"):
        hub.save(tmp_path / "run", trained.job.checkpoint)
    assert files() == before


# ---------------------------------------------------------------- what is refused


def test_a_recipe_of_tasks_is_read_as_it_is_written(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    (tmp_path / "recipe.toml").write_text(write_toml(config))
    assert read_toml(tmp_path / "recipe.toml") == config
    assert config.of_task("color").data == config.tasks["color"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": GPTConfig()}, r"tasks are for bert: give a gpt its data with data\.path"),
        ({"data": DataConfig(path="x.csv")}, r"not both: set tasks\.mood, not data"),
        ({"lora": LoraConfig(rank=2)}, "lora.rank adapts a model of one task"),
        ({"tasks": {"a-b": DataConfig(path="x")}}, "a task is called 'a-b'; names have letters"),
        ({"tasks": {"state": DataConfig(path="x")}}, "a task is called 'state'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(recipe(tmp_path), **changes)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"mood": "x.csv"}, r"tasks\.mood = 'x\.csv': it must be a table, \[tasks\.mood\]"),
        ({"mood": {"pat": "x.csv"}}, r"unknown setting tasks\.mood\.pat; did you mean tasks\.mood\.path"),
    ],
)
def test_tables_of_tasks_that_cannot_be_read_are_refused(tasks: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_values({"model": {"family": "bert"}, "tasks": tasks})


def test_what_is_wrong_with_a_task_names_it(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    absent = config.tasks | {"color": DataConfig(path=str(tmp_path / "absent.conll"))}
    with pytest.raises(InputError, match=r"^task color: .*absent\.conll"):
        new_job(dataclasses.replace(config, tasks=absent))
    nowhere = config.tasks | {"color": DataConfig()}
    with pytest.raises(InputError, match=r"^no data: name a file or folder with tasks\.color\.path"):
        new_job(dataclasses.replace(config, tasks=nowhere))
    short = dataclasses.replace(config, model=dataclasses.replace(config.model, context=6))
    with pytest.raises(InputError, match=r"^task mood: .*longer than the model's context of 6 tokens"):
        new_job(short)


def test_changed_data_of_one_task_are_noticed(tmp_path: Path) -> None:
    config = recipe(tmp_path, **SHORT | {"max_steps": 1})
    train(new_job(config), tmp_path / "run", Nobody())
    path = Path(config.tasks["mood"].path)
    path.write_text(path.read_text().replace("good", "nice"))
    with pytest.raises(InputError, match="have changed since it began"):
        train(resumed_job(tmp_path / "run"), tmp_path / "run", Nobody(), resume=True)


def test_plans_are_of_one_task(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="plans know nothing of several tasks"):
        plan(recipe(tmp_path))
