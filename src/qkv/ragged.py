"""Sequences of different lengths laid end to end: the only form of a batch in this library.

Legend: T tokens of the batch, N sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

Kept = TypeVar("Kept", Tensor, Tensor | None)


def kept(make: Callable[[Any], Kept]) -> cached_property[Kept]:
    """A property that is made once, and not as a tensor of inference mode: training may use it later."""
    return cached_property(torch.inference_mode(False)(make))


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each sequence of a batch begins and ends.

    All layers of one forward pass share one layout, so what is derived from it is computed once.
    """

    lengths: tuple[int, ...]
    """Tokens of each sequence; 0 is allowed."""
    device: torch.device
    stride: int | None = None
    """Sequence i begins at i * stride; None: right where the one before it ends. A cache uses a stride."""

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def longest(self) -> int:
        """Length of the longest sequence; 0 if there are none."""
        return max(self.lengths, default=0)

    @cached_property
    def equal(self) -> bool:
        """Whether all sequences have the same length."""
        return len(set(self.lengths)) <= 1

    @cached_property
    def tokens(self) -> int:
        """T, the number of tokens in all sequences."""
        return sum(self.lengths)

    @kept
    def sizes(self) -> Tensor:
        """Lengths as int64 (N,)."""
        return torch.tensor(self.lengths, dtype=torch.long, device=self.device)

    @kept
    def starts(self) -> Tensor:
        """Row at which each sequence begins, int64 (N,)."""
        if self.stride is not None:
            return torch.arange(len(self), device=self.device) * self.stride
        return self.sizes.cumsum(0) - self.sizes

    @kept
    def boundaries(self) -> Tensor:
        """First row of each sequence and, last, T: int32 (N + 1,), as varlen kernels want it."""
        zero = torch.zeros(1, dtype=torch.int32, device=self.device)
        return torch.cat([zero, self.sizes.cumsum(0, dtype=torch.int32)])

    @kept
    def owner(self) -> Tensor:
        """Which sequence each token belongs to, int64 (T,)."""
        sequences = torch.arange(len(self), device=self.device)
        return torch.repeat_interleave(sequences, self.sizes, output_size=self.tokens)

    @kept
    def positions(self) -> Tensor:
        """Position of each token in its own sequence, int64 (T,)."""
        begins = self.sizes.cumsum(0) - self.sizes
        return torch.arange(self.tokens, device=self.device) - begins[self.owner]

    @kept
    def rows(self) -> Tensor:
        """Row of each token, int64 (T,)."""
        return self.starts[self.owner] + self.positions


@dataclass(frozen=True, eq=False)
class Ragged:
    """N sequences end to end: `values` (T, ...) and the layout that says where each ends."""

    values: Tensor
    layout: Layout

    def __post_init__(self) -> None:
        if self.values.shape[0] != self.layout.tokens:
            rows = self.values.shape[0]
            raise ValueError(f"{rows} rows of values, but the lengths sum to {self.layout.tokens}")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return self.layout.lengths

    def __len__(self) -> int:
        return len(self.layout)

    def __repr__(self) -> str:
        return f"Ragged({len(self)} sequences, values {tuple(self.values.shape)} {self.values.dtype})"

    def like(self, values: Tensor) -> Ragged:
        """Other values (T, ...) on the same layout."""
        return Ragged(values, self.layout)

    def split(self) -> list[Tensor]:
        """Each sequence on its own: N views (length, ...)."""
        return list(torch.split(self.values, list(self.lengths)))

    def first(self) -> Tensor:
        """The first token of every sequence, (N, ...). Raises ValueError if a sequence has none."""
        self._need_tokens()
        return self.values[self.layout.starts]

    def last(self) -> Tensor:
        """The last token of every sequence, (N, ...). Raises ValueError if a sequence has none."""
        self._need_tokens()
        return self.values[self.layout.starts + self.layout.sizes - 1]

    def mean(self) -> Tensor:
        """The mean over each sequence's tokens, (N, ...), in float32 if the values are in half precision.

        Raises ValueError if a sequence has none.
        """
        self._need_tokens()
        values = self.values.to(torch.promote_types(self.values.dtype, torch.float32))
        sums = values.new_zeros(len(self), *values.shape[1:]).index_add(0, self.layout.owner, values)
        return sums / self.layout.sizes.view(-1, *[1] * (self.values.dim() - 1))

    def to(self, device: torch.device | str) -> Ragged:
        """The same sequences on another device."""
        device = torch.device(device)
        return Ragged(self.values.to(device), Layout(self.lengths, device))

    def _need_tokens(self) -> None:
        if 0 in self.lengths:
            raise ValueError(f"sequence {self.lengths.index(0)} has no tokens")


def pack(sequences: Iterable[Tensor | Sequence[int]], device: torch.device | str | None = None) -> Ragged:
    """Lay sequences end to end.

    Each is a tensor (length, ...) or a sequence of token ids; the trailing shapes and dtypes agree.
    `pack([[2, 7, 7, 9], [5, 1]])` has values (6,) and lengths (4, 2).
    """
    parts = list(sequences)
    if any(isinstance(part, Tensor) for part in parts):
        values = torch.cat([p if isinstance(p, Tensor) else torch.tensor(p, dtype=torch.long) for p in parts])
    else:  # one tensor of all ids takes a fraction of the time of one for each
        values = torch.tensor(list(chain.from_iterable(parts)), dtype=torch.long)
    if device is not None:
        values = values.to(device)
    return Ragged(values, Layout(tuple(map(len, parts)), values.device))


def rows_of(values: Tensor, indices: Sequence[int]) -> Tensor:
    """These rows of values (R, .); all of them, in order, are no copy."""
    return values if list(indices) == list(range(len(values))) else values[list(indices)]
