"""`surgeon distill` as it is typed."""

import json

import pytest
from recipe_runs import InProcess, write
from recipe_runs import run as run_recipe
from talkers import jsonl, talker
from test_rings import command, modules_after

from surgeon.recipe.figures import evaluations

RECORDS = [{"prompt": f"cat {index}?", "completion": "that was that"} for index in range(3)]
SHORT = ("--device", "cpu", "--max-new-tokens", 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return talker(tmp_path_factory.mktemp("model") / "llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return jsonl(tmp_path_factory.mktemp("data") / "chat.v2.jsonl", *RECORDS)


def test_help_imports_nothing_heavy():
    assert modules_after(command("distill", "--help")) == set()


def test_json_is_one_object_as_the_contract_has_it(run, model, data, tmp_path):
    outcome = run("distill", model, "--data", data, "-o", tmp_path / "out.jsonl", "--json", *SHORT)

    found = json.loads(outcome.out)
    assert (outcome.code, outcome.err) == (0, "")
    assert {"output", "rows", "rewritten", "kept", "dropped", "acceptance", "tokens_per_second"} <= set(found)
    assert (found["output"], found["rows"]) == (str(tmp_path / "out.jsonl"), 3)
    assert found["rewritten"] + found["kept"] == 3
    assert found["acceptance"] == found["rewritten"] / 3
    assert sum(found["reasons"].values()) == found["kept"]


def test_people_get_counts_reasons_and_what_to_run_next(run, model, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    outcome = run("distill", model, "--data", data, *SHORT)

    assert "truncated  3: it did not end within --max-new-tokens" in outcome.out
    assert "no answer passed" in outcome.out
    assert outcome.out.endswith("next: surgeon finetune CUT-MODEL --data chat-distill.jsonl\n")
    assert len((tmp_path / "chat-distill.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--prompt", "alpaca"), "One of: auto, sdft, gsm8k."),
        (("--on-fail", "skip"), "One of: keep, drop."),
        (("--engine", "sglang"), "One of: auto, transformers, vllm."),
        (("--samples", 4), "has no effect without --temperature"),
        (("--temperature", -1), "is -1"),
        (("--samples", 0, "--temperature", 1), "the least is 1"),
        (("--max-new-tokens", 0), "the least is 1"),
        (("--min-length-ratio", 3), "is no range"),
        (("--max-copied", 1.5), "not between 0 and 1"),
        (("--extract", "("), "is no regular expression"),
        (("-o", "out.json"), "no .jsonl"),
        (("--seed", -1), "lies between"),
    ],
)
def test_an_option_that_cannot_be_is_a_usage_error(options, what, run, model, data):
    outcome = run("distill", model, "--data", data, *options)

    assert outcome.code == 2
    assert what in outcome.err
    assert [line.partition(":")[0] for line in outcome.err.splitlines()] == ["error", "hint"]


def test_wrong_options_are_refused_before_anything_heavy_is_imported():
    code = (
        "import sys\nfrom surgeon.cli.app import main\n"
        "sys.argv = ['surgeon', 'distill', 'm', '--data', 'd', '--prompt', 'x']\n"
        "try:\n    main()\n"
        "except SystemExit as done:\n    assert done.code == 2"
    )
    assert modules_after(code) == set()


RECIPE = """
settings: {model: null, data: null}
steps:
  - name: words
    distill: {model: $model, data: "$data[:2]", max-new-tokens: 4, device: cpu}
  - name: healed
    finetune: {model: $model, data: words, max-steps: 1, device: cpu}
  - name: judged
    evaluate:
      model: healed
      baseline: $model
      data: [words, "$data[1:]"]
      metric: [exact-match, rouge-l]
      max-new-tokens: 4
      device: cpu
"""


def test_a_recipe_distils_trains_on_that_and_evaluates_two_tasks(model, data, tmp_path):
    recipe, commands = write(tmp_path / "r.yaml", RECIPE), InProcess()
    settings = [f"model={model}", f"data={data}"]

    done = run_recipe(recipe, tmp_path / "out", commands, settings=settings)
    again = run_recipe(recipe, tmp_path / "out", commands, settings=settings)

    assert commands.ran == ["distill", "finetune", "evaluate"], "once each"
    assert [outcome.status for outcome in again.outcomes] == ["skipped"] * 3
    assert done.outcomes[0].result["rows"] == 2
    judged = done.outcomes[2].result
    assert {name: told["records"] for name, told in judged["tasks"].items()} == {"words": 2, "chat": 2}
    lines = evaluations(done.outcomes)[1]
    assert [line[:2] for line in lines] == [
        ["words", "acceptance"],
        ["judged", "mean"],
        ["judged: words", "exact match"],
        ["judged: chat", "rouge l"],
    ]


def test_data_without_answers_is_one_line(run, model, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("The cat sat.\n")

    outcome = run("distill", model, "--data", text, "-o", tmp_path / "out.jsonl", *SHORT)

    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {text} is a text, and has no answer to rewrite\nhint: ")
    assert list(tmp_path.iterdir()) == [text]
