"""The examples: an algorithm from outside the package runs in the package's loop, and is as short as is claimed."""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import algorithms, config, metrics

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def my_algorithm():
    """The example, imported; what it adds to the two dictionaries goes with the test."""
    spec = importlib.util.spec_from_file_location("my_algorithm", EXAMPLES / "my_algorithm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del algorithms.ALGORITHMS["rank"], config.STAGES["rank"]


def test_it_is_short():
    assert len((EXAMPLES / "my_algorithm.py").read_text().splitlines()) < 60


def test_ranks(my_algorithm):
    scores = jnp.asarray([0.1, 5.0, 0.1, -3.0, 0.7, 0.7, 0.7, 0.7])
    got = my_algorithm.rank_advantages(scores, 4)
    np.testing.assert_allclose(got, [0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0])


def test_it_trains(my_algorithm, tmp_path):
    my_algorithm.main(str(tmp_path / "run"), tuning_steps=2, steps=2, sums=400)
    rows = metrics.read_rows(tmp_path / "run" / "rank" / metrics.METRICS)
    trained = [row for row in rows if "policy/loss" in row]
    assert [row["step"] for row in trained] == [1, 2]
    assert all(row["stage"] == "rank" and np.isfinite(row["policy/loss"]) for row in trained)
