"""The examples run as they stand, on fewer steps: an algorithm from outside, PPO in memory, runs side by side, a notebook."""

import importlib.util
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import algorithms, config, metrics, testing

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here():
    text = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.iterdir():
        if path.suffix in (".py", ".ipynb"):
            assert f'"{path.stem}"' in text or f'"{path.name}"' in text, path.name


# ------------------------------------------------------------------------------------------------- my_algorithm.py


@pytest.fixture
def my_algorithm():
    """The example, imported; what it adds to the two dictionaries goes with the test."""
    yield example("my_algorithm")
    del algorithms.ALGORITHMS["rank"], config.STAGES["rank"]


def test_it_is_short():
    assert len((EXAMPLES / "my_algorithm.py").read_text().splitlines()) < 60


def test_ranks(my_algorithm):
    scores = jnp.asarray([0.1, 5.0, 0.1, -3.0, 0.7, 0.7, 0.7, 0.7])
    got = my_algorithm.rank_advantages(scores, 4)
    np.testing.assert_allclose(got, [0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0])


@pytest.mark.usefixtures("one_device")
def test_it_trains(my_algorithm, tmp_path):
    my_algorithm.main(str(tmp_path / "run"), tuning_steps=2, steps=2, sums=400)
    rows = metrics.read_rows(tmp_path / "run" / "rank" / metrics.METRICS)
    trained = [row for row in rows if "policy/loss" in row]
    assert [row["step"] for row in trained] == [1, 2]
    assert all(row["stage"] == "rank" and np.isfinite(row["policy/loss"]) for row in trained)


# ------------------------------------------------------------------------------------------------- ppo_from_python.py


@pytest.fixture
def from_python():
    return example("ppo_from_python")


def test_ppo_on_a_model_function_and_a_reward_of_ones_own_learns(from_python):
    scores = from_python.main(steps=24)
    assert np.mean(scores[-4:]) > np.mean(scores[:2]) + 1.5, scores


def test_the_model_function_keeps_the_promises_of_a_model(from_python):
    testing.check_model(from_python.MODEL)


def test_the_run_itself_is_twenty_lines():
    source = (EXAMPLES / "ppo_from_python.py").read_text(encoding="utf-8")
    body = source[source.index("def main") : source.index('if __name__ == "__main__"')].splitlines()
    statements = [line for line in body[1:] if line.strip() and not line.strip().startswith(("#", ")", "print"))]
    assert len(statements) <= 20, len(statements)


# ------------------------------------------------------------------------------------------------- vmap_seeds.py


def test_seeds_and_settings_side_by_side_make_a_table(capsys):
    module = example("vmap_seeds")
    table = module.main(steps=3, seeds=2, learning_rates=(1e-3,), kl_coefs=(0.0, 0.2))
    assert capsys.readouterr().out.strip() == table
    rows = re.findall(r"^ +1e-03 +(0.00|0.20) +(\S+) -> +(\S+) \((\S+)\) +(\S+)$", table, re.MULTILINE)
    assert [row[0] for row in rows] == ["0.00", "0.20"]
    assert rows[0][1] == rows[1][1]  # the same seeds begin alike, whatever the coefficient
    assert "4 runs of 3 steps" in table


# ------------------------------------------------------------------------------------------------- quickstart.ipynb


@pytest.mark.usefixtures("one_device")
def test_the_notebook_runs_from_top_to_bottom(tmp_path, capsys):
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    namespace: dict = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"quickstart.ipynb cell {number}", "exec"), namespace)  # noqa: S102 - our own
        if "parameters" in cell["metadata"].get("tags", ()):
            namespace |= {"out": tmp_path, "tuning_steps": 2, "ppo_steps": 2}
    printed = capsys.readouterr().out
    assert "step   1   right" in printed
    assert len(re.findall(r"before .* after ", printed)) == 8
    assert (tmp_path / "ppo" / "report.html").is_file()
