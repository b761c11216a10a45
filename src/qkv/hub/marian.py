"""The encoder-decoder Transformer on disk: `marian`, the format of the opus-mt models, or `rotary_marian`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from qkv.config import TransformerConfig, from_dict
from qkv.errors import InputError
from qkv.hub.table import Fields, Format, Row, Table, module
from qkv.tokenizers import Tokenizer

_NORM_EPS = 1e-5
"""config.json does not say it."""


def _attention(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        *module(f"{ours}.qkv", f"{theirs}.q_proj", f"{theirs}.k_proj", f"{theirs}.v_proj"),
        *module(f"{ours}.out", f"{theirs}.out_proj"),
    )


def _layer(ours: str, theirs: str) -> tuple[Row, ...]:
    """What a layer of the encoder and one of the decoder have in common."""
    return (
        *_attention(f"{ours}.attention", f"{theirs}.self_attn"),
        *module(f"{ours}.attention_norm", f"{theirs}.self_attn_layer_norm"),
        *module(f"{ours}.mlp.up", f"{theirs}.fc1"),
        *module(f"{ours}.mlp.down", f"{theirs}.fc2"),
        *module(f"{ours}.mlp_norm", f"{theirs}.final_layer_norm"),
    )


class Marian(Format[TransformerConfig]):
    """Post-norm encoder and decoder of equal make, with one matrix for all embeddings and the output."""

    model_type = "marian"
    fields = Fields(
        names={
            "vocab_size": ("vocab_size",),
            "context": ("max_position_embeddings",),
            "dim": ("d_model",),
            "depth": ("encoder_layers", "decoder_layers"),
            "heads": ("encoder_attention_heads", "decoder_attention_heads"),
            "mlp_dim": ("encoder_ffn_dim", "decoder_ffn_dim"),
            "dropout": ("dropout",),
            "attention_dropout": ("attention_dropout",),
            "pad_id": ("pad_token_id", "decoder_start_token_id"),
            "eos_id": ("eos_token_id",),
        },
        activation="activation_function",
        defaults={"scale_embedding": False},
        fixed={
            "scale_embedding": (True,),
            "share_encoder_decoder_embeddings": (True,),
            "tie_word_embeddings": (True,),
            "static_position_embeddings": (True,),
            "normalize_before": (False,),
            "normalize_embedding": (False,),
            "add_final_layer_norm": (False,),
        },
    )
    table = Table(
        rows=(
            Row(
                "tokens.weight",
                ("shared.weight",),
                copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
            ),
            *_layer("encoder.{}", "encoder.layers.{}"),
            *_layer("decoder.{}", "decoder.layers.{}"),
            *_attention("decoder.{}.cross", "decoder.layers.{}.encoder_attn"),
            *module("decoder.{}.cross_norm", "decoder.layers.{}.encoder_attn_layer_norm"),
            Row("logits_bias", ("final_logits_bias",), shape=(1, "vocab_size")),
        ),
        prefix="model.",
        outside=("final_logits_bias", "lm_head."),
        ignored=(r"(encoder|decoder)\.embed_positions\.weight",),  # the sinusoids
    )

    def config(
        self, ours: dict[str, Any], theirs: Mapping[str, Any], tensors: Collection[str]
    ) -> TransformerConfig:
        """The vocabulary must be one for both languages."""
        if theirs.get("decoder_vocab_size", ours["vocab_size"]) != ours["vocab_size"]:
            raise InputError("vocab_size and decoder_vocab_size differ; only one vocabulary is supported")
        return from_dict(TransformerConfig, {**ours, "norm_eps": _NORM_EPS, "norm_first": False})

    def rest(self, config: TransformerConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """What has no field of ours."""
        return {
            "architectures": ["MarianMTModel"],
            "is_encoder_decoder": True,
            "decoder_vocab_size": config.vocab_size,
            "forced_eos_token_id": config.eos_id,
            "activation_dropout": 0.0,
        }

    def obstacle(self, config: TransformerConfig) -> str | None:
        """It must be post-norm with the usual epsilon, queries and keys as they are."""
        if config.qk_norm and config.position != "rotary":
            return "transformers' marian has no model.qk_norm: set model.position rotary"
        if config.norm_first:
            return "transformers' marian is post-norm: model.norm_first must be false"
        if config.norm_eps != _NORM_EPS:
            return f"transformers' marian needs model.norm_eps {_NORM_EPS}"
        return None

    def generation(self, config: TransformerConfig) -> dict[str, Any]:
        """The padding token starts a target and is never produced."""
        return {
            "decoder_start_token_id": config.pad_id,
            "pad_token_id": config.pad_id,
            "eos_token_id": config.eos_id,
            "forced_eos_token_id": config.eos_id,
            "bad_words_ids": [[config.pad_id]],
            "max_length": config.context,
        }


class RotaryMarian(Marian):
    """The same with rotary positions, and with or without norms of queries and keys in self-attention.

    transformers has no such model: the folder carries its code.
    """

    model_type = "rotary_marian"
    code = "modeling_rotary_marian.py"
    fields = replace(
        Marian.fields,
        names={**Marian.fields.names, "qk_norm": ("qk_norm",)},
        fixed={k: v for k, v in Marian.fields.fixed.items() if k != "static_position_embeddings"},
    )
    table = replace(
        Marian.table,
        rows=(
            *Marian.table.rows,
            *module("encoder.{}.attention.query_norm", "encoder.layers.{}.self_attn.q_norm"),
            *module("encoder.{}.attention.key_norm", "encoder.layers.{}.self_attn.k_norm"),
            *module("decoder.{}.attention.query_norm", "decoder.layers.{}.self_attn.q_norm"),
            *module("decoder.{}.attention.key_norm", "decoder.layers.{}.self_attn.k_norm"),
        ),
        ignored=(),
    )

    def config(
        self, ours: dict[str, Any], theirs: Mapping[str, Any], tensors: Collection[str]
    ) -> TransformerConfig:
        """Positions are rotary."""
        return super().config({**ours, "position": "rotary"}, theirs, tensors)

    def rest(self, config: TransformerConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """Also where transformers finds the code."""
        model = "RotaryMarianMTModel"
        found = self.auto_map({"AutoConfig": "RotaryMarianConfig", "AutoModelForSeq2SeqLM": model})
        return {**super().rest(config, tokenizer), "architectures": [model], **found}
