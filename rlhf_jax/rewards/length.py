"""Is the response as long as it should be?"""

from typing import Any, Literal

import numpy as np

from rlhf_jax.rewards.check import RewardError
from rlhf_jax.types import RewardInput


def length(
    batch: RewardInput,
    *,
    minimum: int = 0,
    maximum: int | None = None,
    per_unit: float = 0.01,
    unit: Literal["words", "characters", "tokens"] = "words",
    tokenizer: Any = None,
) -> np.ndarray:
    """-per_unit * (units below `minimum` or above `maximum`); 0 inside the range.

    Returns f32[B]. Errors: `RewardError` for an unknown unit or an empty range.
    """
    count = {"words": lambda text: len(text.split()), "characters": len, "tokens": lambda text: len(tokenizer.encode(text))}.get(
        unit
    )
    if count is None:
        raise RewardError(f"reward length: unit {unit!r} is none of words, characters, tokens")
    if unit == "tokens" and tokenizer is None:
        raise RewardError("reward length: unit tokens needs a tokenizer; use words or characters")
    if minimum < 0 or (maximum is not None and maximum < minimum):
        raise RewardError(f"reward length: minimum = {minimum}, maximum = {maximum}: need 0 <= minimum <= maximum")
    sizes = np.asarray([count(response) for response in batch.responses], np.float32)
    over = np.maximum(sizes - maximum, 0) if maximum is not None else np.zeros_like(sizes)
    return (-per_unit * (np.maximum(minimum - sizes, 0) + over)).astype(np.float32)
