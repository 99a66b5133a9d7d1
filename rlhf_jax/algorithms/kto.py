"""Kahneman-Tversky optimisation: learns from single answers marked good or bad, no pairs needed.

With q = log pi(y|x) - log ref(y|x) and z = max(0, mean over the batch of log pi(y'|x) - log ref(y'|x)) for mismatched
prompts x and answers y' (an estimate of KL(pi || ref), no gradient), one answer costs, Ethayarajh et al. 2024
(arXiv:2402.01306), section 4.2,

    desirable_weight   (1 - sigmoid(beta (q - z)))        if y is desirable
    undesirable_weight (1 - sigmoid(beta (z - q)))        if it is not
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from rlhf_jax import config, ops
from rlhf_jax.algorithms.training import Offline, answer_logprobs, both_sides, join_rows, require, split_rows
from rlhf_jax.errors import UserError
from rlhf_jax.types import Frozen, Labelled, Metrics, Params, Preferences, Sequences

Apply = Callable[[Params, Frozen, Sequences], jax.Array]  # -> f32[B, T], log-probability of token t, nats


def reference_point(log_ratio: jax.Array, counted: jax.Array | None = None) -> jax.Array:
    """z = max(0, mean log pi/ref) over mismatched answers, f32[] nats, without gradient; 0 without any.

    Args: log_ratio f32[B], nats, summed over the tokens of each mismatched answer; counted bool[B], rows that are such an
      answer, default all.
    """
    chex.assert_rank(log_ratio, 1)
    counted = jnp.ones(log_ratio.shape, bool) if counted is None else counted
    return jax.lax.stop_gradient(jnp.maximum(ops.masked_mean(log_ratio, counted), 0.0))


def answer_loss(
    log_ratio: jax.Array,
    desirable: jax.Array,
    z: jax.Array,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> jax.Array:
    """Loss of each answer, f32[B]; the equation is at the top of this file.

    Args: log_ratio q f32[B], nats, summed over tokens; desirable bool[B]; z f32[] or f32[B], nats; beta: reward units per nat.
    """
    chex.assert_rank([log_ratio, desirable], 1)
    chex.assert_type(desirable, bool)
    good = desirable_weight * jax.nn.sigmoid(beta * (z - log_ratio))
    bad = undesirable_weight * jax.nn.sigmoid(beta * (log_ratio - z))
    return jnp.where(desirable, good, bad)


def partners(usable: jax.Array) -> jax.Array:
    """The next usable row after each usable one (after the last: the first), i32[B]; of other rows, any usable one.

    Args: usable bool[B], rows that have an answer; the others only fill the last batch of an evaluation.
    """
    chex.assert_rank(usable, 1)
    order = jnp.argsort(~usable, stable=True)
    return order[jnp.cumsum(usable) % jnp.maximum(jnp.sum(usable), 1)]


def mismatched(sequences: Sequences) -> Sequences:
    """Each prompt with its partner's answer (see `partners`); answers are cut where T ends.

    The prompt of a row is what precedes its first trained token. Args: sequences, i32[B, T], one a row, not packed.
    Source: the paper, section 4.2, as KTO's authors and TRL build the batch that estimates z.
    """
    tokens, mask, targets = sequences.tokens, sequences.mask, sequences.target_mask
    chex.assert_rank([tokens, mask, targets], 2)
    width = tokens.shape[1]
    usable = targets.any(1)
    partner = partners(usable)
    start = jnp.where(usable, jnp.argmax(targets, axis=1), mask.sum(1))  # of the answer, i32[B]
    column = jnp.arange(width)[None]
    # Column t of the new row is the other row's column t - start + other_start, once t has passed the prompt.
    source = column - start[:, None] + start[partner][:, None]
    inside = (column >= start[:, None]) & (source < width)

    def spliced(x: jax.Array) -> jax.Array:
        answer = jnp.take_along_axis(x[partner], jnp.clip(source, 0, width - 1), axis=1)
        empty = jnp.zeros((), x.dtype)
        return jnp.where(column < start[:, None], x, jnp.where(inside, answer, empty))

    return sequences.replace(tokens=spliced(tokens), mask=spliced(mask), target_mask=spliced(targets))


def labelled(batch: Preferences | Labelled) -> Labelled:
    """A pair is one desirable and one undesirable answer: all chosen rows, then all rejected ones."""
    if isinstance(batch, Labelled):
        return batch
    both = both_sides(batch)
    return Labelled(sequences=both, desirable=jnp.arange(both.tokens.shape[0]) < batch.chosen.tokens.shape[0])


def answer_log_ratio(apply: Apply, params: Params, frozen: Frozen, sequences: Sequences) -> jax.Array:
    """log pi - log ref of each answer, f32[B], nats; see `training.answer_logprobs`."""
    policy, reference = answer_logprobs(apply, params, frozen, sequences)
    return policy - reference


def prepare(apply: Apply, params: Params, frozen: Frozen, batch: Preferences | Labelled, micro_batches: int = 1) -> Labelled:
    """The batch with its reference point z, which must be that of the whole batch: made before it is split, part by part.

    Rows without an answer, and a row whose partner has the same prompt (the only one of the batch), are not in its mean.
    """
    prompts = (batch.desirable if isinstance(batch, Labelled) else batch.chosen.tokens).shape[0]
    if prompts < 2:
        raise UserError("batch_size is 1: KTO pairs every prompt with another row's answer; make batch_size at least 2")
    batch = labelled(batch)
    usable = jnp.any(batch.sequences.target_mask, 1)
    prompt = jnp.arange(usable.shape[0]) % prompts
    parts = split_rows(mismatched(batch.sequences), micro_batches)
    log_ratio = jax.lax.map(lambda part: answer_log_ratio(apply, jax.lax.stop_gradient(params), frozen, part), parts)
    z = reference_point(join_rows(log_ratio), usable & (prompt[partners(usable)] != prompt))
    return batch.replace(reference_point=jnp.full(batch.desirable.shape, z))


def denominators(batch: Preferences | Labelled) -> dict[str, jax.Array]:
    """Answers of the global batch that have a token, good and bad ones apart, at least 1."""
    return {name: jnp.maximum(count, 1.0) for name, count in _counts(batch).items()}


def weights(batch: Preferences | Labelled) -> dict[str, jax.Array]:
    """How many answers the rewards of each class are means of; 0 where a batch has none of it."""
    counts = _counts(batch)
    return {f"kto/{name}_reward": counts[name] for name in ("desirable", "undesirable")}


def _counts(batch: Preferences | Labelled) -> dict[str, jax.Array]:
    batch = labelled(batch)
    usable = jnp.any(batch.sequences.target_mask, 1)
    counts = {"answers": usable, "desirable": usable & batch.desirable, "undesirable": usable & ~batch.desirable}
    return {name: jnp.sum(rows).astype(jnp.float32) for name, rows in counts.items()}


def loss(
    settings: config.KTO, apply: Apply, params: Params, frozen: Frozen, batch: Labelled, counts: dict[str, jax.Array]
) -> tuple[jax.Array, Metrics]:
    """Mean loss of the global batch's answers (this part's share); `batch` comes from `prepare`."""
    z = require(batch.reference_point, "Labelled.reference_point: call prepare first; it")
    q = answer_log_ratio(apply, params, frozen, batch.sequences)
    losses = answer_loss(
        q,
        batch.desirable,
        z,
        beta=settings.beta,
        desirable_weight=settings.desirable_weight,
        undesirable_weight=settings.undesirable_weight,
    )
    usable = jnp.any(batch.sequences.target_mask, 1)
    good, bad = usable & batch.desirable, usable & ~batch.desirable
    value = ops.masked_sum(losses, usable) / counts["answers"]
    metrics = {
        "kto/loss": value,
        "kto/reference_point_nats": ops.masked_sum(z, usable) / counts["answers"],
        "kto/desirable_reward": settings.beta * ops.masked_sum(q, good) / counts["desirable"],
        "kto/undesirable_reward": settings.beta * ops.masked_sum(q, bad) / counts["undesirable"],
    }
    return value, metrics


def build(settings: config.KTO) -> Offline:
    """KTO with these settings, on preference pairs or labelled answers; what is frozen is a `types.Frozen`."""
    if settings.beta <= 0:
        raise UserError(f"kto.beta is {settings.beta:g}; it must be above 0, such as 0.1")
    return Offline(loss=functools.partial(loss, settings), denominators=denominators, prepare=prepare, weights=weights)
