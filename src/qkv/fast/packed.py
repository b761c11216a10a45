"""Embeddings in bfloat16, and what runs where `native` cannot: torch's own operators with packed weights.

Legend: D model width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.layers import Output


class PackedLinear(nn.Module):
    """x W^T + bias in bfloat16; the residual stream that it joins stays in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight (outputs, inputs), bias (outputs,)."""
        super().__init__()
        self.weight = weight.detach().bfloat16()
        self.bias = None if bias is None else bias.detach().bfloat16()
        available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        if available and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs), bfloat16."""
        x = x.bfloat16()
        if self.weight.is_mkldnn:
            answer: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return answer
        return F.linear(x, self.weight, self.bias)

    def part(self, x: Tensor, outputs: slice) -> Tensor:
        """These of the outputs, as `attention.Packed`."""
        return self(x)[..., outputs]  # type: ignore[no-any-return]


class PackedOutput(Output):
    """`layers.Output` with a packed copy of the embeddings."""

    def __init__(self, embeddings: Tensor) -> None:
        """embeddings (V, D)."""
        super().__init__()
        self.linear = PackedLinear(embeddings, None)

    def forward(self, hidden: Tensor, embeddings: Tensor, bias: Tensor | None = None) -> Tensor:
        """hidden (..., D), bias (V,) -> logits (..., V), float32; `embeddings` are those that were packed."""
        logits: Tensor = self.linear(hidden).float()
        return logits if bias is None else logits.add_(bias)


class PackedEmbedding(nn.Module):
    """Embeddings that are kept in bfloat16."""

    def __init__(self, weight: Tensor) -> None:
        """weight (V, D)."""
        super().__init__()
        self.weight = nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
        self.dtype = weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., D), of the type that they had."""
        return F.embedding(ids, self.weight).to(self.dtype)
