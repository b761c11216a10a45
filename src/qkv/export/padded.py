"""The models as programs of ONNX files know them: padded rows in and out, and a mask that says what is text.

Such programs call inputs, outputs and files as Hugging Face's optimum does. What stands where the mask is 0
changes no answer about the text.

Legend: N sequences, L tokens of each row, padding among them, P tokens of the past, K = P + L, S tokens of
each row of sources, D model width, H heads, E head width, V vocabulary, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.attention import KeyValue, Masked
from qkv.config import ModelConfig
from qkv.hub import Checkpoint
from qkv.models import GPT, Bert, Transformer, ViT

Shape = tuple[str | int, ...]
"""Sizes of a tensor; those with a name differ from call to call."""

BATCH, LENGTH, PAST = "batch_size", "sequence_length", "past_sequence_length"
ALL, SOURCE = f"{PAST} + {LENGTH}", "encoder_sequence_length"
PAST_KEY_VALUES = "past_key_values"


class Padded(nn.Module):
    """A graph: tensors by name in, tensors by name out. `forward` takes and gives them in that order."""

    inputs: dict[str, Shape]
    """Ids and masks, named so, are int64, all else is float32. Past keys and values come last."""
    outputs: tuple[str, ...]


class PaddedBert(Padded):
    """BERT and what its head says; of a sentence encoder, one vector a text beside the hidden states."""

    def __init__(self, model: Bert, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.model = model
        self.pooling = checkpoint.pooling
        self.inputs = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (BATCH, LENGTH))
        if self.pooling is not None:
            self.outputs = ("last_hidden_state", "sentence_embedding")
        else:
            self.outputs = {
                "none": ("last_hidden_state",),
                "pooler": ("last_hidden_state", "pooler_output"),
                "pretraining": ("prediction_logits", "seq_relationship_logits"),
            }.get(model.config.head, ("logits",))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, ...]:
        """(N, L) each -> (N, L, .) of tokens, (N, .) of sequences, as `outputs` names them."""
        N, L = input_ids.shape
        positions = torch.arange(L).expand(N, L)
        x = self.model.embed(input_ids.flatten(), token_type_ids.flatten(), positions.flatten())
        hidden = self.model.run(x, _attended(attention_mask))
        return self._answers(hidden.view(N, L, -1), attention_mask)

    def _answers(self, hidden: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """What the head says of hidden (N, L, D), with the mask (N, L)."""
        model, first = self.model, hidden[:, 0]
        if self.pooling is not None:
            vector = first if self.pooling.mode == "cls" else _mean(hidden, attention_mask)
            return hidden, F.normalize(vector) if self.pooling.normalize else vector
        match model.config.head:
            case "none":
                return (hidden,)
            case "pooler":
                return hidden, model.pool(first)
            case "pretraining":
                return model.word_logits(hidden), model.next_logits(first)
            case "masked_lm":
                return (model.word_logits(hidden),)
            case "tagging":
                return (model.tag_logits(hidden),)
            case _:
                return (model.class_logits(first),)


def image_side(checkpoint: Checkpoint, model: ViT) -> int:
    """Pixels of a side of the images that a checkpoint's preprocessor makes."""
    return model.config.image_size if checkpoint.images is None else checkpoint.images.size


class PaddedViT(Padded):
    """ViT on images of the size that its preprocessor makes."""

    def __init__(self, model: ViT, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.model = model
        side = image_side(checkpoint, model)
        self.inputs = {"pixel_values": (BATCH, model.config.channels, side, side)}
        self.outputs = ("last_hidden_state",) if model.classifier is None else ("logits",)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        """(N, C, side, side) -> (N, classes), or (N, tokens, D) without a classifier."""
        x = self.model.embed(pixel_values)  # (N, L, D)
        everything = torch.ones(x.shape[0], 1, 1, x.shape[1], dtype=torch.bool)
        turned = self.model.rotation(pixel_values)
        hidden = self.model.run(x.flatten(0, 1), Masked.by(everything), turned).view_as(x)
        return (hidden if self.model.classifier is None else self.model.head(hidden[:, 0]),)


class PaddedGPT(Padded):
    """GPT on new tokens behind those of which the past holds keys and values, which may be none."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model
        past = _key_values(PAST_KEY_VALUES, model.config, ("",), PAST)
        self.inputs = {
            "input_ids": (BATCH, LENGTH),
            "attention_mask": (BATCH, ALL),
            "position_ids": (BATCH, LENGTH),
            **past,
        }
        self.outputs = ("logits", *_key_values("present", model.config, ("",), ALL))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """(N, L), (N, K), (N, L), each layer's keys and values (N, H, P, E) -> (N, L, V), (N, H, K, E)."""
        N, L = input_ids.shape
        layers = [_Kept(N, pair) for pair in zip(past[::2], past[1::2], strict=True)]
        text = (attention_mask != 0)[:, None, None]  # (N, 1, 1, K)
        # A token of the padding, which may come before all text, attends at least itself.
        new = torch.arange(L)[:, None] + past[0].shape[2]  # (L, 1)
        slots = torch.arange(attention_mask.shape[1])  # (K,)
        pattern = Masked.by((slots < new) & text | (slots == new))
        positions = position_ids.flatten()
        x = self.model.embed(input_ids.flatten(), positions)
        hidden = self.model.run(x, positions, pattern, layers)
        return self.model.head(hidden).view(N, L, -1), *_presents(layers)


class PaddedEncoder(Padded):
    """The Transformer's encoder."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model
        self.inputs = dict.fromkeys(("input_ids", "attention_mask"), (BATCH, SOURCE))
        self.outputs = ("last_hidden_state",)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        """(N, S) each -> (N, S, D)."""
        N, S = input_ids.shape
        positions = torch.arange(S).expand(N, S).flatten()
        x = self.model.embed(input_ids.flatten(), positions)
        return (self.model.run_encoder(x, positions, _attended(attention_mask)).view(N, S, -1),)


class PaddedDecoder(Padded):
    """The Transformer's decoder on the first tokens of the targets."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model
        self.inputs = {
            "encoder_attention_mask": (BATCH, SOURCE),
            "input_ids": (BATCH, LENGTH),
            "encoder_hidden_states": (BATCH, SOURCE, model.config.dim),
        }
        presents = _key_values("present", model.config, (".decoder", ".encoder"), LENGTH)
        self.outputs = ("logits", *presents)

    def forward(
        self, encoder_attention_mask: Tensor, input_ids: Tensor, encoder_hidden_states: Tensor
    ) -> tuple[Tensor, ...]:
        """(N, S), (N, L), (N, S, D) -> (N, L, V); each layer's keys and values, those of the sources too."""
        N, D = input_ids.shape[0], encoder_hidden_states.shape[2]
        states = encoder_hidden_states.reshape(-1, D)  # (N * S, D)
        memory: list[KeyValue] = [block.cross.read(states) for block in self.model.decoder]  # type: ignore[operator, union-attr]
        layers = [_Kept(N) for _ in memory]
        logits = _decoded(self.model, input_ids, memory, encoder_attention_mask, layers)
        kept = zip(layers, memory, strict=True)
        return logits, *(x for own, source in kept for x in (*own.past, *(_rows(y, N) for y in source)))


class PaddedDecoderWithPast(Padded):
    """The Transformer's decoder on further tokens of the targets."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model
        self.inputs = {
            "encoder_attention_mask": (BATCH, SOURCE),
            "input_ids": (BATCH, LENGTH),
            **_key_values(PAST_KEY_VALUES, model.config, (".decoder", ".encoder"), PAST),
        }
        self.outputs = ("logits", *_key_values("present", model.config, (".decoder",), ALL))

    def forward(self, encoder_attention_mask: Tensor, input_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """(N, S), (N, L), and of each layer as the first pass gave -> (N, L, V), (N, H, K, E)."""
        N = input_ids.shape[0]
        layers = [_Kept(N, pair) for pair in zip(past[::4], past[1::4], strict=True)]
        memory = [(_tokens(k), _tokens(v)) for k, v in zip(past[2::4], past[3::4], strict=True)]
        logits = _decoded(self.model, input_ids, memory, encoder_attention_mask, layers)
        return logits, *_presents(layers)


# ---------------------------------------------------------------- shared


def _key_values(prefix: str, config: ModelConfig, stacks: Sequence[str], length: str) -> dict[str, Shape]:
    """Names and shapes of each layer's keys and values, by stack: the decoder's own, and those of sources."""
    return {
        f"{prefix}.{i}{stack}.{kind}": (
            BATCH,
            config.heads,
            SOURCE if stack == ".encoder" else length,
            config.dim // config.heads,
        )
        for i in range(config.depth)
        for stack in stacks
        for kind in ("key", "value")
    }


def _attended(mask: Tensor) -> Masked:
    """All attend what the mask (N, L) says; a row without text attends all, for a softmax needs something."""
    text = mask != 0
    return Masked.by((text | ~text.any(-1, keepdim=True))[:, None, None])


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """hidden (N, L, D), mask (N, L) -> (N, D): the mean over the text of each row."""
    weights = (mask != 0).to(hidden.dtype)[..., None]  # (N, L, 1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def _decoded(
    model: Transformer,
    input_ids: Tensor,
    memory: Sequence[KeyValue],
    encoder_attention_mask: Tensor,
    layers: Sequence[_Kept],
) -> Tensor:
    """ids (N, L) behind the past of the layers, and keys and values of the sources -> logits (N, L, V)."""
    N, L = input_ids.shape
    P = layers[0].length
    new = P + torch.arange(L)  # (L,)
    causal = torch.arange(P + L) <= new[:, None]  # (L, K)
    positions = new.expand(N, L).flatten()
    hidden = model.run_decoder(
        model.embed(input_ids.flatten(), positions),
        positions,
        Masked.by(causal.expand(N, 1, L, P + L)),
        memory,
        _attended(encoder_attention_mask),
        layers,
    )
    return model.head(hidden).view(N, L, -1)


class _Kept:
    """Keys and values of one layer, (N, H, P, E) each, behind which those of new tokens are put."""

    def __init__(self, rows: int, past: Sequence[Tensor] = ()) -> None:
        self.rows = rows
        self.past = past
        self.length: int = past[0].shape[2] if past else 0

    def append(self, key: Tensor, value: Tensor) -> KeyValue:
        """Those of the new tokens, (N * L, H, E) each -> of all, (N * K, H, E) each."""
        new = (_rows(key, self.rows), _rows(value, self.rows))
        pairs = zip(self.past, new, strict=True) if self.past else ()
        self.past = [torch.cat(pair, dim=2) for pair in pairs] or new
        return _tokens(self.past[0]), _tokens(self.past[1])


def _presents(layers: Iterable[_Kept]) -> list[Tensor]:
    """Each layer's keys and values (N, H, K, E)."""
    return [x for layer in layers for x in layer.past]


def _rows(tokens: Tensor, rows: int) -> Tensor:
    """(N * L, H, E) -> (N, H, L, E)."""
    return tokens.view(rows, -1, *tokens.shape[1:]).transpose(1, 2)


def _tokens(rows: Tensor) -> Tensor:
    """(N, H, L, E) -> (N * L, H, E)."""
    return rows.transpose(1, 2).flatten(0, 1)
