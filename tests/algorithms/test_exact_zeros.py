"""What holds no information teaches exactly nothing, in float32, whatever the algorithm: no row of it may be "almost zero"."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_answers

from rlhf_jax import config, testing
from rlhf_jax.algorithms import ALGORITHMS, OFFLINE
from rlhf_jax.types import Frozen

ONLINE = {
    "grpo": ("grpo", config.GRPO(group_size=3)),
    "dr_grpo": ("grpo", config.GRPO(group_size=3, advantage_scale="none", aggregation="sequence_mean_token_sum_norm")),
    "dapo": ("grpo", config.GRPO(group_size=3, aggregation="token_mean", drop_uninformative=True)),
    "batch_std": ("grpo", config.GRPO(group_size=3, advantage_scale="batch_std")),
    "gspo": ("gspo", config.GSPO(group_size=3, kl_coef=0.04)),
    "rloo": ("rloo", config.RLOO(group_size=3)),
    "reinforce_pp": ("reinforce_pp", config.ReinforcePP()),
    "reinforce_pp_baseline": ("reinforce_pp", config.ReinforcePP(baseline="group", group_size=3)),
    "remax": ("remax", config.ReMax()),
}
BUILT = {name: ALGORITHMS[stage](settings) for name, (stage, settings) in ONLINE.items()}


def found(scores, mask, *, names=tuple(BUILT), logprobs=None, greedy=0.0):
    """Advantages, loss and gradient of each algorithm: the KL of actor and reference is zero, so that only scores speak."""
    old = np.full(np.shape(mask), -0.7, np.float32)
    new = old if logprobs is None else logprobs
    scored = {"logprobs": old, "ref_logprobs": new, "greedy_score": np.full(len(scores), greedy, np.float32)}
    out = {}
    for name in names:
        experience, metrics = synthetic_answers.experience(BUILT[name], scores, mask, **scored)
        assert all(np.isfinite(float(value)) for value in metrics.values()), (name, metrics)
        state, metrics = synthetic_answers.update(BUILT[name], new, experience, kl_coef=0.05)
        assert int(state.bad_steps) == 0, name
        grad = np.asarray(state.actor.opt_state["logprobs"])
        grad = grad if int(state.actor.step) else np.zeros_like(grad)  # no step was taken at all
        out[name] = np.asarray(experience.advantages), float(metrics["policy/loss"]), grad
    return out


@pytest.mark.parametrize("value", [0.3, 0.7, -1.1, 1000.1])
def test_equal_scores(value):
    """0.3 twelve times: the rounded mean differs from 0.3, and peers divide that by their epsilon."""
    mask = np.arange(4)[None] < np.asarray([4, 1, 2, 3] * 3)[:, None]
    for name, (advantages, loss, grad) in found(np.full(12, value), mask, greedy=value).items():
        np.testing.assert_array_equal(advantages, 0.0, err_msg=name)
        np.testing.assert_array_equal(grad, 0.0, err_msg=name)
        assert loss == 0.0, name


def test_answers_without_a_token():
    mask = np.arange(4)[None] < np.asarray([4, 0, 2, 0, 0, 0] * 2)[:, None]
    scores = np.asarray([0.1, 0.9, 0.4, 0.2, 0.8, 0.3] * 2)
    new = np.where(mask, -0.6, np.nan).astype(np.float32)  # padding may hold anything
    for name, (advantages, loss, grad) in found(scores, mask, logprobs=new).items():
        np.testing.assert_array_equal(advantages[~mask], 0.0, err_msg=name)
        np.testing.assert_array_equal(grad[~mask], 0.0, err_msg=name)
        assert np.isfinite(grad).all(), name
        assert np.isfinite(loss), name
        assert np.abs(grad[mask]).max() > 0, name  # the others still teach


def test_a_batch_without_a_token():
    for name, (advantages, loss, grad) in found(np.arange(12) / 7, np.zeros((12, 4), bool)).items():
        np.testing.assert_array_equal(advantages, 0.0, err_msg=name)
        np.testing.assert_array_equal(grad, 0.0, err_msg=name)
        assert loss == 0.0, name


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_pairs_without_a_token(stage):
    pairs = testing.random_preferences(0, 4, 6, 5)
    pairs = jax.tree.map(jnp.asarray, pairs)
    empty = pairs.replace(
        **{side: getattr(pairs, side).replace(target_mask=jnp.zeros((4, 6), bool)) for side in ("chosen", "rejected")}
    )
    settings = {"dpo": config.DPO(), "kto": config.KTO()}[stage]
    algorithm = OFFLINE[stage](settings)
    apply = synthetic_answers.table_apply
    params = {"logits": jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 5)), jnp.float32)}
    frozen = Frozen(reference=jax.tree.map(lambda x: x + 0.1, params))

    @jax.jit
    def value_and_grad(params):
        batch = algorithm.prepare(apply, params, frozen, empty, 1)
        counts = algorithm.denominators(batch)
        return jax.value_and_grad(lambda p: algorithm.loss(apply, p, frozen, batch, counts)[0])(params)

    loss, grad = value_and_grad(params)
    assert float(loss) == 0.0
    np.testing.assert_array_equal(grad["logits"], 0.0)
