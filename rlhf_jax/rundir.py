"""The directory of a run: who may write there, is it the same run, where its text files must end before the run goes on.

LOCK                   held by the running process (flock: the system lets go of it when the process dies), names it
run.json               what makes two runs the same: configuration, hashes of data and models; written atomically
config.resolved.yaml   every key with its value          env.json   versions, devices, command
metrics.jsonl samples.jsonl   appended by metrics.Recorder, which cuts them back to the restored step on resume
"""

import contextlib
import difflib
import errno
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import re
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import yaml

from rlhf_jax import hub, integrity, processes, shelf
from rlhf_jax.errors import UserError, without_secrets

_LOG = logging.getLogger(__name__)
_FORMAT = 1
_LINES = ("metrics.jsonl", "samples.jsonl")
_OURS = ("run.json", "config.resolved.yaml", "env.json", "checkpoints", "summary.json", "report.html", *_LINES)
_OURS_TOO = ("final", "bad-step-")  # final, final-critic, final-ema; dumps of batches
_AROUND = ("tensorboard", "wandb", "profile", ".tracker_id")  # set aside with a run; by themselves they make none
_FREE = ("out", "log", "save", "health", "reward.timeout_s")  # keys that change nothing that is trained
_REPLACED = ("run.json", "config.resolved.yaml", "env.json")  # by every start
_MAY_BE_MENDED = {"reward.functions"}  # a run that stopped at a faulty one goes on with another: told, not refused
_SECRET_NAME = re.compile(r"token|secret|passw|api_?key|credential", re.IGNORECASE)
_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")
_SHOWN = 8


class RunDir:
    """An opened run directory. Close it (or use `with`) to give the lock back."""

    def __init__(self, path: Path, record: dict[str, Any], lock: int | None, before: Mapping[str, str] | None = None):
        """before: what the files that this start has replaced held, by name."""
        self.path, self._record, self._lock, self._before = path, record, lock, before or {}

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def completed_step(self) -> int | None:
        """The step at which the run was completed, exports included; None while it was not, and where `final/` is lost."""
        return self._record.get("completed_step")

    @contextlib.contextmanager
    def unless_refused(self) -> Iterator[None]:
        """What is done here may yet refuse the run: then the record is again that of the start before."""
        try:
            yield
        except UserError:
            with self._writable():
                for name, content in self._before.items():
                    integrity.write_atomically(self.path / name, content)
            raise

    def complete(self, step: int) -> None:
        """Remember that everything is done: training, evaluation, export. What was exported is forced to the disk first."""
        self._record = self._record | {"completed_step": step}
        if self._lock is not None:
            with self._writable():
                for exported in self.path.glob("final*"):
                    integrity.sync_tree(exported)
                integrity.sync_path(self.path)
                _write_record(self.path, self._record)

    def sync(self) -> None:
        """Force metrics.jsonl and samples.jsonl to the disk: before a checkpoint says that their rows need not be made again."""
        with self._writable():
            for path in (self.path / name for name in _LINES):
                if self._lock is not None and path.exists():
                    integrity.sync_path(path)

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def close(self) -> None:
        if self._lock is not None:
            _let_go(self._lock)
            self._lock = None

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_run(
    out: str | os.PathLike[str],
    config_text: str,
    fingerprints: Mapping[str, str],
    *,
    from_scratch: bool = False,
    override: Iterable[str] = (),
    devices: int | None = None,
    say: Callable[[str], None] = _LOG.warning,
) -> RunDir:
    """Make or continue the run in `out`; UserError, before anything expensive, where that cannot be right.

    config_text: the resolved configuration, YAML. fingerprints: {"data": fingerprint(path), "tokenizer": …, "reference": …}.
    override: keys whose difference from the earlier start is accepted. from_scratch: set an earlier run aside (as `earlier-1/`).
    devices: how many there are; another number than before is told (results stay right, bit-equality is off).
    With several processes all call it, process 0 alone touches the directory, and all fail together: also where one of them has
    another configuration or other inputs than process 0, for they would train a mixture of two runs.
    """
    path = Path(out).absolute()
    processes.fail_together(_difference(without_secrets(config_text), dict(fingerprints)))
    opened, message = None, ""
    if processes.is_writer():
        try:
            opened = _open(path, config_text, dict(fingerprints), from_scratch, set(override), devices, say)
        except UserError as error:
            message = str(error)
    processes.fail_together(message)
    completed = processes.from_writer(-1 if opened is None or opened.completed_step is None else opened.completed_step)
    record = {"completed_step": completed if completed >= 0 else None}
    return opened or RunDir(path, record, None)


def fingerprint(source: str | os.PathLike[str] | None) -> str:
    """What is hashed to tell whether an input is still the same: a file, the model files of a directory, a hub name's commit."""
    if source is None:
        return "none"
    path = Path(source)
    if path.is_file():
        return f"file:{integrity.hash_file(path).hash}"
    if path.is_dir():
        names = [file.name for file in path.iterdir() if file.suffix in _MODEL_FILES and file.is_file()]
        entries = integrity.hash_files(path, names)
        return f"directory:{integrity.hash_text(json.dumps(entries, sort_keys=True))}"
    return f"name:{source}{'@' + hub.find(source, weights=False).name if hub.is_name(source) else ''}"


def _difference(config_text: str, fingerprints: dict[str, str]) -> str:
    """What this process has otherwise than process 0, or ""."""
    if jax.process_count() == 1:
        return ""
    mine = _flat(yaml.safe_load(config_text) or {}) | {f"contents of {name}": text for name, text in fingerprints.items()}
    theirs = processes.shared(lambda: mine)
    lines = [
        f"  {key}: {_short(theirs.get(key))} there, {_short(mine.get(key))} here"
        for key in sorted(theirs.keys() | mine.keys())
        if theirs.get(key) != mine.get(key)
    ]
    if not lines:
        return ""
    more = [f"  … {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    first = f"{socket.gethostname()} (process {jax.process_index()}) has another configuration or other inputs than process 0:"
    return "\n".join([first, *lines[:_SHOWN], *more, "Give every process of a run the same command, configuration and files."])


def _open(
    path: Path,
    config_text: str,
    fingerprints: dict[str, str],
    from_scratch: bool,
    override: set[str],
    devices: int | None,
    say: Callable[[str], None],
) -> RunDir:
    config_text = without_secrets(config_text)
    config = yaml.safe_load(config_text) or {}
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(path, say)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        if from_scratch:
            _set_aside(path, say)
        earlier = read_record(path)
        _require_known(override, config, earlier, fingerprints)
        if earlier is not None:
            if _has_results(path, earlier):
                _require_same(path, earlier, config, fingerprints, override)
                _tell_edited(earlier, fingerprints, say)
            _tell_devices(earlier, config, devices, say)
        start = {
            "time": _now(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "devices": devices,
            "override": sorted(override),
        }
        record = (earlier or {"format": _FORMAT, "completed_step": None, "starts": []}) | {
            "config": config,
            "fingerprints": fingerprints,
        }
        same = earlier is None or _flat(earlier["config"]).get("steps") == _flat(config).get("steps")
        completed = record["completed_step"] if same and not _lost_export(path, record, say) else None
        record |= {"starts": [*record["starts"], start], "completed_step": completed}
        before = {name: (path / name).read_text() for name in _REPLACED if earlier and (path / name).is_file()}
        _write_record(path, record)
        integrity.write_atomically(path / "config.resolved.yaml", config_text)
        integrity.write_atomically(path / "env.json", json.dumps(environment(), indent=1) + "\n")
    except OSError as error:
        _let_go(lock)
        raise _unwritable(path, error) from error
    except UserError:
        _let_go(lock)
        raise
    return RunDir(path, record, lock, before)


def _unwritable(path: Path, error: OSError) -> UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "Free disk space, then give the same command again" if full else "Choose a directory that you may write to"
    return UserError(f"out={path}: cannot write there ({error.strerror}: {error.filename or path}). {remedy}.")


def _take_lock(path: Path, say: Callable[[str], None]) -> int:
    """Lock LOCK; UserError with the owner's pid and host where a live process holds it."""
    descriptor = os.open(path / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    owner = _json_object(os.pread(descriptor, 4096, 0))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise UserError(
            f"out={path} is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')} "
            f"since {owner.get('since', '?')} ({path / 'LOCK'}).\nWait for it, end it, or choose another directory with out=…"
        ) from error
    if owner:
        say(f"process {owner.get('pid')} on {owner.get('host')} left {path} without finishing; going on in its place")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}) + "\n"
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)
    return descriptor


def _let_go(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.close(descriptor)


def _json_object(text: bytes) -> dict[str, Any]:
    """The object in a JSON text; empty where it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def read_record(path: Path) -> dict[str, Any] | None:
    """The earlier start's record, None in a new directory; UserError where files of ours lie there without a record."""
    file = path / "run.json"
    if not file.exists():
        strangers = _ours(path)
        if strangers:
            raise UserError(
                f"out={path} holds {', '.join(strangers)} but no run.json: not a run that can be continued.\n"
                "Choose another out=…, or start anew with --from-scratch (moves these files aside, deletes nothing)."
            )
        return None
    record = _json_object(file.read_bytes())
    if record.get("format", _FORMAT) != _FORMAT:
        raise UserError(f"{file} has format {record['format']!r}; this version reads {_FORMAT}")
    if not {"config", "fingerprints", "starts", "completed_step"} <= record.keys():
        raise UserError(f"{file} is damaged. Put back a copy, or start anew with --from-scratch (deletes nothing).")
    return record


def _require_known(
    override: set[str], config: dict[str, Any], earlier: dict[str, Any] | None, fingerprints: dict[str, str]
) -> None:
    known = _flat(config).keys() | fingerprints.keys() | (_flat(earlier["config"]).keys() if earlier else set())
    if unknown := sorted(override - known):
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(
            f"--resume-override {unknown[0]}: no such key{hint}; give keys as the refusal of a changed run names them"
        )


def _has_results(path: Path, record: dict[str, Any]) -> bool:
    """False where no start came so far as to write a row or a checkpoint: then there is nothing that a change could spoil."""
    saved = path / "checkpoints"
    rows = any((path / name).is_file() and (path / name).stat().st_size for name in _LINES)
    return record["completed_step"] is not None or rows or (saved.is_dir() and any(saved.iterdir()))


def _require_same(
    path: Path, earlier: dict[str, Any], config: dict[str, Any], fingerprints: dict[str, str], override: set[str]
) -> None:
    there, here = (
        _flat(keys) | {f"contents of {name}": text for name, text in prints.items() if name not in _MAY_BE_MENDED}
        for keys, prints in ((earlier["config"], earlier["fingerprints"]), (config, fingerprints))
    )
    accepted = override | {f"contents of {name}" for name in override}
    lines, keys = [], []
    for key in sorted(there.keys() | here.keys()):
        if {key, key.split(".")[0]} & {*_FREE, "mesh"} or there.get(key) == here.get(key) or key in accepted:
            continue
        lines.append(f"  {key}: {_short(there.get(key))} there, {_short(here.get(key))} here")
        keys.append(key.removeprefix("contents of "))
    if lines:
        more = [f"  … {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        started = earlier["starts"][0]["time"] if earlier["starts"] else "?"
        remedy = [
            f"Choose a new directory (out={path}-2), give the old values back, start anew with --from-scratch (moves the earlier",
            "run aside), or accept the change (the run is then no longer the one that it would have been) with",
            f"--resume-override {','.join(keys[:_SHOWN])}",
        ]
        raise UserError("\n".join([f"out={path} holds another run, started {started}:", *lines[:_SHOWN], *more, *remedy]))


def _tell_edited(earlier: dict[str, Any], fingerprints: dict[str, str], say: Callable[[str], None]) -> None:
    for name in _MAY_BE_MENDED & earlier["fingerprints"].keys() & fingerprints.keys():
        before, now = earlier["fingerprints"][name], fingerprints[name]
        if before != now:
            say(f"{name}: the file was edited since the run began ({before}, now {now}); from here on the new one counts")


def _lost_export(path: Path, record: dict[str, Any], say: Callable[[str], None]) -> bool:
    """The run is complete but for `final/`, which somebody took away; UserError where no checkpoint is left to write it from."""
    if record["completed_step"] is None or (path / "final").is_dir():
        return False
    if not any(shelf.finished(path / "checkpoints")):
        raise UserError(
            f"out={path} is complete at step {record['completed_step']}, but final/ is gone, and no checkpoint is left "
            "to write it from.\nPut one of them back, or train again with --from-scratch (moves the run aside, deletes nothing)."
        )
    say(f"{path / 'final'} is gone: it is written again from the newest checkpoint")
    return True


def _tell_devices(earlier: dict[str, Any], config: dict[str, Any], devices: int | None, say: Callable[[str], None]) -> None:
    before = earlier["starts"][-1].get("devices") if earlier["starts"] else None
    if earlier["config"].get("mesh") != config.get("mesh") or (devices and before and devices != before):
        say(
            f"other mesh or number of devices than before ({before} devices, now {devices}): the state is resharded to equal "
            "bytes; from here on results agree to rounding, not bit for bit, with a run that never stopped"
        )


def _ours(path: Path) -> list[str]:
    """What a run has written in a directory, run.json first."""
    others = sorted(entry.name for entry in path.iterdir() if entry.name.startswith(_OURS_TOO))
    return [name for name in _OURS if (path / name).exists()] + others


def _set_aside(path: Path, say: Callable[[str], None]) -> None:
    names = _ours(path)
    if not names:
        return
    names += [name for name in _AROUND if (path / name).exists()]
    aside = next(path / f"earlier-{n}" for n in range(1, 10_000) if not (path / f"earlier-{n}").exists())
    aside.mkdir()
    for name in sorted(
        names, key=lambda name: name == "run.json"
    ):  # the record last: a kill in between leaves a run that resumes
        os.rename(path / name, aside / name)
    say(f"the earlier run was moved to {aside}")


def environment() -> dict[str, Any]:
    """Versions, machine, command and the environment variables that steer JAX; secrets blotted out."""
    packages = ("rlhf-jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    steering = ("JAX_", "XLA_", "LIBTPU", "TPU_", "CUDA_VISIBLE", "NCCL_", "RLHF_JAX", "HF_HUB_OFFLINE")
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(steering)}
    return {
        "time": _now(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "command": [_without_secrets(word) for word in sys.argv],
        "versions": versions,
        "variables": {name: "***" if _SECRET_NAME.search(name) else value for name, value in variables.items()},
    }


def _without_secrets(word: str) -> str:
    """A word of the command line without what only its owner should know: `api_token=…`, `https://user:password@host`."""
    name, equals, _ = word.partition("=")
    return f"{name}=***" if equals and _SECRET_NAME.search(name) and "://" not in name else without_secrets(word)


def _write_record(path: Path, record: dict[str, Any]) -> None:
    integrity.write_atomically(path / "run.json", json.dumps(record, indent=1) + "\n")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix.removesuffix("."): json.loads(json.dumps(value))}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.")
    return flat


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 48 else text[:44] + " …"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
