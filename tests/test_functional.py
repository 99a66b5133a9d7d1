"""An online run in memory: it asks for what its algorithm needs. (That it learns: algorithms/bandit.py, the examples.)"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import config, functional, testing
from rlhf_jax.algorithms import ppo, remax, rloo
from rlhf_jax.types import Frozen

V, EOS, PAD, R = 8, 6, 7, 3
MODEL = testing.markov_model(V)
PROMPTS = testing.random_prompts(0, 4, 2, 6)
KEY = jax.random.key(0)


def made(algorithm, **options):
    tx = optax.adam(0.1)
    common = {"stop_ids": (EOS,), "pad_id": PAD, "actor_tx": tx, "critic_tx": tx}
    return functional.online(algorithm, MODEL, config.Sampling(max_new_tokens=R), **common | options)


def shapes_of_a_step(run, *, critic=True, greedy=False):
    """The metrics of one iteration, as shapes: nothing is compiled."""
    params = MODEL.init(KEY)

    def step(key):
        state = run.init(params, critic=params if critic else None, kl_coef=0.1)
        frozen = Frozen(reference=params)
        rollout = run.sample(state, frozen, PROMPTS, key)
        scores = rollout.finished.astype(jnp.float32)
        greedy_scores = run.greedy(state, frozen, PROMPTS, key).finished.astype(jnp.float32) if greedy else None
        return run.learn(state, frozen, rollout, scores, key, greedy_scores=greedy_scores)

    return jax.eval_shape(step, KEY)


def test_an_entropy_bonus_needs_the_entropy():
    algorithm = ppo.build(config.PPO(entropy_coef=0.1))
    assert "policy/entropy_nats" in shapes_of_a_step(made(algorithm, entropy=True))[1]
    with pytest.raises(ValueError, match="entropy_coef"):
        shapes_of_a_step(made(algorithm))


def test_a_greedy_baseline_needs_its_scores():
    run = made(remax.build(config.ReMax()))
    assert "policy/loss" in shapes_of_a_step(run, critic=False, greedy=True)[1]
    with pytest.raises(ValueError, match="greedy"):
        shapes_of_a_step(run, critic=False)


def test_a_run_begins_with_the_settings_kl_coefficient():
    params = MODEL.init(KEY)
    for algorithm in (ppo.build(config.PPO(kl_coef=0.5)), rloo.build(config.RLOO(kl_coef=0.5))):
        assert made(algorithm).init(params, critic=params).kl_coef == 0.5
        assert made(algorithm).init(params, critic=params, kl_coef=0.0).kl_coef == 0.0


def test_greedy_answers_keep_the_settings_of_sampling_but_the_temperature():
    tx, settings = optax.adam(0.1), config.Sampling(max_new_tokens=R, min_new_tokens=R)
    stops = {"stop_ids": tuple(range(V - 1)), "pad_id": PAD}  # every answer would end at once
    run = functional.online(remax.build(config.ReMax()), MODEL, settings, actor_tx=tx, **stops)
    rollout = jax.jit(run.greedy)(run.init(MODEL.init(KEY)), Frozen(), PROMPTS, KEY)
    np.testing.assert_array_equal(rollout.action_mask.sum(1), R)


def test_a_critic_is_there_where_it_is_needed():
    state, metrics = shapes_of_a_step(made(ppo.build(config.PPO())))
    assert state.critic is not None
    assert "value/loss" in metrics
    with pytest.raises(ValueError, match="critic"):
        shapes_of_a_step(made(ppo.build(config.PPO())), critic=False)
    state, metrics = shapes_of_a_step(made(rloo.build(config.RLOO(group_size=2))), critic=False)
    assert state.critic is None
    assert "value/loss" not in metrics


def test_steps_and_answers_are_counted_and_a_group_shares_its_prompt():
    run = made(rloo.build(config.RLOO(group_size=2)))
    params = MODEL.init(KEY)
    state, frozen = run.init(params), Frozen(reference=params)
    rollout = jax.jit(run.sample)(state, frozen, PROMPTS, KEY)
    np.testing.assert_array_equal(rollout.tokens[::2, :2], rollout.tokens[1::2, :2])
    after, _ = jax.jit(run.learn)(state, frozen, rollout, jnp.arange(8.0), KEY)
    assert (int(after.step), int(after.cursor)) == (1, 8)
    assert not np.array_equal(after.actor.params["table"], params["table"])


def test_a_base_under_an_adapter_is_joined():
    whole = MODEL.init(KEY)
    run = made(rloo.build(config.RLOO(group_size=2)))
    split = Frozen(actor={"table": whole["table"]})
    one = jax.jit(run.sample)(run.init(whole), Frozen(), PROMPTS, KEY)
    other = jax.jit(run.sample)(run.init({"scores": whole["scores"]}), split, PROMPTS, KEY)
    np.testing.assert_array_equal(one.tokens, other.tokens)
