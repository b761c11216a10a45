"""Tiny random models of transformers in every on-disk format, and their answers beside ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import Tensor

from qkv.hub.code import modeling_extended_vit as extended
from qkv.hub.code import modeling_rotary_marian as rotary
from qkv.models import GPT, Bert, Model, Transformer
from qkv.ragged import Ragged, pack

VOCAB = 37
_GPT = {"vocab_size": VOCAB, "n_positions": 20, "n_embd": 12, "n_layer": 2, "n_head": 3}
_GPT_IDS = {"bos_token_id": 1, "eos_token_id": 1}
_ENCODER = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
_BERT = {**_ENCODER, "vocab_size": VOCAB, "max_position_embeddings": 20}
_PERSIMMON = {
    **_ENCODER,
    "vocab_size": VOCAB,
    "max_position_embeddings": 20,
    "qk_layernorm": False,
    "tie_word_embeddings": True,
    "partial_rotary_factor": 1.0,
}
_VIT = {**_ENCODER, "image_size": 8, "patch_size": 4, "num_channels": 2}
_LABELS = {0: "bad", 1: "fair", 2: "good"}
_MARIAN = {
    "vocab_size": VOCAB,
    "d_model": 12,
    "max_position_embeddings": 20,
    "pad_token_id": 36,
    "decoder_start_token_id": 36,
    "eos_token_id": 0,
    "scale_embedding": True,
    "activation_function": "swish",
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 3 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 20 for side in ("encoder", "decoder")},
}

# So that save_pretrained copies their code into the folder.
extended.ExtendedViTConfig.register_for_auto_class()
extended.ExtendedViTModel.register_for_auto_class()
extended.ExtendedViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")

rotary.RotaryMarianConfig.register_for_auto_class()
rotary.RotaryMarianMTModel.register_for_auto_class("AutoModelForSeq2SeqLM")

MODELS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT, **_GPT_IDS)),
    "gpt2-bare": lambda: transformers.GPT2Model(transformers.GPT2Config(**_GPT, **_GPT_IDS)),
    "gpt2-wide": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT, **_GPT_IDS, n_inner=7)),
    "openai-gpt": lambda: transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**_GPT)),
    "openai-gpt-bare": lambda: transformers.OpenAIGPTModel(transformers.OpenAIGPTConfig(**_GPT)),
    "persimmon": lambda: transformers.PersimmonForCausalLM(transformers.PersimmonConfig(**_PERSIMMON)),
    "persimmon-qk-norm": lambda: transformers.PersimmonForCausalLM(
        transformers.PersimmonConfig(**{**_PERSIMMON, "qk_layernorm": True})
    ),
    "persimmon-bare": lambda: transformers.PersimmonModel(transformers.PersimmonConfig(**_PERSIMMON)),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**_BERT)),
    "bert-without-pooler": lambda: transformers.BertModel(
        transformers.BertConfig(**_BERT), add_pooling_layer=False
    ),
    "bert-pretraining": lambda: transformers.BertForPreTraining(transformers.BertConfig(**_BERT)),
    "bert-masked-lm": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**_BERT)),
    "bert-classification": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**_BERT, id2label=_LABELS)
    ),
    "bert-multi-label": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**_BERT, id2label=_LABELS, problem_type="multi_label_classification")
    ),
    "bert-regression": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**_BERT, num_labels=1, problem_type="regression")
    ),
    "bert-tagging": lambda: transformers.BertForTokenClassification(
        transformers.BertConfig(**_BERT, id2label=_LABELS, hidden_act="gelu_new")
    ),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**_VIT)),
    "vit-without-pooler": lambda: transformers.ViTModel(
        transformers.ViTConfig(**_VIT), add_pooling_layer=False
    ),
    "vit-classification": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**_VIT, id2label=_LABELS)
    ),
    "vit-convolutions": lambda: extended.ExtendedViTModel(
        extended.ExtendedViTConfig(**_VIT, stem="convolutions")
    ),
    "vit-convolutions-classification": lambda: extended.ExtendedViTForImageClassification(
        extended.ExtendedViTConfig(**_VIT, stem="convolutions", id2label=_LABELS, hidden_act="relu")
    ),
    "vit-rotary": lambda: extended.ExtendedViTModel(extended.ExtendedViTConfig(**_VIT, position="rotary")),
    "vit-rotary-classification": lambda: extended.ExtendedViTForImageClassification(
        extended.ExtendedViTConfig(**_VIT, position="rotary", id2label=_LABELS, qk_norm=True)
    ),
    "vit-rotary-convolutions": lambda: extended.ExtendedViTModel(
        extended.ExtendedViTConfig(**_VIT, position="rotary", stem="convolutions")
    ),
    "marian": lambda: transformers.MarianMTModel(transformers.MarianConfig(**_MARIAN)),
    "rotary-marian": lambda: rotary.RotaryMarianMTModel(rotary.RotaryMarianConfig(**_MARIAN)),
    "rotary-marian-qk-norm": lambda: rotary.RotaryMarianMTModel(
        rotary.RotaryMarianConfig(**_MARIAN, qk_norm=True)
    ),
}


def make(name: str) -> transformers.PreTrainedModel:
    """A model whose every tensor is far from its initial value, biases and norms included."""
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # Marian's sinusoids are a parameter that is not trained
                parameter.add_(torch.randn_like(parameter) * 0.3)
        if "marian" in name:
            model.final_logits_bias.normal_()
    return model


IDS = [[3, 5, 7, 11, 2], [9], [4, 4, 30, 1, 6, 8, 35, 2, 17, 22, 13, 3, 5, 8]]
SEGMENTS = [[0, 0, 0, 1, 1], [1], [0] * 6 + [1] * 8]
TARGETS = [[36, 3], [36, 8, 9, 10, 30, 2], [36]]


def pictures() -> Tensor:
    """Two images of the size that the models know."""
    return torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def their_answers(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """What transformers says, each sequence on its own, laid end to end."""
    if isinstance(model.config, transformers.ViTConfig):
        return _named(model(pictures()), {**_HIDDEN, "logits": "logits"})
    answers: list[dict[str, Tensor]] = []
    for ids, segments, target in zip(IDS, SEGMENTS, TARGETS, strict=True):
        inputs = {"input_ids": torch.tensor([ids])}
        if model.config.model_type == "bert":
            inputs["token_type_ids"] = torch.tensor([segments])
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.tensor([target])
        answers.append(_named(model(**inputs), _NAMES[type(model).__name__]))
    return {key: torch.cat([answer[key] for answer in answers]) for key in answers[0]}


_HIDDEN = {"last_hidden_state": "hidden"}
_NAMES: dict[str, dict[str, str]] = {
    "GPT2LMHeadModel": {"logits": "logits"},
    "GPT2Model": _HIDDEN,
    "OpenAIGPTLMHeadModel": {"logits": "logits"},
    "OpenAIGPTModel": _HIDDEN,
    "PersimmonForCausalLM": {"logits": "logits"},
    "PersimmonModel": _HIDDEN,
    "BertModel": {**_HIDDEN, "pooler_output": "pooled"},
    "BertForPreTraining": {
        "prediction_logits": "word_logits",
        "seq_relationship_logits": "next_logits",
    },
    "BertForMaskedLM": {"logits": "word_logits"},
    "BertForSequenceClassification": {"logits": "class_logits"},
    "BertForTokenClassification": {"logits": "tag_logits"},
    "MarianMTModel": {"logits": "logits", "encoder_last_hidden_state": "memory"},
    "RotaryMarianMTModel": {"logits": "logits", "encoder_last_hidden_state": "memory"},
}


def _named(output: object, names: dict[str, str]) -> dict[str, Tensor]:
    """Their answers by our names, sequences laid end to end."""
    found = {ours: getattr(output, theirs, None) for theirs, ours in names.items()}
    return {
        ours: value.flatten(0, 1) if value.dim() == 3 else value
        for ours, value in found.items()
        if value is not None
    }


@torch.no_grad()
def our_answers(model: Model) -> dict[str, Tensor]:
    """What our model says on the same inputs, in one ragged batch."""
    ids = pack(IDS)
    if isinstance(model, GPT):
        output: object = model(ids)
    elif isinstance(model, Bert):
        output = model(ids, pack(SEGMENTS).values)
    elif isinstance(model, Transformer):
        output = model(ids, pack(TARGETS))
    else:
        output = model(pictures())
    said = {key: value for key, value in vars(output).items() if value is not None}
    return {key: value.values if isinstance(value, Ragged) else value for key, value in said.items()}


def compare(ours: Model, theirs: transformers.PreTrainedModel) -> None:
    """Every answer of theirs is one of ours."""
    expected, found = their_answers(theirs), our_answers(ours)
    assert expected
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, atol=1e-5, rtol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Fail if transformers has anything to say."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        logger.removeHandler(handler)
    assert said == []


def reopen(folder: Path) -> transformers.PreTrainedModel:
    """A saved folder as transformers opens it: by the class it declares, with nothing to complain of."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    options: dict[str, object] = {}
    if code := getattr(config, "auto_map", None):
        found = [auto for auto, name in code.items() if name.endswith(f".{config.architectures[0]}")]
        cls = getattr(transformers, found[0])
        options["trust_remote_code"] = True
    else:
        cls = getattr(transformers, config.architectures[0])
    if config.architectures[0] in ("BertModel", "ViTModel"):
        # No setting of config.json says whether a bare model has a pooler.
        options["add_pooling_layer"] = (folder / "model.safetensors").read_bytes().find(b'"pooler.') != -1
    with quiet():
        model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert {key: list(value) for key, value in info.items() if value} == {}
    return model.eval()
