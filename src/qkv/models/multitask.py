"""One BERT encoder with a head a task: MT-DNN (Liu et al. 2019).

Legend: D model width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from qkv.config import BertHead
from qkv.models.bert import Bert

Head = tuple[BertHead, tuple[str, ...]]
"""A head, and the names of its outputs."""


class MultiTaskBert(Bert):
    """An encoder with its pooler, and for each task a Bert of that very encoder with a head of its own.

    The tasks' models are no children of this module, so its parameters are those of the encoder, once, and
    those of the heads.
    """

    def __init__(self, encoder: Bert, heads: Mapping[str, Head]) -> None:
        """Takes over the modules of `encoder`, a Bert with the head "pooler"; heads by task are fresh."""
        with torch.device("meta"):
            super().__init__(encoder.config)
        _share(encoder, self)
        self.tasks: dict[str, Bert] = {}
        self.heads = nn.ModuleList()
        for task, (head, labels) in heads.items():
            with torch.device("meta"):
                model = Bert(encoder.config)
            _share(encoder, model)
            model.reset_head(head, labels)
            shared = set(encoder.children())
            own = {name: module for name, module in model.named_children() if module not in shared}
            self.heads.append(nn.ModuleDict(own))
            self.tasks[task] = model


def _share(encoder: Bert, model: Bert) -> None:
    """Put the modules of one into the other."""
    for name, module in encoder.named_children():
        setattr(model, name, module)
