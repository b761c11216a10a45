"""States are whole or absent, and carry everything back."""

import errno
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkv.checkpoint import (
    PROGRESS,
    STATES,
    Metrics,
    Progress,
    drop_states,
    load_state,
    read_metrics,
    regular_states,
    save_state,
    saved_states,
    step_of,
)
from qkv.divergence import LossTrend
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


def test_a_state_of_another_optimizer(tmp_path):
    model, optimizer = trained(0)
    save_state(tmp_path, model, [optimizer], {}, Progress("data"))
    muon = torch.optim.Muon([model[0].weight])
    with pytest.raises(InputError, match=r"train\.optimizer was another one"):
        load_state(tmp_path, model, [muon], {})


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


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "is not valid JSON"),
        ("[1, 2]", "progress.json"),
        ("null", "malformed"),
        ('{"step": 3}', "malformed"),
        ('{"data": "x", "step": "three"}', "setting step = 'three'"),
        ('{"data": "x", "stepp": 3}', "did you mean step"),
        ('{"data": "x", "trend": {"lowest": "low"}}', "setting trend"),
    ],
)
def test_rubbish_in_progress_json_is_a_named_error(content, complaint, tmp_path):
    model, optimizer = trained(0)
    save_state(tmp_path, model, [optimizer], {}, Progress("data"))
    path = saved_states(tmp_path)[-1] / PROGRESS
    path.write_text(content)
    with pytest.raises(InputError, match=complaint) as error:
        load_state(tmp_path, model, [optimizer], {})
    assert PROGRESS in str(error.value)


def test_a_state_without_its_files_is_a_named_error(tmp_path):
    model, optimizer = trained(0)
    save_state(tmp_path, model, [optimizer], {}, Progress("data"))
    for file in saved_states(tmp_path)[-1].iterdir():
        whole = file.read_bytes()
        file.unlink()
        with pytest.raises(InputError, match=r"state/step-000000000 (does not fit|has no progress.json)"):
            load_state(tmp_path, model, [optimizer], {})
        file.write_bytes(whole)
    load_state(tmp_path, model, [optimizer], {})


@given(data=st.data())
def test_a_file_cut_anywhere_is_a_named_error(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    model, optimizer = trained(0)
    save_state(run, model, [optimizer], {}, Progress("data"))
    file = data.draw(st.sampled_from(sorted(saved_states(run)[-1].iterdir())))
    content = file.read_bytes()
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(InputError, match="step-000000000"):
        load_state(run, model, [optimizer], {})


@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_progress_comes_back_with_every_bit(tmp_path_factory, score, smooth):
    run = tmp_path_factory.mktemp("run")
    model, _ = trained(0)
    progress = Progress("data", best_scores={"loss": score}, trend=LossTrend(smooth=smooth))
    save_state(run, model, [], {}, progress)
    assert load_state(run, model, [], {}) == progress


def test_a_state_is_kept_whole_or_not_at_all_when_its_writing_fails(tmp_path, monkeypatch):
    model, optimizer = trained(0)
    save_state(tmp_path, model, [optimizer], {}, Progress("data"))
    monkeypatch.setattr("qkv.checkpoint.sync", fail)
    with pytest.raises(InputError, match=r"step-000000001: the disk is full .*; the state of step 0 is kept"):
        save_state(tmp_path, model, [optimizer], {}, Progress("data", step=1))
    assert [path.name for path in (tmp_path / STATES).iterdir()] == ["step-000000000"]
    monkeypatch.undo()
    assert load_state(tmp_path, model, [optimizer], {}) == Progress("data")


def fail(path):
    raise OSError(errno.ENOSPC, "No space left on device")


@given(st.sets(st.integers(1, 40), min_size=1), st.integers(1, 5), st.integers(1, 7))
def test_states_that_stay_are_the_last_regular_ones_and_the_newest(tmp_path_factory, steps, keep, every):
    run = tmp_path_factory.mktemp("run")
    for step in {0, *steps}:
        (run / STATES / f"step-{step:09}").mkdir(parents=True)
    drop_states(run, keep, every)
    regular = [step for step in sorted(steps) if step % every == 0][-keep:]
    assert {step_of(state) for state in saved_states(run)} == {*regular, max(steps)}
    assert [step_of(state) for state in regular_states(run, every)] == regular


def test_a_copy_of_a_state_is_no_state(tmp_path):
    (tmp_path / "state" / "step-000000500").mkdir(parents=True)
    (tmp_path / "state" / "step-000000500.bak").mkdir()
    assert [step_of(state) for state in saved_states(tmp_path)] == [500]
