"""Rows 1-4 of the fault matrix: kill -9, give the same command again, end as if nothing had happened.

Two kill points each of PPO and of fine-tuning here; `scripts/faults.sh` has more than twenty for each of three stages, on 1 and
on 8 simulated devices.
"""

import pytest

from tests.faults import kills, stages

POINTS = {
    "ppo": [
        "rlhf_jax.online:reward:4:before",  # 1: a rollout is being sampled
        "rlhf_jax.online:finish:5:before",  # 2: an update is being computed; the second save has waited for the first
    ],
    "sft": [
        "rlhf_jax.checkpoint:Checkpoints.save:2:after",  # 3: a save is being written in the background
        "rlhf_jax.shelf:delete:2:before",  # 4: the oldest checkpoint is being removed (the first call removes what the kill left)
    ],
}


DEVICES = {"ppo": 1, "sft": 8}  # eight compile at every start


@pytest.mark.parametrize("stage", POINTS)
def test_rows_1_to_4_a_killed_run_ends_bit_for_bit_as_one_that_was_not(tmp_path, stage):
    devices = DEVICES[stage]
    config = stages.write_configs(tmp_path)["alone" if stage == "ppo" else stage]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    status, text = stages.run(stage, config, f"out={whole}", devices=devices)
    assert status == 0, text
    for point in POINTS[stage]:
        assert kills.kill_at(point, [stage, config, f"out={broken}"], devices, broken) == stages.KILLED
    status, text = stages.run(stage, config, f"out={broken}", devices=devices)
    assert status == 0, text
    assert "continuing from step" in text
    assert stages.outcome(broken) == stages.outcome(whole)
