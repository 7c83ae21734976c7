"""The table of types and verbs: its judges catch what is wrong, and its counts are those of the README.

`make families` runs a third of the table; here are the types whose layers are hardest to follow.
"""

import sys
from pathlib import Path

import coverage_table
import every_type
import pytest
from later import LATER

import surgeon

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

if LATER:
    import families
    import oracle
    from safetensors.torch import load_file, save_file


@pytest.fixture
def cut(tmp_path):
    """Return a toy's model, and a directory with its layers 0, 1, 3 and 5."""
    from surgeon.surgery import Surgery, open_model
    from surgeon.transforms.layers import keep_layers

    source = every_type.build("qwen3_5_text", tmp_path / "source")
    begun = open_model(source)
    Surgery(begun.source, keep_layers(begun.anatomy, [0, 1, 3, 5])).save(tmp_path / "cut")
    return oracle.loaded(source), tmp_path / "cut"


def test_a_judge_of_depth_knows_the_layers_that_were_kept(cut):
    assert oracle.judge_depth(*cut, [0, 1, 3, 5]) == "exact"
    with pytest.raises(oracle.Wrong, match="logits differ"):
        oracle.judge_depth(*cut, [0, 2, 3, 5])


def test_a_judge_refuses_a_model_that_would_be_half_random(cut):
    path = cut[1] / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})

    with pytest.raises(oracle.Wrong, match="loads with 1 missing_keys, such as model.layers.2.mlp.up_proj.weight"):
        oracle.judge_depth(*cut, [0, 1, 3, 5])


def test_judges_of_width_know_growth_and_removal(tmp_path):
    source = every_type.build("qwen3", tmp_path / "source")
    surgeon.grow(source, intermediate_size="2x", noise=0.0).save(tmp_path / "grown")
    surgeon.prune(source, score="random", intermediate_size=40, evaluate=False).save(tmp_path / "narrow")

    assert oracle.judge_growth(source, tmp_path / "grown") == "exact"
    assert oracle.judge_removal(source, tmp_path / "narrow") == "exact"
    with pytest.raises(oracle.Wrong):
        oracle.judge_growth(source, tmp_path / "narrow")
    path = tmp_path / "narrow/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][:, 3] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(oracle.Wrong, match="holds slices that its source does not have"):
        oracle.judge_removal(source, tmp_path / "narrow")


@pytest.mark.parametrize("model_type", ["glm4v_moe_text", "modernbert", "flint", "nemotron_h"])
def test_depth_is_exact_where_kinds_of_layers_are_hardest_to_follow(model_type):
    for variant, cells in families.run_type(model_type, ["truncate", "cut"]).items():
        assert {verb: (cell.verdict, cell.why) for verb, cell in cells.items()} == {
            "truncate": ("exact", ""),
            "cut": ("exact", ""),
        }, variant


def test_the_counts_of_the_readme_are_those_of_the_table():
    page, readme = (ROOT / "docs/models.md").read_text(), (ROOT / "README.md").read_text()

    assert coverage_table.said_in(readme) == coverage_table.counts(page)


def test_the_table_gives_a_reason_once_and_counts_what_works():
    cell = families.Cell
    rows = {
        "two": {"": {"inspect": cell("exact"), "cut": cell("within")}},
        "three": {"": {"inspect": cell("exact"), "cut": cell("wrong", "logits differ by 2")}},
        "four": {"": {"build": cell("refused", "needs scipy")}},
        "five": {"": {"inspect": cell("refused", "five has 6 layers"), "cut": cell("refused", "five has 6 layers")}},
    }

    text = coverage_table.table(rows)

    assert "| `two` | exact | within |" in text
    assert "| `three` | exact | **wrong** 1 |" in text
    assert "1. logits differ by n" in text
    assert "- `four`: needs scipy" in text
    assert "- `five`: the type has n layers" in text
    page = f"{coverage_table.BEGIN}\n{text}\n{coverage_table.END}"
    assert coverage_table.counts(page).endswith("these work: inspect 2, cut 1.")
