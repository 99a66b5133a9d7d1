"""Starting a run on a TPU slice: the commands as printed, and what follows a preemption, with a gcloud that only takes notes."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from rlhf_jax import config, config_file

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "tpu_vm.sh"
WHERE = ["--name", "pod", "--zone", "us-west4-a"]
RUN = ["--", "ppo", "configs/ppo_llama3_8b_v5e64.yaml", "out=/mnt/share/run", "data.path=my prompts.jsonl"]

# Writes down what it was asked; states, and statuses of the run, come from files with a line for every call.
GCLOUD = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$FAKE/calls"
next() { head -1 "$FAKE/$1"; sed -i 1d "$FAKE/$1"; }
case "$*" in
  *describe*) next states ;;
  *worker.status*) cat "$FAKE/status" ;;
  *tpu_worker.sh*) next runs >"$FAKE/status"; exit $(($(cat "$FAKE/status") > 0)) ;;
  *worker.log*) case "$*" in *--worker=2*) exit 1 ;; *) echo log >"$6" ;; esac ;;
esac
"""


def dry_run(*arguments: str) -> list[str]:
    done = subprocess.run([SCRIPT, "--dry-run", *arguments], capture_output=True, text=True, check=True, cwd="/")
    assert done.stderr == ""
    return re.sub(r"[^\s=]*/rlhf-jax-\w+\.tar\.gz", "ARCHIVE", done.stdout).splitlines()


def test_a_dry_run_prints_every_command_and_touches_nothing():
    before = set(ROOT.iterdir())
    create = "--accelerator-type=v5litepod-64 --version=v2-alpha-tpuv5-lite --spot"
    tpu = "gcloud compute tpus tpu-vm"
    found = dry_run(*WHERE, "--project", "mine", "--setup", "sudo mount 10.0.0.2:/share /mnt/share", "--create", create, *RUN)
    place = "--zone=us-west4-a --project=mine"
    assert found == [
        f"{tpu} create pod {place} {create}",
        "git archive --format=tar.gz --output=ARCHIVE HEAD",
        f"{tpu} scp ARCHIVE pod:rlhf-jax.tar.gz {place} --worker=all",
        f"{tpu} ssh pod {place} --worker=all '--command=sudo mount 10.0.0.2:/share /mnt/share'",
        f"{tpu} ssh pod {place} --worker=all '--command=mkdir -p rlhf-jax && tar -xzf rlhf-jax.tar.gz -C rlhf-jax "
        "&& cd rlhf-jax && bash scripts/tpu_install.sh'",
        f"{tpu} ssh pod {place} --worker=all '--command=cd rlhf-jax && bash scripts/tpu_worker.sh ppo "
        "configs/ppo_llama3_8b_v5e64.yaml out=/mnt/share/run data.path=my\\ prompts.jsonl'",
        f"{tpu} scp pod:rlhf-jax/worker.log logs/pod/worker-0.log {place} --worker=0",
    ]
    assert set(ROOT.iterdir()) == before
    quoted = dry_run(*WHERE, "--", "ppo", "run.yaml", "reward.url=it's")
    assert shlex.split(shlex.split(quoted[-2])[-1].removeprefix("--command="))[-1] == "reward.url=it's"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "usage"),
        (["--name", "pod", "--", "ppo", "x.yaml"], "usage"),
        ([*WHERE, "--nme", "x"], "--nme is not an option"),
        (["--name"], "--name needs a value"),
    ],
)
def test_a_wrong_command_line_is_status_2(arguments, words):
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


@pytest.fixture
def launched(tmp_path):
    """launched(statuses, states, *options) -> exit status, the commands that gcloud was given."""

    def launch(statuses: list[int], states: list[str], *options: str) -> tuple[int, list[str]]:
        fake = tmp_path / "gcloud"
        fake.write_text(GCLOUD)
        fake.chmod(0o755)
        (tmp_path / "runs").write_text("".join(f"{status}\n" for status in statuses))
        (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
        variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE": str(tmp_path), "TPU_VM_PAUSE_S": "0"}
        command = [SCRIPT, *WHERE, "--logs", str(tmp_path / "logs"), *options, *RUN]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables)
        calls = (tmp_path / "calls").read_text().splitlines()
        return done.returncode, [re.sub(r".*tpu-vm (\S+) .*?(tpu_\w+|worker\.\w+|$).*", r"\1 \2", call).strip() for call in calls]

    return launch


INSTALL = ["scp", "ssh tpu_install"]
LOGS = ["scp worker.log"] * 3  # two workers, and one that is not there


def test_asked_to_stop_it_starts_again_and_preempted_it_makes_the_slice_anew(launched, tmp_path):
    states = ["READY", "PREEMPTED", "PREEMPTED", "READY"]
    status, calls = launched([143, 255, 0], states, "--create", "--spot")
    ended_badly = ["ssh tpu_worker", "ssh worker.status", *LOGS]
    assert status == 0
    assert calls == [
        *["describe", *INSTALL, *ended_badly],  # asked to stop
        *["describe", "describe", "delete", "create", *INSTALL, *ended_badly],  # it was a preemption; then the connection is lost
        *["describe", "ssh tpu_worker", *LOGS],  # the slice is there: nothing is installed again
    ]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["worker-0.log", "worker-1.log"]


@pytest.mark.parametrize(("status", "restarts"), [(2, 0), (1, 0), (75, 1), (137, 1), (143, 1)])
def test_a_mistake_ends_and_what_may_pass_is_tried_again(launched, status, restarts):
    ended, calls = launched([status, status, 0], ["READY"] * 4, "--restarts", "1")
    assert ended == status
    assert calls.count("ssh tpu_worker") == 1 + restarts
    assert calls.count("ssh tpu_install") == 1


def test_without_a_slice_and_without_create_it_says_so(launched):
    status, calls = launched([0], ["READY"])
    assert (status, calls[0]) == (0, "scp")  # it is not asked: the first command would fail by itself


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in text.splitlines() if "bin/rlhf-jax " in line]


@pytest.mark.parametrize("name", ["jobset", "skypilot"])
def test_the_other_launchers_name_commands_and_files_that_exist(name):
    path = ROOT / "scripts" / f"{name}.yaml"
    found = yaml.safe_load(path.read_text())
    if name == "jobset":
        job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
        container = job["template"]["spec"]["containers"][0]
        text = container["command"][-1]
        chips = job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
        assert job["parallelism"] == job["completions"]
        assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    else:
        text = found["setup"] + found["run"]
        chips = int(found["resources"]["accelerators"].rpartition("-")[2])
    [[_, stage, file, *overrides]] = commands(text)
    run = config_file.load(ROOT / file, overrides, config.STAGES[stage])
    assert run.mesh.data * run.mesh.fsdp * run.mesh.tensor == chips == 64
    for script in re.findall(r"scripts/\w+\.sh", text):
        assert (ROOT / script).is_file()
    assert "ray" not in path.read_text().lower().replace("no ray", "")
