"""Numbers on their way to a drawing: rounded for people, thinned, smoothed, moved apart."""

import math
from collections.abc import Sequence

import numpy as np

Point = tuple[float, float]
DRAWN = 240  # most points of one drawn line


def number(value: float | None) -> str:
    """A value for people: three digits, a real minus sign, k and M above ten thousand."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if value == int(value) and size < 1e4:
        text = f"{value:.0f}"
    elif size >= 1e4:
        unit, name = (1e9, "G") if size >= 1e9 else (1e6, "M") if size >= 1e6 else (1e3, "k")
        text = f"{value / unit:.3g}{name}"
    elif size >= 100:
        text = f"{value:.0f}"
    elif size >= 10:
        text = f"{value:.1f}"
    elif size >= 0.1:
        text = f"{value:.2f}"
    elif size >= 1e-3:
        text = f"{value:.2g}"
    else:
        text = f"{value:.1e}".replace("e-0", "e-")
    return text.replace("-", "−")


def ticks(low: float, high: float, count: int = 4, whole: bool = False) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten) within [low, high]."""
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= rough * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The same number of decimals on every tick; k, M, G or a power of ten where numbers would be long."""
    if len(values) < 2:
        return [number(value) for value in values]
    largest, step = max(abs(value) for value in values), abs(values[1] - values[0])
    scale, suffix = 1.0, ""
    if 1e4 <= largest < 1e12:
        scale, suffix = next((size, name) for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if largest >= size)
    elif largest >= 1e12 or largest < 1e-3:
        exponent = math.floor(math.log10(largest))
        scale, suffix = 10.0**exponent, f"e{exponent}"
    size = step / scale
    decimals = next((d for d in range(9) if abs(round(size, d) - size) < 1e-6 * size), 9)
    shown = [f"{round(value / scale, decimals) + 0.0:.{decimals}f}" for value in values]
    return [(text + suffix if float(text) or not suffix else "0").replace("-", "−") for text in shown]


def thin(points: Sequence[Point], limit: int = DRAWN) -> list[Point]:
    """At most about `limit` points; every bucket keeps its lowest and highest one, so that no spike is lost."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / (limit // 2))
    kept: list[Point] = []
    for begin in range(0, len(points), size):
        bucket = range(begin, min(begin + size, len(points)))
        ends = {min(bucket, key=lambda i: points[i][1]), max(bucket, key=lambda i: points[i][1])}
        if begin == 0:
            ends.add(0)
        if bucket[-1] == len(points) - 1:
            ends.add(bucket[-1])
        kept += [points[i] for i in sorted(ends)]
    return kept


def smooth(points: Sequence[Point]) -> list[Point]:
    """Moving average of the values over a tenth of the points around each, over fewer at the ends."""
    index, half = np.arange(len(points)), max(1, len(points) // 20)
    averages = window_means([y for _, y in points], np.maximum(0, index - half), np.minimum(len(points), index + half + 1))
    return [(x, y) for (x, _), y in zip(points, averages.tolist(), strict=True)]


def window_means(values: Sequence[float] | np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The mean of values[low:high], for every pair of bounds; in time linear in the values."""
    with np.errstate(over="ignore", invalid="ignore"):
        sums = np.concatenate(([0.0], np.cumsum(values)))
        return (sums[high] - sums[low]) / (high - low)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, at least `gap` apart and within [low, high] when there is room."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    cursor = low
    for index in order:
        placed[index] = max(wanted[index], cursor)
        cursor = placed[index] + gap
    ceiling = high
    for index in reversed(order):
        placed[index] = max(min(placed[index], ceiling), low)
        ceiling = placed[index] - gap
    return placed
