"""The Python in docs/data.md and docs/rewards.md runs, and what they say of names and defaults is so."""

import inspect
import re
from pathlib import Path

import pytest
import yaml

from rlhf_jax import config
from rlhf_jax.config import Reward, RewardFunction
from rlhf_jax.data.formats import FORMATS
from rlhf_jax.rewards import REWARDS, make_reward
from rlhf_jax.types import RewardInput

DOCS = Path(__file__).parents[2] / "docs"


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", ["data.md", "rewards.md"])
def test_python_blocks_run(page: str, capsys: pytest.CaptureFixture[str]):
    for block in _blocks(page, "python"):
        exec(compile(block, page, "exec"), {})  # noqa: S102  (our own page)
    assert capsys.readouterr().out


def test_the_reward_page_tells_the_truth(tmp_path: Path):
    (settings,) = [yaml.safe_load(block)["reward"] for block in _blocks("rewards.md", "yaml")]
    assert set(settings) <= set(config.Reward.__dataclass_fields__)
    (tmp_path / "my_rewards.py").write_text(_blocks("rewards.md", "python")[0])
    entries = [RewardFunction(**entry) for entry in settings["functions"][:2]]
    entries.append(RewardFunction(function=str(tmp_path / "my_rewards.py") + ":polite", options={"bonus": 2.0}))
    total, parts = make_reward(Reward(functions=tuple(entries)))(RewardInput(["p"], ["Please: 4"], [True], {"answer": ["4"]}))
    assert total.tolist() == [3.0]
    assert set(parts) == {"reward/math_answer", "reward/length", "reward/polite"}
    text = (DOCS / "rewards.md").read_text(encoding="utf-8")
    for name, function in REWARDS.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        for option in list(inspect.signature(function).parameters)[1:]:
            assert option == "tokenizer" or f"`{option}`" in line, (name, option)


def test_the_data_page_tells_the_truth():
    text = (DOCS / "data.md").read_text(encoding="utf-8")
    (settings,) = [yaml.safe_load(block)["data"] for block in _blocks("data.md", "yaml")]
    assert set(settings) <= set(config.Data.__dataclass_fields__)
    for key in config.Data.__dataclass_fields__:
        assert key in text or key == "limit", key
    for formats in FORMATS.values():
        for _, columns in formats:
            assert all(f"`{column}`" in text for column in columns)
