"""Schedules are continuous and end where they say; decay touches matrices only."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import run_config

from qkv.config import BertConfig, GPTConfig, TrainConfig, TransformerConfig, ViTConfig
from qkv.job import new_job
from qkv.models import build
from qkv.optim import Muon, learning_rate, optimizers, orthogonal
from qkv.trainer import Trainer

SCHEDULES = ["cosine", "linear", "inverse_sqrt", "constant"]


def config(**changes):
    return dataclasses.replace(TrainConfig(), **changes)


@given(st.sampled_from(SCHEDULES), st.integers(0, 50), st.integers(51, 500))
def test_rate_rises_to_its_peak_then_never_rises(schedule, warmup, steps):
    c = config(schedule=schedule, warmup_steps=warmup, max_steps=steps, learning_rate=0.5)
    rates = [learning_rate(step, c) for step in range(1, steps + 1)]
    peak = max(warmup, 1) - 1
    assert all(a < b for a, b in pairwise(rates[: peak + 1]))
    assert all(a >= b for a, b in pairwise(rates[peak:]))
    assert max(rates) == pytest.approx(0.5, rel=0.1)
    assert min(rates) >= 0.0


def test_where_the_schedules_end():
    c = config(warmup_steps=100, max_steps=400, learning_rate=1.0)
    ends = {s: learning_rate(400, dataclasses.replace(c, schedule=s)) for s in SCHEDULES}
    assert ends == pytest.approx({"cosine": 0.1, "linear": 0.0, "inverse_sqrt": 0.5, "constant": 1.0})


@given(st.integers(1, 5000), st.integers(1, 4000))
def test_inverse_sqrt_is_the_paper_s_formula(step, warmup):
    dim = 512
    peak = dim**-0.5 * warmup**-0.5
    ours = learning_rate(step, config(schedule="inverse_sqrt", warmup_steps=warmup, learning_rate=peak))
    assert ours == pytest.approx(dim**-0.5 * min(step**-0.5, step * warmup**-1.5))


def test_cosine_equals_torch_s():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=0.1)
    c = config(warmup_steps=0, max_steps=100, learning_rate=1.0)
    for step in range(1, 100):
        optimizer.step()
        oracle.step()
        assert learning_rate(step, c) == pytest.approx(oracle.get_last_lr()[0], abs=1e-6)


def test_weight_decay_on_matrices_only():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Embedding(5, 4))
    groups = optimizers(model, config(weight_decay=0.3))[0].param_groups
    decayed = {tuple(p.shape) for g in groups if g["weight_decay"] == 0.3 for p in g["params"]}
    spared = [tuple(p.shape) for g in groups if g["weight_decay"] == 0.0 for p in g["params"]]
    assert decayed == {(4, 3), (5, 4)}
    assert spared == [(4,), (4,), (4,)]
    assert math.isclose(sum(len(g["params"]) for g in groups), len(list(model.parameters())))


SIZES = {"dim": 8, "depth": 2, "heads": 2, "mlp_dim": 16}


@pytest.mark.parametrize(
    ("model", "matrices"),
    [
        (GPTConfig(**SIZES, vocab_size=9, context=9), 2 * 4),
        (BertConfig(**SIZES, vocab_size=9, context=9), 2 * 4),
        (TransformerConfig(**SIZES, vocab_size=9, context=9), 2 * 4 + 2 * 6),
        (ViTConfig(**SIZES, image_size=8, patch_size=4, labels=("a", "b")), 2 * 4),
        (ViTConfig(**SIZES, image_size=8, patch_size=4, stem="convolutions"), 2 * 4),
    ],
)
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_every_other_parameter(model, matrices):
    model = build(model)
    muon, adamw = optimizers(model, config(optimizer="muon"))
    of_muon = [p for g in muon.param_groups for p in g["params"]]
    of_adamw = [p for g in adamw.param_groups for p in g["params"]]
    assert len(of_muon) == matrices
    assert {id(p) for p in [*of_muon, *of_adamw]} == {id(p) for p in model.parameters()}
    assert len(of_muon) + len(of_adamw) == len(list(model.parameters()))


def test_each_matrix_goes_where_torchs_muon_takes_it_alone():
    """Of the first parameter, which is three matrices one below the other, each third."""
    torch.manual_seed(0)
    shapes = [(12, 4), (6, 4), (4, 4), (6, 4), (4, 6), (4, 4), (5, 3)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(part.clone()) for p in ours[:1] for part in p.detach().chunk(3)]
    theirs += [torch.nn.Parameter(p.detach().clone()) for p in ours[1:]]
    other = {"weight_decay": 0.3, "lr": 0.05}
    together = Muon(
        [
            {"params": ours[:1], "parts": 3},
            {"params": ours[1:4], "parts": 1},
            {"params": ours[4:], "parts": 1, **other},
        ],
        0.1,
    )
    alone = torch.optim.Muon(
        [{"params": theirs[:6]}, {"params": theirs[6:], **other}], 0.1, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        for mine in ours[:-1]:  # the last has no gradient
            mine.grad = torch.randn_like(mine)
        gradients = [*ours[0].grad.chunk(3), *(p.grad for p in ours[1:-1])]
        for p, gradient in zip(theirs[:-1], gradients, strict=True):
            p.grad = gradient.clone()
        together.step()
        alone.step()
    found = [*ours[0].chunk(3), *ours[1:]]
    for mine, expected in zip(found, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=5e-3)  # of steps of 0.2 in bfloat16
    states = together.state_dict()["state"]
    assert states.keys() == set(range(6))
    for number, p in enumerate(theirs[3:-1], start=1):
        assert states[number].keys() == {"momentum_buffer"}
        torch.testing.assert_close(states[number]["momentum_buffer"], alone.state[p]["momentum_buffer"])


def test_queries_keys_and_values_are_matrices_of_their_own():
    model = build(TransformerConfig(**SIZES, vocab_size=9, context=9))
    muon, _ = optimizers(model, config(optimizer="muon"))
    in_parts = [p for group in muon.param_groups if group["parts"] == 3 for p in group["params"]]
    assert [tuple(p.shape) for p in in_parts] == [(24, 8)] * 6
    assert {group["parts"] for group in muon.param_groups} == {1, 3}


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_singular_values_are_moved_near_one_and_directions_kept(n: int, rows: int, columns: int, seed: int):
    matrices = torch.randn(n, rows, columns, generator=torch.Generator().manual_seed(seed))
    found = orthogonal(matrices, (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
    U, S, V = torch.linalg.svd(matrices, full_matrices=False)
    inner = U.mT @ found @ V.mT  # diagonal in the matrix's own directions
    values = inner.diagonal(dim1=1, dim2=2)
    clear = S / S.sum(1, keepdim=True) > 0.05
    assert ((values > 0.5) & (values < 1.4))[clear].all()
    torch.testing.assert_close(inner, values.diag_embed(), rtol=0, atol=0.06)


LABELS = ("a", "b")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("model", "above"),
    [
        (GPTConfig(**SIZES, vocab_size=9, context=9), {"norm"}),
        (
            BertConfig(**SIZES, vocab_size=9, context=9, head="classification", labels=LABELS),
            {"pooler", "classifier"},
        ),
        (TransformerConfig(**SIZES, vocab_size=9, context=9), set()),
        (
            TransformerConfig(**SIZES, vocab_size=9, context=9, norm_first=True),
            {"encoder_norm", "decoder_norm"},
        ),
        (ViTConfig(**SIZES, image_size=8, patch_size=4, labels=LABELS), {"norm", "classifier"}),
        (ViTConfig(**SIZES, image_size=8, patch_size=4, stem="convolutions"), {"norm"}),
    ],
)
def test_layer_decay_and_weight_decay_of_every_parameter_by_hand(model, above, optimizer):
    model = build(model)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for made in optimizers(model, config(layer_decay=0.5, weight_decay=0.3, optimizer=optimizer))
        for group in made.param_groups
        for p in group["params"]
    }
    expected = {}
    last = 0.5 if above else 1.0  # the last block's, which is the top where nothing is above it
    for name, p in model.named_parameters():
        first, second, *_ = [*name.split("."), ""]
        if first in ("blocks", "encoder", "decoder"):
            rate = {"0": last / 2, "1": last}[second]
        else:
            rate = 1.0 if first in above else last / 4  # embeddings
        expected[name] = (rate, 0.3 if p.dim() >= 2 else 0.0)
    assert found == expected


def test_a_step_moves_each_layer_by_its_share_of_the_rate(tmp_path):
    """AdamW's first step moves every parameter by its learning rate, whatever the gradient."""
    run = run_config(tmp_path, "vit", warmup_steps=4, learning_rate=1e-3, weight_decay=0.0, layer_decay=0.5)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, depth=2))
    job = new_job(run)
    trainer = Trainer(run.train, job.checkpoint, job.train)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.step(trainer.data(0, range(20)), step=2)  # of 4 warm-up steps: half of the rate
    for name, p in trainer.model.named_parameters():
        share = {"blocks.0": 0.25, "blocks.1": 0.5, "classifi": 1.0, "norm.wei": 1.0, "norm.bia": 1.0}
        moved = (p.detach() - before[name]).abs().max().item()
        assert moved == pytest.approx(5e-4 * share.get(name[:8], 0.125), rel=1e-2), name


@given(st.sampled_from(SCHEDULES), st.integers(0, 5))
def test_every_step_has_a_rate_even_with_few_of_them(schedule, warmup):
    for steps in range(1, 8):
        c = config(schedule=schedule, warmup_steps=warmup, max_steps=steps, learning_rate=1.0)
        rates = [learning_rate(step, c) for step in range(1, steps + 1)]
        assert all(0.0 < rate <= 1.0 for rate in rates[:-1])
        assert 0.0 <= rates[-1] <= 1.0
        assert all(rate == step / warmup for step, rate in enumerate(rates[:warmup], start=1))
