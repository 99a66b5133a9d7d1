"""Prompts to be answered, with the other columns of their rows: for `rlhf-jax generate` and `rlhf-jax evaluate`."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.config import Data
from rlhf_jax.data.formats import Row, Text, detect, normalise, prepare
from rlhf_jax.data.sources import BadRow, Source, open_source
from rlhf_jax.errors import UserError


class Question(NamedTuple):
    """A prompt with the other columns of its row."""

    prompt: Text
    columns: dict[str, Any]
    where: Callable[[], str]  # "prompts.jsonl:7"; counts the lines of the file, so that only messages call it


def read_questions(path: Path, data: Data | None = None) -> list[Question]:
    """Prompts of a text file (one a line), or of a data file in any form that docs/data.md tells, read as a run reads them.

    Of `data` (a run's group of that name) `columns`, `chat` and `limit` are used. Errors: `UserError`.
    """
    data = data or Data()
    if not path.is_file():
        raise UserError(f"--prompts {path}: no such file; give a text file with one prompt a line, or a jsonl file")
    found = _lines(path, data) if path.suffix == ".txt" else _rows(path, data)
    if not found:
        raise UserError(f"--prompts {path}: no prompts in it")
    return found


def _lines(path: Path, data: Data) -> list[Question]:
    if data.columns:
        ours, theirs = next(iter(data.columns.items()))
        raise UserError(f"--columns {ours}={theirs}: {path} is plain text and has no columns; leave it out, or give a jsonl file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {path}: byte {error.start} is not UTF-8 ({error.reason}); convert the file") from None
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    return [_question({"prompt": line}, data, functools.partial("{}:{}".format, path, n)) for n, line in lines[: data.limit]]


def _rows(path: Path, data: Data) -> list[Question]:
    source = open_source(str(path), limit=data.limit)
    try:
        return [_question(source.row(number), data, functools.partial(_where, source, number)) for number in range(len(source))]
    except BadRow as error:
        here = " (on this command line --columns OURS=THEIRS and --chat; no row is skipped)" if "data." in str(error) else ""
        raise UserError(f"{error}{here}") from None


def _where(source: Source, number: int) -> str:
    return source.where(number)  # through the source: its file is closed when nobody holds it


def _question(row: dict[str, Any], data: Data, where: Callable[[], str]) -> Question:
    try:
        read = _prompt(row, data, "")
    except BadRow:
        _prompt(row, data, where())  # raises the same, with the line
        raise
    return Question(read.prompt, read.columns, where)


def _prompt(row: dict[str, Any], data: Data, where: str) -> Row:
    row = prepare(row, data, where)
    return normalise(row, "prompts", detect(row, "prompts", where), where)
