"""Is the run well? Alarms from metrics, the end after updates that are not finite, a watchdog, and out-of-memory explained.

`advance_alarms` is a pure function of arrays for inside the jitted step, so the counters are part of the state and resume
with it. Everything else runs on the host and decides from numbers that were fetched anyway.
"""

import contextlib
import faulthandler
import logging
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.config import Health
from rlhf_jax.errors import EXIT_STALLED, UserError
from rlhf_jax.leaves import named_leaves

_LOG = logging.getLogger(__name__)

# name -> what it means and what to try, {stage} being the group of the algorithm's keys; the order is that of RunState.alarms
ALARMS = {
    "kl": "the policy is far from the reference; raise {stage}.kl_coef or lower actor_optimizer.learning_rate",
    "ratio": "an update moves the policy too far; lower actor_optimizer.learning_rate or {stage}.epochs",
    "entropy": "the policy has become almost deterministic; raise {stage}.entropy_coef or lower the learning rate",
    "score_spread": "all answers of a batch get the same score, so there is nothing to learn; look at the reward",
    "eos": "no answer ends by itself; train on answers that end, raise sampling.max_new_tokens or set {stage}.missing_eos",
    "length": "every answer is as long as allowed; raise sampling.max_new_tokens or penalise missing end-of-sequence",
}
_KEYS_TO_LOWER = {
    "rollout": ("batch_size", "sampling.max_new_tokens", "data.max_prompt_tokens"),
    "score": ("score_parts (raise it)", "model.logprob_chunk", "batch_size"),
    "update": ("{stage}.micro_batches (raise it)", "model.remat (full)", "model.logprob_chunk"),
    "train": ("micro_batches (raise it)", "model.remat (full)", "data.max_tokens"),
    "load": ("model.param_dtype (bfloat16)", "mesh.fsdp (more devices)", "model.lora"),
    "export": ("model.lora", "model.param_dtype (bfloat16)", "mesh.fsdp (more devices)"),
}


def advance_alarms(alarms: jax.Array, metrics: Mapping[str, jax.Array], limits: Health, *, max_new_tokens: int) -> jax.Array:
    """How many steps in a row each alarm's condition has held: alarms i32[6] -> i32[6]. A metric that is absent raises none.

    A metric that is not finite neither raises an alarm nor ends one: what is not finite has its own counter.
    """
    if alarms.shape != (len(ALARMS),):
        raise ValueError(f"alarms have shape {alarms.shape}, ({len(ALARMS)},) expected: {', '.join(ALARMS)}")

    def test(name: str, condition: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
        if name not in metrics:
            return jnp.asarray(False), jnp.asarray(True)
        value = jnp.asarray(metrics[name])
        return condition(value), jnp.isfinite(value)

    low = test("policy/ratio_mean", lambda x: x < 1.0 / limits.ratio)
    high = test("policy/ratio_max", lambda x: x > limits.ratio)
    states = (
        test("kl/per_sequence_nats", lambda x: x > limits.kl_nats),
        (low[0] | high[0], low[1] & high[1]),
        test("policy/entropy_nats", lambda x: x < limits.entropy_nats),
        test("reward/score_std", lambda x: x <= limits.score_std),
        test("response/eos_rate", lambda x: x <= 0.0),
        test("response/length_tokens", lambda x: x >= max_new_tokens),
    )
    on, known = (jnp.stack(flags) for flags in zip(*states, strict=True))
    return jnp.where(known, jnp.where(on, alarms + 1, 0), alarms).astype(alarms.dtype)


def alarm_messages(alarms: Any, limits: Health, stage: str) -> list[str]:
    """What to tell now: an alarm speaks when its condition has held `patience` steps, and again after 10, 100, … times that."""
    tell = [limits.patience * 10**power for power in range(6)]
    return [
        f"alarm {name}, for {int(count)} steps: {advice.format(stage=stage)}"
        for count, (name, advice) in zip(np.asarray(alarms), ALARMS.items(), strict=True)
        if int(count) in tell
    ]


def skip_message(skipped: int) -> str | None:
    """What to tell of the `skipped`-th skipped update since the start: of the first, the 10th, the 100th, ….

    The counter in the state forgets what was skipped before an update that was finite: single bad rows never end a run.
    """
    if skipped not in (10**power for power in range(6)):
        return None
    return (
        f"an update was skipped ({skipped} since the start), for its loss or gradient was not finite (update/skipped); "
        "look at the data and the reward, or lower the learning rate"
    )


def require_finite_steps(bad_steps: int, limits: Health, dump: Callable[[], Path], *, step: int) -> None:
    """UserError once `bad_steps` updates in a row were skipped; `dump` writes the batch and returns its file."""
    if bad_steps < limits.max_bad_steps:
        return
    try:
        batch = f"The last batch is in {dump()} (numpy.load)."
    except OSError as error:
        batch = f"The last batch could not be written ({error.strerror})."
    raise UserError(
        f"step {step}: loss or gradient was not finite in {bad_steps} updates in a row; none of them touched the parameters.\n"
        f"{batch} Lower the learning rate or clip_norm, or look at the reward and the data;\n"
        "the newest checkpoint is from before, and the same command with the changed key and --resume-override continues from it."
    )


def dump_arrays(path: Path, tree: Any) -> Path:
    """Write a pytree's arrays by name as .npz, without pickle; bfloat16 becomes float32, which holds it exactly."""
    arrays = {}
    for name, leaf in named_leaves(tree).items():
        array = np.asarray(leaf)
        array = array.astype(np.float32) if array.dtype.kind == "V" else array
        if array.dtype.hasobject:
            raise ValueError(f"{name} holds Python objects; only arrays of numbers are dumped")
        arrays[name] = array
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("wb") as file:
            np.savez(file, **arrays)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return path


class Watchdog:
    """Prints every thread's stack when a step takes far longer than the others; ends the process when it never ends.

    `beat()` after each step. The first step after `pause()` (compilation, evaluation) is not timed against the median.
    """

    def __init__(self, limits: Health, *, say: Callable[[str], None] = _LOG.warning, leave: Callable[[int], Any] = os._exit):
        self._limits, self._say, self._leave = limits, say, leave
        self._durations: deque[float] = deque(maxlen=100)
        self._since, self._step, self._timed, self._told = time.monotonic(), 0, False, False
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._since = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def beat(self, step: int) -> None:
        """Step `step` is finished."""
        now = time.monotonic()
        with self._lock:
            if self._timed:
                self._durations.append(now - self._since)
            self._since, self._step, self._timed, self._told = now, step, True, False

    def pause(self) -> None:
        """What follows until the next beat is no ordinary step: compilation, evaluation, saving at the end."""
        with self._lock:
            self._since, self._timed, self._told = time.monotonic(), False, False

    def allowed_s(self) -> float | None:
        """Seconds after which the present step counts as stalled; None while there is nothing to compare with."""
        if not self._timed or len(self._durations) < 3:
            return None
        return max(self._limits.stall_s, self._limits.stall_factor * statistics.median(self._durations))

    def _watch(self) -> None:
        tick = min(1.0, self._limits.stall_s / 4, self._limits.exit_s / 4 or 1.0)
        while not self._over.wait(tick):
            with self._lock:
                waited, allowed, step, told = time.monotonic() - self._since, self.allowed_s(), self._step, self._told
            if allowed is not None and waited > allowed and not told:
                self._told = True
                self._say(
                    f"step {step + 1} has taken {waited:.0f} s, {allowed:.0f} s would be long; the stacks of all threads follow"
                )
                faulthandler.dump_traceback(all_threads=True)
            if self._limits.exit_s and waited > self._limits.exit_s:
                os.write(2, f"nothing finished for {waited:.0f} s after step {step}: giving up (health.exit_s). ".encode())
                os.write(2, b"Older checkpoints are intact; the same command goes on from the newest.\n")
                self._leave(EXIT_STALLED)
                return


@contextlib.contextmanager
def phase(name: str, components: Callable[[], Mapping[str, Any]] = dict, *, stage: str = "") -> Iterator[None]:
    """Work of one kind ("load", "rollout", "score", "update", "train", "export"); running out of memory becomes a UserError.

    components: makes {"actor": pytree or bytes, …}, called only when memory has run out.
    stage: group of the algorithm's keys, which the message about an "update" names.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(out_of_memory_message(name, error, components(), stage)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """XLA reports it as RESOURCE_EXHAUSTED; the host as MemoryError."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)


def out_of_memory_message(name: str, error: BaseException, components: Mapping[str, Any], stage: str) -> str:
    """Phase, bytes per device of each component, largest first, and three keys in the order in which to lower them."""
    sizes = sorted(((bytes_per_device(part), label) for label, part in components.items()), reverse=True)
    lines = [f"  {label}: {size / 1e9:.2f} GB" for size, label in sizes[:8]]
    keys = ", ".join(_KEYS_TO_LOWER[name]).format(stage=stage)
    held = [f"resident on each device ({sum(size for size, _ in sizes) / 1e9:.2f} GB):", *lines] if sizes else []
    return "\n".join(
        [
            f"out of memory in phase {name}: {' '.join(str(error).split())[:160]}",
            *held,
            f"Lower, in this order: {keys}. `rlhf-jax fit CONFIG` tells beforehand what fits.",
        ]
    )


def bytes_per_device(part: Any) -> int:
    """Bytes that a pytree of arrays (or shapes) keeps on one device; a number is taken as bytes."""
    if isinstance(part, int | float):
        return int(part)
    total = 0
    for leaf in jax.tree.leaves(part):
        sharding = getattr(leaf, "sharding", None)
        shape = sharding.shard_shape(leaf.shape) if sharding is not None else leaf.shape
        total += int(np.prod(shape)) * np.dtype(leaf.dtype).itemsize
    return total
