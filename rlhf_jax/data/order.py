"""Which rows a step reads: a pure function of (seed, step), so that resuming needs no state and hosts cannot disagree.

Every epoch is one permutation of the rows and epochs follow one another without a gap: position p of the stream is row
perm_e(p mod rows) of epoch e = p div rows. The permutation is a keyed Feistel network over the next power of four, walked along
its cycle until it lands on a row (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): O(batch) time, no memory,
and integer arithmetic only, so the order is the same on every machine and with every version of numpy.
"""

import numpy as np

from rlhf_jax.errors import UserError

BLOCK = 4096  # draws after which every source of a mixture has had its exact share
_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 0xFFFFFFFFFFFFFFFF


def mix(values: np.ndarray) -> np.ndarray:
    """Scramble u64[...] -> u64[...]: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _key(*parts: int) -> int:
    """One 64-bit key from several integers; the order of the integers matters."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = mix((key + np.uint64(_GOLDEN)) ^ np.uint64(part & _WORD))
    return int(key[0])


def permute(positions: np.ndarray, rows: int, key: int) -> np.ndarray:
    """Where a keyed permutation of range(rows) sends each position: i64[...] in [0, rows) -> i64[...]."""
    if rows <= 1:
        return np.zeros_like(positions)
    half = max(1, ((rows - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    keys = [np.uint64(_key(key, number)) for number in range(_ROUNDS)]

    def network(values: np.ndarray) -> np.ndarray:
        left, right = values >> np.uint64(half), values & low
        for round_key in keys:
            left, right = right, left ^ (mix(right + round_key) & low)
        return (left << np.uint64(half)) | right

    result = network(positions.astype(np.uint64))
    outside = np.flatnonzero(result >= rows)
    while outside.size:
        result[outside] = network(result[outside])
        outside = outside[result[outside] >= rows]
    return result.astype(np.int64)


def _rows(positions: np.ndarray, rows: int, seed: int, stream: int) -> np.ndarray:
    """Rows at positions i64[B] of the endless stream of one source."""
    epochs, within = np.divmod(positions, rows)
    out = np.empty_like(within)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = permute(within[here], rows, _key(seed, stream, int(epoch)))
    return out


def _require(step: int, batch_size: int, rows: int) -> None:
    if step < 0 or batch_size < 1:
        raise ValueError(f"step = {step} and batch_size = {batch_size}: need step >= 0 and batch_size >= 1")
    if rows < 1:
        raise UserError("a data set has 0 rows: nothing to draw a batch from; check the file and its filters")


def indices(seed: int, step: int, batch_size: int, rows: int) -> np.ndarray:
    """Rows of the batch of one step: positions step*B .. (step+1)*B - 1 of the stream of epochs.

    Args: seed and step; batch_size B (rows); rows of the data set. Returns i64[B]. In every epoch each row comes once; a batch
    that spans the end of an epoch may hold a row twice. Errors: `UserError` for no rows.
    """
    _require(step, batch_size, rows)
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    return _rows(positions, rows, seed, 0)


def _shares(weights: tuple[float, ...]) -> np.ndarray:
    """Draws of each source in a block of BLOCK: i64[S], at least one, sum BLOCK (largest remainders)."""
    values = np.asarray(weights, np.float64)
    if values.size == 0 or not np.all(np.isfinite(values)) or np.any(values <= 0):
        raise UserError(f"data.sources: weights {list(weights)} must be positive and finite; remove a source to give it no share")
    exact = values / values.sum() * BLOCK
    shares = np.maximum(np.floor(exact).astype(np.int64), 1)
    while shares.sum() != BLOCK:
        gap = exact - shares
        if shares.sum() < BLOCK:
            shares[int(np.argmax(gap))] += 1
        else:
            shares[int(np.argmin(np.where(shares > 1, gap, np.inf)))] -= 1
    return shares


def _turns(positions: np.ndarray, seed: int, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which source has each position of a mixed stream, and how many draws it had before: both i64[B]."""
    edges = np.cumsum(shares)
    source, draw = np.empty_like(positions), np.empty_like(positions)
    blocks = positions // BLOCK
    for block in np.unique(blocks):
        slots = np.arange(BLOCK, dtype=np.int64)
        order = permute(slots, BLOCK, _key(seed, 1 << 32, int(block)))
        of_slot = np.searchsorted(edges, order, side="right")
        one_hot = of_slot[:, None] == np.arange(len(shares))
        before = np.cumsum(one_hot, axis=0)[slots, of_slot] - 1
        here = blocks == block
        slot = positions[here] - block * BLOCK
        source[here] = of_slot[slot]
        draw[here] = block * shares[of_slot[slot]] + before[slot]
    return source, draw


def turn(seed: int, step: int, weights: tuple[float, ...]) -> tuple[int, int]:
    """Which of several streams has a step as a whole, and how many steps it had before."""
    stream, before = _turns(np.asarray([step], np.int64), derived(seed, -1), _shares(weights))
    return int(stream[0]), int(before[0])


def derived(seed: int, number: int) -> int:
    """A seed of its own for stream `number` of a run."""
    return _key(seed, 1 << 33, number)


def mixture(
    seed: int, step: int, batch_size: int, rows: tuple[int, ...], weights: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Source and row of every entry of a batch drawn from several sources.

    The stream is cut in blocks of 4096 draws; in each, source s has round(4096 w_s / sum w) draws in an order permuted by
    (seed, block). A source's own draws run through its epochs as in `indices`.

    Args: rows and weights, one number a source. Returns (source i64[B], row i64[B]).
    """
    for count in rows:
        _require(step, batch_size, count)
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    source, draw = _turns(positions, seed, _shares(weights))
    row = np.empty(batch_size, np.int64)
    for number, count in enumerate(rows):
        mine = source == number
        row[mine] = _rows(draw[mine], count, seed, number)
    return source, row
