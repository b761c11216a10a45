"""A checkpoint's own answers on ragged sizes beside those of its padded graphs, whoever runs these.

Legend: N sequences, L tokens of each row, padding among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from qkv.errors import InputError
from qkv.export.onnx import DECODER, DECODER_WITH_PAST, ENCODER, MODEL
from qkv.export.padded import image_side
from qkv.hub import Checkpoint
from qkv.models import GPT, Bert, Transformer, ViT
from qkv.ragged import Ragged, pack

Run = Callable[[str, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Runs the graph in a file: tensors by name in, tensors by name out."""
Pairs = Iterator[tuple[Tensor, Tensor]]
"""What is expected and what is found."""

_LENGTHS = ((1,), (2, 24, 1, 13))
"""Tokens of the sequences of each batch, cut to the model's context."""
_TOLERANCE = 1e-3
"""Largest difference as a share of the largest answer: sums in another order, through dozens of layers."""


@torch.no_grad()
def check(checkpoint: Checkpoint, run: Run) -> float:
    """The largest absolute difference between the model's answers and those of its graphs.

    Raises InputError where they are not the same.
    """
    largest = 0.0
    for lengths in _LENGTHS:
        for expected, found in compare(checkpoint, run, lengths):
            difference = (found - expected).abs().max().item()
            scale = expected.abs().max().item()
            if not difference <= _TOLERANCE * max(scale, 1.0):  # neither is NaN
                raise InputError(
                    f"ONNX Runtime's answers differ from the model's by {difference:.2g}, where the largest "
                    f"is {scale:.2g}: nothing was written"
                )
            largest = max(largest, difference)
    return largest


def compare(checkpoint: Checkpoint, run: Run, lengths: Sequence[int]) -> Pairs:
    """The model's answers and the graphs' for random inputs of these lengths, sequence by sequence.

    Padding holds random ids too: it must not matter. Only encoder-decoder models have inputs of two
    lengths; images have none, so there are just as many.
    """
    model, random = checkpoint.model, torch.Generator().manual_seed(0)
    if isinstance(model, ViT):
        return _vit(checkpoint, model, run, len(lengths), random)
    lengths = [min(length, model.config.context) for length in lengths]
    if isinstance(model, GPT):
        return _gpt(model, run, lengths, random)
    if isinstance(model, Transformer):
        return _transformer(model, run, lengths, random)
    assert isinstance(model, Bert)
    return _bert(checkpoint, model, run, lengths, random)


def _bert(
    checkpoint: Checkpoint, model: Bert, run: Run, lengths: list[int], random: torch.Generator
) -> Pairs:
    config = model.config
    ids, segments = (_random(high, lengths, random) for high in (config.vocab_size, config.segments))
    given, mask = _pad(ids, config.vocab_size, random, config.context)
    types, _ = _pad(segments, config.segments, random, config.context)
    found = run(MODEL, {"input_ids": given, "attention_mask": mask, "token_type_ids": types})
    out = model(pack(ids), pack(segments).values)
    tokens = {
        "last_hidden_state": out.hidden,
        "prediction_logits": out.word_logits,
        "logits": out.word_logits if out.tag_logits is None else out.tag_logits,
    }
    sequences = {
        "pooler_output": out.pooled,
        "seq_relationship_logits": out.next_logits,
        "logits": out.class_logits,
        "sentence_embedding": None if checkpoint.pooling is None else checkpoint.pooling.vectors(out.hidden),
    }
    for name, values in found.items():
        expected = tokens.get(name) if values.dim() == 3 else sequences.get(name)
        assert expected is not None
        yield from (
            _text(expected, values) if isinstance(expected, Ragged) else zip(expected, values, strict=True)
        )


def _vit(checkpoint: Checkpoint, model: ViT, run: Run, count: int, random: torch.Generator) -> Pairs:
    side = image_side(checkpoint, model)
    images = torch.randn(count, model.config.channels, side, side, generator=random)
    found = run(MODEL, {"pixel_values": images})
    out = model(images)
    expected = torch.stack(out.hidden.split()) if out.logits is None else out.logits
    yield from zip(expected, *found.values(), strict=True)


def _gpt(model: GPT, run: Run, lengths: list[int], random: torch.Generator) -> Pairs:
    """The first half of each sequence at once, then the rest, which reads the past of the first."""
    config, N = model.config, len(lengths)
    ids = _random(config.vocab_size, lengths, random)
    expected = model(pack(ids)).logits.split()
    shape = (N, config.heads, 0, config.dim // config.heads)
    kinds = [f"{i}.{kind}" for i in range(config.depth) for kind in ("key", "value")]
    past = {f"past_key_values.{kind}": torch.zeros(shape) for kind in kinds}
    mask = torch.zeros(N, 0, dtype=torch.long)
    halves = [(n + 1) // 2 for n in lengths]
    for begin, end in (([0] * N, halves), (halves, lengths)):
        parts = [sequence[a:b] for sequence, a, b in zip(ids, begin, end, strict=True)]
        given, text = _pad(parts, config.vocab_size, random)
        mask = torch.cat([mask, text], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -given.shape[1] :]
        found = run(MODEL, {"input_ids": given, "attention_mask": mask, "position_ids": positions, **past})
        past = {f"past_key_values.{kind}": found[f"present.{kind}"] for kind in kinds}
        for i, part in enumerate(parts):
            if len(part):
                yield expected[i][begin[i] : end[i]], found["logits"][i, : len(part)]


def _transformer(model: Transformer, run: Run, lengths: list[int], random: torch.Generator) -> Pairs:
    """The first token of each target, then the rest, which reads the past of the first."""
    config = model.config
    sources, targets = (_random(config.vocab_size, each, random) for each in (lengths, lengths[::-1]))
    out = model(pack(sources), pack(targets))
    source, mask = _pad(sources, config.vocab_size, random, config.context)
    target, _ = _pad(targets, config.vocab_size, random, config.context)
    memory = run(ENCODER, {"input_ids": source, "attention_mask": mask})["last_hidden_state"]
    yield from _text(out.memory, memory)
    first = run(
        DECODER,
        {"encoder_attention_mask": mask, "input_ids": target[:, :1], "encoder_hidden_states": memory},
    )
    past = {name.replace("present", "past_key_values"): x for name, x in first.items() if name != "logits"}
    logits = [first["logits"]]
    if target.shape[1] > 1:
        rest = {"encoder_attention_mask": mask, "input_ids": target[:, 1:], **past}
        logits.append(run(DECODER_WITH_PAST, rest)["logits"])
    yield from _text(out.logits, torch.cat(logits, dim=1))


def _random(high: int, lengths: Sequence[int], random: torch.Generator) -> list[Tensor]:
    """Ids below `high`, one tensor (length,) a sequence."""
    return [torch.randint(high, (length,), generator=random) for length in lengths]


def _pad(
    sequences: Sequence[Tensor], high: int, random: torch.Generator, limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """Ids and mask (N, L) of sequences with random ids behind them, one more than the longest needs.

    limit: rows are no longer than this.
    """
    longest = max(map(len, sequences)) + 1
    width = longest if limit is None else min(longest, limit)
    ids = torch.randint(high, (len(sequences), width), generator=random)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = sequence
        mask[i, : len(sequence)] = 1
    return ids, mask


def _text(expected: Ragged, found: Tensor) -> Pairs:
    """Each sequence's own rows of answers (N, L, .)."""
    for i, values in enumerate(expected.split()):
        yield values, found[i, : len(values)]
