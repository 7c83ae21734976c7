"""Pictures: real files of the size asked for, which show what was measured and what went."""

from __future__ import annotations

import math
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from later import LATER

import surgeon
from surgeon.errors import OutputError, PlanError
from surgeon.measure.record import Scores
from surgeon.plots import pruning as plots
from surgeon.plots.figure import BLUE, RED, line_style, require_matplotlib, save, spans_decades
from surgeon.transforms.kept import Remains, remains

if LATER:
    import matplotlib.colors
    import matplotlib.image
    import numpy as np
    import torch
    from safetensors import safe_open

MATRIX = [[None if e <= s else 0.1 * (e - s) + 0.01 * s for e in range(5)] for s in range(4)]


def pruning(
    score: str | None, values: Any = None, dropped: tuple[int, ...] = (), greedy: Any = None, loss: float | None = None
) -> dict[str, Any]:
    """Return what a picture needs of a pruning of four layers."""
    layers = {} if values is None else {score: values}
    scores = Scores(model={}, depth=4, data=None, tokens=0, seed=0, layers=layers, greedy=greedy, loss=loss)
    removed = plots.Removed(depth=4, layers=dropped)
    return {"score": score, "scores": scores, "removed": removed, "title": "model: 4 → 3 layers\n$by score, on text"}


def pixels(path: Path) -> np.ndarray:
    return matplotlib.image.imread(path)[..., :3]


def count(image: np.ndarray, colour: str) -> int:
    """Return how many pixels have a colour, up to the rounding of 8 bits."""
    return int((np.abs(image - np.array(matplotlib.colors.to_rgb(colour))) < 0.01).all(-1).sum())


@pytest.fixture(autouse=True)
def no_warnings():
    """Let matplotlib complain about nothing: what it warns of, a user would see."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def draw(surgery: dict[str, Any], path: Path, **options: Any) -> np.ndarray:
    save(plots.draw_pruning(**surgery, **options), path)
    return pixels(path)


def axes_of(surgery: dict[str, Any], **options: Any) -> list[Any]:
    return plots.draw_pruning(**surgery, **options).axes


def test_a_picture_has_a_panel_for_the_scores_one_for_what_goes_and_one_for_the_curve(tmp_path):
    scores = draw(pruning("angular", MATRIX), tmp_path / "scores.png")
    cut = draw(pruning("angular", MATRIX, (1, 2)), tmp_path / "cut.png")
    curve = draw(pruning("angular", MATRIX, (1, 2)), tmp_path / "curve.png", curve=[2.0, 3.0, 9.0])
    named = draw(pruning(None, None, (1, 2)), tmp_path / "named.png")

    # Inches at 150 dots: 6.4 for scores, 1.7 for a map, 5.2 for a curve; 6.4 at least, for the title.
    assert [image.shape[1] for image in (scores, cut, curve, named)] == [960, 1215, 1995, 960]
    assert {image.shape[0] for image in (scores, cut, curve, named)} == {690}
    assert len(np.unique(scores.reshape(-1, 3), axis=0)) > 50


def test_the_title_says_what_was_pruned_by_what_on_what():
    figure = plots.draw_pruning(**pruning("angular", MATRIX, (1,)))

    assert figure.get_suptitle() == "model: 4 → 3 layers\n\\$by score, on text"  # no formula for matplotlib


@pytest.mark.parametrize(
    ("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")]
)
def test_the_name_says_the_format(suffix, begins, tmp_path):
    save(plots.draw_pruning(**pruning("angular", MATRIX, (1,))), tmp_path / f"a{suffix}")

    assert (tmp_path / f"a{suffix}").read_bytes().startswith(begins)


def test_a_bar_of_what_goes_has_another_colour_and_a_hatch(tmp_path):
    some = draw(pruning("block-influence", [0.4, 0.4, 0.4, 0.4], (1,)), tmp_path / "some.png")
    none = draw(pruning("block-influence", [0.4, 0.4, 0.4, 0.4]), tmp_path / "none.png")
    bars = [bar for bar in axes_of(pruning("block-influence", [0.4] * 4, (1,)))[0].patches if bar.get_height()]

    assert count(none, RED) == 0
    assert count(some, BLUE) > 2 * count(some, RED) > 0
    assert [bool(bar.get_hatch()) for bar in sorted(bars, key=lambda bar: bar.get_x())] == [False, True, False, False]


def test_the_map_is_dark_where_something_goes():
    axes = {
        "heads": Remains(3, {0: frozenset({0, 2}), 1: frozenset(), 2: frozenset({1, 2}), 3: frozenset({0, 1})}),
        "ffn": Remains(2, {0: frozenset({1}), 1: frozenset(), 3: frozenset({0})}),  # layer 2 has experts
    }
    surgery = pruning("angular") | {"removed": plots.Removed(depth=4, layers=(1,), axes=axes), "scores": None}

    layers, heads, neurons = (panel.images[0].get_array() for panel in axes_of(surgery))

    assert layers.tolist() == [[0], [1], [0], [0]]
    assert heads.tolist() == [[0, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 1]]
    assert np.ma.filled(neurons, 7).tolist() == [[1, 0], [1, 1], [7, 7], [0, 1]]
    assert [panel.get_title() for panel in axes_of(surgery)] == ["layer", "heads (0 to 2)", "MLP neurons (0 to 1)"]


@pytest.mark.parametrize(
    ("values", "scale"),
    [([0.5, 3.0, 4.0, 49.0], "linear"), ([0.5, 3.0, 4.0, 50.0], "log"), ([0.0, 3.0, 4.0, 500.0], "linear")],
)
def test_an_axis_without_two_decades_is_linear(values, scale):
    assert axes_of(pruning("perplexity", values))[0].get_yscale() == scale
    assert axes_of(pruning("random"), curve=values)[0].get_yscale() == scale
    assert spans_decades([*values, math.inf]) == (scale == "log")


def test_twenty_eight_lines_differ_and_neighbours_do_in_grey():
    styles = [line_style(number) for number in range(28)]

    assert len({tuple(style.values()) for style in styles}) == 28
    for one, other in pairwise(styles):
        assert one["marker"] != other["marker"]
        assert one["linestyle"] != other["linestyle"]


@pytest.mark.parametrize(
    "values", [[math.inf, 3.0, 4.0, 1e5], [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0], [math.inf] * 4]
)
def test_bars_without_an_end_and_without_a_height_are_drawn_all_the_same(values, tmp_path):
    assert draw(pruning("perplexity", values, (1,)), tmp_path / "a.png").shape == (690, 1215, 3)


@pytest.mark.parametrize("curve", [[2.0], [2.0, math.inf], [2.0, math.nan, 5.0]])
def test_a_curve_of_any_numbers_is_drawn(curve, tmp_path):
    assert draw(pruning("random", dropped=(1,)), tmp_path / "a.png", curve=curve).shape == (690, 1035, 3)


def test_a_model_of_one_layer_has_a_picture(tmp_path):
    assert draw(pruning("angular", [[None, 0.2]]), tmp_path / "a.png").shape == (690, 960, 3)


def test_a_greedy_removal_is_drawn_as_its_perplexities(tmp_path):
    greedy = {"order": [2, 1], "perplexity": [20.0, 30.0], "protect": [1, 1]}

    drawn = draw(pruning("perplexity", None, (1, 2), greedy=greedy, loss=2.5), tmp_path / "a.png")
    curve = draw(pruning("perplexity", None, (1, 2)), tmp_path / "b.png", curve=[math.exp(2.5), 20.0, 30.0])

    assert np.array_equal(drawn, curve)


def test_nothing_to_draw_is_an_error():
    with pytest.raises(PlanError, match="there is nothing to draw: nothing goes"):
        plots.draw_pruning(**pruning("random"))


def test_a_file_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "a.png").mkdir()

    with pytest.raises(OutputError, match=r"cannot write .*a\.png"):
        save(plots.draw_pruning(**pruning("angular", MATRIX)), tmp_path / "a.png")


def test_a_figure_shows_itself_in_a_notebook():
    assert plots.draw_pruning(**pruning("angular", MATRIX))._repr_png_().startswith(b"\x89PNG")


# --- what a plan keeps ----------------------------------------------------------------------------------------------


def kept(model: Path, **cut: Any) -> dict[str, Remains]:
    surgery = surgeon.prune(model, score="uniform", **cut)
    return remains(surgery.before, surgery.plan)


def test_what_stays_of_heads_and_neurons_is_what_the_weights_hold(toy, tmp_path):
    """Read off the plan, and found again in the written tensors."""
    surgery = surgeon.prune(toy("llama"), score="magnitude", drop=[2], intermediate_size=20, attention_heads=4)
    surgery.save(tmp_path / "cut")

    found = remains(surgery.before, surgery.plan)

    assert set(found) == {"heads", "ffn"}
    with (
        safe_open(toy("llama") / "model.safetensors", "pt") as old,
        safe_open(tmp_path / "cut/model.safetensors", "pt") as new,
    ):
        for place, layer in enumerate(surgery.plan.layer_map):
            before = old.get_tensor(f"model.layers.{layer}.mlp.gate_proj.weight")
            after = new.get_tensor(f"model.layers.{place}.mlp.gate_proj.weight")
            assert sorted(found["ffn"].kept[layer]) == rows_of(before, after)
            heads = old.get_tensor(f"model.layers.{layer}.self_attn.q_proj.weight").reshape(8, -1)
            left = new.get_tensor(f"model.layers.{place}.self_attn.q_proj.weight").reshape(4, -1)
            assert sorted(found["heads"].kept[layer]) == rows_of(heads, left)
    assert found["heads"].kept[2] == found["ffn"].kept[2] == frozenset()


def rows_of(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """Return the numbers of the rows of `before` that `after` holds."""
    return [number for number, row in enumerate(before) if any(torch.equal(row, left) for left in after)]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_experts_that_stay_are_counted_whatever_their_tensors_are_called(name, toy):
    found = kept(toy(name), layers=5, experts=4)

    assert set(found) == {"experts"}
    assert found["experts"].size == 7
    assert sorted(len(left) for left in found["experts"].kept.values()) == [0, 4, 4, 4, 4, 4]


def test_nothing_is_narrowed_where_only_layers_go(toy):
    assert kept(toy("llama"), layers=4) == {}
    assert kept(toy("lfm2"), layers=4) == {}


def test_without_matplotlib_the_hint_says_what_to_install(monkeypatch):
    require_matplotlib()

    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as import sees it where it is not installed
    with pytest.raises(PlanError, match="need matplotlib") as caught:
        require_matplotlib()
    assert caught.value.hint == 'pip install "surgeon[plot]"'
