"""The run folder and the states in it: each written whole or not at all, never pickled.

config.toml        the resolved settings
metrics.jsonl      one line a record
config.json, model.safetensors, tokenizer.json ...   the best model so far, a Hugging Face folder;
                   of several tasks, a folder each: TASK/config.json ...
tracked-as.txt     the name under which a tracker files the run
state/step-N/      what resuming behind step N needs: one file of tensors a rank, and progress.json

States are torch's distributed checkpoints in safetensors form, so that a run can go on with another
number of ranks than it began with.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from qkv.config import from_dict
from qkv.distributed import ALONE, Ranks
from qkv.divergence import LossTrend
from qkv.errors import InputError
from qkv.files import blame, read_json, reason, replace_text, sync

CONFIG = "config.toml"
METRICS = "metrics.jsonl"
STATES = "state"
PROGRESS = "progress.json"


@dataclass
class Progress:
    """Where a run is: what of its state is not a tensor."""

    data: str
    """Fingerprint of the training and held-out data."""
    held_out: dict[str, str] = field(default_factory=dict)
    """That of each task's held-out data alone; of a single one under the name ""."""
    step: int = 0
    seconds: float = 0.0
    """Training time so far, evaluation included."""
    best_step: int = 0
    best_scores: dict[str, float] = field(default_factory=dict)
    """Held-out scores of the model with the lowest loss so far, which the run folder holds."""
    finished: bool = False
    """Whether nothing is left to do: all steps are done, or the run stopped early."""
    trend: LossTrend = field(default_factory=LossTrend)
    """Whether the run diverges."""


# ---------------------------------------------------------------- states


def saved_states(run: Path) -> list[Path]:
    """The folders of the states that a run has, oldest first."""
    return sorted(state for state in (run / STATES).glob("step-*") if re.fullmatch(r"step-\d+", state.name))


def step_of(state: Path) -> int:
    """The step behind which a state was saved."""
    return int(state.name.removeprefix("step-"))


def regular_states(run: Path, every: int) -> list[Path]:
    """Those saved at multiples of `every` steps, oldest first: what a run that is never cut off saves."""
    return [state for state in saved_states(run) if step_of(state) and step_of(state) % every == 0]


def save_state(
    run: Path,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    average: Mapping[str, Tensor],
    progress: Progress,
    ranks: Ranks = ALONE,
) -> None:
    """Write the state of a run; every rank writes its part.

    Raises InputError on a full disk; the states before it stay.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    partial, final = run / STATES / ".partial", run / STATES / f"step-{progress.step:09}"
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, fields in _optimizer_state(model, optimizers).items():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in fields.items()}
    tensors |= {f"average.{name}": tensor for name, tensor in average.items()}
    try:
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        ranks.barrier()
        with _torch_checkpoint():
            save(
                {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
                storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
                no_dist=ranks.count == 1,
            )
        if ranks.first:
            (partial / PROGRESS).write_text(json.dumps(asdict(progress)), encoding="utf-8")
            for file in (*partial.iterdir(), partial):
                sync(file)
            shutil.rmtree(final, ignore_errors=True)  # a killed `begin` may have left one
            partial.rename(final)
            sync(final.parent)
        ranks.barrier()
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            shutil.rmtree(partial)
        kept = f"; the state of step {step_of(saved_states(run)[-1])} is kept" if saved_states(run) else ""
        raise InputError(f"cannot write {final}: {reason(error)}{kept}") from error


def drop_states(run: Path, keep: int, every: int) -> None:
    """Remove all states but the newest one and the last `keep` of those saved at multiples of `every`."""
    kept = regular_states(run, every)[-keep:]
    for state in saved_states(run)[:-1]:
        if state not in kept:
            shutil.rmtree(state, ignore_errors=True)


def load_state(
    run: Path, model: nn.Module, optimizers: Sequence[Optimizer], average: Mapping[str, Tensor]
) -> Progress:
    """Put a run's last state into its model, optimisers and average, in place.

    Raises InputError if there is none, or if it is damaged or does not fit.
    """
    states = saved_states(run)
    if not states:
        raise InputError(f"{run} has no state to resume from ({run / STATES} is empty or missing)")
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in average.items()}
    parameters = dict(model.named_parameters())
    fields: dict[str, dict[str, Tensor]] = {}
    for key, size in _stored_sizes(states[-1]).items():
        part, _, rest = key.partition(".")
        name, _, field_name = rest.rpartition(".")
        if part == "optimizer" and name in parameters:
            like = parameters[name].detach()
            made = torch.zeros_like(like) if size == like.shape else torch.zeros(size, device=like.device)
            tensors[key] = fields.setdefault(name, {})[field_name] = made
    _read(states[-1], tensors)
    for optimizer in optimizers:
        names = {id(p): name for name, p in parameters.items()}
        for group in optimizer.param_groups:
            for p in group["params"]:
                if stored := fields.get(names[id(p)]):
                    muon = isinstance(optimizer, torch.optim.Muon)
                    if stored.keys() != ({"momentum_buffer"} if muon else {"step", "exp_avg", "exp_avg_sq"}):
                        raise InputError(
                            f"{states[-1]} does not fit the run's {CONFIG}: train.optimizer was another one"
                        )
                    optimizer.state[p] = stored
    return progress_of(states[-1])


def progress_of(state: Path) -> Progress:
    """Where a run was when this state was saved."""
    with blame(state / PROGRESS):
        return from_dict(Progress, read_json(state / PROGRESS))


def load_weights(state: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fill tensors with the model's weights of a state, in place."""
    _read(state, {f"model.{name}": tensor for name, tensor in weights.items()}, all_of_it=False)
    return weights


def _read(state: Path, tensors: dict[str, Tensor], all_of_it: bool = True) -> None:
    """Fill tensors by name from a state. Raises InputError unless names and shapes agree."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    sizes = _stored_sizes(state)
    for name, tensor in tensors.items():
        if name not in sizes:
            raise InputError(f"{state} does not fit the run's {CONFIG}: it has no tensor {name}")
        if sizes[name] != tensor.shape:
            raise InputError(
                f"{state} does not fit the run's {CONFIG}: {name} is {tuple(sizes[name])}, "
                f"not {tuple(tensor.shape)}"
            )
    if all_of_it and (surplus := sorted(sizes.keys() - tensors.keys())):
        raise InputError(f"{state} does not fit the run's {CONFIG}: it also has {surplus[0]}")
    try:
        with _torch_checkpoint():
            load(
                {name: tensor.detach() for name, tensor in tensors.items()},
                storage_reader=HuggingFaceStorageReader(str(state)),
                no_dist=not torch.distributed.is_initialized(),
            )
    except (OSError, SafetensorError) as error:
        raise InputError(f"{state} cannot be read: {error}") from None


def _stored_sizes(state: Path) -> dict[str, torch.Size]:
    """The shape of each tensor of a state. Raises InputError if it is damaged."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        stored: dict[str, Any] = HuggingFaceStorageReader(str(state)).read_metadata().state_dict_metadata
    except (OSError, SafetensorError) as error:
        raise InputError(f"{state} cannot be read: {error}") from None
    for name, about in stored.items():
        if sum(prod(chunk.sizes) for chunk in about.chunks) != prod(about.size):
            raise InputError(f"{state} cannot be read: a part of {name} is missing")
    return {name: about.size for name, about in stored.items()}


def _optimizer_state(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, dict[str, Tensor]]:
    """What the optimisers remember of each parameter, by the parameter's name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: state for optimizer in optimizers for p, state in optimizer.state.items()}


@contextmanager
def _torch_checkpoint() -> Iterator[None]:
    """Around torch's saving and loading: the error behind what it wraps, and no word about one process."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, OSError | SafetensorError | KeyboardInterrupt):
                raise failure from None
        raise


# ---------------------------------------------------------------- metrics


class Metrics:
    """metrics.jsonl: one record a line, flushed at once."""

    def __init__(self, run: Path, step: int = 0) -> None:
        """Continue after `step`: records of later steps, from a run that was cut off, are dropped."""
        self.path = run / METRICS
        kept = [record for record in read_metrics(run) if record["step"] <= step] if step else []
        replace_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))

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
