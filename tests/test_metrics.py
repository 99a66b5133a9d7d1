"""What a run writes down: complete, exact, torn-proof, and written by one process only."""

import errno
import io
import json
import math
import resource
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.metrics import Recorder, as_row, peak_rss_mb, read_rows, read_summary, to_host, write_atomic
from rlhf_jax.progress import ProgressLine, compact, duration, headline
from rlhf_jax.stopwatch import Stopwatch


def recorder(path: Path, **options) -> Recorder:
    return Recorder(path, options.pop("stage", "ppo"), total_steps=10, console=False, process=0, **options)


def rows_of(path: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


def test_a_row_is_rounded_and_says_what_is_not_finite():
    row = as_row("ppo", 3, {"a/x": 1 / 3, "a/nan": math.nan, "a/inf": -math.inf, "a/count": 12_345_678, "a/tiny": 1.23456789e-9})
    assert row == {
        "stage": "ppo",
        "step": 3,
        "a/x": 0.333333,
        "a/nan": None,
        "a/inf": None,
        "a/count": 12_345_678,
        "a/tiny": 1.23457e-9,
        "not_finite": ["a/nan", "a/inf"],
    }
    json.dumps(row, allow_nan=False)


def test_every_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    with recorder(tmp_path) as run:
        for step in range(1, 4):
            host = run.log(step, {"reward/score": jnp.float32(0.5 * step), "kl/coef": 0.05})
            assert host == {"reward/score": 0.5 * step, "kl/coef": 0.05}
            assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, step + 1))
    last = rows_of(tmp_path)[-1]
    assert last["stage"] == "ppo"
    assert last["memory/peak_mb"] > 10
    assert last["time_s"] >= 0


def test_the_whole_dictionary_is_fetched_at_once(tmp_path, monkeypatch):
    calls, fetch = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: calls.append(tree) or fetch(tree))
    metrics = {f"a/{i}": jnp.float32(i) for i in range(20)}
    with recorder(tmp_path) as run:
        run.progress(1, run.log(1, metrics))
    assert len(calls) == 1


def test_a_metric_is_one_number():
    assert to_host({"a/x": jnp.ones((1,))}) == {"a/x": 1.0}
    with pytest.raises(ValueError, match=r"'a/x' has shape \(2,\).*reduce it"):
        to_host({"a/x": jnp.ones(2)})


def test_a_continued_run_has_every_row_once(tmp_path):
    with recorder(tmp_path, stage="sft") as run:
        run.log(1, {"sft/loss_nats": 1.0})
    with recorder(tmp_path) as run:
        run.samples(0, [{"index": 0, "prompt": "p", "response": "r", "score": 1.0}])
        for step in range(1, 6):
            run.log(step, {"reward/score": float(step)})
        run.samples(5, [{"index": 0, "prompt": "p", "response": "r", "score": 2.0}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "ppo", "step": 6, "rew')  # killed while writing
    with recorder(tmp_path, resume_step=3) as run:
        for step in range(2, 7):  # rows 2 and 3 are there already
            run.log(step, {"reward/score": 10.0 * step})
    rows = rows_of(tmp_path)
    assert [(row["stage"], row["step"]) for row in rows] == [("sft", 1), *(("ppo", step) for step in range(1, 7))]
    assert [row["reward/score"] for row in rows[1:]] == [1.0, 2.0, 3.0, 40.0, 50.0, 60.0]
    assert [row["step"] for row in rows_of(tmp_path, "samples.jsonl")] == [0]
    times = [row["time_s"] for row in rows[1:]]
    assert times == sorted(times)


def test_rows_that_are_gone_from_a_continued_run_are_told(tmp_path, capfd):
    def continued(lines):
        (tmp_path / "metrics.jsonl").write_text("".join(lines))
        with Recorder(tmp_path, "ppo", total_steps=9, process=0, resume_step=6, every=2):
            return [line.removeprefix("ppo  ") for line in capfd.readouterr().err.splitlines() if str(tmp_path) in line]

    metrics, rows = tmp_path / "metrics.jsonl", [json.dumps({"stage": "ppo", "step": step}) + "\n" for step in (2, 4, 5, 6)]
    assert continued([*rows, rows[-1][:20]]) == []  # a kill
    assert continued(rows[1:]) == [f"{metrics}: no rows of steps 2 (log.every=2); they are not made again"]
    assert continued([rows[0], rows[1][:20] + rows[2], *rows[3:], rows[-1][:20]]) == [
        f"{metrics}: lines that could not be read as rows were removed: 1",
        f"{metrics}: no rows of steps 4 (log.every=2); they are not made again",
    ]
    assert continued([]) == [f"{metrics}: no rows of steps 2, 4, 6 (log.every=2); they are not made again"]


def test_files_of_which_nothing_is_removed_stay_as_they_are_and_are_read_a_line_at_a_time(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    row = {f"a/number_{index}": 0.5 for index in range(100)}
    metrics.write_text("".join(json.dumps({"stage": "ppo", "step": step} | row) + " \n" for step in range(500)))
    before = metrics.stat()
    tracemalloc.start()
    try:
        with recorder(tmp_path, resume_step=499) as run:
            run.make_up(499)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (metrics.stat().st_ino, metrics.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert peak < 0.3 * before.st_size


def test_what_stays_of_a_file_stays_byte_for_byte_and_its_last_line_gets_an_end(tmp_path):
    lines = ['{"step": 1,  "stage": "ppo"}\n', '{"step": 7, "stage": "ppo"}\n', '{"stage": "sft", "step": 9}']
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    with recorder(tmp_path, resume_step=3):
        assert (tmp_path / "metrics.jsonl").read_text() == lines[0] + lines[2] + "\n"
    (tmp_path / "metrics.jsonl").write_text(lines[0] + lines[2])
    with recorder(tmp_path, resume_step=3) as run:
        run.log(4, {"a/x": 1.0})
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 9, 4]


def test_only_the_evaluation_that_is_owed_is_removed_and_the_rest_stays_byte_for_byte(tmp_path):
    others = '{"stage": "sft",  "step": 3, "eval/score": 1}\n'
    lines = [others, '{"stage": "ppo",  "step": 3, "a/x": 1}\n', '{"stage": "ppo", "step": 3, "eval/score": 1}\n']
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    (tmp_path / "samples.jsonl").write_text(others + '{"stage": "ppo", "step": 2}\n{"stage": "ppo", "step": 3}\n')
    with recorder(tmp_path, resume_step=3) as run:
        run.make_up(3)
    assert (tmp_path / "metrics.jsonl").read_text() == lines[0] + lines[1]
    assert (tmp_path / "samples.jsonl").read_text() == others + '{"stage": "ppo", "step": 2}\n'


def test_the_clock_of_a_continued_run_goes_on(tmp_path):
    rows = [{"stage": "ppo", "step": step, "time_s": 50.0 * step} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with recorder(tmp_path, resume_step=2) as run:
        run.log(3, {"a/x": 1.0})
    assert 100.0 <= rows_of(tmp_path)[-1]["time_s"] < 130.0
    assert 100.0 <= read_summary(tmp_path)["wall_s"] < 130.0


def test_a_new_run_starts_clean_but_leaves_other_stages_alone(tmp_path):
    for stage in ("sft", "ppo", "ppo"):
        with recorder(tmp_path, stage=stage) as run:
            run.log(1, {"a/x": 1.0})
    assert [row["stage"] for row in rows_of(tmp_path)] == ["sft", "ppo"]


def test_a_run_that_begins_again_says_which_rows_it_removes(tmp_path, capfd):
    for resume_step in (None, 0, None, None):
        with Recorder(tmp_path, "ppo", total_steps=3, process=0, resume_step=resume_step) as run:
            told = capfd.readouterr().err
            if resume_step is None and (tmp_path / "metrics.jsonl").exists():
                assert (
                    told.count("no checkpoint to go on from: begins at step 0, without the rows written before (up to step 2)")
                    == 1
                )
                assert read_rows(tmp_path / "metrics.jsonl") == []
            else:
                assert "checkpoint" not in told
            for step in range(3):
                run.log(step, {"a/x": 1.0})


def test_readers_skip_torn_and_foreign_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    path.write_bytes(b'{"step": 1}\n[1, 2]\n\xff\xfe\n{"step": 2}\n{"step": null}\n{"x": 3}\n{"step": 3, "x"')
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    (tmp_path / "summary.json").write_text('{"stage": ')
    assert read_summary(tmp_path) == {}


def test_what_kills_have_left_of_atomic_writes_is_removed_and_nothing_else_is(tmp_path):
    for name in (".summary.json.31.partial", ".report.html.7.partial", ".final.partial", "mine.partial"):
        (tmp_path / name).write_text("half")
    with recorder(tmp_path, resume_step=3):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".final.partial", "mine.partial"]


@pytest.mark.parametrize(
    "phases", ["null", "[3]", "[{}]", "7", '[{"name": "save", "wall_s": "x", "calls": 1}]', '[{"name": "save", "calls": 1}]']
)
def test_times_in_a_summary_that_cannot_be_read_stop_no_run(tmp_path, phases):
    (tmp_path / "summary.json").write_text('{"stage": "ppo", "numbers": {"gold": 1.5}, "phases": ' + phases + "}")
    with recorder(tmp_path, resume_step=3):
        pass
    assert read_summary(tmp_path)["phases"] == []
    assert read_summary(tmp_path)["numbers"] == {"gold": 1.5}


def test_a_summary_that_cannot_be_written_hides_no_error_that_came_before(tmp_path):
    class Full(Recorder):
        def summary(self, status="running", **extra):
            raise UserError("summary.json: cannot be written")

    with pytest.raises(UserError, match=r"^free 3 GB, checkpoint 2 is intact"), Full(tmp_path, "ppo", total_steps=1, process=0):
        raise UserError("free 3 GB, checkpoint 2 is intact")
    with pytest.raises(UserError, match=r"^summary\.json"), Full(tmp_path, "ppo", total_steps=1, process=0):
        pass


def test_phases_are_exclusive_and_add_up(tmp_path):
    with recorder(tmp_path) as run:
        with run.phase("train"):
            time.sleep(0.05)
            for _ in range(2):
                with run.phase("rollout"):
                    time.sleep(0.04)
            time.sleep(0.01)
        found = run.summary(calibration=[{"predicted": 0.5, "observed": math.nan, "count": 3}])
        wall = run.elapsed_s()
    phases = {phase["name"]: phase for phase in found["phases"]}
    assert phases["train"]["calls"] == 1
    assert phases["rollout"]["calls"] == 2
    assert phases["train"]["wall_s"] >= 0.06
    assert phases["rollout"]["wall_s"] >= 0.08
    assert sum(phase["wall_s"] for phase in phases.values()) <= wall + 1e-3
    assert phases["train"]["peak_rss_mb"] > 10
    stored = json.loads((tmp_path / "summary.json").read_text())
    assert stored["status"] == "finished"
    assert stored["calibration"][0]["observed"] is None


def test_a_continued_run_adds_to_its_phases_and_keeps_what_it_knew(tmp_path):
    for resume in (None, 0):
        with recorder(tmp_path, resume_step=resume) as run, run.phase("rollout"):
            if resume is None:
                run.summary(numbers={"gold": 1.5})
    stored = read_summary(tmp_path)
    assert stored["phases"][0]["calls"] == 2
    assert stored["numbers"] == {"gold": 1.5}


@pytest.mark.parametrize(("error", "status"), [(ValueError, "failed"), (KeyboardInterrupt, "interrupted")])
def test_the_summary_says_how_a_run_ended(tmp_path, error, status):
    with pytest.raises(error), recorder(tmp_path):
        raise error
    assert read_summary(tmp_path)["status"] == status


def test_other_processes_write_nothing_but_know_the_numbers(tmp_path, capfd):
    with Recorder(tmp_path, "ppo", total_steps=3, process=1) as run, run.phase("rollout"):
        assert run.log(1, {"a/x": jnp.float32(2.0)}) == {"a/x": 2.0}
        run.progress(1, {"a/x": 2.0})
        run.samples(1, [{"index": 0}])
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_is_one_message_with_the_remedy(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    run = recorder(tmp_path)
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(No space left on device\); free disk space"):
        run.log(1, {"a/x": 1.0})


def test_a_disk_that_fills_up_within_a_row_leaves_no_part_of_it(tmp_path):
    """With a limit of the system: it takes as much as fits and says only how much that was."""
    run, limits = recorder(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    run.log(1, {"a/x": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
        with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(File too large\)"):
            run.log(2, {"a/x": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    run.log(2, {"a/x": 2.0})
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2]


def test_a_row_that_is_taken_in_pieces_is_whole(tmp_path, monkeypatch):
    class Short(io.FileIO):
        def write(self, data):
            return super().write(data[: len(data) // 2 + 1])

    run = recorder(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", lambda path, mode, buffering: Short(path, mode))
        run.log(1, {"a/x": 1.0})
        run.log(2, {"a/x": 2.0})
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2]


def test_an_atomic_write_is_whole_or_nothing(tmp_path):
    target = tmp_path / "summary.json"
    write_atomic(target, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(target, "new \ud800")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    write_atomic(target, "new")
    assert target.read_text() == "new"
    with pytest.raises(UserError, match="cannot be written"):
        write_atomic(tmp_path / "nowhere" / "x", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_importing_it_starts_no_jax():
    script = "import sys, rlhf_jax.metrics, rlhf_jax.report; sys.exit('jax' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_memory_is_in_megabytes():
    before = peak_rss_mb()
    block = bytearray(200_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert 0 <= peak_rss_mb() - before <= 400
    assert peak_rss_mb() >= 200


# The device's time.


def test_a_phase_lasts_until_its_result_is_there_and_the_loop_does_not_wait(tmp_path):
    with recorder(tmp_path) as run:
        for n in (1, 2):
            computed = threading.Event()
            run._stopwatch._wait = lambda seconds, computed=computed: computed.wait(60) and time.sleep(seconds)
            with run.phase("rollout", n) as until:
                until(0.05)
            with run.phase("policy update", n) as until:
                until(0.1)
            assert run._stopwatch.take(n, timeout_s=0.0) == {}  # the loop is here, and the device has finished nothing
            computed.set()
            run.log(n, {"reward/score": 1.0})
    for row in rows_of(tmp_path):
        assert row["time/rollout_s"] >= 0.05
        assert row["time/policy_update_s"] >= 0.1
    phases = {phase["name"]: phase for phase in read_summary(tmp_path)["phases"]}
    assert phases["rollout"]["wall_s"] >= 0.1
    assert phases["policy update"]["wall_s"] >= 0.2
    assert phases["rollout"]["calls"] == 2


def test_waiting_in_a_watched_phase_is_nobodys_time_and_the_end_waits_for_the_device(tmp_path):
    with recorder(tmp_path) as run:
        run._stopwatch = Stopwatch(wait=time.sleep)
        with run.phase("rollout", 1) as until:
            until(0.0)
            time.sleep(0.6)  # the host reads the numbers of the step before
        with run.phase("update", 1) as until:
            until(0.4)
    phases = {phase["name"]: phase["wall_s"] for phase in read_summary(tmp_path)["phases"]}
    assert phases["rollout"] < 0.5
    assert phases["update"] > 0.35


def test_the_result_of_a_phase_is_any_array(tmp_path):
    with recorder(tmp_path) as run:
        with run.phase("rollout", 1) as until:
            until(jax.jit(lambda x: x @ x)(jnp.ones((64, 64))))
        run.log(1, {"a/x": 1.0})
    assert rows_of(tmp_path)[0]["time/rollout_s"] > 0


def test_phases_follow_each_other_on_the_device():
    clock, arrived = Clock(), threading.Semaphore(0)
    watch = Stopwatch(wait=lambda seconds: arrived.acquire() and setattr(clock, "now", clock.now + seconds), clock=clock)
    for name, seconds in (("rollout", 2.0), ("score", 1.0), ("update", 4.0)):
        watch.start(name, 100.0, seconds, step=1)  # all dispatched at once
    assert watch.take(1, timeout_s=0.05) == {}
    arrived.release(3)
    assert watch.take(1) == {"rollout": 2.0, "score": 1.0, "update": 4.0}
    clock.now += 50.0  # the device idles while the host scores
    watch.start("rollout", 157.0, 2.0, step=2)
    arrived.release()
    watch.close()
    assert watch.totals == {"rollout": 4.0, "score": 1.0, "update": 4.0}


def test_a_donated_array_does_not_stop_the_watch():
    def wait(array):
        raise RuntimeError("Array has been deleted")

    watch = Stopwatch(wait=wait)
    watch.start("update", time.monotonic(), None, step=1)
    assert set(watch.take(1)) == {"update"}
    watch.close()


# The progress line.


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(**options) -> tuple[ProgressLine, io.StringIO, Clock]:
    clock, stream = Clock(), io.StringIO()
    return ProgressLine("ppo", 30, stream=stream, clock=clock, every_s=3.0, terminal=False, **options), stream, clock


def test_plain_lines_begin_at_once_and_are_rationed():
    line, stream, clock = plain()
    assert stream.getvalue() == "ppo  starting\n"
    line.phase("compiling sampler")
    for step in range(1, 31):
        clock.now += 0.5
        line.update(step, {"reward/score": step / 10, "kl/per_sequence_nats": 1.234, "throughput/tokens_per_s": 1923.0})
    line.phase(None)
    line.close()
    lines = stream.getvalue().splitlines()
    assert 4 <= len(lines) <= 7
    assert "(0.0 s)" not in stream.getvalue()
    assert lines[-1] == "ppo  30/30  reward 3.00  KL 1.23 nats  1.9k tok/s"


def test_a_long_phase_is_repeated_so_that_a_log_does_not_look_dead():
    stream = io.StringIO()
    line = ProgressLine("ppo", 30, stream=stream, every_s=0.02, terminal=False)
    line.phase("compiling sampler")
    time.sleep(0.4)
    line.close()
    assert stream.getvalue().count("compiling sampler (") >= 3


def test_remaining_time_is_the_median_step_and_forgets_the_compilation():
    line, _, clock = plain()
    line.update(0, {})
    for step, wait in enumerate((60.0, 2.0, 2.0, 2.0, 30.0, 2.0), start=1):
        clock.now += wait
        line.update(step, {})
    assert line.remaining_s() == pytest.approx(2.0 * 24)
    assert "48 s left" in line.line()
    line.close()


def test_a_terminal_gets_one_line_that_is_redrawn():
    stream = io.StringIO()
    line = ProgressLine("ppo", 30, stream=stream, terminal=True)
    line.phase("compiling sampler")
    line.update(12, {"reward/score": 1.84, "reward/gold": None})
    time.sleep(0.3)
    line.note("a [bold]note[/bold] stays as it is")
    line.close("finished")
    drawn = stream.getvalue()
    assert "12/30  reward 1.84  gold not finite  compiling sampler" in drawn
    assert "a [bold]note[/bold] stays as it is" in drawn
    assert "\x1b[2K" in drawn
    assert drawn.rstrip().endswith("ppo  finished")


def test_a_terminal_that_cannot_redraw_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    line = ProgressLine("ppo", 30, stream=stream)
    line.close("finished")
    assert stream.getvalue() == "ppo  starting\nppo  finished\n"


class Gone(io.StringIO):
    """A terminal whose connection is lost; `tee` that has ended raises BrokenPipeError."""

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")

    def flush(self) -> None:
        self.write("")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_line_that_nobody_can_read_is_no_error(terminal):
    line = ProgressLine("ppo", 30, stream=Gone(), terminal=terminal, every_s=0.02)
    line.phase("compiling sampler")
    line.update(12, {"reward/score": 1.84})
    time.sleep(0.3)  # what redraws the line, in a thread, fails neither
    line.note("a note")
    line.close("finished")


def test_the_recorder_speaks_on_stderr_within_the_first_moment(tmp_path, capfd):
    with Recorder(tmp_path, "sft", total_steps=2, process=0) as run:
        assert capfd.readouterr().err.startswith("sft  starting")
        run.progress(1, {"sft/loss_nats": jnp.float32(2.5)})
    out, err = capfd.readouterr()
    assert out == ""
    assert "sft  finished after" in err


def test_numbers_for_people():
    assert [duration(s) for s in (0.04, 9.94, 42, 72, 7391)] == ["0.0 s", "9.9 s", "42 s", "1:12", "2:03:11"]
    assert [compact(n) for n in (870, 1923, 42_000, 1.3e6)] == ["870", "1.9k", "42k", "1.3M"]
    assert headline({"dpo/loss_nats": 0.69, "other/x": 1.0}) == ["loss 0.690"]
    assert headline({"reward_model/accuracy": 0.64, "reward_model/loss": 0.6}) == ["loss 0.600 nats", "accuracy 64%"]
    assert headline({}) == []
