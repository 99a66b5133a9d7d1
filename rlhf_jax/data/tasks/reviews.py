"""Small reviews written by a grammar, with a gold reward: Gao et al. 2022 (arXiv:2210.10760) in miniature.

A prompt names a topic ("the hotel :"), an answer is a few sentences about it. The gold reward is a function that training never
sees: it labels pairs, a reward model learns from the pairs, and PPO climbs the model while gold tells the truth.
"""

import functools
import itertools
from typing import Any

import numpy as np

from rlhf_jax.data.vocabulary import Tokenizer, make_tokenizer
from rlhf_jax.types import RewardInput

NOUNS = {
    "hotel": ("room", "bed", "staff", "pool"),
    "cafe": ("coffee", "cake", "waiter", "tea"),
    "film": ("plot", "actor", "music", "ending"),
    "phone": ("screen", "battery", "camera", "case"),
}
TOPICS = tuple(NOUNS)
GOOD = ("good", "great", "lovely", "superb", "nice", "fresh")
BAD = ("bad", "awful", "dull", "broken", "rude", "stale")
PLAIN = ("small", "large", "new", "old")
ADVERBS = ("very", "quite", "really")
LIKED, HATED = ("liked", "loved"), ("hated", "disliked")
SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")
FILLERS = (":", ".", "the", "was", "i", "and", "not", "but", "it")
WORDS = (
    SPECIALS
    + FILLERS
    + TOPICS
    + tuple(noun for nouns in NOUNS.values() for noun in nouns)
    + GOOD
    + BAD
    + PLAIN
    + ADVERBS
    + LIKED
    + HATED
)

PROMPT_TOKENS = 4  # <bos> the hotel :
RESPONSE_TOKENS = 24
DOCUMENTS = 6000
PAIRS = 1024

_SENTIMENT = dict.fromkeys(GOOD + LIKED, 1.0) | dict.fromkeys(BAD + HATED, -1.0)


@functools.cache
def tokenizer() -> Tokenizer:
    """One token a word, <bos> in front; saved as tokenizer.json it loads in transformers."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, processors

    backend = Backend(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))  # noqa: S106
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(SPECIALS))
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return make_tokenizer(backend, {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"})


def documents(seed: int, count: int) -> list[dict[str, Any]]:
    """Reviews as rows (`prompt`, `completion`): two or three sentences, more often unkind than kind."""
    rng = np.random.default_rng((seed, 1))
    topic = rng.integers(len(TOPICS), size=count)
    kindness = rng.choice((0.15, 0.4, 0.6), size=count)
    three = rng.random(count) < 0.5
    joined = rng.random(count) < 0.3
    shape = (count, 4)  # clauses: first, joined to the first, second, third
    kind, noun = rng.integers(3, size=shape), rng.integers(4, size=shape)
    good = rng.random(shape) < kindness[:, None]
    six, four, adverb, two = (rng.integers(high, size=shape) for high in (6, 4, 3, 2))
    plain, with_adverb, negated = (rng.random(shape) < share for share in (0.25, 0.3, 0.12))

    def clause(d: int, c: int) -> str:
        name = NOUNS[TOPICS[topic[d]]][noun[d, c]]
        if kind[d, c] == 1:
            return f"i {(LIKED if good[d, c] else HATED)[two[d, c]]} the {name}"
        quality = PLAIN[four[d, c]] if plain[d, c] else (GOOD if good[d, c] else BAD)[six[d, c]]
        before = "not " if negated[d, c] else f"{ADVERBS[adverb[d, c]]} " if with_adverb[d, c] else ""
        return f"{f'the {name}' if kind[d, c] == 0 else 'it'} was {before}{quality}"

    rows = []
    for d in range(count):
        text = clause(d, 0) + (f" and {clause(d, 1)}" if joined[d] else "") + f" . {clause(d, 2)} ."
        rows.append({"prompt": f"the {TOPICS[topic[d]]} :", "completion": text + (f" {clause(d, 3)} ." if three[d] else "")})
    return rows


def prompts(seed: int, count: int) -> list[dict[str, Any]]:
    """Prompts as rows."""
    topics = np.random.default_rng((seed, 2)).integers(len(TOPICS), size=count)
    return [{"prompt": f"the {TOPICS[topic]} :"} for topic in topics]


def pairs(seed: int, count: int) -> list[dict[str, Any]]:
    """Pairs of reviews of one topic, labelled by gold with Bradley-Terry noise, as rows (`prompt`, `chosen`, `rejected`)."""
    by_topic: dict[str, list[str]] = {}
    for row in documents(seed + 7919, 3 * count + 16 * len(TOPICS)):
        by_topic.setdefault(row["prompt"], []).append(row["completion"])
    rng = np.random.default_rng((seed, 3))
    out = []
    for number in range(count):
        prompt = f"the {TOPICS[number % len(TOPICS)]} :"
        a, b = rng.choice(len(by_topic[prompt]), 2, replace=False)
        out.append((prompt, by_topic[prompt][a], by_topic[prompt][b]))
    names, first, second = ([row[column] for row in out] for column in range(3))
    ended = np.ones(count, bool)
    better = label_pairs(gold(names, first, ended), gold(names, second, ended), rng)
    return [
        {"prompt": name, "chosen": a if wins else b, "rejected": b if wins else a}
        for name, a, b, wins in zip(names, first, second, better, strict=True)
    ]


def rows(purpose: str, seed: int) -> list[dict[str, Any]]:
    """The task's data set for a stage."""
    if purpose == "sft":
        return documents(seed, DOCUMENTS)
    return pairs(seed, PAIRS) if purpose == "preferences" else prompts(seed, DOCUMENTS)


def gold(prompts: list[str], responses: list[str], finished: Any) -> np.ndarray:
    """The annotator: 3 tanh(sentiment/3) + on-topic nouns/2 - off-topic/2 - 0.7 repetitions - 1.5 unfinished - 0.1 words over 16.

    Sentiment counts each distinct word once (a repeated one costs 1/4) and knows "not". On-topic nouns count up to three.
    Args: prompts, responses (texts), finished bool[B]. Returns f32[B], reward units.
    """
    scores = [_gold_one(p, r.split(), bool(f)) for p, r, f in zip(prompts, responses, np.asarray(finished), strict=True)]
    return np.asarray(scores, np.float32)


def _gold_one(prompt: str, words: list[str], finished: bool) -> float:
    topic = next((word for word in prompt.split() if word in NOUNS), None)
    seen: set[str] = set()
    sentiment = 0.0
    for at, word in enumerate(words):
        value = _SENTIMENT.get(word)
        if value is None:
            continue
        if at and words[at - 1] == "not":
            value = -value
        sentiment += -0.25 if word in seen else value
        seen.add(word)
    own = set(NOUNS.get(topic or "", ()))
    off = sum(word not in own and any(word in nouns for nouns in NOUNS.values()) for word in words)
    repeated = sum(a == b for a, b in itertools.pairwise(words))
    repeated += sum(words[at : at + 3] == words[at + 3 : at + 6] for at in range(len(words) - 5))
    return (
        3.0 * float(np.tanh(sentiment / 3.0))
        + 0.5 * min(len(own & set(words)), 3)
        - 0.5 * off
        - 0.7 * repeated
        - (0.0 if finished else 1.5)
        - 0.1 * max(0, len(words) - 16)
    )


def label_pairs(gold_a: np.ndarray, gold_b: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Which answer a noisy annotator prefers: P(a) = sigmoid(gold_a - gold_b) (Bradley and Terry 1952). Returns bool[B]."""
    difference = np.asarray(gold_a, np.float64) - np.asarray(gold_b, np.float64)
    return rng.random(difference.shape) < 1.0 / (1.0 + np.exp(-difference))


def reward(batch: RewardInput) -> np.ndarray:
    """`gold` as a reward function."""
    return gold(batch.prompts, batch.responses, batch.finished)
