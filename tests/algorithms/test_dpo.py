"""DPO and its variants: values and gradients against float64 definitions, noise-free expectation of the robust loss, learning."""

import functools

import bandit
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import synthetic_answers

from rlhf_jax import config, scoring
from rlhf_jax.algorithms import dpo, training
from rlhf_jax.types import Frozen, Preferences, Sequences, TrainState

LOSSES = {  # of the oracle -> keys
    "sigmoid": {},
    "cdpo_ls01": {"loss": "conservative", "label_smoothing": 0.1},
    "robust": {"loss": "robust", "label_smoothing": 0.1},
    "ipo": {"loss": "ipo"},
    "ipo_summed": {"loss": "ipo_sum"},
}


def sequences(known, rows):
    mask = known.inputs["completion_mask"].astype(bool)[rows]
    tokens = jnp.asarray(known.inputs["input_ids"][rows])
    return Sequences(tokens=tokens, mask=jnp.ones(mask.shape, bool), target_mask=jnp.asarray(mask))


def setting(known):
    """(batch, params, frozen) of a case: the stacked answers [chosen | rejected] are one forward pass of 2n rows."""
    pairs = known.inputs["input_ids"].shape[0] // 2
    batch = Preferences(chosen=sequences(known, slice(0, pairs)), rejected=sequences(known, slice(pairs, None)))
    params = {"logits": jnp.asarray(known.inputs["logits"])}
    return batch, params, Frozen(reference={"logits": jnp.asarray(known.inputs["ref_logits"])})


@pytest.mark.parametrize("case", oracles.names("dpo"))
def test_losses_gradients_and_metrics_equal_the_definitions(case):
    known = oracles.load("dpo")[case]
    batch, params, frozen = setting(known)

    @jax.jit
    def everything(params):
        found = {}
        for name, keys in LOSSES.items():
            algorithm = dpo.build(config.DPO(beta=known.meta["beta"], **keys))
            counts = algorithm.denominators(batch)
            found[name] = jax.value_and_grad(
                lambda p, loss=algorithm.loss, counts=counts: loss(synthetic_answers.table_apply, p, frozen, batch, counts),
                has_aux=True,
            )(params)
        return found

    found = everything(params)
    for name, ((value, metrics), grad) in found.items():
        oracles.close(value, known.ref[f"loss_{name}"], rtol=5e-6, what=name)
        if f"grad_{name}" in known.ref:
            oracles.close(grad["logits"], known.ref[f"grad_{name}"], rtol=1e-5, what=name)
        oracles.close(metrics["dpo/chosen_reward"], known.ref["rewards_chosen"], rtol=1e-5, atol=1e-6, what=name)
        oracles.close(metrics["dpo/rejected_reward"], known.ref["rewards_rejected"], rtol=1e-5, atol=1e-6, what=name)
        oracles.close(metrics["dpo/accuracy"], known.ref["rewards_accuracies"], what=name)
    oracles.close(metrics["dpo/margin"], known.ref["rewards_margins"], rtol=1e-5, atol=1e-6)
    oracles.close(metrics["dpo/chosen_logprob_nats"], known.ref["logps_chosen"])
    oracles.close(metrics["dpo/rejected_logprob_nats"], known.ref["logps_rejected"])


@pytest.mark.parametrize("case", oracles.names("dpo"))
def test_gradients_of_the_summed_log_probabilities(case):
    known = oracles.load("dpo")[case]
    reference = [jnp.asarray(known.inputs[f"ref_{side}_logps"]) for side in ("chosen", "rejected")]

    @jax.jit
    def mean(chosen, rejected):
        return dpo.pair_loss(chosen - reference[0], rejected - reference[1], beta=known.meta["beta"]).mean()

    policy = [jnp.asarray(known.inputs[f"policy_{side}_logps"]) for side in ("chosen", "rejected")]
    for got, side in zip(jax.grad(mean, argnums=(0, 1))(*policy), ("chosen", "rejected"), strict=True):
        oracles.close(got, known.ref[f"grad_{side}_logps_sigmoid"], rtol=1e-5, what=side)
    for ours, theirs, side in zip(policy, reference, ("chosen", "rejected"), strict=True):
        oracles.close(known.meta["beta"] * (ours - theirs), known.ref[f"{side}_rewards"], rtol=1e-5, what=side)


def loss_of(delta, **keys):
    delta = jnp.asarray(delta, jnp.float32)
    return dpo.pair_loss(delta, jnp.zeros_like(delta), **{"beta": 1.0} | keys)


def test_the_robust_loss_is_the_clean_one_on_average_over_flipped_labels():
    delta = np.linspace(-4, 4, 9)
    noisy = 0.8 * loss_of(delta, loss="robust", label_smoothing=0.2) + 0.2 * loss_of(-delta, loss="robust", label_smoothing=0.2)
    np.testing.assert_allclose(noisy, loss_of(delta), rtol=1e-5, atol=1e-6)


def test_the_conservative_loss_is_least_at_the_margin_of_its_noise():
    slope = jax.grad(lambda d: loss_of(d[None], loss="conservative", label_smoothing=0.1)[0])
    assert abs(float(slope(jnp.log(jnp.float32(9.0))))) < 1e-6


def test_far_apart_answers_stay_finite():
    for loss in ("dpo", "conservative"):
        slope = jax.grad(lambda d, loss=loss: loss_of(d, loss=loss, label_smoothing=0.1).sum())
        for value in (slope(jnp.asarray([-1e4, 1e4])), loss_of([-1e4, 1e4], loss=loss)):
            assert np.isfinite(np.asarray(value)).all()


def test_equal_answers_cost_log_2_and_teach_nothing():
    known = oracles.load("dpo")["b4"]
    batch, params, frozen = setting(known)
    same = Preferences(chosen=batch.chosen, rejected=batch.chosen)
    twice = {"logits": jnp.concatenate([params["logits"][:4]] * 2)}
    reference = Frozen(reference=jax.tree.map(lambda x: jnp.concatenate([x[:4]] * 2), frozen.reference))
    algorithm = dpo.build(config.DPO())
    counts = algorithm.denominators(same)

    def loss(p):
        # one model for both sides: their gradients cancel
        return algorithm.loss(synthetic_answers.table_apply, {"logits": jnp.concatenate([p, p])}, reference, same, counts)[0]

    value, grad = jax.jit(jax.value_and_grad(loss))(twice["logits"][:4])
    assert float(value) == pytest.approx(np.log(2.0))
    np.testing.assert_array_equal(np.asarray(grad), 0.0)


def test_nan_outside_the_answers_and_pairs_without_a_token_change_nothing():
    known = oracles.load("dpo")["b4"]
    batch, params, frozen = setting(known)
    algorithm = dpo.build(config.DPO(loss="ipo"))
    mask = jnp.concatenate([batch.chosen.target_mask, batch.rejected.target_mask]).at[jnp.asarray([1, 5])].set(False)
    chosen, rejected = (
        side.replace(target_mask=part) for side, part in zip((batch.chosen, batch.rejected), jnp.split(mask, 2), strict=True)
    )
    empty = Preferences(chosen=chosen, rejected=rejected)
    used = np.pad(np.asarray(mask)[:, 1:], ((0, 0), (0, 1)))  # state t predicts token t + 1

    def loss(p, batch):
        return algorithm.loss(synthetic_answers.table_apply, p, frozen, batch, algorithm.denominators(batch))[0]

    spoiled = {"logits": jnp.where(used[..., None], params["logits"], jnp.nan)}
    value, grad = jax.jit(jax.value_and_grad(loss))(spoiled, empty)
    alone_loss = jax.jit(functools.partial(algorithm.loss, synthetic_answers.table_apply))
    want = 0.0
    for row in (0, 2, 3):
        rows = np.asarray([row])
        one = jax.tree.map(lambda x, rows=rows: x[rows], batch)
        both = np.asarray([row, row + 4])
        alone = Frozen(reference={"logits": frozen.reference["logits"][both]})
        want += alone_loss({"logits": params["logits"][both]}, alone, one, {"pairs": jnp.float32(3.0)})[0]
    assert float(value) == pytest.approx(float(want), rel=1e-5)
    assert np.isfinite(np.asarray(grad["logits"])[used]).all()


def update_of(algorithm, tx, micro_batches=1):
    apply = scoring.make_sequence_apply(bandit.MODEL, 128)
    bound = functools.partial(algorithm.loss, lambda p, frozen, batch: apply(p, frozen.actor, batch))
    return training.make_offline_update(bound, algorithm.denominators, tx, micro_batches)


def test_micro_batches_and_the_reference_under_an_adapter_change_nothing():
    params, other = (bandit.MODEL.init(jax.random.key(i)) for i in (0, 1))
    batch, tx = bandit.pairs(), optax.sgd(1.0)
    algorithm = dpo.build(config.DPO())
    state = TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params))
    frozens = {1: Frozen(reference=other), 3: Frozen(reference=other), 0: Frozen(actor=other)}  # 0: `params` covers the base

    @jax.jit
    def everything(state):
        return {
            parts: update_of(algorithm, tx, max(parts, 1))(state, batch, frozen)[0].params for parts, frozen in frozens.items()
        }

    found = everything(state)
    for parts in (3, 0):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), found[parts], found[1])


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"beta": 0.0}, "dpo.beta is 0; it must be above 0"),
        ({"loss": "robust", "label_smoothing": 0.5}, "must be at least 0 and below 0.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "dpo.loss ipo does not read it"),
        ({"loss": "hinge"}, "one of dpo, conservative, robust, ipo, ipo_sum"),
    ],
)
def test_settings_that_make_no_sense_are_refused(keys, text):
    with pytest.raises(ValueError, match=text):
        dpo.build(config.DPO(**keys))


@pytest.mark.parametrize("name", LOSSES)
def test_learns(name):
    """Answers have two tokens. IPO and the conservative loss have their minimum at a margin that can be written down."""
    beta, tx = 0.5, optax.adam(0.1)
    update = update_of(dpo.build(config.DPO(beta=beta, **LOSSES[name])), tx)
    params = jax.tree.map(lambda x: 0.3 * x, bandit.MODEL.init(jax.random.key(0)))
    batch, frozen = bandit.pairs(), Frozen(reference=params)
    state = TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params))
    run = jax.jit(lambda state: jax.lax.scan(lambda state, _: update(state, batch, frozen), state, None, length=300))
    state, metrics = run(state)
    assert float(metrics["dpo/accuracy"][0]) == 0.0  # policy and reference are equal: a tie is no success
    assert float(metrics["dpo/accuracy"][-1]) == 1.0
    margin = float(metrics["dpo/margin"][-1])
    known = {"ipo_summed": 0.5, "ipo": 2 * 0.5, "cdpo_ls01": np.log(9.0)}
    if name in known:
        assert margin == pytest.approx(known[name], rel=1e-2)
    else:
        assert margin > 4.0
    assert float(bandit.right_probability(state.params)) > 2 * float(bandit.right_probability(params))
