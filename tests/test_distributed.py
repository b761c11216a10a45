"""Several ranks (two processes, gloo, CPU) train as one: whole copies, sharded weights, and back."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import samples
import torch
from gradients import gradients
from safetensors.torch import load_file
from test_train import Nobody, run_config

from qkv.checkpoint import load_state, load_weights, read_metrics, saved_states
from qkv.config import DataConfig, RunConfig, write_toml
from qkv.distributed import ALONE
from qkv.errors import InputError
from qkv.job import new_job
from qkv.optim import optimizers
from qkv.pipelines import from_pretrained
from qkv.train import train

STEPS = 8


def recipe(folder: Path, family: str, **changes) -> RunConfig:
    settings = {"max_steps": STEPS, "save_steps": 4, "eval_steps": 4, "logging_steps": 1, "warmup_steps": 2}
    config = run_config(folder, family, **settings | {"gradient_accumulation_steps": 2} | changes)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, dropout=0.0, attention_dropout=0.0)
    )


def launch(ranks: int, *arguments: object) -> subprocess.Popen[str]:
    """`qkv train` in so many processes; one is without torchrun."""
    if ranks > 1:
        return torchrun(ranks, "-m", "qkv", "train", *arguments)
    return start("-m", "qkv", "train", *arguments)


def torchrun(ranks: int, *arguments: object) -> subprocess.Popen[str]:
    """A program or module in so many processes."""
    settings = (f"--nproc-per-node={ranks}", f"--master-port={free_port()}")
    return start("-m", "torch.distributed.run", *settings, *arguments)


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def finish(process: subprocess.Popen[str]) -> str:
    """What a run said on standard error; it must succeed."""
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return err


def run(ranks: int, folder: Path, config: RunConfig, out: Path) -> Path:
    (folder / "recipe.toml").write_text(write_toml(config))
    finish(launch(ranks, folder / "recipe.toml", "--out", out))
    return out


def assert_close_runs(one: Path, other: Path) -> None:
    """The same losses and gradient norms at every step, and the same weights behind the last one."""
    assert_close_metrics(one, other)
    assert_close_models(one, other)


def assert_close_metrics(one: Path, other: Path) -> None:
    kinds = [read_metrics(path) for path in (one, other)]
    assert len(kinds[0]) == len(kinds[1]) > STEPS
    for a, b in zip(*kinds, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds"}:
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=2e-5), (a["step"], name)


def assert_close_models(one: Path, other: Path) -> None:
    models = [from_pretrained(path).model.state_dict() for path in (one, other)]
    # Muon computes in bfloat16: sums in another order move its steps (about 1e-2 each) by a rounding.
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], rtol=2e-3, atol=2e-3)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, tuple[Path, RunConfig, Path]]:
    """One run of each kind in one process: its folder, config and run."""
    made = {}
    for family, changes in {
        "gpt": {"optimizer": "muon"},
        "transformer": {"ema_decay": 0.5},
        "vit": {},
    }.items():
        folder = tmp_path_factory.mktemp(family)
        config = recipe(folder, family, **changes)
        if family == "vit":
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, stem="convolutions"))
        train(new_job(config), folder / "one", Nobody())
        made[family] = (folder, config, folder / "one")
    return made


@pytest.mark.parametrize(("family", "shard_ranks"), [("gpt", 1), ("gpt", 2), ("transformer", 2), ("vit", 2)])
def test_two_ranks_train_as_one(family, shard_ranks, alone, tmp_path):
    folder, config, one = alone[family]
    changed = dataclasses.replace(
        config.train, shard_ranks=shard_ranks, gradient_checkpointing=shard_ranks > 1
    )
    assert_close_runs(one, run(2, tmp_path, dataclasses.replace(config, train=changed), tmp_path / "two"))
    assert not list(folder.glob("two"))


@pytest.mark.parametrize("family", ["gpt", "transformer"])
def test_two_ranks_train_and_score_in_bfloat16(family, alone, tmp_path):
    _, config, one = alone[family]
    half = dataclasses.replace(config.train, precision="bf16", shard_ranks=2)
    two = run(2, tmp_path, dataclasses.replace(config, train=half), tmp_path / "two")
    losses = [
        [record["valid_loss"] for record in read_metrics(path) if "valid_loss" in record]
        for path in (one, two)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("family", ["transformer", "bert"])
def test_loss_and_gradients_of_a_step_do_not_depend_on_how_it_is_divided(family, tmp_path):
    config = recipe(tmp_path, family)
    if family == "bert":  # two losses, over masked words and over pairs of sentences
        config = dataclasses.replace(config, data=DataConfig(path=samples.documents(tmp_path, count=120)))
    (tmp_path / "recipe.toml").write_text(write_toml(config))
    finish(torchrun(2, Path(__file__).with_name("gradients.py"), tmp_path / "recipe.toml", tmp_path))
    expected = gradients(config, ALONE, accumulation=1)
    divided = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    assert len(divided) == 3
    for found in (gradients(config, ALONE, accumulation=4), *divided):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(
                found[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_ranks_that_are_told_of_no_data_say_so_in_one_line_each(tmp_path):
    process = launch(2, "gpt", "--data", tmp_path / "nowhere.txt", "--out", tmp_path / "run")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1  # torchrun's own
    said = [line for line in err.splitlines() if line.startswith("qkv: ")]
    assert f"qkv: no such file or folder: {tmp_path / 'nowhere.txt'}" in said
    assert "qkv/cli.py" not in err


def test_a_run_goes_on_with_another_number_of_ranks(alone, tmp_path):
    _, config, one = alone["gpt"]
    sharded = dataclasses.replace(config.train, shard_ranks=2, save_steps=2, save_total_limit=3)
    (tmp_path / "recipe.toml").write_text(write_toml(dataclasses.replace(config, train=sharded)))
    out = tmp_path / "run"
    arguments: tuple[object, ...] = (tmp_path / "recipe.toml", "--out", out)
    for ranks, until in ((2, 2), (1, 5)):
        process = launch(ranks, *arguments)
        wait_for(process, lambda until=until: len(read_metrics(out)) >= until)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=100) in (0, 1)  # torchrun itself ends with 1 when it is told to end
        arguments = ("--resume", out)
    finish(launch(2, *arguments))
    assert_close_runs(one, out)
    parts = list(saved_states(out)[-1].glob("*.safetensors"))
    assert len(parts) == 2
    for part in parts:
        hidden = part.rename(part.with_suffix(".hidden"))
        model = new_job(config).checkpoint.model
        with pytest.raises(InputError, match=f"{part.parent.name} (cannot be read: a part of|does not fit)"):
            load_state(out, model, optimizers(model, config.train), {})
        hidden.rename(part)


def test_a_lost_rank_ends_the_run_which_can_be_resumed(alone, tmp_path):
    _, config, _ = alone["gpt"]
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, max_steps=4000, save_steps=2)
    )
    (tmp_path / "recipe.toml").write_text(write_toml(config))
    out = tmp_path / "run"
    process = launch(2, tmp_path / "recipe.toml", "--out", out)
    wait_for(process, lambda: len(read_metrics(out)) >= 4)
    victim = next(pid for pid in children(process.pid) if environment(pid).get("RANK") == "1")
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "SIGKILL" in err or "lost another rank" in err
    last = saved_states(out)[-1]
    names = dict(new_job(config).checkpoint.model.named_parameters())
    stored = load_weights(last, {name: torch.full_like(p, float("nan")) for name, p in names.items()})
    assert all(tensor.isfinite().all() for tensor in stored.values())


def wait_for(process: subprocess.Popen[str], done) -> None:
    while not done():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def environment(pid: int) -> dict[str, str]:
    pairs = (entry.partition("=") for entry in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    return {name: value for name, _, value in pairs}
