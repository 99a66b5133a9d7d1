"""Does the response match a pattern?"""

import re

import numpy as np

from rlhf_jax.rewards.check import RewardError
from rlhf_jax.types import RewardInput


def regex(batch: RewardInput, *, pattern: str, match: float = 1.0, otherwise: float = 0.0, full: bool = False) -> np.ndarray:
    """`match` where the pattern is found in the response (with `full`: is the whole of it), else `otherwise`.

    Dots match line breaks. Returns f32[B]. Errors: `RewardError` for a pattern that does not compile.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise RewardError(f"reward regex: pattern {pattern!r} is no regular expression: {error}") from None
    test = compiled.fullmatch if full else compiled.search
    return np.asarray([match if test(response) else otherwise for response in batch.responses], np.float32)
