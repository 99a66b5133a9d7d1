"""Every host reward passes here: a number that is not one stops the run by name, and never becomes 0."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.errors import UserError


class RewardError(UserError):
    """A reward that failed, came too late, or is not one finite number a sample."""


def checked(values: Any, count: int, name: str, prompts: Sequence[str]) -> np.ndarray:
    """Rewards as f32[B], or a `RewardError` that names the reward, the sample and its prompt.

    Args: values, what a reward function returned (a sequence or array of B numbers); count B; name of the reward; prompts [B].
    """
    if values is None:
        raise RewardError(f"reward {name}: returned None; return one number for each of the {count} samples")
    if isinstance(values, str | bytes | dict | set | frozenset) or not hasattr(values, "__len__"):
        raise RewardError(f"reward {name}: returned {type(values).__name__}; return a list or array of {count} numbers")
    if len(values) != count:
        raise RewardError(
            f"reward {name}: returned {len(values)} values for {count} samples; return one number a sample, in order"
        )
    out = np.zeros(count, np.float32)
    for index, value in enumerate(values):
        problem = _problem(value)
        if problem:
            raise RewardError(
                f"reward {name}: sample {index} got {problem}, prompt {shorten(prompts[index])}; "
                "return a finite number for every sample (a failure must be raised, not scored)"
            )
        out[index] = float(value)
    return out


def _problem(value: Any) -> str | None:
    if value is None or isinstance(value, str | bytes):
        return repr(value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return f"{type(value).__name__} {value!r}"[:80]
    with np.errstate(over="ignore"):
        return None if np.isfinite(np.float32(number)) else repr(number)


def shorten(text: str, width: int = 80) -> str:
    """A text as one short quoted line, for messages."""
    return repr(text if len(text) <= width else text[: width - 1] + "…")
