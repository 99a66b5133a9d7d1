"""More places for metrics: TensorBoard, wandb, trackio, mlflow. None is installed with the package, none can stop a run.

Whatever goes wrong (not installed, no key, no network, a full disk) is said once, by name and with the remedy; the run goes
on, and metrics.jsonl holds everything. A continued run continues the same record. TensorBoard then holds what metrics.jsonl
holds, wandb and mlflow pass over the rows that come again (mlflow not over those of its newest step, which may have been half
sent), trackio shows them twice (what was killed and what was made anew). Wandb, offline, loses a block of rows with a kill.
"""

import importlib
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.errors import without_secrets

IDENTITY = ".tracker_id"  # random name of the run at services, so that a continued run is the same record there
PROJECT = "rlhf-jax"
EXTRAS = {  # name in `log.backends` -> module; the extra of the distribution has the backend's name
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
}


class Start(NamedTuple):
    """What a service is told about a run."""

    run_dir: Path
    stage: str
    identity: str  # same for a run and its continuations
    resume_step: int | None  # rows after this step will come again
    config: dict[str, Any]  # flat: "ppo.kl_coef" -> value
    note: Callable[[str], None]

    @property
    def name(self) -> str:
        return self.run_dir.resolve().name


class Tracker(NamedTuple):
    """A service that is open. `log` returns False once the service has failed: drop it then."""

    name: str
    send: Callable[[int, Mapping[str, float]], Any]
    finish: Callable[[], Any]
    errors: tuple[type[Exception], ...]  # what the service raises
    note: Callable[[str], None]

    def log(self, step: int, metrics: Mapping[str, float]) -> bool:
        return self._attempt(lambda: self.send(step, metrics), f"stopped at step {step}")

    def close(self) -> bool:
        return self._attempt(self.finish, "could not be closed")

    def _attempt(self, action: Callable[[], Any], what: str) -> bool:
        try:
            action()
        except self.errors as error:
            self.note(f"log.backends: {self.name} {what} ({_first_line(error)}); metrics.jsonl goes on")
            return False
        return True


def start(
    names: Sequence[str],
    run_dir: Path,
    stage: str,
    config: Mapping[str, Any],
    note: Callable[[str], None],
    *,
    resume_step: int | None = None,
) -> list[Tracker]:
    """Open the services named in `log.backends`; one that cannot be opened is named through `note` and left out."""
    if not names:
        return []
    about = Start(Path(run_dir), stage, _identity(Path(run_dir), resume_step), resume_step, flatten(config), note)
    opened = (_open(name, about) for name in dict.fromkeys(names))
    return [tracker for tracker in opened if tracker is not None]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"ppo": {"kl_coef": 0.1}} as {"ppo.kl_coef": 0.1}, without the secrets inside addresses."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        shown = without_secrets(value) if isinstance(value, str) else value
        flat |= flatten(value, f"{key}.") if isinstance(value, Mapping) else {key: shown}
    return flat


def _open(name: str, about: Start) -> Tracker | None:
    try:
        module = importlib.import_module(EXTRAS[name])
    except ImportError as error:
        remedy = f'pip install "rlhf-jax[{name}]"'
        about.note(f"log.backends: {name} is not available ({_first_line(error)}): {remedy}; metrics.jsonl goes on")
        return None
    errors = _errors(name, module)
    try:
        send, finish = OPENERS[name](module, about)
    except errors as error:
        about.note(f"log.backends: {name} did not start ({_first_line(error)}): {REMEDIES[name]}; metrics.jsonl goes on")
        return None
    return Tracker(name, send, finish, errors, about.note)


def _tensorboard(module: Any, about: Start):
    """One event a row, in the file when `send` returns: SummaryWriter's queue dies with a run that is killed."""
    names = ("event_file_writer", "proto.event_pb2", "proto.summary_pb2")
    files, event, summary = (importlib.import_module(f"{module.__name__}.{name}") for name in names)
    folder = about.run_dir / "tensorboard"
    folder.mkdir(exist_ok=True)
    writer = files.EventsWriter(str(folder / "events"), f".{time.time_ns()}")

    def write(step: int, **content: Any) -> None:
        writer.write_event(event.Event(wall_time=time.time(), step=step, **content))
        writer.flush()

    # TensorBoard drops what older files hold from this step on, all of it when a run begins anew.
    write(0 if about.resume_step is None else about.resume_step + 1, session_log=event.SessionLog(status=event.SessionLog.START))

    def send(step: int, metrics: Mapping[str, float]) -> None:
        values = [summary.Summary.Value(tag=key, simple_value=value) for key, value in metrics.items()]
        write(step, summary=summary.Summary(value=values))

    return send, writer.close


def _wandb(module: Any, about: Start):
    mode = os.environ.get("WANDB_MODE")
    if mode is None and not _wandb_key():
        mode = "offline"  # wandb would ask on the terminal, and a run that waits for an answer is a run lost
        where = about.run_dir / "wandb"
        about.note(f"log.backends: wandb has no key (wandb login, or WANDB_API_KEY): writes to {where}; later: wandb sync")
    run = module.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        dir=str(about.run_dir),
        id=f"{about.identity}-{about.stage}",
        name=f"{about.name}/{about.stage}",
        group=about.name,
        config=about.config,
        resume="allow",
        mode=mode,
        settings=module.Settings(silent=True),
    )
    return lambda step, metrics: run.log(dict(metrics), step=step), run.finish


def _trackio(module: Any, about: Start):
    run = module.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=f"{about.name}-{about.stage}-{about.identity[:6]}",
        group=about.name,
        config=about.config,
        resume="allow",
        embed=False,
        auto_log_gpu=False,
    )
    return lambda step, metrics: run.log(dict(metrics), step=step), run.finish


def _mlflow(module: Any, about: Start):
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    module.set_experiment(experiment)
    tags = {"rlhf_jax.run": about.identity, "rlhf_jax.stage": about.stage}
    query = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    earlier = module.search_runs(experiment_names=[experiment], filter_string=query, output_format="list")
    if earlier:
        run_id = earlier[0].info.run_id
        module.start_run(run_id=run_id)
        there = module.MlflowClient().get_metric_history(run_id, "memory/peak_mb")  # a name that every row has
    else:
        run_id, there = module.start_run(run_name=f"{about.name}/{about.stage}", tags=tags).info.run_id, []
        limit = 100  # parameters that mlflow takes in one call
        items = [(key, str(value)[:500]) for key, value in about.config.items()]
        for begin in range(0, len(items), limit):
            module.log_params(dict(items[begin : begin + limit]))
    newest = max((metric.step for metric in there), default=0)  # a step may have two rows: its own, its evaluation's

    def send(step: int, metrics: Mapping[str, float]) -> None:
        if step >= newest:
            module.log_metrics(dict(metrics), step=step, run_id=run_id)

    return send, module.end_run


OPENERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}
REMEDIES = {
    "tensorboard": "make the run directory writable",
    "wandb": "wandb login, or WANDB_MODE=offline",
    "trackio": "set TRACKIO_DIR to a writable directory",
    "mlflow": 'pip install "rlhf-jax[mlflow]" (a local database), or MLFLOW_TRACKING_URI=http://server',
}


def _errors(name: str, module: Any) -> tuple[type[Exception], ...]:
    """What the service raises beside Python's own: two of them derive from Exception directly."""
    own = {"wandb": ("errors", "Error"), "mlflow": ("exceptions", "MlflowException")}.get(name)
    extra = getattr(getattr(module, own[0], None), own[1], None) if own else None
    python = (OSError, RuntimeError, ValueError, TypeError, ImportError, AttributeError, LookupError)
    return (*python, extra) if isinstance(extra, type) else python


def _wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def _identity(run_dir: Path, resume_step: int | None) -> str:
    path = run_dir / IDENTITY
    if resume_step is not None and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    identity = secrets.token_hex(8)
    path.write_text(identity + "\n", encoding="utf-8")
    return identity


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
