"""What both loops need around them: the run's directory, its checkpoints, its pen, its health, and how it is asked to stop."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from rlhf_jax import config, config_table, environment, health, metrics, parallel, processes, report
from rlhf_jax.checkpoint import Checkpoints, Restored
from rlhf_jax.errors import Unheard
from rlhf_jax.profiling import Profile
from rlhf_jax.rundir import RunDir, open_run
from rlhf_jax.signals import Interrupts


@dataclass(frozen=True)
class Session:
    """An opened run."""

    settings: config.Run
    directory: RunDir
    checkpoints: Checkpoints
    recorder: metrics.Recorder
    interrupts: Interrupts
    watchdog: health.Watchdog
    profile: Profile
    owes_evaluation: bool  # of the step it was restored from: a reward failed there
    skipped: list[int] = field(default_factory=list)  # steps since the start with an update that was not finite

    def evaluation_due(self, step: int) -> bool:
        """After the last step, and every log.eval_every steps."""
        every = self.settings.log.eval_every
        return step == self.settings.steps or (every > 0 and step % every == 0)

    def save_due(self, step: int) -> bool:
        every = self.settings.save.every
        return step == self.settings.steps or (every > 0 and step % every == 0)

    def pause_due(self, step: int) -> bool:
        """The loop must read everything it has dispatched: to evaluate, to save, or because it was asked to stop."""
        self.interrupts.unsaved = True
        return (
            self.interrupts.poll(bool(self.recorder.failed))
            or self.evaluation_due(step)
            or self.save_due(step)
            or self.profile.alone(step)
        )

    def begin(self, step: int) -> None:
        """Step `step` is about to be dispatched."""
        self.profile.begin(step)

    def write(self, step: int, found: Mapping[str, Any], dump: Callable[[], Any]) -> None:
        """The row of a finished step; stops the run after too many updates that were not finite, or a save that failed.

        Args:
          found: metrics, with `health/bad_steps` and `health/alarms`, which are counters and no metrics.
          dump: the batch of the step, for when the run is stopped.
        """
        self.profile.end(step)
        found = dict(found)
        alarms, bad = parallel.fetch((found.pop("health/alarms", None), found.pop("health/bad_steps", 0)))
        host: dict[str, Any] = found
        said = [] if alarms is None else health.alarm_messages(alarms, self.settings.health, self.recorder.stage)
        every = self.settings.log.every
        if said or (every and (step % every == 0 or step == self.settings.steps)):
            host = self.recorder.log(step, found | {"update/bad_steps": int(bad)}, alarms=said)
        self.recorder.progress(step, host)
        for text in said:
            self.recorder.note(f"step {step}: {text}")
        if bad:
            self.skipped.append(step)
            if text := health.skip_message(len(self.skipped)):
                self.recorder.note(f"step {step}: {text}")
        path = self.directory.path / f"bad-step-{step}.npz"

        def dumped() -> Path:
            batch = parallel.fetch(dump())
            return health.dump_arrays(path, batch) if processes.is_writer() else path

        health.require_finite_steps(int(bad), self.settings.health, dumped, step=step)
        self.watchdog.beat(step)
        self.checkpoints.check()

    def settle(self, step: int, state: Any) -> None:
        """After a pause whose rows are written: save if that is due, leave if it was asked (raises `signals.Stopped`)."""
        processes.fail_together(self.recorder.failed)
        asked = self.interrupts.poll()
        if asked or self.save_due(step):
            self.save(step, state)
        if asked or step == self.settings.steps:
            with self.recorder.phase("save"):
                self.checkpoints.wait()  # what follows says that the step is saved: an export, the end, a message
            self.interrupts.unsaved = False  # an export is not waited for: it is made again
            asked = asked or self.interrupts.poll()  # while the save was waited for
        if asked:
            raise self.interrupts.stopped(step)
        if self.evaluation_due(step):
            processes.together(self.recorder.summary)
            processes.together(self.redraw)
        self.watchdog.pause()

    def save(self, step: int, state: Any, *, replace: bool = False) -> None:
        """Rows, then a checkpoint; replace: see `Checkpoints.save`."""
        with self.recorder.phase("save"):
            processes.together(self.directory.sync)
            self.checkpoints.save(step, state, {"step": step}, replace=replace)
            if replace:
                self.checkpoints.wait()  # at the last step nothing comes after it

    def redraw(self) -> None:
        """Write report.html anew, unless its drawings have taken a twentieth of the run's time: the loop waits for them."""
        if self.recorder.spent_s("report") <= self.recorder.elapsed_s() / 20:
            with self.recorder.phase("report"):
                self.show()

    def show(self) -> None:
        """Write report.html anew."""
        if processes.is_writer():
            report.write_report([self.directory.path], self.directory.path / "report.html")


@contextlib.contextmanager
def open_session(
    stage: str,
    settings: config.Run,
    fingerprints: Mapping[str, str],
    *,
    from_scratch: bool,
    override: Collection[str] = (),
    restore: Callable[[Checkpoints], Restored | None],
    sizes: Callable[[], Mapping[str, Any]],
) -> Iterator[tuple[Session, Restored | None]]:
    """Lock the directory, restore the newest good checkpoint, cut the logs back to it.

    Args:
      fingerprints: hashes of what must not have changed since the run began: data, tokenizer, models.
      restore: called once the directory is ours; returns the restored state or None. Models may be loaded there.
      sizes: what the run keeps in memory, as shapes by name: asked only when memory runs out while it loads.
    """
    out = Path(settings.out)
    with contextlib.ExitStack() as stack:
        pens: list[metrics.Recorder] = []

        def say(text: str) -> None:
            """On the progress line's terminal once there is one."""
            if pens:
                pens[0].note(text)
            elif processes.is_writer():
                Unheard(sys.stderr).write(f"{text}\n")

        interrupts = stack.enter_context(Interrupts(say=say))
        opened = open_run(
            out,
            config_table.dump(settings),
            fingerprints,
            from_scratch=from_scratch,
            override=override,
            devices=jax.device_count(),
            say=say,
        )
        directory = stack.enter_context(opened)
        keep = settings.save
        checkpoints = stack.enter_context(
            Checkpoints(directory.checkpoints, keep_last=keep.keep_last, keep_every=keep.keep_every, say=say)
        )
        restored = None
        if directory.completed_step is None:
            with directory.unless_refused(), health.phase("load", sizes):
                restored = restore(checkpoints)
            environment.give_back()  # what was read and unpacked: 1.6 times the state
        recorder = processes.together(
            lambda: metrics.Recorder(
                out,
                stage,
                total_steps=settings.steps,
                backends=settings.log.backends if directory.completed_step is None else (),
                resume_step=directory.completed_step if restored is None else restored.step,
                every=settings.log.every,
                config=dataclasses.asdict(settings),
            )
        )
        stack.enter_context(recorder)
        pens.append(recorder)
        stack.callback(pens.clear)
        watchdog = stack.enter_context(health.Watchdog(settings.health, say=recorder.note))
        if restored is not None:
            recorder.note(f"{out}: continuing from step {restored.step}")
        profile = stack.enter_context(Profile(out / "profile", settings.log.profile_step, say=recorder.note))
        owed = restored is not None and bool(restored.extra.get("owes_evaluation"))
        if restored is not None and owed:
            processes.together(lambda: recorder.make_up(restored.step))
        yield Session(settings, directory, checkpoints, recorder, interrupts, watchdog, profile, owed), restored
