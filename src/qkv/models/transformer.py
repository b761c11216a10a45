"""The encoder-decoder Transformer (Vaswani et al. 2017).

Legend: T tokens of the targets, S tokens of the sources, N sequences, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qkv.attention import KeyValue, Past, Pattern, Tappable
from qkv.config import TransformerConfig
from qkv.dropout import Dropout
from qkv.kv_cache import ROWS, Branches, Cache
from qkv.layers import Output, Stack, TokenEmbedding, check_lengths, init_xavier, rotation, sinusoidal
from qkv.ragged import Ragged, rows_of

PRESETS: dict[str, TransformerConfig] = {
    "transformer-base": TransformerConfig(),
    "transformer-big": TransformerConfig(dim=1024, heads=16, mlp_dim=4096, dropout=0.3),
    # For some ten thousand sentence pairs (Wu et al. 2021, "Good for Misconceived Reasons", 4.2).
    "transformer-tiny": TransformerConfig(
        vocab_size=10000, dim=128, depth=4, heads=4, mlp_dim=256, dropout=0.3
    ),
}


@dataclass(frozen=True)
class TransformerOutput:
    """What the two stacks and the head say."""

    memory: Ragged
    """(S, D) of the encoder."""
    hidden: Ragged
    """(T, D) of the decoder."""
    logits: Ragged
    """(T, V) of each target token's successor."""


class Transformer(nn.Module):
    """Source ids and target ids so far in, logits of each next target token out."""

    position_table: Tensor | None
    logits_bias: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = TokenEmbedding(config.vocab_size, config.dim, config.word_dropout)
        self.register_buffer("position_table", self.sinusoids(), persistent=False)
        self.dropout = Dropout(config.dropout)
        self.encoder = Stack(config, qk_norm=config.qk_norm)
        self.decoder = Stack(config, cross=True, qk_norm=config.qk_norm)
        self.encoder_norm = nn.LayerNorm(config.dim, config.norm_eps) if config.norm_first else nn.Identity()
        self.decoder_norm = nn.LayerNorm(config.dim, config.norm_eps) if config.norm_first else nn.Identity()
        self.output = Output()
        # Zero in the paper; Marian's checkpoints have one.
        self.register_buffer("logits_bias", torch.zeros(config.vocab_size))
        init_xavier(self)

    def forward(self, source: Ragged, target: Ragged) -> TransformerOutput:
        """source ids (S,) and target ids (T,), of N sequences each -> memory, hidden, logits.

        Raises InputError for a sequence over the context.
        """
        memory = self.encode(source)
        hidden = self.decode(target, self.read(memory), Pattern(target.layout, memory.layout))
        return TransformerOutput(memory, hidden, hidden.like(self.head(hidden.values)))

    def encode(self, source: Ragged) -> Ragged:
        """source ids (S,) -> memory (S, D)."""
        check_lengths(source.layout, self.config.context)
        pattern, positions = Pattern(source.layout, source.layout), source.layout.positions
        return source.like(self.run_encoder(self.embed(source.values, positions), positions, pattern))

    def run_encoder(self, x: Tensor, positions: Tensor, pattern: Pattern) -> Tensor:
        """x (S, D), embedded tokens at positions (S,) that attend as the pattern says -> memory (S, D)."""
        x = self.encoder(x, pattern, rotation=rotation(self.config, positions))
        return self.encoder_norm(x)  # type: ignore[no-any-return]

    def read(self, memory: Ragged) -> list[KeyValue]:
        """Each decoder layer's keys and values of memory (S, D)."""
        return self.decoder.read(memory.values)

    def decode(
        self,
        target: Ragged,
        memory: list[KeyValue],
        memory_pattern: Pattern,
        cache: Cache | None = None,
        branches: Mapping[int, Branches] | None = None,
    ) -> Ragged:
        """target ids (T,) -> hidden (T, D). With a cache, sequence i continues the text in slot i."""
        if cache is None:
            check_lengths(target.layout, self.config.context)
            pattern, positions = Pattern(target.layout, target.layout, causal=True), target.layout.positions
        else:
            pattern, positions = cache.extend(target.layout, branches)
        caches = None if cache is None else cache.layers
        x = self.embed(target.values, positions)
        return target.like(self.run_decoder(x, positions, pattern, memory, memory_pattern, caches))

    def run_decoder(
        self,
        x: Tensor,
        positions: Tensor,
        pattern: Pattern,
        memory: Sequence[KeyValue],
        memory_pattern: Pattern,
        caches: Sequence[Past] | None = None,
    ) -> Tensor:
        """x (T, D), embedded tokens at positions (T,) that attend as the patterns say -> hidden (T, D).

        memory: each layer's keys and values of the sources. caches: where each keeps those of earlier tokens.
        """
        x = self.decoder(
            x,
            pattern,
            rotation=rotation(self.config, positions),
            caches=caches,
            memory=memory,
            memory_pattern=memory_pattern,
        )
        return self.decoder_norm(x)  # type: ignore[no-any-return]

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids (T,) -> sqrt(D) times their embeddings, plus sinusoidal positions: (T, D) (3.4, 3.5)."""
        x = self.tokens(ids) * math.sqrt(self.config.dim)
        if self.position_table is not None:
            # FSDP2 gathers parameters in bfloat16, but no buffers.
            x = x + self.position_table[positions].to(x.dtype)
        return self.dropout(x)  # type: ignore[no-any-return]

    def sinusoids(self) -> Tensor | None:
        """A new position table (context, D), which is on no disk; None: positions are rotary."""
        if self.config.position == "rotary":
            return None
        return sinusoidal(self.config.context, self.config.dim).to(self.tokens.weight.device)

    def head(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> logits (..., V), by the matrix that also embeds sources and targets (3.4)."""
        bias = self.logits_bias.to(hidden.dtype)
        return self.output(hidden, self.tokens.weight, bias)  # type: ignore[no-any-return]

    def likeliest(self, hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """hidden (R, D) -> log-probabilities and ids of the likeliest tokens, best first: (R, count) each."""
        return self.output.likeliest(hidden, self.tokens.weight, self.logits_bias, count)

    def best(self, hidden: Tensor, count: int) -> Tensor:
        """hidden (R, D) -> ids of the likeliest tokens alone, best first: (R, count)."""
        return self.output.best(hidden, self.tokens.weight, self.logits_bias, count)

    def start(self, slots: int, rows: int = ROWS) -> Cache:
        """An empty cache for that many texts and their sources, with room for so many tokens of each."""
        sizes, device = (slots, self.config.depth, self.config.context), self.tokens.weight.device
        return Cache(*sizes, device, rows, memory=Cache(*sizes, device, rows))

    def remember(self, source: Ragged, cache: Cache) -> None:
        """Encode source ids (S,), that of slot i in sequence i, for the texts in the slots to read.

        A slot whose sequence is empty keeps the source that it has; the others must have none.
        """
        assert cache.memory is not None
        memory = self.encode(source)
        cache.memory.extend(source.layout)
        for layer, (key, value) in zip(cache.memory.layers, self.read(memory), strict=True):
            layer.append(key, value)

    def next_hidden(
        self,
        batch: Ragged,
        cache: Cache,
        rows: Sequence[int] | None = None,
        branches: Mapping[int, Branches] | None = None,
    ) -> Tensor:
        """What `head` tells what follows by, once sequence i of `batch` is appended to slot i (or nothing).

        rows: after which R of the batch's tokens -> hidden (R, D); None: after each sequence's last,
        (N, D). branches: the slots whose new tokens end texts of their own.
        """
        assert cache.memory is not None
        memory = [layer.read() for layer in cache.memory.layers]
        pattern = Pattern(batch.layout, cache.memory.layout)
        hidden = self.decode(batch, memory, pattern, cache, branches)
        return hidden.last() if rows is None else rows_of(hidden.values, rows)

    def attentions(self) -> dict[str, list[Tappable]]:
        """The layers' attention of encoder, decoder and cross-attention, first layer first."""
        return {
            "encoder": self.encoder.attentions(),
            "decoder": self.decoder.attentions(),
            "cross": self.decoder.crosses(),
        }
