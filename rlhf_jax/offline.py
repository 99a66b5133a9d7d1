"""The loop of fine-tuning, reward models and preference optimisation: batches in, one guarded optimiser step each.

    state, metrics = update(state, batch, frozen)         jitted, sharded, donated

A batch is a function of (seed, step); nothing else is random. The metrics of step n - 1 are read while step n runs.
"""

import functools
import time
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import build, health, parallel, processes, scoring, setups
from rlhf_jax.algorithms import reward_model
from rlhf_jax.session import Session, open_session
from rlhf_jax.setups import OfflineSetup
from rlhf_jax.types import Calibration, Labelled, OfflineState, Params, Preferences, Sequences


class Pending(NamedTuple):
    """A step that is dispatched and whose results have not been read."""

    step: int
    metrics: dict[str, jax.Array]
    batch: Sequences | Preferences | Labelled
    began: float


def run(stage: str, settings: Any, *, from_scratch: bool = False, override: Collection[str] = ()) -> Path:
    """Train, evaluate, export; the same call again continues an interrupted run.

    Args:
      stage: "sft", "reward" or another key of `algorithms.OFFLINE`.
      settings: the run file.
      from_scratch: set an earlier run in the same directory aside instead of continuing it.
      override: keys that may differ from the earlier run that is continued.
    Returns: the run's directory. Raises `UserError` for what a user can mend; what was saved stays.
    """
    plan = processes.together(lambda: setups.plan_offline(stage, settings))
    made: list[OfflineSetup] = []

    def restore(checkpoints: Any) -> Any:
        made.append(setups.set_up_offline(plan))
        checkpoints.require_space(made[0].abstract)
        return checkpoints.restore(made[0].abstract)

    with open_session(
        stage, settings, plan.fingerprints, from_scratch=from_scratch, override=override, restore=restore, sizes=plan.sizes
    ) as (session, restored):
        if session.directory.completed_step is not None:
            session.recorder.note(f"{settings.out}: already complete at step {session.directory.completed_step}")
            return Path(settings.out)
        for text in plan.notes:
            session.recorder.note(text)
        setup = made[0]
        state = setup.begin(None if restored is None else restored.state)
        with health.phase("train", setup.components):  # evaluations, and what is only seen when results are read
            state = train(setup, state, session)
        with session.recorder.phase("export"), health.phase("export", setup.components):
            calibration = calibrate(setup, state, session) if stage == "reward" else Calibration()
            head = setups.HEADS.get(stage, "lm")
            out = Path(settings.out) / "final"
            build.export(out, setup.trained, state.trained.params, head=head, tokenizer=plan.tokenizer, calibration=calibration)
        processes.together(lambda: session.directory.complete(settings.steps))
    processes.together(session.show)
    return Path(settings.out)


def train(setup: OfflineSetup, state: OfflineState, session: Session) -> OfflineState:
    """Step from the state's step to the last."""
    settings, recorder, frozen = setup.settings, session.recorder, setup.frozen
    start = int(state.step)
    pending: Pending | None = None
    if start == 0:
        state = evaluate(setup, state, session, 0)
    for step in range(start, settings.steps):
        session.begin(step + 1)
        began = time.perf_counter()
        with recorder.phase("data"):
            batch = setup.place(setup.plan.data.batch(step))
        with recorder.phase("train", step + 1) as until:
            state, metrics = setup.update(state, batch, frozen)
            until(metrics)
            if pending is not None:
                finish(session, pending)
            pending = Pending(step + 1, metrics, batch, began)
        if session.pause_due(step + 1):
            finish(session, pending)
            pending = None
            if session.evaluation_due(step + 1):
                state = evaluate(setup, state, session, step + 1)
            session.settle(step + 1, state)
    return state


def finish(session: Session, pending: Pending) -> None:
    """Read the results of a step and write its row; blocks until the device has computed them."""
    jax.block_until_ready(pending.metrics)
    seconds = time.perf_counter() - pending.began
    masks = parallel.fetch(_masks(pending.batch))
    tokens, slots = sum(int(mask.sum()) for mask in masks), sum(mask.size for mask in masks)
    found = pending.metrics | {"time/step_s": seconds, "throughput/tokens_per_s": tokens / seconds}
    found["data/padded_fraction"] = 1 - tokens / slots
    session.write(pending.step, found, lambda: pending.batch)


def evaluate(setup: OfflineSetup, state: OfflineState, session: Session, step: int) -> OfflineState:
    """Metrics on (at most `log.eval_rows`) held-out rows, each weighted by what it counts; the lowest loss so far."""
    sums, totals = Counter[str](), Counter[str]()
    with session.recorder.phase("evaluate"):
        for batch, _ in setup.plan.data.eval_batches(setup.settings.log.eval_rows):
            session.watchdog.pause()
            found, counts = parallel.fetch(_evaluate(setup, state, batch))
            sums.update({name: float(value) * float(counts[name]) for name, value in found.items()})
            totals.update({name: float(count) for name, count in counts.items()})
    means = {name.replace("/", "/eval_", 1): sums[name] / total for name, total in totals.items() if total}
    if not means:
        return state
    session.recorder.log(step, means)
    loss = next((value for name, value in means.items() if "loss" in name), np.inf)
    return state.replace(best=setup.scalar(min(float(state.best), loss)))


def _evaluate(setup: OfflineSetup, state: OfflineState, batch: Any) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    return setup.evaluate(state.trained.params, setup.frozen, setup.place(batch))


def _masks(batch: Sequences | Preferences | Labelled) -> list[jax.Array]:
    if isinstance(batch, Preferences):
        return [batch.chosen.mask, batch.rejected.mask]
    return [batch.sequences.mask if isinstance(batch, Labelled) else batch.mask]


def calibrate(setup: OfflineSetup, state: OfflineState, session: Session) -> Calibration:
    """Mean and spread of the reward model's scores over both answers of (at most 1024) training pairs.

    Its reliability on all held-out pairs goes to summary.json.
    """
    score = parallel.compile_step(functools.partial(_last_scores, scoring.make_score_apply(setup.trained.model)))
    params, base = state.trained.params, setup.frozen.actor
    data: Any = setup.plan.data

    def scores(batch: Preferences) -> tuple[np.ndarray, ...]:
        sides = (setup.place(batch.chosen), setup.place(batch.rejected))
        return tuple(np.asarray(parallel.fetch(score(params, base, side))) for side in sides)

    batches = max(1, min(1024 // setup.settings.batch_size, setup.settings.steps))
    raw = [each for step in range(batches) for each in scores(data.batch(step))]
    held_out, right = [], []
    for batch, valid in data.eval_batches():
        chosen, rejected = scores(batch)
        held_out.append(chosen[valid])
        right.append(rejected[valid])
    if held_out:
        chosen, rejected = jnp.concatenate(held_out), jnp.concatenate(right)
        bins = jax.device_get(reward_model.calibration_bins(chosen, rejected))
        rows = [
            {"predicted": float(p), "observed": float(q), "count": int(n)}
            for p, q, n in zip(bins.confidence, bins.accuracy, bins.count, strict=True)
            if n
        ]
        numbers = {"accuracy on held-out pairs": float(jnp.mean(chosen > rejected)), "calibration error": float(bins.error)}
        processes.together(functools.partial(session.recorder.summary, calibration=rows, numbers=numbers))
    if not setup.settings.reward_model.calibrate:
        return Calibration()
    return reward_model.calibrate(np.concatenate(raw))


def _last_scores(apply: Callable[..., jax.Array], params: Params, base: Params | None, batch: Sequences) -> jax.Array:
    return reward_model.last_score(apply(params, base, batch), batch.mask)
