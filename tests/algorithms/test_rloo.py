"""RLOO: leave-one-out advantages against the definition, the KL inside the reward, exact zeros, unbiasedness, learning."""

import bandit
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import synthetic_answers

from rlhf_jax import config
from rlhf_jax.algorithms import critic_free, grpo, rloo

GROUPED = [case for case in oracles.names("group_advantages") if case not in ("g4_shuffled", "g1_b4", "trl_multi")]


def advantages(scores, group_size, **keys):
    return np.asarray(jax.jit(lambda s: rloo.rloo_advantages(s, group_size, **keys))(jnp.asarray(scores, jnp.float32)))


@pytest.mark.parametrize("case", GROUPED)
def test_advantages_equal_the_definition(case):
    known = oracles.load("group_advantages")[case]
    size, rewards = known.meta["group_size"], known.inputs["rewards"]
    oracles.close(advantages(rewards, size), known.ref["seq_rloo"], rtol=1e-5, what=case)
    oracles.close(advantages(rewards, size, scale="batch_std"), known.ref["seq_rloo_normalized"], rtol=1e-5, what=case)


@pytest.mark.parametrize("case", GROUPED)
def test_the_kl_of_the_whole_answer_is_part_of_its_reward(case):
    known = oracles.load("group_advantages")[case]
    mask, kl = known.inputs["response_mask"].astype(bool), known.inputs["kl"]
    logprobs = np.where(mask, -1.0, np.nan)
    for beta, name, rtol in ((0.05, "seq_rloo_beta", 1e-5), (0.0, "rloo", 1e-5)):
        algorithm = rloo.build(config.RLOO(group_size=known.meta["group_size"], kl_coef=beta))
        scored = {"logprobs": logprobs, "ref_logprobs": logprobs - kl}
        experience, _ = synthetic_answers.experience(algorithm, known.inputs["rewards"], mask, kl_coef=beta, **scored)
        want = known.ref[name][:, None] * mask if beta else known.ref[name]
        oracles.close(experience.advantages, want, rtol=rtol, what=name)
    oracles.close(experience.advantages, known.ref["o_rloo"], rtol=1e-5, what=case)


@pytest.mark.parametrize("case", oracles.names("grpo_constant_group"))
@pytest.mark.parametrize("scale", ["none", "batch_std"])
def test_a_group_of_equal_scores_is_exactly_zero(case, scale):
    scores = oracles.load("grpo_constant_group")[case].inputs["rewards"]
    np.testing.assert_array_equal(advantages(scores, len(scores), scale=scale), 0.0)
    np.testing.assert_array_equal(advantages(scores, 1, scale=scale), 0.0)


@pytest.mark.parametrize(
    "algorithm",
    [
        rloo.build(config.RLOO(group_size=4, advantage_scale="batch_std", kl_coef=0.0)),
        grpo.build(config.GRPO(group_size=4, advantage_scale="batch_std", kl_coef=0.0)),
    ],
    ids=["rloo", "grpo"],
)
def test_a_group_with_a_score_that_is_not_finite_is_not_in_the_deviation_of_the_batch(algorithm):
    scores = np.asarray([10.0, 11.5, 10.25, 11.0, np.nan, 10.0, 11.0, 10.0])
    whole, _ = synthetic_answers.experience(algorithm, scores, np.ones((8, 3), bool))
    alone, _ = synthetic_answers.experience(algorithm, scores[:4], np.ones((4, 3), bool))
    np.testing.assert_allclose(whole.advantages[:4], alone.advantages, rtol=1e-5)
    np.testing.assert_array_equal(whole.advantages[4:], 0.0)


def test_the_baseline_of_an_answer_does_not_depend_on_it():
    scores = np.asarray([0.3, -1.2, 0.9, 2.0])
    moved = scores + np.asarray([0.0, 5.0, 0.0, 0.0])
    assert advantages(moved, 4)[1] - advantages(scores, 4)[1] == pytest.approx(5.0, rel=1e-6)


def test_the_gradient_at_ratio_one_is_reinforce_on_whole_answers():
    """d loss / d log p_t = -A_i / B for every token of answer i, whatever its length."""
    mask = np.arange(5)[None] < np.asarray([1, 5, 3, 2])[:, None]
    algorithm = rloo.build(config.RLOO(kl_coef=0.0))
    logprobs = np.random.default_rng(0).normal(-1, 0.3, mask.shape)
    experience, _ = synthetic_answers.experience(algorithm, [0.3, -1.2, 0.9, 2.0], mask, logprobs=logprobs)
    _, grad = synthetic_answers.gradient(algorithm, logprobs, experience)
    want = advantages([0.3, -1.2, 0.9, 2.0], 4)
    np.testing.assert_allclose(grad, -want[:, None] * mask / 4, rtol=1e-5)


def test_sequence_scores_take_off_every_penalty_once():
    mask = jnp.asarray([[True, True, False]])
    answers = critic_free.Answers(scores=jnp.ones(1), penalties=jnp.asarray([[0.1, 0.2, jnp.nan]]), mask=mask)
    np.testing.assert_allclose(critic_free.sequence_scores(answers), [0.7], rtol=1e-6)


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="advantage_scale 'std': one of batch_std, none"):
        advantages(np.zeros(4), 2, scale="std")


def test_learns():
    before, after, _ = bandit.seeds(bandit.online(rloo.build(config.RLOO()), kl_coef=0.01))
    assert (before < 0.05).all()
    assert (after > 0.9).all(), after
