"""Rows 5-8 of the fault matrix in a process of its own: asked to stop while it compiles, while it trains, and asked twice; and
what a connection that is lost does to a run: its output is read by nobody, its terminal hangs up."""

import signal
import time

import pytest

from tests.faults import kills, stages


@pytest.fixture
def config(tmp_path):
    return stages.write_configs(tmp_path)["sft"]


def test_row_8_asked_while_it_compiles_it_leaves_at_once(config):
    process = stages.start(["sft", config])
    out = config.parent / "sft"
    while not (out / "run.json").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    status, text = stages.finish(process)
    assert status == 143
    assert time.monotonic() - began < 5
    assert "nothing new to save. Go on with the same command:" in text


def test_rows_6_and_8_asked_it_saves_and_asked_twice_it_leaves_with_older_checkpoints_intact(config):
    out = config.parent / "sft"
    arguments = ["sft", config, "steps=100000", "save.every=50", "log.eval_every=0", "save.keep_last=3"]
    for signals in ([signal.SIGTERM], [signal.SIGTERM, signal.SIGTERM]):
        before = kills.lines(out / "metrics.jsonl")
        process = stages.start(arguments)
        while kills.lines(out / "metrics.jsonl") < before + 60:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        for number in signals:
            process.send_signal(number)
        status, text = stages.finish(process)
        assert status == 143
        assert "rlhf-jax sft" in text or "child.py sft" in text
        step = int((out / "checkpoints" / "LATEST").read_text())
        assert f"step {step} is saved" in text or "leaving at once" in text
        if len(signals) == 1:
            assert stages.rows(out / "metrics.jsonl")[-1]["step"] == step


def test_a_run_whose_output_nobody_reads_any_more_goes_on_to_its_end(config):
    out = config.parent / "sft"
    process = stages.start(["sft", config])
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(100) == 0
    assert len({row["step"] for row in stages.rows(out / "metrics.jsonl")}) == 1 + stages.STEPS
    assert (out / "final" / "config.json").is_file()


def test_a_terminal_that_hangs_up_twice_has_the_step_saved(config):
    """Twice: bash tells its jobs, and the kernel does when bash has ended."""
    out = config.parent / "sft"
    process = stages.start(["sft", config, "steps=100000", "save.every=0", "log.eval_every=0"])
    while kills.lines(out / "metrics.jsonl") < 20:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.stdout.close()
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.001)
    assert process.wait(100) == 143
    assert int((out / "checkpoints" / "LATEST").read_text()) == stages.rows(out / "metrics.jsonl")[-1]["step"]
