"""Several conversations in one row: best fit, longest first (Coffman, Garey and Johnson 1978), deterministic."""

import numpy as np


def pack(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Divide sequences over rows of `capacity` tokens.

    The longest goes first, into the fullest row that still has room; ties by number. Args: lengths i64[N] (tokens, each in
    [1, capacity]). Returns one i64[·] a row, its sequences in increasing order; rows in the order of their first sequence.
    """
    room: dict[int, list[int]] = {}  # free tokens -> rows with just that many, latest last
    free = 0  # bit c set: some row has c free tokens
    rows: list[list[int]] = []
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        fits = free >> length
        if fits:
            left = length + (fits & -fits).bit_length() - 1
            row = room[left].pop()
            if not room[left]:
                free &= ~(1 << left)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(number)
        left -= length
        if left:
            room.setdefault(left, []).append(row)
            free |= 1 << left
    return sorted((np.sort(np.asarray(row, np.int64)) for row in rows), key=lambda row: int(row[0]))


def padded_fraction(lengths: np.ndarray, packs: list[np.ndarray] | None, capacity: int) -> float:
    """Share of a batch's tokens that are padding."""
    rows = len(lengths) if packs is None else len(packs)
    return 1.0 - float(lengths.sum()) / (rows * capacity) if rows else 0.0
