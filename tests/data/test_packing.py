"""Packing: every sequence once, no row over capacity, close to full."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data.packing import pack, packed_rows, padded_fraction


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_every_sequence_once_and_nothing_overflows(lengths: list[int]):
    sizes = np.asarray(lengths)
    packs = pack(sizes, 50)
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(sizes)))
    assert all(sizes[part].sum() <= 50 for part in packs)
    assert sum(int(sizes[part].sum()) <= 25 for part in packs) <= 1  # two rows that are half empty would be one
    assert [part.tolist() for part in packs] == [part.tolist() for part in pack(sizes, 50)]
    assert packed_rows(sizes, 50) == len(packs)


def test_best_fit_fills_the_tightest_row():
    packs = [part.tolist() for part in pack(np.asarray([6, 4, 5, 5]), 10)]
    assert packs == [[0, 1], [2, 3]]
    # The 4 goes where just 4 are free, so that 3 and 2 still fit beside the 5.
    assert [part.tolist() for part in pack(np.asarray([6, 5, 4, 3, 2]), 10)] == [[0, 2], [1, 3, 4]]


def test_padded_fraction():
    sizes = np.asarray([6, 4, 5])
    assert padded_fraction(sizes, 3, 10) == 0.5
    assert padded_fraction(sizes, packed_rows(sizes, 10), 10) == 0.25


def test_ordinary_lengths_pack_to_under_two_per_cent():
    sizes = np.minimum(np.random.default_rng(0).lognormal(5.0, 0.6, 2000).astype(int) + 8, 512)
    assert padded_fraction(sizes, len(sizes), 512) > 0.5
    assert padded_fraction(sizes, len(pack(sizes, 512)), 512) < 0.02
