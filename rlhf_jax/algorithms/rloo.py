"""REINFORCE leave-one-out: an answer's baseline is the mean reward of the other answers to the same prompt.

    A_i = R_i - 1 / (G - 1) sum_{j != i} R_j,     R_i = score_i - kl_coef sum_t KL_t

Ahmadian et al. 2024 (arXiv:2402.14740): the whole answer is one action, and its KL is part of its reward, so that
the baseline sees it. `aggregation: sequence_mean_token_sum` makes the gradient at ratio 1 that of REINFORCE, unbiased.
"""

import jax
import jax.numpy as jnp

from rlhf_jax import config, ops
from rlhf_jax.algorithms import critic_free
from rlhf_jax.algorithms.training import Algorithm

STD_EPS = 1e-4  # added to the batch's deviation, as TRL does


def leave_one_out(scores: jax.Array, group_size: int) -> jax.Array:
    """s_i - mean of the *other* scores of its group = G / (G - 1) (s_i - mean), f32[B]; exactly 0 in groups of one.

    Args: scores f[B], reward units. Source: Kool et al. 2019; Ahmadian et al. 2024 (arXiv:2402.14740).
    """
    return critic_free.group_deviations(scores, group_size) * (group_size / max(group_size - 1, 1))


def rloo_advantages(
    scores: jax.Array,
    group_size: int,
    *,
    penalties: jax.Array | None = None,
    scale: str = "none",
    usable: jax.Array | None = None,
) -> jax.Array:
    """Leave-one-out advantages of scores - penalties, f32[B]; with scale "batch_std" divided by their deviation plus 1e-4.

    The baseline is linear, so that scores and penalties are centred apart: a large offset of the scores costs no digits.

    Args: scores f[B], reward units; penalties f[B], reward units: the KL penalty of the whole answer; usable bool[B], answers
      that the deviation counts, default all.
    """
    advantages = leave_one_out(scores, group_size)
    if penalties is not None:
        advantages -= leave_one_out(penalties, group_size)
    if scale == "none":
        return advantages
    if scale != "batch_std":
        raise ValueError(f"advantage_scale {scale!r}: one of batch_std, none")
    usable = jnp.ones(advantages.shape, bool) if usable is None else usable
    return advantages / (jnp.sqrt(ops.masked_var(advantages, usable)) + STD_EPS)


def build(settings: config.RLOO) -> Algorithm:
    """RLOO with these settings."""
    size, scale = settings.group_size, settings.advantage_scale
    return critic_free.build(
        settings,
        lambda answers: rloo_advantages(
            answers.scores,
            size,
            penalties=ops.masked_sum(answers.penalties, answers.mask, 1),
            scale=scale,
            usable=answers.usable,
        ),
        group_size=size,
    )
