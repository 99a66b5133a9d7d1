"""Every part of the state is needed: leave one out of a resume and the run is another one."""

import contextlib
import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax import config_file, metrics, online, setups
from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.config import STAGES
from rlhf_jax.leaves import named_leaves
from rlhf_jax.types import RunState
from tests.digests import state_digest
from tests.faults import stages

# What is put back to its start, and whether anything but itself must then be different.
TRAINED_ON = (
    *("step", "actor.params", "actor.opt_state", "critic.params", "critic.opt_state", "kl_coef"),
    *("ema", "best"),  # seen by evaluations: their rows differ
)
COUNTED = ("cursor", "actor.step", "critic.step", "scores", "alarms")


class Run:
    """The loop of PPO without a directory: rows are collected, nothing is saved."""

    def __init__(self, setup: setups.OnlineSetup, last: int):
        settings = dataclasses.replace(setup.settings, steps=last)  # the programs and their schedules stay those of the whole run
        self.setup, self.last = dataclasses.replace(setup, plan=dataclasses.replace(setup.plan, settings=settings)), last

    def go_on(self, state: RunState) -> tuple[RunState, list[dict[str, Any]]]:
        rows: list[dict[str, Any]] = []

        def log(step: int, found: dict[str, Any]) -> dict[str, Any]:
            host = metrics.to_host({name: value for name, value in found.items() if not name.startswith("health/")})
            rows.append(
                {"step": step, **{name: value for name, value in host.items() if not name.startswith(stages.NOT_REPRODUCIBLE)}}
            )
            return host

        @contextlib.contextmanager
        def phase(*_: Any):
            yield lambda array: None

        session = SimpleNamespace(
            recorder=SimpleNamespace(phase=phase, log=log, samples=lambda *_: None),
            write=lambda step, found, dump: log(step, found),
            pause_due=lambda step: step == self.last,
            evaluation_due=lambda step: True,
            settle=lambda step, state: None,
            begin=lambda step: None,
            watchdog=SimpleNamespace(pause=lambda: None),
            owes_evaluation=False,
        )
        state = jax.tree.map(lambda leaf: leaf.copy(), state)  # the loop donates it
        return online.train(self.setup, state, session), rows


@pytest.fixture(scope="module")
def run(tmp_path_factory, on_one_device) -> Run:
    path = stages.write_configs(tmp_path_factory.mktemp("parts"))["alone"]
    keys = ["ppo.ptx_coef=0", "ptx_data=null", "health.entropy_nats=100"]  # an alarm that is on all the time
    settings = config_file.load(path, keys, STAGES["ppo"])
    with on_one_device():
        return Run(setups.set_up_online(setups.plan_online("ppo", settings)), last=4)


@pytest.fixture(scope="module")
def resumed(run, tmp_path_factory) -> tuple[RunState, RunState, RunState, list[dict[str, Any]]]:
    """The start, step 2 as a checkpoint gives it back, and state and rows of the uninterrupted step 4."""
    start = run.setup.initial_state()
    middle, _ = Run(run.setup, last=2).go_on(start)
    middle = middle.replace(best=middle.best + 100.0)  # a best that nothing later reaches, so that it must be remembered
    with Checkpoints(tmp_path_factory.mktemp("checkpoints")) as checkpoints:
        checkpoints.save(2, middle)
        checkpoints.wait()
        restored = checkpoints.restore(run.setup.abstract)
    assert restored is not None
    end, rows = run.go_on(middle)
    return start, restored.state, end, rows


def put_back(state: RunState, start: RunState, part: str) -> RunState:
    owner, _, field = part.partition(".")
    if not field:
        return state.replace(**{owner: getattr(start, owner)})
    return state.replace(**{owner: getattr(state, owner).replace(**{field: getattr(getattr(start, owner), field)})})


def without(state: RunState, part: str) -> dict[str, bytes]:
    return {
        name: np.asarray(leaf).tobytes()
        for name, leaf in named_leaves(state).items()
        if not name.startswith(part.replace(".", "/"))
    }


def test_a_whole_resume_is_the_uninterrupted_run(run, resumed):
    _, middle, end, rows = resumed
    again, rows_again = run.go_on(middle)
    assert state_digest(again) == state_digest(end)
    assert rows_again == rows


def test_the_list_of_parts_is_complete(resumed):
    _, middle, _, _ = resumed
    parts = [part.replace(".", "/") for part in (*TRAINED_ON, *COUNTED, "bad_steps")]
    assert len(parts) >= 12
    missed = [name for name in named_leaves(middle) if not any(name == part or name.startswith(f"{part}/") for part in parts)]
    assert missed == []


@pytest.mark.parametrize("part", [*TRAINED_ON, *COUNTED])
def test_a_resume_without_one_part_is_another_run(run, resumed, part):
    start, middle, end, rows = resumed
    state = put_back(middle, start, part)
    if part == "step":
        state = state.replace(step=state.step + 1)  # a step less to go; from 0 it would train four more
    again, rows_again = run.go_on(state)
    assert state_digest(again) != state_digest(end)
    if part in TRAINED_ON:
        assert rows_again != rows or without(again, part) != without(end, part)


def test_a_resume_without_the_count_of_bad_steps_stops_too_late(run, resumed):
    """The count ends with an update that is well, so the two that follow are made not to be."""
    _, middle, _, _ = resumed
    poison = middle.actor.replace(params=jax.tree.map(lambda leaf: leaf * np.float32(np.nan), middle.actor.params))
    ill = middle.replace(actor=poison, bad_steps=middle.bad_steps + 1)
    counts = [int(run.go_on(state)[0].bad_steps) for state in (ill, ill.replace(bad_steps=middle.bad_steps))]
    assert counts == [3, 2]
