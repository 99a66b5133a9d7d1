"""How sure a number is, and what it would be under another way of sampling: statistics of an evaluation. NumPy only."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float
    count: int  # observations


def wilson(successes: float, count: int, *, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a proportion; holds its level near 0 and 1, where the normal one has length zero.

        centre = (k + z^2/2) / (n + z^2),  half width = z / (n + z^2) * sqrt(k (n - k) / n + z^2 / 4)

    Args:
      successes: k, may be fractional (ties count half); count: n, observations; confidence: level of the interval.
    Returns:
      Interval; of no observation: the whole [0, 1] around NaN.
    Raises:
      ValueError: 0 <= successes <= count does not hold.
    Source: Wilson 1927; Brown, Cai and DasGupta 2001.
    """
    if not 0 <= successes <= count:
        raise ValueError(f"successes is {successes} of {count} observations; it must lie between 0 and the count")
    z = _normal_quantile(confidence)
    if count == 0:
        return Interval(math.nan, 0.0, 1.0, 0)
    centre = (successes + z**2 / 2) / (count + z**2)
    half = z / (count + z**2) * math.sqrt(successes * (count - successes) / count + z**2 / 4)
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == count else min(1.0, centre + half)
    return Interval(successes / count, low, high, count)


def bootstrap(
    values: ArrayLike,
    statistic: Callable[[Array], Array] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over the rows of `values`: rows are drawn with replacement, the statistic taken again.

    Args:
      values: f64[n] or f64[n, ...]: one row an independent observation (a prompt, not a sample of a prompt).
      statistic: f64[m, n, ...] -> f64[m], over axis 1; default: mean over everything but the resamples.
      confidence: level; resamples: m; seed: of the draws, so that the same data give the same interval.
    Raises:
      ValueError: no rows, or a value that is not finite.
    Source: Efron 1979; the percentile form.
    """
    data = _finite("values", values)
    if data.ndim < 1 or not len(data):
        raise ValueError("values has no rows; an interval needs at least one observation")
    of = statistic or (lambda drawn: drawn.reshape(len(drawn), -1).mean(axis=1))
    rng = np.random.default_rng(seed)
    estimates = []
    per_block = max(1, 4_000_000 // max(1, data.size))  # bounds the memory of a block of resamples
    for begin in range(0, resamples, per_block):
        rows = rng.integers(0, len(data), size=(min(per_block, resamples - begin), len(data)))
        estimates.append(of(data[rows]))
    low, high = np.quantile(np.concatenate(estimates), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(of(data[None])[0]), float(low), float(high), len(data))


def pass_at_k(samples: ArrayLike, correct: ArrayLike, k: int) -> Array:
    """Probability that at least one of k samples is correct, estimated without bias from n >= k samples of a problem.

        pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n - c + 1}^{n} (1 - k / i)

    Args:
      samples: int[problems] or int, n, samples drawn; correct: int[problems], c, correct ones among them; k: budget.
    Returns:
      f64[problems]; its mean, with `bootstrap` over problems, is the figure to report.
    Raises:
      ValueError: k < 1, n < k, or c outside [0, n].
    Source: Chen et al. 2021 (arXiv:2107.03374), equation 1.
    """
    right = np.asarray(correct, np.int64)
    drawn = np.broadcast_to(np.asarray(samples, np.int64), right.shape)
    if k < 1 or (drawn < k).any():
        raise ValueError(f"k is {k} with as few as {drawn.min(initial=k)} samples of a problem; pass@k needs 1 <= k <= samples")
    if (right < 0).any() or (right > drawn).any():
        raise ValueError("correct must lie between 0 and the number of samples of the same problem")
    wrong = drawn - right
    factors = [1.0 - np.prod(1.0 - k / np.arange(w + 1, n + 1)) for w, n in zip(wrong.flat, drawn.flat, strict=True)]
    return np.asarray(factors, np.float64).reshape(right.shape)


def shares(values: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Mean over prompts of a share in [0, 1], such as pass@k; Wilson interval with one observation a prompt.

    Exact where the shares are 0 or 1; conservative where a prompt has several answers, because a variable in [0, 1] with mean p
    has a variance of at most p (1 - p). Unlike a bootstrap it has a length where all prompts fail.
    Raises:
      ValueError: a share is not finite, or outside [0, 1].
    """
    found = _finite("values", values)
    if found.ndim != 1 or not ((found >= 0) & (found <= 1)).all():
        raise ValueError("values must be one share in [0, 1] a prompt")
    return wilson(float(found.sum()), len(found), confidence=confidence)


def win_rate(scores_a: ArrayLike, scores_b: ArrayLike, *, tie_margin: float = 0.0, confidence: float = 0.95) -> Interval:
    """Share of pairs of answers to the same prompt of which A's scores higher; a tie counts half. Interval as of `shares`.

    Args:
      scores_a f64[prompts] or f64[prompts, m], scores_b the same with n: reward units; every answer of A meets every one of B.
      tie_margin: reward units; scores that differ by no more than this are a tie.
    Raises:
      ValueError: the prompts are not as many, or a score is not finite.
    """
    a, b = _finite("scores_a", scores_a), _finite("scores_b", scores_b)
    if a.ndim not in (1, 2) or a.ndim != b.ndim or len(a) != len(b):
        raise ValueError(f"scores have shapes {a.shape} and {b.shape}; a win rate compares answers to the same prompts")
    gap = a.reshape(len(a), -1, 1) - b.reshape(len(b), 1, -1)
    return shares(np.where(np.abs(gap) <= tie_margin, 0.5, gap > 0).mean((1, 2)), confidence=confidence)


def best_of_n(selected_by: ArrayLike, n: int, reward: ArrayLike | None = None) -> Array:
    """Expected reward of the best of n samples, without bias from m >= n samples of a prompt.

        sum_{i = n}^{m} C(i - 1, n - 1) / C(m, n) * r_(i),   r_(i): reward of the sample with the i-th lowest selecting score

    Equal selecting scores share the mean of their rewards, so that the order of the samples never counts.
    Args:
      selected_by: f64[prompts, m], reward units: the score that picks the best one (the proxy).
      n: samples that best-of-n would draw; reward: f64[prompts, m], what the picked one is worth (gold); default: the score.
    Returns:
      f64[prompts].
    Raises:
      ValueError: n outside [1, m], shapes differ, or a value is not finite.
    Source: Nakano et al. 2021 (arXiv:2112.09332), appendix I.
    """
    scores = _finite("selected_by", selected_by)
    worth = scores if reward is None else _finite("reward", reward)
    if scores.ndim != 2 or worth.shape != scores.shape:
        raise ValueError(f"shapes are {scores.shape} and {worth.shape}; both must be [prompts, samples]")
    m = scores.shape[1]
    if not 1 <= n <= m:
        raise ValueError(f"n is {n} with {m} samples of each prompt; best-of-n needs 1 <= n <= samples")
    ranks = np.arange(1, m + 1)
    log_choose = [_log_choose(i - 1, n - 1) - _log_choose(m, n) if i >= n else -math.inf for i in ranks]
    weights = np.exp(np.asarray(log_choose))
    order = np.argsort(scores, axis=1, kind="stable")
    return np.asarray([_tied(s[o], w[o]) @ weights for s, w, o in zip(scores, worth, order, strict=True)], np.float64)


def best_of_n_kl(n: int) -> float:
    """KL of the best-of-n distribution to the policy it samples from, in nats: log n - (n - 1) / n.

    Exact for continuous scores; an upper bound where samples or scores repeat (Beirami et al. 2024, arXiv:2401.01879).
    Source: Stiennon et al. 2020 (arXiv:2009.01325), appendix G.3.
    """
    if n < 1:
        raise ValueError(f"n is {n}; best-of-n needs at least one sample")
    return math.log(n) - (n - 1) / n


def _tied(ordered_scores: Array, ordered_worth: Array) -> Array:
    """Worth in score order, averaged within runs of equal scores."""
    _, group, counts = np.unique(ordered_scores, return_inverse=True, return_counts=True)
    return (np.bincount(group, weights=ordered_worth) / counts)[group]


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _normal_quantile(confidence: float) -> float:
    from statistics import NormalDist

    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie strictly between 0 and 1, such as 0.95")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _finite(name: str, values: ArrayLike) -> Array:
    array = np.asarray(values, np.float64)
    if not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"{name}[{', '.join(map(str, where))}] is not finite; drop or repair it: a statistic over it is none")
    return array
