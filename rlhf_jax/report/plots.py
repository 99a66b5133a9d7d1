"""Small charts as inline SVG: text in, text out. Colours are classes of style.css, so that one drawing serves light and dark.

A line is told apart three times over: by colour (`tone`), by dashes and marker (`mark`), and by the label at its end.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from rlhf_jax.report.scales import Point, number, smooth, spread, thin, tick_labels, ticks

SMOOTH_FROM = 60  # a line with at least this many points is drawn faint under its moving average
DASHES = ("", "5 3", "1.5 3", "8 3 1.5 3")
READOUTS = 40  # most places where a chart can be read by pointing at it


class Line(NamedTuple):
    """One curve."""

    label: str
    points: Sequence[Point]  # finite, in drawing order
    tone: int = 0  # colour class t0..t7
    mark: int = 0  # dash pattern and marker


class Frame(NamedTuple):
    """Where data coordinates land on the drawing, in pixels."""

    left: float
    top: float
    right: float
    bottom: float
    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return self.left + (value - self.x0) / (self.x1 - self.x0) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.y0) / (self.y1 - self.y0) * (self.bottom - self.top)


def line_chart(
    lines: Sequence[Line],
    *,
    ident: str,
    title: str,
    x_label: str,
    width: int = 340,
    height: int = 208,
    x_whole: bool = False,
    x_zero: bool = False,
    floor: float | None = None,
    ceiling: float | None = None,
    guide: tuple[float, str] | None = None,
    under: Sequence[Line] = (),
    flags: Sequence[tuple[float, float, str]] = (),
    reading: Callable[[float], str] | None = None,
) -> str:
    """Curves with direct labels at their ends.

    Args:
      ident: unique in the page; title: what a screen reader says; x_label: name and unit of the horizontal axis.
      floor, ceiling: values the vertical axis must reach; guide: a level with a name (chance, a target).
      under: thin dotted lines without label, such as a fit; flags: (x, y, words) of points to ring.
      reading: how a position on the horizontal axis is called.
    """
    lines = [line for line in lines if line.points]
    drawn = [line._replace(points=smooth(line.points)) if len(line.points) >= SMOOTH_FROM else line for line in lines]
    ends = [f"{line.label} {number(line.points[-1][1])}".strip() for line in drawn]
    frame, gutter = _frame(lines, ends, width, height, x_zero, floor, ceiling, guide)
    parts = [_grid(frame, x_label, x_whole)]
    if guide is not None:
        y = frame.y(guide[0])
        parts.append(f'<line class="guide" x1="{frame.left:.1f}" x2="{frame.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts += [f'<path class="fit t{line.tone}" d="{_path(thin(line.points), frame)}"/>' for line in under]
    parts += [
        f'<path class="raw t{a.tone}" d="{_path(thin(a.points), frame)}"/>'
        for a, b in zip(lines, drawn, strict=True)
        if a is not b
    ]
    parts += [_curve(line, frame) for line in drawn]
    if guide is not None:
        y = frame.y(guide[0]) - 5
        parts.append(f'<text class="note" x="{frame.right - 4:.1f}" y="{y:.1f}" text-anchor="end">{escape(guide[1])}</text>')
    for at, level, words in flags:
        x, y = frame.x(at), frame.y(level)
        parts.append(f'<circle class="flag" cx="{x:.1f}" cy="{y:.1f}" r="6.5"/>')
        if words:
            parts.append(f'<text class="note" x="{x:.1f}" y="{y + 21:.1f}" text-anchor="middle">{escape(words)}</text>')
    parts.append(_end_labels(drawn, ends, frame, gutter))
    parts.append(_readouts(lines, frame, width, reading or (lambda x: f"{x_label} {number(x)}")))
    return svg("".join(parts), ident=ident, title=title, width=width, height=height)


def reliability_chart(bins: Sequence[tuple[float, float, float, float, float]], *, ident: str, title: str) -> str:
    """Reliability diagram: predicted probability against observed frequency.

    Args:
      bins: (predicted, observed, count, low, high) a bin, low and high the ends of the interval of the observed frequency.
    """
    width, height = 340, 330
    frame = Frame(36, 28, width - 14, height - 38, 0, 1, 0, 1)
    largest = max((count for _, _, count, _, _ in bins), default=1)
    corner = f"M{frame.x(0):.1f} {frame.y(0):.1f}L{frame.x(1):.1f} {frame.y(1):.1f}"
    parts = [_grid(frame, "predicted probability", False), f'<path class="guide" d="{corner}"/>']
    parts.append(f'<text class="note" x="{frame.x(0.97):.1f}" y="{frame.y(0.88):.1f}" text-anchor="end">perfect</text>')
    parts.append(f'<text class="note" x="2" y="{frame.top - 14:.1f}">observed frequency</text>')
    for predicted, observed, count, low, high in bins:
        x, y = frame.x(predicted), frame.y(observed)
        radius = 2.5 + 5.5 * math.sqrt(count / largest)
        parts.append(f'<path class="bar t0" d="M{x:.1f} {frame.y(low):.1f}V{frame.y(high):.1f}"/>')
        parts.append(f'<circle class="dot t0" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>')
        text = f"predicted {predicted:.0%}, observed {observed:.0%} of {count:.0f}"
        parts.append(_readout(x - 11, frame.top, 22, frame.bottom - frame.top, x, frame, [text], width))
    return svg("".join(parts), ident=ident, title=title, width=width, height=height)


def share_bar(share: float, tone: int) -> str:
    """A bar as wide as its share of the cell; the number stands beside it in the table."""
    drawn = f'<rect class="fill t{tone}" width="{max(share, 0.004) * 100:.2f}" height="8" rx="0.6"/>'
    return f'<svg class="share" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">{drawn}</svg>'


def svg(content: str, *, ident: str, title: str, width: int, height: int) -> str:
    """The drawing with its accessible name."""
    head = f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-labelledby="{ident}"'
    return f'{head}><title id="{ident}">{escape(title)}</title>{content}</svg>'


def swatch(tone: int, mark: int) -> str:
    """A piece of a line with its marker, for a legend."""
    dash = f' stroke-dasharray="{DASHES[mark % 4]}"' if DASHES[mark % 4] else ""
    line = f'<path class="line t{tone}"{dash} d="M1 7H33"/>{_marker(17, 7, tone, mark, 3.6)}'
    return f'<svg class="swatch" viewBox="0 0 34 14" aria-hidden="true">{line}</svg>'


def _frame(
    lines: Sequence[Line],
    ends: Sequence[str],
    width: int,
    height: int,
    x_zero: bool,
    floor: float | None,
    ceiling: float | None,
    guide: tuple[float, str] | None,
) -> tuple[Frame, float]:
    xs = [x for line in lines for x, _ in line.points] or [0.0, 1.0]
    ys = [y for line in lines for _, y in line.points] or [0.0, 1.0]
    ys += [value for value in (floor, ceiling, guide[0] if guide else None) if value is not None]
    x0, x1 = (min(0.0, *xs) if x_zero else min(xs)), max(xs)
    if x1 <= x0:
        x0, x1 = x0 - 0.5, x0 + 0.5
    low, high = min(ys), max(ys)
    if 0 < low < 0.25 * high:
        low = 0.0
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 0.5
    y0 = low if low in (0.0, floor) else low - pad
    y1 = high if high == ceiling else high + pad
    gutter = min(max((6.4 * len(text) for text in ends), default=30.0) + 10, 0.34 * width)
    tick_width = 6.6 * max(len(text) for text in tick_labels(ticks(y0, y1)) or ["0"])
    return Frame(tick_width + 9, 24, width - gutter - 2, height - 38, x0, x1, y0, y1), gutter


def _grid(frame: Frame, x_label: str, x_whole: bool) -> str:
    parts = []
    levels = ticks(frame.y0, frame.y1, 4)
    for value, text in zip(levels, tick_labels(levels), strict=True):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{frame.left:.1f}" x2="{frame.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{frame.left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    places = ticks(frame.x0, frame.x1, max(2, int((frame.right - frame.left) / 55)), whole=x_whole)
    for value, text in zip(places, tick_labels(places), strict=True):
        x = frame.x(value)
        parts.append(f'<path class="axis" d="M{x:.1f} {frame.bottom:.1f}v4"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{frame.bottom + 17:.1f}" text-anchor="middle">{text}</text>')
    parts.append(f'<path class="axis" d="M{frame.left:.1f} {frame.bottom:.1f}H{frame.right:.1f}"/>')
    middle = (frame.left + frame.right) / 2
    parts.append(f'<text class="name" x="{middle:.1f}" y="{frame.bottom + 33:.1f}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _path(points: Sequence[Point], frame: Frame) -> str:
    return "M" + "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in points)


def _curve(line: Line, frame: Frame) -> str:
    dash = f' stroke-dasharray="{DASHES[line.mark % 4]}"' if DASHES[line.mark % 4] else ""
    points = thin(line.points)
    parts = []
    if len(points) > 1:
        parts.append(f'<path class="line t{line.tone}"{dash} d="{_path(points, frame)}"/>')
    marked = points if len(points) <= 16 else [points[round(i * (len(points) - 1) / 6)] for i in range(7)]
    parts += [_marker(frame.x(x), frame.y(y), line.tone, line.mark, 2.9) for x, y in marked]
    return "".join(parts)


def _marker(x: float, y: float, tone: int, mark: int, r: float) -> str:
    """Filled circle, ring, square, triangle; after four marks the next marker, so that sixteen differ in dash or marker."""
    mark = (mark + mark // 4) % 4
    if mark == 2:
        return f'<rect class="dot t{tone}" x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r:.1f}" height="{2 * r:.1f}"/>'
    if mark == 3:
        d = f"M{x:.1f} {y - r * 1.2:.1f}l{r * 1.2:.1f} {r * 2.1:.1f}h{-2.4 * r:.1f}z"
        return f'<path class="dot t{tone}" d="{d}"/>'
    return f'<circle class="{"ring" if mark else "dot"} t{tone}" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"/>'


def _end_labels(lines: Sequence[Line], ends: Sequence[str], frame: Frame, gutter: float) -> str:
    """Name and last value beside the end of each line: in the gutter, or where the line ends if that is well before it."""
    groups: dict[int, list[tuple[float, float, int, str]]] = {}  # labels that stand in the same column move apart
    for line, words in zip(lines, ends, strict=True):
        x, y = frame.x(line.points[-1][0]), frame.y(line.points[-1][1])
        early = x + 6.4 * len(words) + 14 < frame.right
        groups.setdefault(round(x / 60) if early else -1, []).append((x if early else frame.right, y, line.tone, words))
    parts = []
    for group in groups.values():
        heights = spread([y for _, y, _, _ in group], 13.5, frame.top + 2, frame.bottom - 2)
        for (x, true_y, tone, words), y in zip(group, heights, strict=True):
            if abs(y - true_y) > 5:
                parts.append(f'<path class="leader" d="M{x + 4:.1f} {true_y:.1f}L{x + 7:.1f} {y:.1f}"/>')
            shown = escape(_fitted(words, gutter if x == frame.right else 1000))
            parts.append(f'<text class="label t{tone}" x="{x + 8:.1f}" y="{y + 4:.1f}">{shown}</text>')
    return "".join(parts)


def _fitted(text: str, room: float) -> str:
    """Shorten the name, never the number behind it."""
    limit = int(room / 6.4)
    if len(text) <= limit:
        return text
    name, _, value = text.rpartition(" ")
    return f"{name[: max(1, limit - len(value) - 2)]}… {value}"


def _readouts(lines: Sequence[Line], frame: Frame, width: int, reading: Callable[[float], str]) -> str:
    """Invisible columns that show their values while the pointer (or a finger) is on them; no script needed."""
    xs = sorted({x for line in lines for x, _ in line.points})
    if len(xs) > READOUTS:
        xs = [xs[round(i * (len(xs) - 1) / (READOUTS - 1))] for i in range(READOUTS)]
    by_x: dict[float, list[str]] = {x: [] for x in xs}
    for line in lines:
        for x, y in line.points:
            if x in by_x:
                by_x[x].append(f"{line.label} {number(y)}".strip())
    parts = []
    for index, x in enumerate(xs):
        left = frame.left if index == 0 else (frame.x(xs[index - 1]) + frame.x(x)) / 2
        right = frame.right if index == len(xs) - 1 else (frame.x(xs[index + 1]) + frame.x(x)) / 2
        texts = [reading(x), *by_x[x]]
        parts.append(_readout(left, 0, right - left, frame.bottom, frame.x(x), frame, texts, width))
    return "".join(parts)


def _readout(x: float, y: float, width: float, height: float, at: float, frame: Frame, texts: list[str], room: int) -> str:
    rows, limit = [texts[0]], int(room / 6.2)
    for text in texts[1:]:
        if len(rows[-1]) + len(text) + 3 <= limit:
            rows[-1] += f" · {text}"
        else:
            rows.append(text)
    drawn = "".join(f'<text class="said" x="2" y="{11 + 13 * i}">{escape(row)}</text>' for i, row in enumerate(rows[:8]))
    hit = f'<rect class="hit" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
    hair = f'<path class="hair" d="M{at:.1f} {frame.top:.1f}V{frame.bottom:.1f}"/>'
    return f'<g class="read">{hit}<g class="show">{hair}{drawn}</g></g>'
