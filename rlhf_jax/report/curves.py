"""Gold against proxy, and the learning curves of every stage."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.report.data import StageRun, by_stage, ends, evaluations, is_number, mean, text
from rlhf_jax.report.plots import Line, line_chart
from rlhf_jax.report.scales import number, smooth, window_means


class Chart(NamedTuple):
    """A figure of the learning curves: what it shows, its unit, and the metrics in it by name."""

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    floor: float | None = None
    ceiling: float | None = None
    guide: tuple[float, str] | None = None


CHARTS = (
    Chart("Loss", "nats per token", (("sft/loss_nats", "train"), ("sft/eval_loss_nats", "held out"))),
    Chart("Token accuracy", "share of target tokens", (("sft/accuracy", "train"), ("sft/eval_accuracy", "held out")), floor=0.0),
    Chart("Loss", "nats per pair", (("reward_model/loss", "train"), ("reward_model/eval_loss", "held out"))),
    Chart(
        "Pair accuracy",
        "pairs ranked as labelled",
        (("reward_model/accuracy", "train"), ("reward_model/eval_accuracy", "held out")),
        guide=(0.5, "chance"),
    ),
    Chart("Reward", "reward units", (("reward/score", "proxy"), ("reward/gold", "gold"))),
    Chart("KL to the reference", "nats per sequence", (("kl/per_sequence_nats", ""),), floor=0.0),
    Chart("Response length", "tokens", (("response/length_tokens", ""),)),
    Chart("Answers that end by themselves", "share", (("response/eos_rate", ""),), floor=0.0, ceiling=1.0),
    Chart("Entropy of the policy", "nats per token", (("policy/entropy_nats", ""),), floor=0.0),
    Chart("KL to the old policy", "nats per token, approximate", (("policy/approx_kl_nats", ""),), floor=0.0),
    Chart("Clipped", "share of tokens", (("policy/clip_fraction", "policy"), ("value/clip_fraction", "value")), floor=0.0),
    Chart(
        "Probability ratio",
        "new over old policy",
        (("policy/ratio_mean", "mean"), ("policy/ratio_max", "max")),
        guide=(1.0, "unchanged"),
    ),
    Chart(
        "Explained variance",
        "of the returns by the value",
        (("value/explained_variance", ""),),
        ceiling=1.0,
        guide=(0.0, "no better than the mean"),
    ),
    Chart("Value loss", "squared reward units", (("value/loss", ""),), floor=0.0),
    Chart("KL coefficient", "reward units per nat", (("kl/coef", ""),), floor=0.0),
    Chart("KL to the reference", "nats per token", (("kl/per_token_nats", ""),), floor=0.0),
)
COST_CHARTS = (
    Chart(
        "Seconds per step",
        "s",
        (("time/rollout_s", "rollout"), ("time/score_s", "score"), ("time/update_s", "update"), ("time/step_s", "all")),
        floor=0.0,
    ),
    Chart("Throughput", "tokens per second", (("throughput/tokens_per_s", ""),), floor=0.0),
    Chart("Peak memory of the process", "MB", (("memory/peak_mb", ""),), floor=0.0),
    Chart("Peak memory of a device", "MB", (("memory/device_peak_mb", ""),), floor=0.0),
)
STYLES = {"reward/score": (0, 1), "reward/gold": (1, 0)}  # tone and mark, the same in every figure of the two
UNITS = {"nats": "nats", "tokens": "tokens", "s": "s", "mb": "MB", "rate": "share", "fraction": "share", "accuracy": "share"}


class PathPoint(NamedTuple):
    """Where training was: step, d = sqrt(KL), proxy score, gold reward."""

    step: float
    distance: float
    proxy: float
    gold: float | None


def reward_path(run: StageRun) -> list[PathPoint]:
    """Score and gold reward against the distance to the reference, in the order of training.

    d = sqrt(max(KL, 0)), square root of nats (Gao et al. 2022, arXiv:2210.10760). Gold comes from the metrics, else from the
    means of the fixed evaluation samples.
    """
    kl, gold = dict(run.column("kl/per_sequence_nats")), dict(run.column("reward/gold"))
    if kl and (gold or not any(row.get("gold") is not None for row in run.samples)):
        scores = run.column("reward/score")
        return [PathPoint(step, math.sqrt(max(kl[step], 0.0)), score, gold.get(step)) for step, score in scores if step in kl]
    found = []
    for step, rows in evaluations(run).items():
        means = {key: mean([row[key] for row in rows if is_number(row.get(key))]) for key in ("score", "gold", "kl_nats")}
        if math.isfinite(means["score"]) and math.isfinite(means["kl_nats"]):
            gold_mean = means["gold"] if math.isfinite(means["gold"]) else None
            found.append(PathPoint(step, math.sqrt(max(means["kl_nats"], 0.0)), means["score"], gold_mean))
    return found


def gao_fit(path: Sequence[PathPoint]) -> tuple[tuple[float, float, float], float] | None:
    """Least squares of gold(d) = g + d (alpha - beta log d), and its R^2; None where too little was travelled.

    Source: Gao et al. 2022, equation 2, with the offset g because gold does not start at 0 here.
    """
    points = [(p.distance, p.gold) for p in path if p.gold is not None and p.distance > 1e-3]
    if len(points) < 8:
        return None
    d, gold = (np.asarray(values, np.float64) for values in zip(*points, strict=True))
    if np.ptp(d) < 0.7 or np.ptp(gold) == 0:
        return None
    design = np.stack([np.ones_like(d), d, -d * np.log(d)], axis=1)
    solution, *_ = np.linalg.lstsq(design, gold, rcond=None)
    residual = ((gold - design @ solution) ** 2).sum() / ((gold - gold.mean()) ** 2).sum()
    g, alpha, beta = (float(value) for value in solution)
    return (g, alpha, beta), float(1 - residual)


def gold_against_proxy(runs: Sequence[StageRun]) -> str:
    """The figure of Gao et al.: what is optimised and what is meant, against the distance travelled."""
    paths = [(run, path) for run in runs if len(path := reward_path(run)) > 1]
    if not paths:
        return ""
    many, crowd = len(paths) > 1, len(paths) > 2
    has_gold = any(p.gold is not None for _, path in paths for p in path)
    lines, fits, flags, notes = [], [], [], []
    told: dict[float, str] = {}  # by where a step stands: which it is, and its own KL
    for run, path in paths:
        name = f"{run.label} " if many else ""
        steady = steadied(path)
        for own, placed in zip(path, steady, strict=True):
            told.setdefault(placed.distance, f"step {own.step:.0f}, KL {number(own.distance**2)} nats")
        gold = [(p.distance, p.gold) for p in steady if p.gold is not None]
        proxy_tone, gold_tone = (run.tone % 8, run.tone % 8) if many else (0, 1)
        lines.append(Line(f"{name}{'proxy' if has_gold else 'score'}", [(p.distance, p.proxy) for p in steady], proxy_tone, 1))
        if gold:
            lines.append(Line(f"{name}gold", gold, gold_tone, 0))
        top = peak(steady)
        if top is not None:
            flags.append((top.distance, top.gold or 0.0, "" if crowd else f"gold peaks, step {top.step:.0f}"))
        fit = None if crowd else gao_fit(path)
        if fit is not None:
            (g, a, b), r2 = fit
            low, high = min(d for d, _ in gold if d > 1e-3), max(d for d, _ in gold)
            at = [low + (high - low) * i / 48 for i in range(49)]
            fits.append(Line("", [(d, g + d * (a - b * math.log(d))) for d in at], gold_tone))
            law = f"{number(g)} + d ({number(a)} {'−' if b >= 0 else '+'} {number(abs(b))} log d)"
            notes.append(f"{text(name)}gold ≈ {law}, R² {r2:.2f}")
    title = "Gold against proxy reward" if has_gold else "Reward against KL"
    said = _comparison(paths) if many else _reading(paths[0][1])

    def drawn(ident: str, width: int, height: int) -> str:
        return line_chart(
            lines,
            ident=ident,
            title=f"{title}, reward units, against the square root of the KL to the reference",
            x_label="√KL to the reference, √nats",
            width=width,
            height=height,
            x_zero=True,
            under=fits,
            flags=flags,
            reading=told.__getitem__,
        )

    figure = (
        f'<div class="wide-only">{drawn("hero-wide", 1040, 400)}</div><div class="narrow">{drawn("hero-narrow", 350, 310)}</div>'
    )
    dotted = f" Dotted, least squares of Gao et al. with d = √KL: {'; '.join(notes)}." if notes else ""
    fine = f"Steps stand at their √KL averaged over neighbouring steps; pointing at one tells its own KL.{dotted}"
    return (
        f'<section><h2>{title}</h2><p class="lead">{said}</p><figure class="hero">'
        f"<figcaption>Reward <span>reward units, a point a step</span></figcaption>{figure}</figure>"
        f'<p class="fine">{fine}</p></section>'
    )


def steadied(path: Sequence[PathPoint]) -> list[PathPoint]:
    """The path with its distance averaged over neighbouring steps, so that the noise of one batch's KL does not fold the curve.

    The window is a fifth of the path and narrows to nothing at both ends, which stay where they are.
    """
    index, distances = np.arange(len(path)), np.asarray([p.distance for p in path])
    reach = np.minimum(max(1, len(path) // 10), np.minimum(index, index[::-1]))
    averages = np.where(reach > 0, window_means(distances, index - reach, index + reach + 1), distances)
    return [point._replace(distance=distance) for point, distance in zip(path, averages.tolist(), strict=True)]


def peak(path: Sequence[PathPoint]) -> PathPoint | None:
    """Where gold was highest, if it then lost over a quarter of its gain while the proxy rose: over-optimisation."""
    known = [(p.step, p.gold) for p in path if p.gold is not None]
    if len(known) < 3:
        return None
    smoothed = smooth(known) if len(known) >= 20 else known
    step, highest = max(smoothed, key=lambda point: point[1])
    first, last = ends(known)
    before, after = ends([(p.step, p.proxy) for p in path])
    if highest - last <= 0.25 * max(highest - first, 1e-9) or after <= before:
        return None
    at = min((p for p in path if p.gold is not None), key=lambda p: abs(p.step - step))
    return at._replace(gold=highest)


def _reading(path: Sequence[PathPoint]) -> str:
    """The figure of one run in words."""
    first, last = ends([(p.step, p.proxy) for p in path])
    kl = ends([(p.step, p.distance**2) for p in path])[1]
    gold = [(p.step, p.gold) for p in path if p.gold is not None]
    subject = "The proxy (what training optimises)" if gold else "The reward"
    said = f"{subject} went from {number(first)} to {number(last)} at a KL of {number(kl)} nats per sequence."
    if gold:
        gold_first, gold_last = ends(gold)
        said += f" Gold (what is meant; training never sees it) went from {number(gold_first)} to {number(gold_last)}."
    top = peak(path)
    if top is not None:
        said += f" Gold peaked at step {top.step:.0f} ({number(top.gold)}), then fell while the proxy rose: over-optimisation."
    return said


def _comparison(paths: Sequence[tuple[StageRun, list[PathPoint]]]) -> str:
    """The figure of several runs in words."""
    tops = [(run, peak(path)) for run, path in paths if any(p.gold is not None for p in path)]
    if not tops:
        return ""
    fell = [f"<b>{text(run.label)}</b> (peak {number(top.gold)} at step {top.step:.0f})" for run, top in tops if top is not None]
    if not fell:
        return "In no run did gold fall while the proxy rose."
    return f"Over-optimisation, gold falling while the proxy rises, in {', '.join(fell)}."


def stages(runs: Sequence[StageRun]) -> str:
    """Learning curves of every stage; metrics that no chart of this page knows come behind a click."""
    out = []
    for stage, group in by_stage(runs).items():
        known = {key for chart in (*CHARTS, *COST_CHARTS) for key, _ in chart.lines}
        charts = figures(CHARTS, group, stage)
        unknown = sorted({key for run in group for key in run.columns} - known)
        others = figures(tuple(_unknown_chart(key) for key in unknown), group, f"{stage}-other")
        if not (charts or others):
            continue
        more = folded(f"{len(others)} more metric{'s' if len(others) > 1 else ''}", others)
        shown = f'<div class="figures">{"".join(charts)}</div>'
        out.append(f"<section><h2>{text(group[0].name)}</h2>{shown}{more}{_numbers_table(group)}</section>")
    return "".join(out)


def folded(summary: str, drawn: Sequence[str]) -> str:
    figures_ = "".join(drawn)
    return f'<details><summary>{summary}</summary><div class="figures">{figures_}</div></details>' if drawn else ""


def _unknown_chart(key: str) -> Chart:
    return Chart(key, UNITS.get(key.rsplit("_", 1)[-1].rsplit("/", 1)[-1], ""), ((key, ""),))


def figures(charts: Sequence[Chart], group: Sequence[StageRun], prefix: str, *, name: bool = False) -> list[str]:
    """Every chart that has data, as a figure; `name`: the stage leads the title."""
    drawn = []
    for place, (title, chart, lines) in enumerate(plan for each in charts for plan in _plans(each, group)):
        title = f"{group[0].name}: {title[:1].lower()}{title[1:]}" if name else title
        svg = line_chart(
            lines,
            ident=f"f-{_slug(prefix)}-{place}",
            title=f"{title}, {chart.unit}, by step",
            x_label="step",
            x_whole=True,
            floor=chart.floor,
            ceiling=chart.ceiling,
            guide=chart.guide,
        )
        unit = f" <span>{text(chart.unit)}</span>" if chart.unit else ""
        drawn.append(f"<figure><figcaption>{text(title)}{unit}</figcaption>{svg}</figure>")
    return drawn


def _plans(chart: Chart, group: Sequence[StageRun]) -> list[tuple[str, Chart, list[Line]]]:
    """(title, chart, lines). One run: the metrics of the chart together. Several: a chart a metric, a line a run."""
    if len(group) == 1:
        keys = [(key, label) for key, label in chart.lines if group[0].column(key)]
        if [key for key, _ in keys] == ["reward/score"]:
            keys = [("reward/score", "")]  # nothing to tell it from
        columns = [(STYLES.get(key, (i, i)), label, group[0].column(key)) for i, (key, label) in enumerate(keys)]
        lines = [Line(label, points, tone, mark) for (tone, mark), label, points in columns if points]
        return [(chart.title, chart, lines)] if lines else []
    plans = []
    for key, label in chart.lines:
        lines = [Line(run.label, run.column(key), run.tone % 8, run.tone) for run in group if run.column(key)]
        if lines:
            plans.append((f"{chart.title}, {label}" if label and len(chart.lines) > 1 else chart.title, chart, lines))
    return plans


def _numbers_table(group: Sequence[StageRun]) -> str:
    """The same curves as numbers: for who cannot see them, and for who wants to copy them."""
    rows = []
    for run in group:
        for key in sorted(run.columns):
            points = run.columns[key]
            values = [y for _, y in points]
            cells = (values[0], values[-1], min(values), max(values))
            whose = f"{text(run.label)}: " if len(group) > 1 else ""
            rows.append(
                f"<tr><td>{whose}{text(key)}</td>{''.join(f'<td>{number(v)}</td>' for v in cells)}<td>{len(values)}</td></tr>"
            )
    if not rows:
        return ""
    head = "<tr><th>Metric</th><th>first</th><th>last</th><th>lowest</th><th>highest</th><th>rows</th></tr>"
    table = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<details><summary>These curves as numbers</summary><div class="scroll">{table}</div></details>'


def _slug(name: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in name)
