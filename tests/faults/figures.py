"""Figures of docs/durability.md that are no row of the matrix: what a manifest costs, equal bytes on other devices, and
whether anything that is not finite gets into the state of a whole PPO update.
"""

import functools
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax import config_file, integrity, setups
from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.config import STAGES
from rlhf_jax.leaves import named_leaves
from rlhf_jax.setups import OnlineSetup
from tests.faults import stages

# In a process of its own, with its own number of devices: write a state drawn from a seed, or restore it, split over all devices.
_RESHARD = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rlhf_jax.checkpoint import Checkpoints
from tests.digests import state_digest

mesh = Mesh(np.asarray(jax.devices()), ("x",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
arrays = {f"w{n}": rng.standard_normal((64, 8 * n)).astype(np.float32) for n in range(1, 9)} | {"step": np.int32(7)}
where = {name: NamedSharding(mesh, PartitionSpec(None, "x") if x.ndim else PartitionSpec()) for name, x in arrays.items()}
state = jax.device_put(arrays, where)
with Checkpoints(sys.argv[1], say=print) as checkpoints:
    if sys.argv[2] == "write":
        checkpoints.save(1, state)
    else:
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), arrays, where)
        state = checkpoints.restore(abstract).state
        assert all(len(x.addressable_shards) == len(jax.devices()) for x in jax.tree.leaves(state))
print(state_digest(state))
"""


class Cost(NamedTuple):
    """Of saving and checking one checkpoint; medians."""

    megabytes: float
    save_s: float  # from the call to the moment at which LATEST names it
    manifest_s: float  # hashing every file and writing manifest.json
    verify_s: float  # before a restore

    @property
    def share(self) -> float:
        return self.manifest_s / self.save_s


def manifest_cost(folder: Path, megabytes: int, times: int) -> Cost:
    """Save a state of this size again and again, and see what part of the time the manifest takes."""
    rng = np.random.default_rng(0)
    state = {f"w{n}": jax.numpy.asarray(rng.standard_normal(megabytes << 14, np.float32)) for n in range(16)}
    spent = [0.0]

    def timed(function: Any) -> Any:
        @functools.wraps(function)
        def wrapped(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments)
            spent[0] += time.perf_counter() - began
            return result

        return wrapped

    rows, names = [], ("hash_files", "write_manifest")
    kept = {name: getattr(integrity, name) for name in names}
    try:
        for name in names:
            setattr(integrity, name, timed(kept[name]))
        with Checkpoints(folder) as checkpoints:
            for step in range(1, times + 2):
                spent[0], began = 0.0, time.perf_counter()
                checkpoints.save(step, state)
                checkpoints.wait()
                saved, manifest, began = time.perf_counter() - began, spent[0], time.perf_counter()
                assert integrity.problems(folder / str(step), step=step) == []
                rows.append((saved, manifest, time.perf_counter() - began))
    finally:
        for name, function in kept.items():
            setattr(integrity, name, function)
    size = sum(leaf.nbytes for leaf in state.values()) / 1e6
    return Cost(size, *(statistics.median(column) for column in zip(*rows[1:], strict=True)))  # the first one warms up


def resharded(folder: Path, writers: int, readers: int) -> bool:
    """A checkpoint written by a process with so many devices, restored by one with others: equal bytes?"""
    digests = []
    for mode, devices in (("write", writers), ("restore", readers)):
        words = [sys.executable, "-c", _RESHARD, str(folder / f"{writers}-{readers}"), mode]
        done = subprocess.run(words, env=stages.environment(devices), capture_output=True, text=True, check=True)
        digests.append(done.stdout.split()[-1])
    return digests[0] == digests[1]


def ppo_setup(folder: Path) -> OnlineSetup:
    """A tiny PPO run with an adaptive KL coefficient, an average and a mixture."""
    path = stages.write_configs(folder)["alone"]
    return setups.set_up_online(setups.plan_online("ppo", config_file.load(path, (), STAGES["ppo"])))


class Injections(NamedTuple):
    """What became of updates with something in them that is not finite."""

    applied: int  # the state holds something that is not finite afterwards, or a row without a finite score taught something
    skipped: int  # updates of which at least one optimiser step was refused
    dropped: int  # updates that went on without the rows that were ill


def inject(setup: OnlineSetup, times: int, seed: int = 0) -> Injections:
    """Whole PPO updates, with NaN or infinity in the scores or in what the models said of a rollout."""
    state, key, rng = setup.initial_state(), jax.random.key(0), np.random.default_rng(seed)
    critic = state.critic.params
    decoding = setup.do["sync"](state.actor.params, setup.frozen.actor)
    rollout = setup.do["rollout"](decoding, setup.place(setup.prompts(0)), key)
    scored = setup.do["score"](state.actor.params, critic, setup.frozen, rollout)
    scores = setup.place(rng.standard_normal(rollout.finished.shape[0]).astype(np.float32))
    before = {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}
    found, chosen = [0, 0, 0], np.argwhere(np.asarray(rollout.action_mask))
    fields = [name for name in ("logprobs", "ref_logprobs", "values", "kl") if getattr(scored, name) is not None]
    for _ in range(times):
        value = rng.choice([np.nan, np.inf, -np.inf]).astype(np.float32)
        name, row, ill_scores, ill = rng.choice(["scores", *fields]), rng.integers(len(chosen)), scores, scored
        everywhere = rng.random() < 0.2
        if name == "scores":
            ill_scores = setup.place(_with(scores, ... if everywhere else chosen[row][0], value))
        else:
            array = setup.place(_with(getattr(scored, name), ... if everywhere else tuple(chosen[row]), value))
            ill = scored.replace(**{name: array})
        fresh = jax.tree.map(lambda leaf: leaf.copy(), state)  # the program donates it
        after, told = setup.do["learn"](fresh, setup.frozen, rollout, ill_scores, ill, key, setup.ptx_batch(0))
        after = {name: np.asarray(leaf) for name, leaf in named_leaves(after).items()}
        broken = [n for n, x in after.items() if n != "best" and not np.isfinite(x.astype(np.float32)).all()]
        if everywhere and float(told["update/skipped"]) == 1.0:
            broken += [n for n, x in after.items() if "params/" in n and x.tobytes() != before[n].tobytes()]
        found[0] += bool(broken)
        found[1] += float(told["update/skipped"]) > 0
        found[2] += float(told["update/skipped"]) == 0
    return Injections(*found)


def _with(array: Any, at: Any, value: np.floating) -> np.ndarray:
    changed = np.array(array)
    changed[at] = value
    return changed
