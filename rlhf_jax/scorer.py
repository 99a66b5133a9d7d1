"""A reward model from a directory that scores texts: for `rlhf-jax serve` and `rlhf-jax evaluate`.

score = (raw - mean) / std at the last token that is not config.json's padding token, end-of-sequence included where the answer is
finished: that of transformers for the same directory and tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax import build, config, parallel, scoring
from rlhf_jax.build import Loaded
from rlhf_jax.data.encode import sequence
from rlhf_jax.data.formats import Text
from rlhf_jax.data.tokenizer import Tokenizer, load_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.types import Params, Sequences

SHORTEST = 32  # tokens; batches are this wide or a power of two times it
UNKNOWN_LENGTH = 4096  # tokens, for a model whose config.json names no length
ROWS = 16  # sequences scored at one time, or the next multiple of the devices that share them


@dataclass
class Scorer:
    """A loaded reward model."""

    loaded: Loaded
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    max_length: int  # tokens of prompt and answer together
    rows: int  # sequences scored at one time
    compiled: Any  # (params, Sequences) -> f32[rows]

    def encode(self, prompt: Text, response: str, finished: bool = True) -> list[int]:
        """Ids of a prompt (text or messages) with its answer. Errors: `UserError` where they are longer than the model takes."""
        answer: Text = response if isinstance(prompt, str) else [{"role": "assistant", "content": response}]
        return self.checked(sequence(prompt, answer, finished, self.tokenizer).ids)

    def checked(self, ids: list[int]) -> list[int]:
        """The ids, where the model takes so many. Errors: `UserError`."""
        if not 0 < len(ids) <= self.max_length:
            raise UserError(
                f"prompt and answer have {len(ids)} tokens and the reward model takes 1 to {self.max_length}; shorten them"
            )
        return ids

    def score(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Scores f32[len(rows)], reward units. A score depends on its own row alone."""
        found: list[np.ndarray] = []
        for first in range(0, len(rows), self.rows):
            part = rows[first : first + self.rows]
            batch = parallel.place(_batch(part, self.rows, self.tokenizer.pad_id), parallel.batch_sharding(self.mesh))
            found.append(np.asarray(parallel.fetch(self.compiled(self.loaded.params, batch)))[: len(part)])
        return np.concatenate(found) if found else np.zeros(0, np.float32)


def open_scorer(
    path: str | Path, *, mesh: config.Mesh | None = None, devices: list[Any] | None = None, dtype: Any = "float32"
) -> Scorer:
    """Load a reward model and its tokenizer; UserError where the directory is none (a language model has no scalar head)."""
    tokenizer = load_tokenizer(path)
    settings = config.Model(path=str(path), compute_dtype=dtype)
    build.check_scores(path, str(path))
    where = parallel.make_mesh(mesh or build.widest_mesh(path, devices), devices)
    loaded = build.load(settings, where, head="score", key=None, real_vocab=tokenizer.vocab_size, path=str(path), trained=False)
    apply, calibration = scoring.make_score_apply(loaded.model), loaded.calibration

    def score(params: Params, batch: Sequences) -> jax.Array:
        ends = scoring.readable(batch.tokens, batch.mask, calibration.pad_id)
        return (scoring.at_last_token(apply(params, None, batch), ends) - calibration.mean) / calibration.std

    compiled = parallel.compile_step(score, out=parallel.batch_sharding(where))
    parts = parallel.axis_size(where, "batch")
    return Scorer(loaded, tokenizer, where, loaded.spec.max_length or UNKNOWN_LENGTH, -(-ROWS // parts) * parts, compiled)


def _batch(rows: Sequence[Sequence[int]], count: int, pad_id: int) -> Sequences:
    """Token lists as right-padded rows; missing ones hold padding."""
    width = max(SHORTEST, 1 << (max(map(len, rows)) - 1).bit_length())
    tokens: Any = np.full((count, width), pad_id, np.int32)
    mask: Any = np.zeros((count, width), bool)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    return Sequences(tokens=tokens, mask=mask, target_mask=mask)
