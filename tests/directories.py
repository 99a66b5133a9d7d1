"""Tiny model directories with random weights, made once a process: language models and a reward model with one vocabulary."""

import functools
import shutil
import tempfile
from pathlib import Path

import jax

from rlhf_jax import models, testing
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.types import Calibration

VOCABULARY = 300
LENGTH = 128  # tokens that these models are described for
_kept: list[tempfile.TemporaryDirectory] = []  # until the process ends


@functools.cache
def language_model(seed: int = 0, *, chat: bool = True) -> Path:
    """A language model; without `chat` its tokenizer has no chat template."""
    return _save("lm", seed, chat)


@functools.cache
def reward_model(seed: int = 1) -> Path:
    """A reward model with a calibration."""
    return _save("score", seed, True)


def on_hub(cache: Path, source: Path, name: str = "org/tiny") -> Path:
    """A copy of a model directory where huggingface_hub keeps what it has fetched below `cache`."""
    kept = cache / f"models--{name.replace('/', '--')}"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("abc")
    return Path(shutil.copytree(source, kept / "snapshots" / "abc"))


def _save(head: str, seed: int, chat: bool) -> Path:
    holder = tempfile.TemporaryDirectory(prefix="rlhf-jax-tiny-")
    _kept.append(holder)
    out = Path(holder.name) / head
    tokenizer = train_bpe(["what is 2 + 3 ? it is 5 ."] * 4, VOCABULARY)
    spec = models.scratch_spec(testing.tiny_scratch(VOCABULARY), tokenizer.vocab_size)
    params = jax.jit(lambda key: models.make_model(spec).init(key, head=head))(jax.random.key(seed))
    models.save_checkpoint(out, spec, params, head=head, tokenizer=tokenizer, calibration=Calibration(0.5, 2.0))
    if not chat:
        (out / "chat_template.jinja").unlink()
        config = out / "tokenizer_config.json"
        config.write_text(config.read_text().replace('"chat_template"', '"was_chat_template"'))
    return out
