"""What the algorithms without a critic share: baselines made from scores, and the way from an advantage to an `Algorithm`.

The G answers to one prompt are G consecutive rows of a batch. An algorithm is one function, `advantages(Answers)`; PPO's clipped
loss, its KL terms and its passes over the experience are reused as they are.

Deviations from a group's mean are taken from its first score before anything is averaged. That changes no result in exact
arithmetic; in float32 it makes groups of equal scores *exactly* zero and keeps every digit of scores with a large offset.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlhf_jax import config, ops
from rlhf_jax.algorithms import ppo, update
from rlhf_jax.algorithms.training import Algorithm, require
from rlhf_jax.errors import UserError
from rlhf_jax.types import Experience, Metrics, Rollout, RunState, Scored

Scale = Literal["std", "batch_std", "none"]
STD_EPS = 1e-6  # added to the deviation, as verl and tunix do (TRL: 1e-4, OpenRLHF: 1e-9)


def in_groups(x: jax.Array, group_size: int) -> jax.Array:
    """[B, ...] -> [B / G, G, ...]: rows of one prompt are consecutive. UserError if G does not divide B."""
    if group_size < 1 or x.shape[0] % group_size:
        raise UserError(
            f"group_size is {group_size} and the batch has {x.shape[0]} answers; group_size must divide it: "
            f"make batch_size a multiple of {max(group_size, 1)}"
        )
    return x.reshape(x.shape[0] // group_size, group_size, *x.shape[1:])


def group_deviations(scores: jax.Array, group_size: int) -> jax.Array:
    """s_i - mean of its group, f32[B]; exactly 0 where all scores of a group are equal and in groups of one.

    Args: scores f[B], reward units.
    """
    chex.assert_rank(scores, 1)
    groups = in_groups(scores.astype(jnp.float32), group_size)
    shifted = groups - groups[:, :1]
    return (shifted - shifted.mean(1, keepdims=True)).reshape(-1)


def group_advantages(
    scores: jax.Array, group_size: int, *, scale: Scale = "std", eps: float = STD_EPS, usable: jax.Array | None = None
) -> jax.Array:
    """(s_i - group mean) / (deviation + eps), f32[B]; the deviation is that of the group, of the batch, or nothing ("none").

    Deviations are two-pass and unbiased (n - 1). Groups of equal scores and groups of one are exactly 0.

    Args: scores f[B], reward units; usable bool[B], answers that the deviation of the batch counts, default all.
    Source: Shao et al. 2024 (arXiv:2402.03300), section 4.1.2.
    """
    centred = group_deviations(scores, group_size)
    if scale == "none":
        return centred
    if scale == "std":
        return (in_groups(centred, group_size) / (_std(in_groups(centred, group_size)) + eps)).reshape(-1)
    if scale == "batch_std":
        usable = jnp.ones(scores.shape, bool) if usable is None else usable
        shifted = scores.astype(jnp.float32) - scores[jnp.argmax(usable)]
        return centred / (jnp.sqrt(ops.masked_var(shifted, usable)) + eps)
    raise ValueError(f"advantage_scale {scale!r}: one of std, batch_std, none")


def informative(scores: jax.Array, group_size: int) -> jax.Array:
    """Whether the scores of a row's group differ at all, bool[B]: where they do not, no answer teaches anything."""
    groups = in_groups(scores, group_size)
    differ = groups.max(1) > groups.min(1)
    return jnp.broadcast_to(differ[:, None], groups.shape).reshape(-1)


def overlong_penalty(action_mask: jax.Array, *, buffer: int, penalty: float) -> jax.Array:
    """Score lost by answers that come near the limit of R tokens, f32[B]: 0 up to R - buffer, then linear, `penalty` at R.

    Args: action_mask bool[B, R]. Source: Yu et al. 2025 (DAPO, arXiv:2503.14476), eq. 13.
    """
    chex.assert_rank(action_mask, 2)
    over = action_mask.sum(1) - (action_mask.shape[1] - buffer)
    return penalty * jnp.clip(over / max(buffer, 1), 0.0, 1.0)


def _std(centred: jax.Array) -> jax.Array:
    """Unbiased deviation over axis 1 of values whose mean was taken off, [N, 1]; 0 for fewer than two."""
    return jnp.sqrt((centred**2).sum(1, keepdims=True) / max(centred.shape[1] - 1, 1))


class Answers(NamedTuple):
    """What an advantage is made of."""

    scores: jax.Array  # f32[B], reward units, clipped and with penalties for truncated and overlong answers
    penalties: jax.Array  # f32[B, R], reward units: kl_coef KL of each token where the KL is in the reward, else 0
    mask: jax.Array  # bool[B, R], actions; all False in groups that have a score that is not finite
    greedy_scores: jax.Array | None = None  # f32[B], reward units, of the greedy answer to the same prompt, treated as `scores`

    @property
    def usable(self) -> jax.Array:
        """bool[B]: answers that have an action, and whose group has no score that is not finite."""
        return self.mask.any(1)


def token_rewards(answers: Answers) -> jax.Array:
    """-penalty of each token, plus the score at the last action: f32[B, R], reward units."""
    zeros = jnp.zeros_like(answers.penalties)
    return ppo.shape_rewards(answers.scores, zeros, zeros, answers.mask, kl_coef=0.0) - answers.penalties


def sequence_scores(answers: Answers) -> jax.Array:
    """Score minus the penalties of all its tokens, f32[B], reward units: the answer as one action."""
    return answers.scores - ops.masked_sum(answers.penalties, answers.mask, 1)


def build(
    settings: config.CriticFree,
    advantages: Callable[[Answers], jax.Array],
    *,
    group_size: int = 1,
    kl_in: Literal["reward", "loss"] = "reward",
    needs: Collection[str] = (),
    keep: Callable[[Answers], jax.Array] | None = None,
    surrogate: Callable[..., tuple[jax.Array, Metrics]] = ppo.policy_loss,
) -> Algorithm:
    """An online algorithm from its advantage function.

    Args: advantages: Answers -> f32[B], one an answer, or f32[B, R]; kl_in: where the KL to the reference enters; needs: more
      that `Scored` must hold, such as "greedy"; keep: Answers -> bool[B], the rows that are trained, default all; surrogate:
      (logprobs, old_logprobs, advantages, mask, *, clip_low, clip_high, dual_clip) -> token losses f32[B, R], metric sums.
    """
    if settings.adaptive_kl is not None and settings.kl_coef == 0:
        raise UserError("kl_coef is 0 and adaptive_kl multiplies it; start above 0, such as 0.05, or remove adaptive_kl")
    reference = settings.kl_coef > 0
    shared = {field.name for field in dataclasses.fields(config.PPO)} & {field.name for field in dataclasses.fields(settings)}
    own: dict[str, Any] = {
        "kl_in": kl_in if reference else "reward",  # without a reference no KL enters the loss
        "whiten_advantages": "none",
    }
    trunk = config.PPO(**{name: getattr(settings, name) for name in shared} | own)
    models = {"reference"} if reference else set()
    models |= {"entropy"} if settings.old_logprobs == "recompute" else set()  # else nothing needs the actor's forward pass
    models |= {"kl"} if reference and settings.kl_estimator == "exact" else set()

    def make_update(
        policy_apply: Callable[..., Scored], value_apply: None, actor_tx: Any, critic_tx: None = None, **options: Any
    ) -> Callable[..., tuple[RunState, Metrics]]:
        """See `ppo.make_update`; there is no critic."""
        del value_apply, critic_tx
        return ppo.make_update(trunk, policy_apply, None, actor_tx, None, surrogate=surrogate, **options)

    return Algorithm(
        make_experience=functools.partial(
            make_experience, settings, advantages, group_size, kl_in == "reward" and reference, keep
        ),
        make_update=make_update,
        needs=frozenset(models | set(needs)),
        group_size=group_size,
        kl_coef=settings.kl_coef,
    )


def build_relative(settings: config.GRPO, **options: Any) -> Algorithm:
    """GRPO and its kin: `group_advantages`, the KL in the loss, groups without information left out where asked. See `build`."""
    size, scale = settings.group_size, settings.advantage_scale
    return build(
        settings,
        lambda answers: group_advantages(answers.scores, size, scale=scale, usable=answers.usable),
        group_size=size,
        kl_in="loss",
        keep=(lambda answers: informative(answers.scores, size)) if settings.drop_uninformative else None,
        **options,
    )


def make_experience(
    settings: config.CriticFree,
    advantages: Callable[[Answers], jax.Array],
    group_size: int,
    penalised: bool,
    keep: Callable[[Answers], jax.Array] | None,
    rollout: Rollout,
    scores: jax.Array,
    scored: Scored,
    kl_coef: jax.Array,
) -> tuple[Experience, Metrics]:
    """Advantages of a rollout. A group with a score that is not finite loses its actions: it trains nothing.

    Args: penalised: the KL is in the reward; scores f32[B], reward units; kl_coef f32[], reward units per nat.
    """
    chex.assert_equal_shape([rollout.action_mask, rollout.logprobs, scored.logprobs])
    chex.assert_equal_shape([scores, rollout.finished])
    answers = _answers(settings, group_size, penalised, rollout, scores, scored, kl_coef)
    found = advantages(answers).astype(jnp.float32)
    found = found if found.ndim == 2 else jnp.broadcast_to(found[:, None], answers.mask.shape)
    mask = answers.mask if keep is None else answers.mask & keep(answers)[:, None]
    experience = Experience(
        tokens=rollout.tokens,
        mask=rollout.mask,
        action_mask=mask,
        logprobs=rollout.logprobs if settings.old_logprobs == "rollout" else scored.logprobs,
        advantages=jnp.where(mask, found, 0.0),
        ref_logprobs=scored.ref_logprobs,
        kept=rollout.kept,
        scores=scores.astype(jnp.float32),
    )
    usable = answers.usable
    metrics = {
        "kl/coef": jnp.asarray(kl_coef, jnp.float32),
        "reward/shaped": ops.masked_mean(sequence_scores(answers), usable),
        "policy/trained_rate": mask.any(1).mean(dtype=jnp.float32),
    }
    if group_size > 1:
        spread = _std(in_groups(group_deviations(answers.scores, group_size), group_size))
        metrics["group/score_std"] = ops.masked_mean(jnp.repeat(spread[:, 0], group_size), usable)
        metrics["group/uninformative_rate"] = ops.masked_mean(~informative(answers.scores, group_size), usable)
    return experience, update.rollout_metrics(rollout, scores, scored) | metrics


def _answers(
    settings: config.CriticFree,
    group_size: int,
    penalised: bool,
    rollout: Rollout,
    scores: jax.Array,
    scored: Scored,
    kl_coef: jax.Array,
) -> Answers:
    usable = jnp.isfinite(scores) if scored.greedy_score is None else jnp.isfinite(scores) & jnp.isfinite(scored.greedy_score)
    usable = jnp.repeat(in_groups(usable, group_size).all(1), group_size)
    mask = rollout.action_mask & usable[:, None]
    shaped = _treated(settings, jnp.where(usable, scores, 0.0), rollout.finished, rollout.action_mask)
    greedy = scored.greedy_score
    if greedy is not None:
        finished, actions = scored.greedy_finished, scored.greedy_mask
        if settings.missing_eos != "none":
            require(finished, f"missing_eos {settings.missing_eos}: Scored.greedy_finished")
        if settings.overlong_buffer > 0:
            require(actions, f"overlong_buffer {settings.overlong_buffer}: Scored.greedy_mask")
        greedy = _treated(
            settings,
            jnp.where(usable, greedy, 0.0),
            jnp.ones_like(usable) if finished is None else finished,
            mask if actions is None else actions,
        )
    penalties = jnp.zeros(mask.shape, jnp.float32)
    if penalised:
        ref_logprobs = require(scored.ref_logprobs, "Scored.ref_logprobs")
        kl = ppo.kl_per_token(scored.logprobs, ref_logprobs, mask, estimator=settings.kl_estimator, exact=scored.kl)
        penalties = kl_coef * kl
    return Answers(scores=shaped, penalties=penalties, mask=mask, greedy_scores=greedy)


def _treated(settings: config.CriticFree, scores: jax.Array, finished: jax.Array, action_mask: jax.Array) -> jax.Array:
    """Finite scores f32[B] of answers, clipped, and with penalties for truncated and overlong ones."""
    scores = ppo.adjust_scores(
        scores,
        finished,
        clip=settings.reward_clip,
        missing_eos=settings.missing_eos,
        penalty=settings.missing_eos_penalty,
    )
    if settings.overlong_buffer > 0:
        scores -= overlong_penalty(action_mask, buffer=settings.overlong_buffer, penalty=settings.overlong_penalty)
    return scores
