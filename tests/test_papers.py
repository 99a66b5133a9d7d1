"""PAPERS.md names functions and tests; both must exist."""

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
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
