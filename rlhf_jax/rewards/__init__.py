"""Host rewards: plain functions of prompts, responses and the data row's other columns, one a file."""

import copy
import functools
import inspect
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from rlhf_jax import config
from rlhf_jax.errors import UserError
from rlhf_jax.rewards.call import call, explain
from rlhf_jax.rewards.check import RewardError, checked, shorten
from rlhf_jax.rewards.exact import exact
from rlhf_jax.rewards.http import http_reward
from rlhf_jax.rewards.length import length
from rlhf_jax.rewards.load import load_function
from rlhf_jax.rewards.math_answer import math_answer
from rlhf_jax.rewards.numerals import final_number
from rlhf_jax.rewards.regex import regex
from rlhf_jax.rewards.repetition import repetition
from rlhf_jax.types import RewardInput

REWARDS: dict[str, Callable[..., Any]] = {
    "exact": exact,
    "length": length,
    "math_answer": math_answer,
    "regex": regex,
    "repetition": repetition,
}

SPREAD = ("prompts", "responses", "completions")  # a function whose first parameter is one of these gets the batch in pieces
_VARIABLE = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)

TAKEN = ("score", "score_std", "nonfinite_rate", "shaped", "gold", "model", "url")  # the loop's own `reward/...`
HostReward = Callable[[RewardInput], tuple[np.ndarray, dict[str, np.ndarray]]]


def make_reward(reward: config.Reward, tokenizer: Any = None) -> HostReward:
    """The host rewards of a configuration as one function: batch -> (f32[B] weighted sum, {"reward/<name>": f32[B] unweighted}).

    Every part runs with `timeout_s` and is checked: a part that raises, is late or is not B finite numbers stops the run with a
    `RewardError`. A function of the user's is called as `function(RewardInput, **options)`, or, where its first parameter is
    named prompts, responses or completions, with keywords: those, and the data's columns. Errors: `UserError` when made.
    """
    parts: list[tuple[str, float, Callable[[RewardInput], Any]]] = []
    for entry in reward.functions:
        name = _unused(entry.function.rpartition(":")[2], [*TAKEN, *(part[0] for part in parts)])
        parts.append((name, _weight(entry.weight, f"reward.functions ({name})"), _bound(entry, tokenizer)))
    if reward.url is not None:
        parts.append(
            ("url", _weight(reward.url_weight, "reward.url_weight"), http_reward(reward.url, timeout_s=reward.timeout_s))
        )
    # A server bounds each of its attempts itself; the limit here only catches a wait that nothing else ends.
    limits = {name: reward.timeout_s if name != "url" else 4 * (reward.timeout_s + 15.0) for name, _, _ in parts}

    def total(batch: RewardInput) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        out = np.zeros(len(batch.responses), np.float32)
        values = {}
        for name, weight, function in parts:
            value = run_reward(function, batch, name, timeout_s=limits[name])
            values[f"reward/{name}"] = value
            out += np.float32(weight) * value
        return out, values

    return total


def run_reward(function: Callable[[RewardInput], Any], batch: RewardInput, name: str, *, timeout_s: float) -> np.ndarray:
    """One reward of one batch, checked: f32[B]. Errors: `RewardError`, naming the sample and its prompt where there is one.

    The function gets a copy: what it changes is changed for no other reward, nor in the data.
    """
    outcome = call(function, copy.deepcopy(batch), timeout_s=timeout_s)
    if outcome.late:
        raise RewardError(
            f"reward {name}: no answer for {len(batch.responses)} samples within {timeout_s:g} s; raise reward.timeout_s"
        )
    if isinstance(outcome.error, RewardError):
        raise outcome.error
    if outcome.error is not None:
        where = _culprit(function, batch, timeout_s)
        raise RewardError(f"reward {name}: raised {explain(outcome.error)}{where}") from outcome.error
    return checked(outcome.value, len(batch.responses), name, batch.prompts)


def _culprit(function: Callable[[RewardInput], Any], batch: RewardInput, timeout_s: float) -> str:
    """The first sample on which the function raises by itself, for the message: it is looked for `timeout_s` seconds."""
    end, count = time.monotonic() + timeout_s, len(batch.responses)
    for i in range(count):
        columns = {key: values[i : i + 1] for key, values in batch.columns.items()}
        one = RewardInput(batch.prompts[i : i + 1], batch.responses[i : i + 1], np.asarray(batch.finished)[i : i + 1], columns)
        outcome = call(function, one, timeout_s=max(end - time.monotonic(), 0.0))
        if outcome.late:
            return f"; on a batch of {count}"
        if outcome.error is not None:
            return f"; sample {i}, prompt {shorten(batch.prompts[i])}, response {shorten(batch.responses[i])}"
    return f"; on a batch of {count}, not on any one sample"


def _bound(entry: config.RewardFunction, tokenizer: Any) -> Callable[[RewardInput], Any]:
    """A function with its options filled in. Errors: `UserError` for options that it does not take."""
    function = REWARDS.get(entry.function) or load_function(entry.function, REWARDS)
    options = dict(entry.options)
    parameters = dict(inspect.signature(function).parameters)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    spread = next(iter(parameters), "") in SPREAD
    skipped = [*SPREAD, "finished"] if spread else list(parameters)[:1]
    taken = [name for name, p in parameters.items() if name not in [*skipped, "tokenizer"] and p.kind not in _VARIABLE]
    for key in options:
        if key not in taken and not open_ended:
            raise UserError(f"reward.functions: {entry.function} takes no option {key!r}; it takes: {', '.join(taken) or 'none'}")
    for name in taken:
        if parameters[name].default is inspect.Parameter.empty and name not in options and not spread:
            raise UserError(f"reward.functions: {entry.function} needs the option {name!r}; add options: {{{name}: …}}")
    if "tokenizer" in parameters:
        options.setdefault("tokenizer", tokenizer)
    if spread:
        return functools.partial(_call_spread, function, entry.function, parameters, open_ended, options)
    return functools.partial(function, **options)


def _call_spread(
    function: Callable[..., Any],
    name: str,
    parameters: dict[str, inspect.Parameter],
    open_ended: bool,
    options: dict[str, Any],
    batch: RewardInput,
) -> Any:
    """Call a function that is written `f(prompts, completions, **columns)`, as TRL's are."""
    given = {"prompts": batch.prompts, "responses": batch.responses, "completions": batch.responses, "finished": batch.finished}
    offered = batch.columns | given | options
    for key, parameter in parameters.items():
        if key not in offered and parameter.default is parameter.empty and parameter.kind not in _VARIABLE:
            raise RewardError(
                f"reward {name}: it takes {key!r}, which is neither a column of the data ({', '.join(batch.columns) or 'none'}) "
                f"nor an option; rename the parameter, or add options: {{{key}: …}}"
            )
    rest = offered.keys() - {"responses", "finished"} if open_ended else set()  # TRL's names and the columns
    return function(**{key: value for key, value in offered.items() if key in parameters or key in rest})


def _weight(weight: float, key: str) -> float:
    if not math.isfinite(weight):
        raise UserError(f"{key}: weight {weight} must be a finite number")
    return weight


def _unused(name: str, taken: list[str]) -> str:
    number = 2
    candidate = name
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    return candidate


__all__ = [
    "REWARDS",
    "HostReward",
    "RewardError",
    "checked",
    "final_number",
    "http_reward",
    "load_function",
    "make_reward",
    "run_reward",
]
