"""Every preset's parameters, against the published figures and against transformers' own models.

Models are built on the meta device: nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

from qkv.config import AnyModelConfig, BertConfig, GPTConfig, TransformerConfig, ViTConfig
from qkv.models import PRESETS, build

VASWANI = "Vaswani et al. 2017, table 3"
TURC = "Turc et al. 2019, 'Well-Read Students Learn Better', table 1"
DEVLIN = "Devlin et al. 2018, section 3"
GPT2 = "OpenAI, README of openai/gpt-2, which corrects the 117M, 345M, 762M and 1542M of the paper"
VIT = "Dosovitskiy et al. 2021, table 1"
TIMM = "timm, results of vit_*_patch*_224, which follow Steiner et al. 2021, 'How to train your ViT?'"

# Preset: (parameters here, published millions, allowed difference in millions, source).
# The difference is half a unit of the last published digit, unless a comment explains more.
PUBLISHED: dict[str, tuple[int, float, float, str]] = {
    # The paper's vocabulary is "about 37000" tokens and its counts are in table 3; each 1000 tokens
    # more are 0.5 million parameters of the base and 1 million of the big model.
    "transformer-base": (63_082_496, 65.0, 2.0, VASWANI),
    "transformer-big": (214_245_376, 213.0, 1.5, VASWANI),
    # With both pretraining heads, which the table counts.
    "bert-tiny": (4_433_468, 4.4, 0.05, TURC),
    "bert-mini": (11_267_900, 11.3, 0.05, TURC),
    "bert-small": (29_058_876, 29.1, 0.05, TURC),
    "bert-medium": (41_668_412, 41.7, 0.05, TURC),
    "bert-base": (110_106_428, 110.1, 0.05, TURC),
    # Rounded to tens of millions in the paper.
    "bert-large": (336_226_108, 340.0, 5.0, DEVLIN),
    # Its own paper has no figure; that of GPT-2 has one for a model "equivalent to the original GPT".
    "gpt": (116_534_784, 117.0, 0.5, "Radford et al. 2019, table 2"),
    "gpt2": (124_439_808, 124.0, 0.5, GPT2),
    "gpt2-medium": (354_823_168, 355.0, 0.5, GPT2),
    "gpt2-large": (774_030_080, 774.0, 0.5, GPT2),
    "gpt2-xl": (1_557_611_200, 1558.0, 0.5, GPT2),
    # With a head of 1000 classes.
    "vit-ti/16": (5_717_416, 5.72, 0.005, TIMM),
    "vit-s/16": (22_050_664, 22.05, 0.005, TIMM),
    "vit-s/32": (22_878_952, 22.88, 0.005, TIMM),
    "vit-b/16": (86_567_656, 86.57, 0.005, TIMM),
    "vit-b/32": (88_224_232, 88.22, 0.005, TIMM),
    "vit-l/16": (304_326_632, 304.33, 0.005, TIMM),
    "vit-l/32": (306_535_400, 306.54, 0.005, TIMM),
    "vit-h/14": (632_045_800, 632.0, 0.5, VIT),
}


def parameters(model: nn.Module) -> int:
    """Trained numbers, those of tied matrices once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def resolved(name: str) -> AnyModelConfig:
    """The preset as it was published: image models with ImageNet's classes."""
    config = PRESETS[name]
    if isinstance(config, ViTConfig):
        return replace(config, labels=tuple(f"class {i}" for i in range(1000)))
    return config


def count(config: AnyModelConfig) -> int:
    with torch.device("meta"):
        return parameters(build(config))


def test_every_preset_but_our_own_is_pinned():
    # transformer-tiny is a size for little data, not the original paper's.
    assert set(PRESETS) - set(PUBLISHED) == {"transformer-tiny"}
    tiny = PRESETS["transformer-tiny"]
    assert (tiny.dim, tiny.depth) == (128, 4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_equal_the_published_figure(name: str):
    exact, millions, difference, source = PUBLISHED[name]
    found = count(resolved(name))
    assert found == exact
    assert abs(found / 1e6 - millions) <= difference, source


@pytest.mark.parametrize("name", ["vit-b/16", "vit-l/16", "vit-h/14"])
def test_vit_sizes_are_those_of_the_paper(name: str):
    """Table 1 has one figure for each size, whatever its patches: B 86M, L 307M, H 632M."""
    millions = {"b": 86, "l": 307, "h": 632}[name[4]]
    assert count(resolved(name)) / 1e6 == pytest.approx(millions, rel=0.01)


# ---------------------------------------------------------------- the same sizes in transformers


def _gpt(config: GPTConfig) -> nn.Module:
    sizes = {"vocab_size": config.vocab_size, "n_positions": config.context, "n_embd": config.dim}
    sizes |= {"n_layer": config.depth, "n_head": config.heads}
    if config.norm_first:
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, n_inner=config.mlp_dim))
    assert config.mlp_dim == 4 * config.dim  # the only width that model knows
    return transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**sizes))


def _bert(config: BertConfig) -> nn.Module:
    return transformers.BertForPreTraining(
        transformers.BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            intermediate_size=config.mlp_dim,
            max_position_embeddings=config.context,
            type_vocab_size=config.segments,
        )
    )


def _transformer(config: TransformerConfig) -> nn.Module:
    return transformers.MarianMTModel(
        transformers.MarianConfig(
            vocab_size=config.vocab_size,
            d_model=config.dim,
            encoder_layers=config.depth,
            decoder_layers=config.depth,
            encoder_attention_heads=config.heads,
            decoder_attention_heads=config.heads,
            encoder_ffn_dim=config.mlp_dim,
            decoder_ffn_dim=config.mlp_dim,
            max_position_embeddings=config.context,
            pad_token_id=config.pad_id,
        )
    )


def _vit(config: ViTConfig) -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_channels=config.channels,
            hidden_size=config.dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            intermediate_size=config.mlp_dim,
            num_labels=len(config.labels),
        )
    )


PEERS: dict[str, Callable[..., nn.Module]] = {
    "transformer": _transformer,
    "bert": _bert,
    "gpt": _gpt,
    "vit": _vit,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_equal_those_of_transformers(name: str):
    config = resolved(name)
    with torch.device("meta"):
        peer = PEERS[config.family](config)
    # Marian keeps its fixed sinusoids among the parameters, some versions of it as trainable ones.
    fixed = sum(p.numel() for key, p in peer.named_parameters() if key.endswith("embed_positions.weight"))
    trained = sum(p.numel() for p in peer.parameters()) - fixed
    assert count(config) == trained
