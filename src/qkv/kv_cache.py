"""What decoding remembers: keys and values of earlier tokens, one text in each slot.

Legend: T tokens of the batch, H heads, E head width, S slots of a cache, C rows of a slot.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.attention import KeyValue, Pattern
from qkv.errors import InputError
from qkv.ragged import Layout

ROWS = 32
"""Tokens of each text that a cache has room for before it grows, if nothing is said."""


class LayerCache:
    """Keys and values of one layer, each (S * C, H, E): row r of slot s is s * C + r."""

    def __init__(self, cache: Cache) -> None:
        """Of this cache."""
        # In a cycle, the tensors would stay until the garbage collector comes.
        self.cache: Cache = weakref.proxy(cache)
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> KeyValue:
        """Store those of the new tokens, (T, H, E) each, where `Cache.extend` said; return all."""
        kept, seen = self.reserve(key)
        kept.index_copy_(0, self.cache.rows, key.to(kept.dtype))  # perhaps of before a model was made faster
        seen.index_copy_(0, self.cache.rows, value.to(seen.dtype))
        return kept, seen

    def reserve(self, like: Tensor) -> KeyValue:
        """Room for the cache's slots, of the type of `like` (., H, E); what is there already stays."""
        if self.key is None or self.value is None:
            # Zeros, because what no query may attend is multiplied by a weight of zero.
            shape = (len(self.cache) * self.cache.capacity, *like.shape[1:])
            self.key, self.value = like.new_zeros(shape), like.new_zeros(shape)
        return self.key, self.value

    def read(self) -> KeyValue:
        """All keys and values. Something must have been stored."""
        assert self.key is not None and self.value is not None
        return self.key, self.value

    def slots(self) -> list[Tensor]:
        """Keys and values as views (S, C, H, E); none if nothing is stored yet."""
        return [x.view(len(self.cache), -1, *x.shape[1:]) for x in (self.key, self.value) if x is not None]

    @torch.inference_mode()
    def forget(self, slot: int, rows: slice) -> None:
        """Make these rows of a slot zero."""
        for slots in self.slots():
            slots[slot, rows] = 0

    def grown(self, rows: int) -> list[Tensor]:
        """What `slots` would be with so many more rows, flat."""
        return [F.pad(x, (0, 0, 0, 0, 0, rows)).flatten(0, 1) for x in self.slots()]


@dataclass(frozen=True)
class Branches:
    """New tokens of one slot that each end a text of their own; the texts share what they have in common.

    The rows of the slot are a tree. Who may attend whom is told by the mask alone, so a new token may take
    any row that none of the texts needs any more, and nothing is ever moved.
    """

    rows: Sequence[int]
    """Row of the slot that each new token takes."""
    position: int
    """The new tokens' position in their texts."""
    mask: Tensor
    """Which of the slot's rows each new token may attend, also itself: bool (new, rows in use) on the CPU."""


class Cache:
    """What decoding remembers: each layer's keys and values of the tokens in S slots, one text in each.

    The slots are evenly spaced and grow together, up to the model's context. memory: with an encoder, a
    cache of the same slots with the keys and values of their sources, which cross-attention reads.
    """

    def __init__(
        self,
        slots: int,
        depth: int,
        context: int,
        device: torch.device,
        rows: int = ROWS,
        memory: Cache | None = None,
    ) -> None:
        """rows: that each slot begins with, so that the cache need not grow while texts are no longer."""
        self.lengths: tuple[int, ...] = (0,) * slots
        """Rows in use of each slot."""
        self.context = context
        self.capacity = min(rows, context)
        self.device = device
        self.memory = memory
        self.layers = [LayerCache(self) for _ in range(depth)]
        self.rows = torch.zeros(0, dtype=torch.long, device=device)
        """Where the tokens of the last `extend` go, (T,)."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def layout(self) -> Layout:
        """Where the slots begin and end."""
        return Layout(self.lengths, self.device, stride=self.capacity)

    def extend(
        self, layout: Layout, branches: Mapping[int, Branches] | None = None
    ) -> tuple[Pattern, Tensor]:
        """Make room for new tokens, `layout.lengths[i]` in slot i, at its end or as its branches say.

        Returns the causal pattern of the new tokens over all tokens, and the new tokens' positions (T,).
        Raises InputError for a text over the context.
        """
        trees = branches or {}
        ends = list(self.lengths)
        places: list[tuple[int, Sequence[int]]] = []  # slots and the rows of their new tokens
        positions: list[int] = []
        for i, new in enumerate(layout.lengths):
            if not new:
                continue
            tree = trees.get(i)
            rows = range(ends[i], ends[i] + new) if tree is None else tree.rows
            depths = rows if tree is None else [tree.position] * new
            if depths[-1] >= self.context:
                said = f"sequence {i} has {depths[-1] + 1} tokens"
                raise InputError(f"{said}; this model reads at most {self.context}")
            ends[i] = rows[-1] + 1 if tree is None else tree.mask.shape[1]
            places.append((i, rows))
            positions += depths
        self._fit(max(ends, default=0))
        self.lengths = tuple(ends)
        every = [slot * self.capacity + row for slot, rows in places for row in rows]
        self.rows = torch.tensor(every, dtype=torch.long, device=self.device)
        masks = {i: tree.mask for i, tree in trees.items()}
        pattern = Pattern(layout, self.layout, causal=True, masks=masks)
        return pattern, torch.tensor(positions, dtype=torch.long, device=self.device)

    def _fit(self, longest: int) -> None:
        """Grow until a slot has so many rows."""
        if longest <= self.capacity:
            return
        # Only the branches of one text can need more rows than the context.
        twice = 2 * self.capacity
        grown = max(longest, twice if longest > self.context else min(twice, self.context))
        larger = [layer.grown(grown - self.capacity) for layer in self.layers]  # all, or none if one fails
        for layer, tensors in zip(self.layers, larger, strict=True):
            layer.key, layer.value = tensors or (None, None)
        self.capacity = grown

    def copy(self, source: int, target: int, length: int) -> None:
        """Make slot `target` begin with the first tokens of slot `source`, and end there."""
        for layer in self.layers:
            for slots in layer.slots():
                slots[target, :length] = slots[source, :length]
            layer.forget(target, slice(length, self.lengths[target]))
        self.lengths = tuple(length if i == target else old for i, old in enumerate(self.lengths))
        if self.memory is not None:
            self.memory.copy(source, target, self.memory.lengths[source])

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget the last tokens: slot i keeps its first lengths[i]. Raises ValueError if it has fewer."""
        if any(new > old for new, old in zip(lengths, self.lengths, strict=True)):
            raise ValueError("a cache can only be truncated to fewer tokens")
        before, self.lengths = self.lengths, tuple(lengths)  # first: an interrupt leaves no text of zeros
        for slot, (new, old) in enumerate(zip(lengths, before, strict=True)):
            for layer in self.layers if new < old else ():  # a weight of zero does not silence NaN
                layer.forget(slot, slice(new, old))
