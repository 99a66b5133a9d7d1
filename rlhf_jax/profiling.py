"""A trace of one step, as the devices and the host spent it: `log.profile_step`, or `--profile STEP`.

The step is traced by itself: nothing that was dispatched before is still running, and what follows begins when it is over.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


class Profile:
    """Traces step `step` into `directory`; None traces nothing. A context manager: an error inside the step ends the trace.

    Process 0 writes its trace; all know the step, for they read what they have dispatched together.
    """

    def __init__(self, directory: Path, step: int | None, *, say: Callable[[str], Any]):
        self._directory, self._step, self._say = directory, step, say
        self._running = False

    def alone(self, step: int) -> bool:
        """The loop must read everything it has dispatched after this step: it is the traced one, or the one before."""
        return self._step is not None and step in (self._step - 1, self._step)

    def begin(self, step: int) -> None:
        """Before step `step` is dispatched."""
        if step == self._step and jax.process_index() == 0:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def end(self, step: int) -> None:
        """When the results of step `step` have been read."""
        if self._running and step == self._step:
            self._stop()
            self._say(f"step {step}: trace in {self._directory} (docs/profiling.md)")

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error: object) -> None:
        if self._running:
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False
