"""Fine-tuning: the known loss and gradient, invariance to splitting, and what padding may hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from rlhf_jax import config, ops
from rlhf_jax.algorithms import OFFLINE, sft, training
from rlhf_jax.types import Sequences, TrainState


def sequences(case):
    labels = case.inputs["labels"]
    target = np.concatenate([np.zeros((len(labels), 1), bool), labels[:, 1:] != -100], 1)
    tokens = np.where(labels == -100, case.inputs["input_ids"], labels)
    mask = np.asarray(case.inputs["attention_mask"], bool)
    return Sequences(tokens=jnp.asarray(tokens), mask=jnp.asarray(mask), target_mask=jnp.asarray(target))


def plain(params, frozen, batch):
    """A model whose parameters are its logits [B, T, V]: log-probability of token t from the logits of t - 1."""
    del frozen
    logprobs = ops.logits_logprobs(params[:, :-1], batch.tokens[:, 1:])
    return jnp.pad(logprobs, ((0, 0), (1, 0)))


@pytest.mark.parametrize("name", oracles.names("sft_loss"))
def test_loss_and_gradient_equal_the_definition(name):
    case = oracles.load("sft_loss")[name]
    batch = sequences(case)
    algorithm = OFFLINE["sft"](None)
    counts = algorithm.denominators(batch)
    loss = functools.partial(algorithm.loss, plain, frozen=None, batch=batch, counts=counts)
    (value, metrics), grad = jax.jit(jax.value_and_grad(lambda p: loss(params=p), has_aux=True))(
        jnp.asarray(case.inputs["logits"])
    )
    oracles.close(value, np.nan_to_num(case.ref["loss"]))
    oracles.close(grad, np.nan_to_num(case.ref["grad"]), rtol=1e-5)
    assert metrics["sft/loss_nats"] == value
    if "loss_num_items37" in case.ref:
        value, _ = algorithm.loss(plain, jnp.asarray(case.inputs["logits"]), None, batch, {"tokens": jnp.float32(37)})
        oracles.close(value, case.ref["loss_num_items37"])


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    length = rng.integers(2, 7, 8)
    position = np.arange(7)[None, :]
    mask = position < length[:, None]
    return Sequences(
        tokens=jnp.asarray(rng.integers(0, 11, (8, 7)), jnp.int32),
        mask=jnp.asarray(mask),
        target_mask=jnp.asarray(mask & (position > rng.integers(0, 3, 8)[:, None])),
    )


def bigram(params, frozen, batch):
    del frozen
    hidden = params["embedding"][batch.tokens[:, :-1]]
    logprobs, _ = ops.token_logprobs(hidden, lambda h: h @ params["kernel"], batch.tokens[:, 1:], mask=batch.mask[:, 1:], chunk=3)
    return jnp.pad(logprobs, ((0, 0), (1, 0)))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    return {
        "embedding": jnp.asarray(rng.normal(size=(11, 6)), jnp.float32),
        "kernel": jnp.asarray(rng.normal(size=(6, 11)), jnp.float32),
    }


def test_rule_9_every_micro_batch_split_gives_the_same_step(batch, params):
    algorithm = sft.build()
    tx = training.make_optimizer(config.Optimizer(learning_rate=0.1), 10)
    state = TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params))
    results = []
    for parts in (1, 2, 8):
        loss = functools.partial(algorithm.loss, bigram)
        results.append(jax.jit(training.make_offline_update(loss, algorithm.denominators, tx, parts))(state, batch, None))
    for other_state, other_metrics in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), other_state.params, results[0][0].params
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), other_metrics, results[0][1])


def test_accuracy_is_reported_where_the_model_gives_it(batch):
    def apply(params, frozen, batch):
        return jnp.zeros(batch.tokens.shape), batch.tokens % 2 == 0

    _, metrics = sft.loss(apply, None, None, batch, sft.denominators(batch))
    mask = np.asarray(batch.target_mask)
    np.testing.assert_allclose(metrics["sft/accuracy"], (np.asarray(batch.tokens) % 2 == 0)[mask].mean(), rtol=1e-6)


def test_nothing_to_train_is_zero_and_nan_in_padding_is_nothing(batch):
    nothing = batch.replace(target_mask=jnp.zeros_like(batch.target_mask))
    value, _ = sft.loss(lambda *_: jnp.ones((8, 7)), None, None, nothing, sft.denominators(nothing))
    assert value == 0

    def loss(logprobs):
        return sft.loss(lambda *_: logprobs, None, None, batch, sft.denominators(batch))[0]

    clean = jnp.ones((8, 7))
    poisoned = jnp.where(batch.target_mask, clean, jnp.nan)
    assert loss(poisoned) == loss(clean)
    np.testing.assert_array_equal(jax.grad(loss)(poisoned), jax.grad(loss)(clean))


def test_it_learns(batch, params):
    algorithm = sft.build()
    tx = training.make_optimizer(config.Optimizer(learning_rate=0.05, schedule="constant"), 60)
    state = TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params))
    step = training.make_offline_update(functools.partial(algorithm.loss, bigram), algorithm.denominators, tx, 2)
    state, metrics = jax.jit(lambda s: jax.lax.scan(lambda s, _: step(s, batch), s, None, length=60))(state)
    assert metrics["sft/loss_nats"][-1] < 0.5 * metrics["sft/loss_nats"][0]
    assert state.step == 60
