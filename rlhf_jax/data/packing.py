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


def packed_rows(lengths: np.ndarray, capacity: int) -> int:
    """How many rows `pack` makes, without their lists: millions of sequences cost no memory."""
    room, free, rows = [0] * (capacity + 1), 0, 0  # free tokens -> number of rows with just that many
    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        for _ in range(count):
            fits = free >> length
            left = length + (fits & -fits).bit_length() - 1 if fits else capacity
            rows += not fits
            room[left] -= bool(fits)
            if not room[left]:
                free &= ~(1 << left)
            if left > length:
                room[left - length] += 1
                free |= 1 << (left - length)
    return rows


def padded_fraction(lengths: np.ndarray, rows: int, capacity: int) -> float:
    """Share of a batch's tokens that are padding, for sequences in `rows` rows of `capacity` tokens."""
    return 1.0 - float(lengths.sum()) / (rows * capacity) if rows else 0.0
