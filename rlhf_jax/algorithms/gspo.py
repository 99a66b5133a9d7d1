"""Group sequence policy optimisation: GRPO with one ratio for a whole answer, the geometric mean of its tokens' ratios.

    s_i = exp(mean_t (log p_t - log p_old_t)),   loss_i = max(-A_i s_i, -A_i clip(s_i, 1 - clip_low, 1 + clip_high))

Zheng et al. 2025 (arXiv:2507.18071), eq. 5 to 7. Sequence ratios are far closer to 1 than token ratios: so are the clips.
"""

import chex
import jax
import jax.numpy as jnp

from rlhf_jax import config, ops
from rlhf_jax.algorithms import critic_free, ppo
from rlhf_jax.algorithms.training import Algorithm
from rlhf_jax.types import Metrics


def sequence_log_ratio(logprobs: jax.Array, old_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """mean_t (log p_t - log p_old_t) over an answer's actions, f32[B], nats per token; 0 for an answer without any.

    Args: logprobs, old_logprobs f[B, R], nats; mask bool[B, R].
    """
    chex.assert_rank([logprobs, old_logprobs, mask], 2)
    new, old = (jnp.where(mask, x.astype(jnp.float32), 0.0) for x in (logprobs, old_logprobs))
    return ops.masked_mean(new - old, mask, 1)


def policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    dual_clip: float | None = None,
) -> tuple[jax.Array, Metrics]:
    """Clipped surrogate of the sequence ratio, the same for every token: aggregate with sequence_mean_token_mean.

    Args as `ppo.policy_loss`. Metrics are of sequence ratios, but for policy/approx_kl_nats, which stays one of tokens.
    """
    chex.assert_equal_shape([logprobs, old_logprobs, advantages, mask])
    log_ratio = jnp.broadcast_to(sequence_log_ratio(logprobs, old_logprobs, mask)[:, None], mask.shape)
    loss, sums = ppo.clipped_surrogate(log_ratio, advantages, mask, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    difference = jnp.where(mask, logprobs, 0.0) - jnp.where(mask, old_logprobs, 0.0)
    approx_kl = 0.5 * jnp.sum(jax.lax.stop_gradient(difference.astype(jnp.float32)) ** 2)
    return loss, sums | {"policy/approx_kl_nats": approx_kl}


def build(settings: config.GSPO) -> Algorithm:
    """GRPO with these settings and the ratio of whole answers."""
    return critic_free.build_relative(settings, surrogate=policy_loss)
