"""transformers' ViT with 3x3 convolutions in place of the linear patch embedding (Xiao et al. 2021).

transformers has no such model, so each folder of one has this file, with which transformers opens it:

    AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)

Needs transformers 5.0 or later.

Legend: N images, P patches of an image, C channels, p patch side, D model width; h, w height and width of
an image on its way through the convolutions, c its channels there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel
from transformers.activations import ACT2FN
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)


class ViTConvolutionalStemConfig(ViTConfig):
    """The settings of a ViT; patch_size is a power of two that divides hidden_size."""

    model_type = "vit_convolutional_stem"


class ConvolutionalStem(nn.Module):
    """One 3x3 convolution at full size, then log2(p) that halve it; each with LayerNorm over channels."""

    def __init__(self, config: ViTConvolutionalStemConfig) -> None:
        super().__init__()
        halvings = config.patch_size.bit_length() - 1
        widths = [config.hidden_size >> i for i in reversed(range(halvings + 1))]
        inputs = [config.num_channels, *widths]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs[i], widths[i], kernel_size=3, stride=2 if i else 1, padding=1)
            for i in range(halvings + 1)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=config.layer_norm_eps) for width in widths)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """pixel_values (N, C, height, width) -> (N, P, D), patches row by row."""
        x = pixel_values.contiguous(memory_format=torch.channels_last)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = convolution(x).permute(0, 2, 3, 1)  # (N, h, w, c)
            x = self.activation(norm(x)).permute(0, 3, 1, 2)  # (N, c, h, w)
        return self.projection(x.flatten(2).transpose(1, 2))


class ViTConvolutionalStemModel(ViTModel):
    """The encoder; without a pooler, as it is trained without."""

    config_class = ViTConvolutionalStemConfig

    def __init__(self, config: ViTConvolutionalStemConfig, add_pooling_layer: bool = False) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        self.embeddings.patch_embeddings = ConvolutionalStem(config)
        self.post_init()


class ViTConvolutionalStemForImageClassification(ViTForImageClassification):
    """The encoder with a classifier on its class token."""

    config_class = ViTConvolutionalStemConfig

    def __init__(self, config: ViTConvolutionalStemConfig) -> None:
        super().__init__(config)
        self.vit = ViTConvolutionalStemModel(config)
        self.post_init()


# Files call tensors as those of every ViT do, which transformers renames when it loads one.
register_checkpoint_conversion_mapping(
    ViTConvolutionalStemModel.__name__, get_checkpoint_conversion_mapping("ViTModel") or [], overwrite=True
)
