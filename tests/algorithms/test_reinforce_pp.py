"""REINFORCE++: returns and whitened advantages against the definitions, both baselines, exact zeros, learning."""

import bandit
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import synthetic_answers

from rlhf_jax import config
from rlhf_jax.algorithms import reinforce_pp

CASES = [case for case in oracles.names("group_advantages") if case != "trl_multi"]
GROUPED = [case for case in CASES if case not in ("g4_shuffled", "g1_b4")]


def made(known, **keys):
    """Advantages f32[B, R] and metrics of a case, through the algorithm itself."""
    algorithm = reinforce_pp.build(config.ReinforcePP(kl_coef=0.0, **keys))
    return synthetic_answers.experience(algorithm, known.inputs["rewards"], known.inputs["response_mask"])[0].advantages


@pytest.mark.parametrize("case", CASES)
def test_returns_and_advantages_equal_the_definitions(case):
    known = oracles.load("group_advantages")[case]
    gamma = known.meta["gamma"]
    atol = 1e-3 if case == "g4_big" else None  # scores near 1e4: the mean is rounded to float32's 1e-3 there
    oracles.close(made(known, gamma=gamma), known.ref["rfpp"], rtol=1e-5, atol=atol, what=case)
    oracles.close(made(known, gamma=gamma, whiten_advantages="none"), known.ref["rfpp_returns"], rtol=1e-6, what=case)
    if case not in ("g4_const", "g4_shuffled"):  # the peer divides 0 by 0 in the one and does not know the other
        got = made(known, gamma=gamma, whiten_advantages="population")
        oracles.close(got, known.ref["o_reinforce"], rtol=1e-5, atol=atol, what=case)
        oracles.close(made(known, gamma=gamma, whiten_advantages="none"), known.ref["o_reinforce_returns"], rtol=1e-6, what=case)


@pytest.mark.parametrize("case", GROUPED)
def test_advantages_with_the_group_baseline_equal_the_definitions(case):
    known = oracles.load("group_advantages")[case]
    keys = {"baseline": "group", "group_size": known.meta["group_size"]}
    oracles.close(made(known, **keys), known.ref["rfpp_baseline"], rtol=1e-5, what=case)
    if case != "g4_const":
        got = made(known, whiten_advantages="population", **keys)
        oracles.close(got, known.ref["o_reinforce_baseline"], rtol=1e-5, what=case)


@pytest.mark.parametrize("value", [0.7, 0.3, 1000.1])
@pytest.mark.parametrize("keys", [{}, {"baseline": "group", "group_size": 4}], ids=["batch", "group"])
def test_equal_scores_are_exactly_zero(value, keys):
    mask = np.arange(5)[None] < np.asarray([1, 5, 3, 2, 5, 4, 3, 1])[:, None]
    algorithm = reinforce_pp.build(config.ReinforcePP(kl_coef=0.0, **keys))
    experience, _ = synthetic_answers.experience(algorithm, np.full(8, value), mask)
    np.testing.assert_array_equal(np.asarray(experience.advantages), 0.0)


def test_the_kl_of_later_tokens_is_in_the_return_of_earlier_ones():
    mask = np.asarray([[True, True, True, False]])
    ref = np.asarray([[-1.1, -1.4, -0.8, np.nan]])
    algorithm = reinforce_pp.build(config.ReinforcePP(kl_coef=0.5, gamma=0.9, whiten_advantages="none"))
    scored = {"logprobs": np.full((1, 4), -1.0), "ref_logprobs": ref}
    experience, metrics = synthetic_answers.experience(algorithm, [2.0], mask, kl_coef=0.5, **scored)
    rewards = -0.5 * np.asarray([0.1, 0.4, -0.2]) + np.asarray([0.0, 0.0, 2.0])
    want = [rewards[0] + 0.9 * (rewards[1] + 0.9 * rewards[2]), rewards[1] + 0.9 * rewards[2], rewards[2], 0.0]
    np.testing.assert_allclose(experience.advantages[0], want, rtol=1e-5)
    assert float(metrics["reward/shaped"]) == pytest.approx(rewards.sum(), rel=1e-5)


def test_tokens_that_are_not_actions_are_stepped_over_without_a_discount():
    mask = jnp.asarray([[True, False, True, True, False]])
    rewards = jnp.asarray([[0.0, 9.0, 0.0, 1.0, jnp.nan]])
    got = jax.jit(lambda r, m: reinforce_pp.returns_to_go(r, m, gamma=0.5))(rewards, mask)
    np.testing.assert_allclose(got, [[0.25, 0.0, 0.5, 1.0, 0.0]])


def test_a_group_baseline_needs_a_group():
    with pytest.raises(ValueError, match="group_size is 1"):
        reinforce_pp.build(config.ReinforcePP(baseline="group"))


@pytest.mark.parametrize("keys", [{}, {"baseline": "group", "group_size": 4}], ids=["batch", "group"])
def test_learns(keys):
    before, after, _ = bandit.seeds(bandit.online(reinforce_pp.build(config.ReinforcePP(**keys)), kl_coef=0.01))
    assert (before < 0.05).all()
    assert (after > 0.9).all(), after
