"""What `rlhf-jax data CONFIG` says: rows, columns, token lengths, what is dropped or cut and why, three examples."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.config import STAGES, Data, OnlineRun, Run
from rlhf_jax.data import buckets
from rlhf_jax.data.corpus import run_tokenizer
from rlhf_jax.data.formats import Purpose
from rlhf_jax.data.packing import packed_rows, padded_fraction
from rlhf_jax.data.table import Table, open_sources, purpose_of, require_batch, scan
from rlhf_jax.data.vocabulary import Tokenizer
from rlhf_jax.errors import UserError

OPEN, CLOSE = "⟦", "⟧"  # around trained tokens
_BINS = 10
_BAR = 40  # characters
_EXAMPLES = 3
_SHOWN = 700  # characters of an example


class Report(NamedTuple):
    text: str  # for the terminal
    rows: list[dict[str, Any]]  # the same numbers, one record a source


def validate(run: Run) -> Report:
    """Read the data of a run as its stage would. Errors: those that the stage would raise, before any model is loaded."""
    stage = next((name for name, cls in STAGES.items() if cls is type(run)), None)
    if stage is None:
        raise UserError(f"the data of a {type(run).__name__} cannot be checked; give the run file of one of {', '.join(STAGES)}")
    purpose = purpose_of(stage, run.data)
    tokenizer = run_tokenizer(run.model, run.data, purpose, seed=run.seed)
    jobs: list[tuple[Data, Purpose]] = [(run.data, purpose)]
    if isinstance(run, OnlineRun) and run.ptx_data is not None:
        jobs.append((run.ptx_data, "sft"))
    blocks, records = [], []
    for data, kind in jobs:
        sources, weights = open_sources(data, purpose=kind, seed=run.seed)
        tables = [scan(source, kind, tokenizer, data) for source in sources]
        require_batch(tables, _rows_of_a_step(run, kind))
        for table, weight in zip(tables, weights, strict=True):
            record = _record(table, weight, run)
            records.append(record)
            blocks.append(_text(table, record))
    head = f"tokenizer: {tokenizer.vocab_size} tokens, hash {tokenizer.hash}"
    return Report("\n\n".join(["\n".join([head, *(f"  {line}" for line in tokenizer.policies)]), *blocks]), records)


def _rows_of_a_step(run: Run, purpose: Purpose) -> int:
    return buckets.prompts_of_a_step(run) if isinstance(run, OnlineRun) and purpose == "prompts" else run.batch_size


def _record(table: Table, weight: float, run: Run) -> dict[str, Any]:
    lengths = table.lengths.reshape(-1)
    first = table.source.row(int(table.numbers[0]))
    units = _rows_of_a_step(run, table.purpose)
    record = {
        "source": table.source.name,
        "weight": weight,
        "stage": table.purpose,
        "format": table.form,
        "columns": {key: type(value).__name__ for key, value in first.items()},
        "counts": dict(table.counts),
        "train": len(table.train),
        "eval": len(table.eval),
        "steps_per_epoch": round(len(table.train) / units, 1),
        "tokens": {name: int(np.percentile(lengths, q)) for name, q in (("min", 0), ("median", 50), ("p95", 95), ("max", 100))},
        "fingerprint": table.digest(),
    }
    if table.purpose == "sft":
        of_train = table.train_lengths()
        limit = table.data.max_tokens
        record["padding"] = round(padded_fraction(of_train, len(of_train), min(limit, -(-int(lengths.max()) // 8) * 8)), 4)
        record["padding_packed"] = round(padded_fraction(of_train, packed_rows(of_train, limit), limit), 4)
    if isinstance(run, OnlineRun) and table.purpose == "prompts" and len(table.train):
        of_train = table.train_lengths()
        limit = int(buckets.rounded(table.lengths.max(), table.data.max_prompt_tokens))
        record["padding_buckets"] = list(_widths(run, of_train, limit, min(units, len(table.train))))
    return record


def _widths(run: OnlineRun, lengths: np.ndarray, limit: int, least: int) -> Iterator[dict[str, Any]]:
    """What every number of widths leaves of padding, and costs in programs."""
    own = run.data.length_buckets
    counts = sorted({1, 2, 3, 4, 6, 8, 12, buckets.MOST, own})
    made = {n: buckets.make_buckets([lengths], (1.0,), count=n, limit=limit, least=least) for n in counts}
    for found in {len(each): each for each in made.values()}.values():
        yield {
            "widths": [bucket.width for bucket in found],
            "prompts": round(buckets.padded_fraction(found, [lengths]), 4),
            "with_answers": round(buckets.padded_fraction(found, [lengths], run.sampling.max_new_tokens), 4),
            "programs": buckets.programs(run, len(found)),
            "chosen": len(found) == len(made[own]),
        }


def _text(table: Table, record: dict[str, Any]) -> str:
    lines = [
        f"{record['source']} for {record['stage']} (format {record['format']}, weight {record['weight']:g})",
        "  columns: " + ", ".join(f"{key} ({kind})" for key, kind in record["columns"].items()),
    ]
    lines += [f"  {count:>8} {_plural(what)}" for what, count in record["counts"].items()]
    lines.append(f"  {record['train']:>8} train ({record['steps_per_epoch']} steps an epoch), {record['eval']} evaluation")
    tokens = record["tokens"]
    lines.append(f"  tokens: min {tokens['min']}, median {tokens['median']}, 95 % {tokens['p95']}, max {tokens['max']}")
    lines += [f"  {line}" for line in histogram(table.lengths.reshape(-1))]
    if "padding" in record:
        lines.append(f"  padding: {record['padding']:.1%} of a batch; {record['padding_packed']:.1%} with data.packing=true")
    if "padding_buckets" in record:
        lines.append("  data.length_buckets: padding of prompts; of these and answers of max_new_tokens; programs of the run")
        for each in record["padding_buckets"]:
            shares = f"{each['prompts']:>6.1%}, {each['with_answers']:>6.1%}, {each['programs']:>2} programs"
            widths = ", ".join(map(str, each["widths"]))
            lines.append(f"    {len(each['widths']):>2}: {shares}; {widths} tokens wide{' (this run)' if each['chosen'] else ''}")
    lines.append(f"  fingerprint {record['fingerprint']}")
    shown = np.linspace(0, len(table.numbers) - 1, min(_EXAMPLES, len(table.numbers))).astype(int)
    for example in dict.fromkeys(shown.tolist()):
        lines += ["", f"  {table.source.where(int(table.numbers[example]))}   (trained tokens between {OPEN} {CLOSE})"]
        for side, (ids, trained) in enumerate(table.example(example)):
            name = "" if table.lengths.shape[1] == 1 else ("chosen: ", "rejected: ")[side]
            lines += [f"    {line}" for line in (name + marked(table.tokenizer, ids, trained)).split("\n")]
    return "\n".join(lines)


def _plural(what: str) -> str:
    return {"rows": "rows read", "kept": "kept"}.get(what, what)


def histogram(lengths: np.ndarray) -> list[str]:
    """Token lengths i32[N] as lines of text, one a bin."""
    top = int(lengths.max())
    width = max(1, -(-(top + 1) // _BINS))
    counts = np.bincount(lengths // width, minlength=top // width + 1)
    peak = int(counts.max())
    bars = ["█" * max(int(count > 0), round(_BAR * int(count) / peak)) for count in counts]
    return [
        f"{low * width:>6} - {(low + 1) * width - 1:<6} {bar:<{_BAR}} {count}"
        for low, (bar, count) in enumerate(zip(bars, counts.tolist(), strict=True))
    ]


def marked(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, trained: Sequence[bool] | np.ndarray) -> str:
    """Tokens as text, special tokens shown, the trained ones in brackets; long texts lose their middle."""
    parts, at = [], 0
    while at < len(ids):
        end = at
        while end < len(ids) and bool(trained[end]) == bool(trained[at]):
            end += 1
        text = _visible(tokenizer.decode(list(ids[at:end]), skip_special=False))
        if len(text) > _SHOWN:
            text = f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}"
        parts.append(f"{OPEN}{text}{CLOSE}" if trained[at] else text)
        at = end
    return "".join(parts)


def _visible(text: str) -> str:
    """Control characters spelled out, so that no data can steer a terminal."""
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
