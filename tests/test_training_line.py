"""The training line: one that changes on a terminal, plain lines elsewhere, nothing when quiet."""

import io
import re

import pytest

from surgeon.cli.training_line import Smoothed, TrainingLine
from surgeon.train.run_dir import EvalReport, StepReport


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Return nothing; make rich see a terminal of 120 columns with colours, whatever runs the tests."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "30")


def report(step: int, **facts: float) -> StepReport:
    known = {"loss": 3.0, "learning_rate": 2e-5, "tokens_per_second": 1234.5, "seconds_left": 125.0}
    return StepReport(step=step, tokens=100 * step, **(known | facts))  # type: ignore[arg-type]


def show(stream: io.StringIO, *, quiet: bool = False, seconds: float = 1.0, steps: int = 3) -> str:
    """Return what a run of some steps, each of so many seconds, with a note and an evaluation, writes."""
    clock = Clock()
    line = TrainingLine(quiet=quiet, stream=stream, clock=clock)
    line.begin(steps)
    for step in range(1, steps + 1):
        clock.now += seconds
        line.step(report(step))
    line.note("the model [begins] to\x1b[2J memorise")
    line.evaluated(EvalReport(step=steps, tokens=300, validation=2.51, probe=2.4))
    line.end()
    line.end()
    return stream.getvalue()


def plain(text: str) -> str:
    """Return what was written without the codes that move and colour."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_terminal_shows_a_line_that_changes_and_goes():
    written = show(Terminal())

    assert "1/3  loss 3.000  2 min left  1,234 tokens/s  lr 2e-05" in plain(written)
    assert "3/3" in plain(written)
    assert "\x1b[2K" in written  # a line is written over
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1  # the cursor comes back


def test_notes_and_evaluations_stay_above_the_line():
    shown = [line.strip() for line in plain(show(Terminal())).replace("\r", "\n").split("\n")]

    assert "note: the model [begins] to\\x1b[2J memorise" in shown
    assert "step 3:  validation 2.510 (best)  trained text 2.400" in shown


def test_without_a_terminal_there_is_a_plain_line_now_and_then():
    written = show(io.StringIO(), seconds=12.0, steps=6)

    assert written == (
        "3/6 loss 3.000 2 min left 1,234 tokens/s lr 2e-05\n"
        "6/6 loss 3.000 2 min left 1,234 tokens/s lr 2e-05\n"
        "note: the model [begins] to\\x1b[2J memorise\n"
        "step 6:  validation 2.510 (best)  trained text 2.400  loss 3.000  2 min left  1,234 tokens/s  lr 2e-05\n"
    )


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_quiet_says_nothing(stream):
    assert show(stream, quiet=True, seconds=100.0) == ""


def test_no_color_is_honoured(monkeypatch):
    coloured = re.compile(r"\x1b\[[0-9;]*3[0-9]m|\x1b\[32m")
    assert coloured.search(show(Terminal()))

    monkeypatch.setenv("NO_COLOR", "1")

    assert not coloured.search(show(Terminal()))


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 120])
def test_the_line_fits_whatever_the_width(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    line = TrainingLine(quiet=False, stream=stream, clock=Clock())
    line.begin(1000)
    line.step(report(1000, mfu=0.456, memory=12_300_000_000))
    line.end()

    shown = [part.rstrip() for part in re.split(r"[\r\n]", plain(stream.getvalue()))]
    assert max(map(len, shown)) <= columns
    assert ("1,000/1,000  loss 3.000" in plain(stream.getvalue())) == (columns >= 40)
    assert ("MFU 46%" in plain(stream.getvalue())) == (columns >= 80)
    assert ("12.3 GB" in plain(stream.getvalue())) == (columns >= 80)


def test_a_line_is_not_drawn_more_often_than_anyone_sees():
    stream, clock = Terminal(), Clock()
    line = TrainingLine(quiet=False, stream=stream, clock=clock)
    line.begin(10_000)
    for step in range(1, 1001):
        clock.now += 0.001
        line.step(report(step))
    line.end()

    assert stream.getvalue().count("tokens/s") <= 12


def test_a_resumed_run_begins_where_it_was():
    stream = Terminal()
    line = TrainingLine(quiet=False, stream=stream, clock=Clock())
    line.begin(10, done=4)
    line.end()

    assert "4/10" in plain(stream.getvalue())


def test_a_worse_evaluation_is_not_the_best():
    stream = io.StringIO()
    line = TrainingLine(quiet=False, stream=stream, clock=Clock())
    line.begin(10)
    for step, loss in ((1, 2.0), (2, 2.1), (3, 1.9)):
        line.evaluated(EvalReport(step=step, tokens=step, validation=loss))
    line.evaluated(EvalReport(step=4, tokens=4, validation=None, probe=1.0))

    assert stream.getvalue().splitlines() == [
        "step 1:  validation 2.000 (best)",
        "step 2:  validation 2.100",
        "step 3:  validation 1.900 (best)",
        "step 4:  trained text 1.000",
    ]


def test_the_parts_of_a_taught_run_have_names_and_none_of_them_is_called_loss():
    stream = Terminal()
    line = TrainingLine(quiet=False, stream=stream, clock=Clock())
    line.begin(4)
    line.step(report(4, loss=2.0, kl=0.25, objective=1.125))
    line.end()

    assert "4/4  cross-entropy 2.000  KL 0.250  objective 1.125  2 min left" in plain(stream.getvalue())
    assert "loss" not in plain(stream.getvalue())


def test_smoothing_begins_at_the_first_number():
    mean = Smoothed(0.5)
    mean.add(8.0)
    assert mean.value == 8.0
    mean.add(2.0)

    assert mean.value == (0.5 * 8.0 + 2.0) / 1.5
