"""Adapters in peft's format: what is learned beside the matrices of a checkpoint, in a folder of its own.

adapter_config.json          the checkpoint that it belongs to, rank, scale, and which modules are adapted
adapter_model.safetensors    A and B of each, and modules that were trained whole, such as a classifier
labels.json                  BERT's head and names of the classes, which peft does not keep: only here

peft names modules as transformers' models do in memory, which for all but ViT is as in their files; so the
tables of the families say what is whose. Several matrices of theirs that are one of ours have an A and a B
each.

Legend: I inputs and O outputs of a matrix on disk, r rank.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qkv import files
from qkv.config import AnyModelConfig, BertHead
from qkv.errors import InputError
from qkv.hub.folder import ADAPTER, ADAPTER_WEIGHTS, LABELS, open_tensors, weight_files
from qkv.hub.table import Format, Row, Table, refuse
from qkv.lora import adapted, head

_ROOT = "base_model.model."
"""Begins all names of tensors."""
_NO_EFFECT = (
    "auto_mapping",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
)
"""Settings that say nothing about what a trained adapter computes on this base."""
_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
"""Settings with the values that are supported. Other initial weights come with a changed base."""
_TASKS = {
    "LMHeadModel": "CAUSAL_LM",
    "MTModel": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}
"""Endings of transformers' architectures, and what peft calls their task; a ViT's has no name there."""
_HEADS: Mapping[str | None, tuple[BertHead, ...]] = {
    "SEQ_CLS": ("classification", "multi_label", "regression"),
    "TOKEN_CLS": ("tagging",),
    "VALUE": ("regression", "multi_label"),
}
"""What peft's tasks may mean: that of them which the base has, else the first. VALUE: with one output."""
_READ = (
    "base_model_name_or_path",
    "revision",
    "r",
    "lora_alpha",
    "target_modules",
    "modules_to_save",
    "task_type",
)


class Adapter(NamedTuple):
    """What an adapter_config.json says."""

    base: str
    """Folder or Hub id of the checkpoint that was adapted."""
    revision: str | None
    rank: int
    alpha: float
    targets: re.Pattern[str] | tuple[str, ...]
    """Adapted modules: an expression for their whole names, or endings of them."""
    whole: tuple[str, ...]
    """Modules that were trained whole: parts of their names."""
    heads: tuple[BertHead, ...]
    """Its head, or those that its task may need; empty: the one of the base."""
    labels: tuple[str, ...]
    """Its classes, in a folder that was written here."""
    unnamed: tuple[str, ...]
    """Names of its classifier's outputs, if nobody names as many."""

    def targeted(self, module: str) -> bool:
        """Whether a module of that name is adapted."""
        if isinstance(self.targets, re.Pattern):
            return self.targets.fullmatch(module) is not None
        return any(f".{module}".endswith(f".{target}") for target in self.targets)

    def replaced(self, tensor: str) -> bool:
        """Whether a tensor of that name belongs to a module that was trained whole."""
        return any(f".{module}." in f".{tensor}" for module in self.whole)


# ---------------------------------------------------------------- reading


def read(folder: Path) -> Adapter | None:
    """What adapter_config.json says; None: there is none, so the folder holds a whole checkpoint.

    Raises InputError for a method or setting of peft that is not supported, and if the base is not named.
    """
    path = folder / ADAPTER
    if not path.is_file():
        return None
    theirs = files.read_json(path)
    with files.blame(path):
        for name, value in theirs.items():
            if name in _SUPPORTED:
                if value not in _SUPPORTED[name]:
                    raise InputError(f"{name} is {value!r}; only {_SUPPORTED[name][0]!r} is supported")
            elif name not in (*_NO_EFFECT, *_READ) and value:
                raise InputError(f"{name} is {value!r}; adapters with that setting are not supported")
        if not theirs.get("base_model_name_or_path"):
            raise InputError("base_model_name_or_path must name the checkpoint that was adapted")
        if not (isinstance(theirs["r"], int) and theirs["r"] > 0):
            raise InputError(f"r is {theirs['r']!r}; it must be a whole number above 0")
        targets = theirs["target_modules"]
        try:
            targets = re.compile(targets) if isinstance(targets, str) else tuple(targets)
        except re.error as error:
            raise InputError(f"target_modules is {targets!r}, no regular expression: {error}") from None
        with files.blame(folder / LABELS):
            ours = files.json_or_empty(folder / LABELS)
            head, labels = ours.get("head"), tuple(ours.get("labels", ()))
        with open_tensors(weight_files(folder, ADAPTER_WEIGHTS)) as tensors:
            outputs = [part.shape[0] for name, part in tensors.items() if name.endswith(".classifier.weight")]
        task = theirs.get("task_type")
        task = "VALUE" if task == "SEQ_CLS" and outputs == [1] else task
        return Adapter(
            base=theirs["base_model_name_or_path"],
            revision=theirs.get("revision"),
            rank=theirs["r"],
            alpha=float(theirs["lora_alpha"]),
            targets=targets,
            whole=tuple(theirs.get("modules_to_save") or ()),
            heads=(head,) if head else _HEADS.get(task, ()),
            labels=labels,
            unnamed=tuple(f"LABEL_{i}" for i in range(outputs[0])) if outputs else (),
        )


@torch.no_grad()
def merge(
    folder: Path,
    adapter: Adapter,
    model: nn.Module,
    config: AnyModelConfig,
    table: Table,
    fresh: Collection[str] = (),
) -> None:
    """Make the base the adapted model: W + (alpha / r) B A, and modules that were trained whole.

    fresh: our names of tensors that the base did not have. Raises InputError naming what is missing,
    unexpected or of a wrong shape, as it is called on disk; the model is then of no use.
    """
    with open_tensors(weight_files(folder, ADAPTER_WEIGHTS)) as stored:
        tensors = {name.removeprefix(_ROOT): part.read().float() for name, part in stored.items()}
    names = table.match(tensors)
    bare = not any(name.startswith(table.prefix) for name in tensors)
    state = model.state_dict()
    known: set[str] = set()
    missing, misshapen = [], []

    def take(name: str, shape: tuple[int, ...]) -> Tensor | None:
        """The tensor of that name in the rows, if it is there and has that shape."""
        known.add(name)
        on_disk = _ROOT + names.get(name, table.on_disk(name, bare))
        tensor = tensors[names[name]] if name in names else None
        if tensor is None:
            missing.append(on_disk)
        elif tensor.shape != shape:
            misshapen.append(f"{on_disk} {tuple(tensor.shape)} instead of {shape}")
            tensor = None
        return tensor

    for row in table.layers(config):
        if row.ours not in state:
            continue
        shape = row.disk_shape(state[row.ours].shape, config)
        for part, name in zip(state[row.ours].chunk(len(row.theirs)), row.theirs, strict=True):
            module = name.removesuffix(".weight")
            aliases = {table.on_disk(alias, bare) for alias in (module, table.in_memory(module))}
            a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
            if name in names or row.ours in fresh or adapter.replaced(table.on_disk(name, bare)):
                if (whole := take(name, shape)) is not None:
                    part.copy_(row.read([whole], part.shape, config))
            elif part.dim() == 2 and (a in names or b in names or any(map(adapter.targeted, aliases))):
                outputs, inputs = part.shape
                A, B = take(a, (adapter.rank, inputs)), take(b, (outputs, adapter.rank))  # (r, I), (O, r)
                if A is not None and B is not None:
                    part += adapter.alpha / adapter.rank * row.by_matrix(B @ A, config)
    unexpected = [_ROOT + names[name] for name in names if name not in known]
    refuse({"missing": missing, "unexpected": unexpected, "of a wrong shape": misshapen})


# ---------------------------------------------------------------- writing


def write(
    model: nn.Module, config: AnyModelConfig, format: Format[Any], base: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings by file, and the tensors, of a model whose adapters belong to `base`."""
    table, bare = format.table, format.bare(config)
    rows = {row.ours: row for row in table.layers(config)}
    layers, state = adapted(model), model.state_dict()
    disk: dict[str, Tensor] = {}
    targets, whole, trained_whole = set(), set(), head(model)
    for name, layer in layers.items():
        row = rows[f"{name}.weight"]
        for theirs, A, B in zip(row.theirs, layer.A, layer.B, strict=True):
            module = table.in_memory(theirs.removesuffix(".weight"))
            targets.add(module)
            on_disk = _ROOT + table.on_disk(module, bare)
            disk |= {f"{on_disk}.lora_A.weight": A, f"{on_disk}.lora_B.weight": row.by_head(B, config)}
    for name in state:
        if name.partition(".")[0] in trained_whole:
            for theirs, part in zip(rows[name].theirs, rows[name].write(state[name], config), strict=True):
                whole.add(theirs.rpartition(".")[0])
                disk[_ROOT + table.on_disk(theirs, bare)] = part
    lora = next(iter(layers.values())).config
    architecture = format.rest(config, None)["architectures"][0]
    settings = {
        "peft_type": "LORA",
        "task_type": next((task for end, task in _TASKS.items() if architecture.endswith(end)), None),
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": _endings(targets, [*rows.values()], table),
        "modules_to_save": sorted(whole) or None,
        "fan_in_fan_out": any(rows[f"{name}.weight"].transpose for name in layers),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    ours = {name: value for name in ("head", "labels") if (value := getattr(config, name, None))}
    return {ADAPTER: settings, LABELS: ours}, {
        name: tensor.detach().cpu().clone() for name, tensor in disk.items()
    }


def _endings(modules: set[str], rows: Iterable[Row], table: Table) -> list[str]:
    """Endings of the names of these modules of transformers' models, which no others have."""
    names = (name for row in rows for name in row.theirs if name.endswith(".weight"))
    others = {table.in_memory(name.removesuffix(".weight")) for name in names} - modules
    endings = set()
    for module in modules:
        ending = re.split(r"\.\d+\.", module)[-1]  # behind the number of the layer
        endings.add(module if any(other.endswith(f".{ending}") for other in others) else ending)
    return sorted(endings)
