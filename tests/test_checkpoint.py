"""States are whole or absent, and carry everything back."""

import json

import pytest
import torch

from qkv.checkpoint import (
    Metrics,
    Progress,
    load_state,
    read_metrics,
    save_state,
    saved_states,
)
from qkv.errors import InputError


def trained(seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_state_round_trip_is_exact(tmp_path):
    model, optimizer = trained(0)
    progress = Progress("data", step=7, best_step=4, best_scores={"loss": 0.123456789123456789}, seconds=3.25)
    save_state(tmp_path, model, [optimizer], {}, progress)
    other, fresh = trained(1)
    assert load_state(tmp_path, other, [fresh], {}) == progress
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_state_that_is_missing_or_of_another_model(tmp_path):
    model, optimizer = trained(0)
    with pytest.raises(InputError, match="no state to resume"):
        load_state(tmp_path, model, [optimizer], {})
    save_state(tmp_path, model, [optimizer], {}, Progress("data"))
    other = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="does not fit"):
        load_state(tmp_path, other, [torch.optim.AdamW(other.parameters())], {})


def test_a_damaged_state_is_a_named_error(tmp_path):
    model, optimizer = trained(0)
    save_state(tmp_path, model, [optimizer], {}, Progress("data"))
    (path,) = saved_states(tmp_path)[-1].glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read"):
        load_state(tmp_path, model, [optimizer], {})


def test_metrics_continue_behind_a_step_and_drop_a_cut_line(tmp_path):
    metrics = Metrics(tmp_path)
    for step in (1, 2, 3):
        metrics.add({"step": step, "loss": 1 / step})
    with metrics.path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
    Metrics(tmp_path, 2).add({"step": 3, "loss": 9.0})
    assert read_metrics(tmp_path)[-1] == {"step": 3, "loss": 9.0}
    assert len(read_metrics(tmp_path)) == 3
    assert all(json.loads(line) for line in metrics.path.read_text().splitlines())
