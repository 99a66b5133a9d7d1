"""PAPERS.md names functions and tests; both must exist."""

import importlib
import re
from pathlib import Path

import oracles
import pytest

ROOT = Path(__file__).parents[1]
TEST_OPS = ROOT / "tests/test_ops.py"
PAGE = (ROOT / "PAPERS.md").read_text(encoding="utf-8")


def test_every_function_named_exists():
    named = set(re.findall(r"\| `([\w/]+)\.(\w+)` \|", PAGE))
    assert len(named) > 20
    for module, function in named:
        assert hasattr(importlib.import_module(f"rlhf_jax.{module.replace('/', '.')}"), function), f"{module}.{function}"


def test_every_test_named_exists():
    named = set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE))
    assert len(named) > 30
    missing = [
        f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / "tests" / file).read_text(encoding="utf-8")
    ]
    assert missing == []


@pytest.mark.parametrize("name", ["group_advantages", "grpo_constant_group", "grpo_loss", "dpo", "kto", "loss_aggregation"])
def test_every_known_answer_of_issue_7_is_compared_or_said_not_to_be(name):
    """A definition counts as compared where a test names it (it may put on loss_, grad_, seq_ and _beta)."""
    source = "".join(path.read_text(encoding="utf-8") for path in [*(ROOT / "tests/algorithms").glob("test_*.py"), TEST_OPS])
    left_out = set(re.findall(r"`(\w+)`", PAGE.partition("## Known answers that are not compared")[2].partition("Every\n")[0]))
    refs = {ref for case in oracles.load(name).values() for ref in case.ref}
    silent = [ref for ref in refs if not forms(ref) & left_out and not any(f'"{form}"' in source for form in forms(ref))]
    assert sorted(silent) == []


def forms(ref):
    """How a test may write the name of a definition."""
    plain = ref.removesuffix("_beta")
    return {ref, plain, re.sub("^(loss|grad|seq)_", "", plain), re.sub("chosen|rejected", "{side}", ref)}
