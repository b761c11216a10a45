"""ViT on disk: `vit`, `rotary_vit` or `vit_convolutional_stem`; bare or with a classifier."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from qkv.config import ViTConfig, from_dict
from qkv.hub.table import Fields, Format, Row, Table, label_settings, labels_of, module
from qkv.tokenizers import Tokenizer

_WEIGHT, _BIAS = module("patches.projection", "embeddings.patch_embeddings.projection")
_PATCHES = (replace(_WEIGHT, shape=("dim", "channels", "patch_size", "patch_size")), _BIAS)
_CONVOLUTIONS = (
    *(
        replace(row, count="stem_depth")
        for part in ("convolutions.{}", "norms.{}")
        for row in module(f"patches.{part}", f"embeddings.patch_embeddings.{part}")
    ),
    _WEIGHT,
    _BIAS,
)
_AUTO = {
    "AutoConfig": "Config",
    "AutoModel": "Model",
    "AutoModelForImageClassification": "ForImageClassification",
}
"""transformers' classes that look for others in a folder's code, and how the names of those end."""


class VIT(Format[ViTConfig]):
    """Pre-norm encoder over patches; its pooler is not built: the paper reads the class token itself."""

    model_type = "vit"
    classes: ClassVar[str] = "ViT"
    """transformers' classes are called so, and then Model or ForImageClassification."""
    make: ClassVar[Mapping[str, str]] = {}
    """Fields of ours that every model of this format has so."""
    fields = Fields(
        names={
            "image_size": ("image_size",),
            "patch_size": ("patch_size",),
            "channels": ("num_channels",),
            "dim": ("hidden_size",),
            "depth": ("num_hidden_layers",),
            "heads": ("num_attention_heads",),
            "mlp_dim": ("intermediate_size",),
            "norm_eps": ("layer_norm_eps",),
            "dropout": ("hidden_dropout_prob",),
            "attention_dropout": ("attention_probs_dropout_prob",),
        },
        activation="hidden_act",
        fixed={"qkv_bias": (True,), "problem_type": (None, "single_label_classification")},
    )
    table = Table(
        rows=(
            Row("class_token", ("embeddings.cls_token",), shape=(1, 1, "dim")),
            Row("positions", ("embeddings.position_embeddings",), shape=(1, -1, "dim")),
            *_PATCHES,
            *module("blocks.{}.attention_norm", "encoder.layer.{}.layernorm_before"),
            *module(
                "blocks.{}.attention.qkv",
                "encoder.layer.{}.attention.attention.query",
                "encoder.layer.{}.attention.attention.key",
                "encoder.layer.{}.attention.attention.value",
            ),
            *module("blocks.{}.attention.out", "encoder.layer.{}.attention.output.dense"),
            *module("blocks.{}.mlp_norm", "encoder.layer.{}.layernorm_after"),
            *module("blocks.{}.mlp.up", "encoder.layer.{}.intermediate.dense"),
            *module("blocks.{}.mlp.down", "encoder.layer.{}.output.dense"),
            *module("norm", "layernorm"),
            *module("classifier", "classifier"),
        ),
        prefix="vit.",
        outside=("classifier.",),
        ignored=(r"pooler\.dense\.(weight|bias)",),
        modules=(
            ("layers.{}.attention.q_proj", "encoder.layer.{}.attention.attention.query"),
            ("layers.{}.attention.k_proj", "encoder.layer.{}.attention.attention.key"),
            ("layers.{}.attention.v_proj", "encoder.layer.{}.attention.attention.value"),
            ("layers.{}.attention.o_proj", "encoder.layer.{}.attention.output.dense"),
            ("layers.{}.mlp.fc1", "encoder.layer.{}.intermediate.dense"),
            ("layers.{}.mlp.fc2", "encoder.layer.{}.output.dense"),
        ),
    )

    def config(self, ours: dict[str, Any], theirs: Mapping[str, Any], tensors: Collection[str]) -> ViTConfig:
        """Classes only where the architecture declares a classifier."""
        has_head = f"{self.classes}ForImageClassification" in (theirs.get("architectures") or [])
        labels = labels_of(theirs) if has_head else ()
        return from_dict(ViTConfig, {**ours, "labels": labels, "norm_first": True, **self.make})

    def rest(self, config: ViTConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """The architecture, the classes, and where transformers finds the code, if the folder has any."""
        kind = "Model" if self.bare(config) else "ForImageClassification"
        found = self.auto_map({auto: self.classes + end for auto, end in _AUTO.items()})
        return {"architectures": [self.classes + kind], **label_settings(config.labels), **found}

    def bare(self, config: ViTConfig) -> bool:
        """Without classes there is no head."""
        return not config.labels

    def obstacle(self, config: ViTConfig) -> str | None:
        """It must be pre-norm; rotary positions need patches, and norms of queries and keys need those."""
        if not config.norm_first:
            return "transformers' vit is pre-norm: model.norm_first must be true"
        if config.position == "rotary" and config.stem == "convolutions":
            return "rotary positions are for patches: set model.stem patches or model.position learned"
        if config.qk_norm and config.position != "rotary":
            return "transformers' vit has no model.qk_norm: set model.position rotary"
        return None


class ConvolutionalViT(VIT):
    """The same behind a convolutional stem. transformers has no such model: the folder carries its code."""

    model_type = "vit_convolutional_stem"
    classes = "ViTConvolutionalStem"
    make: ClassVar[Mapping[str, str]] = {"stem": "convolutions"}
    code = "modeling_vit_convolutional_stem.py"
    table = replace(VIT.table, rows=(*_CONVOLUTIONS, *(row for row in VIT.table.rows if row not in _PATCHES)))


class RotaryViT(VIT):
    """The same with rotary positions, and with or without norms of queries and keys.

    transformers has no such model either.
    """

    model_type = "rotary_vit"
    classes = "RotaryViT"
    make: ClassVar[Mapping[str, str]] = {"position": "rotary"}
    code = "modeling_rotary_vit.py"
    fields = replace(VIT.fields, names={**VIT.fields.names, "qk_norm": ("qk_norm",)})
    table = replace(
        VIT.table,
        rows=(
            *(row for row in VIT.table.rows if row.ours != "positions"),
            *module("blocks.{}.attention.query_norm", "encoder.layer.{}.attention.q_norm"),
            *module("blocks.{}.attention.key_norm", "encoder.layer.{}.attention.k_norm"),
        ),
    )
