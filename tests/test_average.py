"""Averages of weights against torch's and against hand computations, also in runs that were interrupted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from test_train import Nobody, run_config
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from qkv.average import LastCheckpoints, MovingAverage, replaced
from qkv.checkpoint import Progress, drop_states, load_weights, save_state, saved_states
from qkv.config import RunConfig
from qkv.evaluate import evaluate
from qkv.hub import Checkpoint, load
from qkv.job import new_job, resumed_job
from qkv.objectives import Objective
from qkv.observe import Observer, Record
from qkv.train import train


def steps_of(model: torch.nn.Module, count: int):
    """Move a model's weights at random, so many times."""
    for _ in range(count):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        yield


def model_of(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).double()


def test_behind_its_warm_up_the_moving_average_is_torch_s(tmp_path):
    model, decay = model_of(0), 0.5
    ours = MovingAverage(model, decay)
    warm_up = 8  # (1 + t) / (10 + t) is at least 0.5 from t = 8 on
    for _ in steps_of(model, warm_up - 1):
        ours.update(model)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    theirs.n_averaged.fill_(1)
    theirs.module.load_state_dict(ours.weights(model, tmp_path))
    for _ in steps_of(model, 20):
        ours.update(model)
        theirs.update_parameters(model)
        for name, p in theirs.module.named_parameters():
            torch.testing.assert_close(ours.weights(model, tmp_path)[name], p.data)


@pytest.mark.parametrize("decay", [0.3, 0.99, 0.99999])
def test_the_moving_average_warms_up_as_tensorflow_s(decay, tmp_path):
    model = model_of(1)
    ours = MovingAverage(model, decay)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for t, _ in enumerate(steps_of(model, 30), start=1):
        ours.update(model)
        d = min(decay, (1 + t) / (10 + t))
        expected = {name: d * expected[name] + (1 - d) * p.detach() for name, p in model.named_parameters()}
    averaged = ours.weights(model, tmp_path)
    assert averaged.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(averaged[name], expected[name])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_last_checkpoints_are_the_regular_ones_and_the_present_weights(count, tmp_path):
    model, every = model_of(2), 3
    ours = LastCheckpoints(count, every)
    regular: list[dict[str, torch.Tensor]] = []
    save_state(tmp_path, model, [], {}, Progress("data"))
    for step, _ in enumerate(steps_of(model, 20), start=1):
        present = {name: p.detach().clone() for name, p in model.named_parameters()}
        averaged = ours.weights(model, tmp_path)
        taken = [*regular[-(count - 1) :], present]
        for name, p in averaged.items():
            torch.testing.assert_close(p, torch.stack([weights[name] for weights in taken]).mean(0))
        if step % every == 0:
            regular.append(present)
        if step % every == 0 or step % 7 == 0:  # by an interrupt
            save_state(tmp_path, model, [], {}, Progress("data", step=step))
            drop_states(tmp_path, count, every)


def test_inside_replaced_a_model_has_other_weights_and_then_its_own_even_after_an_error():
    model = model_of(3)
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    other = {name: torch.full_like(p, 7.0) for name, p in own.items()}
    with pytest.raises(KeyboardInterrupt), replaced(model, other):
        assert all(torch.equal(p, other[name]) for name, p in model.named_parameters())
        raise KeyboardInterrupt
    assert all(torch.equal(p, own[name]) for name, p in model.named_parameters())


class Scored(Observer):
    """Remembers the weights that were scored at each evaluation."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def evaluated(self, step: int, scores: Record, checkpoint: Checkpoint) -> None:
        self.weights[step] = {n: p.detach().clone() for n, p in checkpoint.model.named_parameters()}


def averaging(folder: Path, **changes) -> RunConfig:
    settings = {"max_steps": 12, "save_steps": 3, "eval_steps": 4, "logging_steps": 1, "warmup_steps": 2}
    return run_config(folder, "gpt", **settings | changes)


@pytest.mark.parametrize("changes", [{"average_checkpoints": 3}, {"ema_decay": 0.9}])
def test_an_interrupt_changes_nothing_of_what_is_averaged_and_that_is_what_is_scored_and_kept(
    changes, tmp_path
):
    config = averaging(tmp_path, **changes)
    whole, cut, rest = Scored(), Scored(), Scored()
    train(new_job(config), tmp_path / "whole", whole)
    with pytest.raises(KeyboardInterrupt):
        train(new_job(config), tmp_path / "cut", Both(cut, 7))
    done = train(resumed_job(tmp_path / "cut"), tmp_path / "cut", rest, resume=True)
    assert [*cut.weights, *rest.weights] == [*whole.weights] == [4, 8, 12]
    for step, weights in (cut.weights | rest.weights).items():
        assert all(torch.equal(weights[name], p) for name, p in whole.weights[step].items()), step
    kept = load(tmp_path / "cut").model
    best = whole.weights[done.best_step]
    assert all(torch.equal(p, best[name]) for name, p in kept.named_parameters())
    job = new_job(config)
    assert evaluate(Objective(kept), job.valid)["loss"] == pytest.approx(done.best_scores["loss"], rel=1e-5)
    last = {name: torch.empty_like(p) for name, p in best.items()}
    load_weights(saved_states(tmp_path / "cut")[-1], last)
    assert any(not torch.equal(last[name], p) for name, p in whole.weights[12].items())  # averaged indeed


class Both(Nobody):
    """Interrupts, and passes on what was scored."""

    def __init__(self, scored: Scored, interrupt_at: int) -> None:
        super().__init__(interrupt_at)
        self.scored = scored

    def evaluated(self, step: int, scores: Record, checkpoint: Checkpoint) -> None:
        self.scored.evaluated(step, scores, checkpoint)


def test_before_there_is_a_state_the_mean_of_the_last_is_the_model_itself(tmp_path):
    config = averaging(tmp_path, average_checkpoints=4, eval_steps=2, save_steps=100, max_steps=4)
    averaged, plain = Scored(), Scored()
    train(new_job(config), tmp_path / "averaged", averaged)
    alone = dataclasses.replace(config, train=dataclasses.replace(config.train, average_checkpoints=1))
    train(new_job(alone), tmp_path / "plain", plain)
    for step, weights in plain.weights.items():
        assert all(torch.equal(p, averaged.weights[step][name]) for name, p in weights.items())
