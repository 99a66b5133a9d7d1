"""Who may write in a run's directory, and whether it is still the same run: decided before anything expensive."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import yaml

from rlhf_jax.errors import UserError
from rlhf_jax.rundir import environment, fingerprint, open_run
from tests import directories

CONFIG = {
    "out": "x",
    "seed": 0,
    "steps": 10,
    "mesh": {"data": 1, "fsdp": -1},
    "ppo": {"kl_coef": 0.05, "adaptive_kl": None},
    "data": {"columns": {}},
    "reward": {"functions": [{"function": "a", "weight": 1.0}]},
    "save": {"every": 5},
    "log": {"every": 1},
}
PRINTS = {"data": "file:aaaa", "tokenizer": "directory:bbbb", "reference": "directory:cccc"}


def text(**changes):
    return yaml.safe_dump(CONFIG | changes, sort_keys=False)


def refusal(call):
    with pytest.raises(UserError) as caught:
        call()
    assert len(str(caught.value).splitlines()) <= 15
    return str(caught.value)


def starts(path) -> int:
    """How often the run in this directory was started."""
    return len(json.loads((path / "run.json").read_text())["starts"])


def test_a_new_run_describes_itself(tmp_path):
    with open_run(tmp_path / "a" / "b", text(), PRINTS) as run:
        assert (starts(tmp_path / "a" / "b"), run.completed_step) == (1, None)
        assert run.checkpoints == run.path / "checkpoints"
        assert yaml.safe_load((run.path / "config.resolved.yaml").read_text()) == CONFIG
        assert json.loads((run.path / "env.json").read_text())["versions"]["jax"]
        owner = json.loads((run.path / "LOCK").read_text())
        assert owner["pid"] == os.getpid()
    assert (run.path / "LOCK").read_text() == ""


def test_the_same_command_again_continues(tmp_path):
    told = []
    open_run(tmp_path, text(), PRINTS).close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    reward = CONFIG["reward"] | {"timeout_s": 90.0}  # what a late one is told to raise
    changed = text(out="y", save={"every": 1}, log={"every": 3}, reward=reward)
    with open_run(tmp_path, changed, PRINTS, say=told.append):
        assert starts(tmp_path) == 2
    assert told == []
    moved = text(reward=reward | {"url": "http://h"})
    assert refusal(lambda: open_run(tmp_path, moved, PRINTS)).endswith("--resume-override reward.url")


def begun(path):
    """A run that has written a row."""
    open_run(path, text(), PRINTS).close()
    (path / "metrics.jsonl").write_text('{"step": 1}\n')


def test_a_start_that_came_to_nothing_binds_nobody(tmp_path):
    """A mistake that is found while models are loaded is mended and the same `out` used."""
    open_run(tmp_path, text(seed=3), PRINTS | {"reference": "name:typo"}).close()
    (tmp_path / "checkpoints").mkdir()
    with open_run(tmp_path, text(), PRINTS):
        assert json.loads((tmp_path / "run.json").read_text())["config"]["seed"] == 0
    (tmp_path / "checkpoints" / "4").mkdir()
    assert "seed: 0 there, 3 here" in refusal(lambda: open_run(tmp_path, text(seed=3), PRINTS))


def test_another_run_is_refused_with_the_keys_that_differ(tmp_path):
    begun(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    message = refusal(lambda: open_run(tmp_path, text(ppo={"kl_coef": 0.1}, seed=3), PRINTS))
    assert "ppo.kl_coef: 0.05 there, 0.1 here" in message
    assert "seed: 0 there, 3 here" in message
    assert "--resume-override ppo.kl_coef,seed" in message
    assert "--from-scratch" in message
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    many = {f"key{n}": n for n in range(40)}
    assert "… 32 more" in refusal(lambda: open_run(tmp_path, text(**many), PRINTS))


@pytest.mark.parametrize("name", PRINTS)
def test_an_input_that_was_edited_is_refused_with_both_hashes(tmp_path, name):
    begun(tmp_path)
    message = refusal(lambda: open_run(tmp_path, text(), PRINTS | {name: "file:dddd"}))
    assert f"contents of {name}: {PRINTS[name]} there, file:dddd here" in message
    assert f"--resume-override {name}" in message


def test_differences_that_are_accepted_are_remembered(tmp_path):
    begun(tmp_path)
    changed, prints = text(ppo={"kl_coef": 0.1, "adaptive_kl": None}), PRINTS | {"data": "file:dddd"}
    open_run(tmp_path, changed, prints, override=["ppo.kl_coef", "data"]).close()
    with open_run(tmp_path, changed, prints):
        assert starts(tmp_path) == 3
    assert json.loads((tmp_path / "run.json").read_text())["starts"][1]["override"] == ["data", "ppo.kl_coef"]


def test_another_mesh_or_number_of_devices_is_told_not_refused(tmp_path):
    told = []
    open_run(tmp_path, text(), PRINTS, devices=8).close()
    open_run(tmp_path, text(), PRINTS, devices=8, say=told.append).close()
    assert told == []
    open_run(tmp_path, text(mesh={"data": 2, "fsdp": -1}), PRINTS, devices=4, say=told.append).close()
    assert "8 devices, now 4" in told[0]
    assert "not bit for bit" in told[0]


def test_a_completed_run_says_so_until_more_steps_are_asked_for(tmp_path):
    with open_run(tmp_path, text(), PRINTS) as run:
        (tmp_path / "final").mkdir()
        run.complete(10)
        assert run.completed_step == 10
    with open_run(tmp_path, text(), PRINTS) as run:
        assert run.completed_step == 10
    assert "steps: 10 there, 20 here" in refusal(lambda: open_run(tmp_path, text(steps=20), PRINTS))
    with open_run(tmp_path, text(steps=20), PRINTS, override=["steps"]) as run:
        assert run.completed_step is None


def test_from_scratch_sets_the_earlier_run_aside_and_deletes_nothing(tmp_path):
    for number in (1, 2):
        with open_run(tmp_path, text(seed=number), PRINTS, from_scratch=True, say=lambda line: None):
            assert starts(tmp_path) == 1
            (tmp_path / "metrics.jsonl").write_text(f"{number}")
            (tmp_path / "checkpoints").mkdir()
            (tmp_path / "final-critic").mkdir()
            (tmp_path / "tensorboard").mkdir()
            (tmp_path / ".tracker_id").write_text("who")
    open_run(tmp_path, text(seed=3), PRINTS, from_scratch=True, say=lambda line: None).close()
    assert [(tmp_path / f"earlier-{n}" / "metrics.jsonl").read_text() for n in (1, 2)] == ["1", "2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("LOCK", "config.resolved.yaml", "earlier-1", "earlier-2", "env.json", "run.json")
    ]


def test_files_that_look_like_a_run_but_are_none_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert "holds metrics.jsonl but no run.json" in refusal(lambda: open_run(tmp_path, text(), PRINTS))
    (tmp_path / "metrics.jsonl").rename(tmp_path / "notes.txt")
    open_run(tmp_path, text(), PRINTS).close()
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"format": 7}'])
def test_a_damaged_record_is_refused(tmp_path, damage):
    (tmp_path / "run.json").write_text(damage)
    assert str(tmp_path / "run.json") in refusal(lambda: open_run(tmp_path, text(), PRINTS))


@pytest.mark.parametrize("place", ["/proc/nowhere/run", "/dev/null/run"])
def test_a_place_where_nobody_may_write_is_refused(place):
    assert f"out={place}: cannot write there" in refusal(lambda: open_run(place, text(), PRINTS))


@pytest.mark.parametrize("call", ["pwrite", "fsync"])  # of LOCK, of run.json: neither names a file in its error
def test_a_full_disk_is_named_with_its_remedy(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    told = refusal(lambda: open_run(tmp_path, text(), PRINTS))
    remedy = "Free disk space, then give the same command again."
    assert told == f"out={tmp_path}: cannot write there (No space left on device: {tmp_path}). {remedy}"


def test_a_disk_that_is_full_at_the_end_is_named_too(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with open_run(tmp_path, text(), PRINTS) as run:
        (tmp_path / "metrics.jsonl").write_text("{}\n")
        monkeypatch.setattr(os, "fsync", full)
        for call in (run.sync, lambda: run.complete(10)):
            assert "cannot write there (No space left on device: " in refusal(call)


def test_a_read_only_directory_is_refused(tmp_path):
    """For real: root, who may write anywhere, is nobody for a moment."""
    place = Path(tempfile.mkdtemp())
    try:
        (place / "old").mkdir()
        place.chmod(0o555)
        (place / "old").chmod(0o555)
        for out in (place / "new", place / "old"):
            before, root = sorted(place.rglob("*")), os.geteuid() == 0
            try:
                os.seteuid(65534 if root else os.geteuid())
                message = refusal(lambda out=out: open_run(out, text(), PRINTS))
            finally:
                os.seteuid(0 if root else os.geteuid())
            assert f"out={out}: cannot write there (Permission denied: " in message
            assert sorted(place.rglob("*")) == before
    finally:
        place.chmod(0o755)
        shutil.rmtree(place)


def hold(folder: Path) -> subprocess.Popen:
    """A process that has the run open, until it is killed."""
    code = f"""
    import time
    from rlhf_jax.rundir import open_run
    run = open_run({str(folder)!r}, {text()!r}, {PRINTS!r})
    print("open", flush=True)
    time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "open\n"
    return process


def test_a_second_process_is_refused_and_a_dead_one_is_replaced(tmp_path):
    first = hold(tmp_path)
    try:
        message = refusal(lambda: open_run(tmp_path, text(), PRINTS))
        assert f"in use by process {first.pid} on {os.uname().nodename}" in message
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    told = []
    with open_run(tmp_path, text(), PRINTS, say=told.append):
        assert starts(tmp_path) == 2
    assert f"process {first.pid}" in told[0]
    assert "left" in told[0]


def test_fingerprints_follow_contents_not_places(tmp_path):
    assert fingerprint(None) == "none"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"x" * 100)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    (tmp_path / "b" / "README.md").write_text("not part of a model")
    assert fingerprint(tmp_path / "a") == fingerprint(str(tmp_path / "b"))
    assert fingerprint(tmp_path / "a.jsonl") == fingerprint(tmp_path / "b.jsonl")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"x" * 99 + b"y")
    (tmp_path / "b.jsonl").write_text("{} \n")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
    assert fingerprint(tmp_path / "a.jsonl") != fingerprint(tmp_path / "b.jsonl")


def test_the_fingerprint_of_a_hub_name_follows_the_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", tmp_path)
    snapshot = directories.on_hub(tmp_path, directories.language_model())
    assert fingerprint("org/tiny") == "name:org/tiny@abc"
    snapshot.rename(snapshot.with_name("def"))
    (snapshot.parents[1] / "refs" / "main").write_text("def")
    assert fingerprint("org/tiny") == "name:org/tiny@def"


def test_a_start_that_is_refused_while_it_loads_leaves_the_record_as_it_was(tmp_path):
    with open_run(tmp_path, text(), PRINTS):
        (tmp_path / "metrics.jsonl").write_text("{}\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with open_run(tmp_path, text(seed=3), PRINTS, override=["seed"]) as run:
        assert "seed: 3" in (tmp_path / "config.resolved.yaml").read_text()
        with pytest.raises(UserError, match="does not fit"), run.unless_refused():
            raise UserError("checkpoint 10 does not fit this run")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_secrets_stay_out_of_what_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_API_TOKEN", "s3cret")
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    words = ["api_key=s3cret", "reward.url=https://me:s3cret@host/score", "reward.url=https://host/score?n=3&api_key=s3cret"]
    monkeypatch.setattr(sys, "argv", ["rlhf-jax", "ppo", *reversed(words)])
    for url in ("https://me:s3cret@host/score", "https://host/score?access_token=s3cret&n=3"):
        with open_run(tmp_path, text(reward={"url": url}), PRINTS, override=["reward.url"]):
            pass
    assert "?access_token=***&n=3" in (tmp_path / "config.resolved.yaml").read_text()
    for path in tmp_path.iterdir():
        assert "s3cret" not in path.read_text()
    assert environment()["command"][-2:] == ["reward.url=https://***@host/score", "api_key=***"]
    assert environment()["command"][-3] == "reward.url=https://host/score?n=3&api_key=***"


def test_sync_reaches_the_files_of_lines(tmp_path, monkeypatch):
    synced = []
    with open_run(tmp_path, text(), PRINTS) as run:
        (tmp_path / "metrics.jsonl").write_text("{}\n")
        monkeypatch.setattr("rlhf_jax.integrity.sync_path", lambda path: synced.append(path.name))
        run.sync()
    assert synced == ["metrics.jsonl"]


def test_what_was_exported_is_on_the_disk_before_the_record_says_so(tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    with open_run(tmp_path, text(), PRINTS) as run:
        for name in ("final", "final-critic"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "tokenizer.json").write_text("{}")

        def note(descriptor):
            synced.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(f"{tmp_path}/"))
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", note)
        run.complete(10)
    parts = {"final", "final/tokenizer.json", "final-critic", "final-critic/tokenizer.json"}
    assert set(synced[:4]) == parts
    assert synced[4:] == [str(tmp_path), "run.json.partial", str(tmp_path)]


def test_an_override_names_a_key(tmp_path):
    message = refusal(lambda: open_run(tmp_path, text(), PRINTS, override=["ppo.kl_cof"]))
    assert message.startswith("--resume-override ppo.kl_cof: no such key (did you mean ppo.kl_coef?); give keys as")


def test_an_edited_reward_file_is_told_not_refused(tmp_path):
    """A run that a faulty one stopped is told to mend it and to give the same command again."""
    told = []
    open_run(tmp_path, text(), PRINTS | {"reward.functions": "file:one"}).close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    for prints in ("file:one", "file:two", "file:two"):
        open_run(tmp_path, text(), PRINTS | {"reward.functions": prints}, say=told.append).close()
    assert len(told) == 1
    assert "reward.functions: the file was edited since the run began (file:one, now file:two)" in told[0]
