"""Rows 5 and 37-42 of the fault matrix with PPO: asked to stop in a rollout, rewards that fail or teach nothing, explosions."""

import dataclasses
import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
import yaml

from rlhf_jax import online
from rlhf_jax.checkpoint import read
from tests.faults import stages

LAST = 6  # step
EVALUATION = 2  # calls: of the actor and of its moving average
REWARD = """
import numpy as np

calls = 0


def score(batch):
    global calls
    calls += 1
    if calls > {allowed}:
        {failure}
    return np.array([len(text) % 7 for text in batch.responses], np.float32)
"""


@pytest.fixture
def ppo(tmp_path):
    """A run file of PPO against `tmp_path / "reward.py"`."""
    config = stages.write_configs(tmp_path)["alone"]
    keys = yaml.safe_load(config.read_text())
    keys["reward"] = {"functions": [{"function": f"{tmp_path / 'reward.py'}:score"}]}
    keys["save"] = {"every": 0}
    config.write_text(yaml.safe_dump(keys))
    return config


def write_reward(config, failure="pass", allowed=EVALUATION + 2):
    (config.parent / "reward.py").write_text(REWARD.format(failure=failure, allowed=allowed))


def test_row_5_asked_in_the_middle_of_a_rollout_the_last_finished_update_is_saved(command, ppo, monkeypatch):
    out = ppo.parent / "ppo"
    write_reward(ppo)
    assert command("ppo", ppo, f"out={out}-whole")[0] == 0
    reward, calls = online.reward, []

    def interrupt(setup, rollout):
        calls.append(0)
        if len(calls) == EVALUATION + 3:  # steps 1 and 2 are done, and now the rollout of step 3
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        return reward(setup, rollout)

    monkeypatch.setattr(online, "reward", interrupt)
    status, text = command("ppo", ppo, f"out={out}")
    assert status == 143
    assert "step 3 is saved" in text
    monkeypatch.undo()
    assert command("ppo", ppo, f"out={out}")[0] == 0
    assert stages.outcome(out) == stages.outcome(out.parent / "ppo-whole")


def test_row_37_a_reward_that_fails_stops_the_run_with_everything_saved(command, ppo):
    out = ppo.parent / "ppo"
    write_reward(ppo)
    assert command("ppo", ppo, f"out={out}-whole")[0] == 0
    write_reward(ppo, "return np.full(len(batch.responses), np.nan)")
    status, text = command("ppo", ppo, f"out={out}")
    assert status == 2
    assert "reward score" in text
    assert "nan" in text.lower()
    assert "Step 2 is saved" in text
    assert (out / "checkpoints" / "LATEST").read_text() == "2\n"
    assert [row["step"] for row in stages.rows(out / "metrics.jsonl")] == [0, 1, 2]
    write_reward(ppo)
    assert command("ppo", ppo, f"out={out}")[0] == 0
    assert stages.outcome(out) == stages.outcome(out.parent / "ppo-whole")


def test_row_37_a_reward_that_fails_during_an_evaluation_keeps_the_training_and_the_evaluation_is_made_up_for(command, ppo):
    out = ppo.parent / "ppo"
    write_reward(ppo)
    assert command("ppo", ppo, f"out={out}-whole")[0] == 0
    write_reward(ppo, "raise ValueError('the judge is asleep')", allowed=EVALUATION + 3)  # then the evaluation at step 3
    status, text = command("ppo", ppo, f"out={out}")
    assert status == 2
    assert "the judge is asleep" in text
    assert "Step 3 is saved" in text
    write_reward(ppo, "raise ValueError('asleep again')", allowed=EVALUATION + LAST - 3)  # then the last evaluation
    status, text = command("ppo", ppo, f"out={out}")
    assert status == 2
    assert f"Step {LAST} is saved" in text
    write_reward(ppo)
    assert command("ppo", ppo, f"out={out}")[0] == 0
    assert stages.outcome(out) == stages.outcome(out.parent / "ppo-whole")
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == sorted(["3", str(LAST), "LATEST"])
    assert json.loads((out / "checkpoints" / str(LAST) / "checkpoint.json").read_text())["extra"] == {"step": LAST}


def test_rows_39_and_40_a_server_that_is_down_ends_the_run_within_bounds(command, ppo):
    keys = yaml.safe_load(ppo.read_text())
    ppo.write_text(yaml.safe_dump(keys | {"reward": {"url": "http://127.0.0.1:9/score", "timeout_s": 1.0}}))
    began = time.monotonic()
    status, text = command("ppo", ppo)
    assert status == 2
    assert "127.0.0.1:9" in text
    assert time.monotonic() - began < 120


@pytest.mark.parametrize(
    ("program", "phase"), [("rollout", "rollout"), ("reward", "score"), ("score", "score"), ("learn", "update")]
)
def test_row_43_each_program_that_runs_out_of_memory_is_named(command, ppo, monkeypatch, program, phase):
    """At its second call where an evaluation calls it before the first step, else at its first."""
    write_reward(ppo)
    made, calls = online.setups.set_up_online, []

    def run_out(*_):
        calls.append(0)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.")

    def set_up(plan):
        setup = made(plan)
        return dataclasses.replace(setup, do={**setup.do, program: run_out})

    monkeypatch.setattr(online.setups, "set_up_online", set_up)
    monkeypatch.setattr(online, "evaluate", lambda setup, state, session, step: state)
    status, text = command("ppo", ppo, "steps=1")
    assert (status, len(calls)) == (2, 1)
    assert f"out of memory in phase {phase}: RESOURCE_EXHAUSTED" in text
    assert "actor and optimiser: 0.00 GB" in text


def test_rows_38_and_42_equal_scores_and_answers_without_an_end_raise_alarms_and_stay_finite(command, ppo):
    out = ppo.parent / "alone"
    (ppo.parent / "reward.py").write_text("def score(batch):\n    return [1.0] * len(batch.responses)\n")
    status, text = command("ppo", ppo, "sampling.min_new_tokens=8", "steps=3", "ppo.whiten_rewards=unbiased")
    assert status == 0
    for name in ("score_spread", "eos", "length"):
        assert f"alarm {name}, for 3 steps" in text
    arrays = read(out / "checkpoints" / "3")
    assert all(np.isfinite(array.astype(np.float32)).all() for name, array in arrays.items() if name != "best")
    np.testing.assert_array_equal(arrays["alarms"][3:], [3, 3, 3])
    assert arrays["bad_steps"] == 0


def test_row_41_updates_that_explode_are_skipped_and_the_run_stops_after_three(command, ppo):
    out = ppo.parent / "alone"
    write_reward(ppo)
    status, text = command("ppo", ppo, "steps=2", "save.every=1")
    assert status == 0
    good = shutil.copytree(out / "checkpoints" / "2", ppo.parent / "good")
    keys = ["steps=40", "save.every=0", "actor_optimizer.learning_rate=1e30", "actor_optimizer.clip_norm=1e30"]
    accept = "steps,actor_optimizer.learning_rate,actor_optimizer.clip_norm"
    status, text = command("ppo", ppo, *keys, "--resume-override", accept)
    assert status == 2
    assert text.count("step 3: an update was skipped (1 since the start)") == text.count("update was skipped") == 1
    assert "3 updates in a row; none of them touched the parameters" in text
    dumps = list(out.glob("bad-step-*.npz"))
    assert len(dumps) == 1
    assert np.load(dumps[0], allow_pickle=False)["tokens"].ndim == 2
    before, after = read(good), read(out / "checkpoints" / "2")
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
