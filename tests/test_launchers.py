"""Starting a run on a TPU slice: the commands as printed, and what follows a preemption, with a gcloud that only takes notes; and
what one worker does with a run, its log and a connection that is lost."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_jax import config, config_file

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "tpu_vm.sh"
WHERE = ["--name", "pod", "--zone", "us-west4-a"]
RUN = ["--", "ppo", "configs/ppo_llama3_8b_v5e64.yaml", "out=/mnt/share/run", "data.path=my prompts.jsonl"]

# Writes down what it was asked; states, and statuses of the run, of installing and of creating a slice, come from files, a line
# for every call.
# A state that is no word of gcloud's is what it says on stderr. A run that is "lost" goes on without its connection.
GCLOUD = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$FAKE/calls"
next() { head -1 "$FAKE/$1"; sed -i 1d "$FAKE/$1"; }
case "$*" in
  *describe*)
    found=$(next states)
    case $found in READY | PREEMPTED) echo "$found" ;; *) echo "ERROR: $found" >&2; exit 1 ;; esac ;;
  *"tpu-vm create"*) exit "$(($(next creates)))" ;;
  *pod:rlhf-jax.tar.gz*) cp "$5" "$FAKE/sent.tar.gz" ;;
  *tpu_install.sh*) exit "$(($(next installs)))" ;;
  *worker.status*) cd "$FAKE" && bash -c "${!##--command=}" ;;
  *tpu_worker.sh*)
    status=$(next runs)
    case $status in lost) rm "$FAKE/rlhf-jax/worker.status" ;; *) echo "$status" >"$FAKE/rlhf-jax/worker.status" ;; esac
    [ "$status" = 0 ] ;;
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
        """bash -o pipefail -c 'git ls-files -coz --exclude-standard | while IFS= read -rd "" f; do [ ! -e "$f" ] """
        """|| printf "%s\\0" "$f"; done | tar -czf "$0" --no-recursion --null -T -' ARCHIVE""",
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


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def launched(tmp_path):
    """launched(statuses, states, *options) -> exit status, the commands that gcloud was given. What it said lies in `said`."""

    def launch(
        statuses: list[Any],
        states: list[str],
        *options: str,
        creates: Sequence[int] = (),
        installs: Sequence[int] = (),
        script: Path = SCRIPT,
    ) -> tuple[int, list[str]]:
        executable(tmp_path / "gcloud", GCLOUD)
        (tmp_path / "rlhf-jax").mkdir()
        (tmp_path / "rlhf-jax" / "worker.status").touch()
        (tmp_path / "creates").write_text("".join(f"{status}\n" for status in creates))
        (tmp_path / "installs").write_text("".join(f"{status}\n" for status in installs))
        (tmp_path / "runs").write_text("".join(f"{status}\n" for status in statuses))
        (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
        variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE": str(tmp_path), "TPU_VM_PAUSE_S": "0"}
        command = [script, *WHERE, "--logs", str(tmp_path / "logs"), *options, *RUN]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables, timeout=60)
        (tmp_path / "said").write_text(done.stderr)
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


def test_preempted_while_it_installs_it_makes_the_slice_anew(launched):
    status, calls = launched([0], ["READY", "PREEMPTED", "PREEMPTED", "PREEMPTED"], "--create", "--spot", installs=[1, 0])
    assert status == 0
    assert calls == [
        *["describe", *INSTALL, "describe"],
        *["describe", "describe", "delete", "create", *INSTALL, "ssh tpu_worker", *LOGS],
    ]


def test_what_cannot_be_installed_on_a_slice_that_is_there_ends_it(launched, tmp_path):
    status, calls = launched([0], ["READY", "READY"], "--create", "--spot", installs=[2])
    assert (status, calls) == (1, ["describe", *INSTALL, "describe"])
    assert "pod could not be made ready for the run" in (tmp_path / "said").read_text()


STARTED_AGAIN = (75, 134, 137, 139, 143)


@pytest.mark.parametrize(("status", "restarts"), [(2, 0), (1, 0), *((status, 1) for status in STARTED_AGAIN), ("lost", 1)])
def test_a_mistake_ends_and_what_may_pass_is_tried_again(launched, status, restarts):
    ended, calls = launched([status, status, 0], ["READY"] * 4, "--restarts", "1")
    assert ended == (255 if status == "lost" else status)
    assert calls.count("ssh tpu_worker") == 1 + restarts
    assert calls.count("ssh tpu_install") == 1


def test_the_checkout_is_sent_as_it_lies_there(launched, tmp_path):
    """With what is changed and what is new, without what is deleted and what git ignores."""
    there = tmp_path / "a checkout"
    script = executable(there / "scripts" / "tpu_vm.sh", SCRIPT.read_text())
    files = {".gitignore": "runs/\n", "configs/edited.yaml": "steps: 1\n", "configs/gone.yaml": ""}
    for name, text in files.items():
        (there / name).parent.mkdir(exist_ok=True)
        (there / name).write_text(text)
    for command in (["init", "-q"], ["add", "--all"]):
        subprocess.run(["git", *command], cwd=there, check=True)
    (there / "configs" / "edited.yaml").write_text("steps: 2\n")
    (there / "configs" / "my own é.yaml").write_text("steps: 3\n")
    (there / "configs" / "gone.yaml").unlink()
    (there / "runs").mkdir()
    (there / "runs" / "metrics.jsonl").touch()
    assert launched([0], [], script=script)[0] == 0
    with tarfile.open(tmp_path / "sent.tar.gz") as sent:
        assert sorted(sent.getnames()) == sorted({*files, "configs/my own é.yaml", "scripts/tpu_vm.sh"} - {"configs/gone.yaml"})
        assert [sent.extractfile(f"configs/{name}.yaml").read() for name in ("edited", "my own é")] == [
            b"steps: 2\n",
            b"steps: 3\n",
        ]


def test_without_a_slice_and_without_create_it_says_so(launched):
    status, calls = launched([0], ["READY"])
    assert (status, calls[0]) == (0, "scp")  # it is not asked: the first command would fail by itself


def test_a_slice_that_cannot_be_made_is_tried_again_but_not_for_ever(launched, tmp_path):
    states = ["NOT_FOUND: no such slice", "PERMISSION_DENIED: log in", "READY"]
    status, calls = launched([0], states, "--create", "--spot", creates=[1, 1])
    assert (status, calls[:5]) == (0, ["describe", "create", "describe", "create", "describe"])  # it was there all the time
    said = (tmp_path / "said").read_text()
    assert said.count("pod could not be made, gcloud says why (try ") == 2
    assert "PERMISSION_DENIED: log in" in said
    assert "NOT_FOUND" not in said


@pytest.mark.parametrize(("created", "tries"), [(1, 3), (2, 1)])
def test_a_slice_that_can_never_be_made_ends_it(launched, created, tries):
    status, calls = launched([0], ["NOT_FOUND"] * 9, "--create", "--zpot", "--tries", "3", creates=[created] * 9)
    assert (status, calls) == (created, ["describe", "create"] * tries)


# A run that goes on until there is a file `go`, or until it was asked to stop twice.
WORKER_RUN = """#!/usr/bin/env bash
trap 'echo asked; asked=$((asked + 1))' TERM
echo "begun $1"
while [ ! -e go ] && [ "${asked:-0}" -lt 2 ]; do /bin/sleep 0.02; done
for n in 1 2 3; do echo "line $n" >&2; /bin/sleep 0.1; done
echo "ended $1"
exit "$1"
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A worker's checkout with a run that does nothing, and a `sleep` that takes no time."""
    executable(tmp_path / ".venv" / "bin" / "rlhf-jax", WORKER_RUN)
    executable(tmp_path / "scripts" / "tpu_worker.sh", (ROOT / "scripts" / "tpu_worker.sh").read_text())
    executable(tmp_path / "bin" / "sleep", "#!/bin/sh\n")
    return tmp_path


@pytest.fixture
def worker(checkout):
    """worker(status): tpu_worker.sh with a run that ends with this status."""
    started = []

    def start(status: int) -> subprocess.Popen[str]:
        variables = os.environ | {"PATH": f"{checkout / 'bin'}:{os.environ['PATH']}"}
        command = [checkout / "scripts" / "tpu_worker.sh", str(status)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdout=pipe, text=True, env=variables, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


LINES = ["line 1", "line 2", "line 3"]


def test_a_worker_tells_what_its_run_says_and_how_it_ends(checkout, worker):
    (checkout / "worker.log").write_text("of an earlier run\n")
    (checkout / "go").touch()
    process = worker(75)
    heading, *lines = process.communicate(timeout=20)[0].splitlines()
    assert process.returncode == 75
    assert heading.endswith("rlhf-jax 75")
    assert lines == ["begun 75", *LINES, "ended 75"]
    assert (checkout / "worker.status").read_text() == "75\n"
    assert (checkout / "worker.log").read_text().splitlines() == ["of an earlier run", heading, *lines]


def test_a_run_whose_connection_is_lost_goes_on_and_is_logged(checkout, worker):
    process = worker(0)
    assert [process.stdout.readline() for _ in range(2)][1] == "begun 0\n"
    process.stdout.close()
    (checkout / "go").touch()
    assert process.wait(20) == 0
    assert (checkout / "worker.log").read_text().splitlines()[1:] == ["begun 0", *LINES, "ended 0"]
    assert (checkout / "worker.status").read_text() == "0\n"


def test_a_run_that_was_left_behind_is_asked_to_stop_until_it_does(checkout, worker):
    first = worker(143)
    assert [first.stdout.readline() for _ in range(2)][1] == "begun 143\n"
    first.stdout.close()
    second = worker(0)
    assert first.wait(20) == 143
    (checkout / "go").touch()
    assert second.communicate(timeout=20)[0].splitlines()[1:] == ["begun 0", *LINES, "ended 0"]
    logged = (checkout / "worker.log").read_text().splitlines()
    assert logged[1:7] == ["begun 143", "asked", "asked", *LINES]
    assert (checkout / "worker.status").read_text() == "0\n"


def test_a_stranger_with_the_number_of_an_earlier_run_is_left_alone(checkout, worker):
    (checkout / "go").touch()
    with subprocess.Popen(["/bin/sleep", "60"]) as stranger:
        (checkout / "worker.pid").write_text(f"{stranger.pid}\n")
        try:
            assert worker(0).wait(20) == 0
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_the_table_of_statuses_is_what_the_launchers_go_by():
    page = (ROOT / "docs" / "several_machines.md").read_text()
    rows = re.findall(r"^\| ([\d, ]+) \|.*\| (.*) \|$", page, re.MULTILINE)
    again = {int(status) for statuses, remedy in rows if remedy.startswith("start again") for status in statuses.split(",")}
    assert again == set(STARTED_AGAIN)
    sky = yaml.safe_load((ROOT / "scripts" / "skypilot.yaml").read_text())
    assert set(sky["resources"]["job_recovery"]["recover_on_exit_codes"]) == again - {137}
    job = yaml.safe_load((ROOT / "scripts" / "jobset.yaml").read_text())
    ended = job["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert (ended["operator"], ended["values"]) == ("In", [2])


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
