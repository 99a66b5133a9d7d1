"""Row 9 of the fault matrix, and that two processes are one run: numbers, rewards, files, where both leave; packed."""

import signal
import time

import jax
import pytest

from rlhf_jax import integrity
from tests.faults import kills, stages

# Process 1 would score otherwise, and every call leaves a trace.
REWARD = """
import os
def score(batch):
    with open(os.environ["CALLS"], "a") as file:
        file.write(os.environ.get("JAX_PROCESS_ID", "0"))
    return [len(text) / 10 + 5 * int(os.environ.get("JAX_PROCESS_ID", "0")) for text in batch.responses]
"""


@pytest.mark.skipif(jax.device_count() < 8, reason="one simulated device: the mesh asks for eight")
def test_row_9_two_processes_are_one_run_and_asked_by_one_both_save_the_same_step(tmp_path, command, monkeypatch):
    config = stages.write_configs(tmp_path)["alone"]
    out, calls = tmp_path / "alone", tmp_path / "calls"
    (tmp_path / "reward.py").write_text(REWARD)
    monkeypatch.setenv("CALLS", str(calls))
    arguments = ["ppo", config, f"reward.functions=[{{function: '{tmp_path}/reward.py:score'}}]", "save.every=3"]
    arguments += ["actor_optimizer.schedule=constant", "critic_optimizer.schedule=constant", "ppo.epochs=1", "ppo.ptx_coef=0"]
    arguments += ["data.packing=true", "ppo.micro_batches=2", "batch_size=32", "mesh.fsdp=8"]
    both = stages.start_several([*arguments, "steps=100000", "log.profile_step=2"], processes=2, devices=4)
    deadline = time.monotonic() + 600
    while kills.lines(out / "metrics.jsonl") < 4:
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
    assert set(calls.read_text()) == {"0"}, "one process asks for the rewards"
    assert len(list(out.glob("profile/**/*.trace.json.gz"))) == 1, "one process writes the trace"

    # One process goes on from there, another does it all by itself: the same numbers in every row.
    more = f"steps={step + 1}"
    status, text = command(*arguments, more, "--resume-override", "steps")
    assert status == 0, text
    assert f"continuing from step {step}" in text
    status, text = command(*arguments, more, f"out={tmp_path}/one")
    assert status == 0, text
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows, wanted = stages.rows(out / name), stages.rows(tmp_path / "one" / name)
        assert len(rows) == len(wanted) > step
        for row, other in zip(rows, wanted, strict=True):
            assert row.keys() == other.keys()
            for key, value in row.items():
                if isinstance(value, float) and not key.startswith("rollout/logprob_gap"):  # that is a difference of roundings
                    assert value == pytest.approx(other[key], rel=2e-4, abs=2e-5), (row["step"], key)
                elif not isinstance(value, float):
                    assert value == other[key], (row["step"], key)


def test_processes_of_one_run_have_one_configuration_and_the_same_files(tmp_path):
    """Or they would train a mixture of two runs, each device by its own process's rule."""
    config, other = stages.write_configs(tmp_path)["reward"], tmp_path / "other.jsonl"
    other.write_text("".join((tmp_path / "pairs.jsonl").read_text().splitlines(keepends=True)[::-1]))
    scratch = "model={scratch: {width: 32, layers: 1, heads: 2, kv_heads: 1, mlp_width: 48, max_length: 64}}"
    last = ["optimizer.learning_rate=0.5", f"data.path={other}"]
    both = stages.start_several(["reward", config, scratch], processes=2, devices=1, last=last)
    for number, (status, text) in enumerate(stages.finish(process, 120) for process in both):
        assert status == 2, text
        assert ("process 1 of this run failed: " in text) == (number == 0)
        assert "(process 1) has another configuration or other inputs than process 0" in text
        for line in ("optimizer.learning_rate: 0.001 there, 0.5 here", "data.path: ", "contents of data: "):
            assert line in text
    assert not list((tmp_path / "reward").glob("*"))


def test_what_one_process_cannot_read_ends_all_with_its_message(tmp_path):
    config, other = stages.write_configs(tmp_path)["sft"], tmp_path / "other.jsonl"
    other.write_text('{"text": "a good hotel"}\n{"text":\n')
    last = ["data.task=null", f"data.path={other}"]
    both = stages.start_several(["sft", config], processes=2, devices=1, last=last)
    (status, text), (own_status, own) = (stages.finish(process, 120) for process in both)
    assert (status, own_status) == (2, 2), text + own
    assert f"process 1 of this run failed: {other}" in text
    assert str(other) in own
    assert "Traceback" not in text + own


def test_a_row_that_process_0_cannot_write_ends_all_with_its_message(tmp_path, command):
    arguments = ["sft", stages.write_configs(tmp_path)["sft"], "log.eval_every=0", "optimizer.schedule=constant"]
    status, text = command(*arguments, "steps=1")
    assert status == 0, text
    rows = tmp_path / "sft" / "metrics.jsonl"
    rows.unlink()
    rows.symlink_to("/dev/full")
    both = stages.start_several([*arguments, "--resume-override", "steps"], processes=2, devices=1)
    (status, text), (other_status, other) = (stages.finish(process, 120) for process in both)
    assert (status, other_status) == (2, 2), text + other
    assert f"{rows}: " in text
    assert "No space left on device" in text
    assert f"process 0 of this run failed: {rows}: " in other
    assert "Traceback" not in text + other


def test_a_model_that_process_0_cannot_write_ends_all_with_its_message(tmp_path):
    """The others stand in the gathers of its tensors, and would until the runtime aborts them with 134: "start again"."""
    arguments = ["sft", stages.write_configs(tmp_path)["sft"], "log.eval_every=0", "steps=1", "mesh.fsdp=2"]
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / ".final.partial").write_text("in the way")
    both = stages.start_several(arguments, processes=2, devices=1)
    (status, text), (other_status, other) = (stages.finish(process, 120) for process in both)
    assert (status, other_status) == (2, 2), text + other
    assert f"{tmp_path / 'sft/final'}: cannot be written there (File exists: " in text
    assert f"process 0 of this run failed: {tmp_path / 'sft/final'}: cannot be written there" in other
    assert "Traceback" not in text + other
