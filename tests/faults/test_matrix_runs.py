"""Rows 10-21 and 41-44 of the fault matrix, through the real command on a tiny run."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import pytest

from rlhf_jax import checkpoint, health, integrity, offline, setups, signals
from tests.digests import read_digest
from tests.faults import stages


@pytest.fixture
def interrupted(sft, finished, tmp_path):
    """The run file of a run that was killed after step 4: checkpoints 2 and 4, rows up to step 5 and a torn one."""
    out = tmp_path / "sft"
    shutil.copytree(finished, out)
    for name in ("final", "summary.json", "report.html", "checkpoints/1", "checkpoints/3", "checkpoints/5", "checkpoints/6"):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    integrity.write_latest(out / "checkpoints", 4)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"completed_step": None}))
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 5]
    (out / "metrics.jsonl").write_text("".join(kept) + kept[-1][:20])
    return sft


def same_as_uninterrupted(out: Path, finished: Path) -> bool:
    ours, theirs = stages.outcome(out), stages.outcome(finished)
    assert ours["metrics"] == theirs["metrics"]
    return ours == theirs


def largest(path: Path) -> Path:
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 16
    path.write_bytes(data)


def test_an_interrupted_run_continues_and_ends_as_the_uninterrupted_one(command, interrupted, finished):
    status, text = command("sft", interrupted)
    assert status == 0
    assert "continuing from step 4" in text
    assert same_as_uninterrupted(interrupted.parent / "sft", finished)


ROWS_10_TO_13 = {
    "10 truncated": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "11 bit flipped": flip,
    "12 deleted": lambda path: path.unlink(),
    "13 zeroed": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
}


@pytest.mark.parametrize("harm", ROWS_10_TO_13.values(), ids=ROWS_10_TO_13)
def test_rows_10_to_13_a_damaged_checkpoint_is_named_and_the_one_before_is_used(command, interrupted, finished, harm):
    out = interrupted.parent / "sft"
    victim = largest(out / "checkpoints" / "4")
    harm(victim)
    status, text = command("sft", interrupted)
    assert status == 0
    assert victim.name in text
    assert "falling back to checkpoint 2" in text
    assert (out / "checkpoints" / "4.broken").is_dir()
    assert same_as_uninterrupted(out, finished)


def test_row_14_when_every_checkpoint_is_damaged_the_run_stops_and_offers_to_start_anew(command, interrupted, finished):
    out = interrupted.parent / "sft"
    for step in (2, 4):
        flip(largest(out / "checkpoints" / str(step)))
    before = sorted((out / "checkpoints").rglob("*"))
    status, text = command("sft", interrupted)
    assert status == 2
    assert "/checkpoints/4/" in text
    assert "/checkpoints/2/" in text
    assert "--from-scratch" in text
    assert sorted((out / "checkpoints").rglob("*")) == before
    status, text = command("sft", interrupted, "--from-scratch")
    assert status == 0
    assert (out / "earlier-1" / "checkpoints" / "4").is_dir()
    assert same_as_uninterrupted(out, finished)


def test_row_15_too_little_disk_is_told_before_compiling(command, interrupted, finished, monkeypatch):
    out = interrupted.parent / "sft"
    usage = shutil.disk_usage(out)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    status, text = command("sft", interrupted)
    assert status == 2
    assert "has 0.00 MB free and a checkpoint needs" in text
    monkeypatch.undo()
    assert command("sft", interrupted)[0] == 0
    assert same_as_uninterrupted(out, finished)


def test_row_15_a_disk_that_fills_up_during_a_save_keeps_the_older_checkpoint(command, interrupted, finished, monkeypatch):
    out = interrupted.parent / "sft"
    sync = integrity.sync_tree

    def full(path):
        if path.name == "6.partial":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        sync(path)

    monkeypatch.setattr(integrity, "sync_tree", full)
    status, text = command("sft", interrupted)
    assert status == 2
    assert "checkpoint 6 could not be written" in text
    assert "the disk is full" in text
    assert "Checkpoint 4 is intact" in text
    assert not (out / "checkpoints" / "6.partial").exists()
    monkeypatch.undo()
    assert command("sft", interrupted)[0] == 0
    assert same_as_uninterrupted(out, finished)


def test_row_15_a_save_that_failed_stops_the_run_at_the_next_step_not_at_the_next_save(command, sft, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    finish = offline.finish

    def patient(session, pending):
        if session.checkpoints._saving:  # the disk answers before this step is over
            session.checkpoints._saving[2].exception()
        finish(session, pending)

    monkeypatch.setattr(integrity, "sync_tree", full)
    monkeypatch.setattr(offline, "finish", patient)
    status, text = command("sft", sft, "save.every=2", "log.eval_every=0")
    assert status == 2
    assert "checkpoint 2 could not be written" in text
    assert stages.rows(sft.parent / "sft" / "metrics.jsonl")[-1]["step"] == 3


@pytest.mark.parametrize("place", ["/proc/nowhere/run", "/dev/null/run"])
def test_row_16_a_place_where_nobody_may_write_fails_before_compiling(command, sft, place, monkeypatch):
    monkeypatch.setattr(offline.setups, "set_up_offline", None)
    status, text = command("sft", sft, f"out={place}")
    assert status == 2
    assert f"out={place}: cannot write there" in text


def test_row_17_a_directory_of_another_run_is_refused(command, interrupted):
    status, text = command("sft", interrupted, "optimizer.learning_rate=2e-3", "seed=4")
    assert status == 2
    assert "optimizer.learning_rate: 0.001 there, 0.002 here" in text
    assert "seed: 3 there, 4 here" in text
    assert "--resume-override " in text
    accept = ["--resume-override", "optimizer.learning_rate"]
    assert command("sft", interrupted, "optimizer.learning_rate=2e-3", *accept)[0] == 0


def test_row_18_another_mesh_continues_and_says_that_bits_may_differ(command, interrupted):
    out = interrupted.parent / "sft"
    status, text = command("sft", interrupted, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    assert status == 0
    assert "not bit for bit" in text
    assert "continuing from step 4" in text
    assert stages.outcome(out)["step"] == 6


def test_row_19_an_edited_data_set_is_refused_with_both_hashes(command, sft, tmp_path):
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": f"the bed was warm and number {n} ."}) + "\n" for n in range(100)))
    keys = ["data.task=null", f"data.path={data}", "steps=2"]
    assert command("sft", sft, *keys)[0] == 0
    data.write_text(data.read_text() + json.dumps({"text": "one more ."}) + "\n")
    status, text = command("sft", sft, *keys)
    assert status == 2
    assert "contents of data: " in text
    assert " there, " in text


def test_row_20_resuming_at_the_end_of_an_epoch_and_of_the_run(command, sft, finished):
    """128 training rows, 16 a step: an epoch ends after exactly 8 steps."""
    out = sft.parent / "sft"
    keys = ["data.limit=160", "data.eval_fraction=0.2", "steps=10", "save.every=8", "save.keep_every=1"]
    assert command("sft", sft, *keys)[0] == 0
    whole = stages.outcome(out)
    rows = stages.rows(out / "metrics.jsonl")
    shutil.rmtree(out / "checkpoints" / "10")
    integrity.write_latest(out / "checkpoints", 8)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"completed_step": None}))
    status, text = command("sft", sft, *keys)
    assert status == 0
    assert "continuing from step 8" in text
    assert stages.outcome(out) == whole
    assert stages.rows(out / "metrics.jsonl") == rows
    status, text = command("sft", sft, *keys, "log.backends=[tensorboard]")
    assert status == 0
    assert "already complete at step 10" in text
    assert stages.outcome(out) == whole
    assert not (out / "tensorboard").exists()  # a service is not told of a run that makes no step


def test_row_20_a_run_killed_before_its_export_exports_when_it_is_resumed_at_the_end(command, interrupted, finished):
    out = interrupted.parent / "sft"
    assert command("sft", interrupted)[0] == 0
    shutil.rmtree(out / "final")
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"completed_step": None}))
    assert command("sft", interrupted)[0] == 0
    assert same_as_uninterrupted(out, finished)


def test_row_20_an_export_that_was_taken_away_is_made_again_while_there_is_a_checkpoint(command, sft, finished):
    out = sft.parent / "sft"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "final")
    status, text = command("sft", sft)
    assert status == 0
    assert f"{out / 'final'} is gone: it is written again" in text
    assert same_as_uninterrupted(out, finished)
    assert "already complete" in command("sft", sft)[1]
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints")
    before = (out / "metrics.jsonl").read_bytes(), (out / "run.json").read_bytes()
    status, text = command("sft", sft)
    assert status == 2
    assert "complete at step 6, but final/ is gone, and no checkpoint is left" in text
    assert ((out / "metrics.jsonl").read_bytes(), (out / "run.json").read_bytes()) == before


def test_row_21_a_second_process_in_the_same_directory_is_refused(command, interrupted):
    from rlhf_jax.rundir import _take_lock

    lock = _take_lock(interrupted.parent / "sft", lambda text: None)
    try:
        status, text = command("sft", interrupted)
    finally:
        os.close(lock)
    assert status == 2
    assert f"in use by process {os.getpid()} on {os.uname().nodename}" in text


def run_out(*_, **__):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.")


@pytest.mark.parametrize("place", ["a step", "the last step before a pause", "an evaluation", "the export", "loading"])
def test_row_43_out_of_memory_names_the_phase_and_three_keys(command, sft, monkeypatch, place):
    owner, name, phase, keys = {
        "a step": (offline.jax, "block_until_ready", "train", ["save.every=3"]),
        "the last step before a pause": (offline.jax, "block_until_ready", "train", ["save.every=1"]),
        "an evaluation": (offline, "_evaluate", "train", []),
        "the export": (offline.build, "export", "export", ["steps=1"]),
        "loading": (setups, "set_up_offline", "load", []),
    }[place]
    monkeypatch.setattr(owner, name, run_out)
    status, text = command("sft", sft, *keys)
    assert status == 2
    assert f"out of memory in phase {phase}: RESOURCE_EXHAUSTED" in text
    assert re.search(r"resident on each device \(0\.00 GB\):\n  model( and optimiser)?: 0\.00 GB", text)
    three = {
        "train": "micro_batches (raise it), model.remat (full), data.max_tokens",
        "export": "model.lora, model.param_dtype (bfloat16), mesh.fsdp",
        "load": "model.param_dtype (bfloat16), mesh.fsdp (more devices), model.lora",
    }
    assert f"Lower, in this order: {three[phase]}" in text


def test_row_44_a_hung_step_prints_stacks_and_ends_with_75(command, sft, monkeypatch):
    left = []
    monkeypatch.setitem(health.Watchdog.__init__.__kwdefaults__, "leave", left.append)
    finish, calls = offline.finish, []

    def slow(session, pending):
        calls.append(0)
        if len(calls) == 5:
            session.watchdog._limits = dataclasses.replace(session.settings.health, exit_s=1.0)
            time.sleep(1.5)
        finish(session, pending)

    monkeypatch.setattr(offline, "finish", slow)
    keys = ["health.stall_s=0.4", "health.stall_factor=1.5", "save.every=0", "log.eval_every=0"]
    _, text = command("sft", sft, *keys)
    assert left == [75]
    assert "has taken" in text
    assert "in slow" in text
    assert "giving up (health.exit_s)" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_rows_5_and_6_a_request_to_stop_saves_the_last_finished_update(command, sft, finished, monkeypatch, number):
    out = sft.parent / "sft"
    finish, calls = offline.finish, []

    def interrupt(*arguments):
        finish(*arguments)
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
            time.sleep(0.2)

    monkeypatch.setattr(offline, "finish", interrupt)
    status, text = command("sft", sft, "save.every=0")
    assert status == 143
    step = stages.outcome(out)["step"]
    assert step in (3, 4, 5)
    assert f"step {step} is saved. Go on with the same command:\n  rlhf-jax sft {sft} save.every=0" in text
    assert read_digest(out / "checkpoints" / str(step)) == read_digest(finished / "checkpoints" / str(step))
    monkeypatch.undo()
    assert command("sft", sft)[0] == 0
    assert same_as_uninterrupted(out, finished)


def test_asked_in_an_export_it_leaves_at_once_for_everything_is_saved(command, sft, monkeypatch):
    """It said that it was finishing a step, exported, and ended with status 0."""
    export, left = offline.build.export, []

    def interrupt(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        return export(*arguments, **options)

    monkeypatch.setattr(offline.build, "export", interrupt)
    monkeypatch.setattr(signals.Interrupts, "_leave", lambda self, why: left.append(why))
    command("sft", sft, "steps=1")
    assert left == ["SIGINT: nothing new to save"]


def test_asked_while_the_last_save_is_waited_for_it_leaves_before_the_export(command, sft, finished, monkeypatch):
    wait = checkpoint.Checkpoints.wait

    def interrupt(checkpoints):
        if checkpoints._saving and checkpoints._saving[0] == stages.STEPS:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        wait(checkpoints)

    monkeypatch.setattr(checkpoint.Checkpoints, "wait", interrupt)
    status, text = command("sft", sft)
    assert status == 143
    assert f"step {stages.STEPS} is saved" in text
    assert not (sft.parent / "sft" / "final").exists()
    monkeypatch.undo()
    assert command("sft", sft)[0] == 0
    assert same_as_uninterrupted(sft.parent / "sft", finished)


def test_row_7_a_request_to_stop_during_evaluation_is_obeyed_after_it(command, sft, finished, monkeypatch):
    out = sft.parent / "sft"
    evaluate = offline.evaluate

    def interrupt(setup, state, session, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(setup, state, session, step)

    monkeypatch.setattr(offline, "evaluate", interrupt)
    status, text = command("sft", sft)
    assert status == 143
    assert "step 3 is saved" in text
    monkeypatch.undo()
    assert command("sft", sft)[0] == 0
    assert same_as_uninterrupted(out, finished)
