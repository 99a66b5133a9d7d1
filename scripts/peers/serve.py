"""One side of a comparison: a process that works when it is told to, so that sides take turns and none runs beside another.

    serve({"rollout": f, ...})   runs the work that a line on standard input names, answers with the seconds it took
    Gate()                       called by a trainer's reward once an iteration, holds it up until the next line

Answers are JSON lines on the original standard output; what libraries print goes to standard error. Needs nothing but Python.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_channel = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


def say(**values: Any) -> None:
    _channel.write(json.dumps(values) + "\n")


def peak_mb() -> float:
    """Largest resident set of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def sizes(directory: str) -> dict[str, Any]:
    """What `bench.py` wrote: the model's sizes as config.json has them, batch, prompt, response."""
    return json.loads((Path(directory) / "sizes.json").read_text())


def serve(works: dict[str, Callable[[], object]]) -> None:
    """Answer lines until the input ends; a work must return when its result is there, not before."""
    say(ready=sorted(works))
    for line in sys.stdin:
        began = time.perf_counter()
        works[line.strip()]()
        say(seconds=time.perf_counter() - began)
    say(peak_mb=peak_mb())


class Gate:
    """Seconds from one call to the next are an iteration: update, next rollout, scores, whatever the trainer does between."""

    def __init__(self, settle: Callable[[], object] = lambda: None):
        self.settle, self.began = settle, None

    def __call__(self) -> None:
        self.settle()
        if self.began is None:
            say(ready=["iteration"])
        else:
            say(seconds=time.perf_counter() - self.began)
        if not sys.stdin.readline():
            say(peak_mb=peak_mb())
            _channel.flush()
            os._exit(0)
        self.began = time.perf_counter()


def finished(directory: str) -> None:
    """Tell `bench.py` that the iteration is finished."""
    Path(directory, "finished").touch()


def settle_jax() -> None:
    """Wait for everything that is dispatched: nothing may be computed while another side has its turn."""
    import jax

    for array in jax.live_arrays():
        if not array.is_deleted():
            array.block_until_ready()
