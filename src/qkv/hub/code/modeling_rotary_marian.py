"""transformers' Marian with rotary positions in self-attention (Su et al. 2021).

transformers has no such model, so each folder of one has this file, with which transformers opens it:

    AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)

Written for transformers 5.24.

Legend: N sequences, T tokens of each that are new, H heads, E head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache, MarianConfig, MarianMTModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.marian.modeling_marian import MarianAttention, eager_attention_forward


class RotaryMarianConfig(MarianConfig):
    """The settings of a Marian, and whether self-attention normalises each head's queries and keys."""

    model_type = "rotary_marian"

    def __init__(self, qk_norm: bool = False, **others: Any) -> None:
        self.qk_norm = qk_norm
        super().__init__(**others)


class RotaryAttention(MarianAttention):
    """Self-attention whose queries and keys are turned by the angles of their positions."""

    def __init__(self, config: RotaryMarianConfig, other: MarianAttention) -> None:
        """other: what it takes the place of."""
        super().__init__(
            other.embed_dim,
            other.num_heads,
            dropout=other.dropout,
            is_decoder=other.is_decoder,
            is_causal=other.is_causal,
            config=config,
            layer_idx=other.layer_idx,
        )
        self.q_norm, self.k_norm = (
            nn.LayerNorm(self.head_dim) if config.qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (N, T, H E), which follow those of the cache -> (N, T, H E), and the weights."""
        cache = kwargs.pop("cache", None)
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        start = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1))  # (N, T, H, E)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = turned(self.q_norm(query), start).to(value.dtype)  # autocast normalises in float32
        key = turned(self.k_norm(key), start).to(value.dtype)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (N, H, T, E)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.dropout if self.training else 0.0
        answer, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.out_proj(answer.flatten(-2)), weights


def turned(x: Tensor, start: int) -> Tensor:
    """x (N, T, H, E) of positions from `start` on, each pair of numbers turned (equation 15)."""
    pairs = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=torch.float32)  # (E / 2,)
    rates = 10000.0 ** (-pairs / x.shape[-1])
    angles = torch.outer(start + torch.arange(x.shape[1], device=x.device), rates)  # (T, E / 2)
    cosine, sine = (part[:, None].to(x.dtype) for part in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, dim=-1)  # (N, T, H, E / 2)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class NoPositions(nn.Module):
    """In place of the sinusoids, which are added to embeddings."""

    def forward(self, *args: Any, **kwargs: Any) -> float:
        """Nothing."""
        return 0.0


class RotaryMarianMTModel(MarianMTModel):
    """Encoder, decoder and output."""

    config_class = RotaryMarianConfig

    def __init__(self, config: RotaryMarianConfig) -> None:
        super().__init__(config)
        for stack in (self.model.encoder, self.model.decoder):
            stack.embed_positions = NoPositions()
            for layer in stack.layers:
                layer.self_attn = RotaryAttention(config, layer.self_attn)
        self.post_init()
