"""Group relative policy optimisation: PPO's clipped loss, with the other answers to the same prompt in place of a critic.

    A_i = (s_i - mean(s)) / (std(s) + 1e-6)      over the G answers to one prompt; every token of answer i has this advantage

and the KL to the reference in the loss. Shao et al. 2024 (DeepSeekMath, arXiv:2402.03300), section 4.1, is the default. By values
of its keys it is also

    Dr.GRPO, Liu et al. 2025 (arXiv:2503.20783)   advantage_scale: none, aggregation: sequence_mean_token_sum_norm, kl_coef: 0
    DAPO, Yu et al. 2025 (arXiv:2503.14476)       aggregation: token_mean, clip_high: 0.28, drop_uninformative: true,
                                                  overlong_buffer: N, kl_coef: 0

DAPO samples again until every group has information; with static shapes, groups without any are left out of the loss and of
its denominator instead, and `policy/trained_rate` says what remains. Left-out rows have no KL in the loss either.
"""

from rlhf_jax import config
from rlhf_jax.algorithms import critic_free
from rlhf_jax.algorithms.training import Algorithm


def build(settings: config.GRPO) -> Algorithm:
    """GRPO with these settings."""
    return critic_free.build_relative(settings)
