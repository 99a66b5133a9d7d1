"""What lies in a directory of runs: how far each came, and whether every byte of its checkpoints is as it was written."""

import json
from collections.abc import Iterator
from pathlib import Path

from rlhf_jax import integrity, shelf
from rlhf_jax.errors import UserError

_RECORD, _DEPTH = "run.json", 3


def describe(directory: Path) -> tuple[str, bool]:
    """Text about every run below a directory, and whether all checkpoints are good. UserError where there is no run."""
    found = sorted(_runs(directory, _DEPTH))
    if not found:
        raise UserError(
            f"{directory}: no run there (a directory with {_RECORD}); name a run's out=…, or a directory that holds some"
        )
    pages = [_describe(run) for run in found]
    return "\n".join(line for lines, _ in pages for line in lines), all(good for _, good in pages)


def _runs(directory: Path, depth: int) -> Iterator[Path]:
    if (directory / _RECORD).is_file():
        yield directory
    elif depth and directory.is_dir():
        for child in directory.iterdir():
            if child.is_dir() and not child.is_symlink():
                yield from _runs(child, depth - 1)


def _describe(run: Path) -> tuple[list[str], bool]:
    try:
        record = json.loads((run / _RECORD).read_text(encoding="utf-8"))
        starts, done = record["starts"], record["completed_step"]
        began = f", begun {starts[0]['time']}, {len(starts)} start{'s' * (len(starts) != 1)}" if starts else ""
    except (ValueError, LookupError, TypeError):
        return [f"{run}: {_RECORD} is damaged; put back a copy"], False
    lines, good = [f"{run}: {'not finished' if done is None else f'finished at step {done}'}{began}"], True
    checkpoints = run / "checkpoints"
    latest = integrity.read_latest(checkpoints, lines.append) if checkpoints.is_dir() else None
    saved = list(checkpoints.iterdir()) if checkpoints.is_dir() else []
    for path in sorted((path for path in saved if path.name.isdecimal()), key=lambda path: int(path.name)):
        wrong = integrity.problems(path, step=int(path.name))
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        state = "damaged" if wrong else "good"
        latest_mark = ", latest" if path.name == str(latest) else ""
        lines.append(f"  step {path.name}: {state}, {size / 1e6:.1f} MB{_description(path)}{latest_mark}")
        lines += [f"    {line}" for line in wrong[:5]]
        good = good and not wrong
    meaning = {shelf.BROKEN: "damaged, set aside", shelf.PARTIAL: "not finished", shelf.RETIRED: "being deleted"}
    lines += [f"  {path.name}: {meaning[path.suffix]}" for path in sorted(saved) if path.suffix in meaning]
    return lines, good


def _description(checkpoint: Path) -> str:
    """When it was saved, on how many devices, how many arrays; empty where that is not told."""
    try:
        told = json.loads((checkpoint / shelf.DESCRIPTION).read_bytes())
        return f", {told['time']}, {len(told['leaves'])} arrays, {told['devices']} devices, jax {told['jax']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
