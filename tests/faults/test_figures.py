"""The figures of docs/durability.md, in small: `scripts/faults.py --figures` measures them."""

import pytest

from tests.faults import figures


@pytest.mark.parametrize(("writers", "readers"), [(1, 8), (8, 2)])
def test_a_checkpoint_gives_equal_bytes_to_another_number_of_devices(tmp_path, writers, readers):
    assert figures.resharded(tmp_path, writers, readers)


@pytest.mark.usefixtures("one_device")
def test_nothing_that_is_not_finite_gets_into_the_state_of_ppo(tmp_path):
    found = figures.inject(figures.ppo_setup(tmp_path), 40)
    assert found.applied == 0
    assert found.skipped > 0
    assert found.dropped > 0
