"""The first request to stop is heard whatever the main thread does; the second is obeyed at once."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from rlhf_jax.errors import EXIT_STOPPED
from rlhf_jax.signals import Interrupts, resume_command

BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"  # minutes inside C, as a compilation is


def start(body: str) -> subprocess.Popen:
    head = "import time\nfrom rlhf_jax.signals import Interrupts\nwith Interrupts(command='rlhf-jax ppo x.yaml') as interrupts:\n"
    code = head + textwrap.indent(textwrap.dedent(body), "    ")
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen) -> tuple[int, str, str, float]:
    began = time.monotonic()
    out, err = process.communicate(timeout=20)
    return process.returncode, out, err, time.monotonic() - began


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_the_first_request_lets_the_step_finish(number):
    process = start("""
        interrupts.unsaved = True
        print("ready", flush=True)
        for step in range(100):
            input()
            print("finished", step, flush=True)
            if interrupts.poll():
                raise SystemExit(str(interrupts.stopped(step)))
    """)
    process.send_signal(number)  # in the middle of step 0, which lasts until there is a line to read
    heard = process.stderr.readline()
    assert f"{number.name}: finishing this step, then saving" in heard
    out, err = process.communicate("\n", timeout=20)
    assert process.returncode == 1
    assert out == "finished 0\n"
    assert "step 0 is saved. Go on with the same command:\n  rlhf-jax ppo x.yaml" in heard + err


def test_nothing_unsaved_means_leaving_at_once_even_inside_a_compilation():
    process = start(f"print('ready', flush=True)\n{BUSY}")
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    status, _, err, seconds = end(process)
    assert status == EXIT_STOPPED
    assert seconds < 2
    assert "nothing new to save. Go on with the same command:\n  rlhf-jax ppo x.yaml" in err


def test_the_second_request_is_obeyed_at_once_even_inside_a_compilation():
    process = start(f"interrupts.unsaved = True\nprint('ready', flush=True)\n{BUSY}")
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    status, _, err, seconds = end(process)
    assert status == EXIT_STOPPED
    assert seconds < 2
    assert "the newest finished checkpoint is intact" in err


def test_handlers_are_put_back_and_a_request_is_remembered():
    asking = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in asking]
    told = []
    with Interrupts(say=told.append) as interrupts:
        interrupts.unsaved = True
        assert not interrupts.poll()
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 5
        while not told and time.monotonic() < deadline:
            time.sleep(0.01)
        assert interrupts.poll()
    assert [signal.getsignal(number) for number in asking] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_hang_up_that_was_ignored_when_the_run_began_stays_ignored(monkeypatch):
    """nohup rlhf-jax … &"""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts(say=lambda text: None) as interrupts:
            interrupts.unsaved = True
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)
            assert not interrupts.asked
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_command_to_go_on_with_is_the_one_that_was_typed(monkeypatch):
    for typed, wanted in (
        (["/venv/bin/rlhf-jax", "ppo", "my runs/a.yaml", "seed=1"], "rlhf-jax ppo 'my runs/a.yaml' seed=1"),
        (["scripts/train.py", "a.yaml"], "python scripts/train.py a.yaml"),
        (["/site/rlhf_jax/__main__.py", "sft"], "python -m rlhf_jax sft"),
    ):
        monkeypatch.setattr(sys, "argv", typed)
        assert resume_command() == wanted
