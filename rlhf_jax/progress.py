"""One line that says where a run is: redrawn in place on a terminal, plain lines anywhere else."""

import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rlhf_jax.errors import Unheard

# (metric, name on the line, format): the first three of a stage tell whether it works.
HEADLINE = (
    ("reward/score", "reward", "{:.2f}"),
    ("reward/gold", "gold", "{:.2f}"),
    ("sft/loss_nats", "loss", "{:.3f} nats"),
    ("reward_model/loss", "loss", "{:.3f} nats"),
    ("reward_model/accuracy", "accuracy", "{:.0%}"),
    ("kl/per_sequence_nats", "KL", "{:.2f} nats"),
)


def duration(seconds: float) -> str:
    """Seconds as 4.2 s, 1:12 or 2:03:11."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def compact(number: float) -> str:
    """A count in at most four characters and a suffix: 870, 1.9k, 42k, 1.3M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            scaled = number / size
            return f"{scaled:.1f}{suffix}" if abs(scaled) < 10 else f"{scaled:.0f}{suffix}"
    return f"{number:.0f}"


def headline(metrics: Mapping[str, float | None]) -> list[str]:
    """The few numbers of a row that belong on the line; `None` (not finite) is shown, never hidden."""
    parts = []
    for key, name, form in HEADLINE:
        if key in metrics:
            value = metrics[key]
            parts.append(f"{name} not finite" if value is None else f"{name} {form.format(value)}")
    if not parts:  # a stage this page does not know: its loss
        key = next((key for key in metrics if "loss" in key), None)
        if key is not None:
            value = metrics[key]
            parts.append("loss not finite" if value is None else f"loss {value:.3f}")
    speed = metrics.get("throughput/tokens_per_s")
    if speed:
        parts.append(f"{compact(speed)} tok/s")
    return parts


class ProgressLine:
    """Draws `stage step/total reward KL tokens/s time left`, and the phase while there is no step yet.

    On a terminal one line is redrawn four times a second. Elsewhere a line is written at once, then at most one every
    `every_s` seconds; a thread repeats the phase when nothing else was said for three times as long, so that a log of a
    long compilation does not look dead.
    """

    def __init__(
        self,
        stage: str,
        total_steps: int,
        *,
        stream: TextIO | None = None,
        terminal: bool | None = None,
        every_s: float = 3.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stage, self._total, self._clock, self._every_s = stage, total_steps, clock, every_s
        self._stream: Any = Unheard(sys.stderr if stream is None else stream)
        self._step: int | None = None
        self._parts: list[str] = []
        self._phase: str | None = None
        self._phase_began = self._began = clock()
        self._step_at: float | None = None
        self._durations: deque[float] = deque(maxlen=20)
        self._said, self._said_at, self._lock = "", float("-inf"), threading.Lock()
        self._closed = threading.Event()
        self._live = console = None
        if self._stream.isatty() if terminal is None else terminal:
            from rich.console import Console

            console = Console(file=self._stream, force_terminal=True if terminal else None, emoji=False)
        if console is not None and console.is_interactive:  # TERM=dumb is not
            from rich.live import Live

            self._live = Live(get_renderable=self._renderable, console=console, refresh_per_second=4, transient=True)
            self._live.start()
        else:
            self._say("starting")
            threading.Thread(target=self._tick, name="progress", daemon=True).start()

    def phase(self, name: str | None) -> None:
        """Say what the run does now; None: nothing beyond the steps."""
        self._phase, self._phase_began = name, self._clock()
        if name is not None:
            self._offer()

    def update(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """A finished step and its metrics, already on the host."""
        now = self._clock()
        if self._step is not None and self._step_at is not None and step > self._step:
            self._durations.append((now - self._step_at) / (step - self._step))
        self._step, self._step_at, self._parts = step, now, headline(metrics)
        self._offer()

    def note(self, text: str) -> None:
        """A line that stays: a warning, a result."""
        if self._live is not None:
            self._live.console.print(f"{self._stage}  {text}", markup=False, highlight=False)
        else:
            self._say(text)

    def close(self, last_words: str | None = None) -> None:
        """Stop drawing; the last line stays."""
        if self._closed.is_set():
            return
        self._closed.set()
        line = self.line() if last_words is None else f"{self._stage}  {last_words}"
        if self._live is not None:
            self._live.stop()
            self._live.console.print(line, markup=False, highlight=False)
        elif line != self._said:
            self._write(line)

    def remaining_s(self) -> float | None:
        """Median of the last 20 steps times the steps that are left; None before two steps (the first one compiles)."""
        if self._step is None or not self._durations:
            return None
        return statistics.median(self._durations) * (self._total - self._step)

    def line(self) -> str:
        """The line as plain text."""
        parts = [self._stage]
        if self._step is not None:
            parts += [f"{self._step}/{self._total}", *self._parts]
            left = self.remaining_s()
            if left is not None and self._step < self._total:
                parts.append(f"{duration(left)} left")
        if self._phase is not None:
            lasts_s = self._clock() - self._phase_began
            parts.append(self._phase if lasts_s < 0.05 else f"{self._phase} ({duration(lasts_s)})")
        elif self._step is None:
            parts.append(f"starting ({duration(self._clock() - self._began)})")
        return "  ".join(parts)

    def _renderable(self):
        from rich.spinner import Spinner
        from rich.text import Text

        if not hasattr(self, "_spinner"):
            self._spinner = Spinner("dots", style="cyan")
        self._spinner.update(text=Text(self.line(), no_wrap=True, overflow="ellipsis"))
        return self._spinner

    def _offer(self) -> None:
        if self._live is None and self._clock() - self._said_at >= self._every_s:
            self._write(self.line())

    def _tick(self) -> None:
        while not self._closed.wait(self._every_s):
            if self._clock() - self._said_at >= 3 * self._every_s:
                self._write(self.line())

    def _say(self, text: str) -> None:
        self._write(f"{self._stage}  {text}")

    def _write(self, line: str) -> None:
        with self._lock:
            self._said, self._said_at = line, self._clock()
            self._stream.write(line + "\n")
            self._stream.flush()
