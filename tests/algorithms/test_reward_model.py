"""Reward-model losses against known answers, the last true token, calibration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from rlhf_jax import config
from rlhf_jax.algorithms import OFFLINE, reward_model, training
from rlhf_jax.types import Calibration, Preferences, Sequences, TrainState


@pytest.mark.parametrize("name", oracles.names("reward_model_pairwise"))
def test_bradley_terry_equals_the_definition(name):
    case = oracles.load("reward_model_pairwise")[name]
    chosen, rejected = jnp.asarray(case.inputs["chosen"]), jnp.asarray(case.inputs["rejected"])
    margin = jnp.asarray(case.inputs["margin"]) if "margin" in case.inputs else None
    center = case.meta["center_rewards_coefficient"] or 0.0

    def loss(chosen, rejected):
        return jnp.mean(reward_model.bradley_terry(chosen, rejected, margin, centering_coef=center))

    value, (grad_chosen, grad_rejected) = jax.jit(jax.value_and_grad(loss, (0, 1)))(chosen, rejected)
    oracles.close(value, case.ref["loss"])
    oracles.close(grad_chosen, case.ref["grad_chosen"], rtol=1e-5)
    oracles.close(grad_rejected, case.ref["grad_rejected"], rtol=1e-5)
    oracles.close(reward_model.accuracy(chosen, rejected), case.ref["accuracy"])


def test_label_smoothing_is_the_expected_loss_under_wrong_labels():
    chosen, rejected = jnp.asarray([1.0, -2.0]), jnp.asarray([0.5, 0.5])
    got = reward_model.bradley_terry(chosen, rejected, label_smoothing=0.2)
    right, wrong = reward_model.bradley_terry(chosen, rejected), reward_model.bradley_terry(rejected, chosen)
    np.testing.assert_allclose(got, 0.8 * right + 0.2 * wrong, rtol=1e-6)


@pytest.mark.parametrize("name", oracles.names("reward_model_dschat"))
def test_the_per_token_form_equals_the_original(name):
    case = oracles.load("reward_model_dschat")[name]
    if "loss" not in case.ref:
        assert name == "divergence_at_zero"  # the original raises AssertionError; ours is defined
        return
    tokens, scores = jnp.asarray(case.inputs["input_ids"]), jnp.asarray(case.inputs["rewards"])
    pairs = len(tokens) // 2
    skip, lengths = case.meta["num_padding_at_beginning"], []
    for row in np.asarray(tokens):  # OPT starts with a padding token: the first one after it ends the sequence
        pads = np.flatnonzero(row == case.meta["pad"])
        lengths.append(pads[skip] if len(pads) > skip else len(row))
    lengths = jnp.asarray(lengths, jnp.int32)

    def loss(scores):
        args = (scores[:pairs], scores[pairs:], tokens[:pairs], tokens[pairs:], lengths[:pairs], lengths[pairs:])
        return jnp.mean(reward_model.per_token(*args))

    value, grad = jax.jit(jax.value_and_grad(loss))(scores)
    oracles.close(value, case.ref["loss"])
    oracles.close(grad, case.ref["grad_rewards"], rtol=1e-5)
    theirs = case.peers["dschat.RewardModel.forward"]
    oracles.close(value, theirs["loss"])
    mask = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
    ends = reward_model.last_score(scores, mask)
    oracles.close(ends[:pairs], theirs["chosen_mean_scores"])
    oracles.close(ends[pairs:], theirs["rejected_mean_scores"])


@pytest.mark.parametrize("name", oracles.names("end_scores"))
def test_rule_4_the_score_is_that_of_the_last_true_token(name):
    case = oracles.load("end_scores")[name]
    prompt = np.asarray(case.inputs["prompts"]) != case.meta["pad"]
    mask = jnp.asarray(np.concatenate([prompt, np.asarray(case.inputs["response_mask"], bool)], 1))
    got = np.asarray(reward_model.last_score(jnp.asarray(case.inputs["values"]), mask))
    some = np.asarray(mask).any(1)
    np.testing.assert_array_equal(got[some], case.ref["score"][some].astype(np.float32))
    assert not got[~some].any()


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)

    def side():
        mask = np.arange(6)[None, :] < rng.integers(1, 7, 8)[:, None]
        return Sequences(
            tokens=jnp.asarray(rng.integers(1, 9, (8, 6)), jnp.int32), mask=jnp.asarray(mask), target_mask=jnp.asarray(mask)
        )

    chosen, rejected = side(), side()
    empty = rejected.replace(mask=rejected.mask.at[7].set(False))  # a padded pair
    return Preferences(chosen=chosen, rejected=empty, margin=jnp.asarray(rng.random(8), jnp.float32))


def bag(params, frozen, batch):
    """Score of token t: weights of the tokens up to it; NaN in padding, as a careless model may give."""
    del frozen
    scores = jnp.cumsum(params["embedding"][batch.tokens], 1)
    return jnp.where(batch.mask, scores, jnp.nan)


def everywhere(params, frozen, batch):
    """Finite in padding, where the classical form looks at scores too."""
    del frozen
    return jnp.cumsum(params["embedding"][batch.tokens], 1)


PARAMS = {"embedding": np.linspace(-1, 1, 9, dtype=np.float32)}


@pytest.mark.parametrize("form", ["bradley_terry", "deepspeed_chat"])
def test_one_forward_and_the_same_gradient_for_every_split(pairs, form):
    apply = bag if form == "bradley_terry" else everywhere
    algorithm = OFFLINE["reward"](config.RewardModelLoss(loss=form))
    counts = algorithm.denominators(pairs)
    assert counts["pairs"] == 7
    shapes = []

    def counted(params, frozen, batch):
        shapes.append(batch.tokens.shape)
        return apply(params, frozen, batch)

    def run(parts):
        loss = functools.partial(algorithm.loss, counted)
        return jax.jit(lambda p: training.accumulate(lambda p, part: loss(p, None, part, counts), p, pairs, parts))(PARAMS)

    value, metrics, grads = run(1)
    assert set(shapes) == {(16, 6)}
    assert np.isfinite(value)
    assert np.isfinite(grads["embedding"]).all()
    for parts in (2, 4):
        other, other_metrics, other_grads = run(parts)
        np.testing.assert_allclose(other, value, rtol=1e-6)
        np.testing.assert_allclose(other_grads["embedding"], grads["embedding"], rtol=1e-5, atol=1e-7)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), other_metrics, metrics)


def test_margins_and_centring_reach_the_loss(pairs):
    base = reward_model.build(config.RewardModelLoss())
    counts = base.denominators(pairs)
    apply = functools.partial(bag, PARAMS, None)

    def value(settings, batch=pairs):
        return reward_model.build(settings).loss(lambda *args: apply(args[2]), None, None, batch, counts)[0]

    plain = value(config.RewardModelLoss())
    assert value(config.RewardModelLoss(), pairs.replace(margin=None)) != plain
    assert value(config.RewardModelLoss(centering_coef=0.1)) > plain
    assert value(config.RewardModelLoss(label_smoothing=0.1)) != plain
    with pytest.raises(ValueError, match="no centering_coef"):
        reward_model.build(config.RewardModelLoss(loss="deepspeed_chat", centering_coef=0.1))
    with pytest.raises(ValueError, match="'hinge'"):
        reward_model.build(config.RewardModelLoss(loss="hinge"))


def test_calibration_gives_fine_tuned_samples_mean_0_and_spread_1():
    raw = np.random.default_rng(0).normal(3.0, 2.5, 500).astype(np.float32)
    found = reward_model.calibrate(np.append(raw, [np.nan, np.inf]))
    scaled = (raw - found.mean) / found.std
    np.testing.assert_allclose([scaled.mean(), scaled.std()], [0, 1], atol=1e-5)
    assert all(isinstance(x, float) for x in (found.mean, found.std))
    assert reward_model.calibrate([]) == Calibration()
    assert reward_model.calibrate([0.1] * 7).std == 1.0
    assert reward_model.calibrate([5.0]) == Calibration(5.0, 1.0)


def test_calibration_bins_compare_confidence_with_agreement():
    rng = np.random.default_rng(0)
    d = rng.normal(size=20000) * 2
    right = rng.random(20000) < 1 / (1 + np.exp(-np.abs(d)))  # labels drawn from the model itself: calibrated
    d = np.where(right, np.abs(d), -np.abs(d))
    bins = reward_model.calibration_bins(jnp.asarray(d, jnp.float32), jnp.zeros(20000), bins=5)
    assert bins.count.sum() == 20000
    np.testing.assert_allclose(bins.accuracy, bins.confidence, atol=0.03)
    assert bins.error < 0.02
    boastful = reward_model.calibration_bins(jnp.asarray(5 * d, jnp.float32), jnp.zeros(20000), bins=5)
    assert boastful.error > 0.1


def test_it_learns_to_prefer(pairs):
    algorithm = reward_model.build(config.RewardModelLoss())
    tx = training.make_optimizer(config.Optimizer(learning_rate=0.05, schedule="constant"), 80)
    state = TrainState(step=jnp.int32(0), params={"embedding": jnp.zeros(9)}, opt_state=tx.init({"embedding": jnp.zeros(9)}))
    step = training.make_offline_update(functools.partial(algorithm.loss, bag), algorithm.denominators, tx)
    _, metrics = jax.jit(lambda s: jax.lax.scan(lambda s, _: step(s, pairs), s, None, length=80))(state)
    assert metrics["reward_model/accuracy"][-1] > 0.8
    assert metrics["reward_model/loss"][-1] < metrics["reward_model/loss"][0]
