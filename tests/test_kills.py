"""A run that is killed with -9, whenever and however often, ends with the bits of one that was not."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_trackers import tensorboard_points
from test_train import run_config

from qkv.checkpoint import read_metrics
from qkv.config import RunConfig, write_toml

VARIANTS = {
    "muon and the mean of states": {
        "optimizer": "muon",
        "precision": "bf16",
        "average_checkpoints": 3,
        "save_total_limit": 2,
        "early_stopping_patience": 1,
        "learning_rate": 0.7,
    },
    "adamw and a moving average": {"ema_decay": 0.9, "gradient_checkpointing": True},
}


def recipe(folder: Path, variant: str) -> RunConfig:
    """A run with all that has a state or is random."""
    settings = {
        "max_steps": 12,
        "save_steps": 2,
        "eval_steps": 3,
        "logging_steps": 1,
        "warmup_steps": 2,
        "gradient_accumulation_steps": 2,
    }
    config = run_config(folder, "gpt", **settings | VARIANTS[variant])
    rates = dict.fromkeys(config.model.dropouts, 0.2)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, depth=2, **rates))


@pytest.mark.parametrize(
    "kills", [10, pytest.param(250, marks=[pytest.mark.long, pytest.mark.timeout(7200)])]
)
@pytest.mark.parametrize("way", ["file", "time"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_ends_as_one_that_was_not(variant, way, kills, tmp_path):
    (tmp_path / "recipe.toml").write_text(write_toml(recipe(tmp_path, variant)))
    program = [sys.executable, str(Path(__file__).with_name("dying.py"))]
    done = subprocess.run(
        [*program, str(tmp_path / "recipe.toml"), str(tmp_path), way, str(kills)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    runs = list(tmp_path.glob("run-*[0-9]"))
    assert runs
    for run in runs:
        assert_same_run(tmp_path / "whole", run)
        assert timeless(tensorboard_points(run)) == timeless(tensorboard_points(tmp_path / "whole"))


def timeless(points: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    return {name: values for name, values in points.items() if name != "train/seconds"}


def assert_same_run(one: Path, other: Path) -> None:
    """All tensors, records and samples, and the names of all files."""
    assert files(one) == files(other)
    for name in files(one):
        if name.suffix == ".safetensors":
            a, b = load_file(one / name), load_file(other / name)
            assert a.keys() == b.keys()
            assert [key for key in a if not torch.equal(a[key], b[key])] == [], (name, other)
    records = [[{**record, "seconds": 0} for record in read_metrics(run)] for run in (one, other)]
    assert records[0] == records[1]
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()


def files(run: Path) -> list[Path]:
    found = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
    return sorted(path for path in found if "tfevents" not in path.name)
