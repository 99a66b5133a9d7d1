"""The embedded tasks: what gold says about reviews, labels with Bradley-Terry noise, sums that can be checked."""

import time

import numpy as np
import pytest

from rlhf_jax.config import Data
from rlhf_jax.data.table import open_sources
from rlhf_jax.data.tasks import TASKS, addition, reviews
from rlhf_jax.errors import UserError
from rlhf_jax.types import RewardInput


def _gold(response: str, prompt: str = "the hotel :", finished: bool = True) -> float:
    return float(reviews.gold([prompt], [response], [finished])[0])


def test_gold_by_hand():
    assert _gold("") == 0.0
    assert _gold("", finished=False) == -1.5
    assert _gold("it was lovely .") == pytest.approx(3 * np.tanh(1 / 3), rel=1e-6)
    assert _gold("it was not lovely .") == pytest.approx(-3 * np.tanh(1 / 3), rel=1e-6)
    assert _gold("it was not awful .") == pytest.approx(3 * np.tanh(1 / 3), rel=1e-6)
    # A second "lovely" is not praise but repetition: sentiment 1 - 1/4.
    assert _gold("it was lovely . the bed was lovely .") == pytest.approx(3 * np.tanh(0.75 / 3) + 0.5, rel=1e-6)
    assert _gold("i liked the pool . the staff was nice .") == pytest.approx(3 * np.tanh(2 / 3) + 1.0, rel=1e-6)
    assert _gold("i liked the coffee .") == pytest.approx(3 * np.tanh(1 / 3) - 0.5, rel=1e-6)
    assert _gold("i liked the coffee .", "the cafe :") == pytest.approx(3 * np.tanh(1 / 3) + 0.5, rel=1e-6)
    assert _gold("the the") == pytest.approx(-0.7, rel=1e-6)
    assert _gold("it was new it was new") == pytest.approx(-0.7, rel=1e-6)
    assert _gold("bed " + "was it " * 9) == pytest.approx(0.5 - 0.1 * 3 - 0.7 * _triples("bed " + "was it " * 9), rel=1e-5)


def _triples(text: str) -> int:
    words = text.split()
    return sum(words[i : i + 3] == words[i + 3 : i + 6] for i in range(len(words) - 5))


def test_reviews_fit_their_vocabulary_and_are_quick():
    start = time.process_time()
    rows, tokenizer = reviews.rows("sft", 0), reviews.tokenizer()
    spent = time.process_time() - start
    assert spent < 1.0, f"{spent:.2f} CPU-seconds"
    assert len(set(reviews.WORDS)) == len(reviews.WORDS) == 56
    lengths = [len(tokenizer.encode(row["completion"])) for row in rows]
    assert max(lengths) + 1 <= reviews.RESPONSE_TOKENS
    assert {len(tokenizer.encode(row["prompt"], start=True)) for row in rows} == {reviews.PROMPT_TOKENS}
    assert not any(3 in tokenizer.encode(row["completion"]) for row in rows[:300])
    assert rows == reviews.rows("sft", 0) != reviews.rows("sft", 1)


def test_the_grammar_leaves_room_to_improve():
    rows = reviews.rows("sft", 0)
    gold = reviews.gold([r["prompt"] for r in rows], [r["completion"] for r in rows], np.ones(len(rows), bool))
    assert 0.1 < gold.mean() < 0.7
    assert gold.std() > 1.0
    assert _gold("i liked the pool . i loved the staff . the bed was superb .") > gold.mean() + 2.5


def test_labels_follow_bradley_terry():
    rng = np.random.default_rng(0)
    a, b = np.full(20_000, 1.0), np.zeros(20_000)
    assert reviews.label_pairs(a, b, rng).mean() == pytest.approx(1 / (1 + np.exp(-1.0)), abs=0.01)
    assert reviews.label_pairs(b, b, rng).mean() == pytest.approx(0.5, abs=0.015)


def test_pairs_prefer_gold_with_noise():
    rows = reviews.rows("preferences", 0)
    ended = np.ones(len(rows), bool)
    prompts = [row["prompt"] for row in rows]
    better, worse = (reviews.gold(prompts, [row[side] for row in rows], ended) for side in ("chosen", "rejected"))
    assert 0.6 < (better > worse).mean() < 0.9
    assert rows == reviews.rows("preferences", 0)


def test_addition():
    sums = addition.rows("sft", 0)
    right = np.mean([row["completion"] == row["answer"] for row in sums])
    assert right == pytest.approx(1 - addition.MISTAKES, abs=0.03)
    assert all(eval_sum(row["prompt"]) == int(row["answer"]) for row in sums)
    assert all(row["chosen"] == row["answer"] != row["rejected"] for row in addition.rows("preferences", 0))
    hard = addition.rows("prompts", 0, digits=4, count=200)
    assert max(len(row["prompt"]) for row in hard) == len("1234+1234=")
    batch = RewardInput(["12+34=", "12+34=", "12+34=", "9+1="], ["46", "46", "45", " 10 "], [True, False, True, True], {})
    assert addition.reward(batch).tolist() == [1.0, 0.0, 0.0, 1.0]


def test_options_of_a_task_are_taken_or_refused():
    sources, _ = open_sources(Data(task="addition", task_options={"digits": 3, "count": 50}), purpose="prompts", seed=1)
    assert sources[0].rows == 50
    assert any(len(sources[0].row(n)["prompt"]) == len("123+123=") for n in range(50))
    for task, options, message in (
        ("addition", {"digit": 3}, "addition takes no option 'digit'; it takes: digits, mistakes, count"),
        ("reviews", {"digits": 3}, "reviews takes no option 'digits'; it takes: none"),
        ("addition", {"digits": "two"}, "data.task_options.digits is 'two'; addition takes ints of at least 0"),
        ("addition", {"mistakes": -1}, "data.task_options.mistakes is -1; addition takes floats of at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            open_sources(Data(task=task, task_options=options), purpose="sft", seed=0)


def eval_sum(prompt: str) -> int:
    a, b = prompt.removesuffix("=").split("+")
    return int(a) + int(b)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_task_rewards_are_reward_functions(name: str):
    task = TASKS[name]
    rows = task.rows("prompts", 0)[:5]
    scores = task.reward(
        RewardInput([row["prompt"] for row in rows], ["", "it was nice .", "46", "?", "the"], np.ones(5, bool), {})
    )
    assert scores.dtype == np.float32
    assert scores.shape == (5,)
