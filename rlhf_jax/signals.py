"""The first SIGTERM, SIGINT, SIGUSR1 or SIGHUP asks the run to finish its step, save and leave; the second ends it at once.

A SIGHUP that follows is no second request: shell and kernel both send one when a terminal goes away. Where it was ignored when
the run began, as under `nohup`, it stays ignored.

A Python handler waits until the interpreter runs again, which a long compilation or a blocking transfer can delay past the
grace period. So the C handler writes the signal's number into a pipe, and a thread that reads it acts whatever the main thread
does. With several processes the loop's `poll` is where all of them agree on the step.
"""

import contextlib
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import jax

from rlhf_jax import processes
from rlhf_jax.errors import EXIT_STOPPED, Stopped

_LOG = logging.getLogger(__name__)
_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Interrupts:
    """Latch of the requests to stop. A context manager for the main thread; handlers are put back at the end."""

    def __init__(self, *, say: Callable[[str], None] = _LOG.warning, command: str | None = None):
        self._say, self._command = say, command or resume_command()
        self._asked = threading.Event()
        self._lock = threading.Lock()
        self._unsaved = False

    def __enter__(self) -> "Interrupts":
        self._reader, self._pen = os.pipe()
        os.set_blocking(self._pen, False)
        asking = [number for number in _ASKING if number != signal.SIGINT or not hasattr(sys, "ps1")]  # not in a notebook
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            asking.remove(signal.SIGHUP)
        self._before = {number: signal.signal(number, lambda *_: None) for number in asking}
        self._wakeup_before = signal.set_wakeup_fd(self._pen, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.write(self._pen, b"\0")
        self._thread.join()
        os.close(self._reader)
        os.close(self._pen)

    @property
    def asked(self) -> bool:
        """This process was asked to stop. The loop uses `poll`, on which all processes agree."""
        return self._asked.is_set()

    def poll(self, failed: bool = False) -> bool:
        """True on every process once any was asked to stop, or has failed. Call it at the same point of the loop on all."""
        return processes.any_process(self.asked or failed)

    @property
    def unsaved(self) -> bool:
        """A finished step is not on the disk yet. Until the loop sets this, the first request ends the process at once:
        while it loads, compiles and makes its first step there is nothing to save."""
        return self._unsaved

    @unsaved.setter
    def unsaved(self, value: bool) -> None:
        with self._lock:
            self._unsaved = value

    def stopped(self, step: int) -> Stopped:
        """The exception to raise once step `step` is saved."""
        return Stopped(f"Stopped as asked; step {step} is saved. Go on with the same command:\n  {self._command}")

    def _listen(self) -> None:
        while number := os.read(self._reader, 1)[0]:
            if number not in _ASKING or (number == signal.SIGHUP and self.asked):
                continue
            name = signal.Signals(number).name
            with self._lock:
                if self.asked:
                    self._leave(f"{name} again: leaving at once; the newest finished checkpoint is intact")
                self._asked.set()
                alone = not jax.distributed.is_initialized()  # several leave together, at a step
                if alone and not self._unsaved:
                    self._leave(f"{name}: nothing new to save")
            self._say(f"{name}: finishing this step, then saving; once more to leave at once")

    def _leave(self, why: str) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"\n{why}. Go on with the same command:\n  {self._command}\n".encode())
        os._exit(EXIT_STOPPED)


def resume_command() -> str:
    """The command line of this process, as one would type it."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        words = ["python", "-m", program.parent.name]
    elif program.suffix == ".py":
        words = ["python", sys.argv[0]]
    else:
        words = [program.name]
    return shlex.join([*words, *sys.argv[1:]])
