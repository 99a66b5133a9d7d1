"""Everything on the page that is no learning curve: each section a pure function, empty where there is nothing to show."""

import math
from collections.abc import Sequence
from typing import Any

from rlhf_jax.errors import without_secrets
from rlhf_jax.estimates import wilson
from rlhf_jax.progress import duration
from rlhf_jax.report.curves import COST_CHARTS, figures, folded
from rlhf_jax.report.data import StageRun, amount, as_list, by_stage, compares, ends, is_number, text
from rlhf_jax.report.plots import reliability_chart, share_bar, swatch
from rlhf_jax.report.scales import number
from rlhf_jax.trackers import flatten


def header(heading: str, runs: Sequence[StageRun]) -> str:
    """Title, what ran and how far it is, and what went wrong."""
    items = [_progress(group) for group in by_stage(runs).values()]
    if not items:
        items.append("<li>Nothing is recorded yet.</li>")
    legend = ""
    if compares(runs):
        marks = {run.label: run.tone for run in runs}
        legend = "".join(f"<li>{swatch(tone % 8, tone)}{text(label)}</li>" for label, tone in marks.items())
        legend = f'<ul class="legend" aria-label="Runs">{legend}</ul>'
    return f'<header><h1>{text(heading)}</h1><ul class="stages">{"".join(items)}</ul>{legend}</header>{_alarms(runs)}'


def _progress(group: Sequence[StageRun]) -> str:
    """How far a stage is: one run in steps and time, several by how many are where."""
    states = [str(run.summary.get("status", "running")) for run in group]
    if len(group) > 1:
        counts = ", ".join(f"{states.count(state)} {text(state)}" for state in dict.fromkeys(states))
        return f"<li><b>{text(group[0].name)}</b> · {counts}</li>"
    (run,) = group
    last = max((points[-1][0] for points in run.columns.values()), default=amount(run, "step"))
    total, wall = amount(run, "total_steps"), amount(run, "wall_s")
    steps = f"step {last:.0f} of {total:.0f}" if total else f"step {last:.0f}"
    spent = f" · {_unbroken(duration(wall))}" if wall else ""
    return f"<li><b>{text(run.name)}</b> · {text(states[0])} · {steps}{spent}</li>"


def _alarms(runs: Sequence[StageRun]) -> str:
    lines = []
    for run in runs:
        whose = f"{run.name} {run.label}" if compares(runs) else run.name
        lines += [f"<p><b>{text(whose)}, step {step}</b>: {text(alarm)}</p>" for step, alarm in run.alarms]
        for key, steps in run.broken.items():
            span = f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps from step {steps[0]} on"
            lines.append(f"<p><b>{text(whose)}</b>: {text(key)} was not finite at {span}.</p>")
    return f'<div class="alarm" role="note">{"".join(lines)}</div>' if lines else ""


def tiles(runs: Sequence[StageRun]) -> str:
    """The numbers to know, the last stage's first. One run: large figures; several: a table, a run a row."""
    if compares(runs):
        return _tile_table(runs)
    found: list[tuple[str, str, str]] = []
    for run in reversed(runs):
        for key, name in (
            ("reward/gold", "Gold reward"),
            ("reward/score", "Proxy reward" if run.column("reward/gold") else "Reward"),
        ):
            if run.column(key):
                first, last = ends(run.column(key))
                found.append((name, number(last), f"{_signed(last - first)} from {number(first)}{run.until(key)}"))
        if run.column(kl := "kl/per_sequence_nats"):
            found.append(("KL to the reference", number(ends(run.column(kl))[1]), f"nats per sequence{run.until(kl)}"))
        accuracy = [y for _, y in run.column("reward_model/eval_accuracy")[-1:]]
        found += [("Reward model", f"{share:.0%}", "right on held-out pairs") for share in accuracy]
        if run.column("sft/eval_loss_nats"):
            found.append(("Fine-tuning loss", number(run.column("sft/eval_loss_nats")[-1][1]), "nats per token, held out"))
        for name, value in _numbers(run):
            if not (is_number(value) and number(value) in map(number, accuracy)):  # a figure says a thing once
                found.append((str(name), number(value) if is_number(value) else str(value), ""))
    wall = sum(amount(run, "wall_s") for run in runs)
    memory = max((amount(run, "peak_rss_mb") for run in runs), default=0.0)
    if wall:
        found.append(("Wall time", duration(wall), f"{memory / 1000:.2f} GB of memory at most" if memory else ""))
    fine = _windows(runs)
    cells = "".join(f"<div><dt>{text(a)}</dt><dd>{text(b)}<small>{text(c)}</small></dd></div>" for a, b, c in found)
    return f'<dl class="tiles">{cells}</dl>{fine}' if found else ""


def _windows(runs: Sequence[StageRun]) -> str:
    """Says that first and last are means, where they are."""
    longest = max((len(run.column("reward/score")) for run in runs), default=0)
    return '<p class="fine">First and last are means over the first and last twentieth of the steps.</p>' if longest >= 40 else ""


def _tile_table(runs: Sequence[StageRun]) -> str:
    wanted = (
        ("Gold reward", "reward/gold"),
        ("Reward", "reward/score"),
        ("KL, nats", "kl/per_sequence_nats"),
        ("Pair accuracy, held out", "reward_model/eval_accuracy"),
        ("Loss held out, nats", "sft/eval_loss_nats"),
    )
    shown = [(name, key) for name, key in wanted if any(run.column(key) for run in runs)]
    rows = []
    for label in dict.fromkeys(run.label for run in runs):
        own = [run for run in runs if run.label == label]
        cells = []
        for _, key in shown:
            whose = next((run for run in own if run.column(key)), None)
            first, last = ends(whose.column(key)) if whose else (math.nan, math.nan)
            cells.append(f"<td>{number(first)} → {number(last)}{whose.until(key)}</td>" if whose else "<td>–</td>")
        cells.append(f"<td>{duration(sum(amount(run, 'wall_s') for run in own))}</td>")
        rows.append(f"<tr><td>{text(label)}</td>{''.join(cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name, _ in shown)
    table = f"<table><thead><tr><th>Run</th>{head}<th>Time</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<h2>First and last</h2><div class="scroll">{table}</div>{_windows(runs)}'


def _unbroken(words: str) -> str:
    return words.replace(" ", "\u00a0")


def _signed(value: float) -> str:
    return f"+{number(value)}" if value > 0 else number(value)


def _numbers(run: StageRun) -> list[tuple[Any, Any]]:
    found = run.summary.get("numbers")
    return list(found.items()) if isinstance(found, dict) else []


def calibration(runs: Sequence[StageRun]) -> str:
    """Reliability diagram of a reward model: how often it is right when it says that it is p sure."""
    figures_, words = [], []
    measured = [(run, _bins(run)) for run in runs]
    measured = [(run, bins) for run, bins in measured if bins]
    for place, (run, bins) in enumerate(measured):
        total = sum(count for _, _, count, _, _ in bins)
        error = sum(count * abs(observed - predicted) for predicted, observed, count, _, _ in bins) / total
        whose = f" {run.label}" if len(measured) > 1 else ""
        title = f"Reliability of the reward model{whose}"
        said = f"{title}: observed against predicted probability over {total:.0f} pairs"
        svg = reliability_chart(bins, ident=f"reliability-{place}", title=said)
        over = f"{total:.0f} held-out pairs, 95% intervals"
        figures_.append(f"<figure><figcaption>{text(title)} <span>{over}</span></figcaption>{svg}</figure>")
        rows = "".join(
            f"<tr><td>{number(p)}</td><td>{number(o)}</td><td>{number(low)} to {number(high)}</td><td>{count:.0f}</td></tr>"
            for p, o, count, low, high in bins
        )
        accuracy = run.column("reward_model/eval_accuracy")
        right = f" It ranks {accuracy[-1][1]:.1%} of held-out pairs as labelled." if accuracy else ""
        words.append(
            f"<p>{text(whose.strip() + ': ' if whose else '')}On average the stated probability is off by {error:.1%} "
            f"(expected calibration error).{right} Points on the diagonal are right as often as they claim; below it the model "
            "is too sure.</p>"
            '<div class="scroll"><table><thead><tr><th>predicted</th><th>observed</th><th>95%</th><th>pairs</th></tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    pairs = "".join(f'<div class="pair">{figure}<div>{word}</div></div>' for figure, word in zip(figures_, words, strict=True))
    return f"<section><h2>How far to trust the reward model</h2>{pairs}</section>" if pairs else ""


def _bins(run: StageRun) -> list[tuple[float, float, float, float, float]]:
    found = []
    for row in as_list(run.summary.get("calibration")):
        if isinstance(row, dict) and all(is_number(row.get(key)) for key in ("predicted", "observed", "count")):
            count, observed = row["count"], min(max(row["observed"], 0.0), 1.0)
            if count > 0:
                _, low, high, _ = wilson(observed * count, count)
                found.append((row["predicted"], observed, count, low, high))
    return sorted(found)


def costs(runs: Sequence[StageRun]) -> str:
    """Wall time and memory by phase, and how both went over the run."""
    measured = [(run, _phases(run)) for run in runs]
    total = sum(amount(run, "wall_s") for run in runs)
    longest = max((seconds for _, phases in measured for _, seconds, _ in phases), default=0.0)
    rows = []
    for run, phases in measured:
        if phases:
            whose = f" {text(run.label)}" if compares(runs) else ""
            rows.append(f'<tr><th colspan="5" scope="rowgroup">{text(run.name)}{whose}</th></tr>')
        for name, seconds, memory in phases:
            share = f"{seconds / total:.0%}" if total and seconds / total >= 0.005 else "<1%"
            held = f"{memory / 1000:.2f}" if is_number(memory) else "–"
            bar = share_bar(seconds / longest if longest else 0.0, run.tone % 8)
            rows.append(
                f'<tr><td>{text(name)}</td><td class="wide">{bar}</td><td>{duration(seconds)}</td>'
                f"<td>{text(share)}</td><td>{held}</td></tr>"
            )
    table = ""
    if rows:
        head = "<tr><th>Phase</th><th></th><th>time</th><th>share</th><th>peak, GB</th></tr>"
        foot = f"<tr><td>together</td><td></td><td>{duration(total)}</td><td></td><td></td></tr>"
        table = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody><tfoot>{foot}</tfoot></table>"
        table += '<p class="fine">Peak: most resident memory of the process, from its start to the end of the phase.</p>'
    charts = [
        figure for stage, group in by_stage(runs).items() for figure in figures(COST_CHARTS, group, f"{stage}-cost", name=True)
    ]
    drawn = folded("Time and memory over the run", charts)
    return f'<section><h2>Time and memory</h2><div class="scroll">{table}</div>{drawn}</section>' if table or drawn else ""


def _phases(run: StageRun) -> list[tuple[str, float, Any]]:
    """(name, wall seconds, peak MB by its end), and what no phase claims."""
    listed = [phase for phase in as_list(run.summary.get("phases")) if isinstance(phase, dict) and is_number(phase.get("wall_s"))]
    found = [(str(phase.get("name", "?")), phase["wall_s"], phase.get("peak_rss_mb")) for phase in listed]
    wall = amount(run, "wall_s")
    rest = wall - sum(seconds for _, seconds, _ in found)
    if wall and rest > 0.01 * wall:
        found.append(("everything else" if found else "all", rest, None if found else amount(run, "peak_rss_mb")))
    return found


def configuration(runs: Sequence[StageRun]) -> str:
    """The resolved configuration of every stage; of compared runs, first the keys in which they differ."""
    out = [_differences(group) for group in by_stage(runs).values() if len(group) > 1]
    for run in runs:
        if run.config.strip():
            whose = f" {text(run.label)}" if compares(runs) else ""
            out.append(f"<details><summary>{text(run.name)}{whose}</summary><pre>{text(_redacted(run.config))}</pre></details>")
    found = "".join(out)
    return f"<section><h2>Configuration</h2>{found}</section>" if found else ""


def _redacted(config: str) -> str:
    """Passwords inside addresses, and values of keys that name a secret, are nobody's business."""
    import re

    return re.sub(r"(?im)^(\s*[\w-]*(?:token|password|secret|api_key)\s*:\s*)\S.*$", r"\1…", without_secrets(config))


def _differences(group: Sequence[StageRun]) -> str:
    import yaml

    flats = []
    for run in group:
        try:
            loaded = yaml.safe_load(_redacted(run.config))
        except yaml.YAMLError:
            loaded = None
        flats.append(flatten(loaded) if isinstance(loaded, dict) else {})
    keys = [
        key for key in dict.fromkeys(key for flat in flats for key in flat) if len({repr(flat.get(key)) for flat in flats}) > 1
    ]
    if not keys:
        return ""
    head = "".join(f"<th>{text(run.label)}</th>" for run in group)
    rows = []
    for key in keys:
        cells = "".join(f"<td>{text(flat.get(key, '–'))}</td>" for flat in flats)
        rows.append(f"<tr><td>{text(key)}</td>{cells}</tr>")
    table = f"<table><thead><tr><th>Key</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<h3>{text(group[0].name)}: what differs</h3><div class="scroll">{table}</div>'
