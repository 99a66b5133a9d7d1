"""REINFORCE++: discounted returns of the KL-shaped rewards, normalised over all tokens of the batch.

    G_t = sum_{s >= t} gamma^(s - t) r_s,     A = whiten(G),     r_t = -kl_coef KL_t + [t last] (score - b)

Hu et al. 2025 (arXiv:2501.03262). `baseline: batch` has b = 0, the batch's mean is taken off by the whitening; `baseline: group`
(REINFORCE++-baseline) has b = the mean score of the prompt's answers.
"""

from typing import Literal

import chex
import jax

from rlhf_jax import config, ops
from rlhf_jax.algorithms import critic_free, ppo
from rlhf_jax.algorithms.critic_free import Answers
from rlhf_jax.algorithms.training import Algorithm
from rlhf_jax.errors import UserError


def returns_to_go(rewards: jax.Array, mask: jax.Array, *, gamma: float = 1.0) -> jax.Array:
    """G_t = r_t + gamma G_(t+1) over the actions (others are stepped over without a discount), f32[B, R], 0 where masked.

    Args: rewards f32[B, R], reward units; mask bool[B, R].
    """
    chex.assert_equal_shape([rewards, mask])
    return ppo.gae(rewards, 0.0 * rewards, mask, gamma=gamma, lam=1.0)[0]


def normalised_returns(
    answers: Answers,
    *,
    gamma: float = 1.0,
    baseline: str = "batch",
    group_size: int = 1,
    whiten: Literal["none", "unbiased", "population"] = "unbiased",
) -> jax.Array:
    """Advantages f32[B, R]: the equations at the top of this file; whiten is "none", or the name of a variance."""
    if baseline not in ("batch", "group"):
        raise ValueError(f"baseline {baseline!r}: one of batch, group")
    if baseline == "group":
        answers = answers._replace(scores=critic_free.group_deviations(answers.scores, group_size))
    found = returns_to_go(critic_free.token_rewards(answers), answers.mask, gamma=gamma)
    return found if whiten == "none" else ops.whiten(found, answers.mask, variance=whiten)


def build(settings: config.ReinforcePP) -> Algorithm:
    """REINFORCE++ with these settings."""
    if settings.baseline == "group" and settings.group_size < 2:
        raise UserError(
            f"baseline is group and group_size is {settings.group_size}: the mean of one answer is that answer, so nothing would "
            "be learned; make group_size at least 2, or baseline batch"
        )

    def advantages(answers: Answers) -> jax.Array:
        return normalised_returns(
            answers,
            gamma=settings.gamma,
            baseline=settings.baseline,
            group_size=settings.group_size,
            whiten=settings.whiten_advantages,
        )

    return critic_free.build(settings, advantages, group_size=settings.group_size)
