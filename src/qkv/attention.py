"""Attention: the only place that knows where one sequence ends and the next begins.

`attend` is scaled dot-product attention over ragged sequences, `Attention` the multi-head module
around it for self-, causal, cross- and cached attention. Theory: Vaswani et al. 2017, "Attention Is All
You Need", 3.2.

Legend: T tokens of the batch (Tq of queries, Tk of keys), N sequences, D model width, H heads,
E = D / H head width, B sequences of a block, Lq and Lk longest queries and keys of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qkv.dropout import dropout as drop
from qkv.ragged import Layout, kept

KeyValue = tuple[Tensor, Tensor]
"""Keys and values, each (Tk, H, E)."""


# ---------------------------------------------------------------- who attends whom


@dataclass(frozen=True, eq=False)
class Pattern:
    """Which tokens may attend which: queries of sequence i attend keys of sequence i and no others.

    causal: query and key sequences are aligned at their ends, and a query sees no later key.
    masks: for some sequences, in its place: bool (Lq, Lk) on the CPU, True where a query may attend a key.
    Shared by all layers of a forward pass, as are the index tensors and masks derived from it.
    """

    queries: Layout
    keys: Layout
    causal: bool = False
    masks: Mapping[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.queries) != len(self.keys):
            raise ValueError(f"{len(self.queries)} query sequences, but {len(self.keys)} key sequences")
        if self.causal and any(q > k for q, k in zip(self.queries.lengths, self.keys.lengths, strict=True)):
            raise ValueError("causal attention needs at least as many keys as queries in every sequence")

    def mask(self, i: int) -> Tensor | None:
        """Where a query of sequence i may attend a key, bool (Lq, Lk); None: everywhere."""
        if i in self.masks:
            return self.masks[i].to(self.keys.device)
        if not self.causal:
            return None
        Lq, Lk = self.queries.lengths[i], self.keys.lengths[i]
        return torch.ones(Lq, Lk, dtype=torch.bool, device=self.keys.device).tril(Lk - Lq)

    @cached_property
    def blocks(self) -> list[_Block]:
        """A partition of the sequences into dense blocks of similar lengths."""
        lengths = list(zip(self.keys.lengths, self.queries.lengths, strict=True))
        members = [i for i, (_, q) in enumerate(lengths) if q]
        if self.keys.stride is None:
            members.sort(key=lambda i: lengths[i])
        groups: list[list[int]] = []
        for i in members:
            if groups and self._alike(groups[-1], i):
                groups[-1].append(i)
            else:
                groups.append([i])
        return [_Block(self, sorted(group)) for group in groups]

    def _alike(self, group: list[int], i: int) -> bool:
        """Whether sequence i may join the block that begins with this group."""
        old = self.keys.lengths[group[0]], self.queries.lengths[group[0]]
        new = self.keys.lengths[i], self.queries.lengths[i]
        if self.keys.stride is None:  # no shorter keys come
            return all(n <= _SPREAD * max(o, 1) + _SLACK for n, o in zip(new, old, strict=True))
        # Slots side by side are a view of the cache; any others would have to be copied.
        sides = zip(new, old, (_CACHE_SLACK, _SLACK), strict=True)
        return i == group[-1] + 1 and all(max(n, o) <= _SPREAD * min(n, o) + more for n, o, more in sides)

    @kept
    def order(self) -> Tensor | None:
        """Where each query token is among the blocks' tokens, (Tq,); None: they are in place already."""
        if len(self.blocks) == 1:
            return None
        rows = torch.cat([block.queries.rows for block in self.blocks])
        return torch.empty_like(rows).index_copy_(0, rows, torch.arange(len(rows), device=rows.device))


_SPREAD, _SLACK = 2.0, 4
"""A block takes sequences up to this much longer than its shortest: less padding against fewer calls."""

_CACHE_SLACK = 64
"""The same for the keys of a cache, which a block reads in place."""


class _Block:
    """Some sequences of a pattern as one dense call; its padding never leaves this class."""

    def __init__(self, pattern: Pattern, members: list[int]) -> None:
        self.queries = _Side(pattern.queries, members)
        self.keys = _Side(pattern.keys, members)
        self.causal = pattern.causal and self.queries.width > 1
        self.masks = {b: pattern.masks[i] for b, i in enumerate(members) if i in pattern.masks}

    @cached_property
    def plain(self) -> bool:
        """Whether the kernel needs no mask tensor: nothing is padded, and causal means the lower triangle."""
        full = self.queries.equal and self.keys.equal and self.keys.width > 0 and not self.masks
        return full and (not self.causal or self.queries.width == self.keys.width)

    @kept
    def mask(self) -> Tensor | None:
        """True where a query may attend a key: (B, 1, 1 or Lq, Lk) bool."""
        if self.plain:
            return None
        sizes = self.keys.sizes[:, None, None]  # (B, 1, 1)
        key = torch.arange(self.keys.padded_width, device=sizes.device)  # (Lk,)
        # A sequence without keys attends the zeros that fill the block, which makes its answer zero.
        allowed = (key < sizes) | (sizes == 0)
        if self.causal:
            query = torch.arange(self.queries.width, device=sizes.device)[:, None]  # (Lq, 1)
            allowed = allowed & (key <= query + sizes - self.queries.sizes[:, None, None])
        if self.masks:
            allowed = allowed.repeat(1, self.queries.width // allowed.shape[1], 1)  # (B, Lq, Lk)
            for b, mask in self.masks.items():
                allowed[b, : mask.shape[0], : mask.shape[1]] = mask
        return allowed[:, None]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Tokens (Tq, H, E), (Tk, H, E), (Tk, H, E) -> this block's answers (its tokens, H, E)."""
        Q, K, V = self.queries.gather(query), self.keys.gather(key), self.keys.gather(value)
        answer = _dense(Q, K, V, self.mask, self.causal and self.plain, dropout)  # (B, H, Lq, E)
        return self.queries.scatter(answer)


class _Side:
    """The queries or the keys of a block: from tokens to a dense block and back."""

    def __init__(self, layout: Layout, members: list[int]) -> None:
        self.layout = layout
        self.members = members
        self.lengths = [layout.lengths[i] for i in members]
        self.width = max(self.lengths)
        self.padded_width = max(self.width, 1)
        self.equal = min(self.lengths) == self.width
        self.spacing = layout.stride or self.width

    @cached_property
    def start(self) -> int | None:
        """First row of the ascending members if they are evenly spaced, a view: slots, or equal lengths."""
        first, last = self.members[0], self.members[-1]
        if self.layout.stride is not None:
            # An empty slot is not zero, as padding is.
            in_place = self.members == list(range(first, last + 1)) and 0 not in self.lengths
            return first * self.layout.stride if in_place else None
        # Those between them, if any, are empty.
        in_place = self.equal and sum(self.layout.lengths[first : last + 1]) == self.width * len(self.members)
        return sum(self.layout.lengths[:first]) if in_place and self.width else None

    @kept
    def sizes(self) -> Tensor:
        """Lengths, (B,)."""
        return torch.tensor(self.lengths, device=self.layout.device)

    @cached_property
    def local(self) -> Layout:
        """The members laid end to end."""
        return Layout(tuple(self.lengths), self.layout.device)

    @kept
    def rows(self) -> Tensor:
        """Row of each of the members' tokens among all tokens."""
        starts = self.layout.starts[torch.tensor(self.members, device=self.layout.device)]
        return starts[self.local.owner] + self.local.positions

    @kept
    def cells(self) -> Tensor:
        """Cell of each of the members' tokens in the block (B * L)."""
        return self.local.owner * self.padded_width + self.local.positions

    def gather(self, values: Tensor) -> Tensor:
        """(T, H, E) -> (B, H, L, E); padding is zero."""
        H, E = values.shape[1:]
        B = len(self.members)
        if self.start is not None:
            rows = values[self.start : self.start + B * self.spacing]
            dense = rows.view(B, self.spacing, H, E)[:, : self.width]
        elif self.equal and self.width:
            dense = values.index_select(0, self.rows).view(B, self.width, H, E)
        else:
            cells = values.new_zeros(B * self.padded_width, H, E)
            dense = cells.index_copy(0, self.cells, values.index_select(0, self.rows)).view(B, -1, H, E)
        return dense.transpose(1, 2)

    def scatter(self, dense: Tensor) -> Tensor:
        """(B, H, L, E) -> (its tokens, H, E)."""
        flat = dense.transpose(1, 2).flatten(0, 1)  # (B * L, H, E)
        return flat if self.equal else flat.index_select(0, self.cells)


@dataclass(frozen=True, eq=False)
class Masked(Pattern):
    """Who may attend whom told by a mask alone, for rows of one width in which sequences are padded.

    Only for graphs (`export`, `fast.graphs`): what is traced there must not depend on lengths.
    Tokens are those of all rows, padding too: (N * Lq, H, E) of queries, (N * Lk, H, E) of keys.
    """

    allowed: Tensor = field(kw_only=True)
    """True where a query may attend a key, bool (N, 1, 1 or Lq, 1 or Lk), or what is added to the scores."""
    reach: int | None = field(kw_only=True)
    """Only so many first keys of each row are read; None: all."""

    @staticmethod
    def by(allowed: Tensor, reach: int | None = None) -> Masked:
        """The pattern of a mask as `allowed`."""
        none = Layout((), allowed.device)
        return Masked(none, none, allowed=allowed, reach=reach)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """`attend` for all rows, which are dense already."""
        N = self.allowed.shape[0]
        Q, K, V = (x.view(N, -1, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
        if self.reach is not None:
            K, V = K[:, :, : self.reach], V[:, :, : self.reach]
        answer = _dense(Q, K, V, self.allowed, False, dropout)  # (N, H, Lq, E)
        return answer.transpose(1, 2).flatten(0, 1)


# ---------------------------------------------------------------- attention


def attend(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, dropout: float = 0.0) -> Tensor:
    """softmax(Q K^T / sqrt(E)) V for every sequence and head (Vaswani et al. 2017, equation 1).

    query (Tq, H, E), key and value (Tk, H, E) -> (Tq, H, E). A sequence without keys gets zeros.
    dropout: probability with which an attention weight is zeroed.
    """
    if isinstance(pattern, Masked):
        return pattern.attend(query, key, value, dropout)
    if varlen_kernel_takes(query, pattern, dropout):
        from torch.nn.attention.varlen import varlen_attn  # takes over a second to import

        window = (-1, 0) if pattern.causal else (-1, -1)
        q, k = pattern.queries, pattern.keys
        edges = (q.boundaries, k.boundaries, q.longest, k.longest)
        out = varlen_attn(query, key, value, *edges, window_size=window)
        assert isinstance(out, Tensor)
        return out
    answers = [block.attend(query, key, value, dropout) for block in pattern.blocks]
    if not answers:
        return torch.zeros_like(query)
    out = torch.cat(answers) if len(answers) > 1 else answers[0]
    return out if pattern.order is None else out.index_select(0, pattern.order)


_KERNEL_CHOICE = Lock()

_PRODUCTS = 512
"""Most keys of a sequence for which training on a CPU keeps all probabilities: beyond, they cost more memory
than the time they save."""


def _dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, dropout: float
) -> Tensor:
    """Attention of a block: query (B, H, Lq, E), key and value (B, H, Lk, E) -> (B, H, Lq, E).

    mask: True where a query may attend a key, or what is added to the scores; causal: the lower triangle,
    without a mask.
    """
    if query.is_cuda and mask is not None:
        # Of cuDNN's kernel, NaN with masks is reported (torch 2.13). What is allowed is so for all threads.
        with _KERNEL_CHOICE, sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return F.scaled_dot_product_attention(query, key, value, mask, dropout, causal)
    training = query.device.type == "cpu" and query.dtype == torch.bfloat16 and torch.is_grad_enabled()
    if not training:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, causal)
    # The fused kernel's backward pass does not multiply in bfloat16 on CPUs.
    with torch.autocast("cpu", enabled=False):
        if key.shape[2] > _PRODUCTS:
            Q, K, V = query.float(), key.float(), value.float()
            return F.scaled_dot_product_attention(Q, K, V, mask, dropout, causal).bfloat16()
        if causal:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)  # (B, H, Lq, Lk)
        if mask is not None:
            scores.masked_fill_(~mask, float("-inf"))
        return drop(scores.softmax(-1), dropout) @ value


def varlen_kernel_takes(query: Tensor, pattern: Pattern, dropout: float) -> bool:
    """Whether the CUDA kernel for ragged sequences takes this: half precision, packed keys, no dropout.

    For equal lengths the dense kernel is as good.
    """
    half = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    if not half or query.shape[-1] % 8 or query.shape[-1] > 256:  # head widths that the kernel has
        return False
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return False
    packed = pattern.keys.stride is None and 0 not in pattern.keys.lengths and not pattern.masks
    return packed and dropout == 0.0 and not (pattern.queries.equal and pattern.keys.equal)


def rotate(x: Tensor, rotation: KeyValue) -> Tensor:
    """Rotary positions: turn each pair (x_i, x_{i+E/2}) of x (T, H, E) by its angle.

    Su et al. 2021, equation 34. rotation: cosines and sines, each (T, 1, E), which are rounded as x is.
    """
    cosine, sine = (turn.to(x.dtype) for turn in rotation)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Turn.apply(x, cosine, sine)  # type: ignore[no-any-return, no-untyped-call]
    left, right = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-right, left], dim=-1) * sine


class _Turn(torch.autograd.Function):
    """Gradients are turned back, in half the passes over memory that autograd makes of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        y = x * cosine
        (left, right), (into_left, into_right) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
        half = sine.chunk(2, dim=-1)[0]  # (T, 1, E / 2): both are alike
        into_left.addcmul_(right, half, value=-1)
        into_right.addcmul_(left, half)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _Turn.apply(gradients[0], cosine, -sine), None, None  # type: ignore[no-untyped-call]


class Past(Protocol):
    """Keys and values of earlier tokens in one layer."""

    def append(self, key: Tensor, value: Tensor) -> KeyValue:
        """Add those of the new tokens, (T, H, E) each; return those of all tokens."""
        ...


class Tap(Protocol):
    """What looks at one layer's attention beside the kernel."""

    def see(self, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, answer: Tensor) -> Tensor:
        """One call of `attend`, tensors as there; returns what goes on in the place of its answer."""
        ...


class Tappable(Protocol):
    """One layer's attention, to which a tap can be put."""

    heads: int
    tap: Tap | None


class Packed(nn.Linear):
    """A linear layer of whose outputs a call may want only some."""

    def part(self, x: Tensor, outputs: slice) -> Tensor:
        """x (T, D) -> these of the outputs (T, .)."""
        return F.linear(x, self.weight[outputs], self.bias[outputs])


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, 3.2.2) with one packed projection for every use.

    `qkv` maps D to 3 D. Cross-attention uses its first D rows on the queries and the other 2 D rows
    on the memory.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, qk_norm_eps: float | None = None) -> None:
        """qk_norm_eps: normalise each head's queries and keys (Dehghani et al. 2023, 2); None: do not."""
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not divisible by heads {heads}")
        self.heads = heads
        self.dropout = dropout
        self.qkv = Packed(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.query_norm = None if qk_norm_eps is None else nn.LayerNorm(dim // heads, eps=qk_norm_eps)
        self.key_norm = None if qk_norm_eps is None else nn.LayerNorm(dim // heads, eps=qk_norm_eps)
        self.tap: Tap | None = None  # set only inside `tapped`

    def forward(
        self,
        x: Tensor,
        pattern: Pattern,
        *,
        memory: KeyValue | None = None,
        cache: Past | None = None,
        rotation: KeyValue | None = None,
    ) -> Tensor:
        """x (T, D) -> (T, D).

        memory: what cross-attention reads, from `read`; None is self-attention.
        cache: keys and values of earlier tokens, to which this call adds its own.
        rotation: rotary positions of the tokens of x.
        """
        D = x.shape[-1]
        if memory is None:
            packed = self.qkv(x).view(-1, 3, self.heads, D // self.heads)
            query, key, value = packed.unbind(1)  # (T, H, E) each
            if self.query_norm is not None and self.key_norm is not None:
                query, key = self.query_norm(query), self.key_norm(key)
            if rotation is not None:
                query, key = rotate(query, rotation), rotate(key, rotation)
            if cache is not None:
                key, value = cache.append(key, value)
        else:
            query = self.qkv.part(x, slice(D)).view(-1, self.heads, D // self.heads)
            key, value = memory
        answer = attend(query, key, value, pattern, self.dropout if self.training else 0.0)  # (T, H, E)
        if self.tap is not None:
            answer = self.tap.see(query, key, value, pattern, answer)
        return self.out(answer.flatten(1))  # type: ignore[no-any-return]

    def read(self, memory: Tensor) -> KeyValue:
        """Keys and values of memory (Tk, D) for cross-attention, each (Tk, H, E)."""
        D = memory.shape[-1]
        both = self.qkv.part(memory, slice(D, 3 * D))  # (Tk, 2 D)
        key, value = both.view(-1, 2, self.heads, D // self.heads).unbind(1)
        return key, value
