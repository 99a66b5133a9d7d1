"""What is told when a run is ill, and that nothing ill reaches the parameters."""

import io
import re
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import health
from rlhf_jax.algorithms import training
from rlhf_jax.config import OFFLINE, STAGES, Health, Optimizer
from rlhf_jax.errors import EXIT_STALLED, UserError
from rlhf_jax.health import ALARMS, advance_alarms, alarm_messages, dump_arrays, out_of_memory_message, require_finite_steps
from rlhf_jax.types import TrainState

WELL = {
    "kl/per_sequence_nats": 3.0,
    "policy/ratio_max": 1.5,
    "policy/ratio_mean": 1.0,
    "policy/entropy_nats": 1.2,
    "reward/score_std": 0.8,
    "response/eos_rate": 0.7,
    "response/length_tokens": 20.0,
}
ILL = {
    "kl": {"kl/per_sequence_nats": 101.0},
    "ratio": {"policy/ratio_max": 11.0},
    "entropy": {"policy/entropy_nats": 0.001},
    "score_spread": {"reward/score_std": 0.0},
    "eos": {"response/eos_rate": 0.0},
    "length": {"response/length_tokens": 24.0},
}


def advance(alarms, metrics):
    arrays = {name: jnp.float32(value) for name, value in metrics.items()}
    return jax.jit(lambda a, m: advance_alarms(a, m, Health(), max_new_tokens=24))(alarms, arrays)


def start():
    return jnp.zeros(len(ALARMS), jnp.int32)


def test_a_run_that_is_well_raises_no_alarm():
    np.testing.assert_array_equal(advance(start() + 5, WELL), np.zeros(6, np.int32))


@pytest.mark.parametrize("name", ILL)
def test_each_alarm_counts_its_own_condition_and_ends_with_it(name):
    place = list(ALARMS).index(name)
    alarms = start()
    for count in range(1, 4):
        alarms = advance(alarms, WELL | ILL[name])
        assert alarms.tolist() == [count if n == place else 0 for n in range(6)]
        assert len(alarm_messages(alarms, Health(), "ppo")) == (count == 3)
    assert alarm_messages(alarms, Health(), "ppo")[0].startswith(f"alarm {name}, for 3 steps: ")
    assert advance(alarms, WELL).tolist() == [0] * 6


def test_a_ratio_whose_mean_collapses_is_an_alarm_too():
    assert advance(start(), WELL | {"policy/ratio_mean": 0.05}).tolist() == [0, 1, 0, 0, 0, 0]


def test_metrics_that_are_absent_or_not_finite_change_nothing_or_raise_none():
    assert advance(start() + 2, {}).tolist() == [0] * 6
    assert advance(start() + 2, dict.fromkeys(WELL, np.nan)).tolist() == [2] * 6


def test_an_alarm_speaks_at_its_patience_and_then_ever_more_rarely():
    spoken = [n for n in range(1, 4000) if alarm_messages(np.full(6, n), Health(), "ppo")]
    assert spoken == [3, 30, 300, 3000]


@pytest.mark.parametrize("stage", STAGES)
def test_remedies_name_keys_that_the_stage_has(stage):
    phases = ("train",) if stage in OFFLINE else ("rollout", "score", "update")
    told = [out_of_memory_message(phase, MemoryError(), {}, stage) for phase in (*phases, "load", "export")]
    told += [] if stage in OFFLINE else alarm_messages(np.full(6, 3), Health(), stage)
    for key in re.findall(r"\w+(?:\.\w+)+|batch_size|(?<!\.)micro_batches|score_parts", " ".join(told)):
        found = STAGES[stage]()
        for name in key.split("."):
            found = getattr(found, name)
    assert stage in OFFLINE or any(f"{stage}.kl_coef" in text for text in told)


def test_skipped_updates_speak_ever_more_rarely():
    assert [n for n in range(1, 4000) if health.skip_message(n)] == [1, 10, 100, 1000]
    assert "(10 since the start)" in str(health.skip_message(10))


def test_counters_of_another_length_are_refused():
    with pytest.raises(ValueError, match="alarms have shape"):
        advance_alarms(jnp.zeros(5, jnp.int32), {}, Health(), max_new_tokens=1)


def test_the_run_ends_after_three_bad_updates_in_a_row_with_the_batch_dumped(tmp_path):
    batch = {"tokens": jnp.arange(6).reshape(2, 3), "weights": jnp.full(3, 1.5, jnp.bfloat16), "mask": np.array([True, False])}

    def dump():
        return dump_arrays(tmp_path / "run" / "bad.npz", batch)

    for count in (0, 1, 2):
        require_finite_steps(count, Health(), dump, step=7)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="3 updates in a row; none of them touched the parameters") as caught:
        require_finite_steps(3, Health(), dump, step=7)
    assert str(tmp_path / "run" / "bad.npz") in str(caught.value)
    with np.load(tmp_path / "run" / "bad.npz", allow_pickle=False) as found:
        arrays = {name: found[name].tolist() for name in found}
    assert arrays == {
        "tokens": [[0, 1, 2], [3, 4, 5]],
        "weights": [1.5, 1.5, 1.5],
        "mask": [True, False],
    }


def test_a_batch_for_which_there_is_no_room_hides_nothing(tmp_path):
    (tmp_path / "bad.npz").symlink_to("/dev/full")
    with pytest.raises(
        UserError, match="in a row; none of them .*\nThe last batch could not be written .No space left on device"
    ):
        require_finite_steps(3, Health(), lambda: dump_arrays(tmp_path / "bad.npz", {"x": np.ones(3)}), step=7)
    assert list(tmp_path.iterdir()) == []


def test_objects_are_never_dumped(tmp_path):
    with pytest.raises(ValueError, match="x holds Python objects"):
        dump_arrays(tmp_path / "a.npz", {"x": np.array([object()])})


def test_none_of_1000_updates_with_something_not_finite_touches_a_parameter():
    """Anywhere in the gradient or in the loss, NaN or either infinity, with every moment of AdamW already moving."""
    tx = training.make_optimizer(Optimizer(learning_rate=0.1), 10)
    params = {"a": jnp.arange(6.0).reshape(2, 3) + 0.5, "b": jnp.linspace(-1.0, 1.0, 4)}
    state = TrainState(step=jnp.int32(3), params=params, opt_state=tx.init(params))
    state, _ = training.apply_gradients(tx, state, jax.tree.map(jnp.ones_like, params), jnp.asarray(True))
    rng = np.random.default_rng(0)
    bad = rng.choice([np.nan, np.inf, -np.inf], 1000).astype(np.float32)
    places = rng.integers(0, 11, 1000)  # 0 to 9 an element of the gradient, 10 the loss

    @jax.jit
    def update(state, place, value):
        flat = jnp.full(11, 0.1).at[place].set(value)
        grads = {"a": flat[:6].reshape(2, 3), "b": flat[6:10]}
        return training.apply_gradients(tx, state, grads, jnp.isfinite(flat[10]))

    before = [leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(state))]
    applied = 0
    for place, value in zip(places, bad, strict=True):
        after, told = update(state, place, value)
        applied += [leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(after))] != before
        assert told["update/skipped"] == 1
    assert applied == 0
    after, told = update(state, 0, jnp.float32(0.1))
    assert told["update/skipped"] == 0
    assert [leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(after))] != before


def watch(limits, steps, told, left=None, monkeypatch=None):
    """Beats at the given pauses, in seconds."""
    stacks = io.StringIO()
    with health.Watchdog(limits, say=told.append, leave=(left if left is not None else []).append) as watchdog:
        for number, seconds in enumerate(steps):
            time.sleep(seconds)
            watchdog.beat(number)
    return stacks


def test_the_watchdog_prints_stacks_of_a_step_that_takes_far_too_long(capfd):
    told = []
    watch(Health(stall_s=0.2), [0.01] * 8 + [0.6], told)
    assert len(told) == 1
    assert "step 8 has taken" in told[0]
    err = capfd.readouterr().err
    assert "in watch" in err
    assert threading.main_thread().name or "Thread" in err


def test_the_watchdog_is_silent_while_steps_are_even_or_paused():
    told = []
    watch(Health(stall_s=0.2), [0.05] * 12, told)
    with health.Watchdog(Health(stall_s=0.1), say=told.append) as watchdog:
        for number in range(6):
            watchdog.beat(number)
            time.sleep(0.01)
        watchdog.pause()
        time.sleep(0.4)
        watchdog.beat(7)
    assert told == []


def test_the_watchdog_ends_a_run_that_hangs(capfd):
    left = []
    watch(Health(exit_s=0.2), [0.01, 0.6], [], left)
    assert left == [EXIT_STALLED]
    err = capfd.readouterr().err
    assert "giving up" in err
    assert "Older checkpoints are intact" in err


def test_exit_s_of_zero_never_ends_a_run():
    left = []
    watch(Health(exit_s=0.0, stall_s=0.1), [0.01, 0.4], [], left)
    assert left == []


def test_out_of_memory_names_phase_components_and_three_keys():
    state = {"w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}
    with (
        pytest.raises(UserError) as caught,
        health.phase("update", lambda: {"actor and optimiser": state, "reference": 5 * 10**9}, stage="grpo"),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("out of memory in phase update: RESOURCE_EXHAUSTED: Out of memory allocating 17179869184")
    assert lines[1:4] == ["resident on each device (5.00 GB):", "  reference: 5.00 GB", "  actor and optimiser: 0.00 GB"]
    assert lines[4].count(",") == 3
    assert "grpo.micro_batches (raise it), model.remat (full), model.logprob_chunk" in lines[4]


def test_bytes_per_device_follow_the_sharding():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    assert health.bytes_per_device({"x": jax.ShapeDtypeStruct((8, 8), jnp.bfloat16, sharding=sharding), "none": None}) == 16


def test_other_errors_pass_through_and_host_memory_counts():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID"), health.phase("score"):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no")
    for name in ("rollout", "score", "update", "train", "load"):
        with pytest.raises(UserError, match=f"out of memory in phase {name}"), health.phase(name):
            raise MemoryError
