"""Tasks that come with the package: generated in code, nothing downloaded, a reward that is a function."""

from collections.abc import Callable
from typing import Any, NamedTuple

from rlhf_jax.data.tasks import addition, reviews
from rlhf_jax.data.vocabulary import Tokenizer
from rlhf_jax.types import RewardFn


class Task(NamedTuple):
    tokenizer: Callable[[], Tokenizer]
    rows: Callable[..., list[dict[str, Any]]]  # (purpose, seed, *, options) -> rows as a data file would hold them
    reward: RewardFn  # what is wanted in truth: logged as gold, or trained on where it can be verified


TASKS: dict[str, Task] = {
    "reviews": Task(reviews.tokenizer, reviews.rows, reviews.reward),
    "addition": Task(addition.tokenizer, addition.rows, addition.reward),
}
