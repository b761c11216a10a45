"""Padded graphs, run by torch, give the answers of the ragged models, whatever stands in the padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from qkv.errors import InputError
from qkv.export.check import Run, check, compare
from qkv.export.onnx import MODEL, graphs
from qkv.hub import Checkpoint
from qkv.hub.sentence import Pooling
from qkv.ragged import pack

CONFIGS = {
    **tiny.CONFIGS,
    "bert-bare": replace(tiny.CONFIGS["bert-masked-lm"], head="none"),
    "bert-pooler": replace(tiny.CONFIGS["bert-masked-lm"], head="pooler"),
    "vit-bare": replace(tiny.CONFIGS["vit-pre-norm"], labels=()),
}


def eager(checkpoint: Checkpoint) -> Run:
    """The graphs of a checkpoint, run by torch."""
    made = graphs(checkpoint)

    def run(file, inputs):
        graph = made[file]
        assert inputs.keys() == graph.inputs.keys()
        with torch.no_grad():
            found = graph(*(inputs[name] for name in graph.inputs))
        return dict(zip(graph.outputs, found, strict=True))

    return run


def same(checkpoint: Checkpoint, lengths: list[int]) -> None:
    compared = 0
    with torch.no_grad():
        for expected, found in compare(checkpoint, eager(checkpoint), lengths):
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
            compared += expected.numel()
    assert compared


@pytest.mark.parametrize("name", CONFIGS)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_they_are_the_ragged_models(name, lengths):
    same(Checkpoint(tiny.tiny(CONFIGS[name], torch.float32)), lengths)


@pytest.mark.parametrize("name", ["gpt-rotary", "gpt-pre-norm", "transformer-rotary", "bert-masked-lm"])
def test_up_to_the_whole_context(name):
    same(Checkpoint(tiny.tiny(name, torch.float32)), [tiny.CONTEXT, 1, tiny.CONTEXT])


@pytest.mark.parametrize("mode", ["mean", "cls"])
@pytest.mark.parametrize("normalized", [True, False])
def test_sentence_vectors(mode, normalized):
    model = tiny.tiny(CONFIGS["bert-pooler"], torch.float32)
    checkpoint = Checkpoint(model, pooling=Pooling(mode, normalized))
    same(checkpoint, [1, 9, 4])
    ids = tiny.ids(9, 1)
    mask = torch.tensor([[1] * 6 + [0] * 3])
    inputs = {"input_ids": ids[None], "attention_mask": mask, "token_type_ids": torch.zeros_like(mask)}
    hidden = model(pack([ids[:6]])).hidden.values
    expected = hidden.mean(0) if mode == "mean" else hidden[0]
    found = eager(checkpoint)(MODEL, inputs)["sentence_embedding"][0]
    torch.testing.assert_close(
        found, normalize(expected, dim=0) if normalized else expected, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", tiny.CAUSAL)
@given(pads=st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_gpt_also_reads_what_is_padded_on_the_left(name, pads):
    """As transformers pads prompts to generate."""
    model = tiny.tiny(name, torch.float32)
    run = eager(Checkpoint(model))
    ids = torch.stack([tiny.ids(8, i) for i in range(len(pads))])
    mask = torch.stack([(torch.arange(8) >= pad).long() for pad in pads])
    config = model.config
    past = torch.zeros(len(pads), config.heads, 0, config.dim // config.heads)
    inputs = dict.fromkeys(graphs(Checkpoint(model))[MODEL].inputs, past)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    found = run(MODEL, {**inputs, "input_ids": ids, "attention_mask": mask, "position_ids": positions})
    expected = model(pack([row[pad:] for row, pad in zip(ids, pads, strict=True)])).logits.split()
    for pad, row, logits in zip(pads, found["logits"], expected, strict=True):
        torch.testing.assert_close(row[pad:], logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt-pre-norm", "transformer-post-norm", "bert-tagging", "vit-pre-norm"])
def test_a_row_without_text_is_finite_and_disturbs_nobody(name):
    model = tiny.tiny(name, torch.float32)
    run = eager(Checkpoint(model))
    for file, graph in graphs(Checkpoint(model)).items():
        sizes = {"batch_size": 2, "past_sequence_length": 2, "past_sequence_length + sequence_length": 5}
        inputs = {
            key: torch.zeros([sizes.get(size, 3) if isinstance(size, str) else size for size in shape])
            for key, shape in graph.inputs.items()
        }
        inputs = {key: x.long() if key.endswith(("_ids", "_mask")) else x for key, x in inputs.items()}
        for key, x in inputs.items():
            if key.endswith("_mask"):
                x[1] = 1
        both = run(file, inputs)
        alone = run(file, {key: x[1:] for key, x in inputs.items()})
        for key, values in both.items():
            assert values.isfinite().all()
            torch.testing.assert_close(values[1:], alone[key])


@pytest.mark.parametrize(
    "name", ["gpt-pre-norm", "transformer-post-norm", "bert-pretraining", "vit-pre-norm"]
)
@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_a_wrong_graph_is_noticed(name, wrong):
    checkpoint = Checkpoint(tiny.tiny(name, torch.float32))
    assert check(checkpoint, eager(checkpoint)) < 1e-4
    last = list(graphs(checkpoint))[-1]

    def disturbed(file, inputs):
        found = dict(eager(checkpoint)(file, inputs))
        if file == last:
            key = next(iter(found))
            found[key] = found[key] + wrong * found[key].abs().max()
        return found

    with pytest.raises(
        InputError, match=r"ONNX Runtime's answers differ from the model's by .*: nothing was"
    ):
        check(checkpoint, disturbed)


@pytest.mark.parametrize("name", ["gpt-qk-norm", "transformer-rotary", "bert-masked-lm"])
def test_a_context_shorter_than_what_graphs_are_checked_with(name):
    checkpoint = Checkpoint(tiny.tiny(replace(tiny.CONFIGS[name], context=2), torch.float32))
    assert check(checkpoint, eager(checkpoint)) < 1e-4
