"""BERT: a bidirectional encoder with heads (Devlin et al. 2018).

Legend: T tokens of the batch, N sequences, D model width, V vocabulary, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qkv.attention import Pattern, Tappable
from qkv.config import Activation, BertConfig, BertHead
from qkv.dropout import Dropout
from qkv.errors import InputError
from qkv.layers import ACTIVATIONS, Output, Stack, TokenEmbedding, check_lengths, init_normal
from qkv.ragged import Ragged

PRESETS: dict[str, BertConfig] = {
    "bert-tiny": BertConfig(dim=128, depth=2, heads=2, mlp_dim=512),
    "bert-mini": BertConfig(dim=256, depth=4, heads=4, mlp_dim=1024),
    "bert-small": BertConfig(dim=512, depth=4, heads=8, mlp_dim=2048),
    "bert-medium": BertConfig(dim=512, depth=8, heads=8, mlp_dim=2048),
    "bert-base": BertConfig(),
    "bert-large": BertConfig(dim=1024, depth=24, heads=16, mlp_dim=4096),
}


SEQUENCE: tuple[BertHead, ...] = ("classification", "multi_label", "regression")
"""Heads that speak of the whole sequence."""
LABELLED: tuple[BertHead, ...] = (*SEQUENCE, "tagging")
"""Heads whose outputs have names."""


@dataclass(frozen=True)
class BertOutput:
    """What the model's heads say; a head that it does not have leaves None."""

    hidden: Ragged
    """(T, D) of the last block."""
    pooled: Tensor | None
    """(N, D): tanh of a linear map of the first token."""
    word_logits: Ragged | None
    """(T, V) of the masked language model."""
    next_logits: Tensor | None
    """(N, 2): the second segment follows the first (0) or is random (1)."""
    class_logits: Tensor | None
    """(N, K) of the whole sequence: of classes, of independent labels, or values."""
    tag_logits: Ragged | None
    """(T, K) of each token."""


class WordHead(nn.Module):
    """The masked language model's head: a transform, then the token embeddings as output matrix."""

    def __init__(self, dim: int, vocab_size: int, activation: Activation, norm_eps: float) -> None:
        super().__init__()
        self.transform = nn.Linear(dim, dim)
        self.activation = ACTIVATIONS[activation]
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.output = Output()
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """hidden (..., D), embeddings (V, D) -> logits (..., V)."""
        hidden = self.norm(self.activation(self.transform(hidden)))
        return self.output(hidden, embeddings, self.bias)  # type: ignore[no-any-return]


class Bert(nn.Module):
    """Token ids and segments in, contextual vectors and the heads' answers out."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.tokens = TokenEmbedding(config.vocab_size, config.dim, config.word_dropout)
        self.segments = nn.Embedding(config.segments, config.dim)
        self.positions = nn.Embedding(config.context, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout)
        self.blocks = Stack(config)
        self.pooler: nn.Linear | None = None
        self.config = config
        init_normal(self)
        self.reset_head(config.head, config.labels)

    def reset_head(self, head: BertHead, labels: tuple[str, ...] = ()) -> None:
        """Give the encoder fresh heads; a pooler that it has is kept.

        Raises InputError for a head of `LABELLED` without labels, and for another with them.
        """
        if (head in LABELLED) != bool(labels):
            raise InputError(f"a {head} head {'has no' if labels else 'needs'} labels")
        config = self.config = replace(self.config, head=head, labels=labels)
        dim, where = config.dim, self.tokens.weight
        if head not in ("pooler", "pretraining", *SEQUENCE):
            self.pooler = None
        elif self.pooler is None:
            self.pooler = nn.Linear(dim, dim)
            init_normal(self.pooler)
        mlm = head in ("pretraining", "masked_lm")
        self.words = WordHead(dim, config.vocab_size, config.activation, config.norm_eps) if mlm else None
        self.next_sentence = nn.Linear(dim, 2) if head == "pretraining" else None
        self.classifier = nn.Linear(dim, len(labels)) if labels else None
        for fresh in (self.words, self.next_sentence, self.classifier):
            if fresh is not None:
                init_normal(fresh)
        self.to(device=where.device, dtype=where.dtype)

    def forward(self, batch: Ragged, segments: Tensor | None = None) -> BertOutput:
        """batch of ids (T,), segments (T,) or None for all 0.

        Raises InputError for a sequence over the context.
        """
        hidden = self.features(batch, segments)
        head = self.config.head
        words, tags = head in ("pretraining", "masked_lm"), head == "tagging"
        return BertOutput(
            hidden=hidden,
            pooled=None if self.pooler is None else self.pool(hidden.first()),
            word_logits=hidden.like(self.word_logits(hidden.values)) if words else None,
            next_logits=self.next_logits(hidden.first()) if head == "pretraining" else None,
            class_logits=self.class_logits(hidden.first()) if head in SEQUENCE else None,
            tag_logits=hidden.like(self.tag_logits(hidden.values)) if tags else None,
        )

    def features(self, batch: Ragged, segments: Tensor | None = None) -> Ragged:
        """batch of ids (T,) -> hidden (T, D), without the heads."""
        check_lengths(batch.layout, self.config.context)
        if segments is None:
            segments = torch.zeros_like(batch.values)
        pattern = Pattern(batch.layout, batch.layout)
        return batch.like(self.run(self.embed(batch.values, segments, batch.layout.positions), pattern))

    def embed(self, ids: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
        """ids, segments and positions (T,) -> the norm of their embeddings' sum (T, D)."""
        x = self.tokens(ids) + self.positions(positions)
        return self.dropout(self.norm(x + self.segments(segments)))  # type: ignore[no-any-return]

    def run(self, x: Tensor, pattern: Pattern) -> Tensor:
        """x (T, D), embedded tokens that attend as the pattern says -> hidden (T, D)."""
        return self.blocks(x, pattern)  # type: ignore[no-any-return]

    def pool(self, first: Tensor) -> Tensor:
        """first tokens' states (N, D) -> (N, D). Raises InputError where the model has no pooler."""
        if self.pooler is None:
            raise InputError("this model has no pooler")
        return self.pooler(first).tanh()  # type: ignore[no-any-return]

    def word_logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> masked language model logits (..., V). Raises InputError without that head."""
        if self.words is None:
            raise InputError("this model has no masked language model head")
        return self.words(hidden, self.tokens.weight)  # type: ignore[no-any-return]

    def next_logits(self, first: Tensor) -> Tensor:
        """first tokens' states (N, D) -> next-sentence logits (N, 2). Raises InputError without that head."""
        if self.next_sentence is None:
            raise InputError("this model has no next-sentence head")
        return self.next_sentence(self.pool(first))  # type: ignore[no-any-return]

    def class_logits(self, first: Tensor) -> Tensor:
        """first tokens' states (N, D) -> (N, K): logits of classes or of independent labels, or values.

        Raises InputError without a head of `SEQUENCE`.
        """
        if self.config.head not in SEQUENCE or self.classifier is None:
            raise InputError("this model has no classification head")
        return self.classifier(self.dropout(self.pool(first)))  # type: ignore[no-any-return]

    def tag_logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> logits (..., K) of each token's class. Raises InputError without that head."""
        if self.config.head != "tagging" or self.classifier is None:
            raise InputError("this model has no tagging head")
        return self.classifier(self.dropout(hidden))  # type: ignore[no-any-return]

    def attentions(self) -> dict[str, list[Tappable]]:
        """The layers' attention, first layer first."""
        return {"encoder": self.blocks.attentions()}
