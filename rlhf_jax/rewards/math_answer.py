"""Is the final number right? For answers in GSM8K's form (Cobbe et al. 2021, arXiv:2110.14168): "… #### 72"."""

import numpy as np

from rlhf_jax.rewards.check import RewardError, shorten
from rlhf_jax.rewards.numerals import read, sole_number
from rlhf_jax.types import RewardInput


def math_answer(
    batch: RewardInput,
    *,
    column: str = "answer",
    right: float = 1.0,
    wrong: float = 0.0,
    format_bonus: float = 0.0,
    strict: bool = False,
    must_finish: bool = True,
) -> np.ndarray:
    """`right` where the response's final number equals that of the row's `column`, else `wrong`; compared as exact fractions.

    `format_bonus` is added where "####" is followed by a number. With `strict` only a number after "####" counts. With
    `must_finish` a response that did not end is `wrong`, without bonus: "#### 7" may be the beginning of "#### 72".
    Returns f32[B]. Errors: `RewardError` for a missing column, or one that does not hold one number.
    """
    if column not in batch.columns:
        raise RewardError(
            f"reward math_answer: the data has no column {column!r} (found: {', '.join(batch.columns) or 'none'}); "
            "set options: {column: <the one with the answer>}"
        )
    scores = np.zeros(len(batch.responses), np.float32)
    for index, (response, wanted) in enumerate(zip(batch.responses, batch.columns[column], strict=True)):
        truth = sole_number(wanted)
        if truth is None:
            raise RewardError(
                f"reward math_answer: sample {index}: no number in column {column!r}: {shorten(str(wanted))}; "
                f"prompt {shorten(batch.prompts[index])}; a row needs one plain number or fraction (after '####' where there is "
                "text before it): mend or drop the row, or use the reward exact or a function of your own"
            )
        value, marked = read(response) if batch.finished[index] or not must_finish else (None, False)
        correct = value == truth and (marked or not strict)
        scores[index] = (right if correct else wrong) + (format_bonus if marked and value is not None else 0.0)
    return scores
