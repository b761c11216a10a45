"""Tiny models whose weights are far from their initial values, so that every part of them is felt.

A sample is what one sequence of a batch is made of: ids, (ids, segments), (source, target) or an image.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qkv.config import AnyModelConfig, BertConfig, GPTConfig, TransformerConfig, ViTConfig
from qkv.models import GPT, Bert, Model, Transformer, ViT, build
from qkv.ragged import pack

VOCAB = 13
CONTEXT = 80

_SIZES = {"dim": 12, "depth": 2, "heads": 2, "mlp_dim": 16, "dropout": 0.0, "attention_dropout": 0.0}
_TEXT = {**_SIZES, "vocab_size": VOCAB, "context": CONTEXT}
_GPT = GPTConfig(**_TEXT)
_BERT = BertConfig(**_TEXT, norm_eps=1e-5)
_VIT = ViTConfig(**_SIZES, norm_eps=1e-5, image_size=8, patch_size=4, channels=2, labels=("a", "b", "c"))

CONFIGS: dict[str, AnyModelConfig] = {
    "gpt-post-norm": replace(_GPT, norm_first=False),
    "gpt-pre-norm": _GPT,
    "gpt-rotary": replace(_GPT, position="rotary", activation="relu2"),
    "gpt-qk-norm": replace(_GPT, position="rotary", qk_norm=True),
    "transformer-post-norm": TransformerConfig(**_TEXT),
    "transformer-rotary": TransformerConfig(**_TEXT, position="rotary", qk_norm=True),
    "transformer-pre-norm": TransformerConfig(**_TEXT, norm_first=True, activation="silu"),
    "bert-masked-lm": replace(_BERT, head="masked_lm"),
    "bert-tagging": replace(_BERT, head="tagging", labels=("a", "b", "c"), norm_first=True),
    "bert-pretraining": replace(_BERT, head="pretraining"),
    "bert-classification": replace(_BERT, head="classification", labels=("a", "b", "c")),
    "bert-multi-label": replace(_BERT, head="multi_label", labels=("a", "b", "c")),
    "bert-regression": replace(_BERT, head="regression", labels=("a",)),
    "vit-pre-norm": _VIT,
    "vit-post-norm": replace(_VIT, norm_first=False),
    "vit-convolutions": replace(_VIT, stem="convolutions"),
    "vit-rotary": replace(_VIT, position="rotary", qk_norm=True, heads=3),
    "vit-rotary-convolutions": replace(_VIT, position="rotary", stem="convolutions", heads=3),
}
CAUSAL = [name for name in CONFIGS if name.startswith("gpt")]
DECODERS = [name for name in CONFIGS if name.startswith(("gpt", "transformer"))]
REQUESTS: list[dict[str, float]] = [
    {"num_beams": 5, "num_return_sequences": 2, "max_new_tokens": 25},
    {"temperature": 0.0, "speculate": 4, "max_new_tokens": 30},
    {"max_new_tokens": 3},
    {"num_return_sequences": 2, "max_new_tokens": 12, "seed": 2},
    {"num_beams": 2, "max_new_tokens": 9},
]
"""Beams, samples and guesses, as `Decoding` is told of them."""
EMPTY_ALLOWED = [*DECODERS, "bert-masked-lm", "bert-tagging"]
"""Models without a pooler: the others read the first token of each sequence, so there must be one."""


def tiny(config: AnyModelConfig | str, dtype: torch.dtype = torch.float64) -> Model:
    """A model in evaluation mode with weights, biases and norms all drawn anew, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = build(CONFIGS[config] if isinstance(config, str) else config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(std=0.4)
                if name.endswith("norm.weight") or ".norms." in name:
                    parameter.add_(1.0)
            if isinstance(model, Transformer):
                model.logits_bias.normal_()
    return model.to(dtype).eval()


def ids(length: int, seed: int) -> Tensor:
    """Random token ids (length,)."""
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def samples(model: Model, lengths: list[tuple[int, int]], seed: int = 0) -> list:
    """One random sample a pair of lengths; only encoder-decoder models use the second one."""
    made: list = []
    for i, (first, second) in enumerate(lengths):
        number = 1000 * seed + 2 * i
        if isinstance(model, GPT):
            made.append(ids(first, number))
        elif isinstance(model, Bert):
            made.append((ids(first, number), ids(first, number + 1) % 2))
        elif isinstance(model, Transformer):
            made.append((ids(second, number), ids(first, number + 1)))
        else:
            generator = torch.Generator().manual_seed(number)
            dtype = model.class_token.dtype
            size = (model.config.channels, model.config.image_size, model.config.image_size)
            made.append(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype))
    return made


def flat(said: list[list[Tensor]]) -> list[Tensor]:
    """All tensors of all samples' answers."""
    return [values for answer in said for values in answer]


def answers(model: Model, batch: list) -> list[list[Tensor]]:
    """All that the model says of each sample of a batch."""
    if isinstance(model, GPT):
        out = model(pack(batch))
        parts = [out.hidden.split(), out.logits.split()]
    elif isinstance(model, Bert):
        out = model(pack(s[0] for s in batch), torch.cat([s[1] for s in batch]))
        ragged = (out.hidden, out.word_logits, out.tag_logits)
        dense = (out.pooled, out.next_logits, out.class_logits)
        parts = [r.split() for r in ragged if r is not None] + [list(d) for d in dense if d is not None]
    elif isinstance(model, Transformer):
        out = model(pack(s[0] for s in batch), pack(s[1] for s in batch))
        parts = [out.memory.split(), out.hidden.split(), out.logits.split()]
    else:
        assert isinstance(model, ViT)
        out = model(torch.stack(batch))
        parts = [out.hidden.split(), list(out.logits)]
    return [list(of_sample) for of_sample in zip(*parts, strict=True)]
