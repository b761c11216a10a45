"""GPT: a causal decoder (Radford et al. 2018 with post-norm, 2019 with pre-norm).

Legend: T tokens of the batch, N sequences, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from qkv.attention import Past, Pattern, Tappable
from qkv.config import GPTConfig
from qkv.dropout import Dropout
from qkv.kv_cache import ROWS, Branches, Cache
from qkv.layers import Output, Stack, TokenEmbedding, check_lengths, init_normal, rotation
from qkv.ragged import Ragged, rows_of

PRESETS: dict[str, GPTConfig] = {
    "gpt": GPTConfig(vocab_size=40478, context=512, norm_first=False),
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(dim=1024, depth=24, heads=16, mlp_dim=4096),
    "gpt2-large": GPTConfig(dim=1280, depth=36, heads=20, mlp_dim=5120),
    "gpt2-xl": GPTConfig(dim=1600, depth=48, heads=25, mlp_dim=6400),
}


@dataclass(frozen=True)
class GPTOutput:
    """hidden (T, D) after the last norm, and logits (T, V) of each token's successor."""

    hidden: Ragged
    logits: Ragged


class GPT(nn.Module):
    """Token ids in, logits of each next token out."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = TokenEmbedding(config.vocab_size, config.dim, config.word_dropout)
        learned = config.position == "learned"
        self.positions = nn.Embedding(config.context, config.dim) if learned else None
        self.dropout = Dropout(config.dropout)
        self.blocks = Stack(config, qk_norm=config.qk_norm)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps) if config.norm_first else nn.Identity()
        self.output = Output()
        init_normal(self, config.depth)

    def forward(self, batch: Ragged, cache: Cache | None = None) -> GPTOutput:
        """batch of ids (T,) -> hidden and logits. Raises InputError for a sequence over the context."""
        hidden = self.features(batch, cache)
        return GPTOutput(hidden, hidden.like(self.head(hidden.values)))

    def features(
        self, batch: Ragged, cache: Cache | None = None, branches: Mapping[int, Branches] | None = None
    ) -> Ragged:
        """batch of ids (T,) -> hidden (T, D). With a cache, sequence i continues the text in slot i."""
        if cache is None:
            check_lengths(batch.layout, self.config.context)
            pattern, positions = Pattern(batch.layout, batch.layout, causal=True), batch.layout.positions
        else:
            pattern, positions = cache.extend(batch.layout, branches)
        caches = None if cache is None else cache.layers
        return batch.like(self.run(self.embed(batch.values, positions), positions, pattern, caches))

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids and positions (T,) -> their embeddings (T, D); rotary positions are not in them."""
        x = self.tokens(ids)  # (T, D)
        if self.positions is not None:
            x = x + self.positions(positions)
        return self.dropout(x)  # type: ignore[no-any-return]

    def run(
        self, x: Tensor, positions: Tensor, pattern: Pattern, caches: Sequence[Past] | None = None
    ) -> Tensor:
        """x (T, D), embedded tokens at positions (T,) that attend as the pattern says -> hidden (T, D).

        caches: where each layer keeps keys and values of earlier tokens.
        """
        x = self.blocks(x, pattern, rotation=rotation(self.config, positions), caches=caches)
        return self.norm(x)  # type: ignore[no-any-return]

    def head(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> logits (..., V), by the token embeddings (Radford et al. 2018, equation 2)."""
        return self.output(hidden, self.tokens.weight)  # type: ignore[no-any-return]

    def likeliest(self, hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """hidden (R, D) -> log-probabilities and ids of the likeliest tokens, best first: (R, count) each."""
        return self.output.likeliest(hidden, self.tokens.weight, None, count)

    def best(self, hidden: Tensor, count: int) -> Tensor:
        """hidden (R, D) -> ids of the likeliest tokens alone, best first: (R, count)."""
        return self.output.best(hidden, self.tokens.weight, None, count)

    def start(self, slots: int, rows: int = ROWS) -> Cache:
        """An empty cache for that many texts, with room for so many tokens of each."""
        return Cache(slots, self.config.depth, self.config.context, self.tokens.weight.device, rows)

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
        hidden = self.features(batch, cache, branches)
        return hidden.last() if rows is None else rows_of(hidden.values, rows)

    def attentions(self) -> dict[str, list[Tappable]]:
        """The layers' attention, first layer first."""
        return {"decoder": self.blocks.attentions()}
