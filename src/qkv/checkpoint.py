"""The run folder and the state in it: written whole or not at all, never pickled.

config.toml        the resolved settings
metrics.jsonl      one line a record
config.json, model.safetensors, tokenizer.json ...   the best model so far, a Hugging Face folder
state/last.safetensors   everything that resuming needs
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from qkv.errors import InputError
from qkv.files import reason, replace_file

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
    trend: dict[str, Any] = field(default_factory=dict)
    """Fields of the `LossTrend` that tells whether the run diverges."""


def write_text(path: Path, text: str) -> None:
    """Write a small text file whole."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_state(run: Path, model: nn.Module, optimizers: list[Optimizer], progress: Progress) -> None:
    """Write the state of a run. Raises InputError on a full disk; the state before it stays."""
    tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in model.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{name}": value for name, value in state.items()}
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    metadata = {"progress": json.dumps(vars(progress))}
    replace_file(run / STATE, lambda temporary: save_file(tensors, temporary, metadata))


def load_state(run: Path, model: nn.Module, optimizers: list[Optimizer]) -> Progress:
    """Put a run's last state into its model and optimisers.

    Raises InputError if there is none, or if it is damaged or does not fit.
    """
    path = run / STATE
    if not path.exists():
        raise InputError(f"{run} has no state to resume from ({path} is missing)")
    model_state: dict[str, Tensor] = {}
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    try:
        with safe_open(path, framework="pt") as file:
            progress = Progress(**json.loads(file.metadata()["progress"]))
            for key in file.keys():  # noqa: SIM118 - not a dict
                part, _, name = key.partition(".")
                if part == "model":
                    model_state[name] = file.get_tensor(key)
                else:
                    number, index, field = name.split(".")
                    states[int(number)].setdefault(int(index), {})[field] = file.get_tensor(key)
    except SafetensorError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    try:
        model.load_state_dict(model_state)
    except RuntimeError as error:
        raise InputError(
            f"{path} does not fit the model of {run / CONFIG}: {str(error).splitlines()[-1].strip()}"
        ) from None
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
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
            raise InputError(f"cannot write {self.path}: {reason(error)}") from error


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
