"""Pictures of runs, and `surgeon plot`: what is drawn, what a mistake gets."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import pytest
import typer
from later import LATER

import surgeon
from surgeon.cli.plot import plot
from surgeon.errors import DataError, OutputError, PlanError
from surgeon.options import OptionError
from surgeon.plots.training import draw_losses, epoch_ends, names, plot_losses, series, smoothed
from surgeon.train.run_dir import METRICS, EvalReport, MetricsLog, read_metrics

if LATER:
    import matplotlib.image
    import numpy as np
    import talkers

BLUE, RED = (0.0, 0x72 / 255, 0xB2 / 255), (0xD5 / 255, 0x5E / 255, 0.0)  # the colours of the first and second run


@pytest.fixture(autouse=True)
def no_warnings():
    """Let matplotlib complain about nothing: what it warns of, a user would see."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def run(directory: Path, steps: int, *, every: int = 10, losses: dict[int, float] | None = None) -> Path:
    """Return a run of so many steps, evaluated at `every` one of them; `losses` are those that are out of line."""
    directory.mkdir(parents=True, exist_ok=True)
    log = MetricsLog(directory)
    for step in range(1, steps + 1):
        loss = (losses or {}).get(step, 2.0 + 3.0 / step)
        log.write({"step": step, "tokens": 512 * step, "loss": loss, "learning_rate": 1e-4})
        if step % every == 0:
            log.write(
                EvalReport(step=step, tokens=512 * step, validation=2.2 + 3 / step, probe=2 + 3 / step).to_record()
            )
    log.close()
    return directory


def plot_runs(runs: Iterable[Path], path: Path, *, x: str = "steps") -> Path:
    return plot_losses([(run, read_metrics(run)) for run in runs], path, x=x)


def drawn(*runs: Path, to: Path, x: str = "steps") -> np.ndarray:
    assert plot_runs(runs, to, x=x) == to
    return matplotlib.image.imread(to)[..., :3]


def count(image: np.ndarray, colour: tuple[float, float, float]) -> int:
    """Return how many pixels have a colour, up to the rounding of 8 bits."""
    return int((np.abs(image - np.array(colour)) < 0.01).all(-1).sum())


def test_each_run_has_its_colour(tmp_path):
    one = drawn(run(tmp_path / "one", 100), to=tmp_path / "one.png")
    two = drawn(tmp_path / "one", run(tmp_path / "two", 80), to=tmp_path / "two.png")

    assert one.shape == two.shape == (720, 1200, 3)  # 8 x 4.8 inches at 150 dots
    assert count(one, BLUE) > 500
    assert count(one, RED) == 0
    assert min(count(two, BLUE), count(two, RED)) > 500


def test_runs_differ_without_colours(tmp_path):
    runs = [run(tmp_path / name, 100) for name in "abcde"]

    (axes,) = draw_losses([(one, read_metrics(one)) for one in runs]).axes
    marks = [[line.get_marker() for line in axes.lines if line.get_linestyle() == style] for style in ("-", "--", ":")]
    smooth = [mark for mark in marks[0] if mark != "None"]

    assert len(set(smooth)) == len(set(marks[1])) == len(set(marks[2])) == 5
    assert smooth == marks[1] == marks[2]


def in_epochs(steps: int, length: int) -> list[dict[str, float]]:
    return [{"step": step, "tokens": 10 * step, "loss": 2.0, "epoch": step / length} for step in range(1, steps + 1)]


def test_a_line_stands_where_an_epoch_ends():
    records = [*in_epochs(7, 3), {"step": 7, "tokens": 70, "eval_loss": 2.0}]
    (axes,) = draw_losses([(Path("nowhere"), records)], x="tokens").axes
    (two,) = draw_losses([(Path("a"), records), (Path("b"), in_epochs(7, 2))]).axes

    assert epoch_ends(records, "steps") == [(1, 3), (2, 6)]
    assert epoch_ends([{"step": 1, "loss": 2.0}], "steps") == []
    assert [text.get_text() for text in axes.texts] == ["epoch 1 ", "epoch 2 "]
    assert [text.get_position()[0] for text in axes.texts] == [30, 60]
    assert [text.get_position()[0] for text in two.texts] == [3, 6, 2, 4, 6]


@pytest.mark.slow
def test_a_run_says_where_its_epochs_end(tmp_path):
    model, text = talkers.talker(tmp_path / "model"), talkers.written(tmp_path / "text.txt")
    shape = {"batch_size": 2, "sequence_length": 32, "eval_fraction": 0.0, "eval_rows": 2}

    training = surgeon.finetune(model, data=[text], output=tmp_path / "out", epochs=2, **shape)

    ends = epoch_ends(read_metrics(training.run_dir), "steps")
    assert training.steps % 2 == 0
    assert ends == [(1, training.steps // 2), (2, training.steps)]
    assert [line.get_text() for line in training.draw().axes[0].texts] == ["epoch 1 ", "epoch 2 "]


def test_the_title_says_what_was_trained_on_what(tmp_path):
    one = run(tmp_path / "one", 20)
    asked = {"model": {"path": "/home/ann/smol"}, "data": ["/data/text.txt[:90%]"], "settings": {}, "others": {}}
    (one / "run.json").write_text(json.dumps(asked))
    two = run(tmp_path / "two", 30)
    (two / "run.json").write_text("{")

    figures = [draw_losses([(each, read_metrics(each)) for each in runs]) for runs in ([one], [one, two])]

    assert figures[0].get_suptitle() == "smol on text.txt[:90%] (20 steps, 10,240 tokens)"
    assert figures[1].get_suptitle() == "2 runs (30 steps, 15,360 tokens)"


@pytest.mark.parametrize("steps", [1, 2, 3, 21])
def test_a_short_run_is_drawn_too(steps, tmp_path):
    image = drawn(run(tmp_path / "run", steps, every=1), to=tmp_path / "loss.png")

    assert count(image, BLUE) > 50


def test_tokens_are_another_axis(tmp_path):
    run(tmp_path / "short", 100)
    run(tmp_path / "long", 100)
    content = (tmp_path / "long" / METRICS).read_text()
    (tmp_path / "long" / METRICS).write_text(content.replace('"tokens": ', '"tokens": 1'))

    steps = drawn(tmp_path / "short", tmp_path / "long", to=tmp_path / "steps.png")
    tokens = drawn(tmp_path / "short", tmp_path / "long", to=tmp_path / "tokens.png", x="tokens")

    assert (steps != tokens).any()


def test_one_spike_does_not_flatten_the_rest(tmp_path):
    calm = drawn(run(tmp_path / "calm", 200), to=tmp_path / "calm.png")
    spike = drawn(run(tmp_path / "spike", 200, losses={100: 900.0}), to=tmp_path / "spike.png")

    # the thick line falls through as many rows of the picture as without it, not through a few at its bottom
    rows = [np.flatnonzero((np.abs(image - np.array(BLUE)) < 0.01).all(-1).any(1)) for image in (calm, spike)]
    assert np.ptp(rows[1]) > 0.8 * np.ptp(rows[0])


def test_what_is_not_finite_is_left_out(tmp_path):
    drawn(run(tmp_path / "run", 30, losses={7: math.nan, 8: math.inf}), to=tmp_path / "loss.png")

    nothing = run(tmp_path / "nothing", 3, losses=dict.fromkeys((1, 2, 3), math.nan))
    with pytest.raises(PlanError, match="nothing has no losses to draw"):
        plot_runs([nothing], tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_smoothing_keeps_a_line_and_the_mean_of_noise():
    line = [float(value) for value in range(200)]
    noise = [(-1.0) ** index for index in range(2000)]

    assert smoothed(line)[4:-4] == pytest.approx(line[4:-4], abs=1e-9)  # sums of up to 2e4 round
    assert max(map(abs, smoothed(noise))) < 0.03
    assert smoothed([5.0]) == [5.0]


def test_runs_are_named_by_what_tells_them_apart():
    assert names([Path("/x/a"), Path("/x/b/metrics.jsonl")]) == ["a", "b"]
    assert names([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert names([Path("/x/a"), Path("/x/a")]) == ["/x/a (1)", "/x/a (2)"]


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed

    with pytest.raises(PlanError, match="matplotlib") as caught:
        plot_runs([run(tmp_path / "run", 3)], tmp_path / "loss.png")
    assert caught.value.hint == 'pip install "surgeon[plot]"'


@pytest.mark.parametrize("name", ["nowhere/loss.png", "loss.doc"])
def test_a_place_that_cannot_be_written_is_one_line(name, tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        plot_runs([run(tmp_path / "run", 3)], tmp_path / name)


def test_a_series_pairs_values_with_their_places():
    records = [{"step": 1, "loss": 3.0}, {"step": 2, "eval_loss": 2.0, "tokens": 8}, {"step": 3, "loss": 1.0}]

    assert series(records, "loss") == ([1, 3], [3.0, 1.0])
    assert series(records, "eval_loss", x="tokens") == ([8], [2.0])
    assert series(records, "probe_loss") == ([], [])


# --- the command ------------------------------------------------------------------------------------------------


def call(*arguments: object) -> None:
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(plot)
    app([str(argument) for argument in arguments], standalone_mode=False)


def test_plot_writes_the_picture_and_says_where(tmp_path, capsys):
    call(run(tmp_path / "a", 30), run(tmp_path / "b", 20), "-o", tmp_path / "both.svg", "--x", "tokens")

    assert (tmp_path / "both.svg").read_text().startswith("<?xml")
    assert capsys.readouterr().out == f"{tmp_path / 'both.svg'}\n"


def test_plot_writes_into_the_working_directory_unless_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(run(tmp_path / "a", 30) / METRICS)

    assert (tmp_path / "loss.png").is_file()


def test_plot_json_says_what_the_runs_came_to(tmp_path, capsys):
    call(run(tmp_path / "a", 25), run(tmp_path / "b", 3), "-o", tmp_path / "both.png", "--json")

    printed = json.loads(capsys.readouterr().out)
    assert printed == {
        "output": str(tmp_path / "both.png"),
        "runs": [
            {
                "run": str(tmp_path / "a"),
                "steps": 25,
                "train_loss": 2.0 + 3 / 25,
                "eval_loss": 2.2 + 3 / 20,
                "best_eval_loss": 2.2 + 3 / 20,
                "best_step": 20,
            },
            {
                "run": str(tmp_path / "b"),
                "steps": 3,
                "train_loss": 3.0,
                "eval_loss": None,
                "best_eval_loss": None,
                "best_step": None,
            },
        ],
    }


def test_plot_of_what_is_no_run_is_one_error(tmp_path):
    with pytest.raises(DataError, match="no such run"):
        call(tmp_path / "nowhere", "-o", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_plot_knows_two_axes(tmp_path):
    with pytest.raises(OptionError, match="unknown --x 'hours'"):
        call(run(tmp_path / "a", 3), "--x", "hours")
