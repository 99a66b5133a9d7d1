"""GSPO: loss and gradient against the float64 definition, one ratio for a whole answer, learning."""

import bandit
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import synthetic_answers

from rlhf_jax import config
from rlhf_jax.algorithms import gspo
from rlhf_jax.types import Experience

CLIPS = {"gspo": (3e-3, 4e-3), "gspo_clip02": (0.2, 0.2)}


@pytest.mark.parametrize("case", oracles.names("grpo_loss"))
def test_losses_and_gradients_equal_the_definitions(case):
    known = oracles.load("grpo_loss")[case]
    made = synthetic_answers.rollout(known.inputs["response_mask"])
    batch = Experience(
        tokens=made.tokens,
        mask=made.mask,
        action_mask=made.action_mask,
        logprobs=jnp.asarray(known.inputs["old_logprobs"]),
        advantages=jnp.broadcast_to(jnp.asarray(known.inputs["advantages"])[:, None], made.action_mask.shape),
    )
    full = known.inputs["response_mask"].any(1)
    variants = {name: gspo.build(config.GSPO(group_size=1, clip_low=low, clip_high=high)) for name, (low, high) in CLIPS.items()}
    for name, (loss, grad) in synthetic_answers.gradients(variants, known.inputs["logprobs"], batch).items():
        oracles.close(loss, known.ref[f"loss_{name}"], what=name)
        # The oracle's loss leaves out answers without a token, as ours does; its gradient is that of the mean over all rows.
        oracles.close(grad * full.mean(), known.ref[f"grad_{name}"], rtol=1e-5, what=name)


def test_the_ratio_is_the_geometric_mean_and_clips_the_whole_answer():
    mask = jnp.asarray([[True, True, True], [True, True, False], [False, False, False]])
    old = jnp.full(mask.shape, -1.0)
    new = old + jnp.asarray([[0.3, -0.1, 0.1], [0.02, 0.04, jnp.nan], [jnp.nan] * 3])
    ratio = gspo.sequence_log_ratio(new, old, mask)
    np.testing.assert_allclose(ratio, [0.1, 0.03, 0.0], atol=1e-6)
    loss, metrics = gspo.policy_loss(new, old, jnp.ones(mask.shape), mask, clip_low=0.05, clip_high=0.05)
    want = [[-1.05] * 3, [-np.exp(0.03), -np.exp(0.03), 0.0], [0.0] * 3]
    np.testing.assert_allclose(loss, want, rtol=1e-6, atol=1e-7)
    assert float(metrics["policy/clip_fraction"]) == 3.0  # the tokens of the first answer, also those whose own ratio fell
    assert float(metrics["policy/approx_kl_nats"]) == pytest.approx(0.5 * (0.09 + 0.01 + 0.01 + 0.0004 + 0.0016), rel=1e-4)


def test_without_a_kl_no_reference_is_held():
    assert gspo.build(config.GSPO()).needs == {"entropy"}


def test_learns():
    before, after, metrics = bandit.seeds(bandit.online(gspo.build(config.GSPO(minibatches=2, clip_low=0.1, clip_high=0.1))))
    assert (before < 0.05).all()
    assert (after > 0.9).all(), after
    assert float(metrics["policy/first_ratio_max"].max()) < 1e-5
