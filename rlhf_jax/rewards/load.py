"""A reward function from a user's file: `path/to/file.py:function`."""

import ast
import importlib.util
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.rewards.call import call, explain

LOAD_TIMEOUT_S = 60.0


def load_function(target: str, shipped: Collection[str] = ()) -> Callable[..., Any]:
    """Run a Python file and take one function from it. Only an explicit path is ever run. `shipped` are names for the message.

    Errors: `UserError` for a missing file or function, a file that does not run, a thing that cannot be called.
    """
    path, _, name = target.rpartition(":")
    if not path or not name.isidentifier():
        known = f"; shipped are {', '.join(shipped)}" if shipped else ""
        raise UserError(f"reward.functions: {target!r} is neither a shipped reward nor path/to/file.py:function{known}")
    file = Path(path)
    if not file.is_file():
        raise UserError(f"reward.functions: {target!r}: no file {path!r} (from {Path.cwd()})")
    source = file.read_bytes()
    try:
        names = [node.name for node in ast.parse(source, path).body if isinstance(node, ast.FunctionDef)]
    except (SyntaxError, ValueError) as error:
        raise UserError(f"reward.functions: {path}:{getattr(error, 'lineno', '?')}: not Python ({error})") from None
    spec = importlib.util.spec_from_file_location(f"rlhf_jax_reward_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"reward.functions: {target!r}: {path!r} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in the file look their module up
    outcome = call(spec.loader.exec_module, module, timeout_s=LOAD_TIMEOUT_S)
    if outcome.late:
        raise UserError(
            f"reward.functions: {path} did not finish loading within {LOAD_TIMEOUT_S:.0f} s; it must only define functions"
        )
    if outcome.error is not None:
        raise UserError(f"reward.functions: {path} does not run: {explain(outcome.error, str(file))}") from outcome.error
    function = getattr(module, name, None)
    if function is None:
        raise UserError(f"reward.functions: {path} has no function {name!r}; it has: {', '.join(names) or 'none'}")
    if not callable(function):
        raise UserError(f"reward.functions: {target!r} is a {type(function).__name__}, not a function")
    return function
