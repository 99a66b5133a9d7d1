"""The tokenizer of a run: the model's, the task's, or one trained on the run's own texts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_jax.config import Data, Model
from rlhf_jax.data.formats import Purpose, Text, detect, normalise, prepare
from rlhf_jax.data.sources import BadRow, Source
from rlhf_jax.data.table import open_sources
from rlhf_jax.data.tokenizer import TEMPLATE, load_tokenizer, read_template, train_bpe
from rlhf_jax.data.vocabulary import Tokenizer
from rlhf_jax.errors import UserError

_CORPUS_ROWS = 200_000  # enough for any byte-level vocabulary that is trained on the spot


def corpus(data: Data, purpose: Purpose, *, seed: int = 0) -> Iterator[str]:
    """The texts of a data set, to train a vocabulary on: prompts and answers as strings, bad rows left out."""
    sources, _ = open_sources(data, purpose=purpose, seed=seed)
    for source in sources:
        for number in range(min(len(source), _CORPUS_ROWS)):
            yield from _texts(source, number, data, purpose)


def _texts(source: Source, number: int, data: Data, purpose: Purpose) -> list[str]:
    try:
        row = prepare(source.row(number), data, source.name)
        found = normalise(row, purpose, detect(row, purpose, source.name), source.name)
    except BadRow:
        return []  # the scan that follows reports it, or skips it
    parts: list[Text] = [found.prompt, found.chosen]
    if purpose == "preferences":
        parts.append(found.rejected)
    return [text for part in parts for text in ([part] if isinstance(part, str) else [m["content"] for m in part]) if text]


def run_tokenizer(model: Model, data: Data, purpose: Purpose, *, seed: int = 0, out_dir: str | Path | None = None) -> Tokenizer:
    """The tokenizer that a configuration means.

    `model.tokenizer`, else that of `model.path`, else the embedded task's, else (model.scratch) a byte-level BPE trained on the
    run's data and saved in `out_dir`. Errors: `UserError`.
    """
    template = None if model.chat_template is None else read_template(model.chat_template)
    directory = model.tokenizer or model.path
    if directory is not None:
        return load_tokenizer(directory, chat_template=template)
    if data.task is not None:
        return _task(data.task).tokenizer()
    if model.scratch is None:
        raise UserError("model: give model.path (a directory), or model.scratch to start from random weights")
    texts = corpus(data, purpose, seed=seed)
    return train_bpe(texts, model.scratch.vocabulary, out_dir, chat_template=template or TEMPLATE)


def _task(name: str) -> Any:
    from rlhf_jax.data.tasks import TASKS

    return TASKS[name]
