"""Each loss against transformers' own or a hand computation, as sums over what was counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hub import theirs
from tiny import CONFIGS, tiny
from torch import Tensor

from qkv import hub
from qkv.data.batches import (
    ContrastiveBatch,
    LabelledBatch,
    MultiLabelBatch,
    TaggedBatch,
    TextBatch,
    ValueBatch,
)
from qkv.objectives import BinaryCrossEntropy, CrossEntropy, item_counts, loss_terms
from qkv.ragged import pack

IDS, SEGMENTS = pack(theirs.IDS), pack(theirs.SEGMENTS).values


def their_loss(model, labels: list[Tensor]) -> float:
    """The mean over sequences of transformers' loss of each alone."""
    losses = [
        model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([segments]), labels=one[None]).loss
        for ids, segments, one in zip(theirs.IDS, theirs.SEGMENTS, labels, strict=True)
    ]
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize(
    ("name", "batch", "labels"),
    [
        ("bert-classification", LabelledBatch, torch.tensor([2, 0, 1])),
        ("bert-multi-label", MultiLabelBatch, torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1]]).bool()),
        ("bert-regression", ValueBatch, torch.tensor([0.5, -3.0, 2.0])),
    ],
)
@torch.no_grad()
def test_losses_of_texts_are_transformers(
    name: str, batch: type[TextBatch], labels: Tensor, tmp_path
) -> None:
    model = theirs.make(name)
    model.save_pretrained(tmp_path)
    ours = batch(IDS, SEGMENTS, labels)
    (count,) = item_counts(ours).values()
    (term,) = loss_terms(hub.load(tmp_path).model, ours).values()
    assert len(term) == count
    expected = their_loss(model, list(labels.float() if labels.dtype == torch.bool else labels))
    assert float(term.loss_sum()) / count == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_the_loss_of_tags_is_transformers_on_first_pieces(tmp_path) -> None:
    model = theirs.make("bert-tagging")
    model.save_pretrained(tmp_path)
    firsts, tags = [[0, 2, 3], [0], [1, 13]], [[2, 0, 1], [1], [0, 2]]
    starts = [0, 5, 6]
    rows = torch.tensor([start + place for start, row in zip(starts, firsts, strict=True) for place in row])
    batch = TaggedBatch(IDS, rows, pack(tags))
    term = loss_terms(hub.load(tmp_path).model, batch)["tag"]
    assert item_counts(batch) == {"tag": 6} and len(term) == 6
    total = 0.0
    for ids, places, row in zip(theirs.IDS, firsts, tags, strict=True):
        labels = torch.full((1, len(ids)), -100)
        labels[0, places] = torch.tensor(row)
        total += float(model(input_ids=torch.tensor([ids]), labels=labels).loss) * len(row)
    assert float(term.loss_sum()) == pytest.approx(total, rel=1e-5)


@torch.no_grad()
def test_the_contrastive_loss_by_hand() -> None:
    model = tiny(replace(CONFIGS["bert-masked-lm"], head="none"))
    texts, pairs = [[3, 4], [5, 6, 7], [8]], [[3], [5, 6], [9, 1]]
    wrong = torch.tensor([[False, True, False], [True, False, True], [False, False, False]])
    batch = ContrastiveBatch(pack(texts + pairs), wrong, torch.tensor(0.1))
    term = loss_terms(model, batch)["pair"]

    def vector(ids: list[int]) -> Tensor:
        mean = model.features(pack([ids])).values.mean(0)
        return mean / mean.norm()

    total, right = 0.0, 0
    for i, text in enumerate(texts):
        scores = {j: float(vector(text) @ vector(pairs[j])) / 0.1 for j in range(3) if j == i or wrong[i, j]}
        total += float(torch.tensor(list(scores.values())).logsumexp(0)) - scores[i]
        right += max(scores, key=scores.__getitem__) == i
    assert item_counts(batch) == {"pair": 3} and len(term) == 3
    assert float(term.loss_sum(smoothing=0.1)) == pytest.approx(total, rel=1e-5)
    assert term.correct() == right


def test_classes_can_be_probabilities() -> None:
    logits, hard = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    soft = F.one_hot(hard, 3).float()
    for smoothing in (0.0, 0.1):
        torch.testing.assert_close(
            CrossEntropy(logits, soft).loss_sum(smoothing), CrossEntropy(logits, hard).loss_sum(smoothing)
        )
    mixed = 0.7 * soft + 0.3 / 3
    assert CrossEntropy(logits, mixed).correct() == CrossEntropy(logits, hard).correct()
    assert len(CrossEntropy(logits, mixed)) == 5


def test_yes_or_no_diverges_as_a_choice_of_two_classes() -> None:
    labels, (one, other) = torch.zeros(4, 3, dtype=torch.bool), torch.randn(2, 4, 3)
    pairs = [
        CrossEntropy(torch.stack([torch.zeros(12), z.flatten()], 1), torch.zeros(12)) for z in (one, other)
    ]
    found = BinaryCrossEntropy(one, labels).divergence_sum(BinaryCrossEntropy(other, labels))
    torch.testing.assert_close(found, pairs[0].divergence_sum(pairs[1]))
    assert BinaryCrossEntropy(one, labels).divergence_sum(BinaryCrossEntropy(one, labels)) == 0


def test_smoothing_moves_labels_towards_one_half() -> None:
    logits, labels = torch.randn(4, 3), torch.rand(4, 3) > 0.5
    target = torch.where(labels, 0.95, 0.05)
    expected = F.binary_cross_entropy(logits.sigmoid(), target, reduction="sum")
    torch.testing.assert_close(BinaryCrossEntropy(logits, labels).loss_sum(0.1), expected)
