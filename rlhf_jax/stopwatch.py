"""How long the device works on each phase of a step, without making the loop wait for it.

Dispatch is asynchronous: the host leaves `rollout = sample(...)` long before the samples exist, and later waits in whatever line
reads a number first. So a thread waits for one array of each phase instead, in the order of dispatch, and the phase's time is

    seconds = done - max(began, done of the phase before)

which counts tracing and compilation of a first call too. The phases of a step then add up to the step.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any


class Stopwatch:
    """Seconds by phase. `totals` holds what is finished; one thread, started by the first phase."""

    def __init__(self, *, wait: Callable[[Any], Any] | None = None, clock: Callable[[], float] = time.monotonic):
        self.totals: dict[str, float] = {}
        self._wait, self._clock = wait or _block, clock
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._pending: dict[int | None, int] = {}
        self._steps: dict[int, dict[str, float]] = {}
        self._thread: threading.Thread | None = None
        self._done_at = float("-inf")

    def start(self, name: str, began: float, array: Any, step: int | None = None) -> None:
        """A phase that began at a time of the clock is over when `array` is computed (give one that is not donated)."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="stopwatch", daemon=True)
            self._thread.start()
        with self._changed:
            self._pending[step] = self._pending.get(step, 0) + 1
        self._queue.put((name, began, array, step))

    def take(self, step: int, timeout_s: float = 1.0) -> dict[str, float]:
        """Seconds by phase of a step whose results are there; what is not finished within the timeout is left out."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending.get(step), timeout_s)
            for old in [held for held in self._steps if held < step]:
                del self._steps[old]
            return self._steps.pop(step, {})

    def close(self, timeout_s: float = 5.0) -> None:
        """Wait for what is under way, then end the thread."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            name, began, array, step = item
            with contextlib.suppress(RuntimeError):  # donated, or failed: the loop meets the error where it reads the result
                self._wait(array)
            del array, item
            now = self._clock()
            with self._changed:
                seconds = now - max(began, self._done_at)
                self._done_at = now
                self.totals[name] = self.totals.get(name, 0.0) + seconds
                if step is not None:
                    mine = self._steps.setdefault(step, {})
                    mine[name] = mine.get(name, 0.0) + seconds
                self._pending[step] -= 1
                if not self._pending[step]:
                    del self._pending[step]
                self._changed.notify_all()


def _block(array: Any) -> None:
    import jax

    jax.block_until_ready(array)
