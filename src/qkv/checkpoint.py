"""The run folder and the state in it: written whole or not at all, never pickled.

config.toml        the resolved settings
metrics.jsonl      one line a record
config.json, model.safetensors, tokenizer.json ...   the best model so far, a Hugging Face folder
state/last.safetensors   everything that resuming needs
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qkv.errors import InputError

CONFIG = "config.toml"
METRICS = "metrics.jsonl"
STATE = "state/last.safetensors"


@dataclass
class Progress:
    """Where a run is: what of its state is not a tensor."""

    data: str
    """Fingerprint of the training data."""
    step: int = 0
    seconds: float = 0.0
    """Training time so far, evaluation included."""
    best_step: int = 0
    best_scores: dict[str, float] = field(default_factory=dict)
    """Held-out scores of the model with the lowest loss so far, which the run folder holds."""


def replace_file(path: Path, write: Any) -> None:
    """Call `write(temporary_path)` and put the result in place of `path` only once it is on the disk.

    Raises InputError if the disk is full or the folder cannot be written; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"cannot write {path}: {reason}; the last complete file is kept") from error


def write_text(path: Path, text: str) -> None:
    """Write a small text file whole."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_state(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write the state of a run. Raises InputError on a full disk; the state before it stays."""
    tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    metadata = {"progress": json.dumps(vars(progress))}
    replace_file(run / STATE, lambda temporary: save_file(tensors, temporary, metadata))


def load_state(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a run's last state into its model and optimiser.

    Raises InputError if there is none, or if it is damaged or does not fit.
    """
    path = run / STATE
    if not path.exists():
        raise InputError(f"{run} has no state to resume from ({path} is missing)")
    model_state: dict[str, Tensor] = {}
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            progress = Progress(**json.loads(file.metadata()["progress"]))
            for key in file.keys():  # noqa: SIM118 - not a dict
                part, _, name = key.partition(".")
                if part == "model":
                    model_state[name] = file.get_tensor(key)
                else:
                    index, _, field = name.partition(".")
                    optimizer_state.setdefault(int(index), {})[field] = file.get_tensor(key)
    except SafetensorError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    try:
        model.load_state_dict(model_state)
    except RuntimeError as error:
        raise InputError(
            f"{path} does not fit the model of {run / CONFIG}: {str(error).splitlines()[-1].strip()}"
        ) from None
    optimizer.load_state_dict({**optimizer.state_dict(), "state": optimizer_state})
    return progress


class Metrics:
    """metrics.jsonl: one record a line, flushed at once."""

    def __init__(self, run: Path, step: int = 0) -> None:
        """Continue after `step`: records of later steps, from a run that was cut off, are dropped."""
        self.path = run / METRICS
        kept = [record for record in read_metrics(run) if record["step"] <= step] if step else []
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def add(self, record: dict[str, float]) -> None:
        """Append one record; it has a `step`. Raises InputError if it cannot be written."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from error


def read_metrics(run: Path) -> list[dict[str, float]]:
    """All whole records of a run; a last line that was cut off is left out."""
    path = run / METRICS
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
