"""transformers' ViT with what was learned since.

Rotary positions in two dimensions (Su et al. 2021, Heo et al. 2024), norms of queries and keys (Dehghani et
al. 2023), and 3x3 convolutions in place of patches (Xiao et al. 2021). transformers has no such model, so
each folder of one has this file, with which transformers opens it:

    AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)

Written for transformers 5.24.

Legend: N images of rows x columns = P patches of side p, C channels, D model width, H heads, E head width;
h, w height and width of an image on its way through the convolutions, c its channels there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel
from transformers.activations import ACT2FN
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import ViTAttention, ViTEmbeddings, eager_attention_forward


class ExtendedViTConfig(ViTConfig):
    """The settings of a ViT, and its own.

    stem: patches or convolutions; for these patch_size is a power of two that divides hidden_size.
    position: learned or rotary. qk_norm: whether attention normalises each head's queries and keys; with
    rotary positions.
    """

    model_type = "extended_vit"

    def __init__(
        self, stem: str = "patches", position: str = "learned", qk_norm: bool = False, **others: Any
    ) -> None:
        self.stem, self.position, self.qk_norm = stem, position, qk_norm
        super().__init__(**others)


class ConvolutionalStem(nn.Module):
    """One 3x3 convolution at full size, then log2(p) that halve it; each with LayerNorm over channels."""

    def __init__(self, config: ExtendedViTConfig) -> None:
        super().__init__()
        halvings = config.patch_size.bit_length() - 1
        widths = [config.hidden_size >> i for i in reversed(range(halvings + 1))]
        inputs = [config.num_channels, *widths]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs[i], widths[i], kernel_size=3, stride=2 if i else 1, padding=1)
            for i in range(halvings + 1)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=config.layer_norm_eps) for width in widths)
        self.last = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]

    @property
    def projection(self) -> nn.Linear:
        """Of which ViTModel asks the type of pixels."""
        return self.last

    def forward(self, pixel_values: Tensor, **_: Any) -> Tensor:
        """pixel_values (N, C, height, width) -> (N, P, D), patches row by row."""
        x = pixel_values.contiguous(memory_format=torch.channels_last)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = convolution(x).permute(0, 2, 3, 1)  # (N, h, w, c)
            x = self.activation(norm(x)).permute(0, 3, 1, 2)  # (N, c, h, w)
        return self.last(x.flatten(2).transpose(1, 2))


class ExtendedEmbeddings(ViTEmbeddings):
    """Class token and patches, to which learned positions are added, and rotary ones are not."""

    def __init__(self, config: ExtendedViTConfig) -> None:
        super().__init__(config)
        if config.stem == "convolutions":
            self.patch_embeddings = ConvolutionalStem(config)
        if config.position == "rotary":
            self.position_embeddings = None

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """pixel_values (N, C, height, width) -> (N, 1 + P, D)."""
        if self.position_embeddings is not None:
            return super().forward(pixel_values, **kwargs)
        patches = self.patch_embeddings(pixel_values)
        return self.dropout(torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1))


class RotaryAttention(ViTAttention):
    """Attention whose queries and keys are turned by the angles of their places in the image."""

    def __init__(self, config: ExtendedViTConfig) -> None:
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


class ExtendedViTModel(ViTModel):
    """The encoder; without a pooler, as it is trained without."""

    config_class = ExtendedViTConfig

    def __init__(self, config: ExtendedViTConfig, add_pooling_layer: bool = False) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        self.embeddings = ExtendedEmbeddings(config)
        if config.position == "rotary":
            for layer in self.layers:
                layer.attention = RotaryAttention(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """As ViTModel's; with rotary positions for images of any size that is a multiple of the patches'."""
        if self.config.position == "learned":
            return super().forward(pixel_values, **kwargs)
        rows, columns = (side // self.config.patch_size for side in pixel_values.shape[-2:])
        width = self.config.hidden_size // self.config.num_attention_heads
        turn = grid_turn(rows, columns, width, pixel_values.device)
        return super().forward(pixel_values, turn=turn, **kwargs)


class ExtendedViTForImageClassification(ViTForImageClassification):
    """The encoder with a classifier on its class token."""

    config_class = ExtendedViTConfig

    def __init__(self, config: ExtendedViTConfig) -> None:
        super().__init__(config)
        self.vit = ExtendedViTModel(config)
        self.post_init()


# Files call tensors as those of every ViT do, which transformers renames when it loads one.
register_checkpoint_conversion_mapping(
    ExtendedViTModel.__name__, get_checkpoint_conversion_mapping("ViTModel") or [], overwrite=True
)
