"""The maths answer check: numbers as people write them."""

import json
import os
import time
from decimal import Decimal
from fractions import Fraction
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


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"\boxed{\frac{1}{4}}", "1/4"),
        (r"\boxed{-\dfrac{3}{4}} of 8", "-3/4"),
        (r"so \(\tfrac12\)", "1/2"),
        ("-0.5", "-1/2"),
        ("it is 3/2.", "3/2"),
        ("1 1/2 cups", "3/2"),
        (r"\boxed{x = 1\frac{1}{2}}", "3/2"),
        ("1e-05", "1/100000"),
        (r"\boxed{1{,}000}", "1000"),
        (r"1\,000", "1000"),
        ("1\u202f000", "1000"),
        ("\u7b54\u6848\u662f72", "72"),
        ("\u5171\u970072\u5143", "72"),
        ("__72__", "72"),
        ("...72", "72"),
        ("Rs.72", "72"),
        ("Rs72", "72"),
        ("\u20135", "-5"),
        ("$-5$", "-5"),
        ("5 cm^2", "5"),
        (r"\boxed{5\text{ cm}^2}", "5"),
        (r"\boxed{90^\circ}", "90"),
        ("#### 72 apples (8 boxes)", "72"),
        ("#### $x = 72$", "72"),
        (r"#### **\boxed{72}**", "72"),
        ("#### 72. I hope so", "72"),
        ("#### Step 4: add\n48 + 24 = 72", "72"),
        ("#### 4. Add\n48 + 24 = 72", "72"),
        ("#### Step 3\n\\boxed{72} of 80", "72"),
        (r"#### 3\sqrt{2}", None),
        (r"\boxed{3\sqrt{2}} with 2 roots", None),
        (r"\boxed{\frac{\sqrt{3}}{2}}", None),
        (r"\boxed{(1, 2)}", None),
        (r"\boxed{5\text{ or }6}", None),
        (r"it is \boxed{7", None),
        (r"$3\sqrt{2}$", None),
        (r"\frac{\sqrt{3}}{2}", None),
        (r"2\pi", None),
        ("x^2", None),
        ("10^{5}", None),
        ("x/2", None),
        ("#### 48 + 24", None),
        ("#### 1,2,3", None),
        ("#### 10:30", None),
        ("#### 2x", None),
        ("1/0", None),
        (r"\boxed{5!}", None),
        ("it is 5!", "5"),
        ("\\boxed{3\u00b2}", None),
        ("5 cm\u00b2", "5"),
        ("1\u00bd cups", None),
        ("that makes 1 000 000.", None),
        ("#### 1 000", None),
        ("\u20b9 1,00,000", None),
        ("12,34,567", None),
        ("\u20ac1.000,50", None),
        ("in 2024 100 came", "100"),
        ("a 5 and 100", "100"),
        (r"\boxed{\approx 5}", "5"),
        ("9" * 5000, None),
        ("1e999999999", None),
    ],
)
def test_an_answer_is_one_exact_number_or_none(text: str, number: str | None):
    assert final_number(text) == (None if number is None else Fraction(number))


@pytest.mark.parametrize(
    "part", ["1,", ",111", "1", "#### ", "#### Step 1\n", "\\boxed{", "1/", "1 1/", "\\frac{ ", "1^", "-", "\\text{"]
)
def test_no_text_takes_more_than_linear_time(part: str):
    text = "#### x 1" + part * 20_000
    begin = time.perf_counter()
    final_number(text)
    assert time.perf_counter() - begin < 2.0, "0.1 s at most when this was written; quadratic: minutes"


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


@pytest.mark.parametrize(
    "truth", [r"3\sqrt{2}", r"2\pi", "x^2", "10^{5}", "5 cm^2", "5 or 6", "It is 12 of 20.", "#### 1,00", True]
)
def test_a_truth_that_is_not_one_plain_number_is_an_error(truth: object):
    with pytest.raises(RewardError, match="no number in column 'answer': .* use the reward exact or a function of your own"):
        _score(["#### 2"], [truth])


def test_fractions_are_compared_not_their_last_digits():
    truths = [r"\frac{3}{4}", "1/2", "-1/2", 1e-05, "$1,000.50$", r"so \boxed{\frac{1}{2}} of 3"]
    assert _score([r"\boxed{\frac{1}{4}}", "3/2", "-2", "5", "50", "3"], truths) == [0.0] * 6
    assert _score(["0.75", r"\frac12", "-0.5", "0.00001", "1000.5", "50/100"], truths) == [1.0] * 6


def test_a_heading_earns_no_bonus():
    options = {"strict": True, "format_bonus": 0.25}
    assert _score(["#### Step 4: add\n48 + 24 = 72", "#### 4. Add\nso 72"], [72, 4], **options) == [0.0, 0.0]
    assert _score([r"#### 3\sqrt{2}"], [2], **options) == [0.0]


def test_an_answer_that_was_cut_off_is_wrong():
    batch = RewardInput(["p", "p"], ["#### 7", "#### 7"], np.asarray([True, False]), {"answer": [7, 7]})
    assert math_answer(batch, format_bonus=0.25, wrong=-1.0).tolist() == [1.25, -1.0]
    assert math_answer(batch, format_bonus=0.25, must_finish=False).tolist() == [1.25, 1.25]


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
