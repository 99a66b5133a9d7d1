"""The maths answer check: numbers as people write them."""

import json
import os
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.rewards import RewardError, final_number
from rlhf_jax.rewards.math_answer import math_answer
from rlhf_jax.types import RewardInput

ANSWER = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips altogether.\n#### 72"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (ANSWER, "72"),
        ("#### 1,234,567", "1234567"),
        ("#### -3.5", "-3.5"),
        ("#### $1,000.50 dollars", "1000.50"),
        ("#### \u22127", "-7"),
        ("####42", "42"),
        ("#### 5 #### 6", "6"),
        ("#### none", None),
        ("The answer is 12.", "12"),
        ("It is 3,000 and then 4,500.", "4500"),
        ("so 10-3 = 7", "7"),
        ("it drops by 10-3", "3"),
        ("-4 degrees", "-4"),
        ("x = .5", "0.5"),
        ("5.0", "5"),
        ("50%", "50"),
        ("in May1 we had 2", "2"),
        ("1,2,3", "3"),
        ("12,34", "34"),
        ("", None),
        ("no number", None),
    ],
)
def test_final_number(text: str, number: str | None):
    assert final_number(text) == (None if number is None else Decimal(number))


@settings(max_examples=100, deadline=None)
@given(st.decimals(-(10**9), 10**9, allow_nan=False, places=3), st.booleans())
def test_every_number_is_read_back(value: Decimal, commas: bool):
    text = f"{value:,}" if commas else f"{value}"
    assert final_number(f"We get 17 and so\n#### {text}") == value
    assert final_number(f"We get 17 and so {text}.") == value


def _score(responses: list[str], answers: list, **options: object) -> list[float]:
    batch = RewardInput([f"p{n}" for n in range(len(responses))], responses, np.ones(len(responses), bool), {"answer": answers})
    return math_answer(batch, **options).tolist()


def test_scores():
    responses = ["#### 72", "it is 72.0", "#### 71", "", "72 ... #### 7"]
    assert _score(responses, [ANSWER] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert _score(responses, [72] * 5, strict=True, wrong=-1.0) == [1.0, -1.0, -1.0, -1.0, -1.0]
    assert _score(responses, ["72"] * 5, format_bonus=0.25) == [1.25, 1.0, 0.25, 0.0, 0.25]


def test_a_truth_without_a_number_is_an_error_not_a_zero():
    with pytest.raises(RewardError, match="sample 1: no number in column 'answer': 'unknown'; prompt 'p1'"):
        _score(["1", "2"], ["1", "unknown"])
    with pytest.raises(RewardError, match="sample 0: no number in column 'answer': 'None'"):
        _score(["1"], [None])
    with pytest.raises(RewardError, match="no column 'truth'"):
        _score(["1"], ["1"], column="truth")


def test_gsm8k_answers_score_themselves():
    """All of GSM8K where its file is given (RLHF_JAX_GSM8K); three of its forms otherwise."""
    answers = [ANSWER, "He pays 3*400 = $<<3*400=1200>>1,200\n#### 1,200", "It falls to 5-10 = -5\n#### -5"]
    given_file = os.environ.get("RLHF_JAX_GSM8K")
    if given_file:
        answers = [json.loads(line)["answer"] for line in Path(given_file).read_text().splitlines()]
    assert _score(answers, answers) == [1.0] * len(answers)
    finals = [answer.rpartition("#### ")[2] for answer in answers]
    assert _score([f"I think it is {final}." for final in finals], answers) == [1.0] * len(answers)
    assert [final_number(answer) for answer in answers] == [Decimal(final.replace(",", "")) for final in finals]
    assert _score([f"#### {Decimal(final.replace(',', '')) + 1}" for final in finals], answers) == [0.0] * len(answers)
