"""Row 9 of the fault matrix, and what several processes of one run write together."""

import signal
import time

from rlhf_jax import integrity
from tests.faults import kills, stages


def test_row_9_one_of_two_processes_is_asked_and_both_save_the_same_step(tmp_path):
    config = stages.write_configs(tmp_path)["sft"]
    out = tmp_path / "sft"
    arguments = ["sft", config, "steps=100000", "save.every=20", "log.eval_every=0"]
    both = stages.start_several(arguments, processes=2, devices=2)
    deadline = time.monotonic() + 240
    while kills.lines(out / "metrics.jsonl") < 30:
        assert all(process.poll() is None for process in both), [process.communicate()[0] for process in both]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)
    ends = [stages.finish(process, 120) for process in both]
    assert [status for status, _ in ends] == [143, 143], ends
    step = int((out / "checkpoints" / "LATEST").read_text())
    for _, text in ends:
        assert f"step {step} is saved" in text
    assert stages.rows(out / "metrics.jsonl")[-1]["step"] == step
    assert len(list((out / "checkpoints" / str(step)).glob("**/ocdbt.process_*"))) == 2
    assert integrity.problems(out / "checkpoints" / str(step), step=step) == []
    arguments[2] = f"steps={step + 2}"
    status, text = stages.run(*arguments, "--resume-override", "steps", devices=4)
    assert status == 0, text
    assert f"continuing from step {step}" in text
