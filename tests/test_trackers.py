"""Services for metrics: what they are sent, and that none of them can stop a run."""

import sys
import types
from pathlib import Path

import pytest

from rlhf_jax import trackers
from rlhf_jax.metrics import Recorder, read_rows

CONFIG = {"seed": 0, "ppo": {"kl_coef": 0.05, "adaptive_kl": {"target": 6.0}}}


class Fake:
    """A module that remembers every call made on it or on what it returned."""

    def __init__(self):
        self.calls: list[tuple] = []
        self.fails: dict[str, Exception] = {}

    def module(self, name: str, **attributes) -> types.ModuleType:
        module = types.ModuleType(name)
        for key, value in attributes.items():
            setattr(module, key, value)
        return module

    def method(self, name: str, result=None):
        def called(*args, **kwargs):
            if name in self.fails:
                raise self.fails[name]
            self.calls.append((name, args, kwargs))
            return result

        return called

    def named(self, name: str) -> list[tuple]:
        return [call for call in self.calls if call[0] == name]


class ServiceError(Exception):
    """Two of the services derive their errors from Exception directly."""


@pytest.fixture
def fake(monkeypatch) -> Fake:
    made = Fake()
    run = types.SimpleNamespace(log=made.method("log"), finish=made.method("finish"))
    errors = types.SimpleNamespace(Error=ServiceError)
    wandb = made.module("wandb", init=made.method("init", run), Settings=lambda **kw: kw, errors=errors)
    trackio = made.module("trackio", init=made.method("init", run))
    started = types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))
    names = ("set_experiment", "log_params", "log_metrics", "end_run")
    exceptions = types.SimpleNamespace(MlflowException=ServiceError)
    methods = {name: made.method(name) for name in names} | {"start_run": made.method("start_run", started)}
    there = {"search_runs": lambda **_: [started] if made.named("start_run") else [], "MlflowClient": lambda: client}
    client = types.SimpleNamespace(get_metric_history=lambda *_: [types.SimpleNamespace(step=n) for n in (0, 9, 8)])
    mlflow = made.module("mlflow", exceptions=exceptions, **methods, **there)
    for module in (wandb, trackio, mlflow):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    monkeypatch.setenv("HOME", "/nonexistent")
    return made


def start(path: Path, *names: str, notes: list[str] | None = None, **options) -> list[trackers.Tracker]:
    return trackers.start(names, path, "ppo", CONFIG, (notes if notes is not None else []).append, **options)


def test_a_service_gets_finite_numbers_with_their_step_and_the_flat_configuration(fake, tmp_path):
    for name in ("wandb", "trackio"):
        with Recorder(tmp_path, "ppo", total_steps=2, backends=(name,), console=False, process=0, config=CONFIG) as run:
            run.log(1, {"reward/score": 0.5, "reward/gold": float("nan")})
        (_, sent, options) = fake.named("log")[-1]
        assert options == {"step": 1}
        assert sent[0]["reward/score"] == 0.5
        assert "reward/gold" not in sent[0]
        assert "stage" not in sent[0]
        assert fake.named("init")[-1][2]["config"] == {"seed": 0, "ppo.kl_coef": 0.05, "ppo.adaptive_kl.target": 6.0}
        assert len(fake.named("finish")) == 1
        fake.calls.clear()


def test_mlflow_gets_parameters_metrics_and_an_end(fake, tmp_path):
    (tracker,) = start(tmp_path, "mlflow")
    assert tracker.log(3, {"kl/coef": 0.1})
    assert tracker.close()
    assert fake.named("log_params")[0][1][0]["ppo.kl_coef"] == "0.05"
    assert fake.named("log_metrics")[0][1:] == (({"kl/coef": 0.1},), {"step": 3, "run_id": "r1"})
    assert fake.named("end_run")


def test_wandb_without_a_key_writes_offline_instead_of_asking(fake, tmp_path, monkeypatch):
    notes: list[str] = []
    start(tmp_path, "wandb", notes=notes)
    assert fake.named("init")[-1][2]["mode"] == "offline"
    assert "wandb has no key" in notes[0]
    assert "wandb sync" in notes[0]
    monkeypatch.setenv("WANDB_API_KEY", "k")
    start(tmp_path, "wandb", notes=notes)
    assert fake.named("init")[-1][2]["mode"] is None
    assert len(notes) == 1


def test_a_continued_run_is_the_same_record(fake, tmp_path):
    start(tmp_path, "wandb", "trackio")
    start(tmp_path, "wandb", "trackio", resume_step=7)
    start(tmp_path, "wandb", "trackio")
    ids = [call[2].get("id") or call[2]["name"] for call in fake.named("init")]
    assert ids[0] == ids[2]
    assert ids[1] == ids[3]
    assert ids[0] != ids[4]


def test_mlflow_goes_on_in_the_same_run_and_gets_no_row_twice(fake, tmp_path):
    start(tmp_path, "mlflow")
    (again,) = start(tmp_path, "mlflow", resume_step=7)
    for step in (8, 9, 10):
        again.log(step, {"kl/coef": 0.1})
    assert fake.named("start_run")[-1][2] == {"run_id": "r1"}
    assert len(fake.named("log_params")) == 1
    assert [call[2]["step"] for call in fake.named("log_metrics")] == [9, 10]  # of step 9 the evaluation may be missing there


@pytest.mark.parametrize("name", sorted(trackers.EXTRAS))
def test_a_missing_package_is_named_with_its_extra_and_left_out(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, trackers.EXTRAS[name], None)
    notes: list[str] = []
    assert start(tmp_path, name, notes=notes) == []
    assert len(notes) == 1
    assert f'pip install "rlhf-jax[{name}]"' in notes[0]
    assert "metrics.jsonl goes on" in notes[0]
    assert "\n" not in notes[0]


@pytest.mark.parametrize(("name", "method"), [("wandb", "init"), ("trackio", "init"), ("mlflow", "set_experiment")])
@pytest.mark.parametrize("error", [ServiceError("no\nnetwork"), OSError("disk full"), ValueError("bad key")])
def test_a_service_that_does_not_start_is_left_out(fake, tmp_path, name, method, error):
    if isinstance(error, ServiceError) and name == "trackio":
        error = RuntimeError("no\nnetwork")
    fake.fails[method] = error
    notes: list[str] = []
    assert start(tmp_path, name, notes=notes) == []
    assert f"{name} did not start" in notes[-1]
    assert "\n" not in notes[-1]


def test_a_service_that_fails_on_the_way_is_dropped_once_and_the_run_goes_on(fake, tmp_path, capfd):
    with Recorder(tmp_path, "ppo", total_steps=3, backends=("wandb",), process=0) as run:
        run.log(1, {"a/x": 1.0})
        fake.fails["log"] = ServiceError("gone")
        run.log(2, {"a/x": 2.0})
        run.log(3, {"a/x": 3.0})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert capfd.readouterr().err.count("wandb stopped") == 1
    assert [call[2]["step"] for call in fake.named("log")] == [1]


def test_no_backend_leaves_no_trace(tmp_path):
    assert start(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard shows: the events of all files, without those that a later start declares void."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown: list[tuple[int, float]] = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # length u64, its checksum u32, the event, its checksum u32
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.session_log.status == SessionLog.START:
                shown = [point for point in shown if point[0] < event.step]
            shown += [(event.step, value.simple_value) for value in event.summary.value if value.tag == tag]
    return shown


def test_tensorboard_holds_what_metrics_jsonl_holds_whenever_the_run_is_killed(tmp_path):
    """Begun, killed without a checkpoint, begun again, killed, continued: no tracker is closed before all is read."""
    killed = []
    for first, last, resume_step in ((0, 3, None), (0, 9, None), (8, 14, 7)):
        (tracker,) = start(tmp_path, "tensorboard", resume_step=resume_step)
        killed.append(tracker)
        for step in range(first, last + 1):
            assert tracker.log(step, {"reward/score": step + 0.25, "kl/coef": 0.5})
        assert [step for step, _ in curve(tmp_path / "tensorboard", "kl/coef")] == list(range(last + 1))
    assert curve(tmp_path / "tensorboard", "reward/score") == [(step, step + 0.25) for step in range(15)]
    assert all(tracker.close() for tracker in killed)
