"""ReMax: REINFORCE whose baseline is the score of the greedy answer to the same prompt.

    A_t = sum_{s >= t} r_s - score(greedy answer),     r_t = -kl_coef KL_t + [t last] score

Both scores are clipped and lose the same penalties (missing end-of-sequence, overlong), each by its own answer.
Li et al. 2023 (arXiv:2310.10505), algorithm 1. Costs one greedy generation per prompt and its score, and no critic.
"""

import chex
import jax
import jax.numpy as jnp

from rlhf_jax import config
from rlhf_jax.algorithms import critic_free, ppo
from rlhf_jax.algorithms.critic_free import Answers
from rlhf_jax.algorithms.training import Algorithm


def remax_advantages(answers: Answers) -> jax.Array:
    """Return-to-go minus the greedy answer's score, f32[B, R], 0 where masked. ValueError without greedy scores."""
    if answers.greedy_scores is None:
        raise ValueError("ReMax needs Scored.greedy_score, the score of the greedy answer to every prompt; the loop makes it")
    chex.assert_equal_shape([answers.scores, answers.greedy_scores])
    rewards = critic_free.token_rewards(answers)
    returns, _ = ppo.gae(rewards, jnp.zeros_like(rewards), answers.mask, gamma=1.0, lam=1.0)
    return jnp.where(answers.mask, returns - answers.greedy_scores.astype(jnp.float32)[:, None], 0.0)


def build(settings: config.ReMax) -> Algorithm:
    """ReMax with these settings."""
    return critic_free.build(settings, remax_advantages, needs=("greedy",))
