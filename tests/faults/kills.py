"""Kill a run at twenty and more places, resume it after each, and compare it with the run that nobody touched.

A chain is one run: the command is given again after every kill, so that each kill point is resumed from. After each restart the
newest checkpoint must have the digest that the uninterrupted run's checkpoint of the same step has; the end must be equal in
state, exported models, metrics and samples. Kills are SIGKILL inside the process at a chosen call, or from outside at a
random moment.
"""

import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.faults import stages

CHAIN_STEPS = 60

# Where a run can die, in the order of a step. The number is the call that kills, counted from the start of the process.
COMMON = [
    "rlhf_jax.session:open_run:1:after",
    "rlhf_jax.checkpoint:Checkpoints.restore:1:before",
    "rlhf_jax.checkpoint:Checkpoints.restore:1:after",
    "rlhf_jax.metrics:Recorder.log:2:before",
    "rlhf_jax.metrics:Recorder.log:4:after",
    "rlhf_jax.rundir:RunDir.sync:2:before",
    "rlhf_jax.checkpoint:Checkpoints.save:2:before",
    "rlhf_jax.checkpoint:Checkpoints._prepare:2:after",
    "rlhf_jax.checkpoint:Checkpoints.save:2:after",
    "rlhf_jax.checkpoint:Checkpoints._finish:2:before",
    "rlhf_jax.integrity:sync_tree:2:before",
    "rlhf_jax.integrity:write_manifest:2:before",
    "rlhf_jax.integrity:write_manifest:2:after",
    "rlhf_jax.integrity:write_latest:2:before",
    "rlhf_jax.integrity:write_latest:2:after",
    "rlhf_jax.checkpoint:Checkpoints._retire:2:before",
    "rlhf_jax.shelf:delete:1:before",
    "rlhf_jax.shelf:delete:2:after",
    "rlhf_jax.session:Session.settle:2:after",
    "rlhf_jax.session:Session.show:1:before",
]
OFFLINE = ["rlhf_jax.offline:finish:3:before", "rlhf_jax.offline:evaluate:1:before", "rlhf_jax.offline:evaluate:2:after"]
ONLINE = [
    "rlhf_jax.online:reward:2:before",  # the rollout is being sampled
    "rlhf_jax.online:reward:3:after",
    "rlhf_jax.online:finish:3:before",  # the update is being computed
    "rlhf_jax.online:evaluate:1:after",
]
LAST = ["rlhf_jax.build:export:1:before", "rlhf_jax.build:export:1:after", "rlhf_jax.rundir:RunDir.complete:1:before"]


class Result(NamedTuple):
    killed: int
    resumed_exactly: int
    end_is_equal: bool
    notes: list[str]


def points(stage: str, timed: int, seed: int) -> Iterator[str]:
    """Kill points of a chain, those that need the run's end last; `timed` of them at a random moment ("time:SECONDS")."""
    rng = random.Random(seed)  # noqa: S311
    middle = COMMON + (ONLINE if stage == "ppo" else OFFLINE) + [f"time:{rng.uniform(0.0, 0.4):.3f}" for _ in range(timed)]
    rng.shuffle(middle)
    yield from middle
    yield from LAST


def chain(config: Path, stage: str, *, devices: int, kill_points: list[str], say: Callable[[str], None]) -> Result:
    """Run `config` once whole and once killed at every point; both with checkpoints of all even steps."""
    keys = ["save.every=2", f"steps={CHAIN_STEPS}", "log.eval_every=3"]
    whole, broken = config.parent / f"{stage}-whole-{devices}", config.parent / f"{stage}-broken-{devices}"
    for out in (whole, broken):
        shutil.rmtree(out, ignore_errors=True)
    status, text = stages.run(stage, config, f"out={whole}", "save.keep_every=1", *keys, devices=devices)
    assert status == 0, text
    wanted = {int(path.name): digest(path) for path in (whole / "checkpoints").iterdir() if path.name.isdigit()}
    killed, exact, notes = 0, 0, []
    for point in kill_points:
        status = kill_at(point, [stage, config, f"out={broken}", "save.keep_last=2", *keys], devices, broken)
        newest = broken / "checkpoints" / "LATEST"
        step = int(newest.read_text()) if newest.exists() else 0
        good = step == 0 or digest(broken / "checkpoints" / str(step)) == wanted[step]
        killed += status == stages.KILLED
        exact += status == stages.KILLED and good
        verdict = f"{stage} on {devices}: {point}: status {status}, checkpoint {step} {'equal' if good else 'DIFFERENT'}"
        notes += [] if status == stages.KILLED and good else [verdict]
        say(verdict)
    status, text = stages.run(stage, config, f"out={broken}", "save.keep_last=2", *keys, devices=devices)
    assert status == 0, text
    return Result(killed, exact, stages.outcome(broken) == stages.outcome(whole), notes)


def kill_at(point: str, arguments: list[str | Path], devices: int, out: Path) -> int:
    """Start the command and let it die at the point; the exit status (-9 when it did die there)."""
    if not point.startswith("time:"):
        return stages.run(*arguments, point=point, devices=devices)[0]
    before = lines(out / "metrics.jsonl")
    process = stages.start(arguments, devices=devices)
    while process.poll() is None and lines(out / "metrics.jsonl") in (0, before):
        time.sleep(0.005)
    time.sleep(float(point.removeprefix("time:")))
    process.kill()
    return stages.finish(process)[0]


def stops(config: Path, stage: str, *, devices: int, times: int, say: Callable[[str], None]) -> tuple[int, list[str]]:
    """Ask a run to stop at `times` random moments, going on after each; how often nothing was lost and the status was 143."""
    out, rng, good, notes = config.parent / f"{stage}-stopped-{devices}", random.Random(devices), 0, []  # noqa: S311
    shutil.rmtree(out, ignore_errors=True)
    for number in range(times):
        before = lines(out / "metrics.jsonl")
        keys = [f"out={out}", "save.every=50", "steps=1000000", "log.eval_every=0"]
        process = stages.start([stage, config, *keys], devices=devices)
        while process.poll() is None and lines(out / "metrics.jsonl") <= before:
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.5))
        process.terminate()
        status, text = stages.finish(process)
        last = stages.rows(out / "metrics.jsonl")[-1]["step"]
        latest = out / "checkpoints" / "LATEST"
        saved = int(latest.read_text()) if latest.exists() else 0  # asked before the first step there is nothing to save
        told = f"step {saved} is saved" if saved else "nothing new to save"
        fine = status == 143 and saved == last and told in text
        good += fine
        verdict = f"{stage} on {devices}: stop {number + 1}: status {status}, last step {last}, saved {saved}"
        notes += [] if fine else [verdict]
        say(verdict)
    return good, notes


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def digest(path: Path) -> str:
    from tests.digests import read_digest

    return read_digest(path)


def prepare(folder: Path) -> dict[str, Path]:
    """Run files of all stages in `folder`, with the models that the later ones start from."""
    configs = stages.write_configs(folder)
    for stage in ("sft", "reward"):
        status, text = stages.run(stage, configs[stage])
        assert status == 0, text
        keys = yaml.safe_load(configs[stage].read_text())
        configs[stage].write_text(yaml.safe_dump(keys))
    return configs
