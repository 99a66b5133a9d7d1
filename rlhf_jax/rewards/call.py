"""Run a function of the user's with a limit on its time, and hand back what became of it."""

import atexit
import contextlib
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from typing import Any, NamedTuple

_LEFT_BEHIND = threading.Event()  # some function of this process was late


class Outcome(NamedTuple):
    value: Any = None
    error: BaseException | None = None
    late: bool = False


def call(function: Callable[..., Any], *arguments: Any, timeout_s: float) -> Outcome:
    """Call in a daemon thread and wait at most `timeout_s` seconds.

    Whatever the function raises is in `error`. A function that does not return is left behind (`late`): Python cannot stop a
    thread. It does not keep the process alive, but the pools that it made do (`leave`).
    """
    errors: list[BaseException] = []
    pool = ThreadPool(1)
    result = pool.apply_async(_contained, (function, arguments), error_callback=errors.append)
    pool.close()
    result.wait(timeout_s)
    if not result.ready():
        _LEFT_BEHIND.set()
        return Outcome(late=True)
    if not result.successful():
        return Outcome(error=errors[0])
    return Outcome(value=result.get())


def _contained(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return function(*arguments)
    except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:  # these would end the thread without an answer
        raise RuntimeError(f"raised {type(error).__name__}").with_traceback(error.__traceback__) from error


def leave(status: int) -> None:
    """End the process where a function was left behind: Python would first wait for the threads and processes of its pools.

    Everything else that Python does at the end is done: what was printed is flushed, what is registered with `atexit` runs.
    """
    if not _LEFT_BEHIND.is_set():
        return
    for child in multiprocessing.active_children():
        child.kill()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it; the function has closed it
            stream.flush()
    os._exit(status)


def explain(error: BaseException, file: str | None = None) -> str:
    """An exception as "ValueError: message (file.py:12)": the deepest line in `file`, else the deepest of all."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if file is None or frame.filename == file] or list(frames)
    place = f" ({inside[-1].filename}:{inside[-1].lineno})" if inside else ""
    return f"{type(error).__name__}: {error}{place}"
