"""Runs the command line and dies, by SIGKILL, at a chosen call: python child.py "MODULE:FUNCTION:COUNT:before|after" ARGUMENTS…

`none` as the point runs to the end. MODULE:FUNCTION may name a method (`rlhf_jax.rundir:RunDir.sync`). COUNT is the number of
the call that kills. The kill is the system's: no handler, no clean-up, exactly as when the machine takes the process away.
"""

import functools
import importlib
import os
import signal
import sys


def arm(point: str) -> None:
    """Wrap the function so that its COUNT-th call ends the process."""
    module_name, path, count, when = point.split(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module_name))
    function, calls = getattr(owner, name), 0

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == int(count) and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if calls == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    from rlhf_jax import cli, environment

    point, *sys.argv[1:] = sys.argv[1:]
    environment.prepare()
    if point != "none":
        arm(point)
    cli.main()
