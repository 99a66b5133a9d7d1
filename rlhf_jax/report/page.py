"""The page: sections in order, a style sheet allowed by its hash, and nothing that could run or be fetched."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from rlhf_jax.errors import UserError
from rlhf_jax.metrics import METRICS, write_atomic
from rlhf_jax.report import answers, curves, sections
from rlhf_jax.report.data import StageRun, compares, holders, load_runs, text


def write_report(run_dirs: Sequence[Path | str], out: Path | str, *, title: str | None = None) -> Path:
    """Write one self-contained HTML file about the stages of a run, or comparing runs; whole or not at all.

    Args:
      run_dirs: run directories; one that holds none of a run's files, but directories that do, stands for all of these. A
        directory that does not exist yet is left out, so that a run can draw its report before its last stage has begun.
      out: the file; title: heading of the page, default: the name of the run.
    Raises:
      UserError: none of the directories exists.
    """
    paths = [Path(path) for path in run_dirs]
    if not any(path.is_dir() for path in paths):
        named = ", ".join(str(path) for path in paths) or "nothing"
        raise UserError(f"report: no run directory among {named}; name directories that hold {METRICS}")
    runs = load_runs(paths)
    heading = title or _heading(runs, paths)
    body = "".join(
        (
            sections.header(heading, runs),
            sections.tiles(runs),
            curves.gold_against_proxy(runs),
            answers.before_and_after(runs),
            curves.stages(runs),
            sections.calibration(runs),
            sections.costs(runs),
            sections.configuration(runs),
        )
    )
    write_atomic(Path(out), page(heading, body))
    return Path(out)


def check_run_dirs(run_dirs: Sequence[Path | str]) -> None:
    """Refuse, for the command line, a directory that is no run.

    Raises:
      UserError: names the first one, and what a run directory holds.
    """
    for path in map(Path, run_dirs):
        if not path.is_dir():
            raise UserError(f"{path}: no such directory; give the directory of a run, such as runs/quickstart")
        if not holders(path):
            raise UserError(
                f"{path}: no {METRICS} in it or one level below; give the directory of a run, such as runs/quickstart"
            )


def page(title: str, body: str) -> str:
    """The document around the sections."""
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f'<title>{text(title)} – rlhf_jax</title>\n<link rel="icon" href="data:,">\n<style>{style}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n"
        "<footer>Written by rlhf_jax from metrics.jsonl, samples.jsonl and summary.json. This file needs no network and runs "
        "no script. Point at a chart to read its values.</footer>\n</body>\n</html>\n"
    )


def _heading(runs: Sequence[StageRun], paths: Sequence[Path]) -> str:
    labels = list(dict.fromkeys(run.label for run in runs))
    if not labels:
        return paths[0].name or "Run"
    if not compares(runs):
        return labels[-1] if len(labels) == 1 else runs[-1].label
    return f"{', '.join(labels[:-1])} and {labels[-1]}" if len(labels) <= 4 else f"{len(labels)} runs compared"
