"""What blocks are made of: positions, feed-forward network, residual blocks, initial weights.

Legend: T tokens of the batch (S of sources), N sequences, D model width, E head width, F inner width of
the feed-forward network, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.attention import Attention, KeyValue, Past, Pattern, Tappable
from qkv.config import Activation, GPTConfig, ModelConfig, TransformerConfig
from qkv.dropout import Dropout
from qkv.errors import InputError
from qkv.ragged import Layout

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def check_lengths(layout: Layout, limit: int) -> None:
    """Raise InputError if a sequence is longer than a model reads."""
    if layout.longest > limit:
        i = layout.lengths.index(layout.longest)
        raise InputError(f"sequence {i} has {layout.longest} tokens; this model reads at most {limit}")


def sinusoidal(context: int, dim: int) -> Tensor:
    """The fixed position vectors of Vaswani et al. 2017, 3.5: (context, D), on the CPU.

    Sines fill the first half of the dimensions and cosines the second, as in the authors' own code
    and in Marian; the paper's formula interleaves them, which only renames the dimensions.
    """
    # On the CPU wherever tensors are made by default: on the meta device `arange` imports torch's compiler.
    positions, dims = (torch.arange(n, dtype=torch.float64, device="cpu") for n in (context, dim))
    rates = 10000.0 ** (-dims[::2] / dim)  # (D / 2,)
    angles = positions[:, None] * rates  # (context, D / 2)
    return torch.cat([angles.sin(), angles.cos()[:, : dim // 2]], dim=1).float()


def rotation(config: GPTConfig | TransformerConfig, positions: Tensor) -> KeyValue | None:
    """What turns queries and keys at positions (T,), (T, 1, E) each; None: they are not turned."""
    return rotary(positions, config.dim // config.heads) if config.position == "rotary" else None


def rotary(positions: Tensor, head_dim: int) -> KeyValue:
    """Cosines and sines, (T, 1, E) each, for positions (T,): the angles of Su et al. 2021, equation 15."""
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)  # (E / 2,)
    rates = 10000.0 ** (-pairs / head_dim)
    angles = (positions[:, None] * rates).repeat(1, 2)[:, None]  # (T, 1, E)
    return angles.cos(), angles.sin()


def grid_angles(rows: int, columns: int, head_dim: int, device: torch.device) -> Tensor:
    """By what the pairs of a head turn at the cells of a grid, row by row: (rows * columns, E / 2).

    One half of the pairs turns by a cell's row, the other by its column (Heo et al. 2024, 3.2). Where a cell
    is counts from -1 to 1, edge to edge, so that an image of another size is turned alike, with the rates of
    Siméoni et al. 2025 (DINOv3), 2 pi / 100^(4 i / E) for i below E / 4.
    """
    pairs = torch.arange(0, head_dim, 4, device=device, dtype=torch.float32)  # (E / 4,)
    rates = 2 * math.pi * 100.0 ** (-pairs / head_dim)
    down, right = (
        ((torch.arange(count, device=device) + 0.5) * 2 / count - 1)[:, None] * rates  # (count, E / 4)
        for count in (rows, columns)
    )
    return torch.cat([down.repeat_interleave(columns, 0), right.repeat(rows, 1)], dim=1)


class FeedForward(nn.Module):
    """The position-wise network of Vaswani et al. 2017, equation 2, with any activation."""

    def __init__(self, dim: int, mlp_dim: int, activation: Activation) -> None:
        super().__init__()
        self.up = nn.Linear(dim, mlp_dim)
        self.down = nn.Linear(mlp_dim, dim)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """x (T, D) -> (T, D)."""
        return self.down(self.activation(self.up(x)))  # type: ignore[no-any-return]


class DropPath(nn.Module):
    """In training, zero a sub-layer's answer for a random share of the sequences and scale the others up.

    Stochastic depth (Huang et al. 2016, equation 2), drawn for each sequence; scaling in training rather
    than in evaluation (their equation 5) keeps the expectation, as dropout does.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """x (T, D) of the sequences in the layout -> (T, D)."""
        if not self.training or self.rate == 0.0:
            return x
        # Of `F.dropout`, compiled code would be made for the rate of each block anew.
        kept = torch.rand(len(layout), 1, device=x.device) >= self.rate  # (N, 1)
        return x * (kept.to(x.dtype) / (1.0 - self.rate))[layout.owner]


class Block(nn.Module):
    """Self-attention, cross-attention where there is a memory, and feed-forward, each with a residual.

    Post-norm is Add & Norm of Vaswani et al. 2017, 3.1; pre-norm that of Radford et al. 2019 and
    Dosovitskiy et al. 2021, equations 2 and 3.
    """

    def __init__(
        self, config: ModelConfig, *, cross: bool = False, qk_norm: bool = False, drop_path: float = 0.0
    ) -> None:
        super().__init__()

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(config.dim, eps=config.norm_eps)

        self.norm_first = config.norm_first
        self.dropout = Dropout(config.dropout)
        self.drop_path = DropPath(drop_path)
        eps = config.norm_eps if qk_norm else None
        self.attention = Attention(config.dim, config.heads, config.attention_dropout, qk_norm_eps=eps)
        self.attention_norm = norm()
        self.cross = Attention(config.dim, config.heads, config.attention_dropout) if cross else None
        self.cross_norm = norm() if cross else None
        self.mlp = FeedForward(config.dim, config.mlp_dim, config.activation)
        self.mlp_norm = norm()

    def forward(
        self,
        x: Tensor,
        pattern: Pattern,
        *,
        rotation: KeyValue | None = None,
        cache: Past | None = None,
        memory: KeyValue | None = None,
        memory_pattern: Pattern | None = None,
    ) -> Tensor:
        """x (T, D) -> (T, D); the other arguments as for `Attention`."""

        def add(x: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
            answer = self.dropout(sublayer(norm(x) if self.norm_first else x))
            x = x + self.drop_path(answer, pattern.queries)
            return x if self.norm_first else norm(x)

        x = add(x, self.attention_norm, lambda y: self.attention(y, pattern, rotation=rotation, cache=cache))
        if self.cross is not None and self.cross_norm is not None:
            cross = self.cross
            assert memory_pattern is not None
            x = add(x, self.cross_norm, lambda y: cross(y, memory_pattern, memory=memory))
        return add(x, self.mlp_norm, self.mlp)


class Stack(nn.ModuleList):
    """The blocks of an encoder or a decoder, first to last.

    `drop_path` rises linearly from 0 in the first to its full rate in the last. So do Steiner et al. 2021;
    Huang et al. 2016, equation 4, begin a step above 0.
    """

    def __init__(self, config: ModelConfig, *, cross: bool = False, qk_norm: bool = False) -> None:
        last = max(config.depth - 1, 1)
        rates = (config.drop_path * i / last for i in range(config.depth))
        super().__init__(Block(config, cross=cross, qk_norm=qk_norm, drop_path=rate) for rate in rates)

    def forward(
        self,
        x: Tensor,
        pattern: Pattern,
        *,
        rotation: KeyValue | None = None,
        caches: Sequence[Past] | None = None,
        memory: Sequence[KeyValue] = (),
        memory_pattern: Pattern | None = None,
    ) -> Tensor:
        """x (T, D) -> (T, D). caches and memory have an item for each block, the latter from `read`."""
        states = self.states(
            x, pattern, rotation=rotation, caches=caches, memory=memory, memory_pattern=memory_pattern
        )
        for state in states:
            x = state
        return x

    def states(
        self,
        x: Tensor,
        pattern: Pattern,
        *,
        rotation: KeyValue | None = None,
        caches: Sequence[Past] | None = None,
        memory: Sequence[KeyValue] = (),
        memory_pattern: Pattern | None = None,
    ) -> Iterator[Tensor]:
        """What each block makes of x (T, D), first to last: (T, D) each; arguments as for `forward`."""
        for i, block in enumerate(self):
            x = block(
                x,
                pattern,
                rotation=rotation,
                cache=None if caches is None else caches[i],
                memory=memory[i] if memory else None,
                memory_pattern=memory_pattern,
            )
            yield x

    def read(self, memory: Tensor) -> list[KeyValue]:
        """Each block's keys and values of memory (S, D), for its cross-attention."""
        return [cross.read(memory) for block in self if (cross := cast(Block, block).cross) is not None]

    def attentions(self) -> list[Tappable]:
        """The modules of self-attention, first layer first."""
        return [cast(Block, block).attention for block in self]

    def crosses(self) -> list[Tappable]:
        """The modules of cross-attention, first layer first."""
        return [cross for block in self if (cross := cast(Block, block).cross) is not None]


class TokenEmbedding(nn.Embedding):
    """A vector for each token; in training those of a random share are 0 (Iyyer et al. 2015, 3.2).

    They are not scaled up for it: where a token is missing, its neighbours have to do.
    """

    def __init__(self, vocab_size: int, dim: int, dropout: float) -> None:
        super().__init__(vocab_size, dim)
        self.dropout = dropout

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors."""
        return self.weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """ids (T,) -> (T, D)."""
        x = super().forward(ids)
        if not self.training or self.dropout == 0.0:
            return x
        return x * (torch.rand(*ids.shape, 1, device=x.device) >= self.dropout)


class Output(nn.Module):
    """Logits by the matrix that also embeds tokens (Vaswani et al. 2017, 3.4; Press and Wolf 2017)."""

    def forward(self, hidden: Tensor, embeddings: Tensor, bias: Tensor | None = None) -> Tensor:
        """hidden (..., D), embeddings (V, D), bias (V,) -> logits (..., V)."""
        return F.linear(hidden, embeddings, bias)

    def likeliest(
        self, hidden: Tensor, embeddings: Tensor, bias: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor]:
        """hidden (R, D) -> log-probabilities and ids of the likeliest tokens, best first: (R, count) each."""
        logits = self(hidden, embeddings, bias).float()  # (R, V)
        best = logits.topk(count)
        return best.values - logits.logsumexp(-1, keepdim=True), best.indices

    def best(self, hidden: Tensor, embeddings: Tensor, bias: Tensor | None, count: int) -> Tensor:
        """The ids that `likeliest` finds (R, count), without the sum that log-probabilities need."""
        logits: Tensor = self(hidden, embeddings, bias).float()  # (R, V)
        if count == 1:
            return logits.argmax(-1, keepdim=True)  # one kernel, not ten
        return logits.topk(count).indices


def init_normal(model: nn.Module, depth: int | None = None) -> None:
    """Weights from N(0, 0.02²) cut at three deviations, biases 0, as GPT, BERT and ViT begin.

    depth: also scale what joins the residual stream by 1 / sqrt(2 depth) (Radford et al. 2019, 2.3).
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            joins = name.endswith(("attention.out", "mlp.down"))
            std = 0.02 / math.sqrt(2 * depth) if depth and joins else 0.02
            nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def init_xavier(model: nn.Module) -> None:
    """Matrices by Glorot and Bengio 2010, equation 16; embeddings from N(0, 1/D).

    The latter have unit variance once they are scaled by sqrt(D) (Vaswani et al. 2017, 3.4).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
