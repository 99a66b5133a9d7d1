"""Does the response say things twice?"""

import numpy as np

from rlhf_jax.rewards.check import RewardError
from rlhf_jax.types import RewardInput


def repetition(batch: RewardInput, *, ngram: int = 3, penalty: float = 1.0) -> np.ndarray:
    """-penalty * (1 - distinct n-grams / n-grams) of the response's words; 0 for responses shorter than `ngram` words.

    Returns f32[B] in [-penalty, 0]. Errors: `RewardError` for ngram < 1.
    """
    if ngram < 1:
        raise RewardError(f"reward repetition: ngram = {ngram}: must be at least 1")
    scores = []
    for response in batch.responses:
        words = response.lower().split()
        grams = [tuple(words[at : at + ngram]) for at in range(len(words) - ngram + 1)]
        scores.append(-penalty * (1.0 - len(set(grams)) / len(grams)) if grams else 0.0)
    return np.asarray(scores, np.float32)
