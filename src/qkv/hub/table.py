"""How a family's tensors and settings are written on disk: tables that are read in both directions.

A `Table` pairs our tensor names with theirs, `Fields` our settings with theirs. What a row can do to a
tensor is small and reversible: rename, stack several into one, transpose, reshape.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from qkv.config import AnyModelConfig
from qkv.errors import InputError
from qkv.tokenizers import Tokenizer
from qkv.unread import Unread

# ---------------------------------------------------------------- tensors


@dataclass(frozen=True)
class Row:
    """One tensor of ours and where it is on disk. `{}` in the names stands for the number of the layer."""

    ours: str
    theirs: tuple[str, ...]
    """Several: stacked along the first dimension they are ours."""
    transpose: bool = False
    interleaved: int = 1
    """As many matrices in one: ours has them one after the other, on disk every head has its rows of each."""
    shape: tuple[int | str, ...] = ()
    """Shape on disk, in numbers and names of settings, -1 for what remains; (): the same as ours."""
    copies: tuple[str, ...] = ()
    """Other names under which the same tensor may be on disk, instead or as well. Never written."""
    count: str = "depth"
    """The setting that says how many layers there are."""

    def layer(self, number: int) -> Row:
        """This row for one layer."""
        names = tuple(name.format(number) for name in self.theirs)
        return replace(self, ours=self.ours.format(number), theirs=names)

    def disk_shape(self, shape: torch.Size, config: AnyModelConfig) -> tuple[int, ...]:
        """The shape of each tensor on disk, given ours."""
        if self.shape:
            sizes = [getattr(config, size) if isinstance(size, str) else size for size in self.shape]
            known = math.prod(size for size in sizes if size != -1)
            return tuple(shape.numel() // known if size == -1 else size for size in sizes)
        part = (shape[0] // len(self.theirs), *shape[1:])
        return part[::-1] if self.transpose else part

    def read(self, parts: list[Tensor], shape: torch.Size, config: AnyModelConfig) -> Tensor:
        """Tensors on disk -> ours."""
        parts = [part.T if self.transpose else part for part in parts]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        return self.by_matrix(whole.reshape(shape), config)

    def by_matrix(self, rows: Tensor, config: AnyModelConfig) -> Tensor:
        """Rows (H n E, ...) in the order on disk -> ours (n H E, ...), n matrices `interleaved`."""
        if self.interleaved == 1:
            return rows
        return rows.reshape(config.heads, self.interleaved, -1, *rows.shape[1:]).transpose(0, 1).flatten(0, 2)

    def by_head(self, rows: Tensor, config: AnyModelConfig) -> Tensor:
        """The inverse of `by_matrix`."""
        if self.interleaved == 1:
            return rows
        return rows.reshape(self.interleaved, config.heads, -1, *rows.shape[1:]).transpose(0, 1).flatten(0, 2)

    def write(self, tensor: Tensor, config: AnyModelConfig) -> list[Tensor]:
        """Ours -> tensors on disk, which share no memory."""
        shape = self.disk_shape(tensor.shape, config)
        parts = self.by_head(tensor.detach().cpu(), config).chunk(len(self.theirs))
        return [
            (part.T if self.transpose else part).reshape(shape).clone(memory_format=torch.contiguous_format)
            for part in parts
        ]


def module(ours: str, *theirs: str) -> tuple[Row, Row]:
    """Weight and bias of a module."""
    weight, bias = ((f"{ours}.{x}", tuple(f"{name}.{x}" for name in theirs)) for x in ("weight", "bias"))
    return Row(*weight), Row(*bias)


def conv1d(ours: str, theirs: str) -> tuple[Row, Row]:
    """A linear module that GPT keeps as a convolution of width 1: its weight is (inputs, outputs)."""
    weight, bias = module(ours, theirs)
    return replace(weight, transpose=True), bias


@dataclass(frozen=True)
class Stored:
    """A tensor in an open safetensors file, not read yet."""

    file: Any
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, from the file's header."""
        return tuple(self.file.get_slice(self.name).get_shape())

    def read(self) -> Tensor:
        """Its values, in memory of their own."""
        return self.file.get_tensor(self.name)  # type: ignore[no-any-return]


_PACKED = ("tokens.", "blocks.", "encoder.", "decoder.")
"""What an optimized model has packed begins so."""


@dataclass(frozen=True)
class Table:
    """All tensors that a family's checkpoints may hold, whatever head they have."""

    rows: tuple[Row, ...]
    prefix: str
    """Before the names of the rows where the model has a head on disk; bare models lack it."""
    outside: tuple[str, ...] = ()
    """Names of the heads begin so; they never have the prefix."""
    ignored: tuple[str, ...] = ()
    """Patterns of names that may be on disk and say nothing: constants and parts that are not built here."""
    old: tuple[tuple[str, str], ...] = ()
    """Endings of names in old checkpoints, and what they are called now."""
    modules: tuple[tuple[str, str], ...] = ()
    """What transformers' own models call the modules of a layer, where it is not as in the rows."""

    def name(self, name: str) -> str:
        """A name on disk as it is in the rows."""
        for old, new in self.old:
            if name.endswith(old):
                name = name.removesuffix(old) + new
        return _renamed(name.removeprefix(self.prefix), self.modules)

    def in_memory(self, name: str) -> str:
        """A name in the rows as transformers' own models have it."""
        return _renamed(name, [(rows, memory) for memory, rows in self.modules])

    def match(self, names: Iterable[str]) -> dict[str, str]:
        """Names as they are in the rows -> names on disk. Raises InputError if two are the same tensor's."""
        found: dict[str, str] = {}
        for name in names:
            known = self.name(name)
            if known in found:
                raise InputError(f"{found[known]} and {name} are one tensor under an old and a new name")
            found[known] = name
        return found

    def layers(self, config: AnyModelConfig) -> Iterator[Row]:
        """The rows of a model of that config, one for each layer."""
        for row in self.rows:
            numbers = range(getattr(config, row.count))
            yield from (row.layer(i) for i in numbers) if "{}" in row.ours else [row]

    def unread(
        self,
        model: nn.Module,
        config: AnyModelConfig,
        tensors: Mapping[str, Stored],
        names: Mapping[str, str],
        fresh: tuple[str, ...] = (),
    ) -> tuple[Unread, tuple[str, ...]]:
        """What the model is to have from disk; `names`, as from `match`, are those there.

        fresh: modules of ours that keep their initial values if nothing of them is on disk.
        Returns also our names of what stays so. Raises InputError naming what is missing, unexpected, or of
        a wrong shape, and copies that differ from what they copy, as they are called on disk. A tensor
        that the rows know and this model has no place for, another head's, is left out.
        """
        disk = {known: tensors[name] for known, name in names.items()}
        bare = not any(name.startswith(self.prefix) for name in names.values())
        ours = model.state_dict()
        waiting: dict[str, Callable[[], Tensor]] = {}
        rows = list(self.layers(config))
        on_disk = {row.ours.partition(".")[0] for row in rows if not disk.keys().isdisjoint(row.theirs)}
        kept, missing, misshapen, different = [], [], [], []
        for row in rows:
            if row.ours not in ours:
                continue
            if (name := row.ours.partition(".")[0]) in fresh and name not in on_disk:
                kept.append(row.ours)
                continue
            target = ours[row.ours]
            copies = [name for name in row.copies if name in disk]
            # A file holds tied tensors once, under any of their names.
            parts = row.theirs if row.theirs[0] in disk or not copies else (copies.pop(0),)
            shape = row.disk_shape(target.shape, config)
            absent = [self.on_disk(part, bare) for part in parts if part not in disk]
            shapes = {names[p]: disk[p].shape for p in (*parts, *copies) if p in disk}
            wrong = [f"{name} {found} instead of {shape}" for name, found in shapes.items() if found != shape]
            missing += absent
            misshapen += wrong
            if not absent and not wrong:
                stored = [disk[part] for part in parts]
                if copies:
                    first = stored[0].read()
                    different += [names[copy] for copy in copies if not torch.equal(disk[copy].read(), first)]
                waiting[row.ours] = partial(_read, row, stored, target.shape, target.dtype, config)
        known = {name for row in rows for name in (*row.theirs, *row.copies)}
        ignored = re.compile("|".join(self.ignored) or "(?!)")
        unexpected = [names[name] for name in disk if name not in known and not ignored.fullmatch(name)]
        refuse(
            {
                "missing": missing,
                "unexpected": unexpected,
                "of a wrong shape": misshapen,
                "different from what they are tied to": different,
            }
        )
        return Unread(waiting), tuple(kept)

    def save(self, model: nn.Module, config: AnyModelConfig, bare: bool) -> dict[str, Tensor]:
        """The model's tensors as they are on disk; InputError if those of a block are gone."""
        ours = model.state_dict()
        disk: dict[str, Tensor] = {}
        for row in self.layers(config):
            if row.ours in ours:
                for name, part in zip(row.theirs, row.write(ours[row.ours], config), strict=True):
                    disk[self.on_disk(name, bare)] = part
            elif row.ours.startswith(_PACKED) and "_norm." not in row.ours:
                raise InputError(f"the model has no {row.ours}; one that is optimized has no weights to save")
        return disk

    def on_disk(self, name: str, bare: bool) -> str:
        """A name in the rows as it is on disk."""
        return name if bare or name.startswith(self.outside) else self.prefix + name


def _read(
    row: Row, parts: list[Stored], shape: torch.Size, dtype: torch.dtype, config: AnyModelConfig
) -> Tensor:
    return row.read([part.read() for part in parts], shape, config).to(dtype).contiguous()


def _renamed(name: str, modules: Iterable[tuple[str, str]]) -> str:
    """A module, or a tensor of it, by its other name; `{}` stands for the number of the layer."""
    for one, other in modules:
        if found := re.match(re.escape(one).replace(r"\{\}", r"(\d+)") + r"(?=\.|$)", name):
            return other.format(found[1]) + name[found.end() :]
    return name


def refuse(problems: Mapping[str, list[str]]) -> None:
    """Raise InputError if there are tensors with a problem, by the kind of problem."""
    if any(problems.values()):
        raise InputError("; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names))


def _some(names: list[str], limit: int = 5) -> str:
    """The first few of many names."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# ---------------------------------------------------------------- settings

ACTIVATIONS: Mapping[str, str] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
"""What most formats call an activation, and what we call it."""


@dataclass(frozen=True)
class Fields:
    """Our settings and what config.json calls them."""

    names: Mapping[str, tuple[str, ...]]
    """Ours -> theirs; where there are several, all have the same value."""
    activation: str
    """What they call that setting."""
    activations: Mapping[str, str] = field(default_factory=lambda: ACTIVATIONS)
    """Its values, theirs -> ours."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a config.json without one of these means."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Settings of theirs with the values that are supported; the first is written."""

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """Their config -> our settings. Raises InputError for a missing or an unsupported one."""
        for name, supported in self.fixed.items():
            value = theirs.get(name, self.defaults.get(name, supported[0]))
            if value not in supported:
                raise InputError(f"{name} is {value!r}; only {supported[0]!r} is supported")
        ours = {}
        for our_name, names in self.names.items():
            values = [self._get(theirs, name) for name in names]
            if any(value != values[0] for value in values):
                raise InputError(f"{' and '.join(names)} are {values}; only equal ones are supported")
            ours[our_name] = values[0]
        value = self._get(theirs, self.activation)
        if value not in self.activations:
            raise InputError(f"{self.activation} is {value!r}; supported are {', '.join(self.activations)}")
        return {**ours, "activation": self.activations[value]}

    def _get(self, theirs: Mapping[str, Any], name: str) -> Any:
        if theirs.get(name) is not None:
            return theirs[name]
        if name in self.defaults:
            return self.defaults[name]
        raise InputError(f"{name} is missing")

    def write(self, config: AnyModelConfig) -> dict[str, Any]:
        """Our settings -> their config."""
        theirs = {name: supported[0] for name, supported in self.fixed.items()}
        for our_name, names in self.names.items():
            theirs |= {name: getattr(config, our_name) for name in names}
        theirs[self.activation] = next(a for a, ours in self.activations.items() if ours == config.activation)
        return theirs


# ---------------------------------------------------------------- formats


C = TypeVar("C", bound=AnyModelConfig)


class Format(ABC, Generic[C]):
    """One on-disk format, known by transformers' `model_type`, for models of our config C."""

    model_type: ClassVar[str]
    fields: ClassVar[Fields]
    table: ClassVar[Table]
    code: ClassVar[str] = ""
    """A file of `hub/code` that the folder carries, where transformers has no such model; empty: it has."""

    @abstractmethod
    def config(self, ours: dict[str, Any], theirs: Mapping[str, Any], tensors: Collection[str]) -> C:
        """Our config from what `fields` read, their whole config, and the names of the tensors on disk."""

    @abstractmethod
    def rest(self, config: C, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """What config.json says beside `fields`: architectures, labels, ids of special tokens."""

    def bare(self, config: C) -> bool:
        """Whether a model of this config is saved without a head."""
        return False

    def obstacle(self, config: C) -> str | None:
        """Why a model of this config cannot be expressed in this format; None if it can."""
        return None

    def auto_map(self, classes: Mapping[str, str]) -> dict[str, Any]:
        """Where transformers finds the classes in `code`, if any, by the automatic ones that look for it."""
        if not self.code:
            return {}
        file = self.code.removesuffix(".py")
        return {"auto_map": {auto: f"{file}.{name}" for auto, name in classes.items()}}

    def generation(self, config: C) -> dict[str, Any]:
        """What generation_config.json says; nothing: there is none."""
        return {}


def labels_of(theirs: Mapping[str, Any]) -> tuple[str, ...]:
    """Class names of a config.json that has a classification head; there are two where it does not say."""
    names = theirs.get("id2label") or {str(i): f"LABEL_{i}" for i in range(theirs.get("num_labels", 2))}
    if sorted(map(int, names)) != list(range(len(names))):
        raise InputError(f"id2label has the ids {', '.join(names)}; they must be 0, 1, 2, ...")
    return tuple(names[key] for key in sorted(names, key=int))


def label_settings(labels: Iterable[str]) -> dict[str, Any]:
    """id2label and label2id of a config.json; nothing without labels."""
    names = {str(i): name for i, name in enumerate(labels)}
    if not names:
        return {}
    return {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
