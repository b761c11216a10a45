"""What `qkv train FAMILY` runs when no recipe is given: small models that two CPU cores train in minutes."""

from __future__ import annotations

from dataclasses import replace

from qkv.config import (
    BertConfig,
    Family,
    GPTConfig,
    RunConfig,
    TokenizerConfig,
    TrainConfig,
    TransformerConfig,
    ViTConfig,
)


def default_recipe(family: Family) -> RunConfig:
    """A family's starting point; the data fill in vocabulary, labels and image size."""
    return {
        "gpt": RunConfig(
            model=GPTConfig(dim=256, depth=6, heads=4, mlp_dim=1024, context=256),
            tokenizer=TokenizerConfig(kind="bpe", vocab_size=4096),
            train=TrainConfig(learning_rate=1e-3, weight_decay=0.1),
        ),
        "bert": RunConfig(
            model=BertConfig(dim=256, depth=4, heads=4, mlp_dim=1024, context=128),
            tokenizer=TokenizerConfig(kind="wordpiece", vocab_size=8000, lowercase=True),
            train=TrainConfig(learning_rate=5e-4),
        ),
        "transformer": RunConfig(
            model=TransformerConfig(dim=128, depth=4, heads=4, mlp_dim=256, dropout=0.3, context=256),
            tokenizer=TokenizerConfig(kind="bpe", vocab_size=8000),
            train=TrainConfig(
                learning_rate=3e-3, schedule="inverse_sqrt", warmup_steps=400, label_smoothing_factor=0.1
            ),
        ),
        "vit": RunConfig(
            model=ViTConfig(image_size=0, patch_size=4, dim=192, depth=6, heads=3, mlp_dim=768, dropout=0.1),
            train=TrainConfig(learning_rate=1e-3, batch_tokens=8192, weight_decay=0.05),
        ),
    }[family]


FINE_TUNING_RATE = 1e-4
"""For whole pretrained weights, as in `recipes/bert-sst2.toml`; at most half of it in Devlin et al. 2018."""


def fine_tuning(recipe: RunConfig, adapters: bool) -> RunConfig:
    """The recipe from a checkpoint on: the model is the checkpoint's but for dropout, and learns slower.

    adapters: they alone are trained, at the rate of fresh weights.
    """
    model = replace(type(recipe.model)(), **recipe.model.dropouts)
    rate = recipe.train.learning_rate if adapters else FINE_TUNING_RATE
    return replace(recipe, model=model, train=replace(recipe.train, learning_rate=rate))
