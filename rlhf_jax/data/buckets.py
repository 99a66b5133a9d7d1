"""Prompts of similar length come in the same batch, so that little of it is padding: a few widths, each its own stream of rows.

Every shape is another compiled program, so there are few widths, and they are the ones that leave the least padding. Which
width a step has is a function of (seed, step), drawn in proportion to the rows that have it.
"""

from typing import NamedTuple

import numpy as np

from rlhf_jax.config import STAGES, OnlineRun, ReMaxRun
from rlhf_jax.data import order

ROUND = 8  # widths are multiples of it
MOST = 16  # widths


class Bucket(NamedTuple):
    """Prompts of one width."""

    width: int  # tokens
    share: float  # of all draws
    rows: tuple[np.ndarray, ...]  # of each source, i64[·]: positions among its training rows
    weights: tuple[float, ...]  # of the sources in this bucket


def programs(run: OnlineRun, count: int) -> int:
    """Programs that a run compiles with `count` widths.

    One copies weights for decoding; each width has a rollout, a scoring and an update, with a reward model and a greedy baseline
    one more each; where prompts have several answers, evaluation has a rollout of its own.
    """
    of_width = 3 + (run.reward.model is not None) + isinstance(run, ReMaxRun)
    return 1 + count * of_width + (_answers(run) > 1)


def _answers(run: OnlineRun) -> int:
    """Answers to a prompt."""
    stage = next(name for name, cls in STAGES.items() if cls is type(run))
    return getattr(getattr(run, stage), "group_size", 1)


def prompts_of_a_step(run: OnlineRun) -> int:
    return run.batch_size // _answers(run)


def rounded(lengths: np.ndarray, limit: int) -> np.ndarray:
    """Lengths i64[N] -> the width i64[N] that each would have by itself: a multiple of 8, at most `limit`."""
    return np.minimum(-(-lengths // ROUND) * ROUND, limit)


def widths(lengths: np.ndarray, draws: np.ndarray, count: int, least: int) -> list[int]:
    """At most `count` widths with the least padding on average, each for at least `least` of the lengths: dynamic programming.

    Args: lengths i64[N], multiples of 8; draws f64[N], how often each is drawn. Returns increasing widths; the last is the
    longest length.
    """
    values, which = np.unique(lengths, return_inverse=True)
    weight = np.concatenate([[0.0], np.cumsum(np.bincount(which, draws))])
    rows = np.concatenate([[0], np.cumsum(np.bincount(which))])
    size = len(values)
    cost = np.full((count + 1, size + 1), np.inf)
    cost[0, 0] = 0.0
    cut = np.zeros((count + 1, size + 1), np.int64)
    for used in range(1, count + 1):
        for end in range(1, size + 1):
            slots = cost[used - 1, :end] + (weight[end] - weight[:end]) * values[end - 1]
            slots = np.where(rows[end] - rows[:end] >= least, slots, np.inf)
            cut[used, end] = int(np.argmin(slots))
            cost[used, end] = slots[cut[used, end]]
    used, end, found = int(np.argmin(cost[:, size])), size, []
    while end:
        found.append(int(values[end - 1]))
        end = int(cut[used, end])
        used -= 1
    return found[::-1]


def make_buckets(
    lengths: list[np.ndarray], weights: tuple[float, ...], *, count: int, limit: int, least: int
) -> tuple[Bucket, ...]:
    """Divide the rows of every source over at most `count` widths.

    Args: lengths, one i64[·] a source; weights of the sources; limit, the longest width; least, rows that a bucket must have.
    """
    own = [rounded(part, limit) for part in lengths]
    shares = np.asarray(weights, np.float64) / sum(weights)
    draws = [np.full(len(part), share / max(len(part), 1)) for part, share in zip(own, shares, strict=True)]
    found, low = [], 0
    for width in widths(np.concatenate(own), np.concatenate(draws), count, least):
        inside = [np.flatnonzero((part > low) & (part <= width)) for part in own]
        share = [float(draw[rows].sum()) for draw, rows in zip(draws, inside, strict=True)]
        found.append(Bucket(width, sum(share), tuple(inside), tuple(share)))
        low = width
    return tuple(found)


def draw(buckets: tuple[Bucket, ...], seed: int, step: int, batch_size: int) -> tuple[int, list[tuple[int, int]]]:
    """The bucket of a step, and source and training row of every prompt of its batch: a function of (seed, step).

    In the stream of every bucket each of its rows comes once an epoch, as without buckets.
    """
    number, turn = order.turn(seed, step, tuple(bucket.share for bucket in buckets))
    bucket, own = buckets[number], order.derived(seed, number)
    some = [source for source, rows in enumerate(bucket.rows) if len(rows)]
    sizes = tuple(len(bucket.rows[source]) for source in some)
    if len(some) == 1:
        return number, [(some[0], int(bucket.rows[some[0]][row])) for row in order.indices(own, turn, batch_size, sizes[0])]
    which, rows = order.mixture(own, turn, batch_size, sizes, tuple(bucket.weights[source] for source in some))
    return number, [(some[w], int(bucket.rows[some[w]][row])) for w, row in zip(which, rows, strict=True)]


def padded_fraction(buckets: tuple[Bucket, ...], lengths: list[np.ndarray], answer: int = 0) -> float:
    """Share of the prompts' tokens that are padding, over everything that is drawn; with `answer` tokens after each prompt."""
    real = padded = 0.0
    for bucket in buckets:
        for rows, weight, own in zip(bucket.rows, bucket.weights, lengths, strict=True):
            real += weight * float(own[rows].mean()) if len(rows) else 0.0
        padded += bucket.share * bucket.width
    return 1.0 - (real + answer) / (padded + answer)
