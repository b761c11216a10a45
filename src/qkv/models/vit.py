"""ViT: an encoder over image patches (Dosovitskiy et al. 2021).

Legend: T tokens of all images, N images, P patches of an image, C channels, p patch side, D model width,
K classes; between convolutions h, w height and width, c channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.attention import KeyValue, Pattern, Tappable
from qkv.config import ViTConfig
from qkv.dropout import Dropout
from qkv.errors import InputError
from qkv.layers import ACTIVATIONS, Stack, grid_angles, init_normal
from qkv.ragged import Layout, Ragged

_SIZES: dict[str, tuple[ViTConfig, tuple[int, ...]]] = {
    "ti": (ViTConfig(dim=192, heads=3, mlp_dim=768), (16,)),
    "s": (ViTConfig(dim=384, heads=6, mlp_dim=1536), (16, 32)),
    "b": (ViTConfig(), (16, 32)),
    "l": (ViTConfig(dim=1024, depth=24, heads=16, mlp_dim=4096), (16, 32)),
    "h": (ViTConfig(dim=1280, depth=32, heads=16, mlp_dim=5120), (14,)),
}
"""Sizes (table 1; Ti and S of Steiner et al. 2021, table 1) and the patch sides they were published with."""

PRESETS: dict[str, ViTConfig] = {
    f"vit-{size}/{patch}": replace(config, patch_size=patch)
    for size, (config, patches) in _SIZES.items()
    for patch in patches
}


@dataclass(frozen=True)
class ViTOutput:
    """What the encoder and the head say."""

    hidden: Ragged
    """Class token and patches of each image, 1 + P tokens (., D), after the last norm."""
    logits: Tensor | None
    """(N, K); None without a head."""


class PatchEmbedding(nn.Module):
    """Cuts images into patches and makes each a token by one matrix (equation 1)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.projection = nn.Linear(config.channels * config.patch_size**2, config.dim)
        self.patch_size = config.patch_size

    def forward(self, images: Tensor) -> Tensor:
        """images (N, C, height, width) -> (N, P, D), patches row by row."""
        N, C, height, width = images.shape
        p = self.patch_size
        cut = images.reshape(N, C, height // p, p, width // p, p)
        cut = cut.permute(0, 2, 4, 1, 3, 5)  # (N, rows, columns, C, p, p)
        return self.projection(cut.flatten(3).flatten(1, 2))  # type: ignore[no-any-return]


class ConvolutionalStem(nn.Module):
    """Makes tokens by 3x3 convolutions, as in Xiao et al. 2021: one at full size, then log2(p) of stride 2.

    Their widths double up to D. After each come a norm and the model's activation, after all of them one
    matrix, a convolution of 1x1. The norm is over each pixel's channels and not, as in the paper, over the
    batch, so that an image's tokens do not depend on its neighbours. Kernels and biases begin as torch draws
    them: where an area is blank and biases are 0, a norm would blow up the gradients.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        widths = [2**i * config.dim // config.patch_size for i in range(config.stem_depth)]
        inputs = [config.channels, *widths]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs[i], widths[i], kernel_size=3, stride=2 if i else 1, padding=1)
            for i in range(config.stem_depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=config.norm_eps) for width in widths)
        self.last = nn.Linear(config.dim, config.dim)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, images: Tensor) -> Tensor:
        """images (N, C, height, width) -> (N, P, D), patches row by row."""
        # With each pixel's channels side by side, permutations are views, and convolutions are faster.
        x = images.contiguous(memory_format=torch.channels_last)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = convolution(x).permute(0, 2, 3, 1)  # (N, h, w, c)
            x = self.activation(norm(x)).permute(0, 3, 1, 2)  # (N, c, h, w)
        return self.last(x.flatten(2).transpose(1, 2))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """Images in, one vector a patch and class logits out."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        patches = (config.image_size // config.patch_size) ** 2
        self.patches = PatchEmbedding(config) if config.stem == "patches" else ConvolutionalStem(config)
        self.class_token = nn.Parameter(torch.empty(config.dim))
        learned = config.position == "learned"
        self.positions = nn.Parameter(torch.empty(1 + patches, config.dim)) if learned else None
        self.dropout = Dropout(config.dropout)
        self.blocks = Stack(config, qk_norm=config.qk_norm)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps) if config.norm_first else nn.Identity()
        self.config = config
        init_normal(self)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        if self.positions is not None:
            nn.init.trunc_normal_(self.positions, std=0.02)
        self.reset_head(config.labels)

    def reset_head(self, labels: tuple[str, ...]) -> None:
        """Give the encoder a fresh classifier for these labels; none: no head."""
        self.config = replace(self.config, labels=labels)
        self.classifier = nn.Linear(self.config.dim, len(labels)) if labels else None
        if self.classifier is not None:
            init_normal(self.classifier)
            self.classifier.to(device=self.class_token.device, dtype=self.class_token.dtype)

    def forward(self, images: Tensor) -> ViTOutput:
        """images (N, C, height, width), normalised. Raises InputError unless sides are multiples of p."""
        hidden = self.features(images)
        return ViTOutput(hidden, None if self.classifier is None else self.head(hidden.first()))

    def features(self, images: Tensor) -> Ragged:
        """images (N, C, height, width) -> hidden: 1 + P tokens (., D) for each image."""
        x = self.embed(images)  # (N, 1 + P, D)
        layout = Layout((x.shape[1],) * len(x), x.device)
        return Ragged(self.run(x.flatten(0, 1), Pattern(layout, layout), self.rotation(images)), layout)

    def embed(self, images: Tensor) -> Tensor:
        """images (N, C, height, width) -> class token and patches at their positions (N, 1 + P, D).

        Rotary positions are not in them.
        """
        N, C, height, width = images.shape
        p, D = self.config.patch_size, self.config.dim
        channels = self.config.channels
        if (C, height % p, width % p) != (channels, 0, 0):
            raise InputError(
                f"images of {C} channels and {height}x{width} pixels; "
                f"this model reads {channels} channels and sides that are multiples of {p}"
            )
        x = self.patches(images.to(self.class_token.dtype))  # (N, P, D)
        x = torch.cat([self.class_token.expand(N, 1, D), x], dim=1)  # (N, 1 + P, D)
        if self.positions is not None:
            x = x + _on_grid(self.positions, height // p, width // p)
        return self.dropout(x)  # type: ignore[no-any-return]

    def rotation(self, images: Tensor) -> KeyValue | None:
        """What turns queries and keys of all tokens of images (N, C, height, width), (T, 1, E) each.

        Class tokens, which are nowhere, are not turned. None: positions are learned.
        """
        if self.config.position == "learned":
            return None
        N, _, height, width = images.shape
        p, E = self.config.patch_size, self.config.dim // self.config.heads
        angles = F.pad(grid_angles(height // p, width // p, E, images.device), (0, 0, 1, 0))  # (1 + P, E / 2)
        turns = angles.repeat(N, 2)[:, None]  # (T, 1, E)
        return turns.cos(), turns.sin()

    def run(self, x: Tensor, pattern: Pattern, rotation: KeyValue | None) -> Tensor:
        """x (T, D), embedded tokens that attend as the pattern says -> hidden (T, D)."""
        return self.norm(self.blocks(x, pattern, rotation=rotation))  # type: ignore[no-any-return]

    def head(self, first: Tensor) -> Tensor:
        """class tokens' states (N, D) -> logits (N, K) (equation 4). Raises InputError without a head."""
        if self.classifier is None:
            raise InputError("this model has no classification head")
        return self.classifier(first)  # type: ignore[no-any-return]

    def attentions(self) -> dict[str, list[Tappable]]:
        """The layers' attention, first layer first."""
        return {"encoder": self.blocks.attentions()}


def _on_grid(positions: Tensor, rows: int, columns: int) -> Tensor:
    """Trained vectors of the class token and a square's patches, interpolated for another grid (3.2).

    (1 + side * side, D) -> (1 + rows * columns, D).
    """
    side = math.isqrt(len(positions) - 1)
    if rows == columns == side:
        return positions
    grid = positions[1:].view(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, side, side)
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid[0].flatten(1).T])
