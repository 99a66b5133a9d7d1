"""Order: a pure function of (seed, step); every epoch a permutation; mixtures keep their shares."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data import order
from rlhf_jax.errors import UserError


def _stream(seed: int, steps: int, batch: int, rows: int) -> np.ndarray:
    return np.concatenate([order.indices(seed, step, batch, rows) for step in range(steps)])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 120), st.integers(3, 17))
def test_every_epoch_is_a_permutation_and_epochs_follow_without_a_gap(seed: int, rows: int, batch: int):
    stream = _stream(seed, -(-3 * rows // batch), batch, rows)[: 3 * rows].reshape(3, rows)
    assert (np.sort(stream, axis=1) == np.arange(rows)).all()


def test_steps_do_not_depend_on_batch_size_or_history():
    stream = _stream(7, 30, 10, 97)
    assert (stream == _stream(7, 300, 1, 97)).all()
    assert (order.indices(7, 23, 10, 97) == stream[230:240]).all()
    assert order.indices(7, 10**9, 4, 10**9).max() < 10**9


def test_epochs_and_seeds_differ():
    stream = _stream(0, 3, 100, 100).reshape(3, 100)
    assert len({tuple(epoch) for epoch in stream}) == 3
    assert len({tuple(order.indices(seed, 0, 100, 100)) for seed in range(20)}) == 20


def test_the_order_is_fixed_for_all_time():
    # Written down: a run that is resumed with another version of this package or of numpy must see the same rows.
    assert order.indices(0, 0, 8, 10).tolist() == [4, 1, 6, 9, 0, 3, 7, 5]
    assert order.indices(1, 5, 4, 10**6).tolist() == [566954, 997400, 411589, 798139]


def test_small_permutations_are_all_about_equally_likely():
    counts = np.asarray(list(Counter(tuple(order.indices(seed, 0, 4, 4)) for seed in range(2400)).values()))
    assert len(counts) == 24
    chi_square = float((((counts - 100.0) ** 2) / 100.0).sum())
    assert chi_square < 56.0  # 23 degrees of freedom: 1 in 10,000


def test_each_position_of_a_large_permutation_is_uniform():
    first = np.concatenate([order.indices(seed, 0, 5, 1000) for seed in range(800)])
    counts, _ = np.histogram(first, bins=10, range=(0, 1000))
    assert float((((counts - 400.0) ** 2) / 400.0).sum()) < 33.0  # 9 degrees of freedom: 1 in 10,000


def test_mixture_has_exact_shares_and_runs_through_every_source():
    rows, weights = (10, 1000, 7), (1.0, 2.0, 5.0)
    parts = [order.mixture(3, step, 512, rows, weights) for step in range(3 * order.BLOCK // 512)]
    source, row = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    assert np.bincount(source).tolist() == [3 * 512, 3 * 1024, 3 * 2560]
    for number, count in enumerate(rows):
        mine = row[source == number]
        whole = mine[: len(mine) // count * count].reshape(-1, count)
        assert (np.sort(whole, axis=1) == np.arange(count)).all()
    middle = order.mixture(3, 70, 64, rows, weights)
    assert (middle[0] == source[4480:4544]).all()
    assert (middle[1] == row[4480:4544]).all()


def test_mixture_is_mixed_within_a_batch_and_does_not_depend_on_batch_size():
    rows, weights = (100, 100), (0.5, 0.5)
    source, row = order.mixture(0, 0, 512, rows, weights)
    assert 180 < source.sum() < 332
    halves = [order.mixture(0, step, 256, rows, weights) for step in (0, 1)]
    assert (np.concatenate([half[1] for half in halves]) == row).all()
    tiny, _ = order.mixture(0, 0, order.BLOCK, (5, 5, 5), (1e-9, 1.0, 1e-9))
    assert np.bincount(tiny).tolist() == [1, order.BLOCK - 2, 1]


@pytest.mark.parametrize("weights", [(0.0, 1.0), (float("nan"), 1.0), (-1.0, 2.0)])
def test_bad_weights_and_empty_sources_are_refused(weights: tuple[float, ...]):
    with pytest.raises(UserError, match="positive and finite"):
        order.mixture(0, 0, 4, (3, 3), weights)
    with pytest.raises(UserError, match="0 rows"):
        order.indices(0, 0, 4, 0)
