"""One optimiser step beside the same step by hand: every setting of it arrives."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_train import FAMILIES, run_config

from qkv.config import RunConfig
from qkv.job import new_job
from qkv.models import Model
from qkv.objectives import loss_terms
from qkv.trainer import StepData, Trainer

ADAM: dict[str, Any] = {
    "schedule": "constant",
    "warmup_steps": 0,
    "learning_rate": 0.01,
    "weight_decay": 0.3,
    "adam_beta1": 0.6,
    "adam_beta2": 0.7,
    "adam_epsilon": 1e-3,
    "max_grad_norm": 0.2,
    "label_smoothing_factor": 0.15,
}


def without_dropout(config: RunConfig) -> RunConfig:
    return replace(config, model=replace(config.model, dropout=0.0, attention_dropout=0.0))


def trainer_and_data(config: RunConfig, samples: int = 2) -> tuple[Trainer, StepData]:
    job = new_job(config)
    trainer = Trainer(config.train, job.checkpoint, job.train)
    return trainer, trainer.data(0, range(samples))


class AdamByHand:
    """Loshchilov and Hutter 2019, algorithm 2, behind a clipped gradient."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.m = [torch.zeros_like(p) for p in model.parameters()]
        self.v = [torch.zeros_like(p) for p in model.parameters()]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> float:
        """Change the parameters; the gradient's norm before it was clipped."""
        self.steps += 1
        beta1, beta2 = ADAM["adam_beta1"], ADAM["adam_beta2"]
        gradients = [p.grad if p.grad is not None else None for p in self.model.parameters()]
        norm = sum(g.square().sum() for g in gradients if g is not None) ** 0.5
        scale = min(1.0, ADAM["max_grad_norm"] / norm)
        for p, gradient, m, v in zip(self.model.parameters(), gradients, self.m, self.v, strict=True):
            if gradient is None:
                continue
            m.mul_(beta1).add_((1 - beta1) * scale * gradient)
            v.mul_(beta2).add_((1 - beta2) * (scale * gradient).square())
            decay = ADAM["weight_decay"] if p.dim() >= 2 else 0.0
            direction = (m / (1 - beta1**self.steps)) / (
                (v / (1 - beta2**self.steps)).sqrt() + ADAM["adam_epsilon"]
            )
            p.sub_(ADAM["learning_rate"] * (direction + decay * p))
        self.model.zero_grad()
        return float(norm)


@pytest.mark.parametrize("family", FAMILIES)
def test_three_steps_of_adamw_are_those_by_hand(family: str, tmp_path: Path) -> None:
    trainer, data = trainer_and_data(without_dropout(run_config(tmp_path, family, **ADAM)))
    model = copy.deepcopy(trainer.model)
    by_hand = AdamByHand(model)
    (batch, counts), *others = data.batches
    assert counts and not others
    for step in (1, 2, 3):
        terms = loss_terms(model, batch)
        losses = [
            F.cross_entropy(t.logits, t.labels, label_smoothing=ADAM["label_smoothing_factor"])
            for t in terms.values()
        ]
        loss = torch.stack(losses).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = by_hand.step()
        assert norm > ADAM["max_grad_norm"]  # so clipping is felt
        record = trainer.step(data, step)
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)
    found, expected = (dict(m.named_parameters()) for m in (trainer.model, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_r_drop_is_part_of_a_step(tmp_path: Path) -> None:
    config = run_config(tmp_path, "gpt", max_grad_norm=1e9)
    config = replace(config, model=replace(config.model, dropout=0.4))
    losses = []
    for weight in (1.0, 2.0, 3.0):
        trainer, data = trainer_and_data(replace(config, train=replace(config.train, r_drop=weight)))
        losses.append(trainer.step(data, 1)["loss"])
    one, two, three = losses
    assert two - one > 0.001  # the divergence, which is never negative
    assert three - two == pytest.approx(two - one, rel=1e-2)


def test_what_a_step_draws_is_a_function_of_seed_and_step_alone(tmp_path: Path) -> None:
    config = run_config(tmp_path, "gpt")
    config = replace(config, model=replace(config.model, dropout=0.5))
    job = new_job(config)

    def loss(step: int, seed: int = 0) -> float:
        checkpoint = replace(job.checkpoint, model=copy.deepcopy(job.checkpoint.model))
        trainer = Trainer(replace(config.train, seed=seed), checkpoint, job.train)
        return trainer.step(trainer.data(0, range(2)), step)["loss"]

    torch.manual_seed(1)
    first = loss(1)
    torch.manual_seed(2)
    assert loss(1) == first
    drawn = [first, loss(2), loss(3), loss(1, seed=1), loss(2, seed=1)]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize(("precision", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_the_products_and_not_of_the_weights(
    precision: str, expected: torch.dtype, tmp_path: Path
) -> None:
    trainer, data = trainer_and_data(run_config(tmp_path, "gpt", precision=precision))
    seen = set()
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, inputs, output: seen.add(output.dtype))
    trainer.step(data, 1)
    assert seen == {expected}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
