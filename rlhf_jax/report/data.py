"""What a report reads: run directories, whole, unfinished or torn, as columns of numbers; and text made safe to show."""

import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from rlhf_jax.metrics import METRICS, SAMPLES, SUMMARY, read_rows, read_summary
from rlhf_jax.report.scales import Point

CONFIG = "config.resolved.yaml"
ORDER = ("sft", "reward", "ppo")
BEFORE = ("sft", "reward")  # stages that lead to a policy; every other stage trains one
NAMES = {"sft": "Supervised fine-tuning", "reward": "Reward model"}


class StageRun(NamedTuple):
    """One stage of one run, read from its directory."""

    stage: str
    label: str  # tells runs of the same stage apart
    tone: int  # colour and marker of the run where several are compared
    path: Path
    columns: dict[str, list[Point]]  # "group/name_unit" -> (step, value), finite values only
    broken: dict[str, list[int]]  # metric -> steps at which it was not finite
    alarms: list[tuple[int, str]]  # (step, what was told)
    samples: list[dict[str, Any]]
    summary: dict[str, Any]
    config: str

    @property
    def name(self) -> str:
        return NAMES.get(self.stage, self.stage.upper() if len(self.stage) <= 5 else self.stage)

    def column(self, key: str) -> list[Point]:
        return self.columns.get(key, [])

    def until(self, key: str) -> str:
        """ ", until step 13" where a metric stopped being finite and did not come back."""
        points, broken = self.column(key), self.broken.get(key, [])
        return f", until step {points[-1][0]:.0f}" if points and broken and broken[-1] > points[-1][0] else ""


def load_runs(paths: Sequence[Path]) -> list[StageRun]:
    """Every stage found, in the order of the pipeline, runs of the same stage side by side."""
    found = []
    for holder in dict.fromkeys(holder.resolve() for path in paths for holder in holders(path)):
        found += _read_stages(holder)
    rank = {stage: index for index, stage in enumerate(ORDER)}
    found.sort(key=lambda run: rank.get(run.stage, len(ORDER)))
    labels = {id(run): label for run, label in zip(found, _told_apart(found, _labels(found)), strict=True)}
    tones = {label: index for index, label in enumerate(dict.fromkeys(labels.values()))}
    return [run._replace(label=labels[id(run)], tone=tones[labels[id(run)]]) for run in found]


def by_stage(runs: Sequence[StageRun]) -> dict[str, list[StageRun]]:
    """Runs grouped by stage, in order."""
    groups: dict[str, list[StageRun]] = {}
    for run in runs:
        groups.setdefault(run.stage, []).append(run)
    return groups


def compares(runs: Sequence[StageRun]) -> bool:
    """Whether some stage appears more than once, or several algorithms do, so that curves are told apart by run."""
    groups = by_stage(runs)
    return any(len(group) > 1 for group in groups.values()) or len(groups.keys() - set(BEFORE)) > 1


def text(value: Any, limit: int | None = None) -> str:
    """Anything as inert HTML text: markup escaped, control characters and lone surrogates made visible."""
    raw = str(value)
    tail = ""
    if limit is not None and len(raw) > limit:
        tail = f' <span class="none">… {len(raw) - limit} more characters</span>'
        raw = raw[:limit]
    return escape(raw.translate(_VISIBLE).encode("utf-8", "replace").decode()) + tail


# C0 controls as their Unicode pictures (tab and newline stay), DEL, and the marks that reorder text around them.
_VISIBLE = {code: chr(0x2400 + code) for code in range(32) if code not in (9, 10)} | {127: "␡"}
_VISIBLE |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), "�") | dict.fromkeys(range(0x80, 0xA0), "�")


def holders(path: Path) -> list[Path]:
    """The directories with a run's files: the path itself, or the ones below it, oldest first."""
    marks = (METRICS, SUMMARY, CONFIG)
    if any((path / mark).is_file() for mark in marks):
        return [path]
    if not path.is_dir():
        return []
    below = [child for child in sorted(path.iterdir()) if any((child / mark).is_file() for mark in marks)]
    return sorted(below, key=lambda child: ORDER.index(child.name) if child.name in ORDER else len(ORDER))


def _read_stages(path: Path) -> list[StageRun]:
    rows, samples, summary = read_rows(path / METRICS), read_rows(path / SAMPLES), read_summary(path)
    config_file = path / CONFIG
    config = config_file.read_text(encoding="utf-8", errors="replace") if config_file.is_file() else ""
    stages = list(dict.fromkeys(str(row["stage"]) for row in rows if row.get("stage"))) or [str(summary.get("stage", path.name))]
    found = []
    for stage in stages:
        own = [row for row in rows if str(row.get("stage", stage)) == stage]
        columns, broken = _columns(own)
        alarms = [(row["step"], str(alarm)) for row in own for alarm in as_list(row.get("alarms"))]
        said = [row for row in samples if str(row.get("stage", stage)) == stage]
        about = summary if summary.get("stage", stage) == stage else {}
        found.append(StageRun(stage, "", 0, path, columns, broken, alarms, said, about, config))
    return found


def _columns(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, list[Point]], dict[str, list[int]]]:
    columns: dict[str, list[Point]] = {}
    broken: dict[str, list[int]] = {}
    for row in rows:
        step = row.get("step")
        if not is_number(step):
            continue
        for key, value in row.items():
            if "/" in key and is_number(value):
                columns.setdefault(key, []).append((step, float(value)))
        for key in as_list(row.get("not_finite")):
            broken.setdefault(str(key), []).append(int(step))
    return columns, broken


def _labels(runs: Sequence[StageRun]) -> list[str]:
    """The part of each path that tells it from the others; a last part that is a stage's name does not count."""
    parts = []
    for run in runs:
        names = run.path.resolve().parts
        parts.append(names[:-1] if names[-1] in (run.stage, *ORDER) and len(names) > 1 else names)
    distinct = list(dict.fromkeys(parts))
    if len(distinct) < 2:
        return [run.path.name if len(runs) == 1 else names[-1] for run, names in zip(runs, parts, strict=True)]
    shortest = min(map(len, distinct))
    head = next((i for i in range(shortest) if len({names[i] for names in distinct}) > 1), shortest - 1)
    tail = next((i for i in range(shortest - head) if len({names[-1 - i] for names in distinct}) > 1), 0)
    return _shortened(["/".join(names[head : len(names) - tail]) or names[-1] for names in parts])


def _told_apart(runs: Sequence[StageRun], labels: list[str]) -> list[str]:
    """Algorithms beside one another in one directory are told apart by their stage, not by the directory."""
    policies = [(label, run.stage) for run, label in zip(runs, labels, strict=True) if run.stage not in BEFORE]
    shared = {label for label, stage in policies if any(label == other and stage != third for other, third in policies)}
    if shared and len(set(labels)) == 1:
        return [run.stage for run in runs]
    return [
        f"{label} {run.stage}" if label in shared and run.stage not in BEFORE else label
        for run, label in zip(runs, labels, strict=True)
    ]


def _shortened(labels: Sequence[str]) -> list[str]:
    """Long labels without the words at both ends that all of them share: run-kl-0.1-s0, run-kl-0.2-s0 become 0.1, 0.2."""
    if max(map(len, labels)) <= 14:
        return list(labels)
    words = [re.split(r"(?<=[-_/ ])", label) for label in labels]
    shortest = min(map(len, words))
    head = next((i for i in range(shortest) if len({w[i] for w in words}) > 1), 0)
    tail = next((i for i in range(shortest - head) if len({w[-1 - i].rstrip("-_/ ") for w in words}) > 1), 0)
    short = ["".join(w[head : len(w) - tail]).rstrip("-_/ ") for w in words]
    return short if all(short) and len(set(short)) == len(set(labels)) else list(labels)


def ends(points: Sequence[Point]) -> tuple[float, float]:
    """Mean of the first and of the last twentieth of the values."""
    window = max(1, len(points) // 20)
    return mean([y for _, y in points[:window]]), mean([y for _, y in points[-window:]])


def mean(values: Sequence[float]) -> float:
    """NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def is_number(value: Any) -> TypeGuard[float]:
    """A finite number that is no truth value: JSON written elsewhere may hold anything."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def as_list(value: Any) -> list[Any]:
    """The value if it is a list, else none: a summary may have been written by anyone."""
    return value if isinstance(value, list) else []


def evaluations(run: StageRun) -> dict[float, list[dict[str, Any]]]:
    """Samples by step, in order."""
    found: dict[float, list[dict[str, Any]]] = {}
    for row in run.samples:
        if is_number(row.get("step")):
            found.setdefault(row["step"], []).append(row)
    return dict(sorted(found.items()))


def amount(run: StageRun, key: str) -> float:
    """A number of the summary; 0 where there is none."""
    value = run.summary.get(key)
    return float(value) if is_number(value) else 0.0
