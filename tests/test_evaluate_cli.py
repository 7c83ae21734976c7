"""`surgeon evaluate` as it is typed, and what it hands to lm-evaluation-harness."""

import json
import os
import stat
import sys

import pytest
from hub_server import HubServer
from talkers import jsonl, talker, written
from test_hub_cli import run as on_hub
from test_rings import command, modules_after

import surgeon
from surgeon.errors import MeasureError

CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return talker(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return written(tmp_path_factory.mktemp("text") / "a.txt")


def test_help_imports_nothing_heavy():
    assert modules_after(command("evaluate", "--help")) == set()


def test_json_is_one_object_as_the_contract_has_it(run, model, text):
    outcome = run("evaluate", model, "--data", text, "--sequence-length", 16, "--samples", 3, "--json", *CPU)

    found = json.loads(outcome.out)
    assert outcome.code == 0
    assert outcome.err == ""
    assert found["tokens"] == 45
    assert {"perplexity", "perplexity_error", "loss", "loss_error", "bits_per_byte", "bytes", "rows", "sha256"} <= set(
        found
    )
    assert (found["metric"], found["model"], found["data"], found["dtype"]) == (
        "perplexity",
        str(model),
        [text],
        "float32",
    )
    assert "baseline" not in found


def test_json_with_a_baseline_has_the_same_of_it_and_recovery(run, model, text):
    shape = ("--sequence-length", 16, "--samples", 3, "--json", *CPU)

    found = json.loads(run("evaluate", model, "--data", text, "--baseline", model, *shape).out)

    assert found["recovery"] == 100
    assert {key: found[key] for key in found["baseline"]} == found["baseline"]
    assert found["differences"] == {"loss": {"value": 0, "error": 0, "z": None}}


def test_people_get_a_table_and_a_model_card_a_block(run, model, text):
    shape = ("--data", text, "--sequence-length", 16, "--stride", 8, "--samples", 3, "--baseline", model, *CPU)

    plain, markdown = (run("evaluate", model, *shape, *more).out for more in ((), ("--markdown",)))

    assert f"model     {model}" in plain
    assert "recovery  100 ± 0 %" in plain
    assert "47 tokens, in 5 windows of 16 with a stride of 8" in plain
    lines = markdown.splitlines()
    assert lines[0] == "|  | llama | llama | difference | z |"
    assert lines[1] == "| --- | --- | --- | --- | --- |"
    assert lines[2].startswith("| perplexity | ")
    assert lines[-1].endswith("Recovery: 100 ± 0 %.")


def test_answers_and_choices_from_the_command_line(run, model, tmp_path):
    records = jsonl(tmp_path / "a.jsonl", {"prompt": "The cat", "completion": "sat"})
    questions = jsonl(tmp_path / "q.jsonl", {"question": "The cat", "choices": ["sat", "q"], "answer": "sat"})
    said = tmp_path / "said.jsonl"

    for metric, data, keys in (
        ("exact-match", records, {"exact_match", "max_new_tokens"}),
        ("rouge-l", records, {"rouge_l"}),
        ("choice", questions, {"accuracy", "accuracy_normalised"}),
    ):
        limit = () if metric == "choice" else ("--max-new-tokens", 3)
        outcome = run(
            "evaluate", model, "--data", data, "--metric", metric, *limit, "--predictions", said, "--json", *CPU
        )
        assert outcome.code == 0, outcome.err
        assert keys | {"records"} <= set(json.loads(outcome.out))
        assert set(json.loads(said.read_text())) == {"prompt", "reference", "prediction", "score"}
        said.unlink()


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--data", "a.txt", "--metric", "bleu"),
        ("--data", "a.txt", "--json", "--markdown"),
        ("--data", "a.txt", "--samples", "many"),
        ("--data", "a.txt", "--task-dir", "."),
        ("--data", "a.txt", "--tasks", "arc_easy"),
        ("--tasks", "arc_easy", "--extract", "x"),
        ("--data", "a.txt", "--device", "tpu"),
        ("--data", "a.txt", "--stride", "512"),
        ("--data", "a.txt", "--predictions", "a.jsonl"),
    ],
)
def test_bad_usage_exits_with_2(run, model, arguments):
    outcome = run("evaluate", model, *arguments)

    error, hint = outcome.err.splitlines()
    assert outcome.code == 2
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert outcome.out == ""


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (("--data", "{tmp}/none.txt"), "none.txt"),
        (("--data", "{tmp}/empty.jsonl"), "empty.jsonl"),
        (("--data", "{tmp}/text.jsonl", "--metric", "rouge-l"), "text.jsonl:1"),
        (("--data", "{tmp}/text.jsonl", "--metric", "choice"), "text.jsonl:1"),
        (("--data", "{tmp}/text.jsonl", "--baseline", "{tmp}/no/model"), "no/model"),
        (("--tasks", "arc_easy", "--task-dir", "{tmp}/nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_a_hint(run, model, tmp_path, arguments, culprit):
    (tmp_path / "empty.jsonl").touch()
    jsonl(tmp_path / "text.jsonl", {"text": "The cat sat on the mat"})
    before = sorted(tmp_path.iterdir())

    outcome = run("evaluate", model, *(str(word).format(tmp=tmp_path) for word in arguments))

    error, hint = outcome.err.splitlines()
    assert outcome.code == 1
    assert error.startswith("error: ")
    assert culprit in error
    assert hint.startswith("hint: ")
    assert outcome.out == ""
    assert sorted(tmp_path.iterdir()) == before


# --- lm-evaluation-harness --------------------------------------------------------------------------------------

# A stand-in that says what it was told and leaves results such as lm-eval 0.4.13 writes.
FAKE = """#!{python}
import json, os, pathlib, sys
words = sys.argv[1:]
print("told", json.dumps(words))
value = lambda name: words[words.index(name) + 1]
if value("--tasks") == "unknown":
    print("Traceback (most recent call last):")
    print("ValueError: no task unknown")
    sys.exit(3)
better = os.path.realpath(value("--model_args").removeprefix("pretrained=")).endswith("better")
folder = pathlib.Path(value("--output_path")) / "some_model"
folder.mkdir(parents=True)
results = {{
    "arc_easy": {{"alias": "arc_easy", "sample_len": 6, "acc,none": 0.5 + 0.3 * better, "acc_stderr,none": 0.25}},
    "gsm8k": {{"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A"}},
    "wiki": {{"bits_per_byte,none": 2.0 - better, "bits_per_byte_stderr,none": "N/A"}},
}}
higher = {{"arc_easy": {{"acc": True}}, "gsm8k": {{"exact_match": True}}, "wiki": {{"bits_per_byte": False}}}}
if value("--tasks") != "none":
    (folder / "results_1.json").write_text(json.dumps({{"results": results, "higher_is_better": higher}}))
"""


@pytest.fixture
def harness(tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "lm-eval").write_text(FAKE.format(python=sys.executable))
    (programs / "lm-eval").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")


def told(text):
    return json.loads(next(line for line in text.splitlines() if line.startswith("told ")).removeprefix("told "))


def test_tasks_go_to_the_harness_and_its_results_are_read(run, harness, model, tmp_path):
    outcome = run(
        "evaluate", model, "--tasks", "arc_easy, wiki", "--task-dir", tmp_path, "--samples", 5, "--chat", "--json"
    )

    words = told(outcome.err)
    assert words[:3] == ["run", "--model", "hf"]
    assert words[words.index("--model_args") + 1] == f"pretrained={model}"
    assert words[words.index("--tasks") + 1] == "arc_easy,wiki"
    assert words[words.index("--include_path") + 1] == str(tmp_path)
    assert words[words.index("--limit") + 1] == "5"
    assert "--apply_chat_template" in words
    found = json.loads(outcome.out)
    assert found["tasks"] == {
        "arc_easy": {"acc": {"value": 0.5, "error": 0.25}},
        "gsm8k": {"exact_match,strict-match": {"value": 0.25, "error": None}},
        "wiki": {"bits_per_byte": {"value": 2.0, "error": None}},
    }


def test_tasks_beside_a_baseline_have_a_recovery_the_right_way_up(harness, model, tmp_path):
    better = talker(tmp_path / "much,better")  # a comma separates arguments there

    found = surgeon.evaluate_tasks(model, ["arc_easy"], baseline=better)

    assert found.recovery["arc_easy"]["acc"].value == pytest.approx(100 * 0.5 / 0.8)
    assert "arc_easy  acc                       0.50 ± 0.25  0.80 ± 0.25  62 ± 37 %" in found.to_text()
    assert "| wiki | bits_per_byte↓ | 2 | 1 | none |" in found.to_markdown()
    told = found.to_dict()["recovery"]
    assert told["wiki"]["bits_per_byte"] == {"value": None, "error": None, "refused": "its figures have no errors"}
    assert "no recovery  wiki bits_per_byte: its figures have no errors" in found.to_text()


def test_a_harness_that_fails_or_leaves_nothing_is_an_error(run, harness, model):
    outcome = run("evaluate", model, "--tasks", "unknown", "-q")
    assert outcome.code == 1
    assert outcome.err.startswith(
        f"error: lm-eval fails with exit code 3 on {model}: ValueError: no task unknown\nhint: "
    )

    with pytest.raises(MeasureError, match="leaves no results"):
        surgeon.evaluate_tasks(model, ["none"])


def test_a_harness_that_is_not_there_is_an_error_that_says_how_to_get_it(run, model, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))

    outcome = run("evaluate", model, "--tasks", "arc_easy")

    assert outcome.code == 1
    assert outcome.err.splitlines() == [
        "error: lm-evaluation-harness is not installed: there is no command lm-eval",
        'hint: pip install "surgeon[eval]"',
    ]


# --- a model on the Hub -----------------------------------------------------------------------------------------


def test_a_model_on_the_hub_scores_what_its_files_do(model, text, tmp_path):
    records = jsonl(tmp_path / "a.jsonl", {"prompt": "The cat", "completion": "sat"})
    options = {
        "perplexity": ("--data", text, "--sequence-length", 16, "--samples", 3),
        "rouge_l": ("--data", records, "--metric", "rouge-l", "--max-new-tokens", 3),
    }
    with HubServer() as server:
        server.commit("org/model", {path.name: path.read_bytes() for path in model.iterdir()})
        for figure, words in options.items():
            process = on_hub(tmp_path, server, "evaluate", "org/model", *words, "--baseline", model, "--json", *CPU)

            found = json.loads(process.stdout)
            assert process.stderr == ""
            assert found["model"] == "org/model"
            assert found[figure] == found["baseline"][figure]
