from __future__ import annotations

from itertools import islice

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qkv.data import Sampler

costs_of = st.lists(st.integers(1, 50), min_size=1, max_size=200).map(np.array)
settings_of = {"costs": costs_of, "tokens": st.integers(1, 120), "seed": st.integers(0, 9)}


@given(**settings_of, epoch=st.integers(0, 5))
def test_every_sample_is_in_exactly_one_batch_of_an_epoch(
    costs: np.ndarray, tokens: int, seed: int, epoch: int
) -> None:
    batches = Sampler(costs, tokens, seed).epoch(epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(costs)))


@given(**settings_of, epoch=st.integers(0, 5))
def test_batches_hold_at_most_the_tokens_or_one_long_sample(
    costs: np.ndarray, tokens: int, seed: int, epoch: int
) -> None:
    for batch in Sampler(costs, tokens, seed).epoch(epoch):
        assert batch
        assert costs[batch].sum() <= tokens or len(batch) == 1


@given(**settings_of, start=st.integers(0, 60))
def test_batches_continue_where_a_run_was_cut_off(
    costs: np.ndarray, tokens: int, seed: int, start: int
) -> None:
    whole = list(islice(Sampler(costs, tokens, seed).batches(), start + 20))
    used = Sampler(costs, tokens, seed)
    used.epoch(3)  # an epoch does not depend on those asked for before
    assert list(islice(used.batches(start), 20)) == whole[start:]


def test_seed_and_epoch_decide_the_order() -> None:
    costs = np.ones(100, dtype=np.int64)
    orders = {str(Sampler(costs, 10, seed).epoch(epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_samples_of_similar_cost_meet() -> None:
    costs = np.random.default_rng(0).integers(1, 100, 2000)
    spreads = [np.ptp(costs[batch]) for batch in Sampler(costs, 1000, 0).epoch(0)]
    assert np.mean(spreads) < 5  # of 99 in the whole data
    total = sum(len(batch) for batch in Sampler(costs, 1000, 0).epoch(0))
    assert total == 2000


def test_batches_are_nearly_full() -> None:
    costs = np.random.default_rng(0).integers(1, 60, 3000)
    batches = Sampler(costs, 1000, 0).epoch(0)
    assert costs.sum() / (1000 * len(batches)) > 0.95


@given(**settings_of, groups=st.integers(1, 4))
def test_batches_hold_samples_of_one_group(costs: np.ndarray, tokens: int, seed: int, groups: int) -> None:
    group = np.arange(len(costs)) * groups // len(costs)
    batches = Sampler(costs, tokens, seed, group).epoch(0)
    assert sorted(i for batch in batches for i in batch) == list(range(len(costs)))
    assert all(len(set(group[batch])) == 1 for batch in batches)


def test_groups_have_their_share_of_the_batches_throughout() -> None:
    group = np.repeat([0, 1], [3000, 1000])
    batches = Sampler(np.full(4000, 5), 50, 0, group).epoch(0)
    shares = [np.mean([group[batch[0]] for batch in batches[i : i + 100]]) for i in range(0, 400, 100)]
    assert len(batches) == 400
    assert np.mean(shares) == 0.25 and max(shares) < 0.4 and min(shares) > 0.1
