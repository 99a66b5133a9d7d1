"""The same prompts, answered before and after training."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhf_jax.report.data import StageRun, by_stage, evaluations, is_number, mean, text
from rlhf_jax.report.scales import number

SHOWN, KEPT = 4, 64  # prompts shown, and prompts in the page at all
COMPARED = 4  # runs whose answers stand side by side
LONGEST = 1500  # characters of a prompt or an answer
MARKS = (("score", "score", ""), ("gold", "gold", ""), ("kl_nats", "KL", " nats"), ("length_tokens", "", " tokens"))


class Column(NamedTuple):
    """One evaluation: what its answers are headed, and its rows by prompt."""

    heading: str
    rows: dict[Any, dict[str, Any]]


def before_and_after(runs: Sequence[StageRun]) -> str:
    """A stage a section: the first evaluation of the first run, and the last one of every run, side by side."""
    return "".join(_section(group) for group in by_stage(runs).values())


def _section(group: Sequence[StageRun]) -> str:
    columns = _columns(group)
    if not columns:
        return ""
    indices = sorted({index for column in columns for index in column.rows}, key=lambda index: (isinstance(index, str), index))
    cards = [_card(index, columns) for index in indices[:KEPT]]
    title = "Before and after" if len(columns) > 1 else "Answers"
    lead = f"{text(group[0].name)} on {len(indices)} fixed prompts, the same every time."
    lead += f" The first {COMPARED} runs." if len(group) > COMPARED else ""
    rest = "".join(cards[SHOWN:])
    summary = f"{len(cards) - SHOWN} more prompts"
    more = f'<details><summary>{summary}</summary><div class="answers">{rest}</div></details>' if rest else ""
    shown = _means(columns, len(indices)) + "".join(cards[:SHOWN])
    return f'<section><h2>{title}</h2><p class="lead">{lead}</p><div class="answers">{shown}</div>{more}</section>'


def _columns(group: Sequence[StageRun]) -> list[Column]:
    columns: list[Column] = []
    for run in group[:COMPARED]:
        found = evaluations(run)
        steps = list(found)
        for step in steps[-1:] if columns else dict.fromkeys((*steps[:1], *steps[-1:])):
            heading = "before training" if step == 0 else f"after {step:.0f} step{'s' if step != 1 else ''}"
            shared = step == 0 and not columns  # the model before training is the same in every run
            rows = {_key(row.get("index"), place): row for place, row in enumerate(found[step])}
            columns.append(Column(heading if len(group) == 1 or shared else f"{run.label}, {heading}", rows))
    return columns


def _key(index: Any, place: int) -> Any:
    return index if isinstance(index, int | str) else place


def _means(columns: Sequence[Column], count: int) -> str:
    if count < 2:
        return ""
    cells = []
    for column in columns:
        rows = list(column.rows.values())
        means = {key: mean([row[key] for row in rows if is_number(row.get(key))]) for key, _, _ in MARKS}
        ended = [bool(row["finished"]) for row in rows if row.get("finished") is not None]
        end = f" · <b>{sum(ended) / len(ended):.0%}</b> ended by themselves" if ended else ""
        cells.append(f'<div><h4>{text(column.heading)}</h4><p class="marks">{_marks(means)}{end}</p></div>')
    return (
        f'<article class="answer"><p class="prompt">Mean of all prompts</p><div class="columns">{"".join(cells)}</div></article>'
    )


def _card(index: Any, columns: Sequence[Column]) -> str:
    rows = [(column.heading, column.rows[index]) for column in columns if index in column.rows]
    cells = []
    for heading, row in rows:
        response = row.get("response")
        empty = response is None or not str(response).strip()
        body = '<span class="none">(nothing)</span>' if empty else text(response, LONGEST)
        cut = ' · <span class="cut">cut off</span>' if row.get("finished") is False else ""
        said = f'<p class="said-text" dir="auto">{body}</p><p class="marks">{_marks(row)}{cut}</p>'
        cells.append(f"<div><h4>{text(heading)}</h4>{said}</div>")
    prompt = f'<p class="prompt" dir="auto">{text(rows[0][1].get("prompt", ""), LONGEST)}</p>'
    return f'<article class="answer">{prompt}<div class="columns">{"".join(cells)}</div></article>'


def _marks(row: dict[str, Any]) -> str:
    parts = [(name, row[key], unit) for key, name, unit in MARKS if is_number(row.get(key))]
    return " · ".join(f"{name} <b>{number(value)}</b>{unit}".strip() for name, value, unit in parts)
