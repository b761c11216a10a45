"""A diverged run is stopped; noise, spikes and slow learning are not taken for one."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkv.config import TrainConfig
from qkv.divergence import PATIENCE, WINDOW, LossTrend, check_finite, check_trend
from qkv.errors import InputError

NOISE = {
    "normal": lambda rng, n: rng.normal(size=n),
    "heavy": lambda rng, n: rng.standard_t(3, size=n),
    "rare": lambda rng, n: 30.0 * (rng.random(n) < 0.02),
    "skewed": lambda rng, n: rng.lognormal(0, 1.5, n),
}


def diverged_at(losses) -> int | None:
    """The step at which the run is given up."""
    trend = LossTrend()
    for step, loss in enumerate(losses, start=1):
        trend.add(float(loss))
        if trend.diverged:
            return step
    return None


@given(
    kind=st.sampled_from(sorted(NOISE)),
    spread=st.floats(0.0, 2.0),
    first=st.floats(0.01, 10.0),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
def test_noise_around_a_loss_that_falls_or_stays_is_no_divergence(kind, spread, first, share, seed):
    rng = np.random.default_rng(seed)
    fall = first * (1 - share * (1 - np.exp(-np.arange(3000) / 300)))
    assert diverged_at(np.abs(fall + spread * NOISE[kind](rng, 3000))) is None


@given(
    first=st.floats(2.0, 10.0),
    learnt=st.floats(0.3, 0.9),
    back=st.floats(0.8, 3.0),
    spread=st.floats(0.0, 0.05),
    seed=st.integers(0, 1000),
)
def test_a_loss_that_goes_back_to_where_it_began_is_soon_given_up(first, learnt, back, spread, seed):
    rng = np.random.default_rng(seed)
    low, high = first * (1 - learnt), first * (1 - learnt) + back * max(learnt, 0.5) * first
    losses = np.concatenate([np.linspace(first, low, 500), np.full(500, low), np.full(1000, high)])
    stopped = diverged_at(losses + first * spread * rng.normal(size=2000))
    # A jump first seems to be noise, until the smoothing has forgotten it.
    assert stopped is not None and 1000 + PATIENCE <= stopped <= 1000 + PATIENCE + 5 * WINDOW


def test_a_spike_from_which_the_run_recovers_is_none():
    losses = [5.0] * 50 + [1.0] * 500 + [9.0] * (PATIENCE - 6 * WINDOW) + [1.0] * 500
    assert diverged_at(losses) is None


@given(st.lists(st.floats(0, 100), max_size=60), st.integers(0, 60))
def test_a_resumed_run_judges_as_the_one_that_was_not_cut_off(losses, cut):
    whole, first = LossTrend(), LossTrend()
    for loss in losses:
        whole.add(loss)
    for loss in losses[:cut]:
        first.add(loss)
    resumed = LossTrend(**json.loads(json.dumps(asdict(first))))
    for loss in losses[cut:]:
        resumed.add(loss)
    assert resumed == whole


def test_the_message_says_what_to_try():
    config = TrainConfig(learning_rate=0.5, warmup_steps=7, max_grad_norm=3.0)
    advice = r"learning_rate \(now 0.5\), raise train.warmup_steps \(now 7\) or lower .*grad_norm \(now 3\)"
    with pytest.raises(InputError, match=f"no longer a number at step 9: .*{advice}"):
        check_finite(9, config, 1.0, float("inf"))
    check_finite(9, config, 1.0, 1.0)
    with pytest.raises(InputError, match=rf"diverged: until step 900 .* \(8, 2 at best\): .*{advice}"):
        check_trend(900, config, LossTrend(smooth=8.0, lowest=2.0, too_high=PATIENCE))
    check_trend(900, config, LossTrend(smooth=8.0, lowest=2.0, too_high=PATIENCE - 1))
