"""Is the final number right? For answers in GSM8K's form (Cobbe et al. 2021, arXiv:2110.14168): "… #### 72"."""

import re
from decimal import Decimal, InvalidOperation

import numpy as np

from rlhf_jax.rewards.check import RewardError, shorten
from rlhf_jax.types import RewardInput

# A sign counts only where it cannot be a subtraction; thousands are grouped by commas; a decimal point needs a digit after it.
_NUMBER = re.compile(r"(?<![\w.])[-\u2212]?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])[-\u2212]?\$?\.\d+")
_MARK = "####"


def final_number(text: str) -> Decimal | None:
    """The number after the last "####", else the last number of the text; None where there is none.

    Commas, a currency sign and a trailing full stop or per cent sign are ignored.
    """
    _, mark, tail = text.rpartition(_MARK)
    if mark:
        first = _NUMBER.search(tail)
        return None if first is None else _decimal(first.group())
    found = _NUMBER.findall(text)
    return _decimal(found[-1]) if found else None


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("$", "").replace("\u2212", "-"))
    except InvalidOperation:
        return None


def math_answer(
    batch: RewardInput,
    *,
    column: str = "answer",
    right: float = 1.0,
    wrong: float = 0.0,
    format_bonus: float = 0.0,
    strict: bool = False,
) -> np.ndarray:
    """`right` where the response's final number equals that of the row's `column`, else `wrong`.

    `format_bonus` is added where "####" is followed by a number. With `strict` only a number after "####" counts.
    Returns f32[B]. Errors: `RewardError` for a missing column, or one without a number.
    """
    if column not in batch.columns:
        raise RewardError(
            f"reward math_answer: the data has no column {column!r} (found: {', '.join(batch.columns) or 'none'}); "
            "set options: {column: <the one with the answer>}"
        )
    scores = np.zeros(len(batch.responses), np.float32)
    for index, (response, wanted) in enumerate(zip(batch.responses, batch.columns[column], strict=True)):
        truth = final_number(str(wanted)) if wanted is not None else None
        if truth is None:
            raise RewardError(
                f"reward math_answer: sample {index}: no number in column {column!r}: {shorten(str(wanted))}; "
                f"prompt {shorten(batch.prompts[index])}"
            )
        formatted = _MARK in response and final_number(response) is not None
        given = final_number(response) if formatted or not strict else None
        scores[index] = (right if given == truth else wrong) + (format_bonus if formatted else 0.0)
    return scores
