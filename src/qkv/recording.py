"""Taps beside the kernel: attention probabilities computed anew for those who ask.

Legend: H heads, Lq and Lk queries and keys of a sequence, E head width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from qkv.attention import Pattern, Tap, Tappable


class Attentive(Protocol):
    """A model that names its attention by stack: encoder, decoder, cross."""

    def attentions(self) -> dict[str, list[Tappable]]:
        """Each stack's layers from the first to the last."""
        ...


LayerKey = tuple[str, int]
"""A stack and the number of one of its layers."""


@contextmanager
def tapped(model: Attentive, taps: Mapping[LayerKey, Tap]) -> Iterator[None]:
    """Put taps to a model's layers for as long as the `with` block lasts.

    Compiled blocks (`fast`) show what they computed, but go on with their own answers.
    Raises RuntimeError for a layer that has a tap already.
    """
    stacks = model.attentions()
    modules = {(stack, layer): stacks[stack][layer] for stack, layer in taps}
    if any(module.tap is not None for module in modules.values()):
        raise RuntimeError("this model is being recorded already")
    try:
        for key, module in modules.items():
            module.tap = taps[key]
        yield
    finally:
        for module in modules.values():
            module.tap = None


_SCORES = 1 << 20
"""Most attention scores that are computed at a time: 4 MiB."""


@dataclass
class Recorder:
    """Recomputes one layer's attention probabilities beside the kernel, from the same queries and keys."""

    heads: Sequence[int] | None = None
    rows: Sequence[int] | None = None
    dtype: torch.dtype = torch.float32
    calls: deque[list[Tensor]] = field(default_factory=deque)
    """For each forward pass that is kept, each sequence's probabilities (heads, rows, Lk)."""
    residual: float = 0.0
    """Largest absolute difference so far between A·V from these probabilities and what the kernel gave."""

    @torch.no_grad()
    def see(self, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, answer: Tensor) -> Tensor:
        """Record one call."""
        key_starts = pattern.keys.starts.tolist()
        query_starts = accumulate(pattern.queries.lengths, initial=0)
        lengths = zip(pattern.queries.lengths, pattern.keys.lengths, strict=True)
        maps = []
        for i, ((Lq, Lk), q, k) in enumerate(zip(lengths, query_starts, key_starts, strict=False)):
            own, seen = slice(q, q + Lq), slice(k, k + Lk)
            maps.append(self._sequence(query[own], key[seen], value[seen], answer[own], pattern.mask(i)))
        self.calls.append(maps)
        return answer

    def _sequence(
        self, query: Tensor, key: Tensor, value: Tensor, answer: Tensor, mask: Tensor | None
    ) -> Tensor:
        Lk, H, E = key.shape
        if self.rows is not None and len(query):  # a slot that asks nothing has none
            rows = [range(len(query))[row] for row in self.rows]
            query, answer, mask = query[rows], answer[rows], None if mask is None else mask[rows]
        if self.heads is not None:
            heads = [range(H)[head] for head in self.heads]
            query, key, value, answer = (x[:, heads] for x in (query, key, value, answer))
        Q, K, V, kernel = (x.transpose(0, 1).float() for x in (query, key, value, answer))  # (heads, L, E)
        maps = query.new_empty(len(Q), len(query), Lk, dtype=self.dtype)
        if not maps.numel():
            return maps
        step = max(1, _SCORES // (len(Q) * Lk))
        with torch.autocast(query.device.type, enabled=False):  # in training it would multiply in bfloat16
            for part in (slice(row, row + step) for row in range(0, len(query), step)):
                scores = (Q[:, part] * E**-0.5) @ K.transpose(1, 2)  # (heads, rows, Lk)
                if mask is not None:
                    scores.masked_fill_(~mask[part], float("-inf"))
                probabilities = scores.softmax(-1)
                difference = (probabilities @ V).sub_(kernel[:, part]).abs_().max().item()
                self.residual = float(np.maximum(self.residual, difference))  # NaN stays NaN
                maps[:, part] = probabilities
        return maps


class Record:
    """What was recorded: `record[layer][i]` is sequence i's map (H, Lq, Lk) in the latest forward pass.

    With several stacks recorded (an encoder-decoder model), `record["cross", layer][i]`.
    """

    def __init__(self, taps: dict[LayerKey, Recorder]) -> None:
        self.taps = taps

    def __getitem__(self, key: int | LayerKey) -> list[Tensor]:
        return self.tap(key).calls[-1]

    def tap(self, key: int | LayerKey) -> Recorder:
        """One layer's tap, with every call it kept. Raises KeyError if that layer is not recorded."""
        if isinstance(key, int):
            stacks = {stack for stack, _ in self.taps}
            if len(stacks) != 1:
                raise KeyError(f"several stacks are recorded: ask for ({sorted(stacks)[0]!r}, {key})")
            key = (stacks.pop(), key)
        if key not in self.taps:
            raise KeyError(f"{key} is not recorded; these are: {sorted(self.taps)}")
        return self.taps[key]

    @property
    def residual(self) -> float:
        """Largest difference between A·V and the kernels' own answers in all layers recorded."""
        return float(np.max([tap.residual for tap in self.taps.values()], initial=0.0))  # NaN stays NaN


@contextmanager
def record(
    model: Attentive,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    stacks: Sequence[str] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    calls: int | None = None,
) -> Iterator[Record]:
    """Record attention probabilities of the forward passes inside the `with` block.

    The fused kernels stay on; the probabilities are computed beside them for the chosen layers,
    heads and query rows (None: all; negative numbers count from the end). stacks: some of "encoder",
    "decoder", "cross". dtype: of what is kept, torch.float16 for half the memory. calls: only so many of the
    latest forward passes are kept; None: all, of which decoding makes one a token. Raises IndexError for a
    layer or head, KeyError for a stack that the model does not have, RuntimeError for a layer that is being
    recorded already. A forward pass inside raises IndexError if one of its sequences lacks a chosen row.
    """
    modules = model.attentions()
    chosen: dict[LayerKey, Tappable] = {}
    for stack in modules if stacks is None else stacks:
        depth = range(len(modules[stack]))
        for layer in depth if layers is None else [depth[i] for i in layers]:
            chosen[stack, layer] = modules[stack][layer]
    for module in chosen.values():
        if heads is not None and any(head not in range(-module.heads, module.heads) for head in heads):
            raise IndexError(f"heads {list(heads)} of a layer that has {module.heads}")
    taps = {key: Recorder(heads, rows, dtype, deque(maxlen=calls)) for key in chosen}
    with tapped(model, taps):
        yield Record(taps)
