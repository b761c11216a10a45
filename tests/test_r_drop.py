"""R-Drop by hand: half of equation 4 of Liang et al. 2021, on a model whose two passes differ by dropout."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from test_train import FAMILIES, run_config

from qkv.job import new_job
from qkv.objectives import Objective, item_counts, loss_terms


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q), summed: logits (M, K) of both."""
    return F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_r_drop_is_half_of_equation_4(family, smoothing, tmp_path):
    job = new_job(run_config(tmp_path, family))
    model, alpha = job.checkpoint.model.train(), 3.0
    batch = job.train.batch(range(8) if family != "gpt" else range(2), 0).to("cpu")
    counts = {name: 2 * count for name, count in item_counts(batch).items()}  # a step of two such batches
    torch.manual_seed(5)
    first, second = loss_terms(model, batch), loss_terms(model, batch)
    expected = torch.zeros(())
    for name in first:
        one, two = first[name], second[name]
        assert not torch.equal(one.logits, two.logits)
        likelihood = sum(
            F.cross_entropy(t.logits, t.labels, reduction="sum", label_smoothing=smoothing)
            for t in (one, two)
        )
        divergence = (kl(one.logits, two.logits) + kl(two.logits, one.logits)) / 2
        expected = expected + (likelihood + alpha * divergence) / 2 / counts[name]
    torch.manual_seed(5)
    found = Objective(model, smoothing, alpha)(batch, counts)
    torch.testing.assert_close(found, expected)
    gradients = []
    for loss in (found, expected):
        model.zero_grad()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_without_dropout_two_passes_are_one(tmp_path):
    job = new_job(run_config(tmp_path, "bert"))
    batch = job.train.batch(range(8), 0).to("cpu")
    model = copy.deepcopy(job.checkpoint.model).eval()
    counts = item_counts(batch)
    torch.testing.assert_close(Objective(model, r_drop=5.0)(batch, counts), Objective(model)(batch, counts))
