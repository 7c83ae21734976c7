"""The progress of training: on a terminal a line that changes, elsewhere a plain line now and then."""

import atexit
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

from surgeon import text
from surgeon.progress import Bars, current
from surgeon.text import duration, printable
from surgeon.train.run_dir import EvalReport, StepReport

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

PATIENCE = 30.0  # seconds between plain lines
REFRESH = 0.1  # seconds between changes of the line on a terminal
SMOOTHING = 0.9  # the weight of the earlier losses in the shown loss
BAR = 8  # columns, on a narrow terminal fewer


class TrainingLine:
    """Shows steps, losses and speed on standard error, or on `stream`; with `quiet` nothing."""

    def __init__(
        self, *, quiet: bool, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._quiet, self._clock = quiet, clock
        self._total = self._done = 0
        self._smooth = Smoothed(SMOOTHING)
        self._validation: float | None = None
        self._best: float | None = None
        self._live: Live | None = None
        self._last: StepReport | None = None
        self._stage = ""
        self._shown = clock()

    def begin(self, total_steps: int, *, done: int = 0) -> None:
        """Show the number of steps, `done` of which an earlier process did."""
        self._total, self._done, self._shown = total_steps, done, self._clock()
        if self._quiet or not self._stream.isatty():
            return
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self._stream)
        self._live = Live(self._line(), console=console, auto_refresh=False, transient=True, redirect_stdout=False)
        self._live.start()
        if isinstance(bars := current(), Bars):  # there is one line on a terminal
            bars.line = self.stage
        atexit.register(self.end)  # so that the terminal always gets its cursor back

    def step(self, report: StepReport) -> None:
        """Show a step, if the last line is old enough."""
        self._last, self._done = report, report.step
        self._smooth.add(report.loss)
        now = self._clock()
        if self._live is not None:
            if now - self._shown >= REFRESH or report.step == self._total:
                self._shown = now
                self._live.update(self._line(), refresh=True)
        elif now - self._shown >= PATIENCE:
            self._shown = now
            self._print(" ".join(self._parts()))

    def evaluated(self, report: EvalReport) -> None:
        """Print the losses of an evaluation."""
        words = [f"step {report.step:,}:"]
        if report.validation is not None:
            is_best = self._best is None or report.validation < self._best
            self._best = report.validation if is_best else self._best
            self._validation = report.validation
            words += [f"validation {report.validation:.3f}" + (" (best)" if is_best else "")]
        if report.probe is not None:
            words += [f"trained text {report.probe:.3f}"]
        if self._live is None and self._last is not None:
            words += self._parts()[1:]
            self._shown = self._clock()
        self._print("  ".join(words))

    def stage(self, what: str) -> None:
        """Show what is done between steps, such as evaluating; nothing for ""."""
        self._stage, now = what, self._clock()
        if self._live is not None and (now - self._shown >= REFRESH or not what):
            self._shown = now
            self._live.update(self._line(), refresh=True)

    def note(self, text: str) -> None:
        """Print a sentence above the line."""
        self._print(f"note: {printable(text)}")

    def end(self) -> None:
        """Remove the line."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            if isinstance(bars := current(), Bars):
                bars.line = None
            atexit.unregister(self.end)

    def _print(self, line: str) -> None:
        if self._quiet:
            return
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()

    def _line(self) -> "Text":
        """Return the line: a bar, and the first parts, as many as the terminal has room for."""
        from rich.text import Text

        columns = 80 if self._live is None else self._live.console.width
        bar = min(BAR, columns // 8)
        filled = round(bar * self._done / self._total) if self._total else 0
        line = Text("━" * filled, style="green", no_wrap=True, overflow="ellipsis")
        line.append("━" * (bar - filled), style="dim")
        for part in [self._stage, *self._parts()] if self._stage else self._parts():
            if line.cell_len + 2 + len(part) > columns:
                break
            line.append(f"  {part}", style="default")
        return line

    def _parts(self) -> Sequence[str]:
        """Return the known numbers as text, the most important first."""
        parts = [f"{self._done:,}/{self._total:,}"]
        report = self._last
        if report is None:
            return parts
        # The loss is what evaluations have too; the teacher's share, and the mix that is minimised, have other names.
        parts += [f"loss {self._smooth.value:.3f}"] if report.objective is None else self._mixed(report)
        if report.seconds_left is not None:
            parts += [f"{duration(report.seconds_left)} left"]
        if report.tokens_per_second is not None:
            parts += [f"{report.tokens_per_second:,.0f} tokens/s"]
        if report.mfu is not None:
            parts += [f"MFU {report.mfu:.0%}"]
        if self._validation is not None and self._live is not None:  # without a terminal it has its own line
            parts += [f"validation {self._validation:.3f}"]
        if report.memory is not None:
            parts += [text.size(report.memory)]
        return [*parts, f"lr {report.learning_rate:.2g}"]

    def _mixed(self, report: StepReport) -> list[str]:
        """Return the parts of the objective of a run with a teacher, and the objective."""
        parts = [f"cross-entropy {self._smooth.value:.3f}"]
        parts += [] if report.kl is None else [f"KL {report.kl:.3f}"]
        parts += [] if report.hidden is None else [f"hidden {report.hidden:.3f}"]
        return [*parts, f"objective {report.objective:.3f}"]


class Smoothed:
    """A moving mean in which each number has `factor` times the weight of the next one."""

    def __init__(self, factor: float) -> None:
        self._factor, self._sum, self._weight = factor, 0.0, 0.0

    def add(self, number: float) -> None:
        """Add a number."""
        self._sum = self._factor * self._sum + number
        self._weight = self._factor * self._weight + 1.0

    @property
    def value(self) -> float:
        """The mean of the added numbers."""
        return self._sum / self._weight
