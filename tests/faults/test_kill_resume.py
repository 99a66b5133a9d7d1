"""Rows 1-4 of the fault matrix: kill -9, give the same command again, end as if nothing had happened.

Two kill points of PPO here; `scripts/faults.sh` has more than twenty for each of three stages, on 1 and on 8 devices.
"""

from tests.faults import kills, stages


def test_rows_1_to_4_a_killed_run_ends_bit_for_bit_as_one_that_was_not(tmp_path):
    config = stages.write_configs(tmp_path)["alone"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    status, text = stages.run("ppo", config, f"out={whole}", devices=8)
    assert status == 0, text
    points = [
        "rlhf_jax.checkpoint:Checkpoints.save:1:after",  # the first save is being written in the background
        "rlhf_jax.online:finish:5:before",  # an update is being computed; the second save has waited for the first
    ]
    for point in points:
        assert kills.kill_at(point, ["ppo", config, f"out={broken}"], 8, broken) == stages.KILLED
    status, text = stages.run("ppo", config, f"out={broken}", devices=8)
    assert status == 0, text
    assert "continuing from step" in text
    assert stages.outcome(broken) == stages.outcome(whole)
