"""transformers' ViT with rotary positions in two dimensions (Su et al. 2021, Heo et al. 2024).

transformers has no such model, so each folder of one has this file, with which transformers opens it:

    AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)

Written for transformers 5.24.

Legend: N images of rows x columns = P patches, C channels, D model width, H heads, E head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import ViTAttention, ViTEmbeddings, eager_attention_forward


class RotaryViTConfig(ViTConfig):
    """The settings of a ViT, and whether attention normalises each head's queries and keys."""

    model_type = "rotary_vit"

    def __init__(self, qk_norm: bool = False, **others: Any) -> None:
        self.qk_norm = qk_norm
        super().__init__(**others)


class RotaryAttention(ViTAttention):
    """Attention whose queries and keys are turned by the angles of their places in the image."""

    def __init__(self, config: RotaryViTConfig) -> None:
        super().__init__(config)
        self.q_norm, self.k_norm = (
            nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps) if config.qk_norm else nn.Identity()
            for _ in range(2)
        )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (N, 1 + P, D) -> the same shape, and the weights; turn: of `grid_turn`."""
        turn: tuple[Tensor, Tensor] = kwargs.pop("turn")
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (N, H, 1 + P, E) each
        query = turned(self.q_norm(query), turn).to(value.dtype)  # autocast normalises in float32
        key = turned(self.k_norm(key), turn).to(value.dtype)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        answer, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(answer.flatten(-2)), weights


def turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """x (N, H, 1 + P, E), each pair of numbers turned (Su et al. 2021, equation 34)."""
    cosine, sine = (part.to(x.dtype) for part in turn)
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


def grid_turn(rows: int, columns: int, E: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the class token, which do not turn, and of patches: (1 + rows * columns, E).

    Half of a patch's pairs turn by its row, half by its column.
    """
    rates = 2 * torch.pi * 100.0 ** (-torch.arange(0, E, 4, device=device, dtype=torch.float32) / E)
    down, right = (
        torch.outer((torch.arange(count, device=device) + 0.5) * 2 / count - 1, rates)
        for count in (rows, columns)
    )  # (rows, E / 4), (columns, E / 4)
    patches = torch.cat([down.repeat_interleave(columns, 0), right.repeat(rows, 1)], dim=1)
    angles = nn.functional.pad(patches, (0, 0, 1, 0)).repeat(1, 2)
    return angles.cos(), angles.sin()


class RotaryViTEmbeddings(ViTEmbeddings):
    """Class token and patches, to which no positions are added."""

    def __init__(self, config: RotaryViTConfig) -> None:
        super().__init__(config)
        self.position_embeddings = None

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """pixel_values (N, C, height, width) -> (N, 1 + P, D)."""
        patches = self.patch_embeddings(pixel_values)
        return self.dropout(torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1))


class RotaryViTModel(ViTModel):
    """The encoder; without a pooler, as it is trained without."""

    config_class = RotaryViTConfig

    def __init__(self, config: RotaryViTConfig, add_pooling_layer: bool = False) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        self.embeddings = RotaryViTEmbeddings(config)
        for layer in self.layers:
            layer.attention = RotaryAttention(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """As ViTModel's, for images of any size that is a multiple of the patches'."""
        rows, columns = (side // self.config.patch_size for side in pixel_values.shape[-2:])
        width = self.config.hidden_size // self.config.num_attention_heads
        turn = grid_turn(rows, columns, width, pixel_values.device)
        return super().forward(pixel_values, turn=turn, **kwargs)


class RotaryViTForImageClassification(ViTForImageClassification):
    """The encoder with a classifier on its class token."""

    config_class = RotaryViTConfig

    def __init__(self, config: RotaryViTConfig) -> None:
        super().__init__(config)
        self.vit = RotaryViTModel(config)
        self.post_init()


# Files call tensors as those of every ViT do, which transformers renames when it loads one.
register_checkpoint_conversion_mapping(
    RotaryViTModel.__name__, get_checkpoint_conversion_mapping("ViTModel") or [], overwrite=True
)
