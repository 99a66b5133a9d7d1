"""The five classical functions of DeepSpeed-Chat's PPO trainer, equal to the original to float32 rounding, quirks included.

For readers who know the PyTorch tutorial, and for `ppo.compat: deepspeed_chat`. Each docstring names the quirk and the
corrected form in `ppo.py`. Layout: S = P + R tokens of prompt and response; entry t of a [B, S-1] array belongs to the action
of emitting token t + 1 from state t, so the response starts at `start` = P - 1. `action_mask` is attention_mask[:, 1:].
Original: deepspeedai/DeepSpeedExamples, applications/DeepSpeed-Chat, dschat/rlhf/ppo_trainer.py.
"""

import chex
import jax
import jax.numpy as jnp

from rlhf_jax import config, ops
from rlhf_jax.algorithms.training import require
from rlhf_jax.errors import UserError
from rlhf_jax.types import Rollout, Scored


def gather_log_probs(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """log softmax(logits)[labels]; the caller shifts: gather_log_probs(logits[:, :-1], input_ids[:, 1:]).

    Quirk: builds [B, S-1, V]. Ours: `ops.token_logprobs`, which never does. (Always in float32 here: the original's bfloat16
    path is off by 0.05 nats.)

    Args: logits f[B, S-1, V]; labels i32[B, S-1]. Returns f32[B, S-1], nats.
    """
    chex.assert_rank([logits, labels], [3, 2])
    return ops.logits_logprobs(logits, labels)


def response_ends(prompt_length: int, action_mask: jax.Array) -> jax.Array:
    """One past the slot that gets the score: ends = start + n + 1 for n attended response tokens, i32[B].

    Quirk: on the shifted layout start + n would be one past the last action; the original adds 1 more, so that a finished row
    is scored on the action *after* its end-of-sequence token, whereas in a row that fills S the slice is cut and the score
    stays on the last token. Ours: the last action of every row.
    """
    start = prompt_length - 1
    return start + jnp.sum(action_mask[:, start:].astype(jnp.int32), 1) + 1


def compute_rewards(
    prompt_length: int,
    log_probs: jax.Array,
    ref_log_probs: jax.Array,
    reward_score: jax.Array,
    action_mask: jax.Array,
    *,
    kl_ctl: float | jax.Array = 0.1,
    clip_reward_value: float = 5.0,
) -> jax.Array:
    """r_t = -kl_ctl (log p_t - log p_ref_t), plus the clipped score at slot min(start + n, S - 2).

    Quirks: score one slot late in finished rows (see `response_ends`); the KL of padding and prompt is kept; the original adds
    in place, which loses the KL. A functional `.at[j, ends - 1].add` would be dropped without a word in full rows, hence the
    one-hot sum. Ours: `ppo.shape_rewards`.

    Args: log_probs, ref_log_probs f32[B, S-1], nats; reward_score f32[B]; action_mask [B, S-1]. Returns f32[B, S-1].
    """
    chex.assert_rank([log_probs, ref_log_probs, reward_score, action_mask], [2, 2, 1, 2])
    chex.assert_equal_shape([log_probs, ref_log_probs, action_mask])
    width = log_probs.shape[1]
    slot = jnp.minimum(response_ends(prompt_length, action_mask) - 1, width - 1)
    score = jnp.clip(reward_score.astype(jnp.float32), -clip_reward_value, clip_reward_value)
    penalty = -kl_ctl * (log_probs.astype(jnp.float32) - ref_log_probs.astype(jnp.float32))
    return penalty + jax.nn.one_hot(slot, width) * score[:, None]


def zero_after_end(prompt_length: int, action_mask: jax.Array, x: jax.Array) -> jax.Array:
    """What train_rlhf does to rewards and old values before the advantages: entries from `ends` on become 0 (not in place)."""
    chex.assert_equal_shape([action_mask, x])
    position = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(position < response_ends(prompt_length, action_mask)[:, None], x, 0.0)


def get_advantages_and_returns(
    values: jax.Array, rewards: jax.Array, start: int, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[jax.Array, jax.Array]:
    """delta_t = r_t + gamma V_(t+1) - V_t; A_t = delta_t + gamma lam A_(t+1); returns = A + V, for t >= start.

    Quirks: no mask and no whitening, it relies on zeroed padding; V after the last slot is 0, so that truncation counts as an
    end; the scale of the advantages is that of the reward model. Ours: `ppo.gae`, `ops.whiten`.

    Args: values, rewards f32[B, S-1], reward units. Returns advantages and returns f32[B, S-1-start], without gradient.
    """
    chex.assert_equal_shape([values, rewards])
    values, rewards = values[:, start:].astype(jnp.float32), rewards[:, start:].astype(jnp.float32)

    def back(
        carry: tuple[jax.Array, jax.Array], now: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        (next_value, next_advantage), (reward, value) = carry, now
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        return (value, advantage), advantage

    nothing = jnp.zeros(values.shape[0])
    _, advantages = jax.lax.scan(back, (nothing, nothing), (rewards.T, values.T), reverse=True)
    return jax.lax.stop_gradient((advantages.T, advantages.T + values))


def actor_loss_fn(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array, *, cliprange: float = 0.2
) -> jax.Array:
    """sum(max(-A r, -A clip(r, 1 +- cliprange)) mask) / sum(mask), r = exp((log p - log p_old) mask).

    Quirks: the mean is over the tokens of one micro-batch of one device, so these weigh differently; an empty mask gives NaN
    (0 / 0), as does NaN in padding (0 x NaN). Ours: `ppo.policy_loss` with a global denominator.

    Args: all [B, R] (response slice); mask 1 or True where it counts. Returns f32[].
    """
    chex.assert_equal_shape([logprobs, old_logprobs, advantages, mask])
    mask = mask.astype(jnp.float32)
    ratio = jnp.exp((logprobs.astype(jnp.float32) - old_logprobs.astype(jnp.float32)) * mask)
    clipped = jnp.clip(ratio, 1.0 - cliprange, 1.0 + cliprange)
    return jnp.sum(jnp.maximum(-advantages * ratio, -advantages * clipped) * mask) / jnp.sum(mask)


def critic_loss_fn(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, *, cliprange_value: float = 0.2
) -> jax.Array:
    """0.5 sum(max((V - R)^2, (clip(V, V_old +- cliprange_value) - R)^2) mask) / sum(mask).

    Quirks: as in `actor_loss_fn`; and the value of the slot that holds the score of a finished row is never trained, because
    the mask ends one before it. Ours: `ppo.value_loss`.

    Args: all [B, R] (response slice), reward units; mask 1 or True where it counts. Returns f32[].
    """
    chex.assert_equal_shape([values, old_values, returns, mask])
    mask, values = mask.astype(jnp.float32), values.astype(jnp.float32)
    clipped = jnp.clip(values, old_values - cliprange_value, old_values + cliprange_value)
    return 0.5 * jnp.sum(jnp.maximum((values - returns) ** 2, (clipped - returns) ** 2) * mask) / jnp.sum(mask)


def classical_advantages(
    rollout: Rollout,
    scores: jax.Array,
    scored: Scored,
    *,
    kl_ctl: float | jax.Array,
    clip: float | None,
    gamma: float,
    lam: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """train_rlhf up to the losses: rewards, advantages, returns and old values of the response, f32[B, R].

    The slot after a finished row's last action counts too (quirk of `response_ends`): its value is `scored.bootstrap`, where
    given, and its KL, that of emitting padding, is what `scored` has there (0 from `scoring.make_scorer`, which masks it).

    Args: scores f32[B], finite, reward units; clip None is the original's 5.
    """
    ref_logprobs, values = require(scored.ref_logprobs, "Scored.ref_logprobs"), require(scored.values, "Scored.values")
    chex.assert_equal_shape([scored.logprobs, ref_logprobs, values])
    prompt_length = rollout.mask.shape[1] - values.shape[1]
    start, action_mask = prompt_length - 1, rollout.mask[:, 1:]
    if scored.bootstrap is not None:
        after = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1) == jnp.sum(action_mask[:, start:], 1)[:, None]
        values = jnp.where(after, scored.bootstrap[:, None], values)

    def full(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (start, 0)))

    rewards = compute_rewards(
        prompt_length,
        full(scored.logprobs),
        full(ref_logprobs),
        scores,
        action_mask,
        kl_ctl=kl_ctl,
        clip_reward_value=5.0 if clip is None else clip,
    )
    rewards = zero_after_end(prompt_length, action_mask, rewards)
    old_values = zero_after_end(prompt_length, action_mask, full(values))
    advantages, returns = get_advantages_and_returns(old_values, rewards, start, gamma=gamma, lam=lam)
    return rewards[:, start:], advantages, returns, old_values[:, start:]


def check(settings: config.PPO) -> None:
    """UserError for settings that the classical functions do not have, so that none is ignored without a word.

    Advantages are never whitened in this mode, whatever `whiten_advantages` says, because the original has no such step.
    """
    plain = config.PPO()
    names = ["dual_clip", "kl_in", "kl_estimator", "missing_eos", "bootstrap_truncated", "whiten_rewards", "entropy_coef"]
    changed = [name for name in [*names, "aggregation"] if getattr(settings, name) != getattr(plain, name)]
    changed += ["clip_low"] if settings.clip_low != settings.clip_high else []
    if changed:
        raise UserError(f"ppo.compat {settings.compat!r} has no {', '.join(changed)}: remove the key, or compat")
