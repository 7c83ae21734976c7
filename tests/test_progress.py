"""Progress: every piece of work announces itself to whoever watches the call, and bars show it on a terminal."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import talkers

import surgeon
from surgeon.cli.training_line import TrainingLine
from surgeon.progress import Bars, Silence, Stage, current, meter, stage, usual, watched
from surgeon.train.run_dir import StepReport

pytestmark = pytest.mark.usefixtures("one_thread")


class Recorder:
    """A watcher that writes down what it is told: the names of the work, and how much of it was counted."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.counted: dict[str, float] = {}
        self.totals: dict[str, float | None] = {}
        self.open = 0

    def begin(self, what: str, total: float | None = None, unit: str = "") -> Stage:
        self.begun.append(what)
        self.totals[what] = total
        self.open += 1
        return Recorded(self, what)


class Recorded:
    def __init__(self, recorder: Recorder, what: str) -> None:
        self.recorder, self.what, self.is_over = recorder, what, False

    def __call__(self, count: float) -> None:
        self.recorder.counted[self.what] = self.recorder.counted.get(self.what, 0.0) + count

    def done(self) -> None:
        self.recorder.open -= not self.is_over
        self.is_over = True


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talkers.talker(tmp_path_factory.mktemp("talker"))


@pytest.fixture
def text(tmp_path: Path) -> str:
    return talkers.written(tmp_path / "text.txt", talkers.TEXT * 4)


# --- who watches --------------------------------------------------------------------------------------------------


def test_work_is_told_to_the_innermost_watcher_and_ends_where_it_fails():
    outer, inner = Recorder(), Recorder()
    with watched(outer):
        with watched(None), stage("one", 4, "rows") as count:
            count(1)
            count(2)
        with watched(inner), pytest.raises(ValueError, match="no"), stage("two"):
            raise ValueError("no")
        with watched(False), stage("three"):
            assert isinstance(current(), Silence)

    assert (outer.begun, outer.counted, outer.totals, outer.open) == (["one"], {"one": 3}, {"one": 4}, 0)
    assert (inner.begun, inner.open) == (["two"], 0)
    assert isinstance(usual(), Silence), "tests have no terminal"


def test_a_meter_counts_tokens_by_the_layers_that_they_went_through_and_ends_with_the_last():
    watcher = Recorder()
    with watched(watcher):
        count = meter("scoring", 10, 4)
        for _ in range(4):
            count(10)

    assert watcher.totals == {"scoring": 10}
    assert watcher.counted["scoring"] == pytest.approx(10)
    assert watcher.open == 0


# --- what is announced --------------------------------------------------------------------------------------------


def test_a_training_announces_its_stages(talker: Path, text: str, tmp_path: Path) -> None:
    watcher = Recorder()
    options: dict[str, Any] = {"max_steps": 3, "batch_size": 2, "sequence_length": 32, "eval_rows": 2}
    surgeon.finetune(talker, data=[text], output=tmp_path / "out", progress=watcher, **options)

    order = ["loading talker", "trying several documents in one row", "tokenising", "training", "evaluating"]
    order = [name.replace("loading talker", f"loading {talker.name}") for name in order]
    places = [watcher.begun.index(name) for name in order]
    assert places == sorted(places)
    assert {"writing a checkpoint", "storing the trained weights", "writing"} <= set(watcher.begun)
    assert (watcher.totals["training"], watcher.counted["training"]) == (3, 3)
    assert watcher.counted["evaluating"] == watcher.begun.count("evaluating") * watcher.totals["evaluating"]
    assert (
        watcher.counted["writing"] == (tmp_path / "out/model.safetensors").stat().st_size or watcher.totals["writing"]
    )
    assert watcher.open == 0


def test_measuring_announces_its_stages(talker: Path, text: str, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"data": [text], "samples": 2, "sequence_length": 16}
    evaluated, scored, diagnosed = Recorder(), Recorder(), Recorder()
    surgeon.evaluate(talker, **shape, progress=evaluated)
    surgeon.prune(talker, layers=4, **shape, progress=scored).save(tmp_path / "cut", progress=scored)
    surgeon.diagnose(talker, **shape, skip_samples=1, progress=diagnosed)

    loading = f"loading {talker.name}"
    assert evaluated.begun[0] == loading
    assert evaluated.begun[-2:] == ["tokenising", "perplexity"]
    assert evaluated.counted["perplexity"] == pytest.approx(32)
    assert [name for name in scored.begun if name != loading] == ["tokenising", "scoring", "compensating", "writing"]
    assert {"tokenising", "looking at attention"} <= set(diagnosed.begun)
    assert (evaluated.open, scored.open, diagnosed.open) == (0, 0, 0)


def test_writing_an_answer_announces_its_stages(talker: Path, tmp_path: Path) -> None:
    generated, verified = Recorder(), Recorder()
    surgeon.generate(talker, "the cat", max_new_tokens=2, progress=generated)
    surgeon.grow(talker, layers=7).save(tmp_path / "grown")
    with watched(verified):
        surgeon.verify(talker, tmp_path / "grown")

    assert generated.begun[-1] == "generating"
    assert verified.begun[0] == "comparing with the source"
    assert f"loading {talker.name}" in verified.begun
    assert (generated.open, verified.open) == (0, 0)


def test_the_import_of_a_large_library_is_work_too_and_leaves_no_trace() -> None:
    """In a process of its own, which has imported neither."""
    script = """
import sys
from surgeon.progress import Silence, watched
class Watcher(Silence):
    def begin(self, what, total=None, unit=""):
        print(what)
        return self
before = list(sys.meta_path)
with watched(Watcher()):
    import torch
assert sys.meta_path == before
assert type(torch.__spec__.loader).__name__ == type(torch.__loader__).__name__ == "SourceFileLoader"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ))

    assert done.returncode == 0, done.stderr
    assert done.stdout == "loading PyTorch\n"


# --- bars ---------------------------------------------------------------------------------------------------------


def plain(written: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)


def drawn(bars: Bars) -> None:
    """Wait until the bars are on their terminal."""
    began = threading.Event()
    for _ in range(1000):
        if bars._drawn is not None:
            return
        began.wait(0.01)


def test_bars_show_what_is_done_on_a_terminal_and_go_away():
    terminal = Terminal()
    bars = Bars(stream=terminal, delay=0.0)
    outer, inner = bars.begin("loading a model"), bars.begin("writing", 4000, "bytes")
    drawn(bars)
    inner(1000)
    inner.done()
    outer.done()
    outer.done()

    written = plain(terminal.getvalue())
    assert "loading a model" in written
    assert "writing" in written
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") == 1  # the cursor is back
    assert bars._drawn is None


def test_work_that_is_over_at_once_is_not_shown():
    terminal = Terminal()
    bars = Bars(stream=terminal, delay=60.0)
    bars.begin("quick").done()

    assert terminal.getvalue() == ""
    assert bars._timer is None


@pytest.mark.parametrize(
    "bars", [Bars(stream=io.StringIO(), delay=0.0), Bars(stream=Terminal(), quiet=True, delay=0.0)]
)
def test_nothing_is_shown_without_a_terminal_and_none_on_request(bars):
    begun = bars.begin("loading")
    begun(3)
    begun.done()

    assert (bars._timer, bars._drawn) == (None, None)


def test_the_line_of_a_training_shows_what_is_done_between_its_steps():
    terminal = Terminal()
    bars = Bars(stream=terminal, delay=60.0)
    with watched(bars):
        line = TrainingLine(quiet=False, stream=terminal)
        line.begin(4)
        with stage("evaluating", 4, "rows") as count:
            count(1)
            line.step(StepReport(step=4, tokens=8, loss=1.0, learning_rate=1e-4))
        line.end()

    assert "evaluating 25%  4/4" in plain(terminal.getvalue())
    assert bars.line is None
