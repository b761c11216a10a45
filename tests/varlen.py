"""A plain stand-in for the CUDA kernel of ragged sequences, with its own signature and contract."""

from __future__ import annotations

import inspect
from itertools import pairwise

import pytest
import torch
import torch.nn.attention.varlen as varlen
from torch import Tensor

from qkv.attention import Pattern

SIGNATURE = inspect.signature(varlen.varlen_attn)


def stand_in(*args, **kwargs) -> Tensor:
    """What `varlen_attn` answers on a GPU; what no sequence covers is never written, here NaN."""
    given = SIGNATURE.bind(*args, **kwargs)
    given.apply_defaults()
    a = given.arguments
    assert a["cu_seq_q"].dtype == a["cu_seq_k"].dtype == torch.int32
    answer = torch.full_like(a["query"], torch.nan)
    edges = zip(pairwise(a["cu_seq_q"].tolist()), pairwise(a["cu_seq_k"].tolist()), strict=True)
    for (q0, q1), (k0, k1) in edges:
        assert q1 - q0 <= a["max_q"] and k1 - k0 <= a["max_k"]
        q, k, v = (x.transpose(0, 1) for x in (a["query"][q0:q1], a["key"][k0:k1], a["value"][k0:k1]))
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5  # (H, Lq, Lk)
        left, right = a["window_size"]  # -1: without limit; positions are aligned at the ends
        assert left == -1
        distance = torch.arange(k1 - k0) - torch.arange(q1 - q0)[:, None] - (k1 - k0) + (q1 - q0)
        if right >= 0:
            scores = scores.masked_fill(distance > right, -torch.inf)
        answer[q0:q1] = (scores.softmax(-1) @ v).transpose(0, 1)
    return answer


def takes(query: Tensor, pattern: Pattern, dropout: float) -> bool:
    """Whether a GPU would take it in half precision."""
    ragged = not (pattern.queries.equal and pattern.keys.equal)
    packed = pattern.keys.stride is None and 0 not in pattern.keys.lengths and not pattern.masks
    return packed and ragged and dropout == 0.0


def use_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and graphs go the way that they go on a GPU."""
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr("qkv.attention.varlen_kernel_takes", takes)
    monkeypatch.setattr("qkv.fast.graphs.varlen_kernel_takes", takes)
