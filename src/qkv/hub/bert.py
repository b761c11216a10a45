"""BERT on disk: `bert`, bare or with any of our heads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from qkv.config import BertConfig, BertHead, from_dict
from qkv.errors import InputError
from qkv.hub.table import Fields, Format, Row, Table, label_settings, labels_of, module
from qkv.models.bert import LABELLED
from qkv.tokenizers import Tokenizer

ARCHITECTURES: dict[BertHead, str] = {
    "none": "BertModel",
    "pooler": "BertModel",
    "pretraining": "BertForPreTraining",
    "masked_lm": "BertForMaskedLM",
    "classification": "BertForSequenceClassification",
    "multi_label": "BertForSequenceClassification",
    "regression": "BertForSequenceClassification",
    "tagging": "BertForTokenClassification",
}
PROBLEMS: dict[BertHead, str] = {
    "classification": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
"""The setting `problem_type` of a BertForSequenceClassification."""


class BERT(Format[BertConfig]):
    """Post-norm encoder with any of our heads."""

    model_type = "bert"
    fields = Fields(
        names={
            "vocab_size": ("vocab_size",),
            "context": ("max_position_embeddings",),
            "segments": ("type_vocab_size",),
            "dim": ("hidden_size",),
            "depth": ("num_hidden_layers",),
            "heads": ("num_attention_heads",),
            "mlp_dim": ("intermediate_size",),
            "norm_eps": ("layer_norm_eps",),
            "dropout": ("hidden_dropout_prob",),
            "attention_dropout": ("attention_probs_dropout_prob",),
        },
        activation="hidden_act",
        defaults={"layer_norm_eps": 1e-12},
        fixed={
            "position_embedding_type": ("absolute",),
            "is_decoder": (False,),
            "add_cross_attention": (False,),
            "tie_word_embeddings": (True,),
        },
    )
    table = Table(
        rows=(
            Row(
                "tokens.weight",
                ("embeddings.word_embeddings.weight",),
                copies=("cls.predictions.decoder.weight",),
            ),
            Row("segments.weight", ("embeddings.token_type_embeddings.weight",)),
            Row("positions.weight", ("embeddings.position_embeddings.weight",)),
            *module("norm", "embeddings.LayerNorm"),
            *module(
                "blocks.{}.attention.qkv",
                "encoder.layer.{}.attention.self.query",
                "encoder.layer.{}.attention.self.key",
                "encoder.layer.{}.attention.self.value",
            ),
            *module("blocks.{}.attention.out", "encoder.layer.{}.attention.output.dense"),
            *module("blocks.{}.attention_norm", "encoder.layer.{}.attention.output.LayerNorm"),
            *module("blocks.{}.mlp.up", "encoder.layer.{}.intermediate.dense"),
            *module("blocks.{}.mlp.down", "encoder.layer.{}.output.dense"),
            *module("blocks.{}.mlp_norm", "encoder.layer.{}.output.LayerNorm"),
            *module("pooler", "pooler.dense"),
            *module("words.transform", "cls.predictions.transform.dense"),
            *module("words.norm", "cls.predictions.transform.LayerNorm"),
            Row("words.bias", ("cls.predictions.bias",), copies=("cls.predictions.decoder.bias",)),
            *module("next_sentence", "cls.seq_relationship"),
            *module("classifier", "classifier"),
        ),
        prefix="bert.",
        outside=("cls.", "classifier."),
        ignored=(r"embeddings\.position_ids",),
        old=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
    )

    def config(self, ours: dict[str, Any], theirs: Mapping[str, Any], tensors: Collection[str]) -> BertConfig:
        """The head is the one that the architecture declares; a bare model may lack the pooler."""
        declared = (theirs.get("architectures") or ["BertModel"])[0]
        heads = [head for head, name in ARCHITECTURES.items() if name == declared]
        if not heads:
            supported = ", ".join(dict.fromkeys(ARCHITECTURES.values()))
            raise InputError(f"architecture {declared} is not supported; these are: {supported}")
        head = "pooler" if declared == "BertModel" and "pooler.dense.weight" in tensors else heads[0]
        labels = labels_of(theirs) if head in LABELLED else ()
        if head == "classification":
            head = _problem(theirs.get("problem_type"), len(labels))
        return from_dict(BertConfig, {**ours, "head": head, "labels": labels})

    def rest(self, config: BertConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """The architecture of the head, what it is for, and its labels."""
        return {
            "architectures": [ARCHITECTURES[config.head]],
            "pad_token_id": tokenizer.pad_id if tokenizer else None,
            "problem_type": PROBLEMS.get(config.head),
            **label_settings(config.labels),
        }

    def bare(self, config: BertConfig) -> bool:
        """A pooler is part of the bare model."""
        return config.head in ("none", "pooler")

    def obstacle(self, config: BertConfig) -> str | None:
        """It must be post-norm, and have classes to choose from."""
        if config.head == "classification" and len(config.labels) == 1:
            return "transformers' classifiers have at least two labels"
        return (
            "transformers' bert is post-norm: model.norm_first must be false" if config.norm_first else None
        )


def _problem(problem_type: str | None, outputs: int) -> BertHead:
    """The head that a problem_type means; without one, as transformers has it, one output is a value."""
    if problem_type is None:
        return "regression" if outputs == 1 else "classification"
    heads = {problem: head for head, problem in PROBLEMS.items()}
    if problem_type not in heads:
        raise InputError(f"problem_type is {problem_type!r}; supported are {', '.join(heads)}")
    return heads[problem_type]
