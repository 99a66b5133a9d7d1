"""The whole state of a run on disk: saved while training goes on, verified before it is believed, restored on any mesh.

A checkpoint is one directory:

    checkpoints/LATEST              "30\n": the newest finished checkpoint, replaced atomically
    checkpoints/30/state/           every array, written by Orbax, sharded, by all processes
    checkpoints/30/checkpoint.json  names, types and shapes of the arrays; the loop's own JSON ("extra")
    checkpoints/30/manifest.json    size and hash of every file (integrity.py)

Order of a save: copy to the host -> Orbax writes `30.partial/` in the background -> everything is forced to the disk -> manifest
-> `30.partial` becomes `30` -> LATEST -> older checkpoints are retired. A kill between any two loses at most the save itself.
"""

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from rlhf_jax import integrity, processes, shelf
from rlhf_jax.errors import UserError
from rlhf_jax.leaves import leaf_specs, named_leaves, nest, parse_spec, unnest
from rlhf_jax.shelf import size_text

_LOG = logging.getLogger(__name__)
_DATA_FILE_BYTES = 64 << 20  # several files, so that several threads can hash one checkpoint
_PART_TIMEOUT_S = 1200.0


class Restored(NamedTuple):
    state: Any  # the pytree, on the shardings that were asked for
    extra: dict[str, Any]  # what the loop saved beside it
    step: int


class Checkpoints:
    """The checkpoints of one run, below `directory`. At most one save is in flight; all processes call every method."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        say: Callable[[str], None] = _LOG.warning,
    ):
        """The keep_last newest survive, and those at multiples of keep_every for good; `say` gets what a user must know."""
        if keep_last < 1:
            raise UserError(f"save.keep_last is {keep_last}: keep at least 1 checkpoint")
        if keep_every is not None and keep_every < 1:
            raise UserError(f"save.keep_every is {keep_every}: give a number of steps >= 1, or null")
        logging.getLogger("absl").addFilter(_not_twice)
        self.directory = Path(directory).absolute()
        self._keep_last, self._keep_every, self._say = keep_last, keep_every, say
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, int, Future[None]] | None = None
        self._newest: int | None = None  # written or restored by this process
        self._swept = False

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first, unverified."""
        return [step for step, _ in sorted(shelf.finished(self.directory))]

    def require_space(self, state: Any) -> None:
        """UserError unless one more checkpoint of `state` (arrays or shapes) fits on the disk. Call it before compiling."""
        processes.fail_together(self._shortage(_bytes_of(state)) if processes.is_writer() else "")

    def save(self, step: int, state: Any, extra: dict[str, Any] | None = None, *, replace: bool = False) -> None:
        """Start to save; returns once `state` may be donated. First raises what went wrong with the save before.

        Rows of metrics and samples up to `step` must be on the disk before this call: a resumed run starts after `step`.
        replace: another state than the newest checkpoint's, of the same step.
        """
        self.wait()
        if step == self._newest and not replace:
            return
        self._sweep()
        leaves = named_leaves(state)
        description = _describe(step, leaves, extra or {})
        size = _bytes_of(state)
        processes.fail_together(self._prepare(step, size, description, replace) if processes.is_writer() else "")
        processes.barrier(f"checkpoint-{step}-prepared")
        context = ocp.Context()
        context.array.saving.ocdbt_target_data_file_size = _DATA_FILE_BYTES
        with context:
            response = ocp.save_async(str(self.directory / f"{step}{shelf.PARTIAL}" / "state"), nest(leaves))
        self._saving = (step, size, self._worker.submit(self._finish, step, response))

    def check(self) -> None:
        """Raise now if the save in flight has failed already: for every step of the loop. One process only; else see `wait`."""
        if self._saving and self._saving[2].done() and jax.process_count() == 1:
            self.wait()

    def wait(self) -> None:
        """Block until the save in flight is safe on the disk; UserError, on every process, where it is not."""
        if self._saving is None:
            return
        (step, size, future), self._saving = self._saving, None
        error = future.exception()
        message = self._explain(step, size, error) if error is not None else ""
        if message:
            self._discard_partial(step)
            if not processes.is_writer():
                _LOG.error(message)  # the others may stand in the save, waiting for this one, until the watchdog ends them
        processes.fail_together(message)
        self._newest = step

    def close(self) -> None:
        """Wait, then stop the background thread."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:  # the first error is the one to see: a save in flight is finished, its own failure is only told
            if self._saving and (late := self._saving[2].exception()) is not None:
                self._say(self._explain(self._saving[0], self._saving[1], late))
            self._worker.shutdown()

    def restore(self, abstract: Any) -> Restored | None:
        """Newest checkpoint whose every byte is right, placed on the shardings of `abstract`; None where there is none at all.

        abstract: the state's pytree of jax.ShapeDtypeStruct with shardings (or arrays), for any mesh. Newer checkpoints that are
        damaged are told, set aside as `<step>.broken` and never loaded. UserError when every one is damaged, or does not fit.
        What a kill left undone after the last save is done: LATEST, the retirement of older ones.
        """
        self._sweep()
        step, message = self._choose() if processes.is_writer() else (-1, "")
        processes.fail_together(message)
        step = processes.from_writer(step)
        if step < 0:
            return None
        restored = _load(self.directory / str(step), step, abstract)
        self._newest = step
        processes.fail_together(self._settle(step) if processes.is_writer() else "")
        return restored

    def _choose(self) -> tuple[int, str]:
        """The step to restore (-1: none), or a message that stops the run."""
        latest = integrity.read_latest(self.directory, self._say) if self.directory.is_dir() else None
        broken: list[tuple[Path, str]] = []
        for step, path in sorted(shelf.finished(self.directory), reverse=True):
            found = integrity.problems(path, step=step)
            if not found:
                self._set_aside(broken, step)
                if latest is not None and latest > step and not broken:
                    self._say(f"LATEST names checkpoint {latest}, which is gone; going on from checkpoint {step}")
                return step, ""
            broken.append((path, f"{found[0]}" + (f" (and {len(found) - 1} more files)" if len(found) > 1 else "")))
        remedy = "Put back a copy of one, or start anew with --from-scratch (sets the old run aside). Nothing was deleted."
        if broken:
            lines = [f"no checkpoint in {self.directory} can be trusted:", *(f"  {text}" for _, text in broken[:8])]
            return -1, "\n".join([*lines, *([f"  … {len(broken) - 8} more"] if len(broken) > 8 else []), remedy])
        if latest is not None:
            return -1, f"{self.directory}/{integrity.LATEST} names checkpoint {latest}, but no checkpoint is there.\n{remedy}"
        return -1, ""

    def _set_aside(self, broken: list[tuple[Path, str]], good: int) -> None:
        for path, text in broken:
            aside = shelf.free_name(path, shelf.BROKEN)
            path.rename(aside)
            self._say(
                f"checkpoint {path.name} is damaged: {text}. Kept as {aside.name}, not used; falling back to checkpoint {good}"
            )

    def _settle(self, step: int) -> str:
        """A message where LATEST cannot be written, or older checkpoints cannot be retired."""
        try:
            integrity.write_latest(self.directory, step)
            self._retire()
        except OSError as error:
            return f"{error.filename or self.directory} cannot be written: {error.strerror}. {self._what_is_left()}"
        return ""

    def _sweep(self) -> None:
        """Once: remove what interrupted saves and deletions left behind, and say so."""
        if self._swept:
            return
        self._swept = True
        if not processes.is_writer() or not self.directory.is_dir():
            return
        shelf.settle_replaced(self.directory)
        for path in shelf.leftovers(self.directory):
            if shelf.delete(path):
                what = "a save that was interrupted" if path.suffix == shelf.PARTIAL else "a deletion that was interrupted"
                self._say(f"removed {path}: left over from {what}")

    def _shortage(self, size: int) -> str:
        folder = next(parent for parent in (self.directory, *self.directory.parents) if parent.exists())
        free, needed = shutil.disk_usage(folder).free, int(size * 1.05) + (1 << 20)
        if free >= needed:
            return ""
        return (
            f"{folder} has {size_text(free)} free and a checkpoint needs {size_text(needed)}.\n"
            f"Free at least {size_text(needed - free)}, choose another disk with out=…, or lower save.keep_last "
            f"({self._keep_last} now). {self._what_is_left()}"
        )

    def _what_is_left(self) -> str:
        steps = self.steps()
        return f"Checkpoint {steps[-1]} is intact." if steps else "There is no older checkpoint."

    def _prepare(self, step: int, size: int, description: str, replace: bool = False) -> str:
        """Make `<step>.partial` with marker and description; a message where that fails."""
        if message := self._shortage(size):
            return message
        final, partial = self.directory / str(step), self.directory / f"{step}{shelf.PARTIAL}"
        try:
            if final.exists() and replace:
                final.rename(final.with_suffix(shelf.REPLACED))
            elif final.exists():
                aside = shelf.free_name(final, shelf.BROKEN)
                final.rename(aside)
                self._say(f"{final} was not the checkpoint this run started from; kept as {aside.name}")
            if partial.exists():
                shelf.delete(partial)
            shelf.delete_parts(self.directory)
            partial.mkdir(parents=True)
            (partial / shelf.MARKER).write_text(shelf.MARKER_TEXT)
            (partial / shelf.DESCRIPTION).write_text(description)
        except OSError as error:
            return f"{error.filename or partial} cannot be written: {error.strerror}. {self._what_is_left()}"
        return ""

    def _finish(self, step: int, response: Any) -> None:
        """In the background, after Orbax: hash, force to disk, publish, retire."""
        response.result()
        partial, final = self.directory / f"{step}{shelf.PARTIAL}", self.directory / str(step)
        mine = [name for name in integrity.list_files(partial) if _owner(name) == jax.process_index()]
        for name in mine:
            integrity.sync_path(partial / name)
        files = integrity.hash_files(partial, mine)
        if not processes.is_writer():
            integrity.write_atomically(shelf.part(self.directory, step, jax.process_index()), json.dumps(files))
            return
        for process in range(1, jax.process_count()):
            files |= _await_part(shelf.part(self.directory, step, process))
        integrity.sync_tree(partial)
        integrity.write_manifest(partial, step, files)
        partial.rename(final)
        integrity.sync_path(self.directory)
        integrity.write_latest(self.directory, step)
        self._retire()

    def _retire(self) -> None:
        shelf.settle_replaced(self.directory)
        steps = self.steps()
        kept = set(steps[-self._keep_last :]) | {step for step in steps if self._keep_every and step % self._keep_every == 0}
        for step in set(steps) - kept:
            doomed = shelf.free_name(self.directory / str(step), shelf.RETIRED)
            (self.directory / str(step)).rename(doomed)
            shelf.delete(doomed)

    def _discard_partial(self, step: int) -> None:
        with contextlib.suppress(OSError):  # threads of the failed save may still be writing; the next start sweeps
            if processes.is_writer():
                shelf.delete(self.directory / f"{step}{shelf.PARTIAL}")

    def _explain(self, step: int, size: int, error: BaseException) -> str:
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        full = "No space left" in str(error) or getattr(error, "errno", None) == 28
        remedy = f"Free {size_text(int(size * 1.05))} (the disk is full), " if full else "Make the directory writable, "
        again = "then give the same command again."
        written = step in self.steps()
        done = "is written, but not what follows it (LATEST, the removal of older ones)," if written else "could not be written"
        return f"checkpoint {step} {done} below {self.directory}: {cause}\n{remedy}{again} {self._what_is_left()}"


def _not_twice(record: logging.LogRecord) -> bool:
    """False for Orbax's own account of an error in a save, a traceback a thread: the error itself is handed to us, and told."""
    return record.levelno < logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname


def read(path: Path) -> dict[str, np.ndarray]:
    """Arrays of one checkpoint directory on the host, by name ("actor/params/…"), on one device, without the run's model."""
    path = path.absolute()  # what Orbax asks for
    description = json.loads((path / shelf.DESCRIPTION).read_text())
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=here)
        for name, (dtype, shape) in ((name, parse_spec(spec)) for name, spec in description["leaves"].items())
    }
    return {name: np.asarray(leaf) for name, leaf in unnest(ocp.load(str(path / "state"), nest(wanted))).items()}


def _describe(step: int, leaves: dict[str, Any], extra: dict[str, Any]) -> str:
    content = {
        "format": shelf.FORMAT,
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "leaves": leaf_specs(leaves),
        "extra": extra,
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _load(path: Path, step: int, abstract: Any) -> Restored:
    description = json.loads((path / shelf.DESCRIPTION).read_text())
    leaves = named_leaves(abstract)
    _require_fit(path, description["leaves"], leaf_specs(leaves))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)
        for name, leaf in leaves.items()
    }
    loaded = unnest(ocp.load(str(path / "state"), nest(wanted)))
    state = jax.tree.unflatten(jax.tree.structure(abstract), [loaded[name] for name in leaves])
    return Restored(state, description["extra"], step)


def _require_fit(path: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    different = [name for name in sorted(saved.keys() | wanted.keys()) if saved.get(name) != wanted.get(name)]
    if different:
        lines = [
            f"  {name}: saved {saved.get(name, 'nothing')}, this run has {wanted.get(name, 'nothing')}" for name in different[:5]
        ]
        more = f"\n  … {len(different) - 5} more" if len(different) > 5 else ""
        raise UserError(
            f"{path} does not fit this run; {len(different)} arrays differ:\n" + "\n".join(lines) + more + "\n"
            "Use the configuration that the run was started with, or another out=…; nothing was changed."
        )


def _owner(name: str) -> int:
    """The process that wrote a file and so has it in its memory: Orbax puts process i's data below `ocdbt.process_i`."""
    if jax.process_count() == 1:
        return 0
    for part in name.split("/"):
        number = part.removeprefix("ocdbt.process_")
        if part != number and number.isdigit() and int(number) < jax.process_count():
            return int(number)
    return 0


def _await_part(path: Path) -> dict[str, integrity.Entry]:
    deadline = time.monotonic() + _PART_TIMEOUT_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not appear: is the run directory on a file system that all machines share?")
        time.sleep(0.02)
    entries = {name: integrity.Entry(*entry) for name, entry in json.loads(path.read_text()).items()}
    path.unlink()
    return entries


def _bytes_of(state: Any) -> int:
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in named_leaves(state).values())
