"""Proximal policy optimisation for language models: every equation is a function, `build` puts them together.

Schulman et al. 2017 (arXiv:1707.06347), Schulman et al. 2016 (GAE, arXiv:1506.02438), Ziegler et al. 2019 (arXiv:1909.08593),
Ouyang et al. 2022 (arXiv:2203.02155). Arrays with an R axis are indexed by the response token (see `types.py`).
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from rlhf_jax import config, ops, packed
from rlhf_jax.algorithms import deepspeed_chat, update
from rlhf_jax.algorithms.training import Algorithm, require, share
from rlhf_jax.types import Experience, Metrics, Params, Rollout, RunState, Scored, Sequences


def adjust_scores(
    scores: jax.Array, finished: jax.Array, *, clip: float | None = None, missing_eos: str = "none", penalty: float = 1.0
) -> jax.Array:
    """Clip the scores, then treat truncated answers: s - penalty ("subtract"), -penalty ("replace") or s ("none").

    Args: scores f32[B], reward units; finished bool[B], the answer has its end-of-sequence token. Returns f32[B].
    """
    chex.assert_equal_shape([scores, finished])
    scores = scores.astype(jnp.float32)
    if clip is not None:
        scores = jnp.clip(scores, -clip, clip)
    if missing_eos == "none":
        return scores
    if missing_eos not in ("subtract", "replace"):
        raise ValueError(f"missing_eos {missing_eos!r}: one of none, subtract, replace")
    return jnp.where(finished, scores, scores - penalty if missing_eos == "subtract" else -penalty)


def kl_per_token(
    logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array, *, estimator: Any = "k1", exact: jax.Array | None = None
) -> jax.Array:
    """KL(policy || reference) of each action in nats, 0 where masked: an estimator of `ops.kl_estimate`, or "exact" as given."""
    chex.assert_equal_shape([logprobs, ref_logprobs, mask])
    if estimator == "exact":
        if exact is None:
            raise ValueError('kl_estimator "exact": Scored.kl is absent; score with the full-vocabulary KL')
        return jnp.where(mask, exact.astype(jnp.float32), 0.0)
    return ops.kl_estimate(jnp.where(mask, logprobs, 0.0), jnp.where(mask, ref_logprobs, 0.0), estimator)


def shape_rewards(
    scores: jax.Array,
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    action_mask: jax.Array,
    *,
    kl_coef: float | jax.Array,
    estimator: str = "k1",
    exact: jax.Array | None = None,
) -> jax.Array:
    """r_t = -kl_coef KL_t, plus the score at the last action n - 1 (finished or truncated alike); 0 where masked.

    Args: scores f32[B]; logprobs, ref_logprobs f32[B, R], nats; action_mask bool[B, R]; exact f32[B, R], nats, for estimator
      "exact". Returns f32[B, R], reward units. Source: Ziegler et al. 2019, eq. 2.
    """
    chex.assert_rank([scores, action_mask], [1, 2])
    chex.assert_type(action_mask, bool)
    kl = kl_per_token(logprobs, ref_logprobs, action_mask, estimator=estimator, exact=exact)
    position = jax.lax.broadcasted_iota(jnp.int32, action_mask.shape, 1)
    last = jnp.max(jnp.where(action_mask, position, -1), 1, keepdims=True)  # a scatter out of bounds would be silent
    return -kl_coef * kl + jnp.where(position == last, scores.astype(jnp.float32)[:, None], 0.0)


def gae(
    rewards: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    bootstrap: jax.Array | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[jax.Array, jax.Array]:
    """delta_t = r_t + gamma V_(t+1) - V_t;  A_t = delta_t + gamma lam A_(t+1);  R_t = A_t + V_t, over the actions only.

    Tokens that are not actions (holes, padding) are stepped over: V and A are carried across them without a discount.

    Args: rewards, values f32[B, R], reward units; mask bool[B, R]; bootstrap f32[B], value of the state after the last action,
      default 0. Returns advantages and returns f32[B, R], 0 where masked. Source: arXiv:1506.02438, eq. 16.
    """
    chex.assert_rank([rewards, values, mask], 2)
    chex.assert_equal_shape([rewards, values, mask])
    chex.assert_type(mask, bool)
    rewards = jnp.where(mask, rewards.astype(jnp.float32), 0.0)
    values = jnp.where(mask, values.astype(jnp.float32), 0.0)
    after = jnp.zeros(rewards.shape[0]) if bootstrap is None else bootstrap.astype(jnp.float32)

    def back(carry: tuple[jax.Array, jax.Array], now: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        (next_value, next_advantage), (reward, value, action) = carry, now
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = (jnp.where(action, value, next_value), jnp.where(action, advantage, next_advantage))
        return carry, jnp.where(action, advantage, 0.0)

    _, advantages = jax.lax.scan(back, (after, jnp.zeros_like(after)), (rewards.T, values.T, mask.T), reverse=True)
    return advantages.T, advantages.T + values


def clipped_surrogate(
    log_ratio: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[jax.Array, Metrics]:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), r = exp(log_ratio); with dual_clip c also min(., -c A) where A < 0.

    Args: log_ratio, advantages f32[B, R]; mask bool[B, R]. Returns the loss f32[B, R], 0 where masked, and metrics:
      sums over actions, maximum for _max, and policy/ratio_gap = |r - 1| as f32[B, R].
    Source: arXiv:1707.06347, eq. 7; dual clip arXiv:1912.09729, eq. 5.
    """
    chex.assert_equal_shape([log_ratio, advantages, mask])
    chex.assert_type(mask, bool)
    log_ratio = jnp.where(mask, log_ratio.astype(jnp.float32), 0.0)
    advantages = jnp.where(mask, advantages.astype(jnp.float32), 0.0)
    ratio = jnp.exp(jnp.minimum(log_ratio, ops.LOG_RATIO_CAP))
    free, clipped = -advantages * ratio, -advantages * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = jnp.maximum(free, clipped)
    bounded = jnp.zeros_like(mask)
    if dual_clip is not None:
        bounded = (advantages < 0) & (loss > -dual_clip * advantages)
        loss = jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)
    sums = {
        "policy/clip_fraction": jnp.sum(clipped > free),
        "policy/dual_clip_fraction": jnp.sum(bounded),
        "policy/ratio_mean": ops.masked_sum(ratio, mask),
        "policy/ratio_max": jnp.max(jnp.where(mask, ratio, 0.0)),
        "policy/approx_kl_nats": 0.5 * jnp.sum(log_ratio**2),
        "policy/ratio_gap": jnp.abs(ratio - 1.0),
    }
    return loss, {key: jax.lax.stop_gradient(value.astype(jnp.float32)) for key, value in sums.items()}


def policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[jax.Array, Metrics]:
    """Clipped surrogate of each token's own ratio exp(log p - log p_old): see `clipped_surrogate`."""
    chex.assert_equal_shape([logprobs, old_logprobs, advantages, mask])
    log_ratio = logprobs.astype(jnp.float32) - old_logprobs.astype(jnp.float32)
    return clipped_surrogate(log_ratio, advantages, mask, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


def value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, *, clip_eps: float | None = 0.2
) -> tuple[jax.Array, Metrics]:
    """1/2 max((V - R)^2, (clip(V, V_old - clip_eps, V_old + clip_eps) - R)^2) per token; clip_eps None: 1/2 (V - R)^2.

    Args: values, old_values, returns f32[B, R], reward units; mask bool[B, R]. Returns the loss f32[B, R], 0 where masked, and
      metric sums over actions. Source: Baselines' PPO2; the factor 1/2 is every peer's.
    """
    chex.assert_equal_shape([values, old_values, returns, mask])
    chex.assert_type(mask, bool)
    values, old_values, returns = (jnp.where(mask, x.astype(jnp.float32), 0.0) for x in (values, old_values, returns))
    free = (values - returns) ** 2
    clipped = free if clip_eps is None else (jnp.clip(values, old_values - clip_eps, old_values + clip_eps) - returns) ** 2
    sums = {"value/clip_fraction": jnp.sum(clipped > free), "value/squared_error": jnp.sum(free)}
    return 0.5 * jnp.maximum(free, clipped), {k: jax.lax.stop_gradient(v.astype(jnp.float32)) for k, v in sums.items()}


def adapt_kl(
    kl_coef: jax.Array, kl_per_sequence: jax.Array, sequences: int | jax.Array, *, target: float, horizon: float
) -> jax.Array:
    """kl_coef (1 + clip(KL / target - 1, -0.2, 0.2) sequences / horizon): a proportional controller.

    KL is the *sum* over a sequence's tokens, averaged over sequences. More sequences than 5 x horizon would turn the
    coefficient negative (every peer's does): one update at most divides it by 10. A KL that is not finite changes nothing, and
    neither do no sequences.

    Args: kl_coef f32[], reward units per nat; kl_per_sequence f32[], nats. Source: Ziegler et al. 2019, section 2.2.
    """
    error = jnp.clip(kl_per_sequence / target - 1.0, -0.2, 0.2)
    factor = jnp.maximum(1.0 + error * sequences / horizon, 0.1)
    return kl_coef * jnp.where(jnp.isfinite(kl_per_sequence), factor, 1.0)


def explained_variance(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
    """1 - Var(R - V) / Var(R) over the actions: 1 a perfect critic, 0 no better than a constant; 0 where Var(R) = 0."""
    spread = ops.masked_var(returns, mask, variance="population")
    left = ops.masked_var(returns - values, mask, variance="population")
    return jnp.where(spread > 0, 1.0 - left / jnp.where(spread > 0, spread, 1.0), 0.0)


def make_experience(
    settings: config.PPO, rollout: Rollout, scores: jax.Array, scored: Scored, kl_coef: jax.Array
) -> tuple[Experience, Metrics]:
    """Rewards, advantages and returns of a rollout. A row whose score is not finite loses its actions: it trains nothing.

    Args: scores f32[B], reward units; kl_coef f32[], reward units per nat.
    """
    chex.assert_equal_shape([scores, rollout.finished])
    ref_logprobs, values = require(scored.ref_logprobs, "Scored.ref_logprobs"), require(scored.values, "Scored.values")
    chex.assert_equal_shape([rollout.action_mask, rollout.logprobs, scored.logprobs, ref_logprobs, values])
    usable = jnp.isfinite(scores)
    mask = rollout.action_mask & usable[:, None]
    known = jnp.where(usable, scores.astype(jnp.float32), 0.0)
    if settings.compat == "deepspeed_chat":
        options = {"clip": settings.reward_clip, "gamma": settings.gamma, "lam": settings.lam}
        rewards, advantages, returns, values = deepspeed_chat.classical_advantages(
            rollout, known, scored, kl_ctl=kl_coef, **options
        )
    else:
        rewards, advantages, returns = _advantages(settings, known, rollout, mask, scored, kl_coef)
    experience = Experience(
        tokens=rollout.tokens,
        mask=rollout.mask,
        action_mask=mask,
        logprobs=rollout.logprobs if settings.old_logprobs == "rollout" else scored.logprobs,
        advantages=advantages,
        ref_logprobs=ref_logprobs,
        values=values,
        returns=returns,
        kept=rollout.kept,
        scores=scores.astype(jnp.float32),
    )
    metrics = {
        "kl/coef": jnp.asarray(kl_coef, jnp.float32),
        "reward/shaped": ops.masked_mean(jnp.sum(rewards, 1), jnp.any(mask, 1)),
        "value/mean": ops.masked_mean(values, mask),
        "value/return_mean": ops.masked_mean(returns, mask),
        "value/explained_variance": explained_variance(values, returns, mask),
    }
    return experience, update.rollout_metrics(rollout, scores, scored) | metrics


def _advantages(
    settings: config.PPO, scores: jax.Array, rollout: Rollout, mask: jax.Array, scored: Scored, kl_coef: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    scores = adjust_scores(
        scores,
        rollout.finished,
        clip=settings.reward_clip,
        missing_eos=settings.missing_eos,
        penalty=settings.missing_eos_penalty,
    )
    rewards = shape_rewards(
        scores,
        scored.logprobs,
        require(scored.ref_logprobs, "Scored.ref_logprobs"),
        mask,
        kl_coef=kl_coef if settings.kl_in == "reward" else 0.0,
        estimator=settings.kl_estimator,
        exact=scored.kl,
    )
    if settings.whiten_rewards != "none":
        rewards = ops.whiten(rewards, mask, variance=settings.whiten_rewards, shift_mean=False)
    bootstrap = None
    if settings.bootstrap_truncated:
        bootstrap = jnp.where(rollout.finished, 0.0, require(scored.bootstrap, "Scored.bootstrap"))
    values = require(scored.values, "Scored.values")
    advantages, returns = gae(rewards, values, mask, bootstrap, gamma=settings.gamma, lam=settings.lam)
    if settings.whiten_advantages != "none" and settings.whiten_scope == "batch":
        advantages = ops.whiten(advantages, mask, variance=settings.whiten_advantages)
    return rewards, advantages, returns


def minibatch_policy_loss(
    settings: config.PPO,
    scored: Scored,
    batch: Experience,
    counts: Metrics,
    kl_coef: jax.Array,
    *,
    surrogate: Callable[..., tuple[jax.Array, Metrics]] = policy_loss,
) -> tuple[jax.Array, Metrics]:
    """Share of the minibatch's loss: clipped surrogate - entropy_coef entropy + kl_coef KL; and metric shares.

    `surrogate` has the signature of `policy_loss`.
    """
    mask = batch.action_mask
    new, old = scored.logprobs, batch.logprobs
    clip = {"clip_low": settings.clip_low, "clip_high": settings.clip_high, "dual_clip": settings.dual_clip}
    losses, sums = surrogate(new, old, batch.advantages, mask, **clip)
    metrics = share(sums, counts["tokens"])
    if settings.compat == "deepspeed_chat":
        loss = deepspeed_chat.actor_loss_fn(new, old, batch.advantages, mask, cliprange=settings.clip_high)
        return loss / settings.micro_batches, metrics

    def total(x: jax.Array) -> jax.Array:
        return ops.aggregate(x, mask, settings.aggregation, denominator=counts["loss"])

    loss = total(losses)
    if settings.entropy_coef != 0.0:
        entropy = require(scored.entropy, f"entropy_coef {settings.entropy_coef}: Scored.entropy of policy_apply")
        loss -= settings.entropy_coef * total(entropy)
    if scored.entropy is not None:
        metrics["policy/entropy_nats"] = ops.masked_sum(jax.lax.stop_gradient(scored.entropy), mask) / counts["tokens"]
    if settings.kl_in == "loss":  # the gradient of k1 itself has expectation 0, hence its straight-through form
        estimator = "k1_plus" if settings.kl_estimator == "k1" else settings.kl_estimator
        ref_logprobs = require(batch.ref_logprobs, "Experience.ref_logprobs")
        kl = kl_per_token(new, ref_logprobs, mask, estimator=estimator, exact=scored.kl)
        loss += kl_coef * total(kl)
        metrics["kl/loss_nats"] = jnp.sum(kl) / counts["tokens"]
    return loss, metrics


def minibatch_value_loss(
    settings: config.PPO, values: jax.Array, batch: Experience, counts: Metrics
) -> tuple[jax.Array, Metrics]:
    """Share of the minibatch's clipped value loss, and metric shares."""
    mask = batch.action_mask
    old, returns = require(batch.values, "Experience.values"), require(batch.returns, "Experience.returns")
    losses, sums = value_loss(values, old, returns, mask, clip_eps=settings.value_clip)
    metrics = share(sums, counts["tokens"])
    if settings.compat == "deepspeed_chat":
        loss = deepspeed_chat.critic_loss_fn(values, old, returns, mask, cliprange_value=settings.value_clip)
        return loss / settings.micro_batches, metrics
    return ops.aggregate(losses, mask, settings.aggregation, denominator=counts["loss"]), metrics


def denominators(settings: config.PPO, batch: Experience) -> Metrics:
    """Counts of a whole minibatch, taken before it is split."""
    return {
        "tokens": ops.aggregation_denominator(batch.action_mask, "token_mean"),
        "loss": ops.aggregation_denominator(batch.action_mask, settings.aggregation),
    }


def next_kl_coef(settings: config.AdaptiveKL, kl_coef: jax.Array, experience: Experience) -> jax.Array:
    """`adapt_kl` with the k1 KL per sequence of a batch of experience; a row without an action is no sequence."""
    mask = experience.action_mask
    kl = kl_per_token(experience.logprobs, require(experience.ref_logprobs, "Experience.ref_logprobs"), mask)
    rows = jnp.any(mask, 1)
    mean = ops.masked_mean(jnp.sum(kl, 1), rows)
    return adapt_kl(kl_coef, mean, jnp.sum(rows), target=settings.target, horizon=settings.horizon)


def make_update(
    settings: config.PPO,
    policy_apply: Callable[..., Scored],
    value_apply: Callable[..., jax.Array] | None,
    actor_tx: optax.GradientTransformation,
    critic_tx: optax.GradientTransformation | None,
    *,
    surrogate: Callable[..., tuple[jax.Array, Metrics]] = policy_loss,
    sequence_apply: Callable[..., jax.Array] | None = None,
    constrain: Callable[[Any], Any] = lambda tree: tree,
    packing: packed.Packing | None = None,
) -> Callable[..., tuple[RunState, Metrics]]:
    """(state, experience, key, frozen, ptx=None) -> (state, metrics): see `update.make_update`.

    `policy_apply(params, frozen, Experience) -> Scored`, `value_apply(...) -> f32[B, R]` (None: no critic);
    `sequence_apply(params, frozen, Sequences) -> logprobs f32[B, T]` at temperature 1 is needed with ptx_coef > 0.
    """
    if settings.ptx_coef > 0:
        require(sequence_apply, f"ptx_coef {settings.ptx_coef}: sequence_apply")

    def policy(params: Params, frozen: Any, batch: Experience, counts: Metrics, kl_coef: jax.Array) -> tuple[jax.Array, Metrics]:
        scored = policy_apply(params, frozen, batch)
        return minibatch_policy_loss(settings, scored, batch, counts, kl_coef, surrogate=surrogate)

    def value(params: Params, frozen: Any, batch: Experience, counts: Metrics) -> tuple[jax.Array, Metrics]:
        return minibatch_value_loss(settings, require(value_apply, "value_apply")(params, frozen, batch), batch, counts)

    def ptx(params: Params, frozen: Any, text: Sequences, counts: Metrics) -> tuple[jax.Array, Metrics]:
        logprobs = require(sequence_apply, "sequence_apply")(params, frozen, text)
        loss = -ops.masked_sum(logprobs, text.target_mask) / counts["tokens"]
        return settings.ptx_coef * loss, {"ptx/loss_nats": loss}

    def prepare(batch: Experience) -> Experience:
        if settings.whiten_scope == "batch" or settings.whiten_advantages == "none" or settings.compat != "none":
            return batch
        return batch.replace(advantages=ops.whiten(batch.advantages, batch.action_mask, variance=settings.whiten_advantages))

    losses = update.Losses(
        policy=policy,
        value=None if value_apply is None else value,
        denominators=functools.partial(denominators, settings),
        prepare=prepare,
        ptx=ptx if settings.ptx_coef > 0 else None,
    )
    if settings.adaptive_kl is not None:
        losses = losses._replace(adapt=functools.partial(next_kl_coef, settings.adaptive_kl))
    passes = update.Passes(
        epochs=settings.epochs,
        minibatches=settings.minibatches,
        micro_batches=settings.micro_batches,
        packing=packing,
        kl_stop=settings.kl_stop,
        critic_warmup=settings.critic_warmup,
        ema_decay=settings.ema_decay,
    )
    return update.make_update(losses, passes, actor_tx, critic_tx, constrain=constrain)


def build(settings: config.PPO) -> Algorithm:
    """PPO with these settings."""
    if settings.compat != "none":
        deepspeed_chat.check(settings)
    needs = {"critic", "reference"} | ({"kl"} if settings.kl_estimator == "exact" else set())
    if settings.old_logprobs == "recompute":  # otherwise the actor need not be run over the rollout at all
        needs.add("entropy")
    return Algorithm(
        make_experience=functools.partial(make_experience, settings),
        make_update=functools.partial(make_update, settings),
        needs=frozenset(needs),
        kl_coef=settings.kl_coef,
    )
