"""Batches of every stage: numpy inside the records of `types.py`, each a pure function of (data, seed, step).

Shapes are static: T = max_tokens and P = max_prompt_tokens, or the longest example rounded up to 8 where that is less.
Every process makes the whole batch, and its devices take their rows of it.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rlhf_jax import types
from rlhf_jax.config import Data
from rlhf_jax.data import buckets, order
from rlhf_jax.data.encode import prompt_text
from rlhf_jax.data.formats import Purpose
from rlhf_jax.data.packing import pack, padded_fraction
from rlhf_jax.data.sources import memory_source
from rlhf_jax.data.table import WITH_MARGIN, Table, columns_of, open_sources, require_batch, scan
from rlhf_jax.data.vocabulary import Tokenizer
from rlhf_jax.errors import UserError


@dataclass(frozen=True)
class Tables:
    """The sources of a data set. Example i of table t has the index first[t] + i."""

    tables: tuple[Table, ...]
    weights: tuple[float, ...]  # shares of the draws
    first: np.ndarray  # i64[S]
    tokenizer: Tokenizer
    seed: int
    batch_size: int

    def locate(self, index: int) -> tuple[Table, int]:
        table = int(np.searchsorted(self.first, index, side="right")) - 1
        return self.tables[table], int(index) - int(self.first[table])

    def train(self, step: int, units: tuple[int, ...]) -> list[tuple[int, int]]:
        """Table and unit (training example or packed row) of every row of a step's batch."""
        if len(units) == 1:
            return [(0, int(unit)) for unit in order.indices(self.seed, step, self.batch_size, units[0])]
        tables, rows = order.mixture(self.seed, step, self.batch_size, units, self.weights)
        return [(int(table), int(row)) for table, row in zip(tables, rows, strict=True)]

    def train_index(self, step: int) -> np.ndarray:
        """Index i64[B] of the examples of a step's batch."""
        drawn = self.train(step, tuple(len(table.train) for table in self.tables))
        return np.asarray([self.first[table] + self.tables[table].train[unit] for table, unit in drawn], np.int64)

    def eval_index(self) -> np.ndarray:
        """Index i64[·] of every evaluation example."""
        return np.concatenate([first + table.eval for first, table in zip(self.first, self.tables, strict=True)])

    def eval_batches(self, most: int | None = None) -> Iterator[np.ndarray]:
        """Index i64[B] of the evaluation examples, a batch at a time; -1 on the rows that only fill the last one.

        With `most` at most so many examples, evenly spaced: also of a sorted file they stand for all.
        """
        index = self.eval_index()
        if most is not None and most < len(index):
            index = index[np.arange(most) * len(index) // most]
        for start in range(0, len(index), self.batch_size):
            part = index[start : start + self.batch_size]
            yield np.pad(part, (0, self.batch_size - len(part)), constant_values=-1)

    def longest(self, limit: int) -> int:
        longest = max(int(table.lengths.max()) for table in self.tables)
        return int(buckets.rounded(np.asarray(longest), limit))

    def train_lengths(self) -> list[np.ndarray]:
        """Of every source."""
        return [table.train_lengths() for table in self.tables]

    def counts(self) -> Counter:
        return sum((table.counts for table in self.tables), Counter())

    def fingerprint(self) -> str:
        """Hash of rows, tokenizer, split and mixture, for the checkpoint: resuming on other data is refused."""
        parts = [*(table.digest() for table in self.tables), *(f"{weight:.9g}" for weight in self.weights)]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class SFTData:
    """Sequences for fine-tuning; answers (all assistant turns of a conversation) are trained."""

    tables: Tables
    length: int  # T
    packs: tuple[list[np.ndarray], ...] | None  # per table: examples (positions in table.train) of every packed row
    padded_fraction: float  # of training rows

    def batch(self, step: int) -> types.Sequences:
        """The training batch of a step."""
        if self.packs is None:
            chosen = [[index] for index in self.tables.train_index(step)]
        else:
            drawn = self.tables.train(step, tuple(map(len, self.packs)))
            chosen = [self.tables.first[t] + self.tables.tables[t].train[self.packs[t][unit]] for t, unit in drawn]
        return self._rows(chosen)

    def eval_batches(self, most: int | None = None) -> Iterator[tuple[types.Sequences, np.ndarray]]:
        """Evaluation batches (of at most `most` rows), and valid bool[B]: False on the rows that only fill the last one."""
        for index in self.tables.eval_batches(most):
            yield self._rows([[] if i < 0 else [i] for i in index]), index >= 0

    def fingerprint(self) -> str:
        return self.tables.fingerprint() + (f"-packed{self.length}" if self.packs else "")

    def _rows(self, rows: Sequence[Sequence[int]]) -> types.Sequences:
        shape = (len(rows), self.length)
        tokens: Any = np.full(shape, self.tables.tokenizer.pad_id, np.int32)
        trained: Any = np.zeros(shape, bool)
        segments: Any = np.zeros(shape, np.int32)
        positions: Any = np.zeros(shape, np.int32)
        for row, examples in enumerate(rows):
            at = 0
            for segment, index in enumerate(examples):
                table, example = self.tables.locate(int(index))
                ids, keep = table.example(example)[0]
                here = slice(at, at + len(ids))
                tokens[row, here], trained[row, here] = ids, keep
                segments[row, here], positions[row, here] = segment + 1, np.arange(len(ids))
                at += len(ids)
        packed = self.packs is not None
        return types.Sequences(
            tokens=tokens,
            mask=segments > 0,
            target_mask=trained,
            segments=segments if packed else None,
            positions=positions if packed else None,
        )


@dataclass(frozen=True)
class PreferenceData:
    """Pairs of answers to the same prompt."""

    tables: Tables
    length: int  # T
    has_margin: bool

    def batch(self, step: int) -> types.Preferences:
        """The training batch of a step."""
        return self._pairs(self.tables.train_index(step))

    def eval_batches(self, most: int | None = None) -> Iterator[tuple[types.Preferences, np.ndarray]]:
        """Evaluation batches (of at most `most` pairs), and valid bool[B]: False on the rows that only fill the last one."""
        for index in self.tables.eval_batches(most):
            yield self._pairs(index), index >= 0

    def fingerprint(self) -> str:
        return self.tables.fingerprint()

    def _pairs(self, index: np.ndarray) -> types.Preferences:
        shape = (2, len(index), self.length)
        tokens: Any = np.full(shape, self.tables.tokenizer.pad_id, np.int32)
        mask: Any = np.zeros(shape, bool)
        trained: Any = np.zeros(shape, bool)
        margin: Any = np.zeros(len(index), np.float32)
        for row, number in enumerate(index):
            if number < 0:
                continue
            table, example = self.tables.locate(int(number))
            for side, (ids, keep) in enumerate(table.example(example)):
                tokens[side, row, : len(ids)], trained[side, row, : len(ids)] = ids, keep
                mask[side, row, : len(ids)] = True
            if self.has_margin:
                margin[row] = table.margin(example)
        chosen, rejected = (types.Sequences(tokens=tokens[s], mask=mask[s], target_mask=trained[s]) for s in (0, 1))
        return types.Preferences(chosen=chosen, rejected=rejected, margin=margin if self.has_margin else None)


@dataclass(frozen=True)
class LabelledData:
    """Single answers marked good or bad (KTO)."""

    answers: SFTData

    @property
    def tables(self) -> Tables:
        return self.answers.tables

    def batch(self, step: int) -> types.Labelled:
        """The training batch of a step."""
        return self._labelled(self.tables.train_index(step))

    def eval_batches(self, most: int | None = None) -> Iterator[tuple[types.Labelled, np.ndarray]]:
        """Evaluation batches (of at most `most` rows), and valid bool[B]: False on the rows that only fill the last one."""
        for index in self.tables.eval_batches(most):
            yield self._labelled(index), index >= 0

    def fingerprint(self) -> str:
        return self.tables.fingerprint()

    def _labelled(self, index: np.ndarray) -> types.Labelled:
        desirable: Any = np.zeros(len(index), bool)
        for row, number in enumerate(index):
            if number >= 0:
                table, example = self.tables.locate(int(number))
                desirable[row] = table.desirable(example)
        return types.Labelled(
            sequences=self.answers._rows([[] if number < 0 else [number] for number in index]), desirable=desirable
        )


@dataclass(frozen=True)
class PromptData:
    """Prompts for the actor, and what rewards need to know about them."""

    tables: Tables
    length: int  # P, of the widest bucket
    buckets: tuple[buckets.Bucket, ...]

    def batch(self, step: int) -> types.Prompts:
        """The prompts of a step, all of one of the widths."""
        tables = self.tables
        if len(self.buckets) == 1:
            return self.prompts(tables.train_index(step))
        number, drawn = buckets.draw(self.buckets, tables.seed, step, tables.batch_size)
        index = np.asarray([tables.first[table] + tables.tables[table].train[row] for table, row in drawn], np.int64)
        return self.prompts(index, self.buckets[number].width)

    @property
    def padded_fraction(self) -> float:
        """Share of the prompts' tokens that are padding."""
        return buckets.padded_fraction(self.buckets, self.tables.train_lengths())

    def eval_batch(self, count: int) -> types.Prompts:
        """`count` fixed prompts, the same at every call: evaluation rows first, then (where those run out) training rows."""
        found = [self.tables.eval_index()]
        found += [first + table.train for first, table in zip(self.tables.first, self.tables.tables, strict=True)]
        return self.prompts(np.resize(np.concatenate(found), count) if count else np.zeros(0, np.int64))

    def prompts(self, index: np.ndarray, width: int | None = None) -> types.Prompts:
        """Left-padded prompts of the examples with these indices; width P by default that of the widest."""
        width = width or self.length
        tokens: Any = np.full((len(index), width), self.tables.tokenizer.pad_id, np.int32)
        mask: Any = np.zeros(tokens.shape, bool)
        for row, number in enumerate(index):
            table, example = self.tables.locate(int(number))
            ids, _ = table.example(example)[0]
            tokens[row, width - len(ids) :], mask[row, width - len(ids) :] = ids, True
        rows: Any = np.asarray(index, np.int32)
        return types.Prompts(tokens=tokens, mask=mask, index=rows)

    def columns(self, index: Any) -> dict[str, list[Any]]:
        """The data rows' other columns, such as the answer."""
        return columns_of([self._row(i) for i in np.asarray(index)])

    def texts(self, index: Any) -> list[str]:
        """The prompts as text: as given, or as the chat template renders them."""
        return [prompt_text(self._row(i).prompt, self.tables.tokenizer) for i in np.asarray(index)]

    def fingerprint(self) -> str:
        return self.tables.fingerprint()

    def _row(self, index: Any) -> Any:
        table, example = self.tables.locate(int(index))
        return table.row(example)


def make_tables(
    data: Data,
    tokenizer: Tokenizer,
    purpose: Purpose,
    *,
    seed: int,
    batch_size: int,
    rows: Sequence[dict[str, Any]] | None = None,
) -> Tables:
    """Open and scan the sources. `rows` (a list of dictionaries) stands for the file. Errors: `UserError`."""
    if data.max_tokens < 2 or data.max_prompt_tokens < 1:
        raise UserError(
            f"data.max_tokens = {data.max_tokens} (at least 2), data.max_prompt_tokens = {data.max_prompt_tokens} (at least 1)"
        )
    if rows is not None:
        sources, weights = [memory_source(rows)], [1.0]
    else:
        sources, weights = open_sources(data, purpose=purpose, seed=seed)
    tables = tuple(scan(source, purpose, tokenizer, data) for source in sources)
    require_batch(tables, batch_size)
    sizes = [len(table.numbers) for table in tables]
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    return Tables(tables, tuple(weights), first, tokenizer, seed, batch_size)


def make_sft_data(
    data: Data, tokenizer: Tokenizer, *, seed: int, batch_size: int, rows: Sequence[dict[str, Any]] | None = None
) -> SFTData:
    """Fine-tuning data of a configuration."""
    tables = make_tables(data, tokenizer, "sft", seed=seed, batch_size=batch_size, rows=rows)
    lengths = tables.train_lengths()
    packs = tuple(pack(part, data.max_tokens) for part in lengths) if data.packing else None
    length = data.max_tokens if packs is not None else tables.longest(data.max_tokens)
    units = [len(part) for part in (lengths if packs is None else packs)]
    if packs is not None and len(packs) > 1:  # a draw is a row, and shares are of conversations: of long ones a row holds fewer
        each = zip(tables.weights, units, lengths, strict=True)
        tables = replace(tables, weights=tuple(weight * rows / max(len(part), 1) for weight, rows, part in each))
    padded = [padded_fraction(part, rows, length) for part, rows in zip(lengths, units, strict=True)]
    return SFTData(tables, length, packs, float(np.average(padded, weights=tables.weights)))


def make_preference_data(
    data: Data, tokenizer: Tokenizer, *, seed: int, batch_size: int, rows: Sequence[dict[str, Any]] | None = None
) -> PreferenceData:
    """Preference data of a configuration. With margins where any row has one: a row without counts 0."""
    tables = make_tables(data, tokenizer, "preferences", seed=seed, batch_size=batch_size, rows=rows)
    return PreferenceData(tables, tables.longest(data.max_tokens), has_margin=WITH_MARGIN in tables.counts())


def make_prompt_data(
    data: Data, tokenizer: Tokenizer, *, seed: int, batch_size: int, rows: Sequence[dict[str, Any]] | None = None
) -> PromptData:
    """Prompts of a configuration."""
    tables = make_tables(data, tokenizer, "prompts", seed=seed, batch_size=batch_size, rows=rows)
    length, lengths, least = tables.longest(data.max_prompt_tokens), tables.train_lengths(), batch_size
    found = buckets.make_buckets(lengths, tables.weights, count=data.length_buckets, limit=length, least=least)
    return PromptData(tables, length, found)


def make_labelled_data(
    data: Data, tokenizer: Tokenizer, *, seed: int, batch_size: int, rows: Sequence[dict[str, Any]] | None = None
) -> LabelledData:
    """Answers marked good or bad, of a configuration."""
    tables = make_tables(data, tokenizer, "labels", seed=seed, batch_size=batch_size, rows=rows)
    return LabelledData(SFTData(tables, tables.longest(data.max_tokens), None, 0.0))
