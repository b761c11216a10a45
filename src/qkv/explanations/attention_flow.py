"""How information can flow through attention, from the units that a model reads to those that answer.

Rollout and flow: Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", 3. Both see a model
as steps, each of which mixes the units' states: half of a state stays (the residual connection), half is
taken from others by attention, the mean over heads. The paper does not speak of encoder-decoder models;
they are the same on the units of source and target together: cross-attention is a step in which the
target's units take from the source's.

Legend: U units of all sequences end to end, H heads, Uq and Uk units of queries and of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qkv.errors import InputError, need
from qkv.explanations.explanation import Stack
from qkv.explanations.subjects import Subject
from qkv.recording import record

FLOW_EDGES = 1_000_000_000
"""Most edges of a graph whose flows are computed, over all units: each takes a search through the graph."""


@dataclass(frozen=True)
class Look:
    """One layer of one stack: which units look at which, and how much."""

    stack: Stack
    layer: int
    queries: slice
    """Of the units."""
    keys: slice
    weights: Tensor
    """Attention probabilities (H, Uq, Uk), float32."""


@torch.no_grad()
def looks(subject: Subject) -> tuple[list[Look], float]:
    """The attention to a subject, in the order of computing; and the residual of its recording."""
    with record(subject.model) as seen:
        subject.outputs(subject.embedded[None], subject.questions)
    found = []
    layers = [(stack, n) for stack in subject.stacks for n in range(len(subject.model.attentions()[stack]))]
    # The encoder is computed first, then layer by layer the decoder's own attention and its cross-attention.
    for stack, layer in sorted(layers, key=lambda key: (key[0] != "encoder", key[1], key[0] == "cross")):
        queries, keys = map(subject.place, subject.stacks[stack])
        # Texts that are read by themselves do not look at each other.
        maps = zip(*seen[stack, layer], strict=True)
        weights = torch.stack([torch.block_diag(*texts) for texts in maps])  # type: ignore[no-untyped-call]
        found.append(Look(stack, layer, queries, keys, weights))
    return found, seen.residual


def last(seen: Sequence[Look], units: int) -> Tensor:
    """The last layer's attention, mean over heads: how much each unit looks at each (U, U).

    Of an encoder-decoder model that of the decoder and of its cross-attention.
    """
    end = seen[-1]
    total = torch.zeros(units, units, device=end.weights.device)
    for look in seen:
        if (look.layer, look.queries) == (end.layer, end.queries):
            total[look.queries, look.keys] += look.weights.mean(0)
    return total


def steps(seen: Sequence[Look], units: int) -> list[Tensor]:
    """How each layer mixes the units' states, (U, U) each: 0.5 A + 0.5 I where it attends; rows sum to 1."""
    mixed = []
    for look in seen:
        step = torch.eye(units, device=look.weights.device)
        step[look.queries, look.queries] *= 0.5
        step[look.queries, look.keys] += 0.5 * look.weights.mean(0)
        mixed.append(step)
    return mixed


def rollout(mixed: Sequence[Tensor]) -> Tensor:
    """How much of each unit's last state comes from each unit (U, U): the product of all steps."""
    total = mixed[0]
    for step in mixed[1:]:
        total = step @ total
    return total


def check_flow(mixed: Sequence[Tensor]) -> None:
    """Raises InputError without scipy, and for an input whose flows would take too long."""
    need("attention flow", "explain", "scipy")
    units, edges = len(mixed[0]), sum(int(step.count_nonzero()) for step in mixed)
    if edges * units > FLOW_EDGES:
        raise InputError(
            f"attention flow is for short inputs: {units} units, {edges:,} edges take too long: leave it out"
        )


def flow(mixed: Sequence[Tensor], reads: Tensor) -> Tensor:
    """The largest flow from the answer to each unit by itself, (U,); as `check_flow` allows.

    The graph has the units once for each step and once more, and an edge wherever a step takes something, of
    that much capacity. reads (U,): of which last states the answer is read.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import maximum_flow

    scale = 1 << 20  # maximum_flow takes integers
    U, depth = len(reads), len(mixed)
    root = (depth + 1) * U
    starts, ends, capacities = [], [], []
    for level, step in enumerate([*mixed, reads[None]]):
        rows, columns = np.nonzero(wide := step.double().cpu().numpy())
        starts.append(rows + (level + 1) * U)
        ends.append(columns + level * U)
        capacities.append(np.rint(wide[rows, columns] * scale).astype(np.int32))
    graph = coo_array(
        (np.concatenate(capacities), (np.concatenate(starts), np.concatenate(ends))), shape=(root + 1,) * 2
    ).tocsr()
    return torch.tensor([maximum_flow(graph, root, unit).flow_value / scale for unit in range(U)])
