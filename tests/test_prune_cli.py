"""`surgeon prune` as users meet it: what is printed and written, JSON, pictures, refusals, interruption."""

import json
import math
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import toys
from handmade import checkpoint, snapshot
from later import LATER
from test_prune import BY_HAND, GONE, bypassed, give_tokenizer, loaded, record, words

import surgeon
from surgeon.measure.record import read_scores
from surgeon.transforms.scores import METHODS

if LATER:
    import matplotlib.image

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT = 60  # seconds that no subprocess here comes near
ROWS = ("--samples", 3, "--sequence-length", 14, "--no-compensate")  # cuts as scores choose them
# What a writing command prints in JSON, and what prune adds.
SUMMARY = {"output", "layers", "parameters", "bytes_read", "bytes_written", "bytes_shared", "layer_map", "files"}
SUMMARY |= {"config", "notes", "peak_memory", "seconds"}
CHOICE = {"score", "scores", "dropped", "value", "next_best", "next_value"}


@pytest.fixture(scope="module")
def model(toy, tmp_path_factory):
    """Return a Llama with a tokenizer. Read-only."""
    directory = tmp_path_factory.mktemp("models") / "llama"
    shutil.copytree(toy("llama"), directory)
    return give_tokenizer(directory)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(words(100))
    return path


@pytest.fixture
def scored(model, tmp_path):
    """Return a record of scores by which layers 1 and 2 go."""
    (tmp_path / "scored").mkdir()
    return record(model, tmp_path / "scored/scores.json")


def refused(outcome, message, hint="", code=1):
    """The outcome is an exit code, nothing on standard output, one line of error and one of hint."""
    assert outcome.code == code
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert len(lines) == 2, outcome.err
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert lines[1].startswith("hint: ")
    assert hint in lines[1]


# --- what is printed ------------------------------------------------------------------------------------------------


def test_json_is_one_object_with_the_choice_and_the_scores_and_nothing_else(model, text, tmp_path, run):
    out = tmp_path / "cut"

    outcome = run("prune", model, "--layers", 4, "--data", text, *ROWS, "-o", out, "--json")

    found = json.loads(outcome.out)
    assert outcome.code == 0
    assert outcome.err == ""
    assert found.keys() == SUMMARY | CHOICE | {"perplexity", "timings"}
    assert found["output"] == str(out)
    assert found["score"] == "angular"
    assert found["layers"] == {"before": 6, "after": 4}
    assert found["parameters"]["after"] == sum(p.numel() for p in toys.load(out)[0].parameters())
    assert found["bytes_written"] == 4 * found["parameters"]["after"]
    assert found["layer_map"] == [layer for layer in range(6) if layer not in found["dropped"]]
    assert found["scores"].keys() == {"angular", "block-influence", "relative-magnitude"}
    assert [len(found["scores"][name]) for name in ("block-influence", "relative-magnitude")] == [6, 6]
    matrix = found["scores"]["angular"]
    assert [[entry is None for entry in row] for row in matrix] == [[e <= s for e in range(7)] for s in range(6)]
    assert found["value"] == matrix[found["dropped"][0]][found["dropped"][0] + 2]
    assert found["next_value"] == sorted(matrix[s][s + 2] for s in range(5))[1]
    assert found["scores"] == json.loads((out / "scores.json").read_text())["scores"]
    assert found["perplexity"].keys() == {"before", "after"}
    assert found["perplexity"]["before"] == pytest.approx(math.exp(read_scores(out / "scores.json").loss))
    assert found["perplexity"]["after"] != found["perplexity"]["before"]


def test_the_summary_says_what_went_by_what_score_and_what_it_costs(model, text, tmp_path, run):
    out = tmp_path / "cut"

    printed = run("prune", model, "--layers", 4, "--data", text, *ROWS, "-o", out).out

    scores = read_scores(out / "scores.json").layers["angular"]
    best, following = sorted(range(5), key=lambda start: scores[start][start + 2])[:2]
    rows = {line.split("  ")[1].strip(): line for line in printed.splitlines() if line.startswith("  ")}
    assert f"layers {best}-{best + 1}  (by angular, {scores[best][best + 2]:.6g})" in rows["dropped"]
    assert f"layers {following}-{following + 1}, {scores[following][following + 2]:.6g}" in rows["next best"]
    assert f"3 x 14 = 42 tokens, {text}" in printed
    before = math.exp(read_scores(out / "scores.json").loss)
    assert f"{before:,.2f} → " in rows["perplexity"]
    assert "6 → 4" in rows["layers"]
    assert f"next: surgeon finetune {out} --data {text} --teacher {model}" in printed


def test_the_command_and_the_function_write_the_same_bytes(model, text, tmp_path, run):
    options = ["--score", "block-influence", "--layers", "75%", "--intermediate-size", 40, "--protect", "1,0"]
    run("prune", model, *options, "--data", text, *ROWS, "--seed", 3, "-o", tmp_path / "a", "-q")
    surgeon.prune(
        model,
        score="block-influence",
        layers=5,
        intermediate_size=40,
        protect=(1, 0),
        data=[str(text)],
        samples=3,
        sequence_length=14,
        seed=3,
        compensate=False,
    ).save(tmp_path / "b")

    for file in ("model.safetensors", "config.json", "scores.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize("place", ["scored/scores.json", "scored"])
@pytest.mark.parametrize("score", BY_HAND)
def test_recorded_scores_cut_from_a_file_or_from_a_result(score, place, model, scored, tmp_path, run):
    out = tmp_path / "cut"
    command = ["prune", model, "--score", score, "--layers", 4, "--scores-from", tmp_path / place, "-o", out, "--json"]

    found = json.loads(run(*command).out)

    assert found["dropped"] == list(GONE[score])
    assert found["scores"] == BY_HAND
    assert "perplexity" not in found
    assert toys.logits(loaded(out)).equal(bypassed(model, GONE[score]))


def test_the_default_output_is_the_models_name_with_what_was_done(model, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)

    run("prune", model, "--score", "last", "--layers", 4)

    assert [path.name for path in tmp_path.iterdir()] == ["llama-prune-4L"]
    receipt = json.loads((tmp_path / "llama-prune-4L/surgeon.json").read_text())
    assert receipt["command"] == f"surgeon prune {model} --score last --layers 4"
    assert receipt["steps"][0]["prune"]["dropped"] == [3, 4]


def test_no_evaluation_prints_no_perplexity(model, text, tmp_path, run):
    command = ["prune", model, "--layers", 4, "--data", text, *ROWS, "--no-evaluate"]

    plain, found = (
        run(*command, "-o", tmp_path / "a").out,
        json.loads(run(*command, "-o", tmp_path / "b", "--json").out),
    )

    assert "perplexity" not in plain
    assert "perplexity" not in found
    assert read_scores(tmp_path / "a/scores.json").loss is None


def test_without_data_the_model_writes_its_text_and_the_note_says_so(toy, tmp_path, run):
    found = json.loads(run("prune", toy("gpt2"), "--layers", 5, *ROWS, "-o", tmp_path / "cut", "--json").out)

    assert any("written by the model itself" in note for note in found["notes"])
    assert found["perplexity"]["before"] > 1
    assert "sampled from the model itself" in run("prune", toy("gpt2"), "--layers", 5, *ROWS, "-o", tmp_path / "b").out


@pytest.mark.parametrize("score", [name for name in METHODS if name != "angular"])
def test_every_score_can_be_named(score, model, text, tmp_path, run):
    command = ["prune", model, "--score", score, "--layers", 4, "--protect", "1,1", "--data", text, *ROWS]

    found = json.loads(run(*command, "-o", tmp_path / "cut", "--json").out)

    assert found["score"] == score
    assert len(found["dropped"]) == 2
    assert (score in found["scores"]) == (METHODS[score].chosen == "lowest")
    assert found["perplexity"]["after"] > 1


def test_the_last_tokens_and_all_are_different_distances(model, text, tmp_path, run):
    command = ["prune", model, "--layers", 4, "--data", text, *ROWS, "--json"]

    default, last, every = (
        json.loads(run(*command, *more, "-o", tmp_path / str(number)).out)["scores"]
        for number, more in enumerate(([], ["--tokens", "last"], ["--tokens", "all"]))
    )

    assert default == last
    assert every["angular"] != last["angular"]


def test_greedy_removal_prints_its_order_in_the_record(model, text, tmp_path, run):
    command = ["prune", model, "--score", "perplexity", "--greedy", "--layers", 4, "--data", text, *ROWS]

    found = json.loads(run(*command, "-o", tmp_path / "cut", "--json").out)

    greedy = read_scores(tmp_path / "cut/scores.json").greedy
    assert found["dropped"] == sorted(greedy["order"])
    # The same sums in float32 over other groups of states: 1e-6 relative.
    assert found["perplexity"]["after"] == pytest.approx(greedy["perplexity"][-1], rel=1e-5)


def test_a_curve_is_the_perplexity_for_every_number_of_layers_up_to_half(model, text, tmp_path, run):
    command = ["prune", model, "--layers", 5, "--data", text, *ROWS, "--curve"]

    found = json.loads(run(*command, "-o", tmp_path / "a", "--json").out)
    plain = run(*command, "-o", tmp_path / "b").out

    assert len(found["curve"]) == 4
    assert found["curve"][:2] == pytest.approx(list(found["perplexity"].values()), rel=1e-5)  # as above
    for count, value in enumerate(found["curve"]):
        assert f"without {count}" in plain
        assert f"{value:,.2f}" in plain


def test_a_text_shorter_than_a_row_is_one_row_and_said_so(model, tmp_path, run):
    (tmp_path / "short.txt").write_text("w3 w4 w5 w6 w7")

    printed = run("prune", model, "--layers", 5, "--data", tmp_path / "short.txt", *ROWS, "-o", tmp_path / "cut").out

    assert "1 x 5 = 5 tokens" in printed


@pytest.mark.parametrize(
    "options", [["--layers", 6, "--score", "last"], ["--score", "magnitude", "--intermediate-size", 40]]
)
def test_where_no_layer_goes_none_is_listed(options, model, tmp_path, run):
    found = json.loads(run("prune", model, *options, "-o", tmp_path / "cut", "--json").out)

    assert found["dropped"] == []
    assert found["layer_map"] == list(range(6))


# --- dry runs -------------------------------------------------------------------------------------------------------


def test_a_dry_run_without_scores_shows_sizes_and_no_choice(model, text, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["prune", model, "--layers", 4, "--data", text, "--dry-run"]

    plain, found = run(*command), json.loads(run(*command, "--json").out)

    assert "llama-prune-4L (not written)" in plain.out
    assert "No scores yet" in plain.out
    assert "dropped" not in plain.out
    assert found.keys() == SUMMARY | CHOICE
    assert (found["dropped"], found["value"], found["next_best"], found["scores"]) == (None, None, None, {})
    assert found["output"] == "llama-prune-4L"
    assert found["config"] == {"num_hidden_layers": {"before": 6, "after": 4}}
    assert len(found["layer_map"]) == 4
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_with_scores_says_what_the_run_does(model, scored, tmp_path, run):
    command = ["prune", model, "--layers", 4, "--scores-from", scored, "-o", tmp_path / "cut", "--json"]

    planned = json.loads(run(*command, "--dry-run").out)
    assert not (tmp_path / "cut").exists()
    done = json.loads(run(*command).out)

    assert planned["dropped"] == [1, 2]
    assert done.pop("timings").keys() >= {"scoring", "writing"}
    assert planned | {"seconds": None} == done | {"seconds": None}


@pytest.mark.parametrize("score", ["random", "last", "uniform"])
def test_a_dry_run_of_what_needs_no_scores_says_which_layers_go(score, model, tmp_path, run):
    command = ["prune", model, "--layers", 4, "--score", score, "-o", tmp_path / "cut"]

    planned = json.loads(run(*command, "--dry-run", "--json").out)

    assert len(planned["dropped"]) == 2
    assert not any("No scores yet" in note for note in planned["notes"])
    assert json.loads(run(*command, "--json").out)["dropped"] == planned["dropped"]


def test_a_budget_is_planned_as_it_is_cut(model, text, tmp_path, run):
    command = ["prune", model, "--target-memory", "330KB", "--data", text, *ROWS, "-o", tmp_path / "cut", "--json"]

    planned, done = json.loads(run(*command, "--dry-run").out), json.loads(run(*command).out)

    assert planned["layers"] == done["layers"] == {"before": 6, "after": 4}
    assert planned["bytes_written"] == done["bytes_written"] <= 330_000


# --- pictures -------------------------------------------------------------------------------------------------------


def test_a_picture_shows_the_scores_and_the_curve(model, text, tmp_path, run):
    command = ["prune", model, "--layers", 5, "--data", text, *ROWS]

    plain = run(*command, "--plot", tmp_path / "a.png", "-o", tmp_path / "a")
    both = run(*command, "--curve", "--plot", tmp_path / "b.png", "-o", tmp_path / "b", "--json")
    drawn = run(*command, "--plot", tmp_path / "c.svg", "-o", tmp_path / "c")

    assert (plain.code, both.code, drawn.code) == (0, 0, 0)
    assert str(tmp_path / "a.png") in plain.out
    one, two = (matplotlib.image.imread(tmp_path / name) for name in ("a.png", "b.png"))
    assert one.shape[:2] == (690, 1215)  # 6.4 inches of scores and 1.7 of a map, at 150 dots
    assert two.shape[:2] == (690, 1995)  # and 5.2 of a curve
    assert one.std() > 0.1
    assert "<svg" in (tmp_path / "c.svg").read_text()
    json.loads(both.out)


def test_a_picture_of_recorded_scores_needs_no_text(model, scored, tmp_path, run):
    command = ["prune", model, "--layers", 4, "--scores-from", scored, "-o", tmp_path / "cut"]

    assert run(*command, "--plot", tmp_path / "a.pdf").code == 0
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_a_picture_that_cannot_be_is_refused_before_anything_is_measured(model, tmp_path, run, monkeypatch):
    command = ["prune", model, "--layers", 4, "--data", tmp_path / "none.txt", "-o", tmp_path / "cut"]

    refused(run(*command, "--plot", tmp_path / "a.jpg"), "cannot draw to", ".png, .svg, .pdf", 2)
    refused(run(*command, "--plot", tmp_path / "no/a.png"), "no such directory", "mkdir -p")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as import sees it where it is not installed
    refused(run(*command, "--plot", tmp_path / "a.png"), "need matplotlib", 'pip install "surgeon[plot]"')
    assert list(tmp_path.iterdir()) == []


def test_a_cut_without_scores_has_a_map_and_one_of_nothing_no_picture(model, tmp_path, run):
    command = ["prune", model, "--score", "last", "-o", tmp_path / "cut", "--plot", tmp_path / "a.png"]

    refused(run(*command, "--layers", 6), "nothing to draw")
    assert list(tmp_path.iterdir()) == []
    assert run(*command, "--layers", 4).code == 0
    assert matplotlib.image.imread(tmp_path / "a.png").shape[:2] == (690, 960)


def test_a_curve_without_a_text_is_refused_before_anything_is_written(model, scored, tmp_path, run):
    command = ["prune", model, "--layers", 4, "--scores-from", scored, "-o", tmp_path / "cut", "--curve"]

    refused(run(*command), "text", "--data", 2)
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize(
    "options", [["--score", "perplexity", "--greedy"], ["--score", "magnitude", "--protect", "2,2"]]
)
def test_a_curve_ends_where_no_more_layers_can_go(options, model, text, tmp_path, run):
    command = ["prune", model, *options, "--layers", 5, "--data", text, *ROWS, "-o", tmp_path / "cut", "--curve"]

    outcome = run(*command, "--json")

    assert outcome.code == 0
    assert 2 <= len(json.loads(outcome.out)["curve"]) <= 3


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--tokens", "some"], "--tokens"),
        (["--protect", "1"], "--protect"),
        (["--protect", "1,2,3"], "--protect"),
        (["--protect", "a,b"], "--protect"),
        (["--protect", "-1,0"], "--protect"),
        (["--layer", "4"], "--layer"),
        (["--hidden-size", "2x"], "--hidden-size"),
        (["--target-parameters", "6.7X"], "--target-parameters"),
        (["--samples", "many"], "--samples"),
    ],
)
def test_bad_usage_exits_with_2_and_names_the_option(options, named, model, tmp_path, run):
    outcome = run("prune", model, "--layers", 4, "-o", tmp_path / "cut", *options)

    refused(outcome, named, code=2)
    assert list(tmp_path.iterdir()) == []


def test_a_bare_command_shows_its_help(run):
    outcome = run("prune")

    assert outcome.code == 2
    assert "Example: surgeon prune" in outcome.err


@pytest.mark.parametrize(
    ("options", "message", "hint", "code"),
    [
        (["--layers", 8], "cannot prune 6 layers to 8", "surgeon grow", 1),
        (["--layers", 0], "a model needs at least one layer", "ask for 1 or more", 2),
        (["--layers", "half"], "cannot read 'half' as a number of layers", "75%", 2),
        ([], "nothing to prune", "--layers", 2),
        (["--layers", 4, "--score", "bi"], "unknown --score 'bi'", "block-influence", 2),
        (["--layers", 4, "--greedy"], "angular has no greedy form", "--score perplexity", 2),
        (["--layers", 2, "--protect", "2,2"], "the first 2 and the last 2 stay", "--protect 0,0", 1),
        (["--layers", 4, "--target-memory", "1GB"], "asked for more than once", "--layers", 2),
        (["--target-memory", "12 bananas"], "as a size", "5GB", 2),
        (["--target-parameters", "1000"], "more than the target", "", 1),
        (["--layers", 4, "--attention-heads", 7], "7 attention heads cannot share 2", "8", 1),
        (["--layers", 4, "--experts", 2], "has no experts", "--experts", 1),
        (["--like", "{model}", "--layers", 4], "beside a model to take them from", "--like", 2),
        (["--layers", 4, "--dtype", "int4"], "int4", "bfloat16", 2),
        (["--layers", 4, "--max-shard-size", "0"], "as a size", "5GB", 2),
    ],
)
def test_what_cannot_be_is_refused_before_the_text_is_looked_for(options, message, hint, code, model, tmp_path, run):
    options = [str(option).format(model=model) for option in options]

    outcome = run("prune", model, *options, "--data", tmp_path / "none.txt", "-o", tmp_path / "cut")

    refused(outcome, message, hint, code)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message", "hint", "code"),
    [
        (["--data", "{tmp}/none.txt"], "no such file or directory", "ORG/NAME", 1),
        (["--data", "{tmp}/empty.txt"], "0 tokens in", "--data", 1),
        (["--data", "{tmp}/latin.txt"], "is not UTF-8", "iconv", 1),
        (["--data", "{tmp}/broken.jsonl"], "broken.jsonl:2:", "one record per line", 1),
        (["--data", "{tmp}/data.xml"], "is of no kind that surgeon reads", ".jsonl", 1),
        (["--data", "{text}", "--samples", 0], "--samples is 0", "--samples", 2),
        (["--data", "{text}", "--samples", -1], "--samples is -1", "--samples", 2),
        (["--data", "{text}", "--sequence-length", 1], "--sequence-length is 1", "--sequence-length", 2),
        (["--data", "{text}", "--sequence-length", 65], "longer than the 64 positions", "--sequence-length 64", 1),
        (["--sequence-length", 65], "longer than the 64 positions", "--sequence-length 64", 1),
        (["--samples", 0, "--sequence-length", 14], "--samples is 0", "--samples", 2),
        (["--samples", -1, "--sequence-length", 14], "--samples is -1", "--samples", 2),
        (["--sequence-length", 1], "--sequence-length is 1", "--sequence-length", 2),
        (["--data", "{text}", "--device", "tpu"], "unknown --device 'tpu'", "cpu", 2),
        (["--scores-from", "{tmp}/none.json"], "cannot read", "scores.json", 1),
        (["--scores-from", "{tmp}/broken.jsonl"], "is not JSON", "--scores-from", 1),
        (["--scores-from", "{model}/config.json"], "is no file of scores", "--scores-from", 1),
        (["--target-parameters", "inf"], "inf", "", 2),
        (["--target-parameters", "nan"], "nan", "", 2),
    ],
)
def test_what_cannot_be_measured_is_refused_and_nothing_is_written(
    options, message, hint, code, model, text, tmp_path, run
):
    places = {"tmp": tmp_path, "model": model, "text": text}
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("w3 caf\xe9".encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text('{"text": "w3 w4"}\n{"text": \n')
    (tmp_path / "data.xml").write_text("a,b\n")
    before = snapshot(tmp_path)
    layers = [] if "--target-parameters" in options else ["--layers", 4]
    options = [str(option).format(**places) for option in options]

    outcome = run("prune", model, *layers, *options, "-o", tmp_path / "cut")

    refused(outcome, message, hint, code)
    assert snapshot(tmp_path) == before


def test_an_output_that_exists_is_refused_before_anything_is_scored(model, tmp_path, run):
    """The text does not exist: it would be an error of its own, were it looked for."""
    surgeon.truncate(model, layers=1).save(tmp_path / "cut")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    before = snapshot(tmp_path)
    command = ["prune", model, "--layers", 4, "--data", tmp_path / "none.txt"]

    refused(run(*command, "-o", tmp_path / "cut"), "exists and is not empty", "--overwrite")
    refused(run(*command, "-o", tmp_path / "notes", "--overwrite"), "is not a checkpoint", "-o")
    refused(run(*command, "-o", model, "--overwrite"), "is what MODEL reads", "-o")
    refused(run(*command, "-o", tmp_path / "notes/a.txt"), "is not a directory", "-o")
    assert snapshot(tmp_path) == before


def test_an_old_output_is_replaced_and_its_scores_with_it(model, scored, text, tmp_path, run):
    command = ["prune", model, "--layers", 4, "-o", tmp_path / "cut"]
    run(*command, "--scores-from", scored)

    assert run(*command, "--data", text, *ROWS, "--overwrite").code == 0
    assert read_scores(tmp_path / "cut/scores.json").tokens == 42
    assert run(*command, "--score", "last", "--overwrite").code == 0
    assert not (tmp_path / "cut/scores.json").exists()


def test_scores_of_other_weights_are_refused(model, toy, tmp_path, run):
    scores = record(toy("mistral"), tmp_path / "scores.json")

    outcome = run("prune", model, "--layers", 4, "--scores-from", scores, "-o", tmp_path / "cut")

    refused(outcome, "the scores are of other weights than those of", "--scores-from")
    assert not (tmp_path / "cut").exists()


def test_scores_of_the_last_token_are_not_those_of_all(model, text, tmp_path, run):
    run("prune", model, "--layers", 5, "--data", text, *ROWS, "-o", tmp_path / "last")

    outcome = run(
        "prune", model, "--layers", 4, "--tokens", "all", "--scores-from", tmp_path / "last", "-o", tmp_path / "all"
    )

    refused(outcome, "last", "--scores-from")


def test_a_checkpoint_that_is_damaged_is_refused(tmp_path, run):
    broken = checkpoint(tmp_path / "model")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-10])

    refused(run("prune", broken, "--layers", 2, "-o", tmp_path / "cut"), "model.safetensors is truncated")
    assert not (tmp_path / "cut").exists()


def test_a_model_that_overflows_is_refused_for_its_scores_are_no_numbers(model, text, tmp_path, run):
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, tmp_path / "loud")
    weights = load_file(tmp_path / "loud/model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][:] = math.inf
    save_file(weights, tmp_path / "loud/model.safetensors", metadata={"format": "pt"})

    outcome = run("prune", tmp_path / "loud", "--layers", 4, "--data", text, *ROWS, "-o", tmp_path / "cut")

    refused(outcome, "not all numbers")
    assert not (tmp_path / "cut").exists()


# --- interruption ---------------------------------------------------------------------------------------------------


def start_scoring(model, text, out, terminal):
    """Return a run that scores for many seconds, with its standard error on a terminal.

    It is the installed script: `python -m` ends by the signal itself where Ctrl-C meets exec, which a shell calls 130.
    """
    script = Path(sys.executable).with_name("surgeon")
    command = [script, "prune", model, "--layers", 4, "-o", out, "--data", text, "--samples", 8000]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    words = [str(word) for word in (*command, "--sequence-length", 60)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=terminal, text=True, env=environment)


def read_until(handle, process, word):
    """Return what a terminal shows up to a word; all of it where the word does not come."""
    shown, deadline = b"", time.monotonic() + LIMIT
    while word not in shown and time.monotonic() < deadline:
        if select.select([handle], [], [], 0.1)[0]:
            shown += os.read(handle, 65536)
        elif process.poll() is not None:
            break
    return shown


@pytest.fixture(scope="module")
def interrupted(model, tmp_path_factory):
    """Return the exit code, what was printed, what the terminal showed and what is left of a Ctrl-C while scoring."""
    place = tmp_path_factory.mktemp("interrupted")
    text = tmp_path_factory.mktemp("long") / "long.txt"
    text.write_text(words(500_000))
    (place / "cut").mkdir()
    master, slave = pty.openpty()
    process = start_scoring(model, text, place / "cut", slave)
    os.close(slave)

    shown = read_until(master, process, b"scoring")
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=LIMIT)
    with suppress(OSError):  # what a terminal answers at its end
        while rest := os.read(master, 65536):
            shown += rest
    os.close(master)
    return process.returncode, printed, shown, snapshot(place)


def test_ctrl_c_while_scoring_leaves_nothing_and_says_so_by_its_code(interrupted):
    code, printed, shown, left = interrupted

    assert b"scoring" in shown  # a bar, for it took more than a second
    assert code == 130
    assert printed == ""
    assert b"Traceback" not in shown
    assert left == {"cut": None}  # as it was


def test_ctrl_c_while_scoring_gives_the_cursor_back(interrupted):
    _, _, shown, _ = interrupted

    assert shown.count(b"\x1b[?25l") == shown.count(b"\x1b[?25h") > 0
