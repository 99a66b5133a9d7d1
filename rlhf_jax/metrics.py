"""What a run writes down: a JSON line a step, the samples, a summary; and one line on the terminal.

    metrics.jsonl   {"stage", "step", "time_s", "<group>/<name>_<unit>": number | null, "not_finite": [names], "alarms": [texts]}
    samples.jsonl   {"stage", "step", "index", "prompt", "response", "score", "gold", "kl_nats", "length_tokens", "finished"}
    summary.json    {"stage", "status", "step", "total_steps", "wall_s", "phases": [...], "peak_rss_mb", ...}

`step` counts finished iterations: 0 is the model before training. Every line goes to the file in one write, so that a run
that is killed leaves at most one torn line, which readers skip and a continued run removes.
"""

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf_jax import trackers
from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.progress import ProgressLine, duration
from rlhf_jax.stopwatch import Stopwatch

METRICS, SAMPLES, SUMMARY = "metrics.jsonl", "samples.jsonl", "summary.json"


def to_host(metrics: Mapping[str, Any]) -> dict[str, float | int]:
    """Device scalars as Python numbers, in one transfer. Blocks until they are computed.

    Args:
      metrics: "group/name_unit" -> number or array with one element, on any device.
    Raises:
      ValueError: a value holds more than one element.
    """
    if any(not isinstance(value, bool | int | float) for value in metrics.values()):
        import jax

        metrics = jax.device_get(dict(metrics))
    host: dict[str, float | int] = {}
    for name, value in metrics.items():
        if getattr(value, "size", 1) != 1:
            raise ValueError(f"metric {name!r} has shape {value.shape}; a metric is one number: reduce it before logging")
        host[name] = value.item() if hasattr(value, "item") else value
    return host


def as_row(stage: str, step: int, metrics: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """One line of a file: floats to six digits; NaN and infinities as null, their names under "not_finite"."""
    row: dict[str, Any] = {"stage": stage, "step": int(step)}
    broken = []
    for name, value in {**more, **metrics}.items():
        if hasattr(value, "item"):
            value = value.item()
        if isinstance(value, float):
            if not math.isfinite(value):
                broken.append(name)
            value = float(f"{value:.6g}") if math.isfinite(value) else None
        row[name] = value
    return row | ({"not_finite": broken} if broken else {})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, without torn or foreign lines; a file that does not exist has none."""
    return [row for _, row in _lines(path) if row is not None]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Every line of a file with its row, one at a time; None where it is none."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            row = None
            with contextlib.suppress(ValueError):
                row = json.loads(line)
            yield line, row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _without(path: Path, dropped: Collection[int]) -> Iterator[bytes]:
    """The lines of a file but those of these numbers, each with its end."""
    with path.open("rb") as file:
        yield from (line.removesuffix(b"\n") + b"\n" for number, line in enumerate(file) if number not in dropped)


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json of a run directory; empty when there is none yet."""
    path = run_dir / SUMMARY
    with contextlib.suppress(ValueError, OSError):
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
    return {}


def write_atomic(path: Path, content: str | Iterable[bytes]) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part."""
    pieces = [content.encode()] if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with _explained(path):
        try:
            with partial.open("wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes there, KiB on Linux


def peak_device_mb() -> float | None:
    """Largest memory in use on any local device so far, in MB; None where the backend does not say (CPU)."""
    if "jax" not in sys.modules:
        return None
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    return max(peaks) / 1e6 if peaks else None


class Recorder:
    """The run's pen. Open it when the run directory exists; use it as a context manager.

    Args:
      run_dir: directory of the run, exists.
      stage: "sft", "reward", "ppo", ...; the first column of every row.
      total_steps: iterations that the run will have.
      backends: more places for metrics, of `config.Log.backends`; one that cannot be used is named and left out.
      console: draw the progress line (process 0 only).
      resume_step: finished iterations of the checkpoint that the run continues from: later rows are removed, earlier ones
        kept and not written again. None: a new run, rows of an earlier attempt are removed.
      every: steps between the rows that the run writes (0: none): where it continues, earlier ones that are missing are told.
      process: index of this process among the hosts; default: asks JAX, which then starts its backend.
      config: the resolved configuration, for the backends.
    Only process 0 writes and draws; `log` converts on every process, so that all may branch on what it returns.
    """

    def __init__(
        self,
        run_dir: Path | str,
        stage: str,
        *,
        total_steps: int,
        backends: Sequence[str] = (),
        console: bool = True,
        resume_step: int | None = None,
        every: int = 0,
        process: int | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        several = False
        if process is None:
            import jax

            process, several = jax.process_index(), jax.process_count() > 1
        self.run_dir, self.stage, self.total_steps = Path(run_dir), stage, total_steps
        self._writes, self._several = process == 0, several
        self.failed = ""  # with several processes: why a row could not be written; the loop stops all of them together
        self._held = -1 if resume_step is None else resume_step  # rows up to this step are in the files already
        self._step = max(self._held, 0)
        self._phases: dict[str, dict[str, Any]] = {}
        self._extra: dict[str, Any] = {}
        self._open_phases: list[tuple[str, list[bool]]] = []  # name; not empty: the device's time counts, not the host's
        self._stopwatch = Stopwatch()
        self._before_s = 0.0  # seconds that the run took before it was continued
        removed, lost = self._prepare_files(every) if self._writes else ([], [])
        self._mark = self._began = time.monotonic()
        self._line = ProgressLine(stage, total_steps) if self._writes and console else None
        if removed and resume_step is None:
            told = f"no checkpoint to go on from: begins at step 0, without the rows written before (up to step {max(removed)})"
            self.note(f"{self.run_dir}: {told}")
        for text in lost:
            self.note(text)
        self._trackers: list[trackers.Tracker] = []
        if self._writes:
            self._trackers = trackers.start(backends, self.run_dir, stage, config or {}, self.note, resume_step=resume_step)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        asked = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit | Stopped)
        status = "finished" if kind is None else "interrupted" if asked else "failed"
        try:
            self.close(status)
        except UserError:
            if kind is None:  # else the first error is the one to see: the disk that holds no summary is full since then
                raise

    def log(self, step: int, metrics: Mapping[str, Any], *, alarms: Sequence[str] = ()) -> dict[str, float | int]:
        """Append one row to metrics.jsonl and the backends; returns the metrics as Python numbers.

        Give it the arrays of step n - 1 while the device computes step n: this call is where the host waits. `alarms`: what
        was told of the step; the report shows it.
        """
        host = to_host(metrics)
        self._step = max(self._step, int(step))
        if self._writes and step > self._held:
            memory = {"memory/peak_mb": peak_rss_mb()}
            device = peak_device_mb()
            if device is not None:
                memory["memory/device_peak_mb"] = device
            spent = {f"time/{name.replace(' ', '_')}_s": seconds for name, seconds in self._stopwatch.take(int(step)).items()}
            row = as_row(self.stage, step, memory | spent | host, time_s=round(self.elapsed_s(), 3))
            row |= {"alarms": list(alarms)} if alarms else {}
            self._append(METRICS, [row])
            numbers = {name: value for name, value in row.items() if "/" in name and value is not None}
            self._trackers = [tracker for tracker in self._trackers if tracker.log(step, numbers)]
        return host

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append answers to the fixed evaluation prompts to samples.jsonl (columns: see the top of this page)."""
        if self._writes and step > self._held:
            self._append(SAMPLES, [as_row(self.stage, step, row) for row in rows])

    def progress(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Redraw the progress line with the metrics of a finished step."""
        if self._line is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in to_host(metrics).items()}
            self._line.update(step, finite)

    def make_up(self, step: int) -> None:
        """The evaluation of step `step`, from which the run continues, had failed: its rows go and it is made again."""
        self._held = step - 1
        for name in (METRICS, SAMPLES) if self._writes else ():
            path, owed = self.run_dir / name, set()
            for number, (_, row) in enumerate(_lines(path)):
                if row is None or (row.get("stage"), row["step"]) != (self.stage, step):
                    continue
                if name == SAMPLES or any(key.startswith("eval") for key in row):
                    owed.add(number)
            if owed:
                write_atomic(path, _without(path, owed))

    def note(self, text: str) -> None:
        """A line on the terminal that stays: a warning, a result."""
        if self._line is not None:
            self._line.note(text)

    @contextlib.contextmanager
    def phase(self, name: str, step: int | None = None) -> Iterator[Callable[[Any], None]]:
        """Count wall seconds (and peak memory so far) under a name, and show it on the progress line.

        Nested phases are exclusive: an inner phase's seconds are not the outer one's, so that none is counted twice.
        Dispatch is asynchronous, and the host's time in the block is not the device's. So the block may name an array (one that
        is not donated) whose completion ends the phase; with `step`, `log` of that step writes time/<name>_s:

            with recorder.phase("rollout", step) as until:
                rollout = sample(params, prompts, key)
                until(rollout.finished)
        """
        self._charge()
        watched: list[bool] = []
        began = time.monotonic()

        def until(array: Any) -> None:
            watched.append(True)
            if self._writes:
                self._stopwatch.start(name, began, array, step)

        self._open_phases.append((name, watched))
        if self._line is not None:
            self._line.phase(name)
        try:
            yield until
        finally:
            self._charge(calls=1)
            self._open_phases.pop()
            if self._line is not None:
                self._line.phase(self._open_phases[-1][0] if self._open_phases else None)

    def spent_s(self, name: str) -> float:
        """Wall seconds of the host in a phase so far, those before the run was continued included."""
        return self._phases.get(name, {}).get("wall_s", 0.0)

    def elapsed_s(self) -> float:
        """Wall seconds of the run, those before it was continued included."""
        return self._before_s + time.monotonic() - self._began

    def summary(self, status: str = "running", **extra: Any) -> dict[str, Any]:
        """Write summary.json: status, time and memory by phase, and whatever was ever passed as `extra` (last value wins).

        The report knows `calibration` ([{"predicted", "observed", "count"}]) and `numbers` ({"label": value}); other keys are
        stored.
        """
        self._charge()
        self._extra |= extra
        found = {
            **self._extra,
            "stage": self.stage,
            "status": status,
            "step": self._step,
            "total_steps": self.total_steps,
            "wall_s": round(self.elapsed_s(), 2),
            "phases": self._costs(),
            "peak_rss_mb": round(peak_rss_mb(), 1),
            "peak_device_mb": peak_device_mb(),
        }
        if self._writes:
            write_atomic(self.run_dir / SUMMARY, json.dumps(_finite(found), indent=1, allow_nan=False) + "\n")
        return found

    def _costs(self) -> list[dict[str, Any]]:
        """Every phase with its seconds: the device's where an array was named, the host's elsewhere."""
        watched = self._stopwatch.totals
        return [
            {"name": name, **cost, "wall_s": round(cost["wall_s"] + watched.get(name, 0.0), 3)}
            for name, cost in self._phases.items()
        ]

    def close(self, status: str = "finished") -> None:
        """Write the last summary, end the progress line and the backends."""
        self._stopwatch.close()
        if self._line is not None:
            self._line.close(f"{status} after {duration(self.elapsed_s())}: step {self._step}/{self.total_steps}")
            self._line = None
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []
        self.summary(status)

    def _charge(self, calls: int = 0) -> None:
        """Give the seconds since the last mark to the innermost open phase."""
        now = time.monotonic()
        if self._open_phases:
            name, watched = self._open_phases[-1]
            cost = self._phases.setdefault(name, {"wall_s": 0.0, "calls": 0})
            cost["wall_s"] += 0.0 if watched else now - self._mark
            cost["calls"] += calls
            cost["peak_rss_mb"] = round(peak_rss_mb(), 1)
        self._mark = now

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
        path = self.run_dir / name
        try:
            with _explained(path), path.open("ab", buffering=0) as file:
                before, written = file.tell(), 0
                try:
                    while written < len(lines):  # a disk that fills up takes a part, and says so at the next write only
                        written += file.write(lines[written:])
                except OSError:
                    with contextlib.suppress(OSError):
                        file.truncate(before)  # or the next row would be glued to this part
                    raise
        except UserError as error:
            if not self._several:
                raise
            self.failed = self.failed or str(error)

    def _prepare_files(self, every: int) -> tuple[list[int], list[str]]:
        """Remove what the run is about to write again; take over the time already spent.

        Returns the steps of removed rows, and what to tell of rows that were written and are there no more.
        """
        removed, told = [], []
        for name in (METRICS, SAMPLES, SUMMARY, "report.html"):
            for left in self.run_dir.glob(f".{name}.*.partial"):  # by a kill within `write_atomic`
                left.unlink()
        for name in (METRICS, SAMPLES):
            path, line, lost = self.run_dir / name, b"\n", 0
            dropped: set[int] = set()  # numbers of lines
            own: set[int] = set()  # steps of the stage's rows that stay
            for number, (line, row) in enumerate(_lines(path)):
                if row is None:
                    dropped.add(number)
                    lost += line.endswith(b"\n")  # else it is the last one, which a killed process did not finish
                elif row.get("stage") == self.stage and row["step"] > self._held:
                    dropped.add(number)
                    removed.append(row["step"])
                elif row.get("stage") == self.stage:
                    own.add(row["step"])
                    self._before_s = max(self._before_s, row.get("time_s") or 0.0)
            if dropped or not line.endswith(b"\n"):
                write_atomic(path, _without(path, dropped))
            if lost:
                told.append(f"{path}: lines that could not be read as rows were removed: {lost}")
            if name == METRICS:
                absent = [step for step in range(every, self._held + 1, every) if step not in own] if every else []
                if absent:
                    named = ", ".join(map(str, absent[:5])) + (", …" if len(absent) > 5 else "")
                    told.append(f"{path}: no rows of steps {named} (log.every={every}); they are not made again")
        old = read_summary(self.run_dir)
        if self._held >= 0 and old.get("stage") == self.stage:
            with contextlib.suppress(TypeError, KeyError, ValueError):  # somebody edited it: times only
                self._phases = {
                    str(cost["name"]): cost | {"wall_s": float(cost["wall_s"]), "calls": int(cost["calls"])}
                    for cost in old["phases"]
                }
            fixed = ("stage", "status", "step", "total_steps", "wall_s", "phases", "peak_rss_mb", "peak_device_mb")
            self._extra = {name: value for name, value in old.items() if name not in fixed}
        return removed, told


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "free disk space or make the directory writable, then run the same command again: it continues"
        raise UserError(f"{path}: cannot be written ({error.strerror}); {remedy}") from error


def _finite(value: Any) -> Any:
    """The same tree with NaN and infinities as None, and arrays as lists, for JSON."""
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
