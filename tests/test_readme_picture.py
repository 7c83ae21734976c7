"""The picture at the top of the README: every figure in it is read from a run, and a mix of runs is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import readme_picture
import talkers

import surgeon

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a model, its cut, the cut trained on, and their evaluations."""
    here = tmp_path_factory.mktemp("story")
    text = talkers.written(here / "text.txt", talkers.TEXT * 8)
    model = talkers.talker(here / "model")
    shape = {"data": [text], "samples": 4, "sequence_length": 32}
    surgeon.prune(model, score="last", layers=4).save(here / "cut")
    surgeon.finetune(
        here / "cut",
        data=[text],
        teacher=str(model),
        output=here / "healed",
        max_steps=2,
        batch_size=2,
        sequence_length=32,
    )
    for name in ("cut", "healed"):
        evaluation = surgeon.evaluate(here / name, baseline=model, **shape)
        (here / f"{name}.json").write_text(json.dumps(evaluation.to_dict()))
    return here


def places(story: Path, *, cut: str = "cut", healed: str = "healed") -> list[Path]:
    return [story / "model", story / cut, story / healed, story / f"{cut}.json", story / f"{healed}.json"]


def test_the_figures_are_those_of_the_run(story):
    models, about, depth = readme_picture.read(*places(story))
    told = [json.loads((story / f"{name}.json").read_text()) for name in ("cut", "healed")]
    figures = [told[0]["baseline"], *told]

    assert depth == 6
    assert [sorted(model.layers) for model in models] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 5], [0, 1, 2, 5]]
    assert [model.perplexity for model in models] == [figure["perplexity"] for figure in figures]
    assert [model.error for model in models] == [figure["perplexity_error"] for figure in figures]
    assert models[1].parameters == surgeon.inspect(story / "cut").anatomy.spec.num_parameters < models[0].parameters
    assert models[2].title == "healed: 2 steps with the whole model as teacher"
    assert about == "perplexity on 4 rows of 32 tokens of text.txt (± 2 errors)"


def test_the_picture_shows_each_layer_and_marks_what_went(story):
    (axes,) = readme_picture.drawn(*readme_picture.read(*places(story))).axes
    words = [text.get_text() for text in axes.texts]

    assert len(axes.patches) == 3 * 6
    assert sum(patch.get_linestyle() != "solid" for patch in axes.patches) == 2 * 2
    assert words.count("3") == 3
    assert sum("4 layers, " in text for text in words) == 2


def test_evaluations_of_other_models_or_texts_are_refused(story):
    with pytest.raises(SystemExit, match="is none of .*model against .*cut"):
        readme_picture.read(*[story / "cut", story / "model", *places(story)[2:]])
    with pytest.raises(SystemExit, match="has no receipt of a training"):
        readme_picture.read(*places(story, healed="cut"))
