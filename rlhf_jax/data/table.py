"""The rows of one source that a stage can use: scanned once, split into training and evaluation, read by number.

Memory is 25 bytes a row and, while they fit in a budget, the tokens themselves; beyond it rows are read and tokenised again
when a batch wants them.
"""

import array
import contextlib
import hashlib
import inspect
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf_jax.config import OFFLINE, Data
from rlhf_jax.data import order
from rlhf_jax.data.encode import TokenSequence, encode
from rlhf_jax.data.formats import Purpose, Row, detect, normalise, prepare, render_plain
from rlhf_jax.data.packing import packed_rows
from rlhf_jax.data.sources import BadRow, Source, memory_source, open_source
from rlhf_jax.data.vocabulary import Tokenizer
from rlhf_jax.errors import UserError

CACHE_TOKENS = 1 << 24  # 84 MB
WITH_MARGIN = "with a margin"  # in a table's counts
_FEW_PROMPTS = 20


@dataclass(frozen=True)
class Table:
    """Examples 0 .. n-1 of a source, in the file's order."""

    source: Source
    purpose: Purpose
    form: str
    data: Data
    tokenizer: Tokenizer
    numbers: np.ndarray  # i64[n], row of the source
    lengths: np.ndarray  # i32[n, k], tokens of each sequence of an example
    train: np.ndarray  # i64[·], examples for training
    eval: np.ndarray  # i64[·], examples for evaluation
    counts: Counter = field(default_factory=Counter)  # what happened to the rows that were read
    cache: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # tokens i32, trained bool, first token of each example

    def row(self, example: int) -> Row:
        """The row in our terms, read from the source."""
        number = int(self.numbers[example])
        return _read(self.source, number, self.purpose, self.form, self.data)

    def example(self, example: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens i32[T] and trained bool[T] of each sequence of an example."""
        if self.cache is None:
            try:
                found = encode(self.row(example), self.purpose, self.tokenizer, self.data, self.source.name)
            except UserError as error:  # the file has changed; finding a line number reads it from its beginning
                raise type(error)(_located(str(error), self.source, int(self.numbers[example]))) from None
            return [(np.asarray(ids, np.int32), np.asarray(trained, bool)) for ids, trained in found.sequences]
        tokens, trained, first = self.cache
        edges = int(first[example]) + np.concatenate([[0], np.cumsum(self.lengths[example])])
        return [(tokens[a:b], trained[a:b]) for a, b in itertools.pairwise(edges.tolist())]

    def train_lengths(self) -> np.ndarray:
        """Tokens i64[·] of the (first) sequence of every training row."""
        return self.lengths[self.train, 0].astype(np.int64)

    def margin(self, example: int) -> float:
        margin = self.row(example).margin
        return 0.0 if margin is None else margin

    def desirable(self, example: int) -> bool:
        return self.row(example).desirable

    def digest(self) -> str:
        """Identifies rows, tokens and split: content of the file, tokenizer, every data key that matters."""
        keys = ("columns", "chat", "max_prompt_tokens", "max_tokens", "long_prompts", "on_bad_rows", "eval_fraction", "limit")
        parts = [
            self.source.digest,
            self.tokenizer.hash,
            self.purpose,
            self.form,
            *(str(getattr(self.data, key)) for key in keys),
        ]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def open_sources(data: Data, *, purpose: Purpose, seed: int) -> tuple[list[Source], list[float]]:
    """The sources that a configuration names, with their weights: `path`, `sources` or `task`, exactly one of them."""
    if data.limit is not None and data.limit < 1:
        raise UserError(f"data.limit = {data.limit}: must be at least 1 row; leave it out to read all")
    given = [key for key in ("path", "sources", "task") if getattr(data, key)]
    if len(given) != 1:
        found = " and ".join(f"data.{key}" for key in given) or "none"
        raise UserError(f"give exactly one of data.path, data.sources, data.task; found {found}")
    if data.task is not None:
        rows = _task_rows(data.task, data.task_options, purpose, seed)
        return [memory_source(rows[: data.limit], f"task {data.task}")], [1.0]
    if data.path is not None:
        return [open_source(data.path, limit=data.limit)], [1.0]
    return [open_source(source.path, limit=data.limit) for source in data.sources], [source.weight for source in data.sources]


def purpose_of(stage: str, data: Data) -> Purpose:
    """What a stage wants of its rows. KTO takes pairs, or single answers where the first good row has a column `label`."""
    if stage == "sft":
        return "sft"
    if stage not in OFFLINE:
        return "prompts"
    path = data.path or next((source.path for source in data.sources), None)
    if stage != "kto" or path is None:
        return "preferences"
    if "label" in data.columns:
        return "labels"
    source = open_source(path, limit=100)
    for number in range(len(source)):
        with contextlib.suppress(BadRow):
            return "labels" if "label" in source.row(number) else "preferences"
    return "preferences"


def _task_rows(name: str, options: dict[str, Any], purpose: Purpose, seed: int) -> list[dict[str, Any]]:
    from rlhf_jax.data.tasks import TASKS

    taken = {key: p for key, p in inspect.signature(TASKS[name].rows).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for key, value in options.items():
        if key not in taken:
            raise UserError(f"data.task_options: {name} takes no option {key!r}; it takes: {', '.join(taken) or 'none'}")
        kind = type(taken[key].default)
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind) or value < 0:
            raise UserError(f"data.task_options.{key} is {value!r}; {name} takes {kind.__name__}s of at least 0 there")
    return TASKS[name].rows(purpose, seed, **options)


class _Cache:
    """Tokens of the examples scanned so far, until they pass the budget."""

    def __init__(self) -> None:
        self.tokens, self.trained, self.first = array.array("i"), bytearray(), array.array("q")
        self.full = False

    def add(self, sequences: tuple[TokenSequence, ...]) -> None:
        if self.full:
            return
        self.first.append(len(self.tokens))
        for ids, trained in sequences:
            self.tokens.extend(ids)
            self.trained.extend(trained)
        if len(self.tokens) > CACHE_TOKENS:
            self.tokens, self.trained, self.first, self.full = array.array("i"), bytearray(), array.array("q"), True

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        if self.full:
            return None
        return np.array(self.tokens, np.int32), np.frombuffer(bytes(self.trained), bool), np.array(self.first, np.int64)


def scan(source: Source, purpose: Purpose, tokenizer: Tokenizer, data: Data) -> Table:
    """Read every row once: check, tokenise, drop, split. Errors: `UserError` naming file and line, or the counts at each step."""
    numbers, lengths, keys = array.array("q"), array.array("i"), array.array("Q")
    counts: Counter = Counter(rows=0)
    cache = _Cache()
    margins = 0
    form = None
    for number in range(len(source)):
        counts["rows"] += 1
        try:
            form = form or _form(source, number, purpose, data)
            row = _read(source, number, purpose, form, data)
            found = encode(row, purpose, tokenizer, data, source.name)
        except UserError as error:
            if data.on_bad_rows == "error" or not isinstance(error, BadRow):
                raise type(error)(_located(str(error), source, number)) from None
            counts["skipped: row that cannot be used"] += 1
            continue
        if found.dropped is not None:
            counts[f"dropped: {found.dropped}"] += 1
            continue
        for note in found.notes:
            counts[f"truncated: {note}"] += 1
        numbers.append(number)
        lengths.extend(len(ids) for ids, _ in found.sequences)
        keys.append(_split_key(row))
        margins += found.margin is not None
        cache.add(found.sequences)
    counts["kept"] = len(numbers)
    if margins:
        counts[WITH_MARGIN] = margins
    if not numbers:
        raise UserError(f"{source.name}: 0 rows left for {purpose}: {describe(counts)}; {_remedy(counts)}")
    train, evaluation = _split(np.array(keys, np.uint64), np.array(numbers, np.int64), data.eval_fraction)
    return Table(
        source=source,
        purpose=purpose,
        form=form or "",
        data=data,
        tokenizer=tokenizer,
        numbers=np.array(numbers, np.int64),
        lengths=np.array(lengths, np.int32).reshape(len(numbers), -1),
        train=train,
        eval=evaluation,
        counts=counts,
        cache=cache.arrays(),
    )


def require_batch(tables: Sequence[Table], batch_size: int) -> None:
    """UserError where a data set has fewer of what a batch is made of (rows, pairs, packed rows) than a batch."""
    first = tables[0]
    packed = first.purpose == "sft" and first.data.packing
    what = "packed rows" if packed else {"sft": "rows", "preferences": "pairs", "labels": "answers"}.get(first.purpose, "prompts")
    units = sum(packed_rows(t.train_lengths(), t.data.max_tokens) if packed else len(t.train) for t in tables)
    if units < batch_size:
        counts = describe(sum((table.counts for table in tables), Counter()))
        raise UserError(
            f"{first.source.name}: {units} {what} for training, fewer than batch_size = {batch_size} "
            f"({counts}; data.eval_fraction = {first.data.eval_fraction}); set batch_size to at most {units}, or give more data"
        )


def describe(counts: Counter) -> str:
    """Counts in the order of the filters, as one line."""
    return ", ".join(f"{value} {key}" for key, value in counts.items())


def _remedy(counts: Counter) -> str:
    worst = max((key for key in counts if key not in ("rows", "kept")), key=lambda key: counts[key], default="")
    if "longer than" in worst:
        return "raise data.max_prompt_tokens or data.max_tokens, or set data.long_prompts=truncate_left"
    if "equals" in worst and "truncation" in worst:
        return "raise data.max_tokens: the two answers of a pair differ only beyond it"
    if "equals" in worst:
        return (
            "a pair needs two different answers: mend the file, or say with data.columns.chosen and data.columns.rejected "
            "which columns hold them"
        )
    if "skipped" in worst:
        return "set data.on_bad_rows=error to see the first bad row"
    return "set data.path to another file, or data.columns to the columns that hold its texts"


def _located(message: str, source: Source, number: int) -> str:
    """Messages are made with the file's name; the line is looked up only where one is shown."""
    if message.startswith(f"{source.name}:") and not message.startswith(f"{source.name}: "):
        return message
    return f"{source.where(number)}: {message.removeprefix(f'{source.name}: ')}"


def _form(source: Source, number: int, purpose: Purpose, data: Data) -> str:
    return detect(prepare(source.row(number), data, source.name), purpose, source.name)


def _read(source: Source, number: int, purpose: Purpose, form: str, data: Data) -> Row:
    return normalise(prepare(source.row(number), data, source.name), purpose, form, source.name)


def _split_key(row: Row) -> int:
    """Hash of what a row asks, so that one prompt is never on both sides of the split."""
    text = render_plain(row.prompt)
    if not text and isinstance(row.chosen, list):
        text = render_plain([message for message in row.chosen if message["role"] != "assistant"][:1])
    text = text or render_plain(row.chosen)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _split(keys: np.ndarray, numbers: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Training and evaluation examples, by hash of the prompt: independent of order, seed, and of what other rows are dropped.

    With fewer than 20 distinct prompts the row's number is hashed instead. Each side gets at least one row where both exist.
    """
    if not 0.0 <= fraction < 1.0:
        raise UserError(f"data.eval_fraction = {fraction}: must be at least 0 and below 1")
    if np.unique(keys).size < _FEW_PROMPTS:
        keys = order.mix(numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    held = keys.astype(np.float64) < fraction * 2.0**64
    if fraction > 0 and len(keys) > 1:
        if not held.any():
            held[int(np.argmin(keys))] = True
        elif held.all():
            held[int(np.argmax(keys))] = False
    return np.flatnonzero(~held), np.flatnonzero(held)


def columns_of(rows: list[Row]) -> dict[str, list[Any]]:
    """The other columns of rows, as lists; None where a row lacks one."""
    names = dict.fromkeys(name for row in rows for name in row.columns)
    return {name: [row.columns.get(name) for row in rows] for name in names}
