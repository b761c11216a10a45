"""Blocks on a GPU: passes that come again are replayed as CUDA graphs.

A step of decoding is some hundred kernels of a few microseconds each, and Python needs longer than that to
start one. A graph starts all of them at once, on the addresses on which it was captured.

Legend: T tokens of the batch, S slots of a cache, C rows of a slot, W columns of a step (most new tokens of a
slot), L keys that a step reads of a slot, M those of its source, D model width, E head width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from qkv.attention import KeyValue, LayerCache, Masked, Past, Pattern, Tappable
from qkv.layers import Stack
from qkv.ragged import Layout

PASS_TOKENS = 8192
"""Most tokens of a pass without a cache that is worth a graph: beyond, its kernels take longer than starting
them."""
STEP_TOKENS = 16
"""Most new tokens of a slot in a step that is worth one."""
KEPT = 16
"""Graphs that are kept of passes without a cache, and of each cache: those used last."""
FEWEST_KEYS = 64
"""A step reads so many keys of each slot, or twice, four times ... as many."""


@dataclass(frozen=True, eq=False)
class Call:
    """What `layers.Stack` is called with."""

    x: Tensor
    pattern: Pattern
    rotation: KeyValue | None = None
    caches: Sequence[Past] | None = None
    memory: Sequence[KeyValue] = ()
    memory_pattern: Pattern | None = None

    def run(self, stack: Stack) -> Tensor:
        """(T, D), kernel by kernel."""
        return stack(  # type: ignore[no-any-return]
            self.x,
            self.pattern,
            rotation=self.rotation,
            caches=self.caches,
            memory=self.memory,
            memory_pattern=self.memory_pattern,
        )


class GraphedStack(nn.Module):
    """`layers.Stack` that captures what it is asked for a second time; outside inference mode the same."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack = stack
        self._passes = Graphs()
        self._steps: WeakKeyDictionary[LayerCache, Graphs] = WeakKeyDictionary()

    def forward(
        self,
        x: Tensor,
        pattern: Pattern,
        *,
        rotation: KeyValue | None = None,
        caches: Sequence[LayerCache] | None = None,
        memory: Sequence[KeyValue] = (),
        memory_pattern: Pattern | None = None,
    ) -> Tensor:
        """As `layers.Stack`: x (T, D) -> (T, D)."""
        call = Call(x, pattern, rotation, caches, memory, memory_pattern)
        graph: Graph | None = None
        tapped = any(module.tap is not None for module in [*self.attentions(), *self.crosses()])
        if torch.is_inference_mode_enabled() and not tapped:
            if caches is None:
                graph = self._passes.get(_pass_key(call), lambda: Pass(self.stack, call))
            else:
                graphs = self._steps.setdefault(caches[0], Graphs())
                graph = graphs.get(_step_key(call, caches), lambda: Step(self.stack, call, caches))
        return call.run(self.stack) if graph is None else graph(call)

    def read(self, memory: Tensor) -> list[KeyValue]:
        """As `layers.Stack`."""
        return self.stack.read(memory)

    def attentions(self) -> list[Tappable]:
        """As `layers.Stack`."""
        return self.stack.attentions()

    def crosses(self) -> list[Tappable]:
        """As `layers.Stack`."""
        return self.stack.crosses()


# ---------------------------------------------------------------- graphs

Key = tuple[Hashable, ...] | None
"""What calls have in common that one graph can answer; None: no graph is worth it."""


class Graph(Protocol):
    """Answers calls of one key."""

    def __call__(self, call: Call) -> Tensor:
        """(T, D)."""
        ...


class Graphs:
    """Those used last, by key."""

    def __init__(self) -> None:
        self._known: OrderedDict[Key, Graph | None] = OrderedDict()

    def get(self, key: Key, capture: Callable[[], Graph]) -> Graph | None:
        """The graph of a key, captured when it comes a second time; until then, None."""
        if key is None:
            return None
        if key not in self._known:
            self._known[key] = None
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
            return None
        self._known.move_to_end(key)
        graph = self._known[key] or capture()
        self._known[key] = graph
        return graph


class Captured:
    """Work on tensors that stay where they are, and its answer in a tensor that does too."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(beside):
            work()  # what the first run makes for later ones must not be part of the graph
            # `torch.cuda.graph` would give all free memory back to the driver first, which takes longer.
            self.graph.capture_begin(capture_error_mode="thread_local")
            self.answer = work()
            self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(beside)

    def replay(self) -> Tensor:
        """The answer, which the next replay overwrites."""
        self.graph.replay()
        return self.answer


# ---------------------------------------------------------------- passes without a cache


def _pass_key(call: Call) -> Key:
    """Of an encoder's passes and ViT's: sequences of the same lengths."""
    pattern = call.pattern
    if call.memory or pattern.masks or isinstance(pattern, Masked) or not 0 < len(call.x) <= PASS_TOKENS:
        return None
    return pattern.queries.lengths, pattern.keys.lengths, pattern.causal, call.x.dtype


class Pass:
    """All blocks for sequences of certain lengths."""

    def __init__(self, stack: Stack, call: Call) -> None:
        self.x = call.x.clone()
        self.rotation = call.rotation  # as the lengths are, so are the positions
        still = Call(self.x, call.pattern, self.rotation)
        self.captured = Captured(lambda: still.run(stack))

    def __call__(self, call: Call) -> Tensor:
        """(T, D)."""
        self.x.copy_(call.x)
        return self.captured.replay().clone()


# ---------------------------------------------------------------- steps of decoding


def _step_key(call: Call, caches: Sequence[LayerCache]) -> Key:
    """Of steps on the same storage that read as many keys."""
    new, slots = call.pattern.queries.lengths, call.pattern.keys
    W, C = max(new, default=0), slots.stride
    if not 0 < W <= STEP_TOKENS or C is None or caches[0].key is None:
        return None
    # Columns without a token write to the row behind their slot's text.
    if any(n < W and end >= C for n, end in zip(new, slots.lengths, strict=True)):
        return None
    at: list[Hashable] = [caches[0].key.data_ptr(), C, W, _reach(slots)]
    if call.memory_pattern is not None:
        sources = call.memory_pattern.keys
        at += [call.memory[0][0].data_ptr(), sources.stride, _reach(sources)]
    return tuple(at)


def _reach(slots: Layout) -> int:
    """L, a power of two: keys of each slot that are read."""
    assert slots.stride is not None
    return min(slots.stride, max(FEWEST_KEYS, 1 << (slots.longest - 1).bit_length()))


class Step:
    """All blocks for W new tokens in each slot; those that a call does not have are computed in vain."""

    def __init__(self, stack: Stack, call: Call, caches: Sequence[LayerCache]) -> None:
        S, W = len(call.pattern.keys), max(call.pattern.queries.lengths)
        cells, device = S * W, call.x.device
        self.shape = S, W, _reach(call.pattern.keys)
        self.cache = caches[0].cache
        self.x = call.x.new_zeros(cells, *call.x.shape[1:])  # (S W, D)
        self.rows = torch.zeros(cells, dtype=torch.long, device=device)
        self.rotation = None if call.rotation is None else _grid(call.rotation, cells)
        self.allowed = torch.ones(*self.shape, dtype=torch.bool, device=device)
        self.sources = torch.zeros(0, dtype=torch.bool, device=device)  # (S, M)
        if call.memory_pattern is not None:
            self.sources = self.sources.new_ones(S, _reach(call.memory_pattern.keys))
        self.source_lengths: tuple[int, ...] = ()
        past = [_Rows(*layer.read(), self.rows) for layer in caches]
        memory = call.memory

        def work() -> Tensor:
            pattern = Masked.by(_bias(self.allowed, self.x)[:, None], self.shape[2])
            crossed = Masked.by(_bias(self.sources, self.x)[:, None, None], self.sources.shape[-1])
            return Call(self.x, pattern, self.rotation, past, memory, crossed).run(stack)

        self._fill(call)
        self.captured = Captured(work)

    def __call__(self, call: Call) -> Tensor:
        """(T, D)."""
        cells = self._fill(call)
        answer = self.captured.replay()
        return answer.clone() if cells is None else answer.index_select(0, cells)

    def _fill(self, call: Call) -> Tensor | None:
        """Put a call's tokens in their cells; returns which those are, (T,), or None if they are all."""
        S, W, L = self.shape
        new, ends = np.array(call.pattern.queries.lengths), np.array(call.pattern.keys.lengths)
        columns = np.arange(W)
        seen = (ends - new)[:, None] + columns + 1  # (S, W): keys that a new token may attend, the first ones
        filled = columns < new[:, None]  # (S, W)
        allowed = torch.from_numpy((np.arange(L) < seen[:, :, None]) | ~filled[:, :, None])
        for slot, mask in call.pattern.masks.items():
            allowed[slot, : len(mask), : mask.shape[1]] = mask
        self.allowed.copy_(allowed)
        if call.memory_pattern is not None and call.memory_pattern.keys.lengths != self.source_lengths:
            self.source_lengths = call.memory_pattern.keys.lengths
            lengths = np.array(self.source_lengths)[:, None]
            known = (np.arange(self.sources.shape[1]) < lengths) | (lengths == 0)
            self.sources.copy_(torch.from_numpy(known))
        pairs = [(self.x, call.x), (self.rows, self.cache.rows)]
        if self.rotation is not None and call.rotation is not None:
            pairs += zip(self.rotation, call.rotation, strict=True)
        if filled.all():
            for grid, values in pairs:
                grid.copy_(values)
            return None
        stride = call.pattern.keys.stride
        assert stride is not None
        spare = np.arange(S) * stride + np.minimum(ends, stride - 1)
        self.rows.copy_(torch.from_numpy(spare.repeat(W)))
        cells = torch.from_numpy(filled.reshape(-1).nonzero()[0]).to(self.x.device)
        for grid, values in pairs:
            grid.index_copy_(0, cells, values)
        return cells


@dataclass(frozen=True)
class _Rows:
    """A layer's keys and values in all slots, to which a step adds those of its cells."""

    key: Tensor
    value: Tensor
    rows: Tensor

    def append(self, key: Tensor, value: Tensor) -> KeyValue:
        """Those of the cells, (S W, H, E) each; all, (S C, H, E) each."""
        self.key.index_copy_(0, self.rows, key)
        self.value.index_copy_(0, self.rows, value)
        return self.key, self.value


def _grid(rotation: KeyValue, cells: int) -> KeyValue:
    cosine, sine = (turn.new_zeros(cells, *turn.shape[1:]) for turn in rotation)
    return cosine, sine


def _bias(allowed: Tensor, like: Tensor) -> Tensor:
    """What a mask adds to scores, 0 where it allows; a kernel would make it of the mask in every layer."""
    return torch.zeros_like(allowed, dtype=like.dtype).masked_fill_(~allowed, float("-inf"))
