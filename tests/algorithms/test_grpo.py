"""GRPO, Dr.GRPO and DAPO: advantages and losses against float64 definitions, exact zeros, what is left out, learning."""

import bandit
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import synthetic_answers

from rlhf_jax import config, ops
from rlhf_jax.algorithms import critic_free, grpo, ppo
from rlhf_jax.types import Experience

GROUPED = [case for case in oracles.names("group_advantages") if case not in ("g4_shuffled", "g1_b4", "trl_multi")]
SCALES = [("std", 1e-4, "grpo_std_eps1e4"), ("std", 1e-6, "grpo_std_eps1e6"), ("none", 0.0, "grpo_nostd")]
SCALES += [("batch_std", 1e-4, "grpo_batchstd_eps1e4")]
PUBLISHED = {  # loss of the oracle -> keys
    "grpo": {"aggregation": "sequence_mean_token_mean"},
    "dapo": {"aggregation": "token_mean"},
    "bnpo": {"aggregation": "token_mean"},
    "dr_grpo": {"aggregation": "sequence_mean_token_sum_norm"},
    "tokenscaleR": {"aggregation": "sequence_mean_token_sum_norm"},
    "dapo_dual3": {"aggregation": "token_mean", "dual_clip": 3.0},
}


def advantages(scores, group_size, **keys):
    """Jitted: one compilation instead of one per operation."""
    return np.asarray(jax.jit(lambda s: critic_free.group_advantages(s, group_size, **keys))(jnp.asarray(scores, jnp.float32)))


@pytest.mark.parametrize("case", GROUPED)
@pytest.mark.parametrize(("scale", "eps", "name"), SCALES)
def test_advantages_equal_the_definition(case, scale, eps, name):
    known = oracles.load("group_advantages")[case]
    size = known.meta["group_size"]
    got = advantages(known.inputs["rewards"], size, scale=scale, eps=eps)
    oracles.close(got, known.ref[f"seq_{name}"], rtol=1e-5, what=case)


@pytest.mark.parametrize("case", [*GROUPED, "g4_shuffled"])
@pytest.mark.parametrize(
    ("scale", "names"),
    [("std", ("grpo_std_eps1e6", "grpo_std_eps1e6_vec")), ("none", ("grpo_nostd", "grpo_nostd_vec", "o_dr_grpo"))],
)
def test_every_action_of_an_answer_has_its_advantage(case, scale, names):
    known = oracles.load("group_advantages")[case]
    order = np.argsort(known.inputs["index"], kind="stable")  # a group's rows are consecutive here
    algorithm = grpo.build(config.GRPO(group_size=known.meta["group_size"], kl_coef=0.0, advantage_scale=scale))
    experience, _ = synthetic_answers.experience(algorithm, known.inputs["rewards"][order], known.inputs["response_mask"][order])
    found = names if case != "g4_shuffled" else names[:2]
    for name in found:
        oracles.close(experience.advantages, known.ref[name][order], rtol=1e-5, what=f"{case} {name}")
    if scale == "std" and case != "g4_shuffled":  # OpenRLHF's epsilon
        got = advantages(known.inputs["rewards"], known.meta["group_size"], eps=1e-9)[:, None] * known.inputs["response_mask"]
        oracles.close(got, known.ref["o_group_norm"], rtol=1e-5, what=case)


@pytest.mark.parametrize("case", oracles.names("grpo_constant_group"))
@pytest.mark.parametrize("scale", ["std", "batch_std", "none"])
def test_a_group_of_equal_scores_is_exactly_zero(case, scale):
    known = oracles.load("grpo_constant_group")[case]
    scores = known.inputs["rewards"]
    np.testing.assert_array_equal(advantages(scores, len(scores), scale=scale), known.ref["advantage"])


@pytest.mark.parametrize("value", [0.3, 0.7, 1e-3, -1.1, 1000.1, 1e7])
def test_a_group_of_equal_scores_is_zero_beside_others(value):
    scores = [value] * 7 + [0.1, 0.2, 0.35, 0.1, 0.0, -2.0, 0.4]
    np.testing.assert_array_equal(advantages(scores, 7)[:7], 0.0)


@pytest.mark.parametrize("scale", ["std", "batch_std", "none"])
def test_a_group_of_one_is_exactly_zero(scale):
    scores = oracles.load("group_advantages")["g1_b4"].inputs["rewards"]
    np.testing.assert_array_equal(advantages(scores, 1, scale=scale), 0.0)


@pytest.mark.parametrize("offset", [1.0, 1e4, 1e6])
def test_a_large_offset_costs_no_digits(offset):
    spread = np.random.default_rng(0).integers(-8, 8, 16) / 4.0  # exact in float32 beside 1e6
    np.testing.assert_allclose(advantages(spread + offset, 4), advantages(spread, 4), rtol=1e-6, atol=1e-6)


def test_groups_do_not_see_each_other():
    scores = np.random.default_rng(1).normal(size=12)
    changed, order = np.concatenate([[9.0, -3.0, 0.5, 1.5], scores[4:]]), [3, 1, 0, 2]
    got = advantages(changed, 4)
    np.testing.assert_array_equal(got[4:], advantages(scores, 4)[4:])
    np.testing.assert_allclose(advantages(changed[:4][order], 4), got[:4][order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", oracles.names("grpo_loss"))
def test_losses_and_gradients_equal_the_definitions(case):
    known = oracles.load("grpo_loss")[case]
    mask = known.inputs["response_mask"].astype(bool)
    clip = {"clip_low": known.meta["eps_low"], "clip_high": known.meta["eps_high"]}
    variants = {
        name + ("_beta" if beta else ""): grpo.build(config.GRPO(group_size=1, kl_coef=beta, **clip, **keys))
        for name, keys in PUBLISHED.items()
        for beta in (0.0, 0.04)
        if not (beta and keys.get("dual_clip"))  # the oracle has no KL there
    }
    found = synthetic_answers.gradients(variants, known.inputs["logprobs"], batch(known, mask), kl_coef=0.04)
    rows, full = mask.shape[0], mask.any(1).sum()
    factors = {
        "grpo": full / rows,  # TRL averages over all rows, we over those with a token
        "dr_grpo": mask.shape[1] / known.meta["max_completion_length"],  # our constant is R
        "tokenscaleR": rows / full,  # tunix divides by the rows with a token, Dr.GRPO by all
    }
    for name, (loss, grad) in found.items():
        factor = factors.get(name.removesuffix("_beta"), 1.0)
        oracles.close(factor * loss, known.ref[f"loss_{name}"], what=name)
        oracles.close(factor * grad, known.ref[f"grad_{name}"], rtol=1e-5, what=name)


def batch(known: oracles.Case, mask: np.ndarray) -> Experience:
    made = synthetic_answers.rollout(mask)
    return Experience(
        tokens=made.tokens,
        mask=made.mask,
        action_mask=made.action_mask,
        logprobs=jnp.asarray(known.inputs["old_logprobs"]),
        advantages=jnp.broadcast_to(jnp.asarray(known.inputs["advantages"])[:, None], mask.shape),
        ref_logprobs=jnp.asarray(known.inputs["ref_logprobs"]),
    )


def scored_batch(rows: int = 8, width: int = 6):
    rng = np.random.default_rng(3)
    mask = np.arange(width)[None] < rng.integers(1, width + 1, rows)[:, None]
    scores = np.asarray([0.3] * 4 + [0.1, 0.9, 0.4, 0.3], np.float32)  # the first group has no information
    return rng, mask, scores, rng.normal(-1.0, 0.4, mask.shape).astype(np.float32)


def test_groups_without_information_are_left_out_of_loss_and_denominator():
    rng, mask, scores, old = scored_batch()
    new = old + rng.normal(0, 0.3, old.shape)
    keys = {"group_size": 4, "kl_coef": 0.0, "aggregation": "token_mean"}
    kept, dropped = (grpo.build(config.GRPO(drop_uninformative=drop, **keys)) for drop in (False, True))
    all_rows, metrics = synthetic_answers.experience(kept, scores, mask, logprobs=old)
    assert float(metrics["group/uninformative_rate"]) == 0.5
    assert float(metrics["policy/trained_rate"]) == 1.0
    informative_rows, metrics = synthetic_answers.experience(dropped, scores, mask, logprobs=old)
    assert float(metrics["group/uninformative_rate"]) == 0.5
    assert float(metrics["policy/trained_rate"]) == 0.5
    with_all, grad_with_all = synthetic_answers.gradient(kept, new, all_rows)
    without, grad_without = synthetic_answers.gradient(kept, new, informative_rows)
    np.testing.assert_array_equal(grad_with_all[:4], 0.0)
    np.testing.assert_array_equal(grad_without[:4], 0.0)
    share = mask[4:].sum() / mask.sum()  # of the tokens that the denominator counts
    assert with_all == pytest.approx(without * share, rel=1e-5)
    np.testing.assert_allclose(grad_with_all, grad_without * share, rtol=1e-5, atol=1e-8)


def test_a_batch_without_information_is_no_step_and_no_alarm():
    mask = np.ones((4, 3), bool)
    algorithm = grpo.build(config.GRPO(group_size=4, kl_coef=0.0, drop_uninformative=True))
    experience, metrics = synthetic_answers.experience(algorithm, np.full(4, 0.7), mask)
    assert float(metrics["policy/trained_rate"]) == 0.0
    state, metrics = synthetic_answers.update(algorithm, np.zeros(mask.shape), experience)
    assert int(state.actor.step) == 0
    assert int(state.bad_steps) == 0
    assert float(metrics["policy/loss"]) == 0.0


def test_micro_batches_change_nothing():
    rng, mask, scores, old = scored_batch()
    new, ref = old + rng.normal(0, 0.3, old.shape), old + rng.normal(0, 0.2, old.shape)
    keys = {"group_size": 4, "drop_uninformative": True, "kl_coef": 0.04}
    algorithms = {parts: grpo.build(config.GRPO(micro_batches=parts, **keys)) for parts in (1, 2, 4)}
    experience, _ = synthetic_answers.experience(algorithms[1], scores, mask, logprobs=old, ref_logprobs=ref)
    found = synthetic_answers.gradients(algorithms, new, experience, kl_coef=0.04)
    for parts in (2, 4):
        assert found[parts][0] == pytest.approx(found[1][0], rel=1e-6)
        np.testing.assert_allclose(found[parts][1], found[1][1], rtol=1e-5, atol=1e-8)


def test_nan_in_padding_and_scores_that_are_not_finite_train_nothing():
    rng, mask, scores, old = scored_batch()
    scores[5] = np.nan
    algorithm = grpo.build(config.GRPO(group_size=4, kl_coef=0.04))
    ref = np.where(mask, old, np.nan)
    experience, metrics = synthetic_answers.experience(
        algorithm, scores, mask, logprobs=np.where(mask, old, np.nan), ref_logprobs=ref
    )
    assert not experience.action_mask[4:].any()  # the group of the unscorable answer has no mean
    assert all(np.isfinite(float(value)) for value in metrics.values())
    new = np.where(mask, old + rng.normal(0, 0.3, old.shape), np.nan)
    loss, grad = synthetic_answers.gradient(algorithm, new, experience, kl_coef=0.04)
    assert np.isfinite(loss)
    assert np.isfinite(grad).all()
    np.testing.assert_array_equal(grad[4:], 0.0)


def test_overlong_answers_lose_score_linearly_over_the_buffer():
    mask = np.arange(10)[None] < np.asarray([1, 6, 7, 8, 9, 10])[:, None]
    got = critic_free.overlong_penalty(jnp.asarray(mask), buffer=4, penalty=0.8)
    np.testing.assert_allclose(got, [0.0, 0.0, 0.2, 0.4, 0.6, 0.8], rtol=1e-6)
    algorithm = grpo.build(
        config.GRPO(group_size=6, kl_coef=0.0, advantage_scale="none", overlong_buffer=4, overlong_penalty=0.8)
    )
    experience, _ = synthetic_answers.experience(algorithm, np.ones(6), mask)
    np.testing.assert_allclose(experience.advantages[:, 0], 1 / 3 - np.asarray(got), rtol=1e-5, atol=1e-7)


def test_what_the_loop_must_hold():
    assert grpo.build(config.GRPO()).needs == {"entropy", "reference"}
    assert grpo.build(config.GRPO(kl_coef=0.0)).needs == {"entropy"}  # no second copy of the model
    assert grpo.build(config.GRPO(kl_coef=0.0, old_logprobs="rollout")).needs == set()  # and no scoring at all
    assert grpo.build(config.GRPO(kl_estimator="exact")).needs == {"entropy", "reference", "kl"}
    assert grpo.build(config.GRPO(group_size=5)).group_size == 5


def test_a_group_size_that_does_not_divide_the_batch_is_refused():
    algorithm = grpo.build(config.GRPO(group_size=4, kl_coef=0.0))
    with pytest.raises(ValueError, match=r"group_size is 4 and the batch has 6 answers; .* multiple of 4"):
        synthetic_answers.experience(algorithm, np.zeros(6), np.ones((6, 3), bool))


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="kl_coef is 0 and adaptive_kl multiplies it"):
        grpo.build(config.GRPO(kl_coef=0.0, adaptive_kl=config.AdaptiveKL()))
    with pytest.raises(ValueError, match="advantage_scale"):
        critic_free.group_advantages(jnp.zeros(4), 2, scale="mean")


def test_dr_grpo_has_no_length_bias():
    """The published reason for its aggregation: the gradient of a token does not depend on how long its answer is."""
    mask = np.asarray([[1, 0, 0, 0], [1, 1, 1, 1]], bool)
    logprobs, advantages = jnp.full(mask.shape, -1.0), jnp.ones(mask.shape)

    def grad(kind):
        def loss(x):
            return ops.aggregate(ppo.policy_loss(x, logprobs, advantages, jnp.asarray(mask))[0], jnp.asarray(mask), kind)

        return np.asarray(jax.grad(loss)(logprobs))

    fair, published = grad("sequence_mean_token_sum_norm"), grad("sequence_mean_token_mean")
    assert fair[0, 0] == fair[1, 0]
    assert published[0, 0] == pytest.approx(4 * published[1, 0])


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"kl_coef": 0.0, "aggregation": "sequence_mean_token_sum_norm", "advantage_scale": "none"},
        {"kl_coef": 0.0, "aggregation": "token_mean", "clip_high": 0.28, "drop_uninformative": True, "minibatches": 2},
    ],
    ids=["grpo", "dr_grpo", "dapo"],
)
def test_learns(keys):
    before, after, metrics = bandit.seeds(bandit.online(grpo.build(config.GRPO(**keys)), kl_coef=0.01))
    assert (before < 0.05).all()
    assert (after > 0.9).all(), after
    assert float(metrics["policy/first_ratio_max"].max()) < 1e-5
