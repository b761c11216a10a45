"""GPT on disk: `gpt2` for pre-norm, `openai-gpt` for post-norm, `persimmon` for rotary positions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from qkv.config import GPTConfig, from_dict
from qkv.hub.table import Fields, Format, Row, Table, conv1d, module
from qkv.tokenizers import Tokenizer

_LAYER = (
    *conv1d("blocks.{}.attention.qkv", "h.{}.attn.c_attn"),
    *conv1d("blocks.{}.attention.out", "h.{}.attn.c_proj"),
    *module("blocks.{}.attention_norm", "h.{}.ln_1"),
    *conv1d("blocks.{}.mlp.up", "h.{}.mlp.c_fc"),
    *conv1d("blocks.{}.mlp.down", "h.{}.mlp.c_proj"),
    *module("blocks.{}.mlp_norm", "h.{}.ln_2"),
)
_CONSTANTS = (r"h\.\d+\.attn\.(masked_)?bias", "position_ids")
_NAMES = {
    "vocab_size": ("vocab_size",),
    "context": ("n_positions",),
    "dim": ("n_embd",),
    "depth": ("n_layer",),
    "heads": ("n_head",),
    "norm_eps": ("layer_norm_epsilon",),
    "dropout": ("resid_pdrop", "embd_pdrop"),
    "attention_dropout": ("attn_pdrop",),
}


def _token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    return {
        "bos_token_id": tokenizer.bos_id if tokenizer else None,
        "eos_token_id": tokenizer.eos_id if tokenizer else None,
        "pad_token_id": tokenizer.pad_id if tokenizer else None,
    }


class GPT2(Format[GPTConfig]):
    """Pre-norm GPT."""

    model_type = "gpt2"
    fields = Fields(
        names=_NAMES,
        activation="activation_function",
        fixed={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "tie_word_embeddings": (True,),
        },
    )
    table = Table(
        rows=(
            Row("tokens.weight", ("wte.weight",), copies=("lm_head.weight",)),
            Row("positions.weight", ("wpe.weight",)),
            *_LAYER,
            *module("norm", "ln_f"),
        ),
        prefix="transformer.",
        outside=("lm_head.",),
        ignored=_CONSTANTS,
    )

    def config(self, ours: dict[str, Any], theirs: Mapping[str, Any], tensors: Collection[str]) -> GPTConfig:
        """The inner width is four times the outer one where config.json does not say."""
        mlp_dim = theirs.get("n_inner") or 4 * ours["dim"]
        return from_dict(GPTConfig, {**ours, "mlp_dim": mlp_dim, "norm_first": True})

    def rest(self, config: GPTConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """Always with the language model's head."""
        return {"architectures": ["GPT2LMHeadModel"], "n_inner": config.mlp_dim, **_token_ids(tokenizer)}

    def obstacle(self, config: GPTConfig) -> str | None:
        """Queries and keys are as they are."""
        return (
            "transformers' gpt2 has no model.qk_norm: set model.position rotary" if config.qk_norm else None
        )


class GPT1(Format[GPTConfig]):
    """Post-norm GPT."""

    model_type = "openai-gpt"
    fields = Fields(
        names=_NAMES,
        activation="afn",
        # What it calls gelu is the approximation by tanh.
        activations={"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"},
        fixed={"tie_word_embeddings": (True,)},
    )
    table = Table(
        rows=(
            Row("tokens.weight", ("tokens_embed.weight",), copies=("lm_head.weight",)),
            Row("positions.weight", ("positions_embed.weight",)),
            *_LAYER,
        ),
        prefix="transformer.",
        outside=("lm_head.",),
        ignored=_CONSTANTS,
    )

    def config(self, ours: dict[str, Any], theirs: Mapping[str, Any], tensors: Collection[str]) -> GPTConfig:
        """The inner width is always four times the outer one."""
        return from_dict(GPTConfig, {**ours, "mlp_dim": 4 * ours["dim"], "norm_first": False})

    def rest(self, config: GPTConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """Always with the language model's head."""
        return {"architectures": ["OpenAIGPTLMHeadModel"], **_token_ids(tokenizer)}

    def obstacle(self, config: GPTConfig) -> str | None:
        """The inner width must be four times the outer one, gelu the one by tanh, queries and keys plain."""
        if config.qk_norm:
            return "transformers' openai-gpt has no model.qk_norm"
        if config.mlp_dim != 4 * config.dim:
            return f"transformers' openai-gpt needs model.mlp_dim = 4 * model.dim = {4 * config.dim}"
        if config.activation not in self.fields.activations.values():
            return f"transformers' openai-gpt has no {config.activation}; use model.activation gelu_tanh"
        return None


class Persimmon(Format[GPTConfig]):
    """Pre-norm GPT with rotary positions, and with or without norms of queries and keys."""

    model_type = "persimmon"
    fields = Fields(
        names={
            "vocab_size": ("vocab_size",),
            "context": ("max_position_embeddings",),
            "dim": ("hidden_size",),
            "depth": ("num_hidden_layers",),
            "heads": ("num_attention_heads",),
            "mlp_dim": ("intermediate_size",),
            "norm_eps": ("layer_norm_eps",),
            "dropout": ("hidden_dropout",),
            "attention_dropout": ("attention_dropout",),
            "qk_norm": ("qk_layernorm",),
        },
        activation="hidden_act",
        # Without these, an older file means what is not supported.
        defaults={"tie_word_embeddings": False, "rope_parameters": None},
        fixed={
            "tie_word_embeddings": (True,),
            "rope_parameters": (
                {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
            ),
        },
    )
    table = Table(
        rows=(
            Row("tokens.weight", ("embed_tokens.weight",), copies=("lm_head.weight",)),
            *(
                replace(row, interleaved=3)
                for row in module("blocks.{}.attention.qkv", "layers.{}.self_attn.query_key_value")
            ),
            *module("blocks.{}.attention.query_norm", "layers.{}.self_attn.q_layernorm"),
            *module("blocks.{}.attention.key_norm", "layers.{}.self_attn.k_layernorm"),
            *module("blocks.{}.attention.out", "layers.{}.self_attn.dense"),
            *module("blocks.{}.attention_norm", "layers.{}.input_layernorm"),
            *module("blocks.{}.mlp.up", "layers.{}.mlp.dense_h_to_4h"),
            *module("blocks.{}.mlp.down", "layers.{}.mlp.dense_4h_to_h"),
            *module("blocks.{}.mlp_norm", "layers.{}.post_attention_layernorm"),
            *module("norm", "final_layernorm"),
        ),
        prefix="model.",
        outside=("lm_head.",),
    )

    def config(self, ours: dict[str, Any], theirs: Mapping[str, Any], tensors: Collection[str]) -> GPTConfig:
        """Nothing but what the fields say."""
        return from_dict(GPTConfig, {**ours, "position": "rotary", "norm_first": True})

    def rest(self, config: GPTConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """Always with the language model's head."""
        # transformers 4 does not know rope_parameters, and would turn other angles by itself.
        rotary = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}
        return {"architectures": ["PersimmonForCausalLM"], **rotary, **_token_ids(tokenizer)}

    def obstacle(self, config: GPTConfig) -> str | None:
        """Norms must come first."""
        return None if config.norm_first else "transformers' persimmon is pre-norm: set model.norm_first true"
