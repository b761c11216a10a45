"""ViT on disk: `vit` or `extended_vit`; bare or with a classifier."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from qkv.config import ViTConfig, from_dict
from qkv.hub.table import Fields, Format, Row, Table, label_settings, labels_of, module
from qkv.tokenizers import Tokenizer

_WEIGHT, _BIAS = module("patches.projection", "embeddings.patch_embeddings.projection")
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
            replace(_WEIGHT, shape=("dim", "channels", "patch_size", "patch_size")),
            _BIAS,
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
        return from_dict(ViTConfig, {**ours, "labels": labels, "norm_first": True})

    def rest(self, config: ViTConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """The architecture, the classes, and where transformers finds the code, if the folder has any."""
        kind = "Model" if self.bare(config) else "ForImageClassification"
        found = self.auto_map({auto: self.classes + end for auto, end in _AUTO.items()})
        return {"architectures": [self.classes + kind], **label_settings(config.labels), **found}

    def bare(self, config: ViTConfig) -> bool:
        """Without classes there is no head."""
        return not config.labels

    def obstacle(self, config: ViTConfig) -> str | None:
        """It must be pre-norm, and norms of queries and keys need rotary positions."""
        if not config.norm_first:
            return "transformers' vit is pre-norm: model.norm_first must be true"
        if config.qk_norm and config.position != "rotary":
            return "transformers' vit has no model.qk_norm: set model.position rotary"
        return None


class ExtendedViT(VIT):
    """The same with rotary positions, norms of queries and keys, or a convolutional stem.

    transformers has no such model: the folder carries its code.
    """

    model_type = "extended_vit"
    classes = "ExtendedViT"
    code = "modeling_extended_vit.py"
    fields = replace(
        VIT.fields, names={**VIT.fields.names, **{name: (name,) for name in ("stem", "position", "qk_norm")}}
    )
    table = replace(
        VIT.table,
        rows=(
            *VIT.table.rows,
            *module("blocks.{}.attention.query_norm", "encoder.layer.{}.attention.q_norm"),
            *module("blocks.{}.attention.key_norm", "encoder.layer.{}.attention.k_norm"),
            *(
                replace(row, count="stem_depth")
                for part in ("convolutions.{}", "norms.{}")
                for row in module(f"patches.{part}", f"embeddings.patch_embeddings.{part}")
            ),
            *module("patches.last", "embeddings.patch_embeddings.last"),
        ),
    )
