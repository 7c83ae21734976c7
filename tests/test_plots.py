"""Pictures: real files of the size asked for, which show what was measured and what went."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from later import LATER

from surgeon.errors import OutputError, PlanError
from surgeon.measure.record import Scores
from surgeon.plots import pruning as plots
from surgeon.plots.figure import require_matplotlib

if LATER:
    import matplotlib.image
    import numpy as np

MATRIX = [[None if e <= s else 0.1 * (e - s) + 0.01 * s for e in range(5)] for s in range(4)]
RED, BLUE = (1.0, 0.0, 0.0), (0.122, 0.467, 0.706)  # the dot of what went; tab:blue


def pruning(
    score: str, values: Any = None, dropped: tuple[int, ...] = (), greedy: Any = None, loss: float | None = None
) -> Any:
    """Return what a picture needs of a pruning."""
    layers = {} if values is None else {score: values}
    scores = Scores(model={}, depth=4, data=None, tokens=0, seed=0, layers=layers, greedy=greedy, loss=loss)
    return {"score": score, "scores": scores, "dropped": dropped}


def pixels(path: Path) -> np.ndarray:
    return matplotlib.image.imread(path)[..., :3]


def count(image: np.ndarray, colour: tuple[float, float, float]) -> int:
    """Return how many pixels have a colour, up to the rounding of 8 bits."""
    return int((np.abs(image - np.array(colour)) < 0.01).all(-1).sum())


@pytest.fixture(autouse=True)
def no_warnings():
    """Let matplotlib complain about nothing: what it warns of, a user would see."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def draw(surgery: Any, path: Path, **options: Any) -> np.ndarray:
    plots.plot_pruning(path, **surgery, **options)
    return pixels(path)


def test_a_picture_is_a_file_of_one_panel_or_two(tmp_path):
    one = draw(pruning("angular", MATRIX, (1, 2)), tmp_path / "one.png")
    two = draw(pruning("angular", MATRIX, (1, 2)), tmp_path / "two.png", curve=[2.0, 3.0, 9.0])
    alone = draw(pruning("random"), tmp_path / "alone.png", curve=[2.0, 3.0, 9.0])

    assert one.shape == alone.shape == (690, 960, 3)  # 6.4 x 4.6 inches at 150 dots
    assert two.shape == (690, 1920, 3)
    assert len(np.unique(one.reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize(
    ("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")]
)
def test_the_name_says_the_format(suffix, begins, tmp_path):
    plots.plot_pruning(tmp_path / f"a{suffix}", **pruning("angular", MATRIX, (1,)))

    assert (tmp_path / f"a{suffix}").read_bytes().startswith(begins)


def test_a_bar_is_red_for_each_layer_that_went(tmp_path):
    some = draw(pruning("block-influence", [0.4, 0.4, 0.4, 0.4], (1,)), tmp_path / "some.png")
    none = draw(pruning("block-influence", [0.4, 0.4, 0.4, 0.4]), tmp_path / "none.png")

    red = (0.839, 0.153, 0.157)  # tab:red
    assert count(none, red) == 0
    assert count(some, BLUE) == pytest.approx(3 * count(some, red), rel=0.05)  # edges of bars blend


def test_a_block_has_one_red_dot_and_free_layers_one_each(tmp_path):
    block, free, none = (
        count(draw(pruning("angular", MATRIX, dropped), tmp_path / "a.png"), RED) for dropped in ((1, 2), (0, 3), ())
    )

    assert none == 0
    # The legend has a dot of its own: two dots and three. A dot cut by another or blended at its rim is less.
    assert 1.3 < free / block < 1.7


@pytest.mark.parametrize(
    "values", [[math.inf, 3.0, 4.0, 1e5], [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0], [math.inf] * 4]
)
def test_bars_without_an_end_and_without_a_height_are_drawn_all_the_same(values, tmp_path):
    assert draw(pruning("perplexity", values, (1,)), tmp_path / "a.png").shape == (690, 960, 3)


@pytest.mark.parametrize("curve", [[2.0], [2.0, math.inf], [2.0, math.nan, 5.0]])
def test_a_curve_of_any_numbers_is_drawn(curve, tmp_path):
    assert draw(pruning("random", dropped=(1,)), tmp_path / "a.png", curve=curve).shape == (690, 960, 3)


def test_a_model_of_one_layer_has_a_picture(tmp_path):
    assert draw(pruning("angular", [[None, 0.2]]), tmp_path / "a.png").shape == (690, 960, 3)


def test_a_greedy_removal_is_drawn_as_its_perplexities(tmp_path):
    greedy = {"order": [2, 1], "perplexity": [20.0, 30.0], "protect": [1, 1]}

    drawn = draw(pruning("perplexity", None, (1, 2), greedy=greedy, loss=2.5), tmp_path / "a.png")
    curve = draw(pruning("perplexity", None, (1, 2)), tmp_path / "b.png", curve=[math.exp(2.5), 20.0, 30.0])

    assert np.array_equal(drawn, curve)


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(PlanError, match="random has nothing to draw"):
        plots.plot_pruning(tmp_path / "a.png", **pruning("random", dropped=(1,)))
    assert not (tmp_path / "a.png").exists()


def test_a_file_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "a.png").mkdir()

    with pytest.raises(OutputError, match=r"cannot write .*a\.png"):
        plots.plot_pruning(tmp_path / "a.png", **pruning("angular", MATRIX))


def test_without_matplotlib_the_hint_says_what_to_install(monkeypatch):
    require_matplotlib()

    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as import sees it where it is not installed
    with pytest.raises(PlanError, match="need matplotlib") as caught:
        require_matplotlib()
    assert caught.value.hint == 'pip install "surgeon[plot]"'
