"""Sums such as "7+5=", answered "12": a reward that can be verified, and no reward model.

The fine-tuning data makes mistakes (a share of its answers has one wrong digit), so that PPO has something left to learn.
"""

import functools
from typing import Any

import numpy as np

from rlhf_jax.data.vocabulary import Tokenizer, make_tokenizer
from rlhf_jax.types import RewardInput

SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")
CHARACTERS = "0123456789+="
DIGITS = 1  # of each summand; more is harder
MISTAKES = 0.5
EXAMPLES = 6000


@functools.cache
def tokenizer() -> Tokenizer:
    """One token a character, <bos> in front."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    vocabulary = {word: number for number, word in enumerate([*SPECIALS, *CHARACTERS])}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(SPECIALS))
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return make_tokenizer(backend, {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"})


def _sums(seed: int, count: int, digits: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((seed, 1))
    return rng.integers(10**digits, size=(count, 2)), rng.random((count, 3))


def _wrong(answer: int, draw: np.ndarray) -> str:
    """The answer with one digit replaced by another."""
    text = str(answer)
    at = int(draw[1] * len(text))
    digit = (int(text[at]) + 1 + int(draw[2] * 9)) % 10
    return text[:at] + str(digit) + text[at + 1 :]


def rows(
    purpose: str, seed: int, *, digits: int = DIGITS, mistakes: float = MISTAKES, count: int = EXAMPLES
) -> list[dict[str, Any]]:
    """Rows for a stage: `prompt`, `answer`; and `completion` for SFT, `chosen` (right) and `rejected` (wrong) for preferences."""
    numbers, draws = _sums(seed, count, digits)
    out = []
    for (a, b), draw in zip(numbers.tolist(), draws, strict=True):
        row: dict[str, Any] = {"prompt": f"{a}+{b}=", "answer": str(a + b)}
        if purpose == "sft":
            row["completion"] = _wrong(a + b, draw) if draw[0] < mistakes else str(a + b)
        elif purpose == "preferences":
            row |= {"chosen": str(a + b), "rejected": _wrong(a + b, draw)}
        out.append(row)
    return out


def reward(batch: RewardInput) -> np.ndarray:
    """1 for the right sum, ended; 0 otherwise. The sum is worked out from the prompt. Returns f32[B]."""
    scores = []
    for prompt, response, finished in zip(batch.prompts, batch.responses, batch.finished, strict=True):
        a, _, b = prompt.strip().removesuffix("=").partition("+")
        scores.append(float(bool(finished) and response.strip() == str(int(a) + int(b))))
    return np.asarray(scores, np.float32)
