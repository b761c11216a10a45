"""Blocks on a GPU: passes that come again are replayed as CUDA graphs.

A step of decoding is some hundred kernels of a few microseconds each, and Python needs longer than that to
start one. A graph starts all of them at once, on the addresses on which it was captured.

Legend: T tokens of the batch, N sequences, L tokens of the longest, S slots of a cache, C rows of a slot, W
columns of a step (most new tokens of a slot), L keys that a step reads of a slot, M those of its source, D
model width, H heads, E head width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from qkv.attention import KeyValue, Masked, Pattern, Tappable, varlen_kernel_takes
from qkv.kv_cache import LayerCache
from qkv.layers import Stack
from qkv.ragged import Layout

PASS_TOKENS = 8192
"""Most tokens of a pass without a cache that is worth a graph: beyond, its kernels take longer than starting
them."""
STEP_WIDTH = 16
"""Most new tokens of a slot in a step that is worth one."""
KEPT = 64
"""Graphs that are kept of passes without a cache, and of each cache: those used last."""
FEWEST_KEYS = 64
"""A step reads so many keys of each slot, or twice, four times ... as many."""


@dataclass(frozen=True, eq=False)
class Call:
    """What `layers.Stack` is called with."""

    x: Tensor
    pattern: Pattern
    rotation: KeyValue | None
    caches: Sequence[LayerCache] | None
    memory: Sequence[KeyValue]
    memory_pattern: Pattern | None


class GraphedStack(nn.Module):
    """`layers.Stack` that captures what it is asked for a second time; outside inference mode the same."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack = stack
        self._capture = Capture()
        self._passes = Graphs()
        self._steps: WeakKeyDictionary[LayerCache, Steps] = WeakKeyDictionary()
        self._lock = Lock()  # calls share the tensors that graphs read and write

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
        tapped = any(module.tap is not None for module in [*self.attentions(), *self.crosses()])
        if torch.is_inference_mode_enabled() and not tapped:
            with self._lock, self._capture.in_turn(x.device):
                if (graph := self._graph(call)) is not None:
                    return graph(call)
        return self.stack(  # type: ignore[no-any-return]
            x, pattern, rotation=rotation, caches=caches, memory=memory, memory_pattern=memory_pattern
        )

    def _graph(self, call: Call) -> Graph | None:
        if call.caches is None:
            key = self._pass_key(call)
            kind = RaggedPass if key and key[0] is RaggedPass else Pass
            return self._passes.get(key, lambda: kind(self.stack, call, self._capture))
        rows = _rows(call)
        steps = self._steps.get(call.caches[0])
        if steps is None or steps.rows != rows:
            # Those of smaller slots never come again, and would keep the old keys and values.
            steps = self._steps[call.caches[0]] = Steps(rows)
        return steps.get(_step_key(call), lambda: Step(self.stack, call, self._capture))

    def _pass_key(self, call: Call) -> Key:
        """Of self-attention without a cache."""
        x, pattern = call.x, call.pattern
        queries, keys = pattern.queries, pattern.keys
        if call.memory or pattern.masks or isinstance(pattern, Masked) or not 0 < len(x) <= PASS_TOKENS:
            return None
        if queries.equal and keys.equal:
            return Pass, len(queries), queries.longest, keys.longest, pattern.causal, x.dtype
        heads = x.view(len(x), self.attentions()[0].heads, -1)  # (T, H, E)
        if queries.lengths != keys.lengths or not varlen_kernel_takes(heads, pattern, 0.0):
            return None
        return RaggedPass, *_room(call), pattern.causal, x.dtype

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


class Steps(Graphs):
    """Those of a cache whose slots, and those of their sources, have so many rows."""

    def __init__(self, rows: tuple[int | None, ...]) -> None:
        super().__init__()
        self.rows = rows


@dataclass(frozen=True)
class Captured:
    """Work on tensors that stay where they are, which must live as long as this."""

    graph: torch.cuda.CUDAGraph
    answer: Tensor

    def replay(self) -> Tensor:
        """The answer, which the next replay overwrites."""
        self.graph.replay()
        return self.answer


class Capture:
    """What captures: a stream of its own, and memory that all of its graphs use one after the other."""

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @cached_property
    def _replayed(self) -> torch.cuda.Event:
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    @contextmanager
    def in_turn(self, device: torch.device) -> Iterator[None]:
        """What is given to the GPU inside comes behind what was inside before, also on another stream."""
        if device.type != "cuda":
            yield
            return
        stream = torch.cuda.current_stream(device)
        stream.wait_event(self._replayed)
        try:
            yield
        finally:
            stream.record_event(self._replayed)

    @cached_property
    def _first(self) -> Captured:
        """A graph that is kept, because torch gives the memory up with the last graph that uses it."""
        return self._captured(lambda: torch.zeros(1, device="cuda"), torch.cuda.graph_pool_handle())

    def __call__(self, work: Callable[[], Tensor], device: torch.device) -> Captured:
        """The work of some kernels on that device."""
        with torch.cuda.device(device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                work()  # what the first run makes for later ones must not be part of the graph
                captured = self._captured(work, self._first.graph.pool())
            torch.cuda.current_stream().wait_stream(self._stream)
        return captured

    def _captured(self, work: Callable[[], Tensor], memory: Any) -> Captured:
        graph = torch.cuda.CUDAGraph()
        # `torch.cuda.graph` would give all free memory back to the driver first, which takes longer.
        graph.capture_begin(memory, capture_error_mode="thread_local")
        try:
            return Captured(graph, work())
        finally:
            graph.capture_end()


# ---------------------------------------------------------------- passes without a cache


class Pass:
    """All blocks for so many sequences of one length, such as ViT's."""

    def __init__(self, stack: Stack, call: Call, capture: Capture) -> None:
        self.x, self.rotation = call.x.clone(), _copy(call.rotation)
        self.pattern = call.pattern  # what the kernels read of it must live as long as the graph

        def work() -> Tensor:
            return stack(self.x, self.pattern, rotation=self.rotation)  # type: ignore[no-any-return]

        self.captured = capture(work, call.x.device)

    def __call__(self, call: Call) -> Tensor:
        """(T, D)."""
        for mine, given in _pairs(self.x, self.rotation, call):
            mine.copy_(given)
        return self.captured.replay().clone()


def _copy(rotation: KeyValue | None) -> KeyValue | None:
    return None if rotation is None else (rotation[0].clone(), rotation[1].clone())


def _empty(rotation: KeyValue | None, rows: int) -> KeyValue | None:
    """One like it, for so many tokens."""
    if rotation is None:
        return None
    cosine, sine = (turn.new_zeros(rows, *turn.shape[1:]) for turn in rotation)
    return cosine, sine


def _room(call: Call) -> tuple[int, int, int]:
    """T, N and L of a `RaggedPass` for a call: of T four sizes to each power of two, powers of two else."""
    T, layout = len(call.x), call.pattern.queries
    step = 1 << max((T - 1).bit_length() - 3, 0)
    N, L = (1 << (n - 1).bit_length() for n in (len(layout), layout.longest))
    return -(-T // step) * step, N, L


@dataclass(frozen=True, eq=False)
class Room(Layout):
    """Room for N sequences, at most as long as the lengths say; where they begin is read at each replay."""

    told: Tensor = field(kw_only=True)
    """First row of each sequence and, last, T: int32 (N + 1,)."""

    @property
    def boundaries(self) -> Tensor:
        """As of any layout."""
        return self.told

    @property
    def equal(self) -> bool:
        """They may differ."""
        return False


class RaggedPass:
    """All blocks for up to N sequences of up to L tokens, T in all, by the kernel for ragged sequences.

    Rows that a call does not have belong to no sequence, and are computed in vain.
    """

    def __init__(self, stack: Stack, call: Call, capture: Capture) -> None:
        T, N, L = _room(call)
        device = call.x.device
        self.x = call.x.new_zeros(T, *call.x.shape[1:])
        self.rotation = _empty(call.rotation, T)  # (T, 1, E) each
        self.boundaries = torch.zeros(N + 1, dtype=torch.int32, device=device)
        room = Room((L,) * N, device, told=self.boundaries)
        pattern = Pattern(room, room, call.pattern.causal)

        def work() -> Tensor:
            return stack(self.x, pattern, rotation=self.rotation)  # type: ignore[no-any-return]

        self._fill(call)
        self.captured = capture(work, device)

    def __call__(self, call: Call) -> Tensor:
        """(T, D)."""
        self._fill(call)
        return self.captured.replay()[: len(call.x)].clone()

    def _fill(self, call: Call) -> None:
        T, layout = len(call.x), call.pattern.queries
        for mine, given in _pairs(self.x, self.rotation, call):
            mine[:T].copy_(given)
        self.boundaries.fill_(T)
        self.boundaries[: len(layout)].copy_(layout.boundaries[:-1])


def _pairs(x: Tensor, rotation: KeyValue | None, call: Call) -> list[tuple[Tensor, Tensor]]:
    """A graph's own tensors with those of a call, a row for each token."""
    pairs = [(x, call.x)]
    if rotation is not None and call.rotation is not None:
        pairs += zip(rotation, call.rotation, strict=True)
    return pairs


# ---------------------------------------------------------------- steps of decoding


def _rows(call: Call) -> tuple[int | None, ...]:
    """Rows of a slot of the cache, and of one of its sources."""
    patterns = [call.pattern] if call.memory_pattern is None else [call.pattern, call.memory_pattern]
    return tuple(pattern.keys.stride for pattern in patterns)


def _step_key(call: Call) -> Key:
    """Of steps on a cache of so many rows."""
    new, slots, sources = call.pattern.queries.lengths, call.pattern.keys, call.memory_pattern
    W, C = max(new, default=0), slots.stride
    stored = call.caches is not None and call.caches[0].key is not None
    if not stored or not call.pattern.causal or not 0 < W <= STEP_WIDTH or C is None:
        return None
    # Columns without a token write to the row behind their slot's text.
    if any(n < W and end >= C for n, end in zip(new, slots.lengths, strict=True)):
        return None
    if sources is None:
        return W, _reach(slots)
    if sources.keys.stride is None:
        return None  # sources that lie in no cache
    if any(n and not length for n, length in zip(new, sources.keys.lengths, strict=True)):
        return None  # what attends nothing gets zeros, which a mask cannot say
    return W, _reach(slots), _reach(sources.keys)


def _reach(slots: Layout) -> int:
    """L, a power of two: keys of each slot that are read."""
    assert slots.stride is not None
    return min(slots.stride, max(FEWEST_KEYS, 1 << (slots.longest - 1).bit_length()))


class Step:
    """All blocks for W new tokens in each slot; those that a call does not have are computed in vain."""

    def __init__(self, stack: Stack, call: Call, capture: Capture) -> None:
        assert call.caches is not None
        S, W, device = len(call.pattern.keys), max(call.pattern.queries.lengths), call.x.device
        self.shape = S, W, _reach(call.pattern.keys)
        self.cache = call.caches[0].cache
        self.x = call.x.new_zeros(S * W, *call.x.shape[1:])  # (S W, D)
        self.rows = torch.zeros(S * W, dtype=torch.long, device=device)
        self.rotation = _empty(call.rotation, S * W)  # (S W, 1, E) each
        self.allowed = torch.ones(self.shape, dtype=torch.bool, device=device)
        self.sources: Tensor | None = None  # (S, M)
        self.source_lengths: tuple[int, ...] = ()
        if call.memory_pattern is not None:
            M = _reach(call.memory_pattern.keys)
            self.sources = torch.ones(S, M, dtype=torch.bool, device=device)
        self.past = [_Kept(*layer.read(), self.rows) for layer in call.caches]
        self.memory = call.memory

        def work() -> Tensor:
            crossed = None if self.sources is None else _masked(self.sources[:, None], self.x)
            pattern = _masked(self.allowed, self.x)
            return stack(  # type: ignore[no-any-return]
                self.x,
                pattern,
                rotation=self.rotation,
                caches=self.past,
                memory=self.memory,
                memory_pattern=crossed,
            )

        self._fill(call)
        self.captured = capture(work, device)

    def __call__(self, call: Call) -> Tensor:
        """(T, D)."""
        cells = self._fill(call)
        answer = self.captured.replay()
        return answer.clone() if cells is None else answer.index_select(0, cells)

    def _fill(self, call: Call) -> Tensor | None:
        """Put a call's tokens in their cells; returns which those are, (T,), or None if they are all."""
        S, W, L = self.shape
        slots = call.pattern.keys
        new, ends = np.array(call.pattern.queries.lengths), np.array(slots.lengths)
        columns = np.arange(W)
        seen = (ends - new)[:, None] + columns + 1  # (S, W): keys that a new token may attend, the first ones
        filled = columns < new[:, None]  # (S, W)
        allowed = (np.arange(L) < seen[:, :, None]) | ~filled[:, :, None]
        for slot, mask in call.pattern.masks.items():
            allowed[slot, : len(mask), : mask.shape[1]] = mask.numpy()
        self.allowed.copy_(torch.from_numpy(allowed))
        if self.sources is not None and call.memory_pattern is not None:
            self._fill_sources(self.sources, call.memory_pattern.keys.lengths)
        pairs = [(self.rows, self.cache.rows), *_pairs(self.x, self.rotation, call)]
        if filled.all():
            for grid, values in pairs:
                grid.copy_(values)
            return None
        assert slots.stride is not None
        spare = np.arange(S) * slots.stride + ends
        self.rows.copy_(torch.from_numpy(spare.repeat(W)))
        cells = torch.from_numpy(filled.reshape(-1).nonzero()[0]).to(self.x.device)
        for grid, values in pairs:
            grid.index_copy_(0, cells, values)
        return cells

    def _fill_sources(self, sources: Tensor, lengths: tuple[int, ...]) -> None:
        """Which keys of their sources the slots may attend, if those are others than in the last step."""
        if lengths != self.source_lengths:
            self.source_lengths, ends = lengths, np.array(lengths)[:, None]
            # An idle slot may attend anything: nothing at all would make it NaN.
            sources.copy_(torch.from_numpy((np.arange(sources.shape[1]) < ends) | (ends == 0)))


@dataclass(frozen=True)
class _Kept:
    """A layer's keys and values in all slots, to which a step adds those of its cells."""

    key: Tensor
    value: Tensor
    rows: Tensor

    def append(self, key: Tensor, value: Tensor) -> KeyValue:
        """Those of the cells, (S W, H, E) each; all, (S C, H, E) each."""
        self.key.index_copy_(0, self.rows, key)
        self.value.index_copy_(0, self.rows, value)
        return self.key, self.value


def _masked(allowed: Tensor, like: Tensor) -> Masked:
    """The pattern of cells that may attend the first keys of their slots as allowed (S, 1 or W, L) says.

    As what is added to the scores, which a kernel would make of a mask in every layer.
    """
    bias = torch.zeros_like(allowed, dtype=like.dtype).masked_fill_(~allowed, float("-inf"))
    return Masked.by(bias[:, None], allowed.shape[-1])
