"""ReMax: advantages against the definition, the greedy answer as the baseline, learning."""

import bandit
import numpy as np
import oracles
import pytest
import synthetic_answers

from rlhf_jax import config
from rlhf_jax.algorithms import remax

CASES = [case for case in oracles.names("group_advantages") if case != "trl_multi"]


@pytest.mark.parametrize("case", CASES)
def test_advantages_equal_the_definition(case):
    known = oracles.load("group_advantages")[case]
    algorithm = remax.build(config.ReMax(kl_coef=0.0))
    experience, _ = synthetic_answers.experience(
        algorithm, known.inputs["rewards"], known.inputs["response_mask"], greedy_score=known.inputs["reward_baselines"]
    )
    oracles.close(experience.advantages, known.ref["remax"], rtol=1e-5, what=case)
    baseline = known.inputs["reward_baselines"][:, None] * known.inputs["response_mask"]
    oracles.close(experience.advantages + baseline, known.ref["remax_returns"], rtol=1e-5, what=case)


def test_the_kl_of_the_tokens_that_follow_is_in_the_advantage():
    mask = np.asarray([[True, True, False]])
    algorithm = remax.build(config.ReMax(kl_coef=0.5))
    scored = {"logprobs": np.full((1, 3), -1.0), "ref_logprobs": np.asarray([[-1.2, -1.6, np.nan]]), "greedy_score": [0.4]}
    experience, _ = synthetic_answers.experience(algorithm, [1.5], mask, kl_coef=0.5, **scored)
    np.testing.assert_allclose(experience.advantages[0], [1.5 - 0.1 - 0.3 - 0.4, 1.5 - 0.3 - 0.4, 0.0], rtol=1e-5)


def test_an_answer_as_good_as_the_greedy_one_teaches_exactly_nothing():
    algorithm = remax.build(config.ReMax(kl_coef=0.0))
    mask = np.ones((3, 4), bool)
    experience, _ = synthetic_answers.experience(algorithm, [0.1, 0.7, 1e3], mask, greedy_score=[0.1, 0.7, 1e3])
    np.testing.assert_array_equal(np.asarray(experience.advantages), 0.0)


TREATED = {
    "clip": {"reward_clip": 1.0},
    "subtract": {"missing_eos": "subtract"},
    "replace": {"missing_eos": "replace", "reward_clip": 1.0},
    "overlong": {"overlong_buffer": 2, "overlong_penalty": 3.0},
}


@pytest.mark.parametrize("keys", TREATED.values(), ids=TREATED)
def test_the_greedy_score_is_clipped_and_penalised_as_the_others_are(keys):
    """The same answers as rollout and as greedy answers are worth the same."""
    mask, finished = np.arange(4)[None] < np.asarray([[2], [3], [4]]), np.asarray([True, True, False])
    algorithm, greedy = remax.build(config.ReMax(kl_coef=0.0, **keys)), {"greedy_mask": mask, "greedy_finished": finished}
    scores = [10.0, -10.0, 0.5]
    found, _ = synthetic_answers.experience(algorithm, scores, mask, finished=finished, greedy_score=scores, **greedy)
    np.testing.assert_array_equal(np.asarray(found.advantages), 0.0)


def test_a_penalty_asks_how_the_greedy_answer_ended():
    algorithm = remax.build(config.ReMax(kl_coef=0.0, missing_eos="replace"))
    with pytest.raises(ValueError, match=r"missing_eos replace: Scored\.greedy_finished is absent"):
        synthetic_answers.experience(algorithm, [0.5], np.ones((1, 3), bool), greedy_score=[0.5])


def test_a_greedy_score_that_is_not_finite_leaves_its_row_out():
    algorithm = remax.build(config.ReMax(kl_coef=0.0))
    experience, metrics = synthetic_answers.experience(algorithm, [0.5, 0.2], np.ones((2, 3), bool), greedy_score=[np.nan, 0.1])
    np.testing.assert_array_equal(np.asarray(experience.action_mask), [[False] * 3, [True] * 3])
    assert np.isfinite(np.asarray(experience.advantages)).all()
    assert float(metrics["policy/trained_rate"]) == 0.5


def test_the_loop_is_asked_for_the_greedy_answer():
    algorithm = remax.build(config.ReMax())
    assert algorithm.needs == {"entropy", "reference", "greedy"}
    with pytest.raises(ValueError, match="needs Scored"):
        synthetic_answers.experience(remax.build(config.ReMax(kl_coef=0.0)), [0.5], np.ones((1, 3), bool))


def test_learns():
    before, after, _ = bandit.seeds(bandit.online(remax.build(config.ReMax()), kl_coef=0.01))
    assert (before < 0.05).all()
    assert (after > 0.9).all(), after
