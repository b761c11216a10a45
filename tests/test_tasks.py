"""BERT's tasks from raw file to score to use: what was understood, learnt, saved and said."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import samples
import torch
from hub import theirs
from sentence_transformers import SentenceTransformer
from test_train import Nobody, assert_equal_runs, run_config, step_gradient

from qkv import hub
from qkv.config import DataConfig, LoraConfig, RunConfig, TokenizerConfig, read_toml
from qkv.data.sampler import Sampler
from qkv.errors import InputError
from qkv.evaluate import derived, evaluate, score
from qkv.hub.sentence import Pooling
from qkv.job import Job, new_job, resumed_job
from qkv.objectives import Objective
from qkv.pipelines import Encoder, from_pretrained
from qkv.report.run import REPORT, SAMPLES, RunReport
from qkv.roofline import flops_per_token
from qkv.train import train

TASKS = {
    "multi_label": (samples.multi_label, "labels"),
    "regression": (samples.regression, "value"),
    "tagging": (samples.conll, "tag"),
    "contrastive": (samples.contrastive, "pair"),
}


def task_config(folder: Path, task: str, **changes) -> RunConfig:
    """Its tiny data, and data.task left to be found."""
    folder.mkdir(exist_ok=True)
    config = run_config(folder, "bert", **{"learning_rate": 1e-2, "max_steps": 120, **changes})
    data = DataConfig(path=TASKS[task][0](folder))
    return dataclasses.replace(
        config, data=dataclasses.replace(data, candidates=16) if task == "contrastive" else data
    )


@dataclasses.dataclass
class Trained:
    """A finished run, and how it began."""

    job: Job
    folder: Path
    untrained: dict[str, float]
    best: dict[str, float]

    @property
    def encoder(self) -> Encoder:
        found = from_pretrained(self.folder, device="cpu")
        assert isinstance(found, Encoder)
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    made = {}
    for task in TASKS:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(task)
        job = new_job(task_config(folder, task))
        untrained = evaluate(Objective(job.checkpoint.model), job.valid)
        best = train(job, folder / "run", Nobody()).best_scores
        made[task] = Trained(job, folder / "run", untrained, best)
    return made


@pytest.mark.parametrize("task", TASKS)
def test_learns_scores_and_says_what_it_understood(task: str, runs: dict[str, Trained]) -> None:
    run, name = runs[task], TASKS[task][1]
    assert run.job.config.data.task == task
    assert {"multi_label": "Multi-label"}.get(task, task.capitalize()) in run.job.summaries[""].about
    assert run.best["loss"] == run.best[f"{name}_loss"] < 0.5 * run.untrained["loss"]
    assert score(str(run.folder))["loss"] == pytest.approx(run.best["loss"], rel=1e-4)
    again = score(str(run.folder), run.job.config.data.path)
    assert again["samples"] == 120 and again["loss"] < run.untrained["loss"]


@pytest.mark.parametrize("task", TASKS)
def test_scores_do_not_depend_on_the_size_of_batches(task: str, runs: dict[str, Trained]) -> None:
    objective, dataset = Objective(runs[task].job.checkpoint.model), runs[task].job.train
    whole = evaluate(objective, dataset)
    assert evaluate(objective, dataset, batch_tokens=30) == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_work_is_counted_for_each_task(task: str, runs: dict[str, Trained]) -> None:
    model, dataset = runs[task].job.checkpoint.model, runs[task].job.train
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    found = flops_per_token(model, dataset)
    assert 0.9 * 6 * matrices < found < 2 * 6 * matrices  # forward, and twice that backward; and attention


def test_tags_that_mark_no_entities_have_a_macro_f1() -> None:
    answers = [(np.array([0, 1]), np.array([0, 1])), (np.array([1]), np.array([0]))]
    assert derived("tag", answers, ("NOUN", "VERB")) == {"macro_f1": pytest.approx(2 / 3)}
    assert derived("tag", answers, ("O", "B-X"))["recall"] == 0.5


@pytest.mark.parametrize("task", TASKS)
def test_accumulation_changes_neither_loss_nor_gradient(task: str, tmp_path: Path) -> None:
    config = task_config(tmp_path, task)
    sizes = dataclasses.replace(config.model, dropout=0.0, attention_dropout=0.0)
    job = new_job(dataclasses.replace(config, model=sizes))
    indices = list(range(min(16, len(job.train))))
    whole, pieces = (step_gradient(job, parts) for parts in ([indices], [indices[:1], indices[1:]]))
    assert pieces[0] == pytest.approx(whole[0], rel=1e-5)
    for a, b in zip(whole[1], pieces[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", ["tagging", "contrastive"])
def test_resume_is_exact(task: str, tmp_path: Path) -> None:
    settings = {"max_steps": 8, "save_steps": 3, "eval_steps": 4, "logging_steps": 1, "warmup_steps": 2}
    config = task_config(tmp_path, task, **settings)
    train(new_job(config), tmp_path / "whole", Nobody())
    with pytest.raises(KeyboardInterrupt):
        train(new_job(config), tmp_path / "cut", Nobody(interrupt_at=5))
    train(resumed_job(tmp_path / "cut"), tmp_path / "cut", Nobody(), resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")
    assert (tmp_path / "cut" / "modules.json").exists() == (task == "contrastive")


def test_sets_of_labels(runs: dict[str, Trained]) -> None:
    run = runs["multi_label"]
    encoder, scores = run.encoder, run.best
    assert min(scores[name] for name in ("micro_f1", "macro_f1", "exact_match")) > 0.8
    two, none = encoder.classify(["red fine blue", "old plain new"])
    assert {guess.name for guess in two if guess.probability > 0.5} == {"good", "kind"}
    assert len(none) == 3 and all(guess.probability < 0.5 for guess in none)
    assert theirs.reopen(run.folder).config.problem_type == "multi_label_classification"


def test_values_of_pairs(runs: dict[str, Trained]) -> None:
    run = runs["regression"]
    encoder, scores = run.encoder, run.best
    assert scores["pearson"] > 0.9 and scores["spearman"] > 0.8
    assert "value_accuracy" not in scores
    values = encoder.estimate([("red old fine", "new"), ("red old awful", "new")])
    assert values.shape == (2, 1) and values[0, 0] - values[1, 0] > 1
    reopened = theirs.reopen(run.folder)
    assert reopened.config.problem_type == "regression" and reopened.config.num_labels == 1


def test_tags_of_words(runs: dict[str, Trained]) -> None:
    run = runs["tagging"]
    encoder, scores = run.encoder, run.best
    assert scores["f1"] > 0.9 and scores["tag_accuracy"] > 0.95
    text = "  old red\tgreen  quick "
    words = encoder.tag(text)
    assert [(w.word, w.tag) for w in words if w.tag != "O"] == [
        ("old", "B-AGE"),
        ("red", "B-COL"),
        ("green", "I-COL"),
    ]
    assert all(text[w.start : w.end] == w.word for w in words)
    assert type(theirs.reopen(run.folder)).__name__ == "BertForTokenClassification"


def test_vectors_of_sentences_are_sentence_transformers(runs: dict[str, Trained]) -> None:
    run = runs["contrastive"]
    encoder, scores = run.encoder, run.best
    assert scores["pair_accuracy"] > 0.9
    texts = ["red 3", "a red one", "a green one", "quick"]
    ours = encoder.embed(texts)
    assert ours[0] @ ours[1] > ours[0] @ ours[2]
    library = SentenceTransformer(str(run.folder), device="cpu")
    np.testing.assert_allclose(library.encode(texts), ours, atol=1e-5)
    assert type(library[1]).__name__ == "Pooling" and type(library[2]).__name__ == "Normalize"


def test_texts_are_their_own_pairs_under_dropout(tmp_path: Path) -> None:
    texts = [f"{a} {b}" for a in samples.WORDS for b in samples.WORDS]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    config = task_config(tmp_path, "contrastive")
    config = dataclasses.replace(
        config, data=DataConfig(path=str(tmp_path / "texts.txt"), task="contrastive")
    )
    job = new_job(config)
    assert "under another dropout" in job.summaries[""].about
    untrained = evaluate(Objective(job.checkpoint.model), job.valid)
    assert train(job, tmp_path / "run", Nobody()).best_scores["loss"] < 0.7 * untrained["loss"]
    still = dataclasses.replace(config.model, dropout=0.0, attention_dropout=0.0)
    with pytest.raises(InputError, match=r"set model\.dropout above 0"):
        new_job(dataclasses.replace(config, model=still))


def test_a_task_goes_on_from_another(tmp_path: Path) -> None:
    first = task_config(tmp_path / "a", "contrastive", max_steps=2)
    train(new_job(first), tmp_path / "a" / "run", Nobody())
    for task in TASKS:
        config = task_config(tmp_path / task, task, max_steps=1)
        job = new_job(dataclasses.replace(config, init=str(tmp_path / "a" / "run")))
        body = from_pretrained(tmp_path / "a" / "run").model.tokens.weight
        assert torch.equal(job.checkpoint.model.tokens.weight, body)
        assert (job.checkpoint.pooling is not None) == (task == "contrastive")


def test_a_checkpoint_that_makes_other_vectors_is_no_beginning(tmp_path: Path) -> None:
    config = task_config(tmp_path, "contrastive", max_steps=1, warmup_steps=0)
    train(new_job(config), tmp_path / "run", Nobody())
    begun = dataclasses.replace(hub.load(tmp_path / "run"), pooling=Pooling("cls"))
    hub.save(tmp_path / "init", begun)
    with pytest.raises(InputError, match="makes vectors of their first tokens: name another"):
        new_job(dataclasses.replace(config, init=str(tmp_path / "init")))
    with pytest.raises(InputError, match="makes vectors of their first tokens: name another"):
        score(str(tmp_path / "init"), config.data.path)


def test_a_checkpoint_s_head_says_how_data_are_read(runs: dict[str, Trained], tmp_path: Path) -> None:
    runs["regression"].encoder.save_pretrained(tmp_path / "bare")
    rows = [{"text": "red old fine", "text_pair": "new", "label": label} for label in (1, 2)]
    found = score(str(tmp_path / "bare"), samples.table(tmp_path / "whole.jsonl", rows))
    assert found["samples"] == 2 and "pearson" in found


@pytest.mark.parametrize("task", ["regression", "contrastive"])
def test_a_score_of_a_run_on_pairs_needs_pairs(task: str, runs: dict[str, Trained], tmp_path: Path) -> None:
    rows = [{"text": "red old fine", "label": label} for label in (1.5, 2)]
    with pytest.raises(InputError, match="has no second ones, which would be in column 'text_pair'"):
        score(str(runs[task].folder), samples.table(tmp_path / "alone.jsonl", rows))


def test_a_column_without_a_name_is_no_second_text(tmp_path: Path) -> None:
    """As pandas writes its index."""
    rows = "".join(f"{n},{'fine' if n % 2 else 'awful'} day,{n % 2}\n" for n in range(40))
    (tmp_path / "indexed.csv").write_text(f",text,label\n{rows}")
    config = dataclasses.replace(
        run_config(tmp_path, "bert", max_steps=1), data=DataConfig(path=str(tmp_path / "indexed.csv"))
    )
    job = new_job(config)
    train(job, tmp_path / "run", Nobody())
    assert read_toml(tmp_path / "run" / "config.toml").data.text_pair == ""
    assert resumed_job(tmp_path / "run").train.fingerprint == job.train.fingerprint
    assert score(str(tmp_path / "run"))["samples"] == 4
    assert score(str(tmp_path / "run"), str(tmp_path / "indexed.csv"))["samples"] == 40


def test_a_run_without_pairs_reads_no_second_texts(runs: dict[str, Trained], tmp_path: Path) -> None:
    run, rows = runs["multi_label"].folder, [{"text": "a fine day", "label": ["good", "kind"]}] * 3
    alone = score(str(run), samples.table(tmp_path / "alone.jsonl", rows))
    paired = samples.table(tmp_path / "pairs.jsonl", [row | {"text_pair": "awful"} for row in rows])
    assert score(str(run), paired) == alone


def test_a_score_needs_data_of_the_models_own_task(tmp_path: Path) -> None:
    config = task_config(tmp_path, "regression", max_steps=1)
    train(new_job(config), tmp_path / "run", Nobody())
    with pytest.raises(InputError, match=r"data\.task regression needs a table"):
        score(str(tmp_path / "run"), samples.conll(tmp_path))


@pytest.mark.parametrize("task", TASKS)
def test_adapters_learn_each_task_and_say_what_it_is(task: str, tmp_path: Path) -> None:
    documents = run_config(tmp_path, "bert", max_steps=1)
    documents = dataclasses.replace(documents, data=DataConfig(path=samples.documents(tmp_path)))
    train(new_job(documents), tmp_path / "base", Nobody())
    config = task_config(tmp_path / task, task, max_steps=2, eval_steps=1, warmup_steps=1)
    config = dataclasses.replace(config, init=str(tmp_path / "base"), lora=LoraConfig(rank=2))
    job = new_job(config)
    best = train(job, tmp_path / "run", Nobody()).best_scores
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert score(str(tmp_path / "run"))["loss"] == pytest.approx(best["loss"], rel=1e-4)
    found = from_pretrained(tmp_path / "run", device="cpu").checkpoint
    assert found.model.config.head == ("none" if task == "contrastive" else task)
    assert found.model.config.labels == job.checkpoint.model.config.labels
    assert (found.pooling is not None) == (task == "contrastive")


def test_the_report_shows_tags_word_by_word(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = new_job(task_config(tmp_path / "data", "tagging", max_steps=60))
    train(job, run, RunReport(job, run))
    page = (run / REPORT).read_text("utf-8")
    assert "It tags at step 60" in page
    last = json.loads((run / SAMPLES).read_text("utf-8").splitlines()[-1])["answers"]
    encoder = from_pretrained(run, device="cpu")
    for answer in last:
        assert [word.word for word in encoder.tag(" ".join(answer["words"]))] == answer["words"]
        assert len(answer["tags"]) == len(answer["guesses"]) == len(answer["words"])
    told = [pair for answer in last for pair in zip(answer["tags"], answer["guesses"], strict=True)]
    assert sum(tag == guess for tag, guess in told) > 0.6 * len(told)


# ---------------------------------------------------------------- words hidden and cut


def test_more_words_are_hidden_in_training_alone(tmp_path: Path) -> None:
    data = DataConfig(path=samples.documents(tmp_path), masked_share=0.4)
    job = new_job(dataclasses.replace(run_config(tmp_path, "bert"), data=data))
    for dataset, share in ((job.train, 0.4), (job.valid, 0.15)):
        batch = dataset.batch(range(len(dataset)), 0)
        words = batch.ids.layout.tokens - 3 * len(batch.ids.layout)
        assert len(batch.labels) == pytest.approx(share * words, rel=0.1)


def test_batches_of_bpe_dropout_have_as_many_tokens_as_asked_for(tmp_path: Path) -> None:
    config = run_config(tmp_path, "transformer")
    config = dataclasses.replace(
        config,
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=400),
        data=dataclasses.replace(config.data, bpe_dropout=0.3),
    )
    dataset = new_job(config).train
    sampler = Sampler(dataset.costs, batch_tokens=1000, seed=0)
    batches = [dataset.batch(members, epoch) for epoch in (0, 1) for members in sampler.epoch(epoch)]
    tokens = [batch.source.layout.tokens + batch.inputs.layout.tokens for batch in batches]
    full = sorted(tokens)[len(tokens) // 4 :]  # the last of a pool is a rest
    assert 900 < statistics.mean(full) < 1050


@pytest.mark.parametrize("family", ["gpt", "transformer"])
def test_bpe_dropout_trains_and_resumes(family: str, tmp_path: Path) -> None:
    settings = {"max_steps": 6, "save_steps": 2, "eval_steps": 3, "logging_steps": 1, "warmup_steps": 2}
    config = run_config(tmp_path, family, **settings)
    config = dataclasses.replace(
        config,
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=300),
        data=dataclasses.replace(config.data, bpe_dropout=0.3),
    )
    job = new_job(config)
    first, second = (job.train.batch([0, 1], epoch) for epoch in (0, 1))
    assert first.labels.tolist() != second.labels.tolist()
    assert torch.equal(job.valid.batch([0], 0).labels, job.valid.batch([0], 1).labels)
    train(job, tmp_path / "whole", Nobody())
    with pytest.raises(KeyboardInterrupt):
        train(new_job(config), tmp_path / "cut", Nobody(interrupt_at=3))
    train(resumed_job(tmp_path / "cut"), tmp_path / "cut", Nobody(), resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    ("family", "setting", "message"),
    [
        ("bert", {"bpe_dropout": 0.1}, "bpe_dropout is for gpt and transformer"),
        ("gpt", {"bpe_dropout": 0.1}, "needs a tokenizer of byte pairs"),
        ("vit", {"bpe_dropout": 0.1}, "bpe_dropout is for gpt and transformer"),
        ("bert", {"whole_words": True}, "whole_words is for masked language modelling"),
        ("gpt", {"masked_share": 0.4}, "masked_share is for masked language modelling"),
        ("gpt", {"whole_words": True}, "whole_words is for masked language modelling"),
        ("transformer", {"whole_words": True}, "whole_words is for masked language modelling"),
        ("bert", {"task": "contrastive"}, "label_smoothing_factor is for classes, not for contrastive"),
        ("gpt", {"task": "tagging"}, r"data\.task is tagging, which is BERT's"),
        ("gpt", {"candidates": 9}, "candidates is for contrastive learning"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(
    family: str, setting: dict, message: str, tmp_path: Path
) -> None:
    config = run_config(tmp_path, family, label_smoothing_factor=0.1)
    with pytest.raises(InputError, match=message):
        new_job(dataclasses.replace(config, data=dataclasses.replace(config.data, **setting)))


def test_a_temperature_is_for_contrastive_learning(tmp_path: Path) -> None:
    new_job(task_config(tmp_path, "contrastive", temperature=0.1))
    with pytest.raises(InputError, match=r"train\.temperature is for contrastive learning: leave it out"):
        new_job(task_config(tmp_path, "tagging", temperature=0.1))


def test_compiled_blocks_need_samples_of_equal_length(tmp_path: Path) -> None:
    config = run_config(tmp_path, "gpt", torch_compile=True)
    config = dataclasses.replace(
        config,
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=300),
        data=dataclasses.replace(config.data, bpe_dropout=0.3),
    )
    with pytest.raises(InputError, match=r"leave it out with data\.bpe_dropout"):
        new_job(config)
    with pytest.raises(InputError, match=r"leave it out with contrastive learning"):
        new_job(task_config(tmp_path, "contrastive", torch_compile=True))


@pytest.mark.parametrize("task", TASKS)
def test_r_drop_is_for_answers_that_are_distributions(task: str, tmp_path: Path) -> None:
    config = task_config(tmp_path, task, r_drop=1.0, max_steps=2, warmup_steps=1)
    if task in ("regression", "contrastive"):
        with pytest.raises(InputError, match=rf"train\.r_drop is for classes, not for {task}: leave it out"):
            new_job(config)
    else:
        assert train(new_job(config), tmp_path / "run", Nobody()).step == 2
        alike = dataclasses.replace(config.model, dropout=0.0, attention_dropout=0.0)
        with pytest.raises(InputError, match=r"only dropout tells apart: set model\.dropout above 0"):
            new_job(dataclasses.replace(config, model=alike))
