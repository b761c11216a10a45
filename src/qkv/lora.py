"""Low-rank adapters beside frozen matrices (Hu et al. 2021), as a model has them while it is trained.

Where weights are only used, `hub` has added the adapters to the matrices: a loaded model has none.

Legend: T tokens of the batch, I inputs and O outputs of a matrix, P parts of it, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.attention import Packed
from qkv.config import LoraConfig, RunConfig
from qkv.dropout import Dropout
from qkv.errors import InputError

HEAD = ("pooler", "classifier")
"""Modules of a classifier that are trained whole, as peft's `modules_to_save`."""


def check(config: RunConfig) -> None:
    """Raise InputError if a run is to train adapters without a base or a rank, or by Muon."""
    if not config.lora.rank and config.lora != LoraConfig():
        raise InputError("without lora.rank there are no adapters: give it, or leave out all of lora")
    if config.lora.rank and not config.init:
        raise InputError("lora.rank adapts a trained model: name it with init, or leave out lora.rank")
    if config.lora.rank and config.train.optimizer == "muon":
        raise InputError("train.optimizer muon is for whole matrices; with lora.rank take adamw")


class Adapted(Packed):
    """A frozen linear layer and what is learned beside it: W x + (alpha / r) B A x (equation 3).

    A layer that packs P equal ones has an A and a B for each, because each is a matrix of its own on
    disk. The two paths are not added up into one matrix: its gradient would cost as much as training it.
    """

    def __init__(self, linear: nn.Linear, parts: int, config: LoraConfig) -> None:
        """Takes over the weights of `linear`. A is drawn as peft draws it, B is zero: nothing changes yet."""
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        rank, outputs = config.rank, linear.out_features // parts
        self.A = nn.Parameter(linear.weight.new_empty(parts, rank, linear.in_features))  # (P, r, I)
        self.B = nn.Parameter(linear.weight.new_zeros(parts, outputs, rank))  # (P, O / P, r)
        nn.init.kaiming_uniform_(self.A.flatten(0, 1), a=math.sqrt(5))
        self.config = config
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, I) -> (T, O)."""
        return self.part(x, slice(None))

    def part(self, x: Tensor, outputs: slice) -> Tensor:
        """x (T, I) -> these of the outputs (T, .), which must be whole parts."""
        start, stop, _ = outputs.indices(self.out_features)
        size = self.B.shape[1]
        parts = slice(start // size, stop // size)
        hidden = F.linear(self.dropout(x), self.A[parts].flatten(0, 1))  # (T, P r)
        hidden = hidden.view(len(x), -1, self.A.shape[1])  # (T, P, r)
        learned = torch.einsum("tpr,por->tpo", hidden, self.B[parts]).flatten(1)
        return super().part(x, outputs) + self.config.alpha / self.config.rank * learned


def adapt(model: nn.Module, config: LoraConfig, parts: Mapping[str, int]) -> None:
    """Freeze a model but for its classifier, and put adapters beside the matrices of its blocks.

    parts: of how many matrices on disk each linear layer consists, by its name.
    """
    model.requires_grad_(False)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name.rpartition(".")[2] in config.targets:
            model.set_submodule(name, Adapted(linear, parts[name], config))
    for module in head(model):
        model.get_submodule(module).requires_grad_(True)


def head(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that are trained whole: none without a classifier."""
    modules = dict(model.named_children())
    return tuple(name for name in HEAD if name in modules) if "classifier" in modules else ()


def adapted(model: nn.Module) -> dict[str, Adapted]:
    """A model's adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}
