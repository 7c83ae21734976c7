"""The map of a model's layers: each layer's attention, window, MLP, experts and parameters; one line for each kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from handmade import CONFIG, checkpoint, edit_config
from later import LATER

import surgeon
from surgeon.anatomy.anatomy import Anatomy, read_anatomy
from surgeon.anatomy.layer_table import LayerRow, layer_lines, layer_rows, pattern_of, places
from surgeon.checkpoint.header import CheckpointSpec, TensorSpec
from surgeon.text import spoken

if LATER:
    import every_type
    import matplotlib.image


def words(row: LayerRow) -> str:
    """Return what a layer is: "sliding 5, dense 52"."""
    attention = " ".join(str(part) for part in (row.attention, row.window) if part is not None)
    experts = None if row.experts is None else f"{row.experts}/{row.experts_per_token}"
    rotary = {False: "no rope", True: "rope", None: None}[row.rotary]
    mlp = " ".join(str(part) for part in (row.mlp, experts, row.ffn) if part is not None)
    return ", ".join(part for part in (attention, rotary, mlp) if part)


def of(model: Path) -> tuple[LayerRow, ...]:
    return surgeon.inspect(model).layers


KINDS = {
    "llama": ["full, dense 52"] * 6,
    "gemma3_text": ["sliding 5, dense 52", "sliding 5, dense 52", "full, dense 52"] * 2,
    "smollm3": ["full, rope, dense 52", "full, rope, dense 52", "full, no rope, dense 52"] * 2,
    "mixtral": ["full, experts 7/3 52"] * 6,
    "gpt_oss": ["sliding 5, experts 7/3 52", "full, experts 7/3 52"] * 3,
    "deepseek_v3": ["full, dense 52"] * 2 + ["full, experts 9/5 28"] * 4,
    "qwen3_moe-sparse-step": ["full, experts 7/3 28" if layer in (1, 5) else "full, dense 52" for layer in range(6)],
    "lfm2": ["conv, dense 52", "conv, dense 52", "full, dense 52"] * 2,
    "gpt_neo": ["global, dense 52", "local 5, dense 52"] * 3,
    "bart": ["full, dense 44"] * 6 + ["full, dense 52"] * 6,  # the decoder, then the encoder
}


@pytest.mark.parametrize("name", KINDS)
def test_each_layer_is_what_the_config_and_the_tensors_say(name, toy):
    assert [words(row) for row in of(toy(name))] == KINDS[name]


HYBRIDS = {
    "jamba": ["mamba, dense 56", "mamba, experts 12/3 56", "mamba, dense 56", "mamba, experts 12/3 56",
              "full, dense 56", "mamba, experts 12/3 56"],
    "nemotron_h": ["linear, none", "none, experts 12/3 24", "full, none", "none, dense 56", "linear, none",
                   "none, experts 12/3 24"],
    "mamba": ["mamba, none"] * 6,
}  # fmt: skip


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_without_a_whole_table_shows_what_mixes_the_tokens_of_each_layer(name, tmp_path):
    every_type.build(name, tmp_path / "model")

    assert [words(row) for row in of(tmp_path / "model")] == HYBRIDS[name]


@pytest.mark.parametrize("name", ["gemma3_text", "deepseek_v3", "bart", "t5", "lfm2"])
def test_the_parameters_of_the_layers_and_of_the_rest_are_all_there_are(name, toy):
    inspection = surgeon.inspect(toy(name))
    stacks = inspection.anatomy.stacks
    outside = sum(
        stored.spec.num_parameters
        for tensor, stored in inspection.tensors.items()
        if not any(stack.locate(tensor) for stack in stacks)
    )

    assert sum(row.parameters for row in inspection.layers) + outside == inspection.anatomy.spec.num_parameters


def unknown(rest: str, shape: tuple[int, ...], **config: Any) -> Anatomy:
    """Return the anatomy of two layers, of a type that nobody knows, with one tensor each."""
    tensors = {f"blocks.{layer}.{rest}": TensorSpec("F32", shape) for layer in range(2)}
    spec = CheckpointSpec({"model_type": "unheard_of", "num_hidden_layers": 2, **config}, tensors)
    return read_anatomy(spec)


def test_what_nobody_says_is_not_made_up():
    (row, _) = layer_rows(unknown("kernel", (4, 4), intermediate_size=12))
    wide, narrow = (layer_rows(unknown("mlp.up.weight", (size, 4), intermediate_size=12))[0] for size in (12, 10))

    assert (row.attention, row.mlp, row.ffn) == (None, None, None)
    assert layer_lines([row])[1] == [("0", "not known", "not known", "16")]
    assert (wide.mlp, wide.ffn) == ("dense", 12)
    assert (narrow.mlp, narrow.ffn) == ("dense", None)  # no tensor has the width that the config gives


def row(layer: int, attention: str) -> LayerRow:
    return LayerRow(
        layer=layer, stack="model.layers.", attention=attention, window=512 if attention == "sliding" else None,
        rotary=None, mlp="dense", ffn=21504, experts=None, experts_per_token=None, parts={"mlp": 5},
    )  # fmt: skip


def test_sixty_layers_in_a_pattern_are_two_lines_and_the_pattern():
    rows = [row(layer, "full" if layer % 6 == 5 else "sliding") for layer in range(62)]

    header, lines, pattern = layer_lines(rows)

    assert header == ("", "layers", "attention", "MLP", "parameters each")
    assert lines == [
        ("A", "0-4, 6-10, ..., 60-61", "sliding, window 512", "dense 21,504", "5"),
        ("B", "5, 11, ..., 59", "full", "dense 21,504", "5"),
    ]
    assert pattern == "AAAAAB x10, AA"


def test_runs_that_do_not_come_back_need_no_pattern():
    rows = [row(layer, "sliding" if layer < 7 else "full") for layer in range(12)]

    header, lines, pattern = layer_lines(rows)

    assert header[0] == "layers"
    assert [line[0] for line in lines] == ["0-6", "7-11"]
    assert pattern == ""


def test_a_pattern_without_a_period_is_written_in_groups_of_ten():
    assert pattern_of("ABBAAABABBBA") == "ABBAAABABB BA"
    assert pattern_of("ABAB") == "AB x2"
    assert places([3, 5]) == "3, 5"


def test_inspect_prints_the_map_and_json_has_every_layer(run, toy):
    text = run("inspect", toy("gemma3_text")).out
    parsed = json.loads(run("inspect", toy("gemma3_text"), "--json").out)

    assert "  pattern      AAB x2\n" in text
    assert "  A  0-1, 3-4  sliding, window 5  dense 52  17,300\n  B  2, 5      full" in text
    assert [layer["attention"] for layer in parsed["per_layer"]] == ["sliding", "sliding", "full"] * 2
    assert parsed["per_layer"][1] == {
        "layer": 1, "stack": "model.layers.", "attention": "sliding", "window": 5, "rotary": None, "mlp": "dense",
        "ffn": 52, "experts": None, "experts_per_token": None, "parameters": 17300,
        "parameters_by_part": {"attention": 9600, "mlp": 7488, "norm": 212},
    }  # fmt: skip


def test_a_filter_lists_the_tensors_with_such_names(run, tmp_path):
    model = checkpoint(tmp_path / "model")

    some = json.loads(run("inspect", model, "--filter", "*.1.mlp.*", "--json").out)["tensors"]
    text = run("inspect", model, "--tensors", "--filter", "*norm.weight").out
    none = run("inspect", model, "--filter", "lm_head")

    assert list(some) == [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    assert text.count("norm.weight") == 4 + 3
    assert "q_proj" not in text
    assert (none.code, "no tensor is lm_head" in none.out) == (0, True)


@pytest.mark.slow
def test_plot_draws_a_column_for_each_layer(run, toy, tmp_path):
    few = run("inspect", toy("gemma3_text"), "--plot", tmp_path / "a.png", "--json")
    run("inspect", toy("t5"), "--plot", tmp_path / "b.svg")
    wrong = run("inspect", toy("llama"), "--plot", tmp_path / "a.jpg")

    assert json.loads(few.out)["pictures"] == [str(tmp_path / "a.png")]
    assert matplotlib.image.imread(tmp_path / "a.png").shape[1] == 1050
    assert (tmp_path / "b.svg").read_text().count("decoder.block.") == 2
    assert wrong.err.startswith(f"error: --plot: cannot draw to {tmp_path / 'a.jpg'}")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "on": True}, "rope_type yarn, factor 4.0, on true"),
        ([1, [2, 3], {"a": None}], "1, (2, 3), (a null)"),
        ("bfloat16", "bfloat16"),
        ({}, "(empty)"),
        ("", "(empty)"),
    ],
)
def test_a_value_of_json_is_said_in_words(value, expected):
    assert spoken(value) == expected


def test_prose_holds_no_json(run, tmp_path):
    model = checkpoint(tmp_path / "model")
    edit_config(model, rope_scaling={"rope_type": "linear", "factor": 2.0})
    run("truncate", model, "--layers", 2, "-o", tmp_path / "cut")
    edit_config(tmp_path / "cut", rope_scaling={"rope_type": "dynamic", "factor": 4.0}, unknown={"a": [1, {"b": 2}]})

    text = run("inspect", tmp_path / "cut", "--against", model).out

    assert "made by      truncate (layers 2" in text
    assert "config unknown" in text
    assert not set('{}"') & set(text), text
    assert CONFIG["model_type"] in text


def test_a_receipt_of_any_form_is_shown_in_words(run, tmp_path):
    model = checkpoint(tmp_path / "model")
    deep: Any = "end"
    for _ in range(20):
        deep = {"a": [deep]}
    (model / "surgeon.json").write_text(json.dumps({"steps": [{"odd": {}}, {"x": {"y": deep, "z": 1}}]}))

    outcome = run("inspect", model)

    assert outcome.code == 0, outcome.err
    assert "made by      odd, then x (y (a ((a ((...))))), z 1)\n" in outcome.out
