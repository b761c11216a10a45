"""The four models, and the way from a config to one of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qkv.config import AnyModelConfig, BertConfig, GPTConfig, TransformerConfig
from qkv.models import bert, gpt, transformer, vit
from qkv.models.bert import Bert
from qkv.models.gpt import GPT
from qkv.models.multitask import MultiTaskBert
from qkv.models.transformer import Transformer
from qkv.models.vit import ViT

__all__ = ["GPT", "PRESETS", "Bert", "Model", "MultiTaskBert", "Transformer", "ViT", "allocate", "build"]

Model = Transformer | Bert | GPT | ViT

PRESETS: dict[str, AnyModelConfig] = {**transformer.PRESETS, **bert.PRESETS, **gpt.PRESETS, **vit.PRESETS}
"""Published sizes by name."""


def build(config: AnyModelConfig) -> Model:
    """A model of this config with fresh weights, drawn from torch's global generator."""
    if isinstance(config, TransformerConfig):
        return Transformer(config)
    if isinstance(config, BertConfig):
        return Bert(config)
    if isinstance(config, GPTConfig):
        return GPT(config)
    return ViT(config)


def allocate(model: Model, empty: Callable[[torch.Size, torch.dtype], Tensor]) -> None:
    """Give a model that was built on the meta device tensors as `empty` makes them.

    Its `to_empty` would import sympy, and cannot make fake tensors.
    """
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(empty(old.shape, old.dtype), old.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, empty(buffer.shape, buffer.dtype))
