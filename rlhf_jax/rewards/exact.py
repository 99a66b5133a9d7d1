"""Does the response equal the row's answer?"""

import numpy as np

from rlhf_jax.rewards.check import RewardError
from rlhf_jax.types import RewardInput


def exact(
    batch: RewardInput, *, column: str = "answer", right: float = 1.0, wrong: float = 0.0, must_finish: bool = True
) -> np.ndarray:
    """`right` where the response equals the row's `column` up to outer blanks (and ended, with `must_finish`), else `wrong`.

    Returns f32[B]. Errors: `RewardError` for a missing column.
    """
    if column not in batch.columns:
        raise RewardError(
            f"reward exact: the data has no column {column!r} (found: {', '.join(batch.columns) or 'none'}); "
            "set options: {column: <the one with the answer>}"
        )
    answers = [str(answer).strip() for answer in batch.columns[column]]
    same = np.asarray([response.strip() == answer for response, answer in zip(batch.responses, answers, strict=True)], bool)
    ended = np.asarray(batch.finished, bool) | (not must_finish)
    return np.where(same & ended, right, wrong).astype(np.float32)
