"""The page of a run: new at every evaluation, complete after a resume, without influence on the weights."""

from __future__ import annotations

import dataclasses
import json
import re
from io import StringIO
from pathlib import Path

import pytest
import samples
import torch
from rich.console import Console
from test_report import assert_self_contained
from test_train import Nobody, assert_equal_runs, run_config

from qkv.checkpoint import read_metrics
from qkv.config import DataConfig, RunConfig, TokenizerConfig
from qkv.console import TrainingBar
from qkv.data import Samples
from qkv.errors import InputError
from qkv.job import Job, new_job, resumed_job
from qkv.observe import Observer, Observers, Record
from qkv.pipelines import from_pretrained
from qkv.report.exhibits import Gaps
from qkv.report.run import REPORT, SAMPLES, RunReport, _duration
from qkv.tokenizers import Encoding, Tokenizer
from qkv.train import train

SHOWN = {
    "gpt": "It goes on",
    "bert": "It classifies",
    "transformer": "It translates",
    "vit": "It recognises",
    "bert-documents": "It fills gaps",
}


def config_of(folder: Path, kind: str, **settings) -> RunConfig:
    family = kind.partition("-")[0]
    config = run_config(folder, family, **{"max_steps": 12, "eval_steps": 4, "warmup_steps": 2, **settings})
    if kind == "bert-documents":
        config = dataclasses.replace(config, data=DataConfig(path=samples.documents(folder)))
    return config


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / SAMPLES).read_text("utf-8").split("\n")[:-1]]


def test_a_gpt_goes_on_behind_text_that_is_too_large_for_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("qkv.data.raw.IN_MEMORY_BYTES", 0)
    job = new_job(config_of(tmp_path, "gpt"))
    train(job, tmp_path / "run", RunReport(job, tmp_path / "run", full_rate=1e6))
    assert all(len(line["answers"]) == 3 for line in lines_of(tmp_path / "run"))


@pytest.mark.parametrize("kind", SHOWN)
def test_a_run_with_a_report_ends_with_the_weights_of_one_without(kind, tmp_path):
    config, run = config_of(tmp_path, kind), tmp_path / "with"
    train(new_job(config), tmp_path / "without", Nobody())
    job = new_job(config)
    train(job, run, RunReport(job, run, full_rate=1e6))
    assert_equal_runs(tmp_path / "without", run)
    found = assert_self_contained((run / REPORT).read_text("utf-8"))
    assert [section["id"] for section in found.all("section")] == ["learning", "samples", "data", "setting"]
    assert f"{SHOWN[kind]} at step 12" in found.text and "at step 8" in found.text
    names = [svg["aria-label"] or "" for svg in found.all("svg")]
    for curve in ("learning curve", "held-out accuracy", "learning rate", "gradient norm"):
        assert any(name.startswith(curve) for name in names)
    assert "MFU" in found.text and "max_steps = 12" in found.text
    assert [line["step"] for line in lines_of(run)] == [4, 8, 12]
    assert all(line["answers"] for line in lines_of(run))


@pytest.mark.parametrize("kind", SHOWN)
def test_asking_draws_nothing_from_the_training_and_leaves_its_mode(kind, tmp_path):
    job = new_job(config_of(tmp_path, kind))
    model = job.checkpoint.model
    report = RunReport(job, tmp_path / "run")
    for training in (True, False):
        model.train(training)
        state = torch.get_rng_state()
        report.begin(job.config, 0)
        report.evaluated(4, {}, job.checkpoint)
        assert torch.equal(state, torch.get_rng_state())
        assert all(module.training == training for module in model.modules())


def test_a_resumed_run_has_the_page_of_one_that_was_not_cut_off(tmp_path):
    config = config_of(tmp_path, "transformer", save_steps=5, logging_steps=1)
    for path in tmp_path.iterdir():  # with a line separator that does not end a line of JSON
        path.write_text(path.read_text("utf-8").replace(" ", "\u2028"), "utf-8")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    job = new_job(config)
    train(job, whole, RunReport(job, whole))
    job = new_job(config)
    with pytest.raises(KeyboardInterrupt):
        train(job, cut, Observers([RunReport(job, cut), Nobody(interrupt_at=9)]))
    assert "Step 9 of 12" in (cut / REPORT).read_text("utf-8")
    # As after kill -9: what was written behind the saved state belongs to no run.
    with (cut / SAMPLES).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 12, "task": "", "answers": []}) + "\n")
    job = resumed_job(cut)
    train(job, cut, RunReport(job, cut), resume=True)
    assert lines_of(whole) == lines_of(cut)
    pages = [
        (run / REPORT).read_text("utf-8").partition('<section id="learning">')[2] for run in (whole, cut)
    ]
    assert pages[0] == pages[1]


def test_the_truth_of_a_gap_is_a_token_of_its_line(tmp_path):
    config = config_of(tmp_path, "bert-documents", max_steps=1)
    config = dataclasses.replace(config, tokenizer=TokenizerConfig(kind="bpe", vocab_size=300))
    train(new_job(config), tmp_path / "run", Nobody())
    encoder, line = from_pretrained(tmp_path / "run"), "the red thing is fine"
    (answer,) = Gaps(Samples("text", [line])).ask(encoder)
    tokens = [encoder.tokenizer.token(id) for id in encoder.tokenizer.encode(line).ids]
    assert answer["truth"] in tokens and answer["truth"] not in ("red", "the")
    assert {word for word, _ in answer["guesses"]} <= {*encoder.tokenizer.backend.get_vocab()}


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(59.4, "59 s"), (59.6, "1 min 0 s"), (119.7, "2 min 0 s"), (3599.8, "1 h 0 min"), (7325, "2 h 2 min")],
)
def test_durations_are_rounded_before_they_are_parted(seconds, written):
    assert _duration(seconds) == written


def test_answers_are_what_the_saved_model_says(tmp_path):
    run = tmp_path / "run"
    job = new_job(config_of(tmp_path, "bert"))
    done = train(job, run, RunReport(job, run))
    (line,) = [line for line in lines_of(run) if line["step"] == done.best_step]
    again = from_pretrained(run).classify([answer["text"] for answer in line["answers"]], top_k=1)
    assert [(a["guess"], a["probability"]) for a in line["answers"]] == [
        (guess.name, pytest.approx(guess.probability, rel=1e-4)) for (guess,) in again
    ]


def test_a_line_without_end_is_passed_over(tmp_path, monkeypatch):
    """Each of its words would be hidden in turn."""
    run = tmp_path / "run"
    train(new_job(config_of(tmp_path, "bert-documents", max_steps=1)), run, Nobody())
    encoder, lines = from_pretrained(run), []
    read = Tokenizer.encode_batch

    def note(self: Tokenizer, texts: list[str], pairs: list[str] | None = None) -> list[Encoding]:
        lines.extend(texts)
        return read(self, texts, pairs)

    monkeypatch.setattr(Tokenizer, "encode_batch", note)
    long = "red and green " * 3000
    assert len(Gaps(Samples("text", [long, "the red thing is fine"])).ask(encoder)) == 1
    assert sum(map(len, lines)) < 2 * len(long)


def test_the_best_row_is_the_kept_model_and_is_pointed_out(tmp_path):
    run = tmp_path / "run"
    job = new_job(config_of(tmp_path, "bert", max_steps=40))
    done = train(job, run, RunReport(job, run))
    html = (run / REPORT).read_text("utf-8")
    assert f'<tr class="ours"><th scope="row">{done.best_step}</th>' in html
    assert html.count('<th scope="row">') >= len([r for r in read_metrics(run) if "valid_loss" in r])


@pytest.mark.parametrize("kind", ["gpt", "bert", "transformer"])
def test_whatever_the_data_say_is_shown_as_text(kind, tmp_path):
    config, run = config_of(tmp_path, kind), tmp_path / "run"
    for path in tmp_path.iterdir():
        text = path.read_text("utf-8")
        path.write_text(re.sub("bottles|red|RED", "<i>&amp;", text), "utf-8")
    job = new_job(dataclasses.replace(config, data=dataclasses.replace(config.data, truncate=True)))
    train(job, run, RunReport(job, run))
    found = assert_self_contained((run / REPORT).read_text("utf-8"))
    assert "<i>&am" in found.text and not found.all("i")


class Poison(Observer):
    """Spoils the weights behind a step, as a bad update would."""

    def __init__(self, job: Job, step: int, value: float) -> None:
        self.job, self.at, self.value = job, step, value

    def step(self, step: int, record: Record) -> None:
        if step == self.at:
            with torch.no_grad():
                for parameter in self.job.checkpoint.model.parameters():
                    parameter.mul_(self.value)


@pytest.mark.parametrize(("value", "complaint"), [(float("nan"), "at step 40"), (50.0, "the loss diverged")])
def test_a_run_beyond_help_stops_and_keeps_its_page_and_last_state(value, complaint, tmp_path, monkeypatch):
    monkeypatch.setattr("qkv.divergence.PATIENCE", 15)
    run = tmp_path / "run"
    config = config_of(tmp_path, "gpt", max_steps=200, save_steps=20, learning_rate=1e-3, logging_steps=1)
    job = new_job(config)
    with pytest.raises(InputError, match=f"{complaint}.*lower train.learning_rate"):
        train(job, run, Observers([RunReport(job, run), Poison(job, 40, value)]))
    steps = [int(record["step"]) for record in read_metrics(run) if "loss" in record]
    assert 40 <= steps[-1] < 140
    assert f"Step {steps[-1]} of 200" in (run / REPORT).read_text("utf-8")
    rest = Nobody(interrupt_at=steps[-1] + 1)
    with pytest.raises((KeyboardInterrupt, InputError)):
        train(resumed_job(run), run, rest, resume=True)
    assert rest.first >= 20


def test_the_bar_shows_loss_rate_and_share_of_the_peak(tmp_path):
    out = StringIO()
    bar = TrainingBar(Console(file=out, force_terminal=True, width=120), full_rate=1.0)
    bar.begin(run_config(tmp_path, "gpt", max_steps=5), 2)
    bar.rate = 0.5
    bar.step(3, {"loss": 1.25, "tokens": 0.0, "seconds": 1.0})
    bar.bar.refresh()
    bar.close()
    assert "3/5" in out.getvalue() and "loss 1.250" in out.getvalue() and "MFU 48 %" in out.getvalue()
