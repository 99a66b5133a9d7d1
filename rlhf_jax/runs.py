"""`rlhf-jax runs DIR`: the runs below a directory, how far each is, and which of their checkpoints can be trusted."""

import json
from pathlib import Path
from typing import Any

from rlhf_jax import integrity, shelf
from rlhf_jax.errors import UserError
from rlhf_jax.shelf import size_text


def describe(directory: Path) -> str:
    """Every run in `directory` (itself, or below it) with its checkpoints, each verified byte by byte. Changes nothing."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; give the out=… of a run, or a directory of several")
    found = sorted({path.parent for name in ("run.json", "checkpoints") for path in directory.glob(f"**/{name}")})
    found = [path for path in found if not path.is_relative_to(directory / "checkpoints")]
    if not found:
        raise UserError(f"{directory} holds no run: neither run.json nor checkpoints/ is below it")
    return "\n\n".join("\n".join(_describe_run(path)) for path in found)


def _describe_run(run: Path) -> list[str]:
    record, summary = _json(run / "run.json"), _json(run / "summary.json")
    steps = record.get("config", {}).get("steps", summary.get("total_steps", "?"))
    done = record.get("completed_step")
    status = "complete" if done is not None else summary.get("status", "started")
    head = (
        f"{run}: {summary.get('stage', 'run')}, step {done if done is not None else summary.get('step', 0)} of {steps}, {status}"
    )
    if record.get("starts"):
        head += f", started {len(record['starts'])} times since {record['starts'][0]['time']}"
    directory = run / "checkpoints"
    latest = integrity.read_latest(directory, lambda text: None) if directory.is_dir() else None
    meaning = {shelf.BROKEN: "damaged, set aside", shelf.PARTIAL: "not finished", shelf.RETIRED: "being deleted"}
    lines = [_describe_checkpoint(step, path, latest) for step, path in sorted(shelf.finished(directory))]
    rest = sorted(path for path in directory.iterdir() if path.suffix in meaning) if directory.is_dir() else []
    lines += [f"  {path.name}  {meaning[path.suffix]}" for path in rest]
    return [head, *(lines or ["  no checkpoint"])]


def _describe_checkpoint(step: int, path: Path, latest: int | None) -> str:
    found = integrity.problems(path, step=step)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    told = _json(path / shelf.DESCRIPTION)
    text = f"  {step:>8}  {told.get('time', '?'):20}  {size_text(size):>10}"
    text += f"  {len(told.get('leaves', {}))} arrays, {told.get('devices', '?')} devices, jax {told.get('jax', '?')}"
    state = f"DAMAGED: {found[0]}" + (f" (and {len(found) - 1} more)" if len(found) > 1 else "") if found else "good"
    return f"{text}  {state}" + ("  <- LATEST" if step == latest else "")


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where the file is missing or damaged: this page describes, it does not judge."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
