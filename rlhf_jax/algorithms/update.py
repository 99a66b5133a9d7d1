"""The update of every online algorithm: epochs x minibatches over a batch of experience, as one `lax.scan`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import ops, packed
from rlhf_jax.algorithms.training import Loss, accumulate, apply_gradients, require
from rlhf_jax.errors import UserError
from rlhf_jax.types import Experience, Frozen, Metrics, Moments, Params, Rollout, RunState, Scored, Sequences, TrainState


class Losses(NamedTuple):
    """What one minibatch minimises. Losses are shares: divided by `denominators`, which are counted before micro-batching."""

    policy: Loss  # (params, frozen: Frozen, batch: Experience, denominators, kl_coef)
    value: Loss | None  # (params, frozen, batch: Experience, denominators); None without a critic
    denominators: Callable[[Experience], dict[str, jax.Array]]  # whole minibatch -> counts
    prepare: Callable[[Experience], Experience] = lambda batch: batch  # whole minibatch, before it is split
    ptx: Loss | None = None  # (params, frozen, text: Sequences, {"tokens": f32[]}), weighted
    adapt: Callable[[jax.Array, Experience], jax.Array] = lambda kl_coef, _: kl_coef  # next KL coefficient


class Passes(NamedTuple):
    """How an update goes over its experience."""

    epochs: int = 1
    minibatches: int = 1  # optimiser steps per epoch
    micro_batches: int = 1  # parts of a minibatch whose gradients are summed
    packing: packed.Packing | None = None  # parts hold packed rows, and there are no more than the minibatch fills
    kl_stop: float | None = None  # nats per token
    critic_warmup: int = 0  # iterations
    ema_decay: float | None = None


def minibatch_rows(key: jax.Array, batch_size: int, epochs: int, minibatches: int) -> jax.Array:
    """Rows of every minibatch: i32[epochs * minibatches, B // minibatches], a fresh permutation of the batch each epoch."""
    if batch_size % minibatches:
        raise UserError(f"batch of {batch_size} rows cannot be split into {minibatches} equal minibatches; change minibatches")
    keys = jax.vmap(lambda epoch: jax.random.fold_in(key, epoch))(jnp.arange(epochs))
    order = jax.vmap(lambda k: jax.random.permutation(k, batch_size))(keys)
    return order.reshape(epochs * minibatches, batch_size // minibatches)


def update_moments(moments: Moments, x: jax.Array) -> Moments:
    """Merge the finite values of x f32[B] into a running count, mean and sum of squares (Chan, Golub & LeVeque 1979)."""
    keep = jnp.isfinite(x)
    count = jnp.sum(keep).astype(jnp.float32)
    mean = ops.masked_mean(x, keep)
    total = jnp.maximum(moments.count + count, 1.0)
    delta = mean - moments.mean
    m2 = moments.m2 + jnp.sum(jnp.where(keep, x - mean, 0.0) ** 2) + delta**2 * moments.count * count / total
    return Moments(count=moments.count + count, mean=moments.mean + delta * count / total, m2=m2)


def rollout_metrics(rollout: Rollout, scores: jax.Array, scored: Scored) -> Metrics:
    """Metrics that every online algorithm reports of a rollout: scores, KL to the reference, lengths, sampler mismatch.

    KL is the exact one where it was computed, else k1. Rows whose score is not finite count for reward/nonfinite_rate only.

    Args: scores f32[B], reward units, raw.
    """
    usable = jnp.isfinite(scores)
    mask = rollout.action_mask & usable[:, None]
    rows = jnp.any(mask, 1)
    gap = jnp.where(mask, jnp.abs(rollout.logprobs - scored.logprobs), 0.0)
    metrics = {
        "reward/score": ops.masked_mean(scores, usable),
        "reward/score_std": jnp.sqrt(ops.masked_var(scores, usable)),
        "reward/nonfinite_rate": 1.0 - jnp.mean(usable.astype(jnp.float32)),
        "response/length_tokens": jnp.mean(jnp.sum(rollout.action_mask, 1).astype(jnp.float32)),
        "response/eos_rate": jnp.mean(rollout.finished.astype(jnp.float32)),
        "rollout/logprob_gap_mean_nats": ops.masked_mean(gap, mask),
        "rollout/logprob_gap_max_nats": jnp.max(gap),
    }
    kl = scored.kl
    if kl is None and scored.ref_logprobs is not None:
        kl = scored.logprobs - scored.ref_logprobs
    if kl is not None:
        metrics["kl/per_sequence_nats"] = ops.masked_mean(ops.masked_sum(kl, mask, 1), rows)
        metrics["kl/per_token_nats"] = ops.masked_mean(kl, mask)
    if scored.entropy is not None:
        metrics["policy/entropy_nats"] = ops.masked_mean(scored.entropy, mask)
    return metrics


def make_update(
    losses: Losses,
    passes: Passes,
    actor_tx: optax.GradientTransformation,
    critic_tx: optax.GradientTransformation | None = None,
    *,
    constrain: Callable[[Any], Any] = lambda tree: tree,
) -> Callable[..., tuple[RunState, Metrics]]:
    """(state, experience, key, frozen, ptx=None) -> (state, metrics): epochs x minibatches as one `lax.scan`.

    Actor and critic have their own losses and optimisers. A step whose loss or gradient is not finite changes nothing
    (update/skipped, RunState.bad_steps). Once the approximate KL to the old policy passes `kl_stop`, that step and the rest
    are not taken. During critic warm-up the actor's losses are computed, for their metrics, and not applied; the KL coefficient
    waits too. `state.step` and `state.cursor` belong to the loop. `constrain` may put sharding constraints on a minibatch.
    Metrics are means over the minibatches that have an action, of which there are update/minibatches; update/steps counts
    optimiser steps. Metrics "policy/first_ratio_*" are |ratio - 1| at the first of them, for losses that give
    "policy/ratio_gap" f32[B, R].
    """

    def update(
        state: RunState, experience: Experience, key: jax.Array, frozen: Frozen, ptx: Sequences | None = None
    ) -> tuple[RunState, Metrics]:
        _check(losses, passes, state, ptx)
        wanted = state.step >= passes.critic_warmup

        def step(carry: Any, rows: Any) -> tuple[Any, tuple[Metrics, jax.Array]]:
            actor, critic, _ = carry
            batch = losses.prepare(constrain(_take(experience, rows[0])))
            text = None if ptx is None else constrain(_take(ptx, rows[1]))
            counts = losses.denominators(batch)
            layout = None if passes.packing is None else packed.lay_out(passes.packing, batch, jnp.any(batch.action_mask, 1))
            with jax.named_scope("actor"):
                data = (frozen, batch, layout, text, counts, state.kl_coef)
                value, metrics, grads = _actor_gradient(losses, passes, actor.params, *data)
                something = jnp.any(batch.action_mask)  # False where no score was finite, or where no group had information
                scored = something if batch.scores is None else something | jnp.any(jnp.isfinite(batch.scores))
                finite = jnp.isfinite(value) & scored
                stop = jnp.zeros((), bool) if passes.kl_stop is None else metrics["policy/approx_kl_nats"] > passes.kl_stop
                actor, done = apply_gradients(actor_tx, actor, grads, finite, wanted=wanted & something & ~stop)
            metrics |= {
                "policy/loss": value,
                "policy/grad_norm": done["update/grad_norm"],
                "update/skipped": done["update/skipped"],
            }
            if layout is not None:
                metrics["data/padded_fraction"] = packed.padded_fraction(layout)
            if losses.value is not None:
                # Else both are computed side by side, and the saved states of two backward passes lie in memory at one time.
                actor, batch = jax.lax.optimization_barrier((actor, batch))
                with jax.named_scope("critic"):
                    critic, done = _critic_step(
                        losses.value, passes, critic_tx, critic, frozen, batch, layout, counts, wanted=~stop
                    )
                skipped = jnp.maximum(metrics["update/skipped"], done.pop("update/skipped"))
                metrics |= done | {"update/skipped": skipped}
            return (actor, critic, stop), (metrics, something)

        def body(carry: Any, rows: Any) -> tuple[Any, tuple[Metrics, jax.Array, jax.Array]]:
            stopped = carry[2]
            if passes.kl_stop is None:
                carry, (metrics, used) = step(carry, rows)
            else:
                nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, carry, rows)[1])
                carry, (metrics, used) = jax.lax.cond(stopped, lambda c: (c, nothing), lambda c: step(c, rows), carry)
            return carry, (metrics, ~stopped, used)

        rows = (
            _rows(key, experience.tokens.shape[0], passes),
            None if ptx is None else _rows(jax.random.fold_in(key, passes.epochs), ptx.tokens.shape[0], passes),
        )
        start = (state.actor, state.critic, jnp.zeros((), bool))
        (actor, critic, stopped), found = jax.lax.scan(body, start, rows, length=passes.epochs * passes.minibatches)
        steps = actor.step - state.actor.step
        if critic is not None and losses.value is not None:
            steps = jnp.maximum(steps, critic.step - require(state.critic, "RunState.critic").step)
        counts = {"update/steps": steps, "update/stopped": stopped}
        metrics = _summary(*found) | {name: count.astype(jnp.float32) for name, count in counts.items()}
        state = state.replace(
            actor=actor,
            critic=critic,
            # While only the critic trains, the actor's KL tells nothing about the coefficient.
            kl_coef=jnp.where(wanted, losses.adapt(state.kl_coef, experience), state.kl_coef),
            ema=state.ema if passes.ema_decay is None else _ema(state.ema, actor.params, passes.ema_decay),
            scores=state.scores if experience.scores is None else update_moments(state.scores, experience.scores),
            bad_steps=jnp.where(metrics["update/skipped"] > 0, state.bad_steps + 1, 0),
        )
        return state, metrics

    return update


def _check(losses: Losses, passes: Passes, state: RunState, ptx: Sequences | None) -> None:
    if (losses.ptx is None) != (ptx is None):
        raise UserError("ptx_coef > 0 and a batch of fine-tuning sequences (ptx_data) go together; give both or neither")
    if passes.ema_decay is not None:
        require(state.ema, f"ema_decay {passes.ema_decay}: RunState.ema, a copy of the actor's parameters,")
    if losses.value is not None:
        require(state.critic, "RunState.critic")


def _actor_gradient(
    losses: Losses,
    passes: Passes,
    params: Params,
    frozen: Frozen,
    batch: Experience,
    layout: packed.Layout | None,
    text: Sequences | None,
    counts: dict[str, jax.Array],
    kl_coef: jax.Array,
) -> tuple[jax.Array, Metrics, Params]:
    loss, metrics, grads = accumulate(
        lambda p, part: losses.policy(p, frozen, part, counts, kl_coef), params, batch, passes.micro_batches, layout
    )
    if (gap := metrics.pop("policy/ratio_gap", None)) is not None:
        metrics |= _first_ratio(gap, batch.action_mask)
    if losses.ptx is None or text is None:
        return loss, metrics, grads
    ptx, tokens = losses.ptx, {"tokens": jnp.maximum(jnp.sum(text.target_mask), 1)}
    more, ptx_metrics, ptx_grads = accumulate(lambda p, part: ptx(p, frozen, part, tokens), params, text, passes.micro_batches)
    return loss + more, metrics | ptx_metrics, jax.tree.map(jnp.add, grads, ptx_grads)


def _critic_step(
    value_loss: Loss,
    passes: Passes,
    tx: optax.GradientTransformation | None,
    critic: TrainState,
    frozen: Frozen,
    batch: Experience,
    layout: packed.Layout | None,
    counts: dict[str, jax.Array],
    *,
    wanted: jax.Array,
) -> tuple[TrainState, Metrics]:
    loss, metrics, grads = accumulate(
        lambda p, part: value_loss(p, frozen, part, counts), critic.params, batch, passes.micro_batches, layout
    )
    finite = jnp.isfinite(loss) & jnp.any(batch.action_mask)
    critic, done = apply_gradients(require(tx, "critic_tx"), critic, grads, finite, wanted=wanted)
    metrics |= {"value/loss": loss, "value/grad_norm": done["update/grad_norm"], "update/skipped": done["update/skipped"]}
    return critic, metrics


def _first_ratio(gap: jax.Array, mask: jax.Array) -> Metrics:
    """How far probability ratios are from 1 where they must be 1, before the first step of an update."""
    gap = jnp.where(mask, gap, 0.0)
    return {
        "policy/first_ratio_mean": ops.masked_mean(gap, mask),
        "policy/first_ratio_p99": ops.masked_quantile(gap, mask, 0.99),
        "policy/first_ratio_max": jnp.max(gap),
    }


def _summary(history: Metrics, ran: jax.Array, used: jax.Array) -> Metrics:
    """Metrics of an update from those of its minibatches: mean (or maximum) over those with an action; first_*: of the first.

    Where none has one, losses, norms of gradients and gaps are 0, and what has no value of nothing, such as a ratio, is NaN.
    Args: ran, used bool[minibatches], those before `kl_stop` (over which update/* and ptx/* are averaged), and with an action.
    """
    any_used = jnp.any(used)

    def one(key: str, x: jax.Array) -> jax.Array:
        if key.startswith(("update/", "ptx/")):
            return ops.masked_mean(x, ran)
        if key.endswith(("/loss", "/grad_norm")):
            return ops.masked_mean(x, used)
        if key.startswith("policy/first_"):
            return x[jnp.argmax(used)]
        found = jnp.max(jnp.where(used, x, -jnp.inf)) if key.endswith("_max") else ops.masked_mean(x, used)
        return jnp.where(any_used, found, jnp.nan)

    return {key: one(key, x) for key, x in history.items()} | {"update/minibatches": jnp.sum(used).astype(jnp.float32)}


def _rows(key: jax.Array, batch_size: int, passes: Passes) -> jax.Array | None:
    """None where every minibatch is the whole batch: its order cannot matter, and no row moves between devices."""
    return None if passes.minibatches == 1 else minibatch_rows(key, batch_size, passes.epochs, passes.minibatches)


def _take(batch: Any, rows: jax.Array | None) -> Any:
    return batch if rows is None else jax.tree.map(lambda x: x[rows], batch)


def _ema(ema: Params, params: Params, decay: float) -> Params:
    """decay ema + (1 - decay) params in float32: a step of (1 - decay) of the difference is below bfloat16's spacing."""
    return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new.astype(jnp.float32), ema, params)
