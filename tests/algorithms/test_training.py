"""Optimiser, schedules, micro-batches and the guarded step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

from rlhf_jax import config, parallel
from rlhf_jax.algorithms import training
from rlhf_jax.types import TrainState

PARAMS = {"layer": {"kernel": jnp.asarray([[1.0, -2.0]]), "bias": jnp.asarray([0.5])}, "embedding": jnp.asarray([[3.0]])}


def state_of(tx, params=PARAMS):
    return TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_schedules_warm_up_and_decay():
    def values(**settings):
        rate = training.learning_rate(config.Optimizer(learning_rate=1.0, **settings), 10)
        return np.asarray([rate(step) for step in range(11)])

    np.testing.assert_allclose(values(schedule="constant"), 1.0)
    np.testing.assert_allclose(values(), 1 - np.arange(11) / 10, atol=1e-6)
    np.testing.assert_allclose(values(final_fraction=0.5)[-1], 0.5)
    warm = values(warmup_steps=4)
    np.testing.assert_allclose(warm[:5], [0.25, 0.5, 0.75, 1, 1], atol=1e-6)  # the first step already learns
    np.testing.assert_allclose(warm[4:], 1 - np.arange(7) / 6, atol=1e-6)
    np.testing.assert_allclose(values(schedule="cosine"), (1 + np.cos(np.pi * np.arange(11) / 10)) / 2, atol=1e-6)
    with pytest.raises(ValueError, match="'step'"):
        training.learning_rate(config.Optimizer(schedule="step"), 10)


def test_the_optimiser_is_adamw_as_published_and_decays_matrices_only():
    settings = config.Optimizer(learning_rate=0.1, schedule="linear", weight_decay=0.3, clip_norm=1.0, warmup_steps=2)
    tx = training.make_optimizer(settings, 8)
    rate = training.learning_rate(settings, 8)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p))
    params, opt_state = PARAMS, tx.init(PARAMS)
    want = [np.asarray(x, np.float64) for x in jax.tree.leaves(PARAMS)]  # embedding, bias, kernel
    first, second = [np.zeros_like(x) for x in want], [np.zeros_like(x) for x in want]
    for step in range(8):
        factor = step - 3.0  # gradients above and below the clipping norm
        updates, opt_state = update(jax.tree.map(lambda x, f=factor: f * jnp.cos(x), params), opt_state, params)
        params = optax.apply_updates(params, updates)
        grads = [factor * np.cos(x) for x in want]
        norm = np.sqrt(sum((g**2).sum() for g in grads))
        grads = [g / max(1.0, norm) for g in grads]
        lr = float(rate(step))
        for i, (g, decay) in enumerate(zip(grads, (0.3, 0.0, 0.3), strict=True)):
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.95 * second[i] + 0.05 * g**2
            unbiased = first[i] / (1 - 0.9 ** (step + 1)), second[i] / (1 - 0.95 ** (step + 1))
            want[i] = want[i] - lr * (unbiased[0] / (np.sqrt(unbiased[1]) + 1e-5) + decay * want[i])
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6), jax.tree.leaves(params), want
    )


def test_the_matrices_of_an_adapter_are_decayed_too():
    tx = training.make_optimizer(config.Optimizer(learning_rate=0.1, schedule="constant", weight_decay=0.5), 8)
    params = {
        "q": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 4))},
        "score": {"kernel": jnp.ones((4, 1)), "bias": jnp.ones(1)},
    }
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    found = jax.tree.map(lambda x: round(float(x.mean()), 6), optax.apply_updates(params, updates))
    assert found == {"q": {"lora_a": 0.95, "lora_b": 0.95}, "score": {"kernel": 0.95, "bias": 1.0}}


def loss(params, batch):
    """A sum over rows (already a share), with a scalar metric, a maximum and one value per row."""
    x = batch["x"] * params["w"]
    return jnp.sum(jnp.sin(x)), {"a/sum": jnp.sum(x), "a/x_max": jnp.max(x), "a/rows": x}


@pytest.mark.parametrize("parts", [1, 2, 3, 6, 12])
def test_rule_9_micro_batches_add_up_to_the_batch(parts):
    batch = {"x": jnp.asarray(np.random.default_rng(0).normal(size=12), jnp.float32)}
    params = {"w": jnp.float32(0.7)}
    (want, want_metrics), want_grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
    value, metrics, grads = jax.jit(lambda p, b: training.accumulate(loss, p, b, parts))(params, batch)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(grads["w"], want_grads["w"], rtol=1e-5)
    assert metrics.keys() == want_metrics.keys()
    for key, x in want_metrics.items():  # rows in the batch's own order
        np.testing.assert_allclose(metrics[key], x, rtol=1e-5, atol=1e-6, err_msg=key)


def test_parts_are_interleaved_so_that_a_sharded_batch_stays_sharded():
    got = training.split_rows({"x": jnp.arange(6)}, 3)["x"]
    np.testing.assert_array_equal(got, [[0, 3], [1, 4], [2, 5]])
    with pytest.raises(ValueError, match="6 rows cannot be split into 4"):
        training.split_rows({"x": jnp.arange(6)}, 4)
    mesh = parallel.make_mesh(config.Mesh(data=2), jax.devices()[:2])
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.device_put(jnp.arange(8.0), placed)
    value, metrics, _ = jax.jit(lambda x: training.accumulate(loss, {"w": jnp.float32(1.0)}, {"x": x}, 2))(x)
    np.testing.assert_allclose(value, np.sin(np.arange(8.0)).sum(), rtol=1e-5)
    np.testing.assert_array_equal(metrics["a/rows"], np.arange(8.0))


def test_gradients_of_half_precision_parameters_are_summed_in_float32():
    params = {"w": jnp.ones((), jnp.bfloat16)}

    def linear(params, batch):
        return jnp.sum(params["w"] * batch["x"]), {}

    batch = {"x": jnp.ones(512, jnp.bfloat16)}
    _, _, grads = jax.jit(lambda p: training.accumulate(linear, p, batch, 512))(params)
    assert grads["w"].dtype == jnp.bfloat16
    assert grads["w"] == 512  # bfloat16 additions stop at 256


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf, 1e30])
def test_a_step_that_is_not_finite_changes_nothing_at_all(poison):
    tx = training.make_optimizer(config.Optimizer(learning_rate=0.1, weight_decay=0.1), 10)
    state = state_of(tx)
    good = jax.tree.map(jnp.ones_like, PARAMS)
    apply = jax.jit(lambda s, g, finite: training.apply_gradients(tx, s, g, finite))
    state, metrics = apply(state, good, True)
    assert metrics["update/skipped"] == 0
    assert state.step == 1
    bad = good | {"embedding": jnp.full_like(good["embedding"], poison)}
    after, metrics = apply(state, bad, True)
    same(after, state)
    assert metrics["update/skipped"] == 1
    after, metrics = apply(state, good, False)  # the loss was not finite
    same(after, state)
    assert metrics["update/skipped"] == 1


def test_a_step_that_is_not_wanted_is_not_counted_as_skipped():
    tx = training.make_optimizer(config.Optimizer(), 10)
    state = state_of(tx)
    after, metrics = training.apply_gradients(tx, state, jax.tree.map(jnp.ones_like, PARAMS), jnp.bool_(True), wanted=False)
    same(after, state)
    assert metrics["update/skipped"] == 0


def test_offline_update_skips_a_poisoned_batch_and_goes_on():
    tx = training.make_optimizer(config.Optimizer(learning_rate=0.1, schedule="constant"), 10)

    def mean(params, frozen, batch, counts):
        x = jnp.sum((params["w"] - batch["x"]) ** 2) / counts["rows"]
        return x, {"a/loss": x}

    step = jax.jit(training.make_offline_update(mean, lambda b: {"rows": jnp.float32(b["x"].shape[0])}, tx, 2))
    state = state_of(tx, {"w": jnp.float32(0.0)})
    batch = {"x": jnp.ones(4)}
    first, metrics = step(state, batch, None)
    assert first.params["w"] > 0
    np.testing.assert_allclose(metrics["a/loss"], 1.0)
    skipped, metrics = step(first, {"x": batch["x"].at[2].set(jnp.nan)}, None)
    same(skipped, first)
    assert metrics["update/skipped"] == 1
    assert step(skipped, batch, None)[0].params["w"] > first.params["w"]


def test_bfloat16_parameters_have_float32_moments_and_move_by_updates_that_rounding_would_lose():
    tx = training.make_optimizer(config.Optimizer(learning_rate=1e-6, schedule="constant", clip_norm=0.0), 10)
    params = {"kernel": jnp.full((64, 64), 0.02, jnp.bfloat16), "bias": jnp.full((64,), 0.02, jnp.float32)}
    state = state_of(tx, params)
    moments = optax.tree_utils.tree_get(state.opt_state, "mu"), optax.tree_utils.tree_get(state.opt_state, "nu")
    assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {jnp.dtype("float32")}
    step = jax.jit(lambda s: training.apply_gradients(tx, s, jax.tree.map(jnp.ones_like, s.params), True)[0])
    for _ in range(20):
        state = step(state)
    assert state.params["kernel"].dtype == jnp.bfloat16
    began = float(params["kernel"][0, 0])  # 0.02 as bfloat16 has it
    moved = float(jnp.mean(state.params["kernel"].astype(jnp.float32))) - began
    assert moved == pytest.approx(-20e-6, rel=0.2)  # 4096 draws: 4 % standard error
    np.testing.assert_allclose(state.params["bias"] - params["bias"], -20e-6, rtol=0.02)
    nearest = optax.apply_updates(params, {"kernel": jnp.full((64, 64), -1e-6), "bias": jnp.zeros(64)})
    np.testing.assert_array_equal(nearest["kernel"], params["kernel"])


def test_the_norm_of_bfloat16_gradients_is_a_float32_sum():
    params = {str(n): jnp.full((100, 100), 0.01, jnp.bfloat16) for n in range(64)}
    tx = training.make_optimizer(config.Optimizer(), 4)
    norm = training.apply_gradients(tx, state_of(tx, params), params, jnp.bool_(True))[1]["update/grad_norm"]
    assert norm.dtype == jnp.float32
    np.testing.assert_allclose(norm, 800 * float(jnp.bfloat16(0.01)), rtol=1e-6)


def test_a_bfloat16_parameter_is_rounded_to_a_neighbour_and_exact_sums_stay_exact():
    params = {"kernel": jnp.asarray([1.0, -1.0, 0.0, 3.0], jnp.bfloat16)}
    add = jax.jit(training.add_updates)
    exact = add(params, {"kernel": jnp.asarray([0.5, -0.5, 0.25, 0.0])}, jnp.int32(3))
    np.testing.assert_array_equal(exact["kernel"].astype(jnp.float32), [1.5, -1.5, 0.25, 3.0])
    many = {"kernel": jnp.ones(4096, jnp.bfloat16)}
    got = add(many, {"kernel": jnp.full(4096, 2.0**-9)}, jnp.int32(0))["kernel"].astype(jnp.float32)
    assert set(np.unique(got)) == {1.0, 1.0 + 2.0**-7}
    assert float(got.mean()) == pytest.approx(1.0 + 2.0**-9, abs=3e-4)


def test_moments_that_wait_in_the_hosts_memory_give_the_same_steps_and_go_back():
    """Bit for bit, in a loop as an update has it; fetched in each step, and nowhere else."""
    tx = training.make_optimizer(config.Optimizer(learning_rate=0.1), 10)
    params = {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.ones(4)}

    def steps(state: TrainState) -> TrainState:
        def one(state: TrainState, scale: jax.Array) -> tuple[TrainState, None]:
            grads = jax.tree.map(lambda p: scale * jnp.sin(p), state.params)
            return training.apply_gradients(tx, state, grads, jnp.asarray(True))[0], None

        return jax.lax.scan(one, state, jnp.asarray([1.0, -0.5, 2.0]))[0]

    state = state_of(tx, params)
    where = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    away = state.replace(opt_state=jax.tree.map(lambda x: jax.device_put(x, where) if x.ndim else x, state.opt_state))
    shardings = jax.tree.map(lambda x: x.sharding, away)
    unfused = {"xla_disable_hlo_passes": "fusion"}  # XLA fuses the two programs differently, a rounding apart on jax 0.12
    compiled = jax.jit(steps, out_shardings=shardings, compiler_options=unfused)
    wanted, found = jax.jit(steps, compiler_options=unfused)(state), compiled(away)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(found.opt_state) if x.ndim}
    assert kinds == {"pinned_host"}
    same(jax.device_get(found), jax.device_get(wanted))
    traced = jax.make_jaxpr(jax.jit(steps, out_shardings=shardings))(away).jaxpr.eqns[0].params["jaxpr"]
    (loop,) = [eqn for eqn in traced.eqns if eqn.primitive.name == "scan"]
    inside = [eqn.primitive.name for eqn in loop.params["jaxpr"].eqns]
    assert "optimization_barrier" in inside
    assert inside.count("device_put") == 2 * len([x for x in jax.tree.leaves(away.opt_state) if x.ndim])
