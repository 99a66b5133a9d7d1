"""Many prompts answered in few rows: as rows finish, they are refilled with the next prompts inside the compiled loop.

Where lengths differ, a plain batch waits for its longest answer; here a row that has finished is free at once, and as soon as
`refill` rows are free the next prompts are prefilled into them. The answers are those of `sampling.make_sampler`, token for
token, because a row's randomness depends on (key, prompt index, t) alone.

The cache is a ring of S = P + R slots with one cursor: every row writes the same slot at the same time, one
`dynamic_update_slice` a step, and a prompt that enters is rolled so that it ends just before the cursor. A row sees the slots
that are younger than its own sequence is long, which is exactly its own sequence. Two nested loops (refill; decode until enough
rows are free) instead of a conditional: a conditional would copy the cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax import config, ops
from rlhf_jax import sampling as plain
from rlhf_jax.errors import UserError
from rlhf_jax.types import Model, Params, Prompts, Rollout


class Rows(NamedTuple):
    """The B rows that are decoded together."""

    owner: jax.Array  # i32[B], sequence that the row answers
    token: jax.Array  # i32[B], its last token
    length: jax.Array  # i32[B], tokens emitted
    offset: jax.Array  # i32[B], tokens of the prompt
    active: jax.Array  # bool[B], False: free
    seen: jax.Array | None  # bool[B, V], for the repetition penalty


class Work(NamedTuple):
    """State of the loop."""

    rows: Rows
    cache: Any
    answers: plain.Answers  # of all N sequences
    cursor: jax.Array  # i32[], slot that is written next
    waiting: jax.Array  # i32[], first sequence that no row has taken
    steps: jax.Array  # i32[], decoding steps
    refills: jax.Array  # i32[], prefills


def make_continuous_sampler(
    model: Model,
    sampling: config.Sampling,
    *,
    stop_ids: tuple[int, ...],
    pad_id: int,
    rows: int,
    refill: int | None = None,
    samples: int = 1,
    collect_kept: bool | None = None,
) -> plain.Sample:
    """As `sampling.make_sampler`, but of any number of prompts, `rows` at a time.

    `refill` rows (default a quarter) are prefilled together; it must be a multiple of `samples`, whose prompt is prefilled once.
    Raises UserError where these numbers, the sampling keys or the tokens make no sense.
    """
    plain.check(model, sampling, stop_ids, pad_id)
    refill = refill or usual_refill(rows, samples)
    if not 0 < refill <= rows or refill % samples:
        raise UserError(f"refill is {refill}; it must be a multiple of samples ({samples}) between 1 and rows ({rows})")

    counts: dict[str, Any] = {"rows": rows, "refill": refill, "samples": samples}
    told: dict[str, Any] = {"stop_ids": stop_ids, "pad_id": pad_id, "collect_kept": collect_kept}
    return lambda params, prompts, key: generate(model, sampling, params, prompts, key, **counts, **told)[0]


def usual_refill(rows: int, samples: int = 1) -> int:
    """Rows that are prefilled together: a quarter, in whole groups."""
    return samples * max(1, rows // 4 // samples)


def longest_case(sequences: int, rows: int, refill: int) -> tuple[int, int]:
    """(prefills, times that the rows are decoded to the end), where no answer ends early."""
    prefills, waves = 0, 0
    while sequences > 0:
        free, waves = rows, waves + 1
        while sequences > 0 and free >= min(refill, sequences):
            free, sequences, prefills = free - refill, sequences - refill, prefills + 1
    return prefills, waves


def generate(
    model: Model,
    sampling: config.Sampling,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    *,
    stop_ids: tuple[int, ...],
    pad_id: int,
    rows: int,
    refill: int,
    samples: int = 1,
    collect_kept: bool | None = None,
) -> tuple[Rollout, jax.Array, jax.Array]:
    """The rollout of all prompts, the decoding steps and the prefills it took, both i32[]."""
    prompts = plain.started(prompts)
    params = model.for_decoding(params)
    ring = Ring(model, params, prompts, sampling.max_new_tokens)
    sequences = plain.repeat_prompts(prompts, samples)
    keys = plain.row_keys(key, sequences)
    total, responses = sequences.index.shape[0], sampling.max_new_tokens

    def enough_free(work: Work) -> jax.Array:
        left = total - work.waiting
        return (left > 0) & ((~work.rows.active).sum() >= jnp.minimum(refill, left))

    def emit(answers: plain.Answers, rows: Rows, hidden: jax.Array) -> tuple[plain.Answers, Rows]:
        mine = jnp.minimum(rows.owner, total - 1)
        token, logprob, kept = plain.choose(model, sampling, params, stop_ids, hidden, keys[mine], rows.length, rows.seen)
        stopped = plain.is_stop(token, stop_ids)
        place = jnp.where(rows.active, rows.owner, total)
        answers = write(answers, place, rows.length, token, logprob, kept, stopped)
        seen = None if rows.seen is None else rows.seen | plain.one_hot(token, model.vocab_size)
        length = rows.length + 1
        active = rows.active & ~stopped & (length < responses)
        return answers, rows._replace(token=token, length=length, active=active, seen=seen)

    def take_prompts(work: Work) -> Work:
        chosen = jnp.argsort(work.rows.active)[:refill]
        owner = work.waiting + jnp.arange(refill, dtype=jnp.int32)
        taken = (owner < total) & ~work.rows.active[chosen]
        group = work.waiting // samples + jnp.arange(refill // samples, dtype=jnp.int32)
        entering = jax.tree.map(lambda leaf: leaf[jnp.minimum(group, prompts.index.shape[0] - 1)], prompts)
        hidden, cache = ring.prefill(entering, work.cursor, samples)
        entering = plain.repeat_prompts(entering.replace(sample=None), samples)
        fresh = Rows(
            owner=owner,
            token=jnp.zeros_like(owner),
            length=jnp.zeros_like(owner),
            offset=entering.mask.sum(-1, dtype=jnp.int32),
            active=taken,
            seen=None if work.rows.seen is None else plain.prompt_tokens_seen(entering, model.vocab_size),
        )
        answers, fresh = emit(work.answers, fresh, hidden)
        target = jnp.where(taken, chosen, rows)
        return work._replace(
            rows=jax.tree.map(lambda old, new: old.at[target].set(new, mode="drop"), work.rows, fresh),
            cache=ring.insert(work.cache, cache, target),
            answers=answers,
            waiting=work.waiting + refill,
            refills=work.refills + 1,
        )

    def decode(work: Work) -> Work:
        now = work.rows
        slot = work.cursor % ring.slots
        age = (slot - lax.broadcasted_iota(jnp.int32, (1, ring.slots), 1)) % ring.slots
        before = now.offset + now.length - 1  # tokens of the row that stand in the cache
        hidden, cache = model.decode(params, work.cache, now.token, before, slot, age <= before[:, None])
        answers, now = emit(work.answers, now, hidden)
        return work._replace(rows=now, cache=cache, answers=answers, cursor=work.cursor + 1, steps=work.steps + 1)

    def refill_then_decode(_: Any, work: Work) -> Work:
        return lax.while_loop(lambda work: work.rows.active.any() & ~enough_free(work), decode, take_prompts(work))

    collect = plain.collects(sampling, collect_kept)
    work = Work(
        rows=free_rows(model, sampling, rows),
        cache=ring.empty(rows),
        answers=plain.empty_answers(model, sampling, sequences, pad_id, collect)._replace(seen=None),
        cursor=jnp.int32(prompts.tokens.shape[1]),
        waiting=jnp.int32(0),
        steps=jnp.int32(0),
        refills=jnp.int32(0),
    )
    work = lax.fori_loop(0, -(-total // refill), refill_then_decode, work)
    return plain.as_rollout(sequences, work.answers), work.steps, work.refills


class Ring:
    """The cache as a ring: prompts enter wherever the cursor stands. Works for any cache whose leaves have a batch axis."""

    def __init__(self, model: Model, params: Params, prompts: Prompts, responses: int):
        self.model, self.params = model, params
        self.width = prompts.tokens.shape[1]
        self.slots = self.width + responses
        self.batch_axes, self.slot_axes = plain.cache_axes(model, params, prompts, self.slots)

    def empty(self, rows: int) -> Any:
        """A cache of `rows` rows that holds nothing."""
        shapes = plain.cache_shapes(self.model, self.params, rows, self.width, self.slots)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def prefill(self, prompts: Prompts, cursor: jax.Array, samples: int) -> tuple[jax.Array, Any]:
        """Last hidden states [refill, D] and the cache of the prompts, rolled so that they end just before the cursor."""
        hidden, cache = self.model.prefill(self.params, prompts.tokens, prompts.mask, self.slots)
        shift = cursor - self.width

        def place(leaf: jax.Array, batch: int, slots: int) -> jax.Array:
            rolled = leaf if slots < 0 else jnp.roll(leaf, shift, axis=slots)
            return rolled if samples == 1 else jnp.repeat(rolled, samples, axis=batch)

        last = hidden[:, -1] if samples == 1 else jnp.repeat(hidden[:, -1], samples, axis=0)
        return last, jax.tree.map(place, cache, self.batch_axes, self.slot_axes)

    def insert(self, cache: Any, entering: Any, target: jax.Array) -> Any:
        """Write rows into the cache at `target` i32[refill]; numbers beyond the last row are dropped."""

        def put(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
            where = (slice(None),) * axis + (target,)
            return old.at[where].set(new, mode="drop")

        return jax.tree.map(put, cache, entering, self.batch_axes)


def free_rows(model: Model, sampling: config.Sampling, rows: int) -> Rows:
    """Rows that answer nothing."""
    nothing = jnp.zeros((rows,), jnp.int32)
    penalised = sampling.repetition_penalty != 1
    return Rows(
        owner=nothing,
        token=nothing,
        length=nothing,
        offset=nothing,
        active=jnp.zeros((rows,), bool),
        seen=jnp.zeros((rows, model.vocab_size), bool) if penalised else None,
    )


def write(
    answers: plain.Answers,
    sequence: jax.Array,
    t: jax.Array,
    token: jax.Array,
    logprob: jax.Array,
    kept: jax.Array,
    stopped: jax.Array,
) -> plain.Answers:
    """Token t of every row into the sequence it answers; sequence numbers beyond the last are dropped."""
    return answers._replace(
        tokens=answers.tokens.at[sequence, t].set(token, mode="drop"),
        logprobs=answers.logprobs.at[sequence, t].set(logprob, mode="drop"),
        kept=None if answers.kept is None else answers.kept.at[sequence, t].set(ops.pack_kept(kept), mode="drop"),
        length=answers.length.at[sequence].set(t + 1, mode="drop"),
        finished=answers.finished.at[sequence].set(stopped, mode="drop"),
    )
